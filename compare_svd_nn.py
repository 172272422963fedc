"""Compare a trained network with the truncated SVD and other references on held-out images.

    python compare_svd_nn.py --arch ResMLP   # at every rank up to the trained one
    python compare_svd_nn.py --arch ResMLP --rank 64   # figures at 64
    python compare_svd_nn.py --target_error 0.06   # a rank for each image

Writes results/<arch>/svd_nn_comparison.json, svd_nn_comparison.png and rank_sweep.png; with
--target_error or --mean_rank also rank_per_image.png, what ranks that differ gain over one fixed
rank that stores as much. Every method sees the same normalised X of the same test images and is
judged by the same whole-matrix error; a network of a task's norm also by its head's output, beside
the SVD in the task's metric where --metric or metrics/<head>.safetensors is at hand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from common import arguments
from common.tables import print_columns
from figures import comparison
from heads.box_error import PARTS, box_report, part_errors, tokens_in_boxes
from heads.metric import TaskMetric, load_metric, network_in_metric
from heads.task_error import (
    Factorise,
    closed_form,
    cut_at_ranks,
    head_of_norm,
    metric_at_hand,
    once_a_batch,
    task_report,
)
from lowrank_tokens.errors import image_metrics, percent_text, summarise
from lowrank_tokens.factor_files import restore, store
from lowrank_tokens.files import sole_writer, with_content_hash, write_json
from model import LowRankFactorModel
from qwenvl_dataloader import Batch, Loaders, create_data_loaders_real
from svd_baseline import (
    fit_pca,
    gain_text,
    interval_95,
    pca,
    random_sketch,
    randomized_svd,
    report_ranks,
    truncated_svd,
)
from training.checkpoint import Trained, evaluated_rank, open_trained, unseen_test
from training.rank_budget import (
    against_fixed_rank,
    error_curve,
    first_rank_as_stored,
    first_rank_within,
    nested_factors,
    optimum_curve,
    split_ranks,
)

if TYPE_CHECKING:
    from heads.task_head import TaskHead
    from training.trained_norm import TaskFactorModel

STORED_AS = "bf16"  # factorize.py's default: its ranks for a target are those that are reported


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    what = parser.flags("what is compared")
    what("--arch")
    ranks = what.one_of()
    ranks("--rank")
    ranks("--target_error", help="also: each image at the least rank with this rel_error")
    ranks("--mean_rank", arguments.count)(
        "also: this rank on average, split over images for the least total squared error"
    )
    what("--batch_size")
    arguments.add_evaluation_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    trained = open_trained(args)
    with sole_writer(trained.folder, "--results_dir"):
        compare(args, trained)


def compare(args: argparse.Namespace, trained: Trained) -> None:
    """All numbers and figures of the trained model, into its folder."""
    folder, device, dataset, model, state = trained
    rank = evaluated_rank(model, args.rank)
    metric = load_metric(args.metric, dataset).to(device) if args.metric else None
    in_metric = network_in_metric(model, metric) if metric else None
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    loaders, left_out, overlap = unseen_test(state, loaders)
    footer = (
        f"{dataset.label}; {loaders.test.num_images} test images, {state['config']['arch']}, "
        f"rank {rank}, seed {state['args']['seed']}"
    ) + (f"; {overlap}" if overlap else "")
    print(footer)

    if per_image_rank := args.target_error is not None or args.mean_rank is not None:
        budget, budget_arrays = rank_per_image(model, loaders, rank, args)
    methods = reference_methods(model, loaders)
    if metric:
        methods["svd_in_metric"] = closed_form(metric)
        methods["network_in_metric"] = lambda batch, r: in_metric(batch.x, r, grid=batch.grid)
        if in_metric is model:
            methods["network_in_metric"] = methods["network"]
            print("note: the network has a norm for this head: network_in_metric is network")
    ranks = report_ranks(rank)
    groups = dataset.rows["group"].take(loaders.test.sampler.rows.tolist()).to_pylist()
    reader = head_and_its_methods(trained, methods, metric)
    batches = loaders.test.with_progress("every method")
    per_image, task_of = errors_at_ranks(methods, reader, batches, ranks)
    results = {
        "arch": state["config"]["arch"],
        "factors": model.factors,
        "rank": rank,
        "requested_rank": args.rank or rank,
        "split": "test",
        "n_images": loaders.test.num_images,
        "n_groups": len(set(groups)),
        "n_seen_left_out": left_out,  # null: overlap unknown
        "data": dataset.label,
        "num_tokens": dataset.mean_tokens(loaders.test.sampler.rows.tolist()),
        "feature_dim": dataset.feature_dim,
        "ranks": {
            str(r): {
                name: {key: summarise(values) for key, values in metrics.items()}
                for name, metrics in methods_at_r.items()
            }
            for r, methods_at_r in per_image.items()
        },
    }
    results["network_excess_pct_95"] = {
        str(r): interval_95(per_image[r]["network"]["excess_pct"], groups) for r in ranks
    }
    in_task = reader and task_report(task_of, reader.head, reader.metric, groups)
    if in_task:  # None: begun at the plain norm
        in_task["network_metric_sha256"] = model.norm["metric_sha256"]
    results["task"] = in_task
    results["box"] = error_by_box(methods, loaders, rank)
    print_table(results)
    if in_task:
        print_both_norms(results)
    print_box(results["box"])
    written = "svd_nn_comparison.json, svd_nn_comparison.png and rank_sweep.png"
    if per_image_rank:
        results["rank_per_image"] = budget
        print_budget(budget)
        comparison.rank_per_image(folder / "rank_per_image.png", budget_arrays, footer)
        written = written.replace(" and", ",") + " and rank_per_image.png"
    write_json(folder / "svd_nn_comparison.json", with_content_hash(results))
    comparison.comparison(
        folder / "svd_nn_comparison.png", per_image[rank], rank, footer, task_of.get(rank)
    )
    sweep = folder / "rank_sweep.png", results["ranks"]
    if in_task:
        comparison.both_norms(*sweep, in_task, footer)
    else:
        comparison.rank_sweep(*sweep, results["num_tokens"], dataset.feature_dim, footer)
    print(f"wrote {folder}/{written}: look at rank_sweep.png")
    again = arguments.flags_again(args, "rank", "metric", "results_dir", "cache_dir", "device")
    excess = per_image[rank]["network"]["excess_pct"].nan_to_num(nan=-1.0)
    worst = int(loaders.test.sampler.rows[excess.argmax()])
    again = f"--arch {results['arch']} --image_idx {worst}{again}"
    print(f"next, the test image with the largest excess: python visualize_svd_nn.py {again}")


def reference_methods(model: LowRankFactorModel, loaders: Loaders) -> dict[str, Factorise]:
    """The network and what it is held against, each a function of (batch, rank)."""
    axes = fit_pca(batch.x for batch in loaders.train.with_progress("PCA"))
    methods: dict[str, Factorise] = {
        "network": network_at_ranks(model),
        "svd": cut_at_ranks(lambda batch, r: truncated_svd(batch.x, r)),
        "randomized_svd": lambda batch, r: randomized_svd(batch.x, r),
        "pca": lambda batch, r: pca(batch.x, r, axes),
    }
    if model.factors == "projected":
        # as many columns and steps as the network has at every rank: only the sketch differs
        methods["random_sketch"] = lambda batch, r: random_sketch(
            batch.x, r, model.refine_steps, min(model.sketch_columns(r), *batch.x.shape[-2:])
        )
    return methods


def network_at_ranks(model: LowRankFactorModel | TaskFactorModel) -> Factorise:
    """The network, its norm of a batch made once for all ranks."""
    if model.norm is None:
        return lambda batch, r: model(batch.x, r, grid=batch.grid)
    in_norm = once_a_batch(lambda batch: model.in_norm(batch.x, batch.grid))
    return lambda batch, r: model.factors_of(batch.x, *in_norm(batch), r, batch.grid)


class Reader(NamedTuple):
    """A head, and the methods whose error is also taken of its output."""

    head: TaskHead
    metric: TaskMetric | None  # of its closed form, where there is one at hand
    methods: dict[str, Factorise]


def head_and_its_methods(
    trained: Trained, methods: dict[str, Factorise], metric: TaskMetric | None
) -> Reader | None:
    """The head that the network was trained for, which judges SVD and network, and the closed form,
    the SVD in the task's metric, where --metric or the default file is at hand; None for a network
    of the Frobenius norm, or where its head is not at hand."""
    _, device, dataset, model, state = trained
    if model.norm is None:
        return None
    head = head_of_norm(model.norm, dataset, device, state["args"].get("head_model"))
    if head is None:
        return None
    judged = {name: methods[name] for name in ("svd", "network")}
    if metric := metric or metric_at_hand(head, dataset):
        metric = metric.to(device)
        judged["svd_in_metric"] = closed_form(metric)
    return Reader(head, metric, judged)


@torch.inference_mode()
def errors_at_ranks(
    methods: dict[str, Factorise],
    reader: Reader | None,
    batches: Iterable[Batch],
    ranks: list[int],
) -> tuple[dict[int, dict[str, dict[str, Tensor]]], dict[int, dict[str, Tensor]]]:
    """Of each image, in one pass over the batches: rank → method → `image_metrics`, and rank →
    method of the reader → task error; all [n] on the CPU."""
    of_head = reader.methods if reader else {}
    found = {r: {name: [] for name in methods} for r in ranks}
    task = {r: {name: [] for name in of_head} for r in ranks}
    for batch in batches:
        full = reader.head.of_full(batch) if reader else None
        for name, factorise in (methods | of_head).items():
            for r in ranks:
                a, b = factorise(batch, r)
                if name in methods:
                    errors = image_metrics(batch.x, a, b, batch.singular_values)
                    found[r][name].append({key: values.cpu() for key, values in errors.items()})
                if name in of_head:
                    error = reader.head.error(reader.head.of_batch(batch, a @ b), full)
                    task[r][name].append(error.cpu())
    joined = {
        r: {
            name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            for name, parts in of_rank.items()
        }
        for r, of_rank in found.items()
    }
    return joined, {
        r: {name: torch.cat(errors) for name, errors in of_rank.items()}
        for r, of_rank in task.items()
    }


@torch.inference_mode()
def error_by_box(methods: dict[str, Factorise], loaders: Loaders, rank: int) -> dict:
    """The JSON's entry: error of network and SVD inside and outside the answer's box, of test
    images that have one."""
    dataset, rows = loaders.test.dataset, loaders.test.sampler.rows.tolist()
    inside = tokens_in_boxes(dataset, rows)
    kept = torch.tensor([bool(mask.any() and not mask.all()) for mask in inside])
    groups = dataset.rows["group"].take(rows).to_pylist()
    groups = [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]
    left_out = len(rows) - len(groups)
    if not groups:
        return box_report({}, torch.empty(0), groups, rank, left_out)
    errors = {}
    for name in ("network", "svd"):
        parts, first = [], 0
        for batch in loaders.test.with_progress(f"box, {name}"):
            masks = torch.stack(inside[first : first + len(batch.rows)])
            parts.append(part_errors(batch.x, *methods[name](batch, rank), masks))
            first += len(batch.rows)
        errors[name] = {key: torch.cat([part[key] for part in parts])[kept] for key in PARTS}
    masks = [mask for mask, keep in zip(inside, kept.tolist(), strict=True) if keep]
    return box_report(errors, torch.cat(masks), groups, rank, left_out)


@torch.inference_mode()
def rank_per_image(
    model: LowRankFactorModel, loaders: Loaders, rank: int, args: argparse.Namespace
) -> tuple[dict, dict]:
    """Ranks up to `rank` for each test image, as --target_error or --mean_rank asks.

    Returns: the JSON's entry, and for the figure method → arrays of `against_fixed_rank`. A target
    is met by the measured error of each method; a budget is split by σ of X, alike for both. The
    network's errors are of factors rounded as factorize.py stores them, the SVD's are the optimum.
    """
    dataset, rows = loaders.test.dataset, loaders.test.sampler.rows
    sigma = dataset.singular_values[rows]
    network = []
    for batch in loaders.test.with_progress("error over rank"):
        stored = store(*nested_factors(model, batch.x, rank, batch.grid), STORED_AS)
        curve = error_curve(batch.x, *restore(stored)).cpu()
        # an image of few tokens has no more components than its own limit
        network.append(torch.cat([curve, curve[:, -1:].expand(-1, rank + 1 - curve.shape[1])], -1))
    curves = {"network": torch.cat(network), "svd": optimum_curve(sigma, rank)}
    if args.target_error is None:
        entry = {"mode": "mean_rank", "mean_rank": args.mean_rank}
        ranks = dict.fromkeys(curves, split_ranks(sigma, args.mean_rank, most=rank))
    else:
        entry = {"mode": "target_error", "target_error": args.target_error}
        # the SVD first: where even the optimum is out of reach, no network is to blame
        ranks = {"svd": first_rank_within(curves["svd"], args.target_error)}
        ranks["network"] = first_rank_as_stored(curves["network"], args.target_error)
    entry["network_stored_as"] = STORED_AS
    tokens = torch.tensor([math.prod(dataset.grids[row]) for row in rows.tolist()])
    arrays = {}
    for name, curve in curves.items():
        entry[name], arrays[name] = against_fixed_rank(
            curve, ranks[name], tokens, model.input_dim, args.target_error
        )
    return entry, arrays | {"target_error": args.target_error}


def print_table(results: dict) -> None:
    names = list(next(iter(results["ranks"].values())))
    print(
        f"mean rel_error, and mean excess over the optimum in per cent, {results['split']} images"
    )
    rows = [["rank", *names]]
    for rank, methods in results["ranks"].items():
        means = [[methods[n][key]["mean"] for key in ("rel_error", "excess_pct")] for n in names]
        rows.append([rank, *(f"{error:.5f} {percent_text(excess):>11}" for error, excess in means)])
    print_columns(rows)


def print_both_norms(results: dict) -> None:
    """Network and SVD in the Frobenius norm and in the head's, side by side."""
    task = results["task"]
    closed = any("svd_in_metric" in methods for methods in task["ranks"].values())
    print(
        f"both norms, mean over {results['n_images']} {results['split']} images: rel_error, of "
        f"which no rank-r matrix has less than the SVD, and task error of the head {task['head']}; "
        "below: by how many per cent it is below the SVD's [approximate 95 % interval]"
    )
    names = ["svd", "network"] + ["svd_in_metric"] * closed
    rows = [["rank", "rel_error svd", "network", *(f"task {name}" for name in names)]]
    rows[0] += [f"{name} below" for name in names[1:]]
    for rank, methods in task["ranks"].items():
        plain = results["ranks"][rank]
        cells = [rank, *(f"{plain[name]['rel_error']['mean']:.5f}" for name in names[:2])]
        cells += [f"{methods[name]['mean']:.5f}" for name in names]
        rows.append(cells + [gain_text(methods[name]["gain_pct"]) for name in names[1:]])
    print_columns(rows)


def print_box(box: dict) -> None:
    if not box["n_images"]:
        print("no test image has a box that covers some of its tokens: no error inside and outside")
        return
    print(
        f"error at the tokens of the answer's box ({box['tokens_inside_pct']:.1f} % of them) and "
        f"at the others, rank {box['rank']}, {box['n_images']} test images of {box['n_groups']} "
        f"groups, {box['n_left_out']} left out without such a box"
    )
    words = "inside − outside"
    if box["svd"]["inside_minus_outside"]["interval_95"]:
        words += ", approximate 95 % interval"
    print(f"{'':14}{'inside':>10}{'outside':>10}    {words}")
    for name in ("network", "svd"):
        inside, outside = (box[name][part]["mean"] for part in PARTS)
        apart = difference_text(box[name]["inside_minus_outside"])
        print(f"{name:14}{inside:>10.5f}{outside:>10.5f}    {apart}")
    apart = [f"{part} {difference_text(box['network_minus_svd'][part])}" for part in PARTS]
    print(f"{'network − svd':14}{', '.join(apart)}")


def difference_text(difference: dict) -> str:
    interval = difference["interval_95"]
    bounds = "" if interval is None else f" [{interval[0]:+.2g}, {interval[1]:+.2g}]"
    return f"{difference['mean']:+.2g}{bounds}"


def print_budget(budget: dict) -> None:
    mode = budget["mode"]
    stored = f"that stores as much (network as stored in {budget['network_stored_as']})"
    print(f"ranks per image, --{mode} {budget[mode]:g}, against one fixed rank {stored}")
    keys = ("mean", "p90", "max", "rms")
    print(f"{'':9}{'ranks':>24}{'values stored':>15}" + "".join(f"{key:>11}" for key in keys))
    for name in ("network", "svd"):
        own, fixed = budget[name], budget[name]["fixed"]
        ranks = "{mean:.1f} ({min} to {max})".format(**own["ranks"])
        for label, entry in ((ranks, own), (f"{fixed['rank']} for all", fixed)):
            cells = "".join(f"{entry['rel_error'][key]:>11.5f}" for key in keys)
            print(f"{name:9}{label:>24}{entry['stored_values']:>15,}{cells}")
        gains = [own["gain_pct"][key] for key in keys]
        cells = "".join(f"{'-' if g is None else f'{-g:+.1f} %':>11}" for g in gains)
        print(f"{'':9}{'error against that':>24}{'':15}{cells}")
        if mode == "target_error":
            within = fixed["images_within_target"]
            print(f"{'':9}rank {fixed['rank']} for all meets the target for {within} images only")
        for key, words in (("fixed_for_mean", "on average"), ("fixed_for_all", "for every image")):
            if key in own:
                less = own[key]["stored_less_pct"]
                print(
                    f"{'':9}one rank that meets it {words}: {own[key]['rank']}; ranks per image "
                    f"store {abs(less):.1f} % {'less' if less >= 0 else 'more'}"
                )


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
