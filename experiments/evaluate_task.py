"""Measure what a task's head makes of compressed tokens: its error against rank and bytes.

    python -m experiments.evaluate_task --head saliency --metric metrics/saliency.safetensors
    python -m experiments.evaluate_task --metric metrics/saliency.safetensors --head_steps 4

Writes results/<arch>/task_sweep.json and task_sweep.png: on the same test images the plain SVD, the
SVD in the task's metric, the network, the network in the metric, both refined by the head where
--head_steps asks for it, and fewer tokens at as many bytes. All intervals are 95 %, from a
bootstrap over photographs. Nothing is chosen here: metric, network and the one calibrated factor
of the predicted rank come from training and validation images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.errors import UserError
from common.files import write_json
from figures import task_sweep
from model import LowRankFactorModel, canonical_arch
from qwenvl_dataloader import (
    Batch,
    BatchLoader,
    RealQwenVLDataset,
    create_data_loaders_real,
    denormalise,
)
from svd_baseline import Factors, gram_eigh, interval_95, rel_error, summarise
from task.boxes import part_errors, tokens_in_boxes
from task.heads import TaskHead
from task.load_head import HEADS, load_head
from task.metric import (
    TaskMetric,
    check_head,
    in_metric,
    load_metric,
    metric_svd,
    predicted_error,
)
from task.refinement import refine_factors
from task.token_reduction import average_tokens, drop_tokens, tokens_kept
from training.checkpoint import load_model

BYTES = 2  # of a stored number, bf16
POOLED = (2, 4, 8)  # sides of the blocks that token averaging is shown at

# (batch, rank, output of the full tokens) → A, B
Method = Callable[[Batch, int, Tensor], Factors]
Score = Callable[[Tensor, Tensor], Tensor]  # (raw tokens [b, T, D], rows [b]) → [b]


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Measure what a task's head makes of compressed tokens.",
        epilog="example:\n"
        "  python -m experiments.evaluate_task --metric metrics/saliency.safetensors",
    )
    task = parser.add_argument_group("head, metric and what is measured")
    task.add_argument("--head", choices=HEADS, default="saliency", help="whose output counts")
    task.add_argument("--head_model", type=cli.name, default=None, metavar="NAME",
                        help="of qwen-answer: folder or hub id of the whole checkpoint; default "
                             "the cache's encoder")  # fmt: skip
    task.add_argument(
        "--metric",
        type=cli.name,
        required=True,
        metavar="FILE",
        help="of experiments.estimate_metric",
    )
    task.add_argument("--arch", type=cli.name, default="ResMLP", help="architecture of the network")
    task.add_argument("--task_results_dir", type=cli.folder, default=None, metavar="DIR",
                        help="results folder of the network trained with --task_head")  # fmt: skip
    task.add_argument("--ranks", type=cli.number(int, 1), nargs="+", metavar="R",
                        default=[2, 4, 8, 16, 32, 64, 128], help="ranks to evaluate")  # fmt: skip
    task.add_argument("--head_steps", type=cli.number(int, 0), default=0, metavar="K",
                        help="also: A and B refined by K gradient steps of the head on each image "
                             "(K + 1 forward, K backward passes)")  # fmt: skip
    task.add_argument("--bound", type=cli.number(float, above=0, below=1), nargs="+",
                        default=[0.2, 0.1, 0.05], metavar="E",
                        help="task errors whose rank is predicted for each image")  # fmt: skip
    task.add_argument("--confidence", type=cli.number(float, above=0, below=1), default=0.9,
                        metavar="Q",
                        help="share of validation images and ranks whose error the prediction "
                             "must cover")  # fmt: skip
    task.add_argument("--answers", action="store_true",
                        help="also generate the answers and score them (qwen-answer)")  # fmt: skip
    task.add_argument("--boxes", action="store_true",
                        help="also ask where the answer stands, and score the overlap with the "
                             "row's box (qwen-answer)")  # fmt: skip
    task.add_argument("--batch_size", type=cli.number(int, 1), default=8, help="images at once")
    cli.add_evaluation_flags(parser, metric=False)
    return parser


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    cli.check_head_model(args.head_model, args.head)
    arch = canonical_arch(args.arch)
    device = cli.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    limit = min(dataset.num_tokens, dataset.feature_dim)
    ranks = [r for r in sorted(set(args.ranks)) if r <= limit]
    if len(ranks) < len(set(args.ranks)) and "ranks" in args.typed:
        raise UserError(f"--ranks {max(args.ranks)} is out of range: type 1 to {limit}")
    metric = load_metric(args.metric, dataset).to(device)
    networks = load_networks(args, device, dataset)
    head = load_head(args.head, dataset, device=device, model=args.head_model)
    check_head(metric, head)
    scores = {}  # what is generated, and how it is scored
    for flag, name, score in (
        ("answers", "vqa_accuracy", "answer_scores"),
        ("boxes", "box_overlap", "box_scores"),
    ):
        if getattr(args, flag):
            if not hasattr(head, score):
                raise UserError(f"--{flag}: --head {head.name} generates none, omit it")
            scores[name] = getattr(head, score)
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    footer = f"{dataset.label}; head {head.name}, {loaders.test.num_images} test images"
    print(footer)

    methods = factor_methods(networks, metric, head, args.head_steps)
    values = measure(methods, head, loaders.test, ranks, scores)
    values |= measure_fewer_tokens(head, loaders.test, ranks)
    groups = dataset.rows["group"].take(loaders.test.sampler.rows.tolist()).to_pylist()
    results = {
        "head": head.name,
        "head_sha256": head.sha256,
        "metric": {"sha256": metric.sha256, **metric.info},
        "head_steps": args.head_steps,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_groups": len(set(groups)),
        "data": dataset.label,
        "methods": summarise_methods(values, groups),
        "full_tokens": score_full_tokens(scores, loaders.test),
        "rank_per_image": rank_per_image(head, metric, loaders.val, loaders.test, values, args),
    }
    folder = Path(args.results_dir) / arch
    folder.mkdir(parents=True, exist_ok=True)
    print_table(results)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(folder / "task_sweep.json", results)
    task_sweep.task_sweep(folder / "task_sweep.png", results, head.output, footer)
    print(f"wrote {folder}/task_sweep.json and task_sweep.png")


def load_networks(
    args: argparse.Namespace, device: torch.device, dataset: RealQwenVLDataset
) -> dict[str, LowRankFactorModel]:
    """`network` of --results_dir, `network_task` of --task_results_dir, where they are there."""
    arch = canonical_arch(args.arch)
    path = Path(args.results_dir) / arch / "best_model.pt"
    found = {}
    if path.exists():
        found["network"] = load_model(path, device, dataset)[0]
    else:
        print(f"note: no trained network in {path.parent}/, references only")
    if args.task_results_dir:
        path = Path(args.task_results_dir) / arch / "best_model.pt"
        found["network_task"] = load_model(path, device, dataset)[0]
    return found


def factor_methods(
    networks: dict[str, LowRankFactorModel], metric: TaskMetric, head: TaskHead, steps: int
) -> dict[str, tuple[Method, int | None]]:
    """Name → (method, its largest rank or None)."""
    methods: dict[str, tuple[Method, int | None]] = {
        "svd": (lambda batch, r, full: gram_eigh(batch.x, r), None),
        "svd_in_metric": (lambda batch, r, full: metric_svd(batch.x, r, metric), None),
    }
    for name, model in networks.items():
        most = model.current_effective_rank()
        methods[name] = (lambda batch, r, full, m=model: m(batch.x, r), most)
        if name == "network":
            mapped = in_metric(model, metric)
            methods["network_in_metric"] = (lambda batch, r, full, f=mapped: f(batch.x, r), most)
    if steps:
        for name in ("svd_in_metric", "network_task"):
            if name in methods:
                methods[f"{name}_refined"] = refined(*methods[name], metric, head, steps)
    return methods


def refined(
    method: Method, most: int | None, metric: TaskMetric, head: TaskHead, steps: int
) -> tuple[Method, int | None]:
    """`method` followed by `steps` gradient steps of the head on A and B of each image."""

    def refine(batch: Batch, rank: int, full: Tensor) -> Factors:
        a, b = method(batch, rank, full)
        return refine_factors(head, batch, a, b, metric, steps, full)

    return refine, most


# ------------------------------------------------------------------------------------- measures


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


def measure(
    methods: dict[str, tuple[Method, int | None]],
    head: TaskHead,
    loader: BatchLoader,
    ranks: list[int],
    scores: dict[str, Score] | None = None,
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """method → rank → measure → [n] float64, of every method at the ranks that it reaches."""
    pairs = [(n, r) for r in ranks for n, (_, most) in methods.items() if r <= (most or r)]
    parts: dict[tuple[str, int], list[dict]] = {pair: [] for pair in pairs}
    for batch in loader.with_progress(f"{len(pairs)} factorisations of each"):
        with torch.no_grad():
            full = head.outputs(denormalise(batch.x, batch.mean, batch.std), batch.rows)
            inside = tokens_in_boxes(loader.dataset, batch.rows.tolist())
            for name, rank in pairs:
                a, b = methods[name][0](batch, rank, full)
                found = judge(head, batch, a @ b, full, scores or {})
                found["rel_error"] = rel_error(batch.x, a, b).cpu()
                found["rel_error_in_box"] = part_errors(batch.x, a, b, inside)["inside"]
                parts[name, rank].append(found)
    values: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in methods}
    values_per_rank = loader.dataset.num_tokens + loader.dataset.feature_dim
    for (name, rank), found in parts.items():
        values[name][rank] = joined(found) | {"stored": rank * values_per_rank}
    return values


@torch.no_grad()
def score_full_tokens(scores: dict[str, Score], loader: BatchLoader) -> dict[str, dict]:
    """What every score is of the tokens as they are: no factorisation can be held to more."""
    parts: dict[str, list[Tensor]] = {name: [] for name in scores}
    for batch in loader.with_progress("full tokens") if scores else []:
        tokens = denormalise(batch.x, batch.mean, batch.std)
        for name, score in scores.items():
            parts[name].append(score(tokens, batch.rows).cpu())
    return {name: summarise(torch.cat(found)) for name, found in parts.items()}


def measure_fewer_tokens(
    head: TaskHead, loader: BatchLoader, ranks: list[int]
) -> dict[str, dict[int, dict]]:
    """`token_dropping` at the bytes of each rank, `token_averaging` over blocks of POOLED."""
    dataset = loader.dataset
    grid, t, d = dataset.grid, dataset.num_tokens, dataset.feature_dim
    keep = {r: min(t, r * (t + d) // d) for r in ranks if r * (t + d) <= t * d}
    sides = [side for side in POOLED if side <= min(grid)]
    parts: dict[tuple[str, int], list[dict]] = {}
    for batch in loader.with_progress("fewer tokens"):
        with torch.no_grad():
            full = head.outputs(denormalise(batch.x, batch.mean, batch.std), batch.rows)
            made = {("token_dropping", r): drop_tokens(batch.x, k, grid) for r, k in keep.items()}
            made |= {("token_averaging", s): average_tokens(batch.x, s, grid) for s in sides}
            for key, x_hat in made.items():
                parts.setdefault(key, []).append(judge(head, batch, x_hat, full, {}))
    values: dict[str, dict[int, dict]] = {"token_dropping": {}, "token_averaging": {}}
    for (name, size), found in parts.items():
        kept = keep[size] if name == "token_dropping" else tokens_kept(size, grid)
        values[name][size] = joined(found) | {"stored": kept * d}
    return values


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summarise_methods(
    values: dict[str, dict[int, dict]], groups: list[str]
) -> dict[str, dict[str, dict]]:
    """The JSON's entry: method → rank (averaging: side of a block) → means and intervals.

    gain_pct: by how much the mean task error is below the plain SVD's at the same rank, with the
    interval of the paired difference.
    """
    table: dict[str, dict[str, dict]] = {}
    for name, sizes in values.items():
        if not sizes:  # no rank that it reaches, or no grid to average over
            continue
        table[name] = {}
        for size, found in sizes.items():
            # means and standard deviations of the tokens, stored by all, are not counted
            entry = {"stored_values": found["stored"], "bytes": BYTES * found["stored"]}
            for key, value in found.items():
                if key != "stored" and not value.isnan().all():
                    entry[key] = summarise(value) | {"interval_95": interval_95(value, groups)}
            plain = values["svd"].get(size)
            if plain is not None and name not in ("svd", "token_averaging"):
                base = plain["task_error"]
                gain = 100 * (base - found["task_error"]) / base.mean()
                entry["gain_pct"] = {
                    "mean": float(gain.mean()),
                    "interval_95": interval_95(gain, groups),
                }
            table[name][str(size)] = entry
    return table


# ---------------------------------------------------------------------------- rank for each image


@torch.no_grad()
def rank_per_image(
    head: TaskHead,
    metric: TaskMetric,
    val: BatchLoader,
    test: BatchLoader,
    values: dict,
    args: argparse.Namespace,
) -> dict:
    """Predicted ranks of the test images for every --bound, without running the head on them.

    The prediction of `predicted_error` is multiplied by one factor: the --confidence quantile of
    the ratio of measured to predicted error on validation images, at the ranks evaluated. `within`
    is the share of test images whose measured error at the predicted rank is within the bound.
    """
    ranks = sorted(values["svd_in_metric"])
    method = {"svd_in_metric": (lambda batch, r, full: metric_svd(batch.x, r, metric), None)}
    on_val = measure(method, head, val, ranks)["svd_in_metric"]
    predicted = {n: torch.cat([predicted_error(b.x, metric).cpu() for b in loader])
                 for n, loader in (("val", val), ("test", test))}  # fmt: skip
    measured = torch.stack([on_val[r]["task_error"] for r in ranks], dim=-1)
    ratio = measured / predicted["val"][:, ranks]
    factor = float(ratio[ratio.isfinite()].quantile(args.confidence))
    curves = factor * predicted["test"]  # [n, T + 1]
    found = torch.stack([values["svd_in_metric"][r]["task_error"] for r in ranks], dim=-1)
    bounds = {}
    for bound in args.bound:
        chosen = (curves <= bound).long().argmax(-1)  # [n], the first rank within
        error = torch.cat(
            [
                errors_at(head, metric, batch, chosen[i * args.batch_size :][: len(batch.x)])
                for i, batch in enumerate(test)
            ]
        )
        bounds[f"{bound:g}"] = {
            "rank": summarise(chosen.double())
            | {"min": int(chosen.min()), "max": int(chosen.max())},
            "within": float((error <= bound).double().mean()),
            "measured": summarise(error),
        }
    return {
        "factor": factor,
        "confidence": args.confidence,
        "bounds": bounds,
        "calibration": {
            "ranks": ranks,
            "predicted": curves[:, ranks].tolist(),
            "measured": found.tolist(),
        },
    }


def errors_at(head: TaskHead, metric: TaskMetric, batch: Batch, ranks: Tensor) -> Tensor:
    """Task error of the SVD in the metric, each image at its own rank, [b] float64."""
    a, b = metric_svd(batch.x, int(ranks.max()), metric)
    kept = torch.arange(a.shape[-1]) < ranks[:, None]
    x_hat = (a * kept.to(a)[:, None, :]) @ b
    full = head.outputs(denormalise(batch.x, batch.mean, batch.std), batch.rows)
    return judge(head, batch, x_hat, full, {})["task_error"]


# --------------------------------------------------------------------------------------- results


def gain_text(gain: dict) -> str:
    interval = gain["interval_95"]
    return f"{gain['mean']:.1f}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")


def print_table(results: dict) -> None:
    methods = results["methods"]
    ranks = list(methods["svd"])
    print("task error, mean over test images; below it, per cent below the plain SVD's [95 %]")
    print(f"{'':26}" + "".join(f"{'rank ' + r:>19}" for r in ranks))
    for name, sizes in methods.items():
        if name == "token_averaging":
            continue
        cells = [f"{sizes[r]['task_error']['mean']:.5f}" if r in sizes else "-" for r in ranks]
        print(f"{name:26}" + "".join(f"{cell:>19}" for cell in cells))
        if name != "svd":
            gains = [sizes[r]["gain_pct"] if r in sizes else None for r in ranks]
            cells = ["-" if gain is None else gain_text(gain) for gain in gains]
            print(f"{'':26}" + "".join(f"{cell:>19}" for cell in cells))
    for score, full in results["full_tokens"].items():
        whole = "no row has any" if full["mean"] is None else f"{full['mean']:.4f}"
        print(f"{score}, mean; full tokens: {whole}")
        for name, sizes in methods.items():
            found = [sizes[r].get(score) if r in sizes else None for r in ranks]
            if any(found):
                cells = [f"{entry['mean']:.4f}" if entry else "-" for entry in found]
                print(f"{name:26}" + "".join(f"{cell:>19}" for cell in cells))
    for side, entry in methods.get("token_averaging", {}).items():
        print(f"tokens averaged {side} × {side}: {entry['task_error']['mean']:.5f} at "
              f"{entry['bytes'] / 1e3:.0f} kB")  # fmt: skip
    for bound, entry in results["rank_per_image"]["bounds"].items():
        print(f"task error ≤ {bound}: predicted ranks {entry['rank']['mean']:.1f} on average, "
              f"{100 * entry['within']:.0f} % of the images within")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, get_args_parser())
