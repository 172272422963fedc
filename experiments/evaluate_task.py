"""Measure what a task's head makes of compressed tokens: its error against rank and bytes.

    python -m experiments.evaluate_task --metric metrics/saliency.safetensors
    python -m experiments.evaluate_task --metric my.safetensors --head_steps 4

Writes results/<arch>/task_sweep.json and task_sweep.png: on the same test images the plain SVD, the
SVD in the task's metric, the network, the network in the metric, fewer tokens at as many bytes, and
where --head_steps asks for it the plain SVD, the SVD in the metric and the task-trained network
refined by the head; the plain SVD's steps know nothing of the metric: what they gain is the steps'
own. Intervals are approximate 95 % intervals, Student's t over photographs. Nothing is chosen here:
metric, network and the one calibrated factor of the predicted rank come from training and
validation images.

What is measured is kept as it goes in results/<arch>/task_sweep.partial.jsonl: the same command,
typed again after a cut, goes on from it. --images and --batch_size may be others then.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from common import arguments
from common.tables import print_columns
from experiments.benchmark import checked_ranks
from experiments.partial_results import PartialResults
from experiments.task_measures import (
    FULL,
    Found,
    TaskMethod,
    judge_factors,
    judge_fewer_tokens,
    measure,
    rank_per_image,
    score_full_tokens,
    spread_over_groups,
    summarise_methods,
)
from figures import task_sweep
from heads.load_head import HEADS, load_head
from heads.metric import TaskMetric, check_head, load_metric, metric_svd, network_in_metric
from heads.refinement import refine_factors
from heads.task_head import Score, TaskHead
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sha256_file, sole_writer, write_json
from lowrank_tokens.linalg import exact_factors
from model import LowRankFactorModel, canonical_arch
from qwenvl_dataloader import Batch, Loaders, RealQwenVLDataset, create_data_loaders_real
from svd_baseline import gain_text
from training.checkpoint import load_model


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    task = parser.flags("head, metric and what is measured")
    task("--head", HEADS, "saliency", "whose output counts")
    task("--head_model")
    task("--metric", required=True)
    task("--arch")
    task("--task_results_dir", arguments.folder)(
        "results folder of the network trained with --task_head"
    )
    task("--ranks", arguments.count, [2, 4, 8, 16, 32, 64, 128], "ranks to evaluate")
    task("--head_steps", arguments.whole, 0)(
        "also: A and B refined by K gradient steps of the head on each image (K + 1 forward, K "
        "backward passes), the plain SVD's too"
    )
    bounds = [0.2, 0.1, 0.05]
    task(
        "--bound", arguments.fraction, bounds, "task errors whose rank is predicted for each image"
    )
    task("--confidence", arguments.fraction, 0.9)(
        "share of validation images and ranks whose error the prediction must cover"
    )
    task.switch("--answers", "also generate the answers and score them (qwen-answer)")
    task.switch("--boxes")(
        "also ask where the answer stands, and score the overlap with the row's box (qwen-answer)"
    )
    task("--images")(
        "only so many test images, and at most as many for validation, spread over their groups"
    )
    task("--batch_size")
    arguments.add_evaluation_flags(parser, metric=False)
    return parser


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    arguments.check_head_model(args.head_model, args.head)
    arch = canonical_arch(args.arch)
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    ranks = checked_ranks(args, min(dataset.num_tokens, dataset.feature_dim))
    metric = load_metric(args.metric, dataset).to(device)
    paths = network_paths(args)
    networks = {name: load_model(path, device, dataset)[0] for name, path in paths.items()}
    head = load_head(args.head, dataset, device=device, model=args.head_model)
    check_head(metric, head)
    scores = wanted_scores(args, head)
    loaders = evaluated_images(dataset, args, device)
    footer = f"{dataset.label}; head {head.name}, {loaders.test.num_images} test images"
    print(footer)

    header = {
        "head": head.sha256,
        "metric": metric.sha256,  # it knows its cache
        "networks": {name: sha256_file(path) for name, path in paths.items()},
        "ranks": ranks,
        "head_steps": args.head_steps,
        "scores": list(scores),
        "device": device.type,
    }
    folder = Path(args.results_dir) / arch
    with sole_writer(folder, "--results_dir"):
        partial = PartialResults(folder / "task_sweep.partial.jsonl", header)
        if partial.records:
            print(f"going on from {partial.path}: {len(partial.records)} images are measured")
        methods = factor_methods(networks, metric, head, args.head_steps)
        results = evaluate(methods, metric, head, loaders, ranks, scores, partial, args)
        print_tables(results)
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "task_sweep.json", results)
        task_sweep.task_sweep(folder / "task_sweep.png", results, head.output, footer)
        task_sweep.task_calibration(
            folder / "task_calibration.png", results["rank_per_image"], footer
        )
        partial.remove()
    print(f"wrote {folder}/task_sweep.json, task_sweep.png and task_calibration.png")


def network_paths(args: argparse.Namespace) -> dict[str, Path]:
    """`network` of --results_dir where there is one, `network_task` of --task_results_dir."""
    file = Path(canonical_arch(args.arch)) / "best_model.pt"
    path = Path(args.results_dir) / file
    found = {"network": path} if path.exists() else {}
    if not found:
        print(f"note: no trained network in {path.parent}/, references only")
    if args.task_results_dir:
        found["network_task"] = Path(args.task_results_dir) / file
    return found


def wanted_scores(args: argparse.Namespace, head: TaskHead) -> dict[str, Score]:
    """What --answers and --boxes score. Raises InputError for a head that generates nothing."""
    wanted = {"--answers": "vqa_accuracy"} if args.answers else {}
    wanted |= {"--boxes": "box_overlap"} if args.boxes else {}
    for flag, name in wanted.items():
        if name not in head.scores:
            raise InputError(f"{flag}: --head {head.name} generates none, omit it")
    return {name: head.scores[name] for name in wanted.values()}


def evaluated_images(
    dataset: RealQwenVLDataset, args: argparse.Namespace, device: torch.device
) -> Loaders:
    """The loaders with the validation and test images that --images leaves."""
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    if args.images is None:
        return loaders
    val, test = (
        loader.only(spread_over_groups(dataset, loader.sampler.rows, args.images))
        for loader in (loaders.val, loaders.test)
    )
    return loaders._replace(val=val, test=test)


def factor_methods(
    networks: dict[str, LowRankFactorModel], metric: TaskMetric, head: TaskHead, steps: int
) -> dict[str, TaskMethod]:
    """The methods by name; with `steps` also those that the head refines."""
    methods = {
        "svd": TaskMethod(lambda batch, r, full: exact_factors(batch.x, r)),
        "svd_in_metric": TaskMethod(lambda batch, r, full: metric_svd(batch.x, r, metric)),
    }
    for name, model in networks.items():
        most = model.current_effective_rank()
        methods[name] = TaskMethod(
            lambda batch, r, full, m=model: m(batch.x, r, grid=batch.grid), most
        )
        if name == "network":
            mapped = network_in_metric(model, metric)
            methods["network_in_metric"] = TaskMethod(
                lambda batch, r, full, f=mapped: f(batch.x, r, grid=batch.grid), most
            )
    if steps:
        # the control, whose steps must not know the metric, and what is held against it
        scales = {"svd": None, "svd_in_metric": metric, "network_task": metric}
        for name, scale in scales.items():
            if name in methods:
                methods[f"{name}_refined"] = refined(methods[name], scale, head, steps)
    return methods


def refined(
    method: TaskMethod, metric: TaskMetric | None, head: TaskHead, steps: int
) -> TaskMethod:
    """`method` followed by `steps` gradient steps of the head on A and B of each image."""

    def refine(batch: Batch, rank: int, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = method.factorise(batch, rank, full)
        return refine_factors(head, batch, a, b, metric, steps, full)

    return TaskMethod(refine, method.largest_rank)


def evaluate(
    methods: dict[str, TaskMethod],
    metric: TaskMetric,
    head: TaskHead,
    loaders: Loaders,
    ranks: list[int],
    scores: dict[str, Score],
    partial: PartialResults,
    args: argparse.Namespace,
) -> dict:
    """What task_sweep.json says, but for the time that it took."""
    dataset = loaders.test.dataset

    def of_test(batch: Batch) -> Found:
        found = judge_factors(methods, head, dataset, batch, ranks, scores)
        found |= judge_fewer_tokens(head, dataset, batch, ranks)
        return found | score_full_tokens(scores, batch)

    def of_val(batch: Batch) -> Found:
        alone = {"svd_in_metric": methods["svd_in_metric"]}
        return judge_factors(alone, head, dataset, batch, ranks, {})

    on_test = measure(partial, "test", loaders.test, of_test)
    on_val = measure(partial, "validation", loaders.val, of_val)
    groups = dataset.rows["group"].take(loaders.test.sampler.rows.tolist()).to_pylist()
    found = on_val["svd_in_metric"], on_test["svd_in_metric"]
    wanted = args.bound, args.confidence
    per_image = rank_per_image(head, metric, loaders.val, loaders.test, *found, *wanted)
    return {
        "head": head.name,
        "head_sha256": head.sha256,
        "loss_name": head.loss_name,  # of task_loss, where that is not the error squared
        "metric": {"sha256": metric.sha256, **metric.info},
        "head_steps": args.head_steps,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_groups": len(set(groups)),
        "data": dataset.label,
        "methods": summarise_methods(on_test, groups),
        FULL: {name: summarise(value) for name, value in on_test[FULL][0].measures.items()},
        "rank_per_image": per_image,
    }


# --------------------------------------------------------------------------------------- results


def print_tables(results: dict) -> None:
    methods = {n: sizes for n, sizes in results["methods"].items() if n != "token_averaging"}
    ranks = list(methods["svd"])

    def print_means(title: str, form: str, measure: str, **gains: str) -> None:
        """A line for each method that has the measure; gains: key → what begins a line below it."""
        rows = [["", *(f"rank {r}" for r in ranks)]]
        for name, sizes in methods.items():
            entries = [sizes.get(r, {}) for r in ranks]
            means = [e[measure]["mean"] if measure in e else None for e in entries]
            if any(mean is not None for mean in means):
                rows.append([name, *("-" if m is None else format(m, form) for m in means)])
            for key, words in gains.items():
                if any(key in e for e in entries):
                    rows.append([words, *(gain_text(e.get(key)) for e in entries)])
        print(title)
        print_columns(rows)

    below = "by how many per cent it is below another's [approximate 95 % interval]"
    print_means(
        f"task error, mean over test images; below it, {below}",
        ".5f",
        "task_error",
        gain_pct="  % below svd",
        gain_over_svd_refined_pct="  % below svd_refined",
    )
    if name := results["loss_name"]:
        print_means(f"{name}, mean over test images", ".3g", "task_loss")
    for score, full in results[FULL].items():
        whole = "no row has any" if full["mean"] is None else f"{full['mean']:.4f}"
        print_means(f"{score}, mean; full tokens: {whole}", ".4f", score)
    for side, entry in results["methods"].get("token_averaging", {}).items():
        error, kilobytes = entry["task_error"]["mean"], entry["bytes"] / 1e3
        print(f"tokens averaged {side} × {side}: {error:.5f} at {kilobytes:.0f} kB")
    for bound, entry in results["rank_per_image"]["bounds"].items():
        rank, within = entry["rank"]["mean"], f"{100 * entry['within']:.0f} % of the images within"
        print(f"task error ≤ {bound}: predicted ranks {rank:.1f} on average, {within}")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
