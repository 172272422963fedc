"""What every script's command line shares: user errors, value types, devices, run header."""

from __future__ import annotations

import argparse
import errno
import platform
import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """A mistake of the user: reported as one line `error: ...` with exit status 2.

    The message says what is wrong, where (flag or file), and what to type instead.
    """


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

    UserError, a full or read-only disk and CUDA out of memory end with exit status 2 and one line
    on stderr; anything else is a programming error and keeps its traceback.
    """
    args = parse(parser, argv)
    try:
        sys.exit(main(args) or 0)
    except UserError as error:
        message = str(error)
    except torch.cuda.OutOfMemoryError:
        size = getattr(args, "batch_size", None)
        message = "CUDA is out of memory: " + (
            f"--batch_size {size} is too large, try --batch_size {max(1, size // 2)}"
            if size
            else "try --device cpu"
        )
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}: choose another folder or disk"
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def one_line(message: str) -> str:
    """A message on one line: what libraries say, and what users type, may have more."""
    return " ".join(message.splitlines())


_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_STORAGE_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # a file where a folder must be


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose help shows defaults and line breaks."""

    def __init__(self, *, description: str, epilog: str = "") -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        """Print one line that names the flag, and exit with status 2."""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=80)


def refuse_beside(args: argparse.Namespace, flag: str, used: set[str]) -> None:
    """Refuse what was typed beside --`flag` and would do nothing there; `used` would not."""
    if others := sorted(args.typed - used - {flag}):
        raise UserError(f"--{others[0]} does nothing beside --{flag}: leave one of them away")


def number(
    kind: type[int] | type[float],
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """An argparse type: a finite `kind` within bounds, refused with the accepted range in words."""
    bounds = [
        (at_least, "at least", lambda v, b: v >= b),
        (above, "above", lambda v, b: v > b),
        (at_most, "at most", lambda v, b: v <= b),
        (below, "below", lambda v, b: v < b),
    ]
    words = " and ".join(f"{word} {bound}" for bound, word, _ in bounds if bound is not None)
    noun = "a whole number" if kind is int else "a number"
    accepted = f"{noun} {words}".strip()

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if (
            value is None
            or value - value != 0  # NaN and infinities
            or not all(test(value, bound) for bound, _, test in bounds if bound is not None)
        ):
            raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}")
        return value

    return parse


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that judges or uses a trained network."""
    parser.add_argument("--results_dir", default="results", help="where <arch>/best_model.pt is")
    parser.add_argument("--cache_dir", default="feature_cache_real", help="feature cache to read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def pick_device(name: str) -> torch.device:
    """The torch device for `--device`: auto (CUDA where present, else CPU), cpu, cuda, cuda:N.

    Raises UserError for a device that torch does not know or that is not present.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: type auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: type auto, cpu, cuda or cuda:N")
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
