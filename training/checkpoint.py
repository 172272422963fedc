"""Checkpoints: everything a run needs to go on exactly where it was, and a model to evaluate.

One file format for `best_model.pt` and `last_model.pt`: tensors and plain values only, read with
`torch.load(weights_only=True)`, so that a checkpoint cannot run code.

A checkpoint goes on (--resume) on its own cache only; its model factors the tokens of any cache of
the same encoder, T and D. Where test numbers are reported, images that it was trained or validated
on are left out (`training.unseen`).
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from common import arguments
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import atomic_path, first_difference
from model import LowRankFactorModel, ModelConfig, build_model, canonical_arch
from qwenvl_dataloader import RealQwenVLDataset
from training.trained_norm import TaskFactorModel

FORMAT = 1
CHECKPOINT_KEYS = """shift_estimator config norm model optimizer scheduler allocator rng other_rng
    processes progress args cache images""".split()
# The shifts were learned as fractions of this estimate (linalg.smallest_ritz_estimate).
SHIFT_ESTIMATOR = "min_cholesky_pivot"


def cache_identity(dataset: RealQwenVLDataset) -> dict:
    """Return what of the cache a checkpoint depends on: the encoder, the shape and the split.

    Rows without an image's hash are known by the hash of all features and rows.
    """
    unnamed = dataset.rows["image_sha256"].null_count
    return {
        "encoder": dataset.manifest["encoder"],
        "num_tokens": dataset.num_tokens,
        "feature_dim": dataset.feature_dim,
        "split_hash": dataset.split.hash,
        "demo": dataset.is_demo,
    } | ({"content_sha256": dataset.content_sha256} if unnamed else {})


def rng_state() -> dict:
    """Return the state of torch's generators, the only ones that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    """Give torch's generators the state that `rng_state` took."""
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
    """Read a checkpoint onto the CPU.

    Raises InputError where it is missing, damaged, or was trained on another cache or split than
    `dataset`, the one to go on with.
    """
    arch = path.parent.name
    try:
        # torch does not look at the checksums of the zip file that it reads
        with zipfile.ZipFile(path) as records:
            if damaged := records.testzip():
                raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: train it with train_real_data.py --arch {arch}, or name "
            "another --results_dir"
        ) from None
    except Exception as error:
        # damaged bytes make zip, pickle and torch raise nearly anything; all of it means one thing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason}): train again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of format {FORMAT}: train again")
    if missing := [key for key in CHECKPOINT_KEYS if key not in state]:
        raise InputError(f"{path} lacks {', '.join(missing)}: train again")
    if state["shift_estimator"] != SHIFT_ESTIMATOR:
        raise InputError(
            f"{path} learned its shifts with {state['shift_estimator']}, this version uses "
            f"{SHIFT_ESTIMATOR}: train again"
        )
    if dataset is not None:
        remedy = "name the cache it was trained on, or train again"
        _check_cache(path, state["cache"], cache_identity(dataset), dataset.cache_dir, remedy)
    return state


def load_model(
    path: Path,
    device: torch.device,
    dataset: RealQwenVLDataset | None = None,
    other_images: bool = False,
) -> tuple[LowRankFactorModel, dict]:
    """Load the trained model in evaluation mode, and its checkpoint.

    No flag is needed to rebuild it. dataset: the cache it has to fit. With other_images that is any
    cache of the same encoder and shape; who reports test numbers then leaves out the images that
    the model has seen (`training.unseen`).
    """
    state = load_checkpoint(path, None if other_images else dataset)
    if other_images and dataset is not None:
        _check_encoder(path, state, dataset)
    try:
        model = build_trained(state["config"], state["norm"])
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} describes another model than it holds ({reason}): train again"
        ) from None
    return model.to(device).eval(), state


def build_trained(
    config: dict, norm: dict[str, str | None] | None
) -> LowRankFactorModel | TaskFactorModel:
    """Build the model that a checkpoint's `config` and `norm` describe."""
    core = build_model(ModelConfig(**config))
    return core if norm is None else TaskFactorModel(core, norm)


class Trained(NamedTuple):
    """The best model of an architecture with a cache whose tokens it can factor."""

    folder: Path  # <results_dir>/<arch>
    device: torch.device
    dataset: RealQwenVLDataset  # of the encoder it was trained for, maybe of other images
    model: LowRankFactorModel  # in evaluation mode, on the device
    state: dict  # its checkpoint


def open_trained(args: argparse.Namespace) -> Trained:
    """Open the model and the cache that --arch, --results_dir, --cache_dir and --device name.

    Raises InputError where one is missing, damaged, or does not fit the other.
    """
    device = arguments.pick_device(args.device)
    folder = Path(args.results_dir) / canonical_arch(args.arch)
    dataset = RealQwenVLDataset(args.cache_dir)
    path = folder / "best_model.pt"
    return Trained(folder, device, dataset, *load_model(path, device, dataset, other_images=True))


def evaluated_rank(model: LowRankFactorModel, requested: int | None) -> int:
    """Return the rank to evaluate: the requested one, at most the model's effective rank."""
    effective = model.current_effective_rank()
    limit = min(model.config.num_tokens, model.config.input_dim)
    if requested is not None and requested > limit:
        raise InputError(f"--rank {requested} is out of range: type 1 to {effective}")
    if requested is not None and requested > effective:
        print(f"note: the model's effective rank is {effective}, which replaces {requested}")
    return min(requested or effective, effective)


def _check_cache(path: Path, trained: dict, now: dict, cache_dir: Path, remedy: str) -> None:
    if different := first_difference(trained, now):
        key, before, here = different
        raise InputError(
            f"{path} was trained on a cache with {key} = {before}, --cache_dir {cache_dir} has "
            f"{here}: {remedy}"
        )


def _check_encoder(path: Path, state: dict, dataset: RealQwenVLDataset) -> None:
    """Refuse tokens that the model was not made for: of another encoder or width, and with direct
    factors of another size of image."""
    any_size = state["config"].get("factors") == "projected"
    shape = ["encoder", "feature_dim"] + ([] if any_size else ["num_tokens"])
    before, now = ({k: c[k] for k in shape} for c in (state["cache"], cache_identity(dataset)))
    if all("weights_sha256" in c["encoder"] for c in (before, now)):
        # a hub id and a folder's name may be of the same weights
        for c in (before, now):
            how = c["encoder"].get("preprocessor")
            if any_size and how:  # what became of the image's size is not said
                how = re.sub(r", (stretch|pad|native)\b.*?(?=, RGB|, then)", "", how)
            c["encoder"] = {"weights_sha256": c["encoder"]["weights_sha256"], "preprocessor": how}
    elif not any("features_sha256" in c["encoder"] for c in (before, now)):
        # of tokens that were imported the encoder's name is all that is known
        for c in (before, now):
            c["encoder"] = {"id": c["encoder"]["id"]}
    remedy = "name a cache of the same encoder and size"
    _check_cache(path, before, now, dataset.cache_dir, remedy)
