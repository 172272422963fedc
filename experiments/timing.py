"""Wall-clock time and peak memory of calls, measured in turn; matrix products and their rate."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Timing(NamedTuple):
    """What the repeated calls of one method took."""

    seconds: list[float]  # of one call on a whole batch, one entry a repeat
    peak_mb: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@torch.inference_mode()
def time_in_turn(
    calls: list[Callable[[], object]], repeats: int, device: torch.device
) -> list[Timing]:
    """Time all calls in each repeat, every other repeat in reverse order; warmed up, synchronised.

    peak_mb: CUDA memory of one call above what was there before it, 2^20 bytes; None on the CPU.
    """
    peaks = [warm_up(call, device) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats):
        for i in list(range(len(calls)))[:: -1 if repeat % 2 else 1]:
            seconds[i].append(seconds_of(calls[i], device))
    return [Timing(*pair) for pair in zip(seconds, peaks, strict=True)]


def warm_up(call: Callable[[], object], device: torch.device) -> float | None:
    """Call once, on CUDA twice; returns the second call's peak memory there, in 2^20 bytes."""
    call()
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, until the device has done it."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rates(device: torch.device, repeats: int = 15) -> dict[str, float]:
    """Multiply-adds per second of a large product on this device, fastest of `repeats`."""
    count, size = (8, 4096) if device.type == "cuda" else (2, 768)
    rates = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(count, size, size, device=device).to(dtype)
        (timing,) = time_in_turn([lambda x=x: torch.bmm(x, x)], repeats, device)
        rates[_name(dtype)] = count * size**3 / min(timing.seconds)
    return rates


def peak_tensor_mb(call: Callable[[], object]) -> float:
    """Memory of the tensors that one call makes, at the most, on the CPU, 2^20 bytes.

    From the allocator's own record, workspaces of LAPACK among them; results count.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")  # else a line on stderr a call
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            inner = args[-2].shape[-1]  # the last two are the factors
            self.counts[_name(out.dtype)] += out.numel() * inner
        return out


@torch.no_grad()
def matrix_products(call: Callable[[], object]) -> dict[str, int]:
    """Multiply-adds of the matrix products that a call makes, by data type: {} where it makes none.

    Choleskys, triangular solves, QR and eigenproblems are not among them.
    """
    with _Products() as products:
        call()
    return dict(products.counts)
