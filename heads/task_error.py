"""Task errors: how far a head's output moves with factors, beside those of the plain SVD.

    methods = {"svd": lambda batch, r: truncated_svd(batch.x, r)}
    errors = task_errors(methods, head, loaders.test, [8, 16])
    errors[16]["svd"]                        # [n] float64, one an image

Legend: n images, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heads.metric import TaskMetric, check_head, load_metric, metric_svd
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import Factors
from qwenvl_dataloader import Batch, RealQwenVLDataset
from svd_baseline import gain, interval_95

if TYPE_CHECKING:
    from heads.task_head import TaskHead

Factorise = Callable[[Batch, int], Factors]
Pair = tuple[Tensor, Tensor]


def once_a_batch(prepare: Callable[[Batch], Pair]) -> Callable[[Batch], Pair]:
    """`prepare`, what of a batch is the same at every rank, with its last result kept."""
    last: tuple[Batch | None, Pair | None] = (None, None)

    def prepared(batch: Batch) -> Pair:
        nonlocal last
        if last[0] is not batch:
            last = batch, prepare(batch)
        return last[1]

    return prepared


def cut_at_ranks(factorise: Factorise) -> Factorise:
    """`factorise`, of nested factors, at any rank of one batch after another: each decomposed
    once."""
    whole = once_a_batch(lambda batch: factorise(batch, min(batch.x.shape[-2:])))

    def cut(batch: Batch, rank: int) -> Factors:
        a, b = whole(batch)
        return a[..., :rank], b[..., :rank, :]

    return cut


def closed_form(metric: TaskMetric) -> Factorise:
    """Return the method that is the SVD in a task's metric, `metric_svd`."""
    return cut_at_ranks(lambda batch, rank: metric_svd(batch.x, rank, metric))


@torch.no_grad()
def task_errors(
    methods: dict[str, Factorise], head: TaskHead, batches: Iterable[Batch], ranks: list[int]
) -> dict[int, dict[str, Tensor]]:
    """Measure rank → method → relative error of the head's output, [n] float64 on the CPU.

    One pass of the head for the full tokens of a batch, one for each rank and method.
    """
    parts: dict[int, dict[str, list[Tensor]]] = {r: {n: [] for n in methods} for r in ranks}
    for batch in batches:
        full = head.of_full(batch)
        for rank, found in parts.items():
            for name, factorise in methods.items():
                a, b = factorise(batch, rank)
                found[name].append(head.error(head.of_batch(batch, a @ b), full).cpu())
    return {r: {n: torch.cat(found) for n, found in of.items()} for r, of in parts.items()}


def task_report(
    errors: dict[int, dict[str, Tensor]],
    head: TaskHead,
    metric: TaskMetric | None,
    groups: list[str],
) -> dict:
    """Summarise `task_errors` for the JSON: means, intervals, and gain_pct of all but the SVD.

    gain_pct: by how many per cent the mean task error is below the plain SVD's at that rank.
    """
    ranks: dict[str, dict] = {}
    for rank, methods in errors.items():
        entry = ranks[str(rank)] = {}
        for name, values in methods.items():
            entry[name] = summarise(values) | {"interval_95": interval_95(values, groups)}
            if name != "svd":
                entry[name]["gain_pct"] = gain(values, methods["svd"], groups)
    return {
        "head": head.name,
        "head_sha256": head.sha256,
        "output": head.output,
        "metric_sha256": metric.sha256 if metric else None,
        "metric_images": metric.info["images"] if metric else None,
        "ranks": ranks,
    }


def head_of_norm(
    norm: dict[str, str | None],
    dataset: RealQwenVLDataset,
    device: torch.device | str,
    head_model: str | None,
) -> TaskHead | None:
    """Load the head that a norm (`model.norm`) was made for; None, with a note, if it is not there.

    So it is on a cache of another encoder's tokens, or where the head's weights are others by now.
    """
    from heads.load_head import load_head

    try:
        head = load_head(norm["head"], dataset, device=device, model=head_model)
    except InputError as error:
        print(f"note: no task error: {error}")
        return None
    if head.sha256 != norm["head_sha256"]:
        print(f"note: no task error: the head {head.name} has other weights than in training")
        return None
    return head


def metric_at_hand(head: TaskHead, dataset: RealQwenVLDataset) -> TaskMetric | None:
    """Return the first metric in metrics/ that is of this head and cache, or None with a note."""
    for path in sorted(Path("metrics").glob("*.safetensors")):
        try:
            metric = load_metric(path, dataset)
            check_head(metric, head)
            return metric
        except InputError as error:
            print(f"note: {path} is left out: {error}")
    return None
