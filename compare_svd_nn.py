"""Compare a trained network with the truncated SVD and other references on held-out images.

    python compare_svd_nn.py --arch ResMLP          # at every rank it has
    python compare_svd_nn.py --rank 64              # figures at 64
    python compare_svd_nn.py --head saliency        # also by a head's output
    python compare_svd_nn.py --target_error 0.06    # also a rank for each image

Writes results/<arch>/svd_nn_comparison.json, svd_nn_comparison.png and rank_sweep.png; with
--target_error also rank_per_image.png. Every method sees the same normalised X of the same test
images and is judged by the same whole-matrix error. Below it stand what readers with labels see
(boxes, matching) and, of a network that was trained for a head or with --head, the error of the
head's output, beside the SVD in the task's metric where that is at hand.

Legend: n images, T tokens, D features, r rank.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from common import arguments
from common.results import keep_other_caches_results
from common.tables import print_columns
from figures import comparison
from heads.load_head import HEADS, load_head
from heads.metric import TaskMetric, load_metric, network_in_metric
from heads.readers import fit_readers
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
from lowrank_tokens.linalg import denormalise
from model import LowRankFactorModel
from qwenvl_dataloader import Batch, BatchLoader, Loaders, create_data_loaders_real
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
from training.checkpoint import Trained, evaluated_rank, open_trained
from training.rank_budget import (
    against_fixed_rank,
    error_curve,
    first_rank_as_stored,
    first_rank_within,
    nested_factors,
    optimum_curve,
)
from training.unseen import Judged, fitted_images, unseen_test

if TYPE_CHECKING:
    from heads.task_head import TaskHead
    from training.trained_norm import TaskFactorModel

STORED_AS = "bf16"  # factorize.py's default: its ranks for a target are those that are reported
READ = ("svd", "svd_in_metric", "network")  # methods that heads and readers with labels judge
LABEL_RANKS = (8, 16, 32)  # at which readers with labels judge: from there on little is lost
FIGURES = ["svd_nn_comparison.png", "rank_sweep.png", "rank_per_image.png"]


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--arch", type=arguments.name, default="ResMLP", help="architecture of the network"
    )
    ranks = group.add_mutually_exclusive_group()
    ranks.add_argument(
        "--rank",
        type=arguments.positive_int,
        metavar="R",
        help="largest rank that is compared, and that of the figures (default: the trained one)",
    )
    ranks.add_argument(
        "--target_error",
        type=arguments.fraction,
        metavar="X",
        help="also take each image at the least rank with this rel_error",
    )
    group.add_argument(
        "--head",
        choices=HEADS,
        help="also judge by the output of this head (default: the one that the network was "
        "trained for, if any); a pass of the head for each rank and method",
    )
    arguments.add_head_model(group)
    arguments.add_batch_size(group)
    arguments.add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    arguments.check_head_model(args.head_model, args.head)
    trained = open_trained(args)
    with sole_writer(trained.folder, "--results_dir"):
        compare(args, trained)


def compare(args: argparse.Namespace, trained: Trained) -> None:
    """Write all numbers and figures of the trained model into its folder."""
    model = trained.model
    rank = evaluated_rank(model, args.rank)
    ranks = report_ranks(rank)

    # test images that neither network nor metric has seen
    head = chosen_head(args, trained)
    metric = chosen_metric(args, trained, head)
    judged = unseen_images(args, trained, metric)
    loaders = judged.loaders
    rows = loaders.test.sampler.rows.tolist()
    groups = trained.dataset.rows["group"].take(rows).to_pylist()
    footer = footer_of(trained, rank, len(rows), judged.words)
    print(footer)

    # every method at every rank
    methods = comparison_methods(args, model, metric, loaders)
    measured = measure(methods, head, loaders.test.with_progress("every method"), ranks)
    results = origin(trained, rank, args.rank or rank, rows, groups, judged.left_out)
    results["ranks"] = summaries(measured.errors)
    results["network_excess_pct_95"] = {
        str(r): interval_95(measured.errors[r]["network"]["excess_pct"], groups) for r in ranks
    }
    results["task"] = None
    print_table(results)

    # by the head, by readers with labels, and at a rank for each image
    if head:
        results["task"] = task_report(measured.task_errors, head, metric, groups)
        if model.norm:  # None: begun at the plain norm
            results["task"]["network_metric_sha256"] = model.norm["metric_sha256"]
        print_task(results)
    results["readers"] = read_labels(methods, loaders, ranks, groups)
    print_readers(results["readers"])
    budget_arrays = None
    if args.target_error is not None:
        entry, budget_arrays = rank_per_image(model, loaders, rank, args.target_error)
        results["rank_per_image"] = entry
        print_rank_per_image(entry)

    # files
    folder = trained.folder
    path = folder / "svd_nn_comparison.json"
    keep_other_caches_results(path, FIGURES, trained.dataset.content_sha256)
    write_json(path, with_content_hash(results))
    draw(folder, results, measured, budget_arrays, footer)
    print(f"wrote {path} and figures: look at {folder}/rank_sweep.png")
    excess = measured.errors[rank]["network"]["excess_pct"].nan_to_num(nan=-1.0)
    print_next(args, results["arch"], rows[int(excess.argmax())])


def footer_of(trained: Trained, rank: int, images: int, left_out: str) -> str:
    """Name data, images, network and rank, for the first line and the figures."""
    config, seed = trained.state["config"], trained.state["args"]["seed"]
    footer = f"{trained.dataset.label}; {images} test images, {config['arch']}, rank {rank}, "
    return f"{footer}seed {seed}" + (f"; {left_out}" if left_out else "")


def origin(
    trained: Trained,
    rank: int,
    requested_rank: int,
    rows: list[int],
    groups: list[str],
    left_out: dict[str, int | None],
) -> dict:
    """Return the JSON's entries that say which network was measured on which images."""
    dataset, model = trained.dataset, trained.model
    return {
        "arch": trained.state["config"]["arch"],
        "factors": model.config.factors,
        "trained_for": model.norm["head"] if model.norm else None,
        "rank": rank,
        "requested_rank": requested_rank,
        "split": "test",
        "n_images": len(rows),
        "n_groups": len(set(groups)),
        "n_seen_left_out": left_out,  # null: overlap unknown
        "data": dataset.label,
        "cache_sha256": dataset.content_sha256,
        "num_tokens": dataset.mean_tokens(rows),
        "feature_dim": dataset.feature_dim,
    }


def print_next(args: argparse.Namespace, arch: str, row: int) -> None:
    """Print the command that draws the test image with the largest excess, a row of the cache."""
    again = arguments.flags_again(args, "rank", "metric", "results_dir", "cache_dir", "device")
    again = f"--arch {arch} --image_idx {row}{again}"
    print(f"next, the test image with the largest excess: python visualize_svd_nn.py {again}")


# ---------------------------------------------------------------------------------------- methods


def chosen_head(args: argparse.Namespace, trained: Trained) -> TaskHead | None:
    """Return the head of --head, else the one that the network was trained for, if at hand."""
    _, device, dataset, model, state = trained
    if args.head:
        return load_head(args.head, dataset, device=device, model=args.head_model)
    if model.norm is None:
        return None
    return head_of_norm(model.norm, dataset, device, state["args"].get("head_model"))


def chosen_metric(
    args: argparse.Namespace, trained: Trained, head: TaskHead | None
) -> TaskMetric | None:
    """Return the metric of --metric, else the head's own where its file is at hand."""
    if args.metric:
        return load_metric(args.metric, trained.dataset).to(trained.device)
    metric = metric_at_hand(head, trained.dataset) if head else None
    return metric.to(trained.device) if metric else None


def unseen_images(args: argparse.Namespace, trained: Trained, metric: TaskMetric | None) -> Judged:
    """Return loaders without the test images that something was fitted to.

    That is network and metric, and PCA and the readers' probe, which are fitted on this cache.
    """
    fitted = {"network": trained.state["images"], "references": fitted_images(trained.dataset)}
    if metric:
        fitted["metric"] = metric.info.get("seen")
    loaders = create_data_loaders_real(trained.dataset, args.batch_size, device=trained.device)
    return unseen_test(loaders, fitted)


def comparison_methods(
    args: argparse.Namespace,
    model: LowRankFactorModel,
    metric: TaskMetric | None,
    loaders: Loaders,
) -> dict[str, Factorise]:
    """Return the network and what it is held against, each a function of (batch, rank)."""
    axes = fit_pca(batch.x for batch in loaders.train.with_progress("PCA"))
    methods: dict[str, Factorise] = {
        "network": network_at_ranks(model),
        "svd": cut_at_ranks(lambda batch, r: truncated_svd(batch.x, r)),
        "randomized_svd": lambda batch, r: randomized_svd(batch.x, r),
        "pca": lambda batch, r: pca(batch.x, r, axes),
    }
    if model.config.factors == "projected":
        # as many columns and steps as the network has at every rank: only the sketch differs
        methods["random_sketch"] = lambda batch, r: random_sketch(
            batch.x, r, model.config.refine_steps, min(model.sketch_columns(r), *batch.x.shape[-2:])
        )
    if metric:
        methods["svd_in_metric"] = closed_form(metric)
    if args.metric:
        mapped = network_in_metric(model, metric)
        methods["network_in_metric"] = lambda batch, r: mapped(batch.x, r, grid=batch.grid)
        if mapped is model:
            methods["network_in_metric"] = methods["network"]
            print("note: the network has a norm for this head: network_in_metric is network")
    return methods


def network_at_ranks(model: LowRankFactorModel | TaskFactorModel) -> Factorise:
    """Return the network as a method; its norm of a batch is computed once for all ranks."""
    if model.norm is None:
        return lambda batch, r: model(batch.x, r, grid=batch.grid)
    in_norm = once_a_batch(lambda batch: model.in_norm(batch.x, batch.grid))
    return lambda batch, r: model.factors_of(batch.x, *in_norm(batch), r, batch.grid)


# --------------------------------------------------------------------------------------- measures


class Measured(NamedTuple):
    """Errors of every method at every rank, one number an image, on the CPU."""

    errors: dict[int, dict[str, dict[str, Tensor]]]  # rank → method → `image_metrics`, [n] each
    task_errors: dict[int, dict[str, Tensor]]  # rank → method → error of the head's output [n]


@torch.inference_mode()
def measure(
    methods: dict[str, Factorise],
    head: TaskHead | None,
    batches: Iterable[Batch],
    ranks: list[int],
) -> Measured:
    """Measure all methods at all ranks in one pass over the images.

    The head judges the methods of READ: one pass of it for each of them and each rank.
    """
    errors = {r: {name: [] for name in methods} for r in ranks}
    task = {r: {name: [] for name in READ if name in methods and head} for r in ranks}
    for batch in batches:
        full = head.of_full(batch) if head else None
        for name, factorise in methods.items():
            for r in ranks:
                a, b = factorise(batch, r)
                found = image_metrics(batch.x, a, b, batch.singular_values)
                errors[r][name].append({key: values.cpu() for key, values in found.items()})
                if name in task[r]:
                    error = head.error(head.of_batch(batch, a @ b), full)
                    task[r][name].append(error.cpu())
    joined = {
        r: {
            name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            for name, parts in of_rank.items()
        }
        for r, of_rank in errors.items()
    }
    of_head = {r: {n: torch.cat(parts) for n, parts in of.items()} for r, of in task.items()}
    return Measured(joined, of_head)


def summaries(errors: dict[int, dict[str, dict[str, Tensor]]]) -> dict[str, dict]:
    """Return the JSON's entry: rank → method → measure → mean and 90th percentile."""
    return {
        str(r): {
            name: {key: summarise(values) for key, values in measures.items()}
            for name, measures in of_rank.items()
        }
        for r, of_rank in errors.items()
    }


@torch.inference_mode()
def decoded(factorise: Factorise, test: BatchLoader, rank: int) -> Iterator[Tensor]:
    """Yield the raw tokens [T, D] that a method leaves of each test image."""
    for batch in test:
        a, b = factorise(batch, rank)
        yield from denormalise(a @ b, batch.mean, batch.std).cpu()


def read_labels(
    methods: dict[str, Factorise], loaders: Loaders, ranks: list[int], groups: list[str]
) -> dict:
    """Return what readers with labels see of full tokens and of each method at each rank.

    {"ranks": rank → method → reader → {"mean", "interval_95"}, "full": reader → …, "chance",
    "notes"}. The probe of the boxes is fitted on full tokens of training images.
    """
    split = loaders.test.dataset.split
    rows = loaders.test.sampler.rows.tolist()
    dataset = loaders.test.dataset
    readers = fit_readers(dataset, split.train.tolist(), split.val.tolist(), rows)

    def scores(tokens: Iterable[Tensor]) -> dict[str, dict]:
        return {
            name: {"mean": float(values.nanmean()), "interval_95": interval_95(values, groups)}
            for name, values in readers.scores(tokens).items()
            if not values.isnan().all()
        }

    return {
        "full": scores(dataset[[row]][0].float() for row in rows),
        "chance": readers.chance(),
        "notes": readers.notes(),
        "ranks": {
            str(r): {n: scores(decoded(methods[n], loaders.test, r)) for n in READ if n in methods}
            for r in [r for r in ranks if r in LABEL_RANKS] or ranks[-1:]
        },
    }


@torch.inference_mode()
def rank_per_image(
    model: LowRankFactorModel, loaders: Loaders, rank: int, target_error: float
) -> tuple[dict, dict]:
    """Take each test image at its least rank, up to `rank`, within the target.

    Returns: the JSON's entry, and for the figure method → arrays of `against_fixed_rank`. The
    network's errors are of factors rounded as factorize.py stores them, the SVD's are the optimum.
    """
    dataset, rows = loaders.test.dataset, loaders.test.sampler.rows
    network = []
    for batch in loaders.test.with_progress("error over rank"):
        stored = store(*nested_factors(model, batch.x, rank, batch.grid), STORED_AS)
        curve = error_curve(batch.x, *restore(stored)).cpu()
        # an image of few tokens has no more components than its own limit
        network.append(torch.cat([curve, curve[:, -1:].expand(-1, rank + 1 - curve.shape[1])], -1))
    curves = {"network": torch.cat(network)}
    curves["svd"] = optimum_curve(dataset.singular_values[rows], rank)
    # the SVD first: where even the optimum is out of reach, no network is to blame
    ranks = {"svd": first_rank_within(curves["svd"], target_error)}
    ranks["network"] = first_rank_as_stored(curves["network"], target_error)
    entry = {"target_error": target_error, "network_stored_as": STORED_AS}
    tokens = torch.tensor([math.prod(dataset.grids[row]) for row in rows.tolist()])
    arrays = {}
    for name, curve in curves.items():
        entry[name], arrays[name] = against_fixed_rank(
            curve, ranks[name], tokens, model.config.input_dim, target_error
        )
    return entry, arrays | {"target_error": target_error}


# ---------------------------------------------------------------------------------------- results


def draw(
    folder: Path, results: dict, measured: Measured, budget_arrays: dict | None, footer: str
) -> None:
    """Draw the figures of the comparison."""
    rank, task = results["rank"], results["task"]
    comparison.comparison(
        folder / "svd_nn_comparison.png",
        measured.errors[rank],
        rank,
        footer,
        measured.task_errors[rank],
    )
    path = folder / "rank_sweep.png"
    if task:
        comparison.both_norms(path, results["ranks"], task, footer)
    else:
        sizes = results["num_tokens"], results["feature_dim"]
        comparison.rank_sweep(path, results["ranks"], *sizes, footer)
    if budget_arrays:
        comparison.rank_per_image(folder / "rank_per_image.png", budget_arrays, footer)


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


def print_task(results: dict) -> None:
    """Print network and SVD in the Frobenius norm and by the head, side by side."""
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


def print_readers(readers: dict) -> None:
    """Print what readers with labels see, a line for each method and reader."""
    names = list(readers["full"])
    if names:
        print(
            "what readers with labels see: boxes (average precision, overlap), matching, retrieval"
        )
    rows = [["reader, method", *(f"rank {rank}" for rank in readers["ranks"]), "full tokens"]]
    for reader in names:
        for method in next(iter(readers["ranks"].values())):
            means = [of[method].get(reader, {}).get("mean") for of in readers["ranks"].values()]
            means.append(readers["full"][reader]["mean"])
            cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
            rows.append([f"{reader}, {method}", *cells])
    if names:
        print_columns(rows)
    for line in readers["notes"]:
        print(f"  {line}")


def print_rank_per_image(budget: dict) -> None:
    stored = f"that stores as much (network as stored in {budget['network_stored_as']})"
    target = budget["target_error"]
    print(f"ranks per image, --target_error {target:g}, against one fixed rank {stored}")
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
