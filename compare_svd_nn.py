"""Compare a trained network with the truncated SVD and other references on held-out images.

    python compare_svd_nn.py --arch ResMLP              # at every rank up to the trained one
    python compare_svd_nn.py --arch ResMLP --rank 64    # the same model, figures at rank 64

Writes results/<arch>/svd_nn_comparison.json, svd_nn_comparison.png and rank_sweep.png. Every method
sees the same normalised X of the same test images and is judged by the same whole-matrix error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import plots
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from checkpoint import evaluated_rank, load_model
from files import write_json
from model import LowRankFactorModel, canonical_arch
from qwenvl_dataloader import Loaders, RealQwenVLDataset, create_data_loaders_real
from svd_baseline import (
    Factors,
    bootstrap_interval,
    evaluate,
    exact_singular_values,
    fit_pca,
    pca,
    random_sketch,
    randomized_svd,
    report_ranks,
    summarise,
    truncated_svd,
)

Method = Callable[[Tensor, int], Factors]


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Compare a trained network with the truncated SVD on held-out images.",
        epilog="example:\n  python compare_svd_nn.py --arch ResMLP --rank 64",
    )
    parser.add_argument("--arch", default="ResMLP", help="architecture of the model")
    parser.add_argument("--rank", type=cli.number(int, 1), default=None,
                        help="rank to evaluate; default the trained (effective) rank")  # fmt: skip
    parser.add_argument("--results_dir", default="results", help="where <arch>/best_model.pt is")
    parser.add_argument("--cache_dir", default="feature_cache_real", help="feature cache to read")
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=8, help="images at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    device = cli.pick_device(args.device)
    folder = Path(args.results_dir) / canonical_arch(args.arch)
    dataset = RealQwenVLDataset(args.cache_dir)
    model, state = load_model(folder / "best_model.pt", device, dataset)
    rank = evaluated_rank(model, args.rank)
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    footer = (
        f"{dataset.label}; {loaders.test.num_images} test images, {state['config']['arch']}, "
        f"rank {rank}, seed {state['args']['seed']}"
    )
    print(footer)

    methods = reference_methods(model, loaders)
    ranks = report_ranks(rank)
    per_image = {
        r: {
            name: evaluate(lambda x, f=f, r=r: f(x, r), loaders.test) for name, f in methods.items()
        }
        for r in tqdm(ranks, desc="ranks", disable=None)
    }
    groups = dataset.rows["group"].take(loaders.test.sampler.rows.tolist()).to_pylist()
    results = {
        "arch": state["config"]["arch"],
        "factors": model.factors,
        "rank": rank,
        "requested_rank": args.rank or rank,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_groups": len(set(groups)),
        "data": dataset.label,
        "ranks": {
            str(r): {
                name: {key: summarise(values) for key, values in metrics.items()}
                for name, metrics in methods_at_r.items()
            }
            for r, methods_at_r in per_image.items()
        },
    }
    results["network_excess_pct_95"] = {
        str(r): interval(per_image[r]["network"]["excess_pct"], groups) for r in ranks
    }
    print_table(results)
    write_json(folder / "svd_nn_comparison.json", results)
    plots.comparison(
        folder / "svd_nn_comparison.png",
        per_image[rank],
        spectra(model, loaders, rank),
        rank,
        footer,
    )
    plots.rank_sweep(
        folder / "rank_sweep.png", results["ranks"], dataset.num_tokens, dataset.feature_dim, footer
    )
    print(f"wrote {folder}/svd_nn_comparison.json, svd_nn_comparison.png and rank_sweep.png")
    print(f"next: python visualize_svd_nn.py --arch {results['arch']} --image_idx 0")


def reference_methods(model: LowRankFactorModel, loaders: Loaders) -> dict[str, Method]:
    """The network and what it is held against, each a function of (x, rank)."""
    axes = fit_pca(batch.x for batch in tqdm(loaders.train, desc="PCA", disable=None, leave=False))
    methods: dict[str, Method] = {
        "network": lambda x, r: model(x, r),
        "svd": truncated_svd,
        "randomized_svd": randomized_svd,
        "pca": lambda x, r: pca(x, r, axes),
    }
    if model.factors == "projected":
        # as many columns and steps as the network has at every rank: only the sketch differs
        steps, columns = model.refine_steps, model.sketch_columns
        methods["random_sketch"] = lambda x, r: random_sketch(x, r, steps, columns - r)
    return methods


def spectra(model: LowRankFactorModel, loaders: Loaders, rank: int) -> dict[str, Tensor]:
    """Singular values [n, min(T, D)] of X and of X_hat on the test images."""
    with torch.inference_mode():
        hats = []
        for batch in loaders.test:
            a, b = model(batch.x, rank)
            hats.append(exact_singular_values(a.double() @ b.double()).cpu())
    rows = loaders.test.sampler.rows
    return {"X": loaders.test.dataset.singular_values[rows], "X_hat": torch.cat(hats)}


def interval(excess: Tensor, groups: list[str]) -> list[float] | None:
    """95 % bootstrap interval over groups of the mean excess; None where it is undefined."""
    return None if excess.isnan().any() else list(bootstrap_interval(excess, groups))


def print_table(results: dict) -> None:
    names = list(next(iter(results["ranks"].values())))
    print(
        f"mean rel_error, and mean excess over the optimum in per cent, {results['split']} images"
    )
    print("rank  " + "".join(f"{name:>24}" for name in names))
    for rank, methods in results["ranks"].items():
        cells = []
        for name in names:
            error, excess = methods[name]["rel_error"]["mean"], methods[name]["excess_pct"]["mean"]
            cells.append(f"{error:.5f} {'-' if excess is None else f'{excess:.4f} %':>13}")
        print(f"{rank:>4}  " + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    cli.run(main, get_args_parser())
