"""How far a long loop is, on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines of a log file
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_noinv_fmt}, {remaining} left]"
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"

Item = TypeVar("Item")


class LogLines(tqdm):
    """A tqdm that writes lines and no control characters: a log file stays readable."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def print_status(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return print_status

    def moveto(self, n: int) -> None:
        """Stay on the line: there is no cursor in a file."""

    def close(self) -> None:
        """End without taking the last line away."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def bar(
    total: int, desc: str, unit: str = "images", *, initial: int = 0, show: bool = True
) -> tqdm:
    """Return a context manager with `update(count)`, whose bar is gone when it ends.

    total, initial: things to do and things that an earlier run has done, in `unit` (a plural).
    show: False for a silent one. In a log file a loop of less than LINE_SECONDS writes nothing.
    """
    kind = {"total": total, "desc": desc, "unit": f" {unit}", "initial": initial, "leave": False}
    if not show or sys.stderr.isatty():
        return tqdm(disable=not show, bar_format=BAR, **kind)
    seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
    # miniters: every update looks at the clock, so that a slow loop is heard too
    return LogLines(bar_format=LINE, miniters=1, smoothing=0, **seldom, **kind)


def over(
    items: Iterable[Item], desc: str, unit: str, *, total: int | None = None, show: bool = True
) -> Iterator[Item]:
    """Yield the items, counted when the next one is asked for. total: where they have no len()."""
    with bar(len(items) if total is None else total, desc, unit, show=show) as shown:
        for item in items:
            yield item
            shown.update()
