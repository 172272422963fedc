"""Arguments that a codec is given from Python: what they are, and refusals that name them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, checked_grid
from lowrank_tokens.linalg import LARGEST_FEATURE, usable_features
from lowrank_tokens.stream import is_grid


class SvdFactors(NamedTuple):
    """X ≈ u diag(s) vᵀ of an image's normalised tokens."""

    u: Tensor  # [T, r]
    s: Tensor  # [r]
    v: Tensor  # [D, r]


def check_tokens(tokens: Tensor, grid: Grid, feature_dim: int) -> None:
    """Raise TypeError or InputError, naming the argument, where tokens cannot be encoded."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens have to be a torch tensor of floats, not {kind}")
    if tokens.ndim != 2 or tokens.shape[1] != feature_dim:
        raise InputError(
            f"tokens {list(tokens.shape)} are not [T, {feature_dim}], as the codec's: give one "
            "image's tokens, or fit a codec on a cache of this encoder"
        )
    if not is_grid(grid) or grid[0] * grid[1] != len(tokens):
        raise InputError(
            f"a grid of {grid[0]} x {grid[1]} does not fit {len(tokens)} tokens: leave out class "
            "and register tokens, which have no place on it"
        )
    if not usable_features(tokens[None]).all():
        raise InputError(
            f"tokens have NaN or infinite entries, or some above {LARGEST_FEATURE:.0e}: leave the "
            "image out, or look at its encoder"
        )


def checked_factors(factors: SvdFactors, tokens: int, features: int) -> SvdFactors:
    """Return `factors` by name. Raises TypeError or InputError where they are no u, s and v."""
    try:
        factors = SvdFactors(*factors)
        shapes = [list(part.shape) for part in factors]
    except (TypeError, AttributeError):
        raise TypeError("factors are not three tensors, u [T, r], s [r] and v [D, r]") from None
    rank = shapes[0][-1] if shapes[0] else 0
    if shapes != [[tokens, rank], [rank], [features, rank]]:
        raise InputError(
            f"factors have the shapes {shapes}, not u [{tokens}, r], s [r] and v [{features}, r]"
        )
    return factors


def iter_once(batches: object) -> bool:
    """Return whether an iterable ends after it was read once, as generators do."""
    return not callable(batches) and iter(batches) is batches


def checked_batches(batches: Iterable[tuple[Tensor, Grid]]) -> Iterator[tuple[Tensor, Grid]]:
    """Yield the pairs of `batches`. Raises TypeError or InputError that names one that is none."""
    width = None
    for number, pair in enumerate(batches):
        name = f"batches[{number}]"
        try:
            raw, grid = pair
        except (TypeError, ValueError):
            raw = None
        if not isinstance(raw, Tensor) or not raw.is_floating_point():
            raise TypeError(
                f"{name} is no pair of float tokens [b, T, D], a tensor, and their grid"
            )
        grid, width = checked_grid(grid), width or raw.shape[-1]
        if raw.ndim != 3 or raw.shape[1] != math.prod(grid) or raw.shape[2] != width:
            raise InputError(
                f"{name}: tokens {list(raw.shape)} are not [b, T, {width}] of a grid of "
                f"{grid[0]} x {grid[1]}"
            )
        yield raw, grid
