"""Checkpoints: everything a run needs to go on exactly where it was, and a model to evaluate.

One file format for `best_model.pt` and `last_model.pt`: tensors and plain values only, read with
`torch.load(weights_only=True)`, so that a checkpoint cannot run code.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from common import cli
from common.errors import UserError
from common.files import atomic_path, first_difference
from model import LowRankFactorModel, canonical_arch
from qwenvl_dataloader import RealQwenVLDataset
from task.trained_norm import build_model

FORMAT = 2
CHECKPOINT_KEYS = ("shift_estimator", "config", "model", "optimizer", "scheduler", "allocator",
                   "rng", "progress", "args", "cache")  # fmt: skip
# The shifts were learned as fractions of this estimate (subspace.smallest_ritz_estimate).
SHIFT_ESTIMATOR = "min_cholesky_pivot"


def cache_identity(dataset: RealQwenVLDataset) -> dict:
    """What of the cache a checkpoint depends on: the encoder, the shape and the split."""
    return {
        "encoder": dataset.manifest["encoder"],
        "num_tokens": dataset.num_tokens,
        "feature_dim": dataset.feature_dim,
        "split": dataset.split.hash,
        "demo": dataset.is_demo,
    }


def rng_state() -> dict:
    """State of torch's generators (the only ones that training draws from)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` atomically, with the format's number and the shifts' estimator."""
    state = {"format": FORMAT, "shift_estimator": SHIFT_ESTIMATOR, **state}
    with atomic_path(path) as temporary:
        # by way of memory: what torch says of a full disk does not say that it is full
        records = io.BytesIO()
        torch.save(state, records)
        temporary.write_bytes(records.getbuffer())


def load_checkpoint(path: Path, dataset: RealQwenVLDataset | None = None) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError where it is missing, damaged, or belongs to
    another cache than `dataset`."""
    arch = path.parent.name
    try:
        # torch does not look at the checksums of the zip file that it reads
        with zipfile.ZipFile(path) as records:
            if damaged := records.testzip():
                raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: train it with train_real_data.py --arch {arch}, or name "
            "another --results_dir"
        ) from None
    except Exception as error:
        # damaged bytes make zip, pickle and torch raise nearly anything; all of it means one thing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}): train again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of format {FORMAT}: train again")
    if missing := [key for key in CHECKPOINT_KEYS if key not in state]:
        raise UserError(f"{path} lacks {', '.join(missing)}: train again")
    if state["shift_estimator"] != SHIFT_ESTIMATOR:
        raise UserError(
            f"{path} learned its shifts with {state['shift_estimator']}, this version uses "
            f"{SHIFT_ESTIMATOR}: train again"
        )
    if dataset is not None:
        _check_cache(path, state["cache"], cache_identity(dataset), dataset.cache_dir)
    return state


def load_model(
    path: Path, device: torch.device, dataset: RealQwenVLDataset | None = None
) -> tuple[LowRankFactorModel, dict]:
    """The trained model in evaluation mode, and its checkpoint; no flag is needed to rebuild it."""
    state = load_checkpoint(path, dataset)
    try:
        model = build_model(state["config"])
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} describes another model than it holds ({reason}): train again"
        ) from None
    return model.to(device).eval(), state


class Trained(NamedTuple):
    """The best model of an architecture with the data it was trained on."""

    folder: Path  # <results_dir>/<arch>
    device: torch.device
    dataset: RealQwenVLDataset
    model: LowRankFactorModel  # in evaluation mode, on the device
    state: dict  # its checkpoint


def open_trained(args: argparse.Namespace) -> Trained:
    """What --arch, --results_dir, --cache_dir and --device name. Raises UserError."""
    device = cli.pick_device(args.device)
    folder = Path(args.results_dir) / canonical_arch(args.arch)
    dataset = RealQwenVLDataset(args.cache_dir)
    return Trained(folder, device, dataset, *load_model(folder / "best_model.pt", device, dataset))


def evaluated_rank(model: LowRankFactorModel, requested: int | None) -> int:
    """The rank that is evaluated: the requested one, at most the model's effective rank."""
    effective = model.current_effective_rank()
    limit = min(model.num_tokens, model.input_dim)
    if requested is not None and requested > limit:
        raise UserError(f"--rank {requested} is out of range: type 1 to {effective}")
    if requested is not None and requested > effective:
        print(f"note: the model's effective rank is {effective}, which replaces {requested}")
    return min(requested or effective, effective)


def _check_cache(path: Path, trained: dict, now: dict, cache_dir: Path) -> None:
    if different := first_difference(trained, now):
        key, before, here = different
        raise UserError(
            f"{path} was trained on a cache with {key} = {before}, --cache_dir {cache_dir} has "
            f"{here}: name the cache it was trained on, or train again"
        )
