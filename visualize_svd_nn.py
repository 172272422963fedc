"""Draw what a trained network and the truncated SVD keep and lose of one image.

    python visualize_svd_nn.py --arch ResMLP --image_idx 0

Writes into results/<arch>/: image_<i>_spatial_channel_comparison.png,
image_<i>_spatial_error_comparison.png and image_<i>_comparison_results.json; i is a row of the
cache, in whichever part of the split.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import cli
import grid_plots
from checkpoint import evaluated_rank, open_trained
from cli import UserError
from files import write_json
from qwenvl_dataloader import box_in_view, normalise
from svd_baseline import image_metrics, token_error, truncated_svd

CHANNELS = 8  # the first ones: the same in every image, so that figures can be compared


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Draw what network and SVD keep of one image on the grid of its tokens.",
        epilog="example:\n  python visualize_svd_nn.py --arch ResMLP --rank 32 --image_idx 0",
    )
    parser.add_argument("--arch", type=cli.name, default="ResMLP",
                        help="architecture whose best model is drawn")  # fmt: skip
    parser.add_argument("--rank", type=cli.number(int, 1), default=None,
                        help="rank to draw; default the trained (effective) rank")  # fmt: skip
    parser.add_argument("--image_idx", type=cli.number(int, 0), default=0, help="row of the cache")
    cli.add_evaluation_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    folder, device, dataset, model, state = open_trained(args)
    row = args.image_idx
    if row >= len(dataset):
        raise UserError(
            f"--image_idx {row}: the cache has {len(dataset)}, type 0 to {len(dataset) - 1}"
        )
    rank = evaluated_rank(model, args.rank)

    x = normalise(dataset[[row]].to(device))[0]  # [1, T, D]
    sigma = dataset.singular_values[[row]].to(device)
    with torch.inference_mode():
        factors = {"network": model(x, rank), "svd": truncated_svd(x, rank)}
    metrics = {
        name: {key: number_or_none(value) for key, value in image_metrics(x, *ab, sigma).items()}
        for name, ab in factors.items()
    }
    record, part = dataset.image_record(row), dataset.split.part_of(row)
    box = box_in_view(record, dataset.manifest["resize"])
    arch, excess = state["config"]["arch"], metrics["network"]["excess_pct"]
    error = metrics["network"]["rel_error"]
    info = {
        "title": f"Image {row} ({part}) at rank {rank}: {arch} keeps {100 * (1 - error**2):.3f} % "
        "of the energy" + ("" if excess is None else f", {excess:.3f} % above the SVD's error"),
        "footer": f"{dataset.label}; rank {rank}, seed {state['args']['seed']}"
        + (f"; question: {record['question']}" if record["question"] else "")
        + (f"; {record['path']}" if record.get("path") else ""),
    }
    channels = list(range(min(CHANNELS, dataset.feature_dim)))
    maps = {"original": x[0]} | {name: (a @ b)[0] for name, (a, b) in factors.items()}
    maps = {name: tokens[:, channels].cpu() for name, tokens in maps.items()}
    errors = {name: token_error(x, *ab)[0].cpu() for name, ab in factors.items()}
    photo = dataset.thumbnail(row)
    stem = folder / f"image_{row}"
    grid_plots.channel_comparison(f"{stem}_spatial_channel_comparison.png", photo, box, maps,
                                  channels, dataset.grid, info)  # fmt: skip
    grid_plots.spatial_error(f"{stem}_spatial_error_comparison.png", photo, box, errors,
                             dataset.grid, info)  # fmt: skip
    results = {
        "arch": arch,
        "image_idx": row,
        "split": part,
        "rank": rank,
        "requested_rank": args.rank or rank,
        "data": dataset.label,
        "question": record["question"],
        "answers": record["answers"],
        "channels": channels,
        **metrics,
    }
    write_json(f"{stem}_comparison_results.json", results)
    print(f"{dataset.label}\n{info['title']}")
    print(f"wrote {stem}_spatial_channel_comparison.png, {stem}_spatial_error_comparison.png and "
          f"{stem}_comparison_results.json")  # fmt: skip


def number_or_none(value: Tensor) -> float | None:
    return None if value.isnan().any() else float(value)


if __name__ == "__main__":
    cli.run(main, get_args_parser())
