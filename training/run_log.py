"""The log of a training run: config.json, training.log, final_summary.json, TensorBoard events;
and the lines of a run that people read."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common import arguments, processes
from lowrank_tokens.errors import optimum, percent_text
from lowrank_tokens.files import new_folder, write_json

if TYPE_CHECKING:
    from qwenvl_dataloader import Loaders, RealQwenVLDataset
    from training.state import TrainState


class RunLog:
    """`log(line)` prints a line and appends it to training.log with the time.

    A context manager around one run; its folder is <log_dir>/logs_<timestamp>/. Of several
    processes the main one writes; in the others nothing is written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.events = None
        if not processes.is_main():
            self.file = open(os.devnull, "a")
            return
        self.folder = new_folder(Path(args.log_dir) / time.strftime("logs_%Y%m%d_%H%M%S"))
        self.file = open(self.folder / "training.log", "a", encoding="utf-8")
        config = {k: v for k, v in vars(args).items() if k != "typed"}
        versions = arguments.environment(arguments.pick_device(args.device))
        config |= {"processes": processes.world(), "environment": versions}
        write_json(self.folder / "config.json", config)
        if args.tensorboard:
            # imported on demand: it takes a second and most runs do not want it
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(self.folder)

    def __call__(self, line: str) -> None:
        tqdm.write(line)  # leaves a progress bar whole
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        self.file.flush()

    def board(self, record: dict) -> None:
        """Numbers of a history entry as TensorBoard scalars, where they were asked for."""
        if self.events:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.events.add_scalar(name, value, record["epoch"])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def print_header(
    run: TrainState, dataset: RealQwenVLDataset, loaders: Loaders, log: RunLog
) -> None:
    """Write the first lines: data, hardware, model, images, and the optimum at its rank."""
    rank = run.model.current_effective_rank()
    best = optimum(dataset.singular_values[dataset.split.val], rank).mean()
    parameters = sum(p.numel() for p in run.model.parameters())
    config = asdict(run.model.config)
    log(dataset.label)
    log("  ".join(f"{k} {v}" for k, v in arguments.environment(run.sums.device).items()))
    log("  ".join(f"{k} {v}" for k, v in config.items()) + f"  parameters {parameters:,}")
    if (world := processes.world()) > 1:
        log(f"{world} processes, {run.args.batch_size} images a step each")
    log(
        f"{loaders.train.num_images} training, {len(dataset.split.val)} validation, "
        f"{loaders.test.num_images} test images; optimum rel_error at rank {rank}: {best:.5f}"
    )


def epoch_line(record: dict, run: TrainState) -> str:
    """One line of a history entry."""
    best = f"best epoch {run.best_epoch}" if math.isfinite(run.best) else "rank not final"
    if run.head:
        best = f"{task_words(record)}  {best}"
    return (
        f"epoch {record['epoch']:4d}  loss {record['train_loss']:.6f}  "
        f"val_mse {record['val_mse']:.6e}  optimum {record['val_optimum_mse']:.6e}  "
        f"excess {percent_text(record['val_excess_pct'])}  rank {record['effective_rank']}  "
        f"lr {record['lr']:.2e}  {record['samples_per_s']:.1f} images/s  {best}"
    )


def task_words(record: dict) -> str:
    """Return the task's part of an epoch's line."""
    return f"val_task_error {record['val_task_error']:.5f} loss {record['val_task_loss']:.3e}"


def report(run: TrainState, results: dict, folder: Path, log: RunLog, seconds: float) -> None:
    """Write the closing lines, and final_summary.json."""
    best = f"best epoch {run.best_epoch or '0 (the untrained model)'} of {run.epoch - 1}"
    log(f"{best}; on {results['n_images']} test images:")
    for rank, metrics in results["ranks"].items():
        error, excess = metrics["rel_error"], metrics["excess_pct"]
        log(
            f"  rank {rank:>4}  rel_error {error['mean']:.5f}  excess mean "
            f"{percent_text(excess['mean'])}  p90 {percent_text(excess['p90'])}"
        )
    speeds = [record["samples_per_s"] for record in run.history if "samples_per_s" in record]
    summary = {
        **results,
        "wall_seconds": round(seconds, 1),
        "samples_per_s": statistics.median(speeds),
        "environment": arguments.environment(run.sums.device),
    }
    write_json(log.folder / "final_summary.json", summary)
    written = f"{folder}/best_model.pt, history.json, test_results.json and figures"
    log(f"wrote {written}: look at {folder}/train_val_loss_comparison.png")
    again = arguments.flags_again(run.args, "results_dir", "cache_dir", "device")
    log(f"next: python compare_svd_nn.py --arch {run.args.arch}{again}")
