"""Draw what a trained network and the truncated SVD keep and lose of one image.

    python visualize_svd_nn.py --arch ResMLP   # the first test image
    python visualize_svd_nn.py --arch ResMLP --rank 32 --image_idx 0   # row 0

Writes into results/<arch>/: image_<i>_spatial_channel_comparison.png,
image_<i>_spatial_error_comparison.png, image_<i>_rank_comparison.png (of more than one row of
tokens) and image_<i>_comparison_results.json; i is a row of the cache, in whichever part of the
split.
"""

from __future__ import annotations

import argparse

import torch
from PIL.Image import Image
from torch import Tensor

from common import arguments
from figures import token_grid
from heads.metric import load_metric, metric_svd, network_in_metric
from lowrank_tokens.errors import image_metrics, rel_error, token_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sole_writer, write_json
from lowrank_tokens.grids import Box, Grid, box_in_view
from lowrank_tokens.linalg import exact_singular_values, normalise
from model import LowRankFactorModel
from svd_baseline import principal_coordinates, truncated_svd
from training.checkpoint import Trained, evaluated_rank, open_trained, rows_seen

RANKS_SHOWN = (8, 32, 128)  # of rank_comparison, as far as the model goes
CHANNELS = 8  # the first ones, the same in every image; and those of most and of least error


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    what = parser.flags("what is drawn")
    what("--arch")
    what("--rank")
    what("--image_idx", arguments.whole)("row of the cache; default the first test image")
    arguments.add_evaluation_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    trained = open_trained(args)
    with sole_writer(trained.folder, "--results_dir"):
        visualise(args, trained)


def visualise(args: argparse.Namespace, trained: Trained) -> None:
    """All figures and numbers of one image, into the model's folder."""
    folder, device, dataset, model, state = trained
    row = int(dataset.split.test[0]) if args.image_idx is None else args.image_idx
    if row >= len(dataset):
        raise InputError(
            f"--image_idx {row}: the cache has {len(dataset)}, type 0 to {len(dataset) - 1}"
        )
    metric = load_metric(args.metric, dataset).to(device) if args.metric else None

    x, grid = normalise(dataset[[row]].to(device))[0], dataset.grids[row]  # [1, T, D]
    rank = model.rank_at(x, evaluated_rank(model, args.rank))
    sigma = exact_singular_values(x)  # its own alone: those of a ragged cache may not be known yet
    with torch.inference_mode():
        factors = {"network": model(x, rank, grid=grid), "svd": truncated_svd(x, rank)}
        if metric:
            in_metric = network_in_metric(model, metric)
            factors["network_in_metric"] = in_metric(x, rank, grid=grid)
            factors["svd_in_metric"] = metric_svd(x, rank, metric)
    metrics = {
        name: {key: number_or_none(value) for key, value in image_metrics(x, *ab, sigma).items()}
        for name, ab in factors.items()
    }
    record, part = dataset.image_record(row), dataset.split.part_of(row)
    seen = rows_seen(state, dataset, torch.tensor([row]))
    seen = None if seen is None else bool(seen)
    # of another cache's split: what the network has seen may lie in its test part
    side = part + (", overlap unknown" if seen is None else "")
    side += ", an image the network has seen" if seen and part == "test" else ""
    box = box_in_view(record, dataset.manifest["resize"])
    arch, excess = state["config"]["arch"], metrics["network"]["excess_pct"]
    error = metrics["network"]["rel_error"]
    source = f"seed {state['args']['seed']}"
    source += f"; question: {record['question']}" if record["question"] else ""
    source += f"; {record['path']}" if record.get("path") else ""
    info = {
        "title": f"Image {row} ({side}) at rank {rank}: {arch} keeps {100 * (1 - error**2):.3f} % "
        "of the energy" + ("" if excess is None else f", {excess:.3f} % above the SVD's error"),
        "footer": f"{dataset.label}; rank {rank}, {source}",
    }
    maps = {"original": x[0]} | {name: (a @ b)[0] for name, (a, b) in factors.items()}
    channels = shown_channels(maps["original"], maps["network"])
    maps = {name: tokens[:, list(channels)].cpu() for name, tokens in maps.items()}
    errors = {name: token_error(x, *ab)[0].cpu() for name, ab in factors.items()}
    photo = dataset.thumbnail(row)
    stem = folder / f"image_{row}"
    written = [f"{stem}_spatial_channel_comparison.png", f"{stem}_spatial_error_comparison.png"]
    token_grid.channel_comparison(written[0], photo, box, maps, channels, grid, info)
    token_grid.spatial_error(written[1], photo, box, errors, grid, info)
    if min(grid) > 1:
        where = f"Image {row} ({side}), {arch}"
        written.append(f"{stem}_rank_comparison.png")
        colours = "colours: three principal components of X as red, green and blue"
        footer = f"{dataset.label}; {colours}; {source}"
        draw_ranks(written[-1], model, rank, x, photo, box, grid, where, footer)
    results = {
        "arch": arch,
        "image_idx": row,
        "split": part,
        "seen_in_training": seen,  # null: overlap unknown
        "rank": rank,
        "requested_rank": args.rank or rank,
        "data": dataset.label,
        "question": record["question"],
        "answers": record["answers"],
        "channels": list(channels),
        **metrics,
    }
    write_json(f"{stem}_comparison_results.json", results)
    print(f"{dataset.label}\n{info['title']}")
    print(f"wrote {', '.join(written)} and {stem}_comparison_results.json: look at {written[-1]}")
    again = arguments.flags_again(args, "results_dir")
    print(f"next, for a page of all results: python -m experiments.make_report{again}")


def shown_channels(x: Tensor, x_hat: Tensor) -> dict[int, str]:
    """The first CHANNELS of x [T, D], then those of the largest and of the smallest relative error
    of x_hat: number → that error, in words."""
    error = torch.linalg.vector_norm(x_hat - x, dim=0)
    error = error / torch.linalg.vector_norm(x, dim=0).clamp_min(torch.finfo(x.dtype).tiny)
    first = range(min(CHANNELS, x.shape[1]))
    ends = {int(error.argmax()): "largest", int(error.argmin()): "smallest"}
    words = {channel: f"error {error[channel]:.3g}" for channel in [*first, *ends]}
    return words | {channel: f"{words[channel]}\nthe {name}" for channel, name in ends.items()}


@torch.inference_mode()
def draw_ranks(
    path: str,
    model: LowRankFactorModel,
    most: int,
    x: Tensor,
    photo: Image | None,
    box: Box | None,
    grid: Grid,
    where: str,
    footer: str,
) -> None:
    """Figure of what network and SVD keep of x [1, T, D] at rising ranks, up to `most`."""
    ranks = sorted({r for r in RANKS_SHOWN if r < most} | {min(most, RANKS_SHOWN[-1])})
    factors = {
        "network": [model(x, r, grid=grid) for r in ranks],
        "svd": [truncated_svd(x, r) for r in ranks],
    }
    # below the three components that every rank keeps, the first three that each rank has lost
    blocks = [range(3)] + [range(r, r + 3) for r in ranks[:-1] if r + 3 <= min(x.shape[1:])]
    hats = [(a @ b)[0] for a, b in factors["network"]]
    original, *coordinates = principal_coordinates(x[0], hats, blocks[-1][-1] + 1)
    errors = {n: [float(rel_error(x, *ab)) for ab in pairs] for n, pairs in factors.items()}
    maps = {"original": [original], "network": coordinates}
    energy = [f"{100 * (1 - e**2):.2f} %" for e in errors["network"]]
    energy = [f"{e} at rank {r}" for e, r in zip(energy, ranks, strict=True)]
    energy[0] = energy[0].replace(" at", " of the energy at")
    info = {"title": f"{where} keeps {', '.join(energy)}", "footer": footer}
    token_grid.rank_comparison(path, photo, box, maps, errors, ranks, blocks, grid, info)


def number_or_none(value: Tensor) -> float | None:
    return None if value.isnan().any() else float(value)


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
