"""How far a factorisation is from X: relative errors, the optimum, and summaries over images.

Shapes: X [..., T, D] normalised tokens, A [..., T, r], B [..., r, D], σ [..., min(T, D)] float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Below this relative error the optimum is rounding, and a ratio to it says nothing.
NO_EXCESS_BELOW = 1e-6
MOST_ENERGY = 0.5  # from this share on, one number for all channels says little


def optimum(singular_values: Tensor, rank: int) -> Tensor:
    """Return the least rel_error of any rank-r matrix (Eckart–Young): (Σ_{i>r} σ_i²)^½ / ‖X‖_F.

    Args: singular_values [..., S] float64, rank r ≥ 0. Returns: [...] float64; 0 for X = 0.
    """
    energy = singular_values.square()
    tail = energy[..., rank:].sum(-1)
    return (tail / energy.sum(-1).clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()


# ---------------------------------------------------------------------------------------- metrics


def rel_error(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ‖X − A·B‖_F / ‖X‖_F of each whole matrix, [...] float64.

    Where X = 0 (an image of constant tokens) ‖A·B‖_F / (T D)^½: (T D)^½ is the norm of every other
    normalised X.
    """
    # float32 norms alone would be wrong by 1e-6, a visible part of a small excess
    residual = torch.linalg.matrix_norm((x - a @ b).double())
    norm = torch.linalg.matrix_norm(x.double())
    return residual / torch.where(norm > 0, norm, math.sqrt(x.shape[-2] * x.shape[-1]))


def excess_pct(error: Tensor, best: Tensor) -> Tensor:
    """Return (rel_error / optimum − 1) in per cent, [...] float64; NaN where optimum ≤ 1e-6."""
    return torch.where(best > NO_EXCESS_BELOW, 100 * (error / best - 1), torch.nan)


def token_cosine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over tokens of the cosine between a token and its reconstruction, [...]."""
    return torch.nn.functional.cosine_similarity(x, a @ b, dim=-1).mean(-1).double()


def token_error(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ‖x_t − x̂_t‖ / ‖x_t‖ of each token, [..., T] float32."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return torch.linalg.vector_norm(x - a @ b, dim=-1) / norm.clamp_min(1e-12)


def image_metrics(
    x: Tensor, a: Tensor, b: Tensor, singular_values: Tensor, rank: int | None = None
) -> dict[str, Tensor]:
    """Measure rel_error, excess_pct and cosine of each image, each [...].

    rank: what the excess refers to, by default the number of columns of A; less where some of them
    are masked.
    """
    error = rel_error(x, a, b)
    best = optimum(singular_values, a.shape[-1] if rank is None else rank)
    return {
        "rel_error": error,
        "excess_pct": excess_pct(error, best),
        "cosine": token_cosine(x, a, b),
    }


def summarise(values: Tensor) -> dict[str, float | None]:
    """Return mean and 90th percentile over images; None where a value is NaN for all."""
    values = values[~values.isnan()].cpu().numpy()
    if values.size == 0:
        return {"mean": None, "p90": None}
    return {"mean": float(values.mean()), "p90": float(np.percentile(values, 90))}


class EnergyShare(NamedTuple):
    """How much of the energy ‖F‖² the strongest hundredth of the channels, or tokens, holds."""

    channels: list[int]  # the strongest 1 % of D, at least one, strongest first
    channel_share: float  # of the energy of all images
    token_share: float  # of the energy that an image's strongest 1 % of tokens hold, mean of images


def energy_share(images: Iterable[Tensor]) -> EnergyShare:
    """Measure how the energy of raw tokens is spread; images: [T_i, D] each, any float dtype."""
    per_channel, token_shares = 0, []
    for tokens in images:
        energy = tokens.double().square()  # [T, D]
        per_channel = per_channel + energy.sum(0)
        per_token = energy.sum(1)
        strongest = per_token.topk(math.ceil(len(per_token) / 100)).values.sum()
        token_shares.append(float(strongest / per_token.sum().clamp_min(1e-300)))
    strongest = per_channel.topk(math.ceil(len(per_channel) / 100))
    share = float(strongest.values.sum() / per_channel.sum().clamp_min(1e-300))
    token_share = sum(token_shares) / len(token_shares)
    return EnergyShare(strongest.indices.tolist(), share, token_share)


def energy_note(images: Iterable[Tensor]) -> str | None:
    """Return one line where 1 % of the channels or tokens hold most of the energy, else None.

    There raw_error and rel_error say little about the others. images: raw tokens [T_i, D] each.
    """
    share = energy_share(images)
    held = []
    if share.channel_share > MOST_ENERGY:
        shown = ", ".join(map(str, share.channels[:3]))
        held.append(
            f"{len(share.channels)} channels ({shown}{' …' * (len(share.channels) > 3)}) hold "
            f"{share.channel_share:.0%} of the energy"
        )
    if share.token_share > MOST_ENERGY:
        held.append(f"1 % of an image's tokens hold {share.token_share:.0%} of its energy")
    if not held:
        return None
    return f"{' and '.join(held)}: raw_error says little about the rest"


def rest_note(images: Sequence[Tensor], decoded: Sequence[Tensor]) -> str | None:
    """Return one line on the error of the rest where 1 % of the channels or tokens dominate.

    The error is ‖F − F̂‖ / ‖F‖ over the channels, or else over each image's tokens, that are not
    among those; mean over images. images, decoded: raw tokens F and F̂ [T_i, D] each. None where
    the energy is spread, and raw_error says what it should.
    """
    if (note := energy_note(images)) is None:
        return None
    share = energy_share(images)
    errors = []
    for tokens, found in zip(images, decoded, strict=True):
        energy = tokens.double().square()
        dominant = torch.zeros_like(energy, dtype=torch.bool)
        if share.channel_share > MOST_ENERGY:
            dominant[:, share.channels] = True
        else:
            dominant[energy.sum(1).topk(math.ceil(len(energy) / 100)).indices] = True
        lost = (found.double() - tokens.double()).square().masked_fill(dominant, 0).sum()
        kept = energy.masked_fill(dominant, 0).sum().clamp_min(1e-300)
        errors.append(float((lost / kept).sqrt()))
    return f"{note}: there it is {sum(errors) / len(errors):.3f}"


def percent_text(value: float | None) -> str:
    """Format an excess as tables and logs print it; a dash where it is undefined."""
    # + 0.0: rounding below the optimum is 0.0000 and not -0.0000
    return "-" if value is None else f"{round(value, 4) + 0.0:.4f} %"
