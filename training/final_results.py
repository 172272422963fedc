"""The test numbers and figures of a training run: what its best checkpoint is worth."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.files import with_content_hash, write_json
from figures import task_training, token_grid, training_curves
from model import LowRankFactorModel
from qwenvl_dataloader import BatchLoader, Loaders, RealQwenVLDataset
from svd_baseline import evaluate_batches, gram_eigh, report_ranks, summarise, token_error
from training.checkpoint import load_model, unseen_test


def test_and_draw(
    folder: Path, dataset: RealQwenVLDataset, loaders: Loaders, history: list[dict]
) -> dict:
    """Test numbers and figures of the best checkpoint; returns what test_results.json holds.

    That file is written last: a run that has it has everything.
    """
    write_json(folder / "history.json", history)  # a run cut off after its last checkpoint has none
    device = loaders.test.device
    model, state = load_model(folder / "best_model.pt", device, dataset)
    loaders, left_out, _ = unseen_test(state, loaders)  # one file may be in two groups
    rank = model.current_effective_rank()
    results = {
        "arch": state["config"]["arch"],
        "data": dataset.label,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_seen_left_out": left_out,
        "best_epoch": state["progress"]["best_epoch"],
        "epochs": history[-1]["epoch"],
        "effective_rank": rank,
        "ranks": {},
    }
    for r in report_ranks(rank):
        batches = loaders.test.with_progress(f"test, rank {r}")
        metrics = evaluate_batches(lambda batch, r=r: model(batch.x, r, grid=batch.grid), batches)
        results["ranks"][str(r)] = {name: summarise(v) for name, v in metrics.items()}
    per_image = test_statistics(model, loaders.test)
    footer = f"{dataset.label}; rank {rank}; {results['arch']}, seed {state['args']['seed']}"
    curves = folder / "train_val_loss_comparison.png", history, results["best_epoch"]
    if "val_task_error" in history[0]:  # untrained, the network is the SVD in the norm it starts at
        start = "SVD in the metric" if state["args"]["metric"] else "plain SVD"
        task_training.task_curve(*curves, start, footer)
    else:
        training_curves.training_curves(*curves, footer)
    training_curves.loss_terms(folder / "loss_curves.png", history, footer)
    token_grid.error_heatmap(
        folder / "error_heatmap.png",
        {name: per_image[name] for name in ("network", "svd")},
        dataset.grid,
        footer,
    )
    training_curves.b_row_norms(
        folder / "B_row_norm_hist.png", per_image["b_norms"], per_image["sigma"], footer
    )
    write_json(folder / "test_results.json", with_content_hash(results))
    return results


@torch.inference_mode()
def test_statistics(model: LowRankFactorModel, loader: BatchLoader) -> dict[str, Tensor]:
    """Mean error of each token, network and svd [T]; row norms of B and σ of each image [n, r]."""
    rank = model.current_effective_rank()
    parts: dict[str, list[Tensor]] = {"network": [], "svd": [], "b_norms": [], "sigma": []}
    for batch in loader.with_progress("error of tokens"):
        a, b = model(batch.x, rank, grid=batch.grid)
        parts["network"].append(token_error(batch.x, a, b))
        parts["svd"].append(token_error(batch.x, *gram_eigh(batch.x, rank)))
        parts["b_norms"].append(torch.linalg.vector_norm(b, dim=-1))
        parts["sigma"].append(batch.singular_values[:, :rank])
    joined = {name: torch.cat(tensors).cpu() for name, tensors in parts.items()}
    return {n: t.mean(0) if n in ("network", "svd") else t for n, t in joined.items()}
