"""The test numbers and figures of a training run: what its best checkpoint is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from figures import components, task_training, token_grid, training_curves
from heads.task_error import closed_form, cut_at_ranks, metric_at_hand, task_errors
from lowrank_tokens.errors import summarise, token_error
from lowrank_tokens.files import with_content_hash, write_json
from lowrank_tokens.grids import resampled
from lowrank_tokens.linalg import exact_factors, exact_singular_values
from model import LowRankFactorModel
from qwenvl_dataloader import BatchLoader, Loaders, RealQwenVLDataset
from svd_baseline import evaluate_batches, report_ranks
from training.checkpoint import load_model
from training.trained_norm import TaskFactorModel, trained_ranks
from training.unseen import unseen_test

if TYPE_CHECKING:
    from heads.task_head import TaskHead


def evaluate_best_model(
    folder: Path,
    dataset: RealQwenVLDataset,
    loaders: Loaders,
    history: list[dict],
    head: TaskHead | None = None,
) -> dict:
    """Write test numbers and figures of the best checkpoint; return what test_results.json holds.

    head: that the run trained for, if any. The file is written last: a run that has it has
    everything.
    """
    write_json(folder / "history.json", history)  # a run cut off after its last checkpoint has none
    device = loaders.test.device
    model, state = load_model(folder / "best_model.pt", device, dataset)
    judged = unseen_test(loaders, {"network": state["images"]})  # one file may be in two groups
    loaders = judged.loaders
    rank = model.current_effective_rank()
    results = {
        "arch": state["config"]["arch"],
        "data": dataset.label,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_seen_left_out": judged.left_out,
        "best_epoch": state["progress"]["best_epoch"],
        "epochs": history[-1]["epoch"],
        "effective_rank": rank,
        "ranks": {},
    }
    for r in report_ranks(rank):
        batches = loaders.test.with_progress(f"test, rank {r}")
        metrics = evaluate_batches(lambda batch, r=r: model(batch.x, r, grid=batch.grid), batches)
        results["ranks"][str(r)] = {name: summarise(v) for name, v in metrics.items()}
    per_image = per_image_statistics(model, loaders.test)
    footer = f"{dataset.label}; rank {rank}; {results['arch']}, seed {state['args']['seed']}"
    curves = folder / "train_val_loss_comparison.png", history, results["best_epoch"]
    if head:
        results["val_task_error"] = references = untrained_references(model, head, dataset, loaders)
        task_training.task_curve(*curves, references, footer)
    else:
        training_curves.training_curves(*curves, footer)
    training_curves.loss_terms(folder / "loss_curves.png", history, footer)
    maps = {name: per_image[name] for name in ("network", "svd")}
    rows, columns = dataset.grid
    resized = f"; maps of other grids resampled to {rows} × {columns}" if dataset.ragged else ""
    token_grid.error_heatmap(folder / "error_heatmap.png", maps, dataset.grid, footer + resized)
    singular_values = {"X": per_image["sigma"], "X_hat": per_image["found"]}
    components.component_energy(
        folder / "B_row_norm_hist.png", singular_values, per_image["energy"], footer
    )
    write_json(folder / "test_results.json", with_content_hash(results))
    return results


def untrained_references(
    model: TaskFactorModel, head: TaskHead, dataset: RealQwenVLDataset, loaders: Loaders
) -> dict[str, float]:
    """Return the validation task error, as `task_record` means it, of what needs no training.

    That is the plain SVD, and the SVD in the task's metric where its default file is at hand.
    """
    methods = {"svd": cut_at_ranks(lambda batch, r: exact_factors(batch.x, r))}
    if metric := metric_at_hand(head, dataset):
        methods["svd_in_metric"] = closed_form(metric.to(loaders.val.device))
    batches = loaders.val.with_progress("references")
    errors = task_errors(methods, head, batches, trained_ranks(model))
    return {
        name: float(
            torch.stack([found[name].mean() for found in errors.values()]).log().mean().exp()
        )
        for name in methods
    }


@torch.inference_mode()
def per_image_statistics(model: LowRankFactorModel, loader: BatchLoader) -> dict[str, Tensor]:
    """Return the mean error of each token, network and svd [T], and of each image σ of X and of
    A·B [n, r], the ridge's factor 1/(1 + λ_B) taken out, and ‖X‖² [n].

    T is of the cache's most frequent grid: maps of others are resampled to it. σ beyond an image's
    own min(T, D) are 0.
    """
    rank = model.current_effective_rank()
    ridge = 1 + model.config.lambda_B if model.config.factors == "projected" else 1.0
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("network", "svd", "sigma", "found", "energy")
    }
    for batch in loader.with_progress("error of tokens"):
        a, b = model(batch.x, rank, grid=batch.grid)
        best = exact_factors(batch.x, a.shape[-1])  # an image of few tokens has a lower rank
        for name, factors in (("network", (a, b)), ("svd", best)):
            errors = token_error(batch.x, *factors)
            parts[name].append(resampled(errors, batch.grid, loader.dataset.grid))
        x_hat = a.double() @ b.double()
        for name, values in (
            ("found", ridge * exact_singular_values(x_hat)),
            ("sigma", batch.singular_values),
        ):
            values = values[:, :rank].cpu()
            parts[name].append(F.pad(values, (0, rank - values.shape[1])))
        parts["energy"].append(batch.x.double().square().sum((-2, -1)))
    joined = {name: torch.cat(tensors).cpu() for name, tensors in parts.items()}
    return {n: t.mean(0) if n in ("network", "svd") else t for n, t in joined.items()}
