"""Symbols of one image: rounded from its coefficients at a step Δ, read from its stream, decoded.

    symbols = rounded(prepared, index, FACTORS, levels, tables, in_metric)
    statistics, q_a, q_b = read_symbols(data, header, levels, tables, num_directions)
    x = decoded_x([[q_a, q_b]], FACTORS, [header.step], header.grid, inverse)[0]     # [T, D]

The first two walk the same parts in the same order: the statistics, the side information, the
coefficients.

Legend: T tokens, d directions of the KLT, r components, Z = C X P [T, d]; i_σ is σ_k / Δ on the
logarithmic grid of levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.entropy import (
    CODED_FROM,
    OFFSET_LEVEL,
    SIGMA_LEVEL,
    SymbolReader,
    Tables,
    varint,
    zigzag,
)
from lowrank_tokens.grids import Grid
from lowrank_tokens.levels import Levels
from lowrank_tokens.linalg import LeftSingular, left_singular
from lowrank_tokens.stream import (
    EXTREMES,
    FORMS,
    TRANSFORM,
    StreamHeader,
    side_information,
    step_of,
)
from lowrank_tokens.transform import (
    LAMBDA,
    adapted,
    column_bits,
    independent,
    inverse_dct,
    level_offsets,
    orthonormal,
    sigma_levels,
    to_coded,
)

DROPPED_BELOW = 2.0  # components with σ_k less than this many steps
# Rank by rate: a component is dropped whose squared error is worth less than its bits, and
# COMPONENT_BITS for what else it sends. In a metric this gained nothing.
LAMBDA_A = 0.3
COMPONENT_BITS = 5
DROP_ROUNDS = 3


@dataclass
class Prepared:
    """An image after all that does not depend on the step."""

    z: Tensor  # Z [T, d] float32
    statistics: np.ndarray  # symbols [2, T]
    mean: Tensor  # [T, 1] float32, as decoded from the statistics
    std: Tensor
    grid: Grid
    extremes: bytes = b""

    @cached_property
    def left_singular(self) -> LeftSingular:
        """Return the left singular vectors and the singular values of Z."""
        return left_singular(self.z)


@dataclass
class Rounded:
    """The symbols of one image at one step."""

    header: bytes  # behind HEADER
    flags: int
    parts: list[tuple[np.ndarray, np.ndarray]]  # symbols and levels, in reading order
    rank: int
    step_index: int
    symbols: list[np.ndarray]  # of A [T, r] and B [d, r], or of Z [d, T]


def rounded(
    prepared: Prepared, index: int, form: str, levels: Levels, tables: Tables, in_metric: bool
) -> Rounded:
    """Return the symbols of an image in a form at the step of this index."""
    grid = prepared.grid
    header = varint(grid[0]) + varint(grid[1]) + varint(zigzag(index))
    flags = FORMS.index(form) | EXTREMES * bool(prepared.extremes)
    statistics = prepared.statistics.ravel(), levels.statistics(grid)
    if form == TRANSFORM:
        of_z = levels.transform(index, grid)
        q, offsets = adapted(prepared.z.mT.numpy() / step_of(index), of_z, tables)
        side = side_information([], offsets)
        parts = [statistics, *side, (q.ravel(), to_coded(of_z + offsets).ravel())]
        return Rounded(header + prepared.extremes, flags, parts, 0, index, [q])
    q_a, q_b, sigma = rounded_factors(prepared, step_of(index), levels, tables, in_metric)
    rows, columns = levels.rows(sigma, grid), levels.columns(sigma)
    offsets = [level_offsets(q_a, rows, tables), level_offsets(q_b, columns, tables)]
    first = int(sigma[0]) if len(sigma) else 0
    side = side_information(-np.diff(sigma), *offsets)
    both = np.concatenate([(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()])
    body = np.concatenate([q_a.ravel(), q_b.ravel()]), to_coded(both)
    header += varint(len(sigma)) + varint(zigzag(first)) + prepared.extremes
    return Rounded(header, flags, [statistics, *side, body], len(sigma), index, [q_a, q_b])


def rounded_factors(
    prepared: Prepared, step: float, levels: Levels, tables: Tables, in_metric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the symbols of A [T, r] and B [d, r], and i_σ [r], of the components worth their bits.

    A is rounded first; B is what the basis of the rounded A leaves of Z.
    """
    (u, s), grid = prepared.left_singular, prepared.grid
    count = int((s >= DROPPED_BELOW * step).sum())
    sigma = sigma_levels(s[:count], step)
    weight = LAMBDA if in_metric else LAMBDA_A
    values = (u[:, :count] * (s[:count] / step)).numpy()
    q_a, _ = adapted(values, levels.rows(sigma, grid), tables, weight)
    for drops_left in reversed(range(DROP_ROUNDS)):
        q_a, sigma, rows = independent_columns(q_a, sigma, grid, levels, tables)
        columns = levels.columns(sigma)
        values = (orthonormal(q_a).mT @ prepared.z / step).mT.numpy()
        q_b, offsets_b = adapted(values, columns, tables)
        if in_metric or not drops_left:
            break
        gain = (values**2 - (values - q_b) ** 2).sum(0)
        bits = column_bits(q_a, rows, tables)
        bits += column_bits(q_b, columns + offsets_b, tables) + COMPONENT_BITS
        worth = gain >= LAMBDA * bits
        if worth.all():
            break
        q_a, sigma = q_a[:, worth], sigma[worth]
    return q_a, q_b, sigma


def independent_columns(
    q_a: np.ndarray, sigma: np.ndarray, grid: Grid, levels: Levels, tables: Tables
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the independent columns of A's symbols, their i_σ and the levels they are coded with.

    Components move up when others go, so that some symbols may have to become 0.
    """
    while True:
        keep = independent(q_a)
        q_a, sigma = q_a[:, keep], sigma[keep]
        rows = levels.rows(sigma, grid)
        rows = rows + level_offsets(q_a, rows, tables)
        lost = (to_coded(rows) < CODED_FROM) & (q_a != 0)
        if not lost.any():
            return q_a, sigma, rows
        q_a = np.where(lost, 0, q_a)


def read_symbols(
    data: bytes, header: StreamHeader, levels: Levels, tables: Tables, num_directions: int
) -> list[np.ndarray]:
    """Return the statistics [2, T], and symbols of A [T, r] and B [d, r], or of Z [d, T]."""
    grid, rank = header.grid, header.rank
    reader = SymbolReader(data[header.end :], tables)
    tokens = grid[0] * grid[1]
    statistics = reader.read(levels.statistics(grid)).reshape(2, tokens)
    if header.form == TRANSFORM:
        offsets = reader.read(np.full(tokens, OFFSET_LEVEL)).cumsum()
        of_z = to_coded(levels.transform(header.step_index, grid) + offsets)
        return [statistics, reader.read(of_z.ravel()).reshape(of_z.shape)]
    falls = reader.read(np.full(max(rank - 1, 0), SIGMA_LEVEL))
    offsets = reader.read(np.full(2 * rank, OFFSET_LEVEL)).reshape(2, rank).cumsum(1)
    sigma = header.first - np.concatenate([[0], falls.cumsum()])[:rank]
    rows, columns = levels.rows(sigma, grid), levels.columns(sigma)
    both = np.concatenate([(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()])
    body = reader.read(to_coded(both))
    split = tokens * rank
    return [
        statistics,
        body[:split].reshape(tokens, rank),
        body[split:].reshape(num_directions, rank),
    ]


def decoded_x(
    symbols: Sequence[Sequence[np.ndarray]],
    form: str,
    steps: Sequence[float],
    grid: Grid,
    inverse: Tensor,
) -> Tensor:
    """Return X_hat [n, T, D] of images of one grid and form, on the device of `inverse`.

    symbols: of each image A [T, r] and B [d, r], or Z [d, T]; inverse: [D, d], from the KLT's
    directions back to features.
    """
    last = [s[-1] for s in symbols]  # [d, r] or [d, T] each
    used = np.flatnonzero(np.logical_or.reduce([q.any(1) for q in last]))
    columns = inverse[:, torch.from_numpy(used).to(inverse.device)].mT
    scaled = [
        torch.from_numpy(q[used].T.astype(np.float32)) * s for q, s in zip(last, steps, strict=True)
    ]
    sizes = [len(part) for part in scaled]
    # one product for all images
    parts = (torch.cat(scaled).to(inverse.device) @ columns).split(sizes)
    if form == TRANSFORM:
        return inverse_dct(torch.stack(parts), grid)
    bases = [orthonormal(q[0]) for q in symbols]
    a = inverse_dct(torch.cat(bases, dim=1).to(inverse.device), grid).split(sizes, dim=1)
    return torch.stack([left @ right for left, right in zip(a, parts, strict=True)])
