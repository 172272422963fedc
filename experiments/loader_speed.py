"""Measure what a DataLoader reads: images/s of coded folders beside the memory-mapped bf16 cache.

    python -m experiments.loader_speed --coded factors/exact factors/transform

Reads every image of each, shuffled, in batches, and prints medians. All of them take turns, every
second round in the opposite order, so that a slower spell of the machine meets all. Starting the
worker processes and the first round are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.utils.data import DataLoader

from common import arguments
from common.tables import print_columns
from lowrank_tokens import FeatureCache, VisionTokens, progress
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.token_dataset import TokenDataset


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("data")
    arguments.add_cache_dir(group, "feature cache that the coded folders were made from")
    group.add_argument(
        "--coded",
        type=arguments.folder,
        nargs="+",
        default=["factors/exact"],
        metavar="DIR",
        help="folders of factors or coded tokens, as factorize.py writes them",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--workers",
        type=arguments.small_int,
        nargs="+",
        default=[0, 2],
        metavar="N",
        help="worker processes of the loader; 0 reads in the training process itself",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        default=32,
        metavar="N",
        help="images of a batch: coded images of one are decoded together",
    )
    group.add_argument(
        "--repeats",
        type=arguments.positive_int,
        default=5,
        metavar="N",
        help="timed rounds: more give a steadier median",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    lists = FeatureCache(args.cache_dir).ragged
    cache = FeatureCache(args.cache_dir, lists=lists)
    data: dict[str, TokenDataset] = {f"bf16 {args.cache_dir}": cache}
    for folder in args.coded:
        data[folder] = VisionTokens(folder, lists=lists)
        if len(data[folder]) != len(cache):
            raise InputError(f"--coded {folder} has {len(data[folder])} images, not {len(cache)}")
    print(f"{cache.label}; batch {args.batch_size}, {torch.get_num_threads()} thread(s) a process")
    loaders = {
        (name, workers): DataLoader(
            own,
            args.batch_size,
            shuffle=True,
            num_workers=workers,
            collate_fn=list if lists else None,  # else a batch is one tensor [b, T, D]
            persistent_workers=workers > 0,
        )
        for workers in args.workers
        for name, own in data.items()
    }
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    for number in progress.over(range(args.repeats + 1), "loaders", "rounds"):
        for key in reversed(loaders) if number % 2 else loaders:
            start = time.perf_counter()
            images = sum(len(batch) for batch in loaders[key])
            if number:
                rates[key].append(images / (time.perf_counter() - start))
    rows = [["tokens", "workers", "images/s", "least", "most", "share of bf16"]]
    for (name, workers), own in rates.items():
        share = statistics.median(own) / statistics.median(rates[next(iter(data)), workers])
        values = (statistics.median(own), min(own), max(own))
        rows.append([name, str(workers), *(f"{rate:.1f}" for rate in values), f"{share:.3f}"])
    print_columns(rows)


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
