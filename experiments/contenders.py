"""What the benchmark sets side by side: networks, what they are held against, both in a metric.

Legend: b matrices in a batch, T tokens, D features, r rank, K refinement steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from heads.metric import InMetric, TaskMetric, factors_in, metric_svd
from lowrank_tokens.linalg import Factors, exact_factors
from model import ARCHITECTURES, LowRankFactorModel, columns_for
from qwenvl_dataloader import Loaders, RealQwenVLDataset
from svd_baseline import fit_pca, pca, random_sketch, randomized_svd, truncated_svd
from training.checkpoint import load_model

DEFAULT_STEPS, DEFAULT_OVERSAMPLE = 1, 32  # of the random sketch where no network sets them
SVD_LOWRANK_STEPS, SVD_LOWRANK_EXTRA = 2, 10  # as svd_baseline.randomized_svd calls it


class Contender(NamedTuple):
    """One method with its settings."""

    method: str
    factorise: Callable[[Tensor, int], Factors]  # (x [b, T, D], r) → A [b, T, r], B [b, r, D]
    dtype: str  # the widest type of its linear algebra
    max_rank: int
    arch: str | None = None
    sketch: str | None = None
    steps: int | None = None  # K
    columns: Callable[[int], int] | None = None  # rank → columns of the sketch
    norm: dict | None = None  # of a network: what it was trained in


def trained_networks(
    results_dir: Path, device: torch.device, dataset: RealQwenVLDataset
) -> list[Contender]:
    """Every network of `results_dir`, as a contender up to its effective rank."""
    paths = [results_dir / arch / "best_model.pt" for arch in ARCHITECTURES]
    found = [load_model(path, device, dataset)[0] for path in paths if path.exists()]
    if not found:
        print(f"note: no trained network in {results_dir}/, references only")
    return [network_contender(model) for model in found]


def network_contender(model: LowRankFactorModel) -> Contender:
    projected = model.factors == "projected"
    return Contender(
        "network",
        lambda x, r: model(x, r, ordered=False),
        "float64" if projected else "float32",
        max_rank=model.current_effective_rank(),
        arch=model.config["arch"],
        sketch="trained" if projected else None,
        steps=model.refine_steps if projected else None,
        columns=model.sketch_columns if projected else None,
        norm=model.norm,
    )


def references(
    networks: list[Contender], loaders: Loaders, ranks: list[int], device: torch.device
) -> list[Contender]:
    """What networks are held against; each computes at every rank."""
    dataset = loaders.train.dataset
    limit = min(dataset.num_tokens, dataset.feature_dim)
    axes = fit_pca(batch.x for batch in loaders.train.with_progress("PCA"))
    found = []
    for steps, columns in sorted(sketch_settings(networks, ranks, limit)):
        at = dict(zip(ranks, columns, strict=True)).__getitem__
        factorise = lambda x, r, k=steps, at=at: random_sketch(x, r, k, at(r))  # noqa: E731
        sketch = {"sketch": "random", "steps": steps, "columns": at}
        found.append(Contender("random_sketch", factorise, "float64", limit, **sketch))
    found += solvers(limit, device)
    return [*found, Contender("pca", lambda x, r: pca(x, r, axes), "float32", limit)]


def solvers(limit: int, device: torch.device) -> list[Contender]:
    """What factors a matrix up to the rank `limit` and knows no other, the slow ones last."""
    exact = [
        Contender(
            "gram_eigh_f32", lambda x, r: exact_factors(x, r, torch.float32), "float32", limit
        ),
        Contender("gram_eigh_f64", exact_factors, "float64", limit),
    ]
    if device.type == "cuda":  # cuSOLVER's batched approximate driver
        gesvda = partial(truncated_svd, driver="gesvda")
        exact.append(Contender("svd_gesvda", gesvda, "float32", limit))
    exact.append(Contender("svd", truncated_svd, "float32", limit))
    sketch = {"sketch": "random", "steps": SVD_LOWRANK_STEPS}
    sketch["columns"] = lambda r: min(r + SVD_LOWRANK_EXTRA, limit)
    return [Contender("svd_lowrank", randomized_svd, "float32", limit, **sketch), *exact]


class SketchSetting(NamedTuple):
    """What two methods have to share if only their sketches are to differ."""

    steps: int  # K
    columns: tuple[int, ...]  # of the sketch, at each rank that is measured


def sketch_settings(networks: list[Contender], ranks: list[int], limit: int) -> set[SketchSetting]:
    """Those of the networks, the defaults' columns above a network's rank; or the defaults."""
    most = min(limit, max(ranks) + DEFAULT_OVERSAMPLE)
    default = [columns_for(r, DEFAULT_OVERSAMPLE, most) for r in ranks]
    found = set()
    for n in networks:
        if n.columns:
            pairs = zip(ranks, default, strict=True)
            columns = tuple(n.columns(r) if r <= n.max_rank else other for r, other in pairs)
            found.add(SketchSetting(n.steps, columns))
    return found or {SketchSetting(DEFAULT_STEPS, tuple(default))}


def contenders_in_metric(
    networks: list[Contender], metric: TaskMetric, device: torch.device
) -> list[Contender]:
    """The SVD and every network of X M^½, mapped back; their excess is that of X itself."""
    metric = metric.to(device)
    svd = Contender(
        "svd_in_metric", lambda x, r: metric_svd(x, r, metric), "float64", len(metric.root)
    )
    found = [svd]
    for n in networks:
        own = factors_in(metric, n.norm, f"the network {n.arch}")  # mapped back already
        mapped = n.factorise if own else InMetric(n.factorise, metric)
        found.append(n._replace(method="network_in_metric", factorise=mapped))
    return found
