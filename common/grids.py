"""Grids of tokens: (rows, columns) after merging, T = rows · columns, tokens in raster order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def most_frequent(grids: Sequence[Grid]) -> Grid:
    """The grid that most images have; of several the one with most tokens, then most rows."""
    counts = Counter(grids)
    return max(counts, key=lambda grid: (counts[grid], math.prod(grid), grid))


def token_range(grids: Sequence[Grid]) -> str:
    """Tokens an image in words: "256", or "120 to 256" where they differ."""
    tokens = {math.prod(grid) for grid in grids}
    least, most = min(tokens), max(tokens)
    return str(most) if least == most else f"{least} to {most}"


def batches_of_one_grid(
    rows: Iterable[int], grids: Sequence[Grid], batch_size: int
) -> Iterator[list[int]]:
    """Rows in batches of one grid each, grids in the order of their first row; grids: of all rows.

    Which rows stand together depends on nothing but `rows`.
    """
    of_grid: dict[Grid, list[int]] = {}
    for row in rows:
        of_grid.setdefault(grids[row], []).append(row)
    for own in of_grid.values():
        yield from (own[i : i + batch_size] for i in range(0, len(own), batch_size))


def resampled(maps: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """maps [n, T] over the tokens of `grid` as maps over `wanted`'s, bilinear; as they are where
    both are one."""
    if grid == wanted:
        return maps
    cells = maps.unflatten(-1, grid)[:, None]
    return F.interpolate(cells, wanted, mode="bilinear", antialias=True).flatten(1)
