"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence


def print_columns(rows: Sequence[Sequence[str | int]]) -> None:
    """Print rows: the first column to the left, the others to the right."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        line = "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
        print(f"{first:{widths[0]}}{line}")
