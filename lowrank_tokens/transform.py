"""The parts of the codec: transform of a grid, integer levels on it, and rounding.

Whatever decides a level is integers; floats decide symbols only where they are encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.entropy import (
    HIGHEST,
    LARGEST_TABLE,
    LOWEST,
    STEPS_AN_OCTAVE,
    Tables,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import normalise

LAMBDA = 0.12  # rounding minimises (z / Δ − q)² + λ bits(q)
OFFSETS = sorted(range(-8, 9), key=abs)  # of a component's levels, in an image; 0 if nothing is won
DEPENDENT = 0.05  # a rounded column of which less than this is new is dropped
UNITS = 16  # of a level, in which the codec's file keeps variances


@lru_cache(64)
def cosines(side: int) -> Tensor:
    """Return the orthonormal DCT of a side: [side, side] float32, a row each frequency."""
    k = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(torch.pi / side * (k + 0.5) * k[:, None]) * (2 / side) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix.float()


def dct(maps: Tensor, grid: Grid) -> Tensor:
    """Return C maps, the orthonormal 2-D DCT of maps [..., T, n] over the tokens of a grid.

    Cost: O(T n (H + W)), one side after the other.
    """
    return _of_sides(cosines(grid[0]), cosines(grid[1]), maps)


def inverse_dct(maps: Tensor, grid: Grid) -> Tensor:
    """Return Cᵀ maps, which undoes `dct`."""
    return _of_sides(cosines(grid[0]).mT, cosines(grid[1]).mT, maps)


def _of_sides(down: Tensor, across: Tensor, maps: Tensor) -> Tensor:
    """Return kron(down, across) maps, of maps [..., H W, n]."""
    *images, _, n = maps.shape
    height, width = len(down), len(across)
    down, across = down.to(maps), across.to(maps)
    maps = down @ maps.reshape(*images, height, width * n)
    return (across @ maps.reshape(*images, height, width, n)).reshape(*images, height * width, n)


def statistics_dct(raw: Tensor, grid: Grid, scales: Sequence[float]) -> Tensor:
    """Return the DCT of LayerNorm's mean and log std of tokens, in their steps: [2, T]."""
    mean_step, log_step, log_std = scales
    _, mean, std = normalise(raw)
    both = torch.cat([mean / mean_step, (std.log() - log_std) / log_step], dim=1)  # [T, 2]
    return dct(both, grid).mT


def sigma_levels(s: Tensor, step: float) -> np.ndarray:
    """Return i_σ [r] int64, never rising: σ_k / Δ on the grid of levels."""
    levels = (STEPS_AN_OCTAVE * (s.double() / step).log2()).round().to(torch.int64).numpy()
    return np.minimum.accumulate(levels) if len(levels) else levels


def to_levels(units: np.ndarray) -> np.ndarray:
    """Round what is counted in UNITS per level to the nearest whole level."""
    return (units + UNITS // 2) // UNITS


def to_coded(levels: np.ndarray) -> np.ndarray:
    """Return the levels whose tables are used: coefficients' are at most HIGHEST."""
    return np.minimum(levels, HIGHEST)


def tokens_shift(fitted: Grid, grid: Grid) -> int:
    """Return how much smaller a unit vector's entries are on a grid with more tokens, in UNITS.

    It is 32 · log2(tokens of `fitted` / tokens of `grid`), rounded, in integers.
    """
    ratio = ((fitted[0] * fitted[1]) ** 64 << 4096) // (grid[0] * grid[1]) ** 64
    return (ratio.bit_length() - 1 - 4096 + 1) // 2


def on_grid(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Read maps [n, H, W] int64 over frequency at the same frequencies of another grid: [n, *grid].

    Bilinear, in integers.
    """
    for axis, side in ((1, grid[0]), (2, grid[1])):
        fitted = maps.shape[axis]
        if fitted == side:
            continue
        at = np.arange(side) * fitted * 256 // side
        low = np.minimum(at >> 8, fitted - 1)
        high = np.minimum(low + 1, fitted - 1)
        shape = [1, 1, 1]
        shape[axis] = side
        weight = (at & 255).reshape(shape)
        maps = (maps.take(low, axis) * (256 - weight) + maps.take(high, axis) * weight) >> 8
    return maps


def off_grid(squares: Tensor, grid: Grid, fitted: Grid) -> Tensor:
    """Average squares [n, T] over the frequencies of `grid` about those of `fitted`, in floats.

    It puts back what `on_grid` reads.
    """
    if grid == fitted:
        return squares
    down, across = (_about(*sides) for sides in zip(grid, fitted, strict=True))
    return (down @ squares.unflatten(-1, grid) @ across.mT).flatten(-2)


def _about(side: int, fitted: int) -> Tensor:
    """Return the shares [fitted, side] of frequencies k / side in that of each k / fitted.

    They are a triangle over the distance of neighbours on the coarser side.
    """
    at = torch.arange(fitted)[:, None] * side / fitted
    weights = (1 - (at - torch.arange(side)).abs() / max(1, side / fitted)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def rate_rounded(
    values: np.ndarray, levels: np.ndarray, tables: Tables, weight: float = LAMBDA
) -> np.ndarray:
    """Round values [n, m] to integers q: of the nearest, one nearer to 0, and 0 the one with the
    least (value − q)² + weight · bits(q)."""
    best = np.zeros(values.shape, dtype=np.int64)
    at = np.flatnonzero(np.abs(values) > 0.5)
    signed = values.ravel()[at]
    size = np.abs(signed)
    nearest = np.rint(size).astype(np.int64)
    # a flat view: one gather a candidate
    bits, width = tables.bits.ravel(), LARGEST_TABLE + 2
    base = (np.clip(levels.ravel()[at], LOWEST, HIGHEST) - LOWEST) * width
    cost = size**2 + weight * bits[base]
    chosen = np.zeros_like(nearest)
    for q in (nearest, np.maximum(nearest - 1, 0)):
        own = (size - q) ** 2 + weight * bits[base + np.minimum(q, LARGEST_TABLE + 1)]
        better = own < cost
        chosen, cost = np.where(better, q, chosen), np.where(better, own, cost)
    best.ravel()[at] = np.where(signed < 0, -chosen, chosen)
    return best


def column_bits(q: np.ndarray, levels: np.ndarray, tables: Tables) -> np.ndarray:
    """Return the bits of each column of symbols q [n, r] at levels [n, r]: [r] float64."""
    rows = np.clip(levels, LOWEST, HIGHEST) - LOWEST
    total = tables.bits[:, 0][rows].sum(0, dtype=np.float64)
    at, columns = np.nonzero(q)
    rows, size = rows[at, columns], np.minimum(np.abs(q[at, columns]), LARGEST_TABLE + 1)
    more = tables.bits[rows, size] - tables.bits[rows, 0]
    return total + np.bincount(columns, more, minlength=q.shape[1])


def level_offsets(q: np.ndarray, levels: np.ndarray, tables: Tables) -> np.ndarray:
    """Return what to add to the levels of each column of symbols q [n, r]: that of OFFSETS with
    which the column and the offset itself take the fewest bits, [r] int64."""
    bits, r, most = tables.bits, q.shape[1], max(OFFSETS)
    lowest, count = LOWEST - most, HIGHEST - LOWEST + 2 * most + 1
    at = np.clip(levels, lowest, HIGHEST + most) - lowest  # [n, r]
    # most symbols are 0: those are counted by level, the others looked up one by one
    seen = np.bincount((at * r + np.arange(r)).ravel(), minlength=count * r).reshape(count, r)
    rows, columns = np.nonzero(q)
    at, size = at[rows, columns], np.minimum(np.abs(q[rows, columns]), LARGEST_TABLE + 1)
    costs = []
    for offset in OFFSETS:
        level = np.clip(np.arange(count) + lowest + offset, LOWEST, HIGHEST) - LOWEST
        zeros, own = bits[level, 0], level[at]
        more = np.bincount(columns, bits[own, size] - bits[own, 0], minlength=r)
        costs.append(zeros @ seen + more + abs(offset))
    return np.array(OFFSETS)[np.argmin(costs, axis=0)]


def adapted(
    values: np.ndarray, levels: np.ndarray, tables: Tables, weight: float = LAMBDA
) -> tuple[np.ndarray, np.ndarray]:
    """Round values [n, r] by the rates of the levels that suit each column; return the symbols
    [n, r] and what those levels differ by from `levels`, [r] int64."""
    offsets = level_offsets(rate_rounded(values, levels, tables, weight), levels, tables)
    q = rate_rounded(values, levels + offsets, tables, weight)
    return q, level_offsets(q, levels, tables)


def independent(q: np.ndarray) -> np.ndarray:
    """Find the columns of q [T, r] that are not all but a combination of those before; return their
    indices."""
    norms = np.linalg.norm(q.astype(np.float64), axis=0)
    keep = np.flatnonzero(norms > 0)
    while len(keep):
        unit = torch.from_numpy(q[:, keep] / norms[keep])
        pivots = torch.linalg.qr(unit, mode="r").R.diagonal().abs().numpy()
        bad = np.flatnonzero(pivots < DEPENDENT)
        if not len(bad):
            break
        keep = np.delete(keep, bad[0])
    return keep


def orthonormal(q: np.ndarray) -> Tensor:
    """Return an orthonormal basis of the columns of q [T, r] in their order and direction, float32.

    By the Cholesky factor of the float64 Gram matrix; `independent` keeps its condition small.
    Raises InputError where columns are a combination of others, which are not what was encoded.
    """
    unit = torch.from_numpy(q.astype(np.float64))
    unit = unit / unit.norm(dim=0).clamp_min(1e-30)
    lower, failed = torch.linalg.cholesky_ex(unit.mT @ unit)
    if failed:
        raise InputError("a coded image is damaged (its components are dependent): write it again")
    return torch.linalg.solve_triangular(lower, unit.mT, upper=False).mT.float()
