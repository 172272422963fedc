"""The log of a training run: config.json, training.log, final_summary.json, TensorBoard events."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from tqdm import tqdm

import cli
import distributed
from files import new_folder, write_json


class RunLog:
    """`log(line)` prints a line and appends it to training.log with the time.

    A context manager around one run; its folder is <log_dir>/logs_<timestamp>/. Of several
    processes the main one writes; in the others nothing is written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.events = None
        if not distributed.is_main():
            self.file = open(os.devnull, "a")
            return
        self.folder = new_folder(Path(args.log_dir) / time.strftime("logs_%Y%m%d_%H%M%S"))
        self.file = open(self.folder / "training.log", "a", encoding="utf-8")
        config = {k: v for k, v in vars(args).items() if k != "typed"}
        versions = cli.environment(cli.pick_device(args.device))
        config |= {"processes": distributed.world(), "environment": versions}
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

    def write_summary(self, summary: dict) -> None:
        write_json(self.folder / "final_summary.json", summary)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.events:
            self.events.close()
