"""Fit the codec of factors: what all images of an encoder share, from training images alone.

    python -m experiments.fit_codec   # writes codecs/demo.safetensors
    python factorize.py --exact --codec codecs/demo.safetensors --step 1.3

Two passes over the training images, one batch in memory at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import arguments
from heads.metric import cache_hashes, load_metric
from lowrank_tokens import progress
from lowrank_tokens.codec import fit
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, batches_of_one_grid, most_frequent
from qwenvl_dataloader import RealQwenVLDataset

GOLDEN = 0.6180339887


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    codec = parser.flags("codec")
    codec("--cache_dir")
    codec("--metric", help="of experiments.estimate_metric: code X M^½")
    codec("--out", arguments.file)(
        "file; default codecs/<cache's kind>.safetensors, with the head's name where there is a "
        "metric"
    )
    codec("--images")(
        "so many training images, spread over all of them; default all: what more bring is in "
        "docs/task_and_bytes.md"
    )
    codec("--batch_size")
    codec("--device")
    return parser


def main(args: argparse.Namespace) -> None:
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    metric = load_metric(args.metric, dataset) if args.metric else None
    head = f"-{metric.head}" if metric else ""
    path = Path(args.out or f"codecs/{dataset.manifest['kind']}{head}.safetensors")
    if path.is_dir() or any(p.is_file() for p in path.parents):
        raise InputError(f"--out {path} cannot be a file there: name another")
    rows = dataset.split.train
    if args.images and args.images < len(rows):
        # one from each of N stretches of the split, at another place in each: a photograph's
        # crops lie side by side, in one order
        i = torch.arange(args.images, dtype=torch.float64)
        rows = rows[((i + i * GOLDEN % 1) * len(rows) / args.images).long()]
    rows = rows.tolist()
    grids = [dataset.grids[row] for row in rows]
    grid = most_frequent(grids)  # of its tables, which any other reads
    several = f"{len(set(grids))} grids, tables of " if len(set(grids)) > 1 else ""
    print(f"{dataset.label}; {len(rows)} training images of {several}{grid[0]} x {grid[1]}")

    passes = iter(("directions", "variances"))

    def batches() -> Iterator[tuple[Tensor, Grid]]:
        parts = list(batches_of_one_grid(rows, dataset.grids, args.batch_size))
        for part in progress.over(parts, next(passes), "batches"):
            yield dataset[part].to(device), dataset.grids[part[0]]

    info = {
        "data": dataset.label,
        "encoder": dataset.manifest["encoder"],
        "cache": cache_hashes(dataset),
        "metric_sha256": metric.sha256 if metric else None,
        "head": metric.head if metric else None,
    }
    start = time.perf_counter()
    codec = fit(batches, grid, metric.matrix if metric else None, info)
    codec.save(path)
    print(
        f"wrote {path}: {codec.nbytes / 1e6:.1f} MB, {codec.num_directions} directions, "
        f"{time.perf_counter() - start:.0f} s; sha256 {codec.sha256}"
    )
    again = arguments.flags_again(args, "cache_dir", "device")
    print(f"next: python factorize.py --exact --codec {path} --target_error 0.16{again}")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
