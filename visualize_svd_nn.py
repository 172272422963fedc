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
from common.results import keep_other_caches_results
from figures import token_grid
from heads.metric import TaskMetric, load_metric, metric_svd, network_in_metric
from lowrank_tokens.errors import image_metrics, rel_error, token_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sole_writer, write_json
from lowrank_tokens.grids import Box, Grid, box_in_view
from lowrank_tokens.linalg import Factors, exact_singular_values, normalise
from model import LowRankFactorModel
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import principal_coordinates, truncated_svd
from training.checkpoint import Trained, evaluated_rank, open_trained
from training.unseen import rows_seen

RANKS_SHOWN = (8, 32, 128)  # of rank_comparison, as far as the model goes
CHANNELS = 8  # the first ones, the same in every image


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what is drawn")
    group.add_argument(
        "--arch", type=arguments.name, default="ResMLP", help="architecture of the network"
    )
    group.add_argument(
        "--rank",
        type=arguments.positive_int,
        metavar="R",
        help="rank of A·B (default: the trained one)",
    )
    group.add_argument(
        "--image_idx",
        type=arguments.non_negative_int,
        metavar="ROW",
        help="row of the cache (default: the first test image)",
    )
    arguments.add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    trained = open_trained(args)
    with sole_writer(trained.folder, "--results_dir"):
        visualise(args, trained)


def visualise(args: argparse.Namespace, trained: Trained) -> None:
    """Write all figures and numbers of one image into the model's folder."""
    folder, device, dataset, model, state = trained
    row = chosen_row(args.image_idx, dataset)
    metric = load_metric(args.metric, dataset).to(device) if args.metric else None
    record, grid = dataset.image_record(row), dataset.grids[row]

    # factors of every method, and their errors
    x = normalise(dataset[[row]].to(device))[0]  # [1, T, D]
    rank = model.rank_at(x, evaluated_rank(model, args.rank))
    factors = factors_of_image(model, x, rank, grid, metric)
    sigma = exact_singular_values(x)  # its own alone: those of a ragged cache may not be known yet
    errors = {
        name: {key: number_or_none(value) for key, value in image_metrics(x, *ab, sigma).items()}
        for name, ab in factors.items()
    }

    # figures
    part = dataset.split.part_of(row)
    seen = bool(rows_seen(state["images"], dataset, torch.tensor([row])))
    info = texts(trained, row, rank, side_of(part, seen), record, errors)
    photo, box = dataset.thumbnail(row), box_in_view(record, dataset.manifest["resize"])
    path = folder / f"image_{row}_comparison_results.json"
    keep_other_caches_results(path, [f"image_{row}_*.png"], dataset.content_sha256)
    stem = folder / f"image_{row}"
    written = [f"{stem}_spatial_channel_comparison.png", f"{stem}_spatial_error_comparison.png"]
    channels = list(range(min(CHANNELS, x.shape[-1])))
    maps = {"original": x[0, :, channels].cpu()}
    maps |= {name: (a @ b)[0][:, channels].cpu() for name, (a, b) in factors.items()}
    token_grid.channel_comparison(written[0], photo, box, maps, channels, grid, info)
    of_tokens = {name: token_error(x, *ab)[0].cpu() for name, ab in factors.items()}
    token_grid.spatial_error(written[1], photo, box, of_tokens, grid, info)
    if min(grid) > 1:
        written.append(f"{stem}_rank_comparison.png")
        draw_ranks(written[-1], model, rank, x, photo, box, grid, info)

    # numbers
    results = {
        "arch": state["config"]["arch"],
        "image_idx": row,
        "split": part,
        "seen_in_training": seen,
        "rank": rank,
        "requested_rank": args.rank or rank,
        "data": dataset.label,
        "cache_sha256": dataset.content_sha256,
        "question": record["question"],
        "answers": record["answers"],
        "channels": channels,
        **errors,
    }
    write_json(path, results)
    print(f"{dataset.label}\n{info['title']}; {info['footer'].rpartition('; ')[2]}")
    print(f"wrote {', '.join(written)} and {path}: look at {written[-1]}")
    again = arguments.flags_again(args, "results_dir")
    print(f"next, for a page of all results: python -m experiments.report{again}")


def chosen_row(image_idx: int | None, dataset: RealQwenVLDataset) -> int:
    """Return the row of --image_idx, by default that of the first test image."""
    row = int(dataset.split.test[0]) if image_idx is None else image_idx
    if row >= len(dataset):
        raise InputError(
            f"--image_idx {row}: the cache has {len(dataset)}, type 0 to {len(dataset) - 1}"
        )
    return row


def texts(
    trained: Trained, row: int, rank: int, side: str, record: dict, errors: dict[str, dict]
) -> dict[str, str]:
    """Return title and footer of the figures. The footer ends with every method's rel_error."""
    arch, seed = trained.state["config"]["arch"], trained.state["args"]["seed"]
    footer = f"{trained.dataset.label}; rank {rank}, seed {seed}"
    footer += f"; question: {record['question']}" if record["question"] else ""
    footer += f"; {record['path']}" if record.get("path") else ""
    footer += "; rel_error: " + ", ".join(f"{n} {e['rel_error']:.4g}" for n, e in errors.items())
    return {"title": f"Image {row} ({side}), {arch}, rank {rank}", "footer": footer}


@torch.inference_mode()
def factors_of_image(
    model: LowRankFactorModel, x: Tensor, rank: int, grid: Grid, metric: TaskMetric | None
) -> dict[str, Factors]:
    """Return A and B of x [1, T, D] by network and SVD, and by both in a metric if there is one."""
    factors = {"network": model(x, rank, grid=grid), "svd": truncated_svd(x, rank)}
    if metric:
        factors["network_in_metric"] = network_in_metric(model, metric)(x, rank, grid=grid)
        factors["svd_in_metric"] = metric_svd(x, rank, metric)
    return factors


def side_of(part: str, seen: bool) -> str:
    """Return the part of the split in words. Another cache's test part may have been seen."""
    return f"{part}, an image the network has seen" if seen and part == "test" else part


@torch.inference_mode()
def draw_ranks(
    path: str,
    model: LowRankFactorModel,
    most: int,
    x: Tensor,
    photo: Image | None,
    box: Box | None,
    grid: Grid,
    info: dict[str, str],
) -> None:
    """Draw what network and SVD keep of x [1, T, D] at rising ranks, up to `most`."""
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
    colours = "colours: three principal components of X as red, green and blue"
    info = info | {"footer": f"{info['footer']}; {colours}"}
    token_grid.rank_comparison(path, photo, box, maps, errors, ranks, blocks, grid, info)


def number_or_none(value: Tensor) -> float | None:
    """Return a scalar as JSON can hold it."""
    return None if value.isnan().any() else float(value)


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
