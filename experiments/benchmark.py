"""Measure what each factorisation costs and how near it comes to the SVD, networks and references.

    python -m experiments.benchmark          # 5 ranks, batch 8, one CPU thread
    python -m experiments.benchmark --ranks 128 --batch_size 8 256 --device cuda
    python -m experiments.benchmark --tokens 256 529 1369 4096   # time against T

Writes results/benchmark.json and benchmark.png (error above the optimum against time). All methods
form A and B of the same matrices at the same rank, in one run: every repeat times each method once,
in turn, so that a slower spell of the machine meets all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from common import arguments
from common.tables import print_columns
from experiments import benchmark_tokens
from experiments.contenders import Contender, contenders_in_metric, references, trained_networks
from experiments.timing import Timing, matmul_rates, matrix_products, time_in_turn
from figures import error_against_time
from heads.metric import load_metric
from lowrank_tokens import progress
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import write_json
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset, create_data_loaders_real, of_one_grid
from svd_baseline import evaluate


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    what = parser.flags("what is measured")
    what.switch("--quality", "only the error, on all test images (neither flag: both)")
    what.switch("--speed", "only the time (neither flag: both)")
    what("--ranks", arguments.count, [8, 16, 32, 64, 128], "ranks of A·B")
    what("--tokens", arguments.Number(int, 16, 65536), [])(
        "instead: time against the number of tokens, at these squares (see benchmark_tokens.py)"
    )
    matrices = "matrices of a timed call; several are measured in turn"
    what("--batch_size", default=[8], dest="batch_sizes", help=matrices)
    what("--threads")
    what("--repeats")
    arguments.add_evaluation_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.tokens:
        return benchmark_tokens.main(args)
    device = arguments.pick_device(args.device)
    torch.set_num_threads(args.threads)
    results_dir = Path(args.results_dir)
    neither = not (args.quality or args.speed)
    quality, speed = args.quality or neither, args.speed or neither
    dataset = RealQwenVLDataset(args.cache_dir)
    ranks = checked_ranks(args, min(dataset.num_tokens, dataset.feature_dim))
    networks = trained_networks(results_dir, device, dataset)
    in_metric_too = []
    if args.metric:
        in_metric_too = contenders_in_metric(networks, load_metric(args.metric, dataset), device)
    batches = sorted(set(args.batch_sizes))
    loaders = of_one_grid(create_data_loaders_real(dataset, batches[0], device=device))
    environment = describe(args, device, dataset, loaders.test.num_images)
    footer = f"{dataset.label}; {environment['device']}, {args.threads} CPU thread(s), torch "
    footer += f"{torch.__version__}; error: {loaders.test.num_images} test images"
    print(footer)

    contenders = networks + references(networks, loaders, ranks, device) + in_metric_too
    errors = measure_quality(contenders, ranks, loaders.test) if quality else {}
    rates = [matmul_rates(device)]
    times = measure_speed(contenders, ranks, batches, loaders.test, args.repeats) if speed else {}
    rates.append(matmul_rates(device))  # before and after: a busy spell must not lower the peak
    environment["matmul_multiply_adds_per_s"] = {n: max(r[n] for r in rates) for n in rates[0]}
    records = [
        record(contender, r, b, environment, errors.get((i, r)), times.get((i, r, b)))
        for b in (batches if speed else [None])
        for r in ranks
        for i, contender in enumerate(contenders)
        if r <= contender.max_rank
    ]
    print_table(records)
    write_json(results_dir / "benchmark.json", {"environment": environment, "records": records})
    written = f"{results_dir}/benchmark.json"
    if quality and speed:
        timed = f"time: median of {args.repeats} calls on one batch of them, all methods in turn"
        error_against_time.pareto(results_dir / "benchmark.png", records, f"{footer}; {timed}")
        written += f" and benchmark.png: look at {results_dir}/benchmark.png"
    else:
        print("note: benchmark.png is not drawn, it needs both --quality and --speed")
    print(HOW_TO_READ)
    print(f"wrote {written}")


HOW_TO_READ = """how to read it: of the methods at one rank and batch, take the fastest whose excess
you accept. ms is per matrix, [iqr] the interquartile range of the repeats; excess is rel_error over
the optimum, mean and 90th percentile of the test images (the SVD's is rounding). floor: the share
of the time that the method's own matrix products would take at the rate of a large one; what it
does beside them (Choleskys, triangular solves, eigenproblems) is not counted."""


def checked_ranks(args: argparse.Namespace, limit: int) -> list[int]:
    """The ranks in order; those too large for the cache are refused, or left out if a default."""
    ranks = sorted(set(args.ranks))
    if "ranks" not in args.typed:
        ranks = [r for r in ranks if r <= limit] or [limit]
    if ranks[-1] > limit:
        raise InputError(
            f"--ranks {ranks[-1]} is out of range: type 1 to {limit}, the smaller of T and D"
        )
    return ranks


def describe(
    args: argparse.Namespace, device: torch.device, dataset: RealQwenVLDataset, test_images: int
) -> dict:
    """What the numbers of this run depend on, for the JSON."""
    return arguments.environment(device) | {
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device_type": device.type,
        "dtype": "float32",  # of X, A and B; the records' own says in what a method computes
        "data": dataset.label,
        "num_tokens": dataset.num_tokens,
        "feature_dim": dataset.feature_dim,
        "test_images": test_images,
        "repeats": args.repeats,
    }


# ------------------------------------------------------------------------------------- measures


def measure_quality(
    contenders: list[Contender], ranks: list[int], test: BatchLoader
) -> dict[tuple[int, int], dict[str, float | None]]:
    """(contender, rank) → mean and p90 of the excess over the test images, per cent."""
    pairs = [(i, r) for r in ranks for i, c in enumerate(contenders) if r <= c.max_rank]
    return {
        (i, r): summarise(
            evaluate(lambda x, i=i, r=r: contenders[i].factorise(x, r), test)["excess_pct"]
        )
        for i, r in progress.over(pairs, "quality", "methods and ranks")
    }


def measure_speed(
    contenders: list[Contender],
    ranks: list[int],
    batches: list[int],
    test: BatchLoader,
    repeats: int,
) -> dict[tuple[int, int, int], tuple[Timing, dict[str, int]]]:
    """(contender, rank, batch) → times, and multiply-adds of a call's matrix products by data type,
    on the first `batch` test images, repeated if fewer."""
    found = {}
    rows = test.sampler.rows
    for batch in batches:
        taken = rows[torch.arange(batch) % len(rows)]
        if batch > len(rows):
            print(f"note: the batch of {batch} repeats the {len(rows)} test images")
        try:
            x = normalise(test.dataset[taken].to(test.device))[0]
            for r in progress.over(ranks, f"speed, batch {batch}", "ranks"):
                active = [i for i, c in enumerate(contenders) if r <= c.max_rank]
                calls = [lambda i=i, x=x, r=r: contenders[i].factorise(x, r) for i in active]
                timings = time_in_turn(calls, repeats, test.device)
                counts = map(matrix_products, calls)
                found |= {(i, r, batch): tc for i, *tc in zip(active, timings, counts, strict=True)}
        except torch.cuda.OutOfMemoryError:
            raise InputError(
                f"CUDA is out of memory: --batch_size {batch} is too large, type "
                f"--batch_size {max(1, batch // 2)}"
            ) from None
    return found


# -------------------------------------------------------------------------------------- results


def record(
    contender: Contender,
    rank: int,
    batch: int | None,
    environment: dict,
    error: dict[str, float | None] | None,
    timed: tuple[Timing, dict[str, int]] | None,
) -> dict[str, str | int | float | None]:
    """One entry of benchmark.json; null where it was not measured or does not apply."""
    ms = floor_ms = iqr = peak_mb = None
    if timed:
        (seconds, peak_mb), counts = timed
        low, ms, high = np.percentile(seconds, [25, 50, 75]) * 1e3 / batch
        ms, iqr = float(ms), float(high - low)
        rates = environment["matmul_multiply_adds_per_s"]
        floor_ms = sum(1e3 * n / rates[dtype] for dtype, n in counts.items()) / batch or None
    return {
        "method": contender.method,
        "arch": contender.arch,
        "sketch": contender.sketch,
        "K": contender.steps,
        "p": contender.columns(rank) - rank if contender.columns else None,
        "rank": rank,
        "device": environment["device_type"],
        "threads": environment["threads"],
        "dtype": contender.dtype,
        "batch": batch,
        "ms_median": ms,
        "ms_iqr": iqr,
        "matrices_per_s": 1e3 / ms if ms else None,
        "peak_mb": peak_mb,
        "excess_mean": error["mean"] if error else None,
        "excess_p90": error["p90"] if error else None,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / ms if floor_ms else None,
    }


def print_table(records: list[dict]) -> None:
    """All records, of each batch and rank the fastest first."""
    header = "batch|rank|method|arch|K|p|ms|[iqr]|matrices/s|excess mean %|p90 %|floor|peak MB"
    forms = {"batch": "d", "rank": "d", "method": "", "arch": "", "K": "d", "p": "d"}
    forms |= {"ms_median": ".3f", "ms_iqr": ".3f", "matrices_per_s": ".1f", "excess_mean": ".5f"}
    forms |= {"excess_p90": ".5f", "floor_fraction": ".0%", "peak_mb": ".0f"}
    rows = [header.split("|")]
    for r in sorted(records, key=lambda r: (r["batch"] or 0, -r["rank"], r["ms_median"] or 0)):
        rows.append(
            ["-" if r[key] is None else format(r[key], form) for key, form in forms.items()]
        )
    print_columns(rows)


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
