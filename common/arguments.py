"""Command lines: the value types, arguments and errors that all scripts share."""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import platform
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_tokens.exceptions import InputError


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse; `args.typed` is the set of names that the user typed, as opposed to defaults."""
    args = parser.parse_args(argv)
    untyped = object()
    probe = argparse.Namespace(**dict.fromkeys(vars(args), untyped))
    parser.parse_args(argv, namespace=probe)
    args.typed = {name for name, value in vars(probe).items() if value is not untyped}
    return args


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> None:
    """Parse `argv` (default sys.argv), call `main(args)`, leave the process with its status.

    InputError, a full or read-only disk and CUDA out of memory end with exit status 2 and one line
    on stderr, Ctrl-C with 130; anything else is a programming error and keeps its traceback.
    """
    args = parse(parser, argv)
    try:
        # what torchrun sets; scripts that may be several processes call processes.run
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
            raise InputError(
                f"{parser.prog} is one process: start it with python, without torchrun"
            )
        sys.exit(main(args) or 0)
    except Exception as error:
        message = mistake(error, args)
        if message is None:
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def mistake(error: Exception, args: argparse.Namespace) -> str | None:
    """Return what the user can do about an error; None for a programming error."""
    if isinstance(error, InputError):
        # of a loader's worker process the message is a traceback, and what it says stands last
        return str(error).rsplit("InputError: ", 1)[-1].strip()
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"CUDA is out of memory: {less_memory(args)}"
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return f"{error.filename or 'a file'}: {error.strerror}: choose another folder or disk"
    return None


def less_memory(args: argparse.Namespace) -> str:
    """Return what to type instead where the device's memory is too small."""
    size = getattr(args, "batch_size", None)
    resume = getattr(args, "resume", None)
    head = getattr(args, "task_head", None) or getattr(args, "head", None)
    if getattr(args, "resize", None) == "native":
        return (
            f"--batch_tokens {args.batch_tokens} is too large, try {args.batch_tokens // 2}; an "
            "image of more tokens than that needs a smaller --max_pixels"
        )
    if size is None:
        return "type --device cpu" + (f", the head {head} does not fit" if head else "")
    if size == 1:  # what is left are the model and the head
        cause = f"the head {head} may not fit beside one image" if head else "one image is too much"
        return f"{cause} (--batch_size 1): type --device cpu, or use a smaller model"
    if resume and "batch_size" not in args.typed:
        words = "type a smaller --batch_size than the run was begun with"
    else:
        words = f"--batch_size {size} is too large, try --batch_size {size // 2}"
        # a run that was begun goes on with fewer images a step, and says what that changes
        words += " (a run that was begun takes it with --resume last)" if "resume" in args else ""
    return words + (f"; if that is too large too, the head {head} does not fit" if head else "")


def one_line(message: str) -> str:
    """Put a message on one line: what libraries say, and what users type, may have more."""
    return " ".join(message.splitlines())


_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_STORAGE_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # a file where a folder must be


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose help shows defaults and line breaks.

    doc: the script's docstring: what it does in the first line, and indented lines as examples.
    """

    def __init__(self, doc: str | None) -> None:
        first, *lines = (doc or "").split("\n")  # python -OO leaves none
        examples = [line[2:] for line in lines if line.startswith("    ")]
        super().__init__(
            prog=_program(),
            description=textwrap.fill(first, 80, break_on_hyphens=False),
            epilog="\n".join(["examples:", *examples]),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        """Print one line that names the flag and what it accepts, and exit with status 2."""
        # argparse takes -1e-9 or -inf for a flag, and says only that a value is missing
        lacking = re.match(r"argument (--\w+): expected", message)
        action = self._option_string_actions.get(lacking[1]) if lacking else None
        if action and isinstance(action.type, Number):
            message += f", {action.type.accepted}"
        if unknown := re.match(r"unrecognized arguments: --([\w-]+)", message):
            typed = "--" + unknown[1].replace("-", "_")
            if near := difflib.get_close_matches(typed, self._option_string_actions, 1, 0.5):
                message += f"; {near[0]} is one"
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


def _program() -> str | None:
    """Return what the user typed after `python`: argparse drops the `-m` and the folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = spec is not None and spec.name.startswith("experiments.")
    return f"python -m {spec.name}" if ours else None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=80)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # a switch is off and a name is absent: "(default: False)" says nothing
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def refuse_beside(args: argparse.Namespace, flag: str, used: set[str]) -> None:
    """Refuse what was typed beside --`flag` and would do nothing there; `used` would not."""
    if others := sorted(args.typed - used - {flag}):
        names = ", ".join(f"--{name}" for name in others)
        raise InputError(f"--{others[0]} does nothing beside --{flag}: omit {names}")


LARGEST_INT = 10**9  # of a flag without a limit of its own: more is a slip of the finger


@dataclass(frozen=True)
class Number:
    """An argparse type: a finite `kind` within bounds, refused with the accepted range in words."""

    kind: type[int] | type[float]
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def accepted(self) -> str:
        """The range in words."""
        bounds = {"at least": self.at_least, "above": self.above}
        bounds |= {"at most": self.at_most, "below": self.below}
        words = " and ".join(f"{word} {x}" for word, x in bounds.items() if x is not None)
        return f"{'a whole number' if self.kind is int else 'a number'} {words}".strip()

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        unlimited = self.kind is int and self.at_most is None and self.below is None
        if not (
            math.isfinite(value)
            and (value <= LARGEST_INT or not unlimited)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        ):
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {self.accepted}")
        return value


def name(text: str) -> str:
    """Check the value of a flag that is a name: text, not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: omit the flag, or type one")
    return text


def file(text: str) -> str:
    """Check the value of a flag that names a file: not empty. The script judges the file."""
    return name(text)


def folder(text: str) -> str:
    """Check the value of a flag that names a folder: not empty, no file. It may be missing."""
    path = Path(name(text))
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is not a folder: {part} is a file")
    return text


positive_int = Number(int, 1)
non_negative_int = Number(int, 0)
batch_size = layer_width = Number(int, 1, 65536)
small_int = Number(int, 0, 1000)  # of steps or layers that are done one after the other
random_seed = Number(int, 0, 2**63 - 1)
positive_float = Number(float, above=0)
fraction = Number(float, above=0, below=1)
loss_weight = Number(float, 0, 1e6)


def add_data_arguments(parser: Parser, *, metric: bool = True) -> None:
    """Add the arguments of every script that judges or uses a trained network: where its results
    and the cache are, the device and, where X can be factored in a task's metric, that metric."""
    group = parser.add_argument_group("files and device")
    add_results_dir(group)
    add_cache_dir(group)
    add_device(group)
    if metric:
        group.add_argument(
            "--metric",
            type=file,
            metavar="FILE",
            help="of experiments.estimate_metric: also factor X M^½ and map B back",
        )


def add_cache_dir(group: argparse._ActionsContainer, help: str = "feature cache to read") -> None:
    """Add --cache_dir."""
    group.add_argument(
        "--cache_dir", type=folder, default="feature_cache_real", metavar="DIR", help=help
    )


def add_results_dir(
    group: argparse._ActionsContainer, help: str = "where <arch>/best_model.pt is"
) -> None:
    """Add --results_dir."""
    group.add_argument("--results_dir", type=folder, default="results", metavar="DIR", help=help)


def add_batch_size(group: argparse._ActionsContainer) -> None:
    """Add --batch_size."""
    group.add_argument(
        "--batch_size",
        type=batch_size,
        default=8,
        metavar="N",
        help="images at once: more are faster and take more memory",
    )


def add_device(group: argparse._ActionsContainer) -> None:
    """Add --device; `pick_device` reads it."""
    group.add_argument("--device", type=name, default="auto", help="auto, cpu, cuda or cuda:N")


def add_head_model(group: argparse._ActionsContainer) -> None:
    """Add --head_model; `check_head_model` refuses it where no head reads it."""
    group.add_argument(
        "--head_model",
        type=name,
        metavar="NAME",
        help="of qwen-answer: folder or hub id; default the cache's encoder",
    )


def check_head_model(head_model: str | None, head: str | None) -> None:
    """Raise InputError where --head_model is typed and no head reads it."""
    if head_model is not None and head != "qwen-answer":
        raise InputError(
            f"--head_model {head_model} is of the head qwen-answer only: type that head, or omit "
            "--head_model"
        )


def flags_again(args: argparse.Namespace, *names: str) -> str:
    """Return those of the flags that the user typed, for the next command: " --name value"."""
    typed = ((f" --{name}", getattr(args, name)) for name in names if name in args.typed)
    return "".join(
        flag if value is True else f"{flag} {shlex.quote(str(value))}" for flag, value in typed
    )


def pick_device(name: str) -> torch.device:
    """Return the torch device for `--device`: auto (CUDA if present, else CPU), cpu, cuda[:N].

    Raises InputError for a device that torch does not know or that is not present.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: type auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"--device {name}: type auto, cpu, cuda or cuda:N")
    return device


def environment(device: torch.device) -> dict[str, str | int]:
    """Versions and hardware, for the first line of a log and for the JSON files."""
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
