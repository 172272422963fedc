"""What the parts of `experiments.gpu_check` share: setting, rows, guards, tokens, timing.

A part is a module with CHECKS = {part: {what: function}}; function(setting) yields or returns rows
made by `row`. One that raises becomes a row with its error, and the next one runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from common.timing import Timing, seconds_of, warm_up
from qwenvl_dataloader import RealQwenVLDataset, normalise

# what a check may raise and leave the others something to do; a bug of ours is among it, and shows
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError)
FAILURES += (AssertionError, NotImplementedError, UserError, SafetensorError)


class Skipped(Exception):
    """Names what this machine lacks for a check."""


class Sizes(NamedTuple):
    """T, D, rank, batches and so on: the 3B model's, or tiny ones."""

    tokens: int
    features: int
    rank: int
    batches: tuple[int, int]  # of training
    long_tokens: int
    svd_batch: int
    svd_ranks: tuple[int, int]
    encode_batches: tuple[int, ...]
    seconds: float  # that one timing may take


FULL = Sizes(256, 2048, 128, (8, 128), 1369, 256, (32, 128), (1, 16, 64), 1.0)
TINY = Sizes(16, 48, 8, (2, 4), 24, 3, (2, 4), (1, 2), 0.05)


@dataclass
class Setting:
    """Where and how large; pickled to the process of each part."""

    device_name: str
    tiny: bool
    cache_dir: str
    tokens_file: str | None

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    @cached_property
    def found_tokens(self) -> tuple[Tensor, str]:
        """A few images' tokens [n, T, D] as cached, and what they are."""
        if self.tokens_file:
            with safe_open(self.tokens_file, framework="pt") as file:
                return file.get_tensor("features"), (file.metadata() or {}).get("data", "tokens")
        if Path(self.cache_dir).is_dir():
            dataset = RealQwenVLDataset(self.cache_dir)
            return dataset[list(range(min(8, len(dataset))))], dataset.label
        generator = torch.Generator().manual_seed(0)
        t, d = self.sizes.tokens, self.sizes.features
        wide = torch.randn(4, t, t, generator=generator) * torch.logspace(1, -2, t)
        return wide @ torch.randn(4, t, d, generator=generator), "made-up tokens, no cache at hand"

    def x(self, batch: int, tokens: int, features: int) -> Tensor:
        """[batch, tokens, features] float32 normalised, on the CPU: `found_tokens` repeated.

        1 % of noise keeps repeated rows and columns independent. Products and Choleskys take one
        time whatever the values; iterations of an SVD or an eigensolver may not.
        """
        found = self.found_tokens[0][:batch].float()
        repeats = -(-tokens // found.shape[1]), -(-features // found.shape[2])
        found = found.repeat(1, *repeats)[:, :tokens, :features]
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(found.shape, generator=generator) * found.std()
        x = normalise(found + 0.01 * noise)[0]
        return x.repeat(-(-batch // len(x)), 1, 1)[:batch]

    def need_cuda(self, what: str) -> None:
        if self.device.type != "cuda":
            raise Skipped(f"{what} needs CUDA")


def row(what: str, value: float | str | None = None, unit="", note="", status="measured") -> dict:
    """One line of the table. status: measured, ok, differs, failed or skipped."""
    return {"what": what, "status": status, "value": value, "unit": unit, "note": note}


def compared(what: str, difference: float | Tensor, tolerance: float, note: str = "") -> dict:
    """A row that is ok where the difference's largest entry is within the tolerance; NaN is not."""
    largest = float(torch.as_tensor(difference).abs().max())
    status = "ok" if largest <= tolerance else "differs"
    return row(what, largest, "", f"at most {tolerance:g}; {note}".rstrip("; "), status)


def rows_of(part: str, module: str, setting: Setting) -> Iterator[dict]:
    """All rows of a part, whatever its checks raise."""
    try:
        checks = importlib.import_module(f"experiments.{module}").CHECKS[part]
    except ImportError as error:
        yield row(part, note=f"lacks {error.name or error}", status="skipped")
        return
    for what, check in checks.items():
        try:
            yield from check(setting)
        except (Skipped, ImportError) as reason:
            yield row(what, note=str(reason), status="skipped")
        except FAILURES as error:
            yield row(what, note=error_line(error), status="failed")
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def error_line(error: Exception) -> str:
    """Its class and first line."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}"


def speed(what: str, count: int, time: Timing, note: str, unit: str = "images/s") -> Iterator[dict]:
    """Rows: `count` things a call, and on CUDA what memory that takes."""
    yield row(what, count / time.median, unit, note)
    if time.peak_mb is not None:
        yield row(f"{what}: peak memory beside the weights", time.peak_mb, "MiB")


def timed(call: Callable[[], object], setting: Setting) -> Timing:
    """Warmed up, repeated up to 30 times for `sizes.seconds`; for twice that up to three times."""
    peak = warm_up(call, setting.device)
    seconds: list[float] = []
    limit = setting.sizes.seconds
    while len(seconds) < 30 and sum(seconds) < (limit if len(seconds) >= 3 else 2 * limit):
        seconds.append(seconds_of(call, setting.device))
    return Timing(seconds, peak)


def largest_batch(call: Callable[[int], object], full: int, setting: Setting) -> int:
    """The batch of `full`, or the largest tried (1, 8, 64 …) of which a call takes no longer than
    sizes.seconds: loops over matrices at a time would take minutes."""
    batch = 1
    while batch < full:
        call(batch)  # a first call takes longer
        if 8 * seconds_of(partial(call, batch), setting.device) > setting.sizes.seconds:
            break
        batch = min(full, 8 * batch)
    return batch
