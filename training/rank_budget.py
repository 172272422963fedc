"""A budget of rank over images: how many components each X_i gets, and what that gains.

Legend: n images, S = min(T, D), R the largest rank in use, σ_ij singular values, largest first.
An error curve is [n, R + 1] float64: rel_error of each image at the ranks 0 … R.

Which squared error is shared out, the relative one (σ² / ‖X_i‖²) or the absolute one (σ²)? After
LayerNorm they are the same question: every token has ‖x_t‖² = D, so ‖X_i‖² = T·D for every image,
and the two differ only where tokens are constant (LayerNorm makes those zero). Singular values of
un-normalised matrices have to be divided by ‖X_i‖ first if the relative error is meant. Of images
of different T it is the absolute one, in which every token weighs alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import Factors, truncate_product
from model import LowRankFactorModel

# An error measured with float32 products may lie this much above the float64 curve that chose the
# rank: the target is met either way.
ROUNDING = 1e-6

# ------------------------------------------------------------------------------------ error curves


def optimum_curve(singular_values: Tensor, highest: int | None = None) -> Tensor:
    """optimum(r) for r = 0 … highest (default S): [n, highest + 1] float64; 0 for X = 0.

    Args: singular_values [n, S] float64, largest first. Cost O(n S), summed from the small end.
    """
    energy = singular_values.square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # [n, S], tail[r] = Σ_{j>r} σ_j²
    total = tail[:, :1].clamp_min(torch.finfo(tail.dtype).tiny)
    curve = torch.cat([tail, torch.zeros_like(total)], dim=-1) / total
    return curve.sqrt()[:, : None if highest is None else highest + 1]


def error_curve(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """rel_error of X and the first r columns of A times the first r rows of B: [n, R + 1] float64.

    Args: x [n, T, D], a [n, T, R], b [n, R, D].
    ‖X − A_r B_r‖² = ‖X‖² − 2 Σ_{i≤r} a_iᵀ X b_i + Σ_{i,j≤r} (AᵀA)_ij (B Bᵀ)_ij, for any A and B;
    float64 throughout, which resolves errors down to 1e-7. Cost O(T D R) for all R + 1 ranks.
    """
    x, a, b = x.double(), a.double(), b.double()
    energy = x.square().sum((-2, -1)).unsqueeze(-1)  # [n, 1]
    cross = (a.mT @ x * b).sum(-1).cumsum(-1)  # [n, R]
    product = (a.mT @ a * (b @ b.mT)).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)  # [n, R]
    squared = torch.cat([energy, energy - 2 * cross + product], dim=-1)
    return (squared.clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()


def nested_factors(
    model: LowRankFactorModel, x: Tensor, rank: int, grid: Grid | None = None
) -> Factors:
    """Return A [n, T, rank] and B [n, rank, D], nested: their first r columns and rows are factors
    of rank r, as near as the model cut to r or nearer (its sketch is cut too), for every r ≤ rank.
    """
    a, b = model(x, rank, grid=grid)
    return truncate_product(a, b, rank) if model.config.factors == "direct" else (a, b)


# ------------------------------------------------------------------------------------------- ranks


def first_rank_within(curve: Tensor, target_error: float) -> Tensor:
    """Return the smallest r at which an error curve [n, R + 1] is ≤ target_error: [n] int64.

    Raises InputError where an image stays above it at every rank, or its errors are not finite.
    """
    if not curve.isfinite().all():
        raise InputError("the model's factors are not finite: train it again")
    within = curve <= target_error
    missed = int((~within.any(-1)).sum())
    if missed:
        # rounded up to four digits, so that what the message says can be typed
        worst = float(curve.amin(-1).max())
        unit = 10.0 ** (math.floor(math.log10(worst)) - 3)
        reachable = math.ceil(worst / unit * (1 + 1e-5)) * unit
        remedy = f"type --target_error {reachable:.4g} or more, or " if reachable < 1 else ""
        raise InputError(
            f"--target_error {target_error:g} is out of reach at rank {curve.shape[-1] - 1}: "
            f"{missed} of {len(curve)} images stay above it; {remedy}train longer or at a higher "
            "--rank"
        )
    return within.long().argmax(-1)  # the first True


def first_rank_as_stored(curve: Tensor, target_error: float) -> Tensor:
    """`first_rank_within` for the measured error of what is stored: the one rule that factorize.py
    writes by and compare_svd_nn.py reports."""
    return first_rank_within(curve, target_error * (1 - ROUNDING))


# -------------------------------------------------------------------------------------------- gain


def against_fixed_rank(
    curves: Tensor,
    ranks: Tensor,
    tokens: Tensor,
    feature_dim: int,
    target_error: float | None = None,
) -> tuple[dict, dict[str, Tensor | int | None]]:
    """Measure what ranks per image gain over one fixed rank at the same number of stored values.

    Args: curves [n, R + 1] float64, ranks [n] int64, tokens T_i [n] int64, feature_dim D.
    Returns: the entry of svd_nn_comparison.json, and for the figure {ranks [n], rel_error [n],
        fixed_rank, fixed_rel_error [n], rank_for_all or None}.
    A component of image i stores T_i + D values. The fixed rank is the smallest that stores no
    less, each image at most at its own min(T_i, D): of images of one size the mean rank, rounded up
    where it is no whole number. gain_pct is positive where ranks per image have the smaller error.
    With a target_error also the smallest fixed ranks that meet it for the mean over images and for
    every image, and how much less ranks per image store than those.
    """
    per_rank, limits = tokens + feature_dim, tokens.clamp(max=feature_dim)
    ranks = ranks.minimum(limits)
    error = curves.gather(1, ranks[:, None]).squeeze(1)

    def stored_at(rank: int) -> int:
        return int((limits.clamp(max=rank) * per_rank).sum())

    stored, total = int((ranks * per_rank).sum()), int(ranks.sum())
    same = next(rank for rank in range(curves.shape[1]) if stored_at(rank) >= stored)

    def fixed(rank: int) -> dict:
        entry = {
            "rank": rank,
            "rel_error": _spread(curves[:, rank]),
            "stored_values": stored_at(rank),
        }
        if target_error is not None:
            entry["images_within_target"] = int((curves[:, rank] <= target_error).sum())
            entry["stored_less_pct"] = 100 * (1 - stored / max(1, entry["stored_values"]))
        return entry

    entry = {
        "ranks": {
            "mean": total / len(ranks),
            "min": int(ranks.min()),
            "max": int(ranks.max()),
            "p90": float(ranks.double().quantile(0.9)),
        },
        "rel_error": _spread(error),
        "stored_values": stored,
        "fixed": fixed(same),
    }
    worse = entry["fixed"]["rel_error"]
    entry["gain_pct"] = {
        key: 100 * (1 - value / worse[key]) if worse[key] else None
        for key, value in entry["rel_error"].items()
    }
    if target_error is not None:
        for key, curve in (("mean", curves.mean(0)), ("all", curves.amax(0))):
            entry[f"fixed_for_{key}"] = fixed(int(first_rank_within(curve[None], target_error)))
    arrays = {
        "ranks": ranks,
        "rel_error": error,
        "fixed_rank": same,
        "fixed_rel_error": curves[:, same],
        "rank_for_all": None if target_error is None else entry["fixed_for_all"]["rank"],
    }
    return entry, arrays


def _spread(error: Tensor) -> dict[str, float]:
    return {
        "mean": float(error.mean()),
        "p90": float(error.quantile(0.9)),
        "max": float(error.max()),
        "rms": float(error.square().mean().sqrt()),
    }
