"""Measure time, memory and error of every factorisation: methods × ranks × numbers of tokens.

    python -m experiments.benchmark    # five ranks, one CPU thread
    python -m experiments.benchmark --ranks 128 --batch_size 256 --device cuda
    python -m experiments.benchmark --ranks 32 --tokens 256 1024 --batch_size 1

Writes results/benchmark.json and benchmark.png. All methods factor the same matrices at the same
rank and are timed in turn, so that a slower spell of the machine meets all of them. On CUDA the
speed and memory of training and of the vision tower are printed too.

Legend: b matrices in a batch, T tokens, D features, r rank, K refinement steps, p extra columns.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import arguments
from common.results import keep_other_caches_results
from common.tables import print_columns
from encoders.towers import load_encoder
from figures.benchmark import error_against_time
from lowrank_tokens import progress
from lowrank_tokens.errors import excess_pct, optimum, rel_error, summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import write_json
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import Factors, exact_factors, exact_singular_values, normalise
from model import ARCHITECTURES, LowRankFactorModel, columns_for, get_model_by_name
from qwenvl_dataloader import (
    BatchLoader,
    Loaders,
    RealQwenVLDataset,
    create_data_loaders_real,
    of_one_grid,
)
from svd_baseline import fit_pca, pca, random_sketch, randomized_svd, truncated_svd
from training.checkpoint import load_model
from training.unseen import fitted_images, unseen_test

STEPS, OVERSAMPLE = 1, 32  # K and p of random_sketch where no trained network sets them
SVD_LOWRANK_STEPS, SVD_LOWRANK_EXTRA = 2, 10  # as svd_baseline.randomized_svd calls it
SVD_UP_TO = 2048  # tokens; its time grows as T², and one call would take minutes beyond


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--ranks",
        type=arguments.positive_int,
        nargs="+",
        default=[8, 16, 32, 64, 128],
        metavar="R",
        help="ranks of A·B",
    )
    group.add_argument(
        "--tokens",
        type=arguments.Number(int, 16, 65536),
        nargs="+",
        metavar="T",
        help="tokens of a matrix, square numbers: squares of that many tokens are cut from test "
        "images, or tiled of several where one is too small (default: the images as they are)",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        default=8,
        metavar="N",
        help="matrices that one timed call factors: more use a GPU better, and more memory",
    )
    group.add_argument(
        "--threads",
        type=arguments.Number(int, 1, 1024),
        default=1,
        metavar="N",
        help="CPU threads",
    )
    group.add_argument(
        "--repeats",
        type=arguments.positive_int,
        default=5,
        metavar="N",
        help="timed calls of each method: more give a steadier median",
    )
    group.add_argument(
        "--quality", action="store_true", help="measure the error only, and time nothing"
    )
    arguments.add_data_arguments(parser, metric=False)
    return parser


# ---------------------------------------------------------------------------------------- methods


class Method(NamedTuple):
    """One factorisation with its settings."""

    name: str
    factorise: Callable[[Tensor, int, Grid], Factors]  # x [b, T, D] → A [b, T, r], B [b, r, D]
    dtype: str = "float32"  # the widest type of its linear algebra
    max_rank: int | None = None  # of a network; the others reach min(T, D)
    arch: str | None = None
    sketch: str | None = None
    steps: int | None = None  # K
    columns: Callable[[int], int] | None = None  # rank → columns of the sketch

    def reaches(self, x: Tensor, rank: int) -> bool:
        """Tell whether it factors x [b, T, D] at this rank within reasonable time."""
        slow = self.name == "svd" and x.shape[-2] > SVD_UP_TO
        return not slow and rank <= min(self.max_rank or rank, *x.shape[-2:])


def network_methods(
    results_dir: Path, loaders: Loaders, ranks: list[int]
) -> tuple[list[Method], Loaders]:
    """Return the trained networks of `results_dir`; without any, one that is not trained.

    Also returns the loaders without the test images that one of the networks, or PCA, has seen.
    """
    dataset, device = loaders.test.dataset, loaders.test.device
    loaders = unseen_test(loaders, {"references": fitted_images(dataset)}).loaders
    paths = [results_dir / arch / "best_model.pt" for arch in ARCHITECTURES]
    methods = []
    for path in filter(Path.exists, paths):
        model, state = load_model(path, device, dataset)
        judged = unseen_test(loaders, {"network": state["images"]})
        loaders = judged.loaders
        if judged.words:
            print(f"note: {path}: {judged.words}")
        methods.append(network_method(model, "trained"))
    if methods:
        return methods, loaders
    print(f"note: no trained network in {results_dir}, an untrained ResMLP stands in for it")
    torch.manual_seed(0)
    limit = min(dataset.num_tokens, dataset.feature_dim)
    model = get_model_by_name(
        "ResMLP",
        input_dim=dataset.feature_dim,
        num_tokens=dataset.num_tokens,
        rank=min(max(ranks), limit),
        grid=dataset.grid,
    )
    return [network_method(model.to(device).eval(), "untrained")], loaders


def network_method(model: LowRankFactorModel, sketch: str) -> Method:
    """Return `model` as a method; columns are not ordered, which costs time and no error."""
    projected = model.config.factors == "projected"
    return Method(
        "network",
        lambda x, r, grid: model(x, r, ordered=False, grid=grid),
        "float64" if projected else "float32",
        model.current_effective_rank(),
        model.config.arch,
        sketch if projected else None,
        model.config.refine_steps if projected else None,
        model.sketch_columns if projected else None,
    )


def reference_methods(networks: list[Method], train: BatchLoader) -> list[Method]:
    """Return the methods that networks are held against.

    random_sketch has the columns and steps of the first projected network: only the sketch differs.
    """
    sketched = next((n for n in networks if n.columns), None)
    steps = sketched.steps if sketched else STEPS

    def columns(rank: int) -> int:
        if sketched and rank <= sketched.max_rank:
            return sketched.columns(rank)
        return columns_for(rank, OVERSAMPLE, rank + OVERSAMPLE)

    axes = fit_pca(batch.x for batch in train.with_progress("PCA"))
    methods = [
        Method(
            "random_sketch",
            lambda x, r, grid: random_sketch(x, r, steps, min(columns(r), *x.shape[-2:])),
            "float64",
            sketch="random",
            steps=steps,
            columns=columns,
        ),
        Method(
            "svd_lowrank",
            lambda x, r, grid: randomized_svd(x, r),
            sketch="random",
            steps=SVD_LOWRANK_STEPS,
            columns=lambda r: r + SVD_LOWRANK_EXTRA,
        ),
        Method("gram_eigh_f32", lambda x, r, grid: exact_factors(x, r, torch.float32)),
        Method("gram_eigh_f64", lambda x, r, grid: exact_factors(x, r), "float64"),
        Method("svd", lambda x, r, grid: truncated_svd(x, r)),
        Method("pca", lambda x, r, grid: pca(x, r, axes)),
    ]
    if train.device.type == "cuda":  # cuSOLVER's batched driver
        methods.append(Method("svd_gesvda", lambda x, r, grid: truncated_svd(x, r, "gesvda")))
    return methods


# --------------------------------------------------------------------------------------- matrices


class Matrices(NamedTuple):
    """Normalised tokens of one size: the images of the test split, or squares made from them."""

    x: Tensor  # [n, T, D] float32
    grid: Grid


def test_matrices(test: BatchLoader, tokens: int | None, count: int) -> Matrices:
    """Return the test images as they are, or `count` squares of `tokens` tokens of them.

    A square larger than an image is tiled from left to right with images of the split in turn.
    """
    dataset, rows = test.dataset, test.sampler.rows.tolist()
    if tokens is None:
        return Matrices(normalise(dataset[rows])[0], dataset.grid)
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(
            f"--tokens {tokens} is no square number: type {side**2} or {(side + 1) ** 2}"
        )
    height, width = dataset.grid
    down, across = -(-side // height), -(-side // width)
    squares = []
    for first in range(count):
        tiles = [rows[(first + i) % len(rows)] for i in range(down * across)]
        grids = dataset[tiles].float().view(down, across, height, width, -1)
        whole = grids.permute(0, 2, 1, 3, 4).reshape(down * height, across * width, -1)
        squares.append(whole[:side, :side].flatten(0, 1))  # [T, D]
    return Matrices(normalise(torch.stack(squares))[0], (side, side))


# --------------------------------------------------------------------------------------- measures


@torch.inference_mode()
def measure_error(
    method: Method, matrices: Matrices, best: Tensor, rank: int, device: torch.device
) -> dict[str, float | None]:
    """Return mean and p90 of the excess over the optimum `best` [n] in per cent."""
    excess = []
    for x, least in zip(matrices.x.split(8), best.split(8), strict=True):
        x = x.to(device)
        error = rel_error(x, *method.factorise(x, rank, matrices.grid))
        excess.append(excess_pct(error.cpu(), least))
    return summarise(torch.cat(excess))


@torch.inference_mode()
def measure_times(
    calls: list[Callable[[], object]], repeats: int, threads: int
) -> list[list[float]]:
    """Return the seconds of each call, `repeats` of them; all calls take turns.

    `Timer` warms up, waits for the device and sets the number of threads.
    """
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in calls]
    rounds = [[timer.timeit(1).mean for timer in timers] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def peak_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the CUDA memory that a call takes, in 2^20 bytes; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@torch.inference_mode()
def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of the matrix products that a call makes."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def product_rate(device: torch.device, threads: int) -> float:
    """Return the operations per second of one large float32 matrix product on this device."""
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device)
    (seconds,) = measure_times([lambda: x @ x], 5, threads)
    return 2 * size**3 / min(seconds)


def measure(
    methods: list[Method],
    matrices: Matrices,
    rank: int,
    args: argparse.Namespace,
    environment: dict,
) -> list[dict]:
    """Return one record of benchmark.json for each method that reaches the rank."""
    device = torch.device(environment["device_name"])
    active = [method for method in methods if method.reaches(matrices.x, rank)]
    best = optimum(exact_singular_values(matrices.x), rank)
    errors = [measure_error(m, matrices, best, rank, device) for m in active]
    seconds, peaks, floors = ([None] * len(active) for _ in range(3))
    if not args.quality:
        chosen = torch.arange(args.batch_size) % len(matrices.x)
        x = matrices.x[chosen].to(device)
        calls = [partial(method.factorise, x, rank, matrices.grid) for method in active]
        seconds = measure_times(calls, args.repeats, args.threads)
        with torch.inference_mode():
            peaks = [peak_mb(call, device) for call in calls]
        rate = environment["product_flops_per_s"]
        floors = [1e3 * count_flops(call) / rate / args.batch_size or None for call in calls]
    records = []
    for method, error, times, peak, floor in zip(
        active, errors, seconds, peaks, floors, strict=True
    ):
        ms = spread = None
        if times:
            ms = 1e3 * statistics.median(times) / args.batch_size
            spread = 1e3 * float(np.subtract(*np.percentile(times, [75, 25]))) / args.batch_size
        columns = min(method.columns(rank), *matrices.x.shape[1:]) if method.columns else None
        records.append(
            {
                "method": method.name,
                "arch": method.arch,
                "sketch": method.sketch,
                "K": method.steps,
                "p": columns - rank if columns is not None else None,
                "rank": rank,
                "tokens": matrices.x.shape[1],
                "device": device.type,
                "threads": args.threads,
                "dtype": method.dtype,
                "batch": args.batch_size,
                "ms_median": ms,
                "ms_iqr": spread,
                "matrices_per_s": 1e3 / ms if ms else None,
                "peak_mb": peak,
                "excess_mean": error["mean"],
                "excess_p90": error["p90"],
                "floor_ms": floor,
                "floor_fraction": floor / ms if floor and ms else None,
            }
        )
    return records


# --------------------------------------------------------------------- training and tower, on CUDA


def training_speed(x: Tensor, rank: int, device: torch.device, threads: int) -> str:
    """Return the images/s and memory of training steps of a ResMLP on the batch x [b, T, D]."""
    model = get_model_by_name("ResMLP", input_dim=x.shape[2], num_tokens=x.shape[1], rank=rank)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sigma, x = exact_singular_values(x).to(device), x.to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss_terms(x, sigma).reconstruction.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    timer = Timer("step()", globals={"step": step}, num_threads=threads)
    return _speed(f"training, ResMLP, rank {rank}", len(x), timer, peak_mb(step, device))


def tower_speed(dataset: RealQwenVLDataset, batch: int, device: torch.device, threads: int) -> str:
    """Return the images/s and memory of the cache's encoder on a batch of thumbnails."""
    name = dataset.manifest["encoder"]["id"]
    try:
        encoder = load_encoder(name, device=device, image_size=dataset.manifest["image_size"])
    except InputError as error:
        return f"note: the tower is not timed: {error}"
    image = dataset.thumbnail(0)
    if image is None:
        return "note: the tower is not timed: the cache has no photographs"
    pixels = encoder.preprocess(image)
    pixels = pixels.expand(batch, *pixels.shape).contiguous()
    call = partial(encoder.encode, pixels)
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return _speed(f"tower {name}, {encoder.dtype}", batch, timer, peak_mb(call, device))


def _speed(what: str, images: int, timer: Timer, peak: float | None) -> str:
    """Return one line of images per second."""
    rate = images / timer.blocked_autorange(min_run_time=1.0).median
    memory = "" if peak is None else f", peak {peak:.0f} MiB beside what is held"
    return f"{what}, batch {images}: {rate:.1f} images/s{memory}"


# ---------------------------------------------------------------------------------------- results

HOW_TO_READ = """how to read it: of the methods at one rank and number of tokens, take the fastest
whose excess you accept. ms is per matrix, [iqr] the interquartile range of the calls; excess is
rel_error over the optimum, mean and 90th percentile (the SVD's is rounding). floor: the share of
the time that the method's matrix products alone would take at the rate of a large float32 one."""


def print_table(records: list[dict]) -> None:
    header = "tokens|rank|method|arch|K|p|ms|[iqr]|matrices/s|excess mean %|p90 %|floor|peak MB"
    forms = {"tokens": "d", "rank": "d", "method": "", "arch": "", "K": "d", "p": "d"}
    forms |= {"ms_median": ".3f", "ms_iqr": ".3f", "matrices_per_s": ".1f", "excess_mean": ".5f"}
    forms |= {"excess_p90": ".5f", "floor_fraction": ".0%", "peak_mb": ".0f"}
    rows = [header.split("|")]
    for r in sorted(records, key=lambda r: (r["tokens"], -r["rank"], r["ms_median"] or 0)):
        rows.append(["-" if r[key] is None else f"{r[key]:{form}}" for key, form in forms.items()])
    print_columns(rows)


def checked_ranks(args: argparse.Namespace, limit: int) -> list[int]:
    """Return --ranks in order; a default above `limit` is left out, a typed one is refused."""
    ranks = sorted(set(args.ranks))
    if "ranks" not in args.typed:
        ranks = [r for r in ranks if r <= limit] or [limit]
    if ranks[-1] > limit:
        raise InputError(
            f"--ranks {ranks[-1]} is out of range: type 1 to {limit}, the smaller of T and D"
        )
    return ranks


def main(args: argparse.Namespace) -> None:
    device = arguments.pick_device(args.device)
    results_dir = Path(args.results_dir)
    dataset = RealQwenVLDataset(args.cache_dir)
    limit = min(max([dataset.num_tokens, *(args.tokens or [])]), dataset.feature_dim)
    ranks = checked_ranks(args, limit)
    loaders = of_one_grid(create_data_loaders_real(dataset, args.batch_size, device=device))
    networks, loaders = network_methods(results_dir, loaders, ranks)
    matrices = [
        test_matrices(loaders.test, tokens, args.batch_size)
        for tokens in sorted(set(args.tokens or [])) or [None]
    ]
    methods = networks + reference_methods(networks, loaders.train)
    environment = arguments.environment(device) | {
        "device_name": str(device),
        "threads": args.threads,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "data": dataset.label,
        "feature_dim": dataset.feature_dim,
        "test_images": loaders.test.num_images,
        "tiled": args.tokens is not None,
        "repeats": args.repeats,
        "product_flops_per_s": product_rate(device, args.threads),
    }
    of = f"squares of {loaders.test.num_images} test images" if args.tokens else "test images"
    footer = f"{dataset.label}; {environment['device']}, {args.threads} CPU thread(s), torch "
    footer += f"{torch.__version__}; {of}, batch {args.batch_size}"
    print(footer)

    records = []
    for of_size in matrices:
        tokens = of_size.x.shape[1]
        reached = [r for r in ranks if r <= min(of_size.x.shape[1:])]
        for rank in progress.over(reached, f"{tokens} tokens", "ranks"):
            records += measure(methods, of_size, rank, args, environment)
    print_table(records)
    path = results_dir / "benchmark.json"
    keep_other_caches_results(path, ["benchmark.png"], dataset.content_sha256)
    found = {"cache_sha256": dataset.content_sha256, "environment": environment}
    write_json(path, {**found, "records": records})
    if args.quality:
        print(f"wrote {path} (benchmark.png needs times: omit --quality)")
        return
    print(HOW_TO_READ)
    if device.type == "cuda":
        x = matrices[0].x[torch.arange(args.batch_size) % len(matrices[0].x)]
        print(training_speed(x, min(ranks[-1], limit), device, args.threads))
        print(tower_speed(dataset, args.batch_size, device, args.threads))
    calls = f"median of {args.repeats} calls, all methods in turn"
    figure = path.with_suffix(".png")
    error_against_time(figure, records, f"{footer}; {calls}")
    print(f"wrote {path} and benchmark.png: look at {figure}")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
