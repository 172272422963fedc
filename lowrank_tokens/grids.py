"""Grids of tokens: (rows, columns) after merging, T = rows · columns, tokens in raster order."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_tokens.exceptions import InputError

Grid = tuple[int, int]
MAX_SIDE = 65536  # tokens of a side: a file that says more is damaged


def most_frequent(grids: Sequence[Grid]) -> Grid:
    """Return the grid that most images have; of several that with most tokens, then most rows."""
    counts = Counter(grids)
    return max(counts, key=lambda grid: (counts[grid], math.prod(grid), grid))


def checked_grid(grid: Sequence[int]) -> Grid:
    """Return (rows, columns) of any sequence. Raises InputError where it is no grid of tokens."""
    try:
        rows, columns = map(operator.index, grid)
    except (TypeError, ValueError):
        raise InputError(f"grid = {grid!r} is not (rows, columns) in whole numbers") from None
    return rows, columns


def token_range(grids: Sequence[Grid]) -> str:
    """Say the tokens of an image in words: "256", or "120 to 256" where they differ."""
    tokens = {math.prod(grid) for grid in grids}
    least, most = min(tokens), max(tokens)
    return str(most) if least == most else f"{least} to {most}"


def batches_of_one_grid(
    rows: Iterable[int], grids: Sequence[Grid], batch_size: int
) -> Iterator[list[int]]:
    """Yield rows in batches of one grid each, grids in the order of their first row.

    grids: of all rows.

    Which rows stand together depends on nothing but `rows`.
    """
    of_grid: dict[Grid, list[int]] = {}
    for row in rows:
        of_grid.setdefault(grids[row], []).append(row)
    for own in of_grid.values():
        yield from (own[i : i + batch_size] for i in range(0, len(own), batch_size))


def resampled(maps: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Resample maps [n, T] over the tokens of `grid` to those of `wanted`, bilinear.

    They are as they were where both grids are one.
    """
    if grid == wanted:
        return maps
    cells = maps.unflatten(-1, grid)[:, None]
    return F.interpolate(cells, wanted, mode="bilinear", antialias=True).flatten(1)


# Which tokens of a grid a box covers.
#
# A box is (x, y, w, h) in fractions of what the encoder saw.

# Less than this share of a token's side is rounding of the box's corners.
LEAST_OVERLAP = 1e-6

Box = tuple[float, float, float, float]


def box_in_view(record: dict, resize: str | None) -> Box | None:
    """Return the answer's box (x, y, w, h) as fractions of what the encoder saw.

    record: a row with bbox in pixels of the original and its width and height; resize: the
    manifest's rule. None where the row has no box.
    """
    box, width, height = record["bbox"], record["width"], record["height"]
    if not box or len(box) != 4:
        return None
    x, y, w, h = box
    if resize != "pad":  # the whole image, whatever became of its aspect ratio
        return x / width, y / height, w / width, h / height
    side = max(width, height)  # pad: centred in a square
    left, top = (side - width) / 2, (side - height) / 2
    return (x + left) / side, (y + top) / side, w / side, h / side


def tokens_in_box(box: Box | None, grid: tuple[int, int]) -> Tensor:
    """Return tokens [T] bool, in raster order, whose cell of the grid shares area with the box.

    A box smaller than a cell covers the cell it lies in. None, a box without area and one beside
    the image cover no token.
    """
    rows, columns = grid
    if box is None:
        return torch.zeros(rows * columns, dtype=torch.bool)
    x, y, w, h = box
    across, down = _cells(x, w, columns), _cells(y, h, rows)
    return (down[:, None] & across[None, :]).flatten()


def _cells(start: float, length: float, count: int) -> Tensor:
    """Return which of `count` equal cells of [0, 1] share a length with [start, start + length]."""
    left = torch.arange(count, dtype=torch.float64)
    first, last = start * count, (start + length) * count
    shared = (left + 1).clamp(max=last) - left.clamp(min=first)
    return (shared > LEAST_OVERLAP) & (length > 0)


def default_grid(tokens: int) -> Grid:
    """Return the grid of T tokens where none was noted: a square if T is one, else one row."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)
