"""How far a long loop is, on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines of a log file
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_noinv_fmt}, {remaining} left]"
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"

Item = TypeVar("Item")


class Lines(AbstractContextManager):
    """What `tqdm` does with a bar, as a line of its own every LINE_SECONDS; short loops write none.

    Nothing is rewritten in place, so the file stays readable, and a stuck run can be told.
    """

    def __init__(self, total: int, *, desc: str, unit: str, initial: int = 0) -> None:
        self.total, self.desc, self.unit, self.initial = total, desc, unit, initial
        self.n = initial
        self.begun = self.written = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if count and now - self.written >= LINE_SECONDS:
            self.written = now
            style = {"prefix": self.desc, "unit": self.unit, "bar_format": LINE}
            seconds = now - self.begun
            line = tqdm.format_meter(self.n, self.total, seconds, initial=self.initial, **style)
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        """There is no bar to take away."""

    close = __exit__


def bar(
    total: int, desc: str, unit: str = "images", *, initial: int = 0, show: bool = True
) -> tqdm | Lines:
    """A context manager with `update(count)`; gone when it ends. show: False for a silent one.

    total, initial: things to do and things that an earlier run has done, in `unit` (a plural).
    """
    kind = {"desc": desc, "unit": f" {unit}", "initial": initial}
    if not show or sys.stderr.isatty():
        return tqdm(total=total, disable=not show, leave=False, bar_format=BAR, **kind)
    return Lines(total, **kind)


def over(
    items: Iterable[Item], desc: str, unit: str, *, total: int | None = None, show: bool = True
) -> Iterator[Item]:
    """The items, counted when the next one is asked for. total: where they have no len()."""
    with bar(len(items) if total is None else total, desc, unit, show=show) as shown:
        for item in items:
            yield item
            shown.update()
