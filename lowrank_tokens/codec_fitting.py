"""Fitting of the codec: its arrays, from the tokens of training images alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.entropy import Tables
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, checked_grid
from lowrank_tokens.linalg import left_singular, normalise, symmetric_power
from lowrank_tokens.stream import STEP_UNITS, extreme_entries, replace_extremes
from lowrank_tokens.transform import dct, off_grid, statistics_dct

# Coarse: X is normalised by what is stored, so that factors carry what the steps lose. The mean's
# is a share of the training tokens' geometric mean std.
MEAN_STEP, LOG_STD_STEP = 0.025, 0.3
BUCKETS = 16
UNSEEN_ENERGY = 0.05  # of a v_k outside the span of few training tokens
ENOUGH = 32  # training tokens a feature, from which on they are taken to span those to come
TAIL = 1e-5  # energy of training tokens outside the directions that are kept
LARGE_CHANNEL = 4.0  # octaves above the median size of channels, from which on one is scaled down
SPECTRUM_TERMS = 4  # of the transform's map of levels

Batches = Callable[[], Iterable[tuple[Tensor, Grid]]]  # raw tokens [b, T, D] and their grid


@dataclass
class FittedArrays:
    """The arrays of a `Codec`, and the number of training images behind them."""

    arrays: dict[str, Tensor]
    images: int


@dataclass
class Moments:
    """Sums over training images."""

    total: Tensor  # Σ x xᵀ over tokens, of X M^½ where there is a metric, [D, D] float64
    channel_roots: Tensor  # Σ |f − mean|^½ of each channel, which few extreme entries hardly move
    log_std: float  # mean over images
    images: int
    tokens: int
    roots: tuple[Tensor | None, Tensor | None]  # M^½ and M^-½ float64


def fit_arrays(batches: Batches, grid: Grid | None, metric: Tensor | None) -> FittedArrays:
    """Fit the arrays of a codec to training images, in two or three passes.

    Args: batches gives them anew at each call; grid of the tables, None for the first batch's;
        metric M [D, D].
    Raises InputError where there are none, or where they are not finite.
    """
    first = next(iter(batches()), None)
    if first is None or not len(first[0]):
        raise InputError("batches: there are no training images to fit a codec on")
    grid = first[1] if grid is None else checked_grid(grid)
    width = first[0].shape[-1]
    if metric is not None and (
        not isinstance(metric, Tensor) or not metric.is_floating_point() or metric.ndim != 2
    ):
        raise TypeError("metric is no float tensor M [D, D]")
    if metric is not None and metric.shape != (width, width):
        raise InputError(f"metric {list(metric.shape)} is not M [D, D] of {width} features")
    exponents, moments = None, _moments(batches, None, metric)
    ratio = (moments.channel_roots / moments.channel_roots.median().clamp_min(1e-30)).log2() * 2
    if (large := ratio > LARGE_CHANNEL).any():
        exponents = torch.where(large, ratio.round(), 0).clamp(-126, 126)
        moments = _moments(batches, torch.exp2(exponents).float(), metric)
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(moments.total))
    outside = values.clamp_min(0).flip(0).cumsum(0).flip(0) / values.clamp_min(0).sum()
    # few training tokens do not span those to come: then all directions are kept, and the energy
    # that others have in them is guessed (25 images of the demo: 24 % fewer bytes)
    unseen = max(0.0, 1 - moments.tokens / (ENOUGH * len(moments.total))) ** 2
    if not unseen:
        kept = outside > TAIL
        kept[0] = True  # also where extreme entries are all there is
        vectors = vectors[:, kept]
    root, inverse_root = moments.roots
    klt = {"klt": vectors if root is None else root @ vectors}
    if root is not None:
        klt["inverse"] = inverse_root @ vectors
    arrays = {name: t.to(torch.bfloat16).contiguous() for name, t in klt.items()}
    scale = math.exp(moments.log_std)  # of the training tokens: steps are relative to it
    arrays["scales"] = torch.tensor([MEAN_STEP * scale, LOG_STD_STEP, moments.log_std])
    if exponents is not None:
        arrays["channel_exponents"] = exponents.to(torch.int8)
    tables = Tables.of_mixture()
    arrays["tables"] = torch.from_numpy(tables.frequencies.astype(np.int32))
    arrays["table_sizes"] = torch.tensor(tables.sizes, dtype=torch.int16)
    floor = UNSEEN_ENERGY * unseen / len(moments.total)
    arrays |= _variances(batches, arrays, grid, floor)
    return FittedArrays(arrays, moments.images)


def _moments(
    batches: Batches,
    channels: Tensor | None,
    metric: Tensor | None,
) -> Moments:
    if metric is not None and channels is not None:  # tokens that are scaled down weigh more
        metric = channels.double() * metric.double().cpu() * channels.double()[:, None]
    root = inverse_root = None
    if metric is not None:
        root, inverse_root = (symmetric_power(metric.double().cpu(), p) for p in (0.5, -0.5))
        if not torch.isfinite(inverse_root).all():
            raise InputError("metric is not positive definite, or not finite")
    total, roots, log_std, images, tokens = 0.0, 0.0, 0.0, 0, 0
    for raw, _ in batches():
        raw = raw.float()
        raw = raw if channels is None else raw / channels.to(raw)
        centred = raw - raw.mean(-1, keepdim=True)
        roots = roots + centred.abs().sqrt().sum((0, 1), dtype=torch.float64).cpu()
        x, _, std = normalise(_without_extremes(raw))
        x = x.flatten(0, 1)
        x = x if root is None else x @ root.to(x)
        total = total + (x.mT @ x).double().cpu()
        log_std += float(std.log().mean()) * len(raw)
        images += len(raw)
        tokens += len(x)
    if not torch.isfinite(total).all():
        raise InputError("batches: training tokens are not finite")
    return Moments(total, roots, log_std / images, images, tokens, (root, inverse_root))


def _without_extremes(raw: Tensor) -> Tensor:
    """Return tokens [b, T, D] with the extreme entries replaced by their tokens' means."""
    flat = raw.flatten(0, 1)
    extreme = extreme_entries(flat)
    return raw if extreme is None else replace_extremes(flat, extreme).view_as(raw)


def bucket_starts(rank: int) -> list[int]:
    """Return the first component of each bucket, at most BUCKETS, geometric in k."""
    edges = {round(rank ** (i / BUCKETS)) - 1 for i in range(BUCKETS)}
    return sorted(edges)


def _variances(
    batches: Batches,
    arrays: dict[str, Tensor],
    grid: Grid,
    floor: float,
) -> dict[str, Tensor]:
    """Return log variances of u_k and v_k by buckets of k, of the statistics in their steps, and of
    Z."""
    klt, scales = arrays["klt"].float(), arrays["scales"].tolist()
    channels = arrays.get("channel_exponents")
    tokens, width = grid[0] * grid[1], klt.shape[1]
    rank = min(tokens, width)
    starts = bucket_starts(rank)
    bounds = list(zip(starts, [*starts[1:], rank], strict=True))
    rows, columns = torch.zeros(len(starts), tokens), torch.zeros(len(starts), width)
    statistics, energy = torch.zeros(2, tokens), torch.zeros(width, tokens)
    counted = torch.zeros(len(starts), 1)  # images that have components of a bucket
    images = 0
    for batch, own in batches():
        longer = own[0] * own[1] / tokens
        for raw in batch.float().cpu():
            raw = raw if channels is None else raw / torch.exp2(channels.float())
            raw = _without_extremes(raw[None])[0]
            z = dct(normalise(raw)[0] @ klt, own)
            u, s = left_singular(z)
            u, s = u[:, :rank], s[:rank]
            v = z.mT @ u / s.clamp_min(1e-6 * s[0])
            there = [(a, b) for a, b in bounds if a < len(s)]
            squares = torch.stack([u[:, a:b].square().mean(1) for a, b in there])
            rows[: len(there)] += longer * off_grid(squares, own, grid)
            columns[: len(there)] += torch.stack([v[:, a:b].square().mean(1) for a, b in there])
            counted[: len(there)] += 1
            statistics += off_grid(statistics_dct(raw, own, scales).square(), own, grid)
            energy += off_grid(z.square().mT, own, grid)
            images += 1

    def octaves(total: Tensor, count: Tensor | int) -> Tensor:
        return (total / count).double().clamp_min(1e-12).log2() / 2

    def levels(total: Tensor, count: Tensor | int) -> Tensor:
        return (octaves(total, count) * STEP_UNITS).round().to(torch.int16)

    left, right = _low_rank(octaves(energy.mT, images) * STEP_UNITS)
    return {
        "rows": levels(rows, counted).reshape(-1, *grid),
        "columns": levels(columns + (floor * counted.double()).float(), counted),
        "statistics": levels(statistics, images).reshape(2, *grid),
        "starts": torch.tensor(starts, dtype=torch.int16),
        "spectrum_left": left.reshape(*grid, -1),
        "spectrum_right": right,
    }


def _low_rank(units: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a map of levels [T, d] into int16 [T, n] and [n, d], whose product is in 1/256."""
    u, s, vh = torch.linalg.svd(units, full_matrices=False)
    n = min(SPECTRUM_TERMS, len(s))
    root = 16 * s[:n].sqrt()
    both = u[:, :n] * root, root[:, None] * vh[:n]
    return tuple(part.round().to(torch.int16).contiguous() for part in both)
