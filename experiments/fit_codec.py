"""Fit the codec: what all images of an encoder share, from training images alone.

    python -m experiments.fit_codec   # writes codecs/<encoder>.safetensors
    python factorize.py --exact --codec codecs/demo-dinov2-vits14.safetensors --target_error 0.16

Two passes over the training images, one batch in memory at a time.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import arguments
from heads.metric import cache_hashes, load_metric
from lowrank_tokens import progress
from lowrank_tokens.codec import Codec
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, batches_of_one_grid, most_frequent
from qwenvl_dataloader import RealQwenVLDataset
from training.unseen import all_seen, images_of

GOLDEN = 0.6180339887


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("data")
    arguments.add_cache_dir(group)
    group.add_argument(
        "--metric",
        type=arguments.file,
        metavar="FILE",
        help="metric of experiments.estimate_metric: the codec then keeps a head's output instead "
        "of the tokens themselves",
    )
    group.add_argument(
        "--images",
        type=arguments.positive_int,
        metavar="N",
        help="training images to fit on, spread over all of them; default all. Fewer images are "
        "read faster and code in more bytes",
    )
    group = parser.add_argument_group("output and device")
    group.add_argument(
        "--out",
        type=arguments.file,
        metavar="FILE",
        help="codec file to write; default codecs/<encoder>.safetensors, with the head's name "
        "where there is a metric",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace another codec in --out; bytes that were written with it cannot be read then",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        default=8,
        metavar="N",
        help="images in memory at once",
    )
    arguments.add_device(group)
    return parser


def main(args: argparse.Namespace) -> None:
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    metric = load_metric(args.metric, dataset) if args.metric else None
    path = Path(args.out or default_path(dataset, metric.head if metric else None))
    if path.is_dir() or any(p.is_file() for p in path.parents):
        raise InputError(f"--out {path} cannot be a file there: name another")
    rows = spread(dataset.split.train, args.images).tolist()
    grids = [dataset.grids[row] for row in rows]
    grid = most_frequent(grids)  # of its tables, which any other reads
    several = f"{len(set(grids))} grids, tables of " if len(set(grids)) > 1 else ""
    print(f"{dataset.label}; {len(rows)} training images of {several}{grid[0]} x {grid[1]}")

    def batches() -> Iterator[tuple[Tensor, Grid]]:
        parts = list(batches_of_one_grid(rows, dataset.grids, args.batch_size))
        for part in progress.over(parts, "training images", "batches"):
            yield dataset[part].to(device), dataset.grids[part[0]]

    seen = images_of(dataset, torch.tensor(rows))
    if metric:
        seen = all_seen(seen, metric.info.get("seen"))
    info = {
        "data": dataset.label,
        "encoder": dataset.manifest["encoder"],
        "cache": cache_hashes(dataset),
        "metric_sha256": metric.sha256 if metric else None,
        "head": metric.head if metric else None,
    } | ({"groups": seen["group"]} if seen else {})
    start = time.perf_counter()
    codec = Codec.fit(
        batches,
        grid=grid,
        metric=metric.matrix if metric else None,
        info=info,
        image_hashes=seen["image_sha256"] if seen else (),
    )
    try:
        codec.save(path, args.overwrite)
    except InputError as error:
        raise InputError(f"--out {error}, or type --overwrite") from None
    print(
        f"wrote {path}: {codec.nbytes / 1e6:.1f} MB, {codec.num_directions} directions, "
        f"{time.perf_counter() - start:.0f} s; identity {codec.identity}"
    )
    again = arguments.flags_again(args, "cache_dir", "device")
    print(f"next: python factorize.py --exact --codec {path} --target_error 0.16{again}")


def default_path(dataset: RealQwenVLDataset, head: str | None) -> Path:
    """Return codecs/<encoder>[-<head>].safetensors."""
    encoder = dataset.manifest["encoder"].get("id") or dataset.manifest["kind"]
    name = re.sub(r"[^\w.-]+", "-", encoder.rstrip("/").rpartition("/")[2])
    return Path("codecs") / f"{name}{f'-{head}' if head else ''}.safetensors"


def spread(rows: Tensor, images: int | None) -> Tensor:
    """Return so many of the rows, or all: one from each of N stretches, at another place in each.

    A photograph's crops lie side by side, in one order.
    """
    if images is None or images >= len(rows):
        return rows
    i = torch.arange(images, dtype=torch.float64)
    return rows[((i + i * GOLDEN % 1) * len(rows) / images).long()]


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
