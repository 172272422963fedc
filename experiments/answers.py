"""Let a language model answer with compressed tokens, and score its answers.

    python -m experiments.answers --results_dir results_task
    python -m experiments.answers --boxes --images 200
    python -m experiments.answers --coded factors/coded-1 factors/coded-4   # answers against bytes

Writes results/<arch>/answers.json: scores of the full tokens, of network, SVD and (with --metric)
the SVD in the task's metric at each rank, and of coded tokens with their bytes, on the same test
images, with approximate 95 % intervals over groups. The model is loaded once and generates once for
each image, method and rank, and for each image and folder of coded tokens.
Images that are done stand in answers.partial.jsonl: after a cut the same command goes on from it.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch import Tensor

from common import arguments
from common.results import keep_other_caches_results
from common.tables import print_columns
from experiments.partial_results import PartialResults
from heads.load_head import HEADS, load_head
from heads.metric import check_head, load_metric
from heads.task_error import Factorise, closed_form, cut_at_ranks
from heads.task_head import Score, TaskHead
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import CODED, CodedShards, read_factors_manifest
from lowrank_tokens.files import sha256_file, sole_writer, write_json
from lowrank_tokens.linalg import denormalise, exact_factors
from qwenvl_dataloader import Batch, RealQwenVLDataset, create_data_loaders_real
from svd_baseline import interval_95
from training.checkpoint import open_trained
from training.unseen import Seen, unseen_test

FULL = "full_tokens"


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--head", choices=HEADS, default="qwen-answer", help="head that generates answers"
    )
    arguments.add_head_model(group)
    group.add_argument(
        "--boxes",
        action="store_true",
        help="also ask where the answer stands, and score the overlap with the row's box",
    )
    group.add_argument(
        "--arch", type=arguments.name, default="ResMLP", help="architecture of the network"
    )
    group.add_argument(
        "--ranks",
        type=arguments.positive_int,
        nargs="+",
        default=[8, 32],
        metavar="R",
        help="ranks of A·B; each is one more answer for each image and method",
    )
    group.add_argument(
        "--coded",
        type=arguments.folder,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of coded tokens of this cache (factorize.py --codec): their answers and "
        "bytes join the table",
    )
    group.add_argument(
        "--images",
        type=arguments.positive_int,
        metavar="N",
        help="only so many test images, of all groups alike (default: all)",
    )
    arguments.add_batch_size(group)
    arguments.add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    arguments.check_head_model(args.head_model, args.head)
    folder, device, dataset, model, state = open_trained(args)
    head = load_head(args.head, dataset, device=device, model=args.head_model)
    scores = wanted_scores(head, args.boxes)

    # methods, and the test images that none of them was fitted to
    methods: dict[str, Factorise] = {
        "network": lambda batch, r: model(batch.x, r, grid=batch.grid),
        "svd": cut_at_ranks(lambda batch, r: exact_factors(batch.x, r)),
    }
    fitted = {"network": state["images"]}
    if args.metric:
        metric = load_metric(args.metric, dataset).to(device)
        check_head(metric, head)
        methods["svd_in_metric"] = closed_form(metric)
        fitted["metric"] = metric.info.get("seen")
    coded = {str(folder): open_coded(folder, dataset) for folder in args.coded}
    fitted |= seen_by_codecs(coded)
    ranks = sorted(set(args.ranks))
    most = model.current_effective_rank()
    if ranks[-1] > most:
        raise InputError(f"--ranks {ranks[-1]} is above the network's rank: type 1 to {most}")
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    judged = unseen_test(loaders, fitted)
    test = judged.loaders.test
    if args.images:
        test = test.only(spread_over_groups(dataset, test.sampler.rows, args.images))
    rows = test.sampler.rows.tolist()
    footer = f"{dataset.label}; head {head.name}, {len(rows)} test images"
    print(footer + (f"; {judged.words}" if judged.words else ""))

    header = {
        "head": head.sha256,
        "cache_sha256": dataset.content_sha256,
        "network": sha256_file(folder / "best_model.pt"),
        "metric": sha256_file(args.metric) if args.metric else None,
        "ranks": ranks,
        "scores": list(scores),
        "coded": {name: shards.manifest["content_sha256"] for name, shards in coded.items()},
    }
    with sole_writer(folder, "--results_dir"):
        partial = PartialResults(folder / "answers.partial.jsonl", header, anew=True)
        missing = [row for row in rows if ("test", row) not in partial.records]
        if missing:
            for batch in test.only(torch.tensor(missing)).with_progress("answers"):
                partial.add("test", answer(batch, methods, ranks, scores, coded))
        results = {
            "head": head.name,
            "head_sha256": head.sha256,
            "cache_sha256": dataset.content_sha256,
            "split": "test",
            "n_images": len(rows),
            "n_seen_left_out": judged.left_out,  # null: overlap unknown
            "data": dataset.label,
            "bytes": {name: mean_bytes(shards, rows) for name, shards in coded.items()},
            "methods": summarise_scores([partial.records["test", r] for r in rows], dataset, rows),
        }
        path = folder / "answers.json"
        keep_other_caches_results(path, [], dataset.content_sha256)
        write_json(path, results)
        partial.remove()
    print_scores(results["methods"], ranks, results["bytes"])
    print(f"wrote {path}")


def seen_by_codecs(coded: dict[str, CodedShards]) -> dict[str, Seen | None]:
    """Return what each codec of the folders has seen, by the beginning of its file's hash."""
    codecs = [shards.codec for shards in coded.values()]
    return {f"codec {codec.sha256[:8]}": codec.seen for codec in codecs}


def open_coded(folder: str, dataset: RealQwenVLDataset) -> CodedShards:
    """Open a folder of --coded; InputError where it is not of coded tokens of this cache."""
    manifest = read_factors_manifest(folder)
    if manifest["dtype"] != CODED:
        raise InputError(f"--coded {folder} holds no coded tokens: write it with --codec")
    own = sha256_file(dataset.cache_dir / "manifest.json")
    if manifest["cache"]["manifest_sha256"] != own:
        raise InputError(
            f"--coded {folder} was written from another cache than {dataset.cache_dir}: name that "
            "one with --cache_dir"
        )
    return CodedShards(folder, manifest)


def mean_bytes(shards: CodedShards, rows: list[int]) -> float:
    """Return the mean bytes of these rows' coded images."""
    return sum(len(shards.bytes_of(row)) for row in rows) / len(rows)


def wanted_scores(head: TaskHead, boxes: bool) -> dict[str, Score]:
    """Return the scores of the head's answers; InputError for a head that generates none."""
    names = ["vqa_accuracy"] + ["box_overlap"] * boxes
    if not set(names) <= set(head.scores):
        raise InputError(
            f"--head {head.name} generates no answers: type --head qwen-answer; its output's error "
            f"is measured by compare_svd_nn.py --head {head.name}"
        )
    return {name: head.scores[name] for name in names}


def spread_over_groups(dataset: RealQwenVLDataset, rows: Tensor, count: int) -> Tensor:
    """Return the first `count` of the rows, taken from all groups in turn, in their own order."""
    groups = dataset.rows["group"].take(rows.tolist()).to_pylist()
    taken: Counter[str] = Counter()
    turns = []
    for position, group in enumerate(groups):
        turns.append((taken[group], position))
        taken[group] += 1
    return rows[sorted(position for _, position in sorted(turns)[:count])]


@torch.no_grad()
def answer(
    batch: Batch,
    methods: dict[str, Factorise],
    ranks: list[int],
    scores: dict[str, Score],
    coded: dict[str, CodedShards],
) -> dict[int, dict]:
    """Return row → method, "method, rank" or folder → score → value, of one batch's images."""
    tokens = {FULL: denormalise(batch.x, batch.mean, batch.std)}
    for name, factorise in methods.items():
        for rank in ranks:
            a, b = factorise(batch, rank)
            tokens[key(name, rank)] = denormalise(a @ b, batch.mean, batch.std)
    for name, shards in coded.items():
        tokens[name] = torch.stack(shards.tokens_of(batch.rows.tolist())).to(batch.x)
    found: dict[int, dict] = {row: {} for row in batch.rows.tolist()}
    for name, raw in tokens.items():
        values = {score: judge(raw, batch.rows).tolist() for score, judge in scores.items()}
        for i, row in enumerate(found):
            found[row][name] = {score: of_images[i] for score, of_images in values.items()}
    return found


def key(method: str, rank: int) -> str:
    """Return the name of a method at a rank, as JSON has it."""
    return f"{method}, rank {rank}"


def summarise_scores(images: list[dict], dataset: RealQwenVLDataset, rows: list[int]) -> dict:
    """Return method → score → mean, 90th percentile and interval over groups."""
    groups = dataset.rows["group"].take(rows).to_pylist()
    found = {}
    for name, scores in images[0].items():
        found[name] = {}
        for score in scores:
            values = torch.tensor([image[name][score] for image in images], dtype=torch.float64)
            found[name][score] = summarise(values) | {"interval_95": interval_95(values, groups)}
    return found


def print_scores(methods: dict, ranks: list[int], sizes: dict[str, float]) -> None:
    """Print a line for each score and method; `sizes` are the bytes of the coded folders."""
    whole = {FULL, *sizes}
    names = list(dict.fromkeys(name.rpartition(",")[0] for name in methods if name not in whole))
    for score, full in methods[FULL].items():
        print(f"{score}, mean; full tokens {_number(full['mean'])}")
        rows = [["", *(f"rank {rank}" for rank in ranks)]]
        for name in names:
            means = [methods[key(name, rank)][score]["mean"] for rank in ranks]
            rows.append([name, *map(_number, means)])
        print_columns(rows)
        for folder, size in sizes.items():
            print(f"{folder}, {size:.0f} bytes an image: {_number(methods[folder][score]['mean'])}")


def _number(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.4f}"


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
