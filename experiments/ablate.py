"""Measure what learning buys: sketch × shifts × steps × columns, error and time of each.

    python -m experiments.ablate --rank 128   # the whole table, three seeds
    python -m experiments.ablate --rank 32 --refine_steps 0 1   # quicker

Trains each sketch briefly from the same start and data, keeps its best epoch on validation images,
and measures the excess on validation and test images and the time of one matrix, all settings in
turn. What is set against what is chosen on validation images, and what is said of it is measured on
test images. Writes results/ablation_rank<r>.json and .png; started again, it goes on with the first
missing setting.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import arguments
from common.tables import print_columns
from experiments.timing import time_in_turn
from figures import error_against_time
from lowrank_tokens import progress
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import check_same_header, read_json, write_json
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import even_features, exact_factors, normalise
from model import LowRankFactorModel, LowRankProjMLP, LowRankProjSymmetric, pivoted_features
from qwenvl_dataloader import (
    BatchLoader,
    Loaders,
    RealQwenVLDataset,
    create_data_loaders_real,
    of_one_grid,
)
from svd_baseline import evaluate, gain, interval_95, second_moment
from training.state import SHIFT_LR_FACTOR

SAME_TIME = 1.05  # times that differ by less are equal: what repeats of one method scatter by
UNTRAINED = ("random", "columns")
SKETCHES = (*UNTRAINED, "linear", "ResMLP", "MLP")


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    grid = parser.flags("what is compared")
    grid("--rank", default=128, help="of A·B")
    grid("--sketches", SKETCHES, list(SKETCHES), metavar="SKETCH")(
        "random: X Ω; columns: X_s X_sᵀ Ω on evenly spaced features; linear: the same on chosen "
        "features, Ω trained; ResMLP; MLP"
    )
    steps = [0, 1, 2, 3, 4]
    grid(
        "--refine_steps", arguments.whole, steps, "K, each with start shifts and with learned ones"
    )
    grid("--oversample", arguments.whole, [0, 16, 32], "p, extra sketch columns")
    grid("--seeds", arguments.count, 3, "runs of each, with seeds 0, 1, …")
    train = parser.flags("training and timing")
    train("--epochs", arguments.count, 2, "epochs of each sketch")
    train("--lr", arguments.positive, 1e-3, "Adam's, falling to 0")
    train("--batch_size", help="images a step")
    train("--threads")
    train("--repeats")
    arguments.add_evaluation_flags(parser, metric=False)
    return parser


class Setting(NamedTuple):
    """One sketch that is trained and measured."""

    sketch: str
    steps: int  # K
    oversample: int  # p


class RandomSketch(LowRankFactorModel):
    """A sketch without networks, from Gaussian columns Ω that are trained or not.

    from_rows: Y = X Ω, Ω [D, c]; otherwise Y = X_s X_sᵀ Ω, Ω [T, c].
    """

    def __init__(self, *, from_rows: bool = False, trained: bool = False, **config) -> None:
        super().__init__(**config)
        self.from_rows = from_rows
        sources = self.input_dim if from_rows else self.num_tokens
        omega = torch.randn(sources, self.sketch_columns()) / sources**0.5
        self.omega = nn.Parameter(omega, trained)
        self.row_gain.requires_grad_(False)  # there is no row_net

    def make_branch(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Identity()

    def sketch(self, x: Tensor, columns: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
        omega, seen = self.omega[:, :columns], x[..., self.seen]
        y = x @ omega if self.from_rows else seen @ (seen.mT @ omega)
        return y, y


def build(
    setting: Setting, rank: int, dataset: RealQwenVLDataset, seen: Tensor
) -> LowRankFactorModel:
    """The untrained model, drawn from torch's generator; seen: features of those to be trained."""
    config = {"input_dim": dataset.feature_dim, "num_tokens": dataset.num_tokens, "rank": rank}
    config |= {"refine_steps": setting.steps, "oversample": setting.oversample, "lambda_B": 0.0}
    own = {"random": {"from_rows": True}, "linear": {"trained": True}}.get(setting.sketch, {})
    networks = {"ResMLP": LowRankProjSymmetric, "MLP": LowRankProjMLP}
    model = networks.get(setting.sketch, RandomSketch)(**own, **config)
    if setting.sketch not in UNTRAINED:
        model.see_features(seen)
    return model


def train(
    model: LowRankFactorModel, loaders: Loaders, args: argparse.Namespace, seed: int
) -> LowRankFactorModel:
    """The model of the epoch that is best on validation images, the untrained one among them."""
    weights = [p for p in model.parameters() if p is not model.shift_logits and p.requires_grad]
    if not model.shift_logits.numel() and not weights:
        return model
    shifts = {"params": [model.shift_logits], "lr": min(0.02, args.lr * SHIFT_LR_FACTOR)}
    optimizer = torch.optim.Adam([{"params": weights}, shifts] if weights else [shifts], lr=args.lr)
    total = args.epochs * len(loaders.train)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / total, total)
    best, best_model = float(excess_of(model, loaders.val).nanmean()), copy.deepcopy(model)
    for epoch in range(1, args.epochs + 1):
        loaders.train.set_epoch(epoch + 1000 * seed)
        for batch in loaders.train:
            optimizer.zero_grad(set_to_none=True)
            model.loss_terms(batch.x, batch.singular_values).reconstruction.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            falling.step()
        excess = float(excess_of(model, loaders.val).nanmean())
        if excess < best:
            best, best_model = excess, copy.deepcopy(model)
    return best_model


def excess_of(model: LowRankFactorModel, loader: BatchLoader) -> Tensor:
    """Of each image, per cent, [n] float64."""
    return evaluate(lambda x: model(x, ordered=False), loader)["excess_pct"]


def run_setting(
    setting: Setting, seed: int, loaders: Loaders, seen: Tensor, args: argparse.Namespace
) -> Iterator[dict]:
    """Excess of every validation and test image with the start shifts and any learned ones."""
    torch.manual_seed(seed)
    model = build(setting, args.rank, loaders.train.dataset, seen).to(loaders.train.device)
    start = model.shift_logits.detach().clone()
    model = train(model, loaders, args, seed)
    learned = model.shifts.tolist()
    for name, logits in (("learned", model.shift_logits.detach().clone()), ("start", start)):
        if name == "learned" and not learned:
            continue  # without steps there are no shifts
        with torch.no_grad():
            model.shift_logits.copy_(logits)
        run = setting._asdict() | {"shifts": name, "seed": seed}
        run["shift_values"] = model.shifts.tolist()
        for key, loader in (("val_excess_pct", loaders.val), ("excess_pct", loaders.test)):
            run[key] = [round(float(value), 7) for value in excess_of(model, loader)]
        yield run


def measure_times(
    settings: list[Setting], loaders: Loaders, seen: Tensor, args: argparse.Namespace
) -> tuple[dict[Setting, float], float]:
    """ms a matrix of each setting, and of the float64 Gram matrix's eigenvectors (exact).

    Medians of one run in which all take turns; what a weight was trained to does not change it.
    """
    dataset, device = loaders.test.dataset, loaders.test.device
    rows = loaders.test.sampler.rows
    x = normalise(dataset[rows[torch.arange(args.batch_size) % len(rows)]].to(device))[0]
    models = [build(s, args.rank, dataset, seen).to(device).eval() for s in settings]
    calls = [lambda m=m: m(x, ordered=False) for m in models] + [
        lambda: exact_factors(x, args.rank)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    timings = time_in_turn(calls, args.repeats, device)
    torch.set_num_threads(threads)
    ms = [float(np.median(t.seconds)) * 1e3 / args.batch_size for t in timings]
    return dict(zip(settings, ms, strict=False)), ms[-1]


def summarise_runs(runs: list[dict], times: dict[Setting, float], groups: list[str]) -> list[dict]:
    """One record for each setting and kind of shifts: mean over test images and seeds, approximate
    95 % interval over groups, ms a matrix; val_excess_mean: of the validation images."""
    records = []
    for setting, ms in times.items():
        for shifts in ("start", "learned"):
            wanted = setting._asdict() | {"shifts": shifts}
            found = [run for run in runs if wanted.items() <= run.items()]
            if found:
                on_val = torch.tensor([run["val_excess_pct"] for run in found])
                per_image = torch.tensor([run["excess_pct"] for run in found]).mean(0)  # over seeds
                measured = {
                    "seeds": len(found),
                    "ms": ms,
                    "excess_mean": float(per_image.mean()),
                    "excess_p90": float(np.percentile(per_image, 90)),
                    "excess_interval": interval_95(per_image, groups),
                    "val_excess_mean": float(on_val.mean()),
                    "per_image": per_image.tolist(),
                }
                records.append(wanted | measured)
    return records


def gains_at_equal_time(records: list[dict], groups: list[str]) -> list[dict]:
    """Of each trained sketch: how much less excess than the best untrained one as fast or faster.

    Which one is best, and the order, are of validation images: the largest of their gains,
    val_gain_pct, comes first, those that only faster untrained ones stand against last. gain_pct is
    1 − mean excess / mean excess of that untrained sketch on test images, in per cent, with its
    approximate 95 % interval over groups, None below four.
    """
    found = []
    random = [r for r in records if r["sketch"] in UNTRAINED]
    for own in (r for r in records if r["sketch"] not in UNTRAINED):
        rivals = [r for r in random if r["ms"] <= SAME_TIME * own["ms"]]
        if not rivals:
            continue
        rival = min(rivals, key=lambda r: r["val_excess_mean"])
        if min(rival["val_excess_mean"], rival["excess_mean"]) < 1e-4:
            continue  # rounding
        less = gain(torch.tensor(own["per_image"]), torch.tensor(rival["per_image"]), groups)
        names = ("sketch", "shifts", "steps", "oversample", "ms", "excess_mean", "val_excess_mean")
        gains = {
            "random": {name: rival[name] for name in names},
            "val_gain_pct": 100 * (1 - own["val_excess_mean"] / rival["val_excess_mean"]),
            "gain_pct": less["mean"],
            "gain_interval": less["interval_95"],
        }
        found.append({name: own[name] for name in names} | gains)
    return sorted(
        found, key=lambda g: (g["ms"] > SAME_TIME * g["random"]["ms"], -g["val_gain_pct"])
    )


HOW_TO_READ_GAINS = """less excess than the best untrained sketch that takes no longer, paired and
ordered by validation images, measured on test images (approximate 95 %):"""


def print_tables(records: list[dict], gains: list[dict], exact_ms: float) -> None:
    header = "sketch|shifts|K|p|ms|excess mean %|p90 %|approximate 95 % interval"
    rows = [header.split("|")]
    order = ("oversample", "steps", "shifts")
    for r in sorted(records, key=lambda r: ([r[name] for name in order], r["excess_mean"])):
        rows.append([r[name] for name in ("sketch", "shifts", "steps", "oversample")])
        rows[-1] += [f"{r['ms']:.2f}", f"{r['excess_mean']:.5f}", f"{r['excess_p90']:.5f}"]
        rows[-1].append(" to ".join(f"{end:.5f}" for end in r["excess_interval"] or []))
    print_columns(rows)
    print(f"exact, by the float64 Gram matrix: {exact_ms:.2f} ms")
    print(HOW_TO_READ_GAINS)
    words = "{sketch} {shifts} shifts K={steps} p={oversample} {ms:.2f} ms {excess_mean:.5f} %"
    for g in gains[:12]:
        own, rival = words.format(**g), words.format(**g["random"])
        bounds = " ({:.0f} to {:.0f})".format(*g["gain_interval"]) if g["gain_interval"] else ""
        print(f"{own}  against  {rival}: {g['gain_pct']:.0f} % less{bounds}")


def main(args: argparse.Namespace) -> None:
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    limit = min(dataset.num_tokens, dataset.feature_dim)
    if args.rank + max(args.oversample) > limit:
        flags = f"--rank {args.rank} and --oversample {max(args.oversample)}"
        raise InputError(f"{flags} are more than the {limit} columns there can be: lower one")
    loaders = of_one_grid(create_data_loaders_real(dataset, args.batch_size, device=device))
    path = Path(args.results_dir) / f"ablation_rank{args.rank}.json"
    trained_with = {"data": dataset.label, "split": dataset.split.hash, "rank": args.rank}
    trained_with |= {"epochs": args.epochs, "lr": args.lr, "batch_size": args.batch_size}
    runs = runs_so_far(path, trained_with)
    print(dataset.label)
    grid = itertools.product(args.oversample, args.refine_steps, args.sketches)
    settings = [Setting(sketch, steps, extra) for extra, steps, sketch in grid]
    done = {(r["sketch"], r["steps"], r["oversample"], r["seed"]) for r in runs}
    todo = [(s, seed) for seed in range(args.seeds) for s in settings if (*s, seed) not in done]
    moment = second_moment(batch.x for batch in loaders.train)
    seen = pivoted_features(moment, len(even_features(dataset.feature_dim, dataset.num_tokens)))
    for setting, seed in progress.over(todo, "training and test", "sketches"):
        runs += run_setting(setting, seed, loaders, seen, args)
        write_json(path, {"trained_with": trained_with, "runs": runs})

    groups = dataset.rows["group"].take(loaders.test.sampler.rows.tolist()).to_pylist()
    times, exact_ms = measure_times(settings, loaders, seen, args)
    records = summarise_runs(runs, times, groups)
    gains = gains_at_equal_time(records, groups)
    print_tables(records, gains, exact_ms)
    environment = arguments.environment(device) | {"threads": args.threads}
    shown = [{k: v for k, v in r.items() if k != "per_image"} for r in records]
    found = {"environment": environment, "exact_ms": exact_ms, "records": shown, "gains": gains}
    write_json(path, {"trained_with": trained_with, **found, "runs": runs})
    footer = f"{dataset.label}; {environment['device']}, {args.threads} CPU thread(s), batch "
    footer += f"{args.batch_size}; {loaders.test.num_images} test images, {args.seeds} seeds"
    png = path.with_suffix(".png")
    error_against_time.ablation(png, records, gains, exact_ms, args.rank, footer)
    print(f"wrote {path} and {png.name}: look at {png}")


def runs_so_far(path: Path, trained_with: dict) -> list[dict]:
    """What an earlier call has measured already. Raises InputError where it trained otherwise.

    Runs of an older version, which did not measure validation images, are left out: made again.
    """
    if not path.exists():
        return []
    before = read_json(path, "remove it and start again")
    check_same_header(str(path), before["trained_with"], trained_with, "remove it to start anew")
    return [run for run in before["runs"] if "val_excess_pct" in run]


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
