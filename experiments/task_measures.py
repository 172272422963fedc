"""What a head makes of compressed tokens, image by image: measured, kept as it goes, summarised.

Legend: b images of a batch, n of all, T tokens, D features, r rank.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.partial_results import PartialResults
from experiments.token_reduction import average_tokens, drop_tokens, tokens_kept
from heads.box_error import part_errors, tokens_in_boxes
from heads.metric import TaskMetric, metric_svd, predicted_error
from heads.task_head import Score, TaskHead
from lowrank_tokens.errors import rel_error, summarise
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import Factors, denormalise
from qwenvl_dataloader import Batch, BatchLoader, RealQwenVLDataset
from svd_baseline import gain, interval_95

BYTES = 2  # of a stored number, bf16
POOLED = (2, 4, 8)  # sides of the blocks that token averaging is shown at
FULL = "full_tokens"  # the tokens as they are: no factorisation can be held to more


@dataclass(frozen=True)
class TaskMethod:
    """A way to factor: (batch, rank, head's output of the full tokens) → A, B."""

    factorise: Callable[[Batch, int, Tensor], Factors]
    largest_rank: int | None = None

    def reaches(self, rank: int) -> bool:
        return self.largest_rank is None or rank <= self.largest_rank


class Measured(NamedTuple):
    """One method at one rank (token averaging: side of a block) on n images."""

    stored: float  # values an image, their mean where grids differ
    measures: dict[str, Tensor]  # task_error, agreement, rel_error … → [n] float64, NaN: undefined


Sweep = dict[str, dict[int, Measured]]  # method → rank → what was measured
Found = dict[str, dict[int, dict[str, Tensor]]]  # of one batch: method → rank → measure → [b]


def spread_over_groups(dataset: RealQwenVLDataset, rows: Tensor, count: int | None) -> Tensor:
    """The first `count` of the rows, taken from all groups in turn, in their own order."""
    groups = dataset.rows["group"].take(rows.tolist()).to_pylist()
    seen: Counter[str] = Counter()
    turns = []
    for position, group in enumerate(groups):
        turns.append((seen[group], position))
        seen[group] += 1
    return rows[sorted(position for _, position in sorted(turns)[:count])]


# ------------------------------------------------------------------------------------ one batch


def judge(
    head: TaskHead, batch: Batch, x_hat: Tensor, full: Tensor, scores: dict[str, Score]
) -> dict[str, Tensor]:
    """What is measured of each image, each [b] float64; `scores` generate with raw tokens."""
    tokens = denormalise(x_hat, batch.mean, batch.std)
    outputs = head.outputs(tokens, batch.rows)
    found = {
        "task_error": head.error(outputs, full),
        "task_loss": head.loss(outputs, full).double(),
        "agreement": head.agreement(outputs, full).double(),
    }
    found |= {name: score(tokens, batch.rows) for name, score in scores.items()}
    return {name: value.cpu() for name, value in found.items()}


@torch.no_grad()
def judge_factors(
    methods: dict[str, TaskMethod],
    head: TaskHead,
    dataset: RealQwenVLDataset,
    batch: Batch,
    ranks: list[int],
    scores: dict[str, Score],
) -> Found:
    """Every method at the ranks that it reaches."""
    full = head.of_full(batch)
    inside = torch.stack(tokens_in_boxes(dataset, batch.rows.tolist()))
    found: Found = {name: {} for name in methods}
    for name, method in methods.items():
        for rank in filter(method.reaches, ranks):
            a, b = method.factorise(batch, rank, full)
            found[name][rank] = judge(head, batch, a @ b, full, scores) | {
                "rel_error": rel_error(batch.x, a, b).cpu(),
                "rel_error_in_box": part_errors(batch.x, a, b, inside)["inside"],
            }
    return found


@torch.no_grad()
def judge_fewer_tokens(
    head: TaskHead, dataset: RealQwenVLDataset, batch: Batch, ranks: list[int]
) -> Found:
    """`token_dropping` at the bytes of each rank, `token_averaging` over blocks of POOLED."""
    full, grid = head.of_full(batch), batch.grid

    def judged(x_hat: Tensor) -> dict[str, Tensor]:
        return judge(head, batch, x_hat, full, {})

    kept = {r: tokens_at_bytes(grid, dataset.feature_dim, r) for r in dropped_at(dataset, ranks)}
    dropped = {r: drop_tokens(batch.x, k, grid) for r, k in kept.items()}
    shortest = min(map(min, dataset.grids))  # every image is averaged over the same blocks
    averaged = {s: average_tokens(batch.x, s, grid) for s in POOLED if s <= shortest}
    return {
        "token_dropping": {r: judged(x_hat) for r, x_hat in dropped.items()},
        "token_averaging": {s: judged(x_hat) for s, x_hat in averaged.items()},
    }


@torch.no_grad()
def score_full_tokens(scores: dict[str, Score], batch: Batch) -> Found:
    tokens = denormalise(batch.x, batch.mean, batch.std)
    return {FULL: {0: {name: score(tokens, batch.rows).cpu() for name, score in scores.items()}}}


def dropped_at(dataset: RealQwenVLDataset, ranks: list[int]) -> list[int]:
    """Ranks whose factors store no more than all tokens, on the most frequent grid."""
    t, d = dataset.num_tokens, dataset.feature_dim
    return [rank for rank in ranks if rank * (t + d) <= t * d]


def tokens_at_bytes(grid: Grid, feature_dim: int, rank: int) -> int:
    """How many tokens store as much as the factors of a rank; at most all."""
    t = math.prod(grid)
    return min(t, rank * (t + feature_dim) // feature_dim)


def stored_values(grid: Grid, feature_dim: int, name: str, size: int) -> int:
    """Values an image that `name` stores; means and deviations of the tokens are not counted."""
    t, d = math.prod(grid), feature_dim
    if name == FULL:
        return t * d
    if name == "token_dropping":
        return tokens_at_bytes(grid, d, size) * d
    if name == "token_averaging":
        return tokens_kept(size, grid) * d
    return min(size, t, d) * (t + d)


# --------------------------------------------------------------------------------- all images


def measure(
    partial: PartialResults,
    stage: str,
    loader: BatchLoader,
    judge_batch: Callable[[Batch], Found],
) -> Sweep:
    """What `judge_batch` finds of every image of the loader, each batch kept in `partial`.

    Images that are there already are not measured again.
    """
    rows, dataset = loader.sampler.rows.tolist(), loader.dataset
    missing = [row for row in rows if (stage, row) not in partial.records]
    if missing:
        for batch in loader.only(torch.tensor(missing)).with_progress(f"{stage} images"):
            partial.add(stage, _by_image(judge_batch(batch), batch.rows.tolist()))
    images = [partial.records[stage, row] for row in rows]
    grids = [dataset.grids[row] for row in rows] if dataset.ragged else [dataset.grid]
    sweep: Sweep = {}
    for name, sizes in images[0].items():
        sweep[name] = {}
        for size, measures in sizes.items():
            values = {
                key: torch.tensor([image[name][size][key] for image in images], dtype=torch.float64)
                for key in measures
            }
            stored = [stored_values(g, dataset.feature_dim, name, int(size)) for g in grids]
            sweep[name][int(size)] = Measured(statistics.mean(stored), values)
    return sweep


def _by_image(found: Found, rows: list[int]) -> dict[int, dict]:
    """Row → method → rank, as JSON has it → measure → number."""
    return {
        row: {
            name: {
                str(size): {key: float(value[i]) for key, value in measures.items()}
                for size, measures in sizes.items()
            }
            for name, sizes in found.items()
        }
        for i, row in enumerate(rows)
    }


def summarise_methods(sweep: Sweep, groups: list[str]) -> dict[str, dict[str, dict]]:
    """The JSON's entry: method → rank (averaging: side of a block) → means and intervals.

    gain_pct: by how much the mean task error is below the plain SVD's at the same rank;
    gain_over_svd_refined_pct: the same against the plain SVD after as many head steps.
    """
    table: dict[str, dict[str, dict]] = {}
    for name, sizes in sweep.items():
        if not sizes or name == FULL:  # no rank that it reaches, or no grid to average over
            continue
        table[name] = {}
        for size, (stored, measures) in sizes.items():
            entry = {"stored_values": stored, "bytes": BYTES * stored}
            for key, value in measures.items():
                if not value.isnan().all():
                    entry[key] = summarise(value) | {"interval_95": interval_95(value, groups)}
            for base, key in (("svd", "gain_pct"), ("svd_refined", "gain_over_svd_refined_pct")):
                comparable = name.endswith("_refined") or base == "svd"
                if name in (base, "token_averaging") or not comparable:
                    continue
                if plain := sweep.get(base, {}).get(size):
                    errors = measures["task_error"], plain.measures["task_error"]
                    entry[key] = gain(*errors, groups)
            table[name][str(size)] = entry
    return table


# ---------------------------------------------------------------------------- rank for each image


def rank_per_image(
    head: TaskHead,
    metric: TaskMetric,
    val: BatchLoader,
    test: BatchLoader,
    on_val: dict[int, Measured],
    on_test: dict[int, Measured],
    bounds: list[float],
    confidence: float,
) -> dict:
    """Predicted ranks of the test images for every bound, without running the head on them.

    on_val, on_test: what was measured of the SVD in the metric, by rank. The prediction of
    `predicted_error` is multiplied by one factor: the `confidence` quantile of the ratio of
    measured to predicted error on validation images, at the ranks evaluated. `within` is the share
    of test images whose measured error at the predicted rank is within the bound.
    """
    ranks = sorted(on_test)
    measured, found = (
        torch.stack([part[r].measures["task_error"] for r in ranks], dim=-1)
        for part in (on_val, on_test)
    )
    ratio = measured / predicted_curves(val, metric)[:, ranks]
    factor = float(ratio[ratio.isfinite()].quantile(confidence))
    curves = factor * predicted_curves(test, metric)  # [n, T + 1]
    entries = {}
    for bound in bounds:
        chosen = (curves <= bound).long().argmax(-1)  # [n], the first rank within
        shares = chosen.split([len(share.rows) for share in test.sampler.shares()])
        error = torch.cat(
            [errors_at(head, metric, b, own) for b, own in zip(test, shares, strict=True)]
        )
        rank = summarise(chosen.double()) | {"min": int(chosen.min()), "max": int(chosen.max())}
        within = float((error <= bound).double().mean())
        entries[f"{bound:g}"] = {"rank": rank, "within": within, "measured": summarise(error)}
    return {
        "factor": factor,
        "confidence": confidence,
        "bounds": entries,
        "calibration": {
            "ranks": ranks,
            "predicted": curves[:, ranks].tolist(),
            "measured": found.tolist(),
        },
    }


def predicted_curves(loader: BatchLoader, metric: TaskMetric) -> Tensor:
    """`predicted_error` of all its images, [n, largest T + 1]; 0 beyond an image's own T."""
    curves = [predicted_error(batch.x, metric).cpu() for batch in loader]
    most = max(curve.shape[1] for curve in curves)
    return torch.cat([F.pad(curve, (0, most - curve.shape[1])) for curve in curves])


@torch.no_grad()
def errors_at(head: TaskHead, metric: TaskMetric, batch: Batch, ranks: Tensor) -> Tensor:
    """Task error of the SVD in the metric, each image at its own rank, [b] float64."""
    a, b = metric_svd(batch.x, int(ranks.max()), metric)
    kept = torch.arange(a.shape[-1]) < ranks[:, None]
    x_hat = (a * kept.to(a)[:, None, :]) @ b
    return judge(head, batch, x_hat, head.of_batch(batch), {})["task_error"]
