"""Checkpoints of Qwen2.5-VL: folder or hub id, configs, and the vision tensors alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, Qwen2_5_VLConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

from common.errors import UserError
from common.files import sha256_file

SHARD_INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
CONFIG_FILES = ["config.json", "preprocessor_config.json", "processor_config.json", SHARD_INDEX]
VISUAL_PREFIXES = ("visual.", "model.visual.")  # published checkpoints; newer ones


def checkpoint_folder(name: str) -> tuple[Path, str | None]:
    # A folder as it is; from the hub only the configs and the shards that hold vision tensors.
    if Path(name).is_dir():
        return Path(name), None
    with reading(f"--model {name}: no such folder, and the hub says"):
        folder = Path(snapshot_download(name, allow_patterns=CONFIG_FILES))
        vision_config(folder)  # another family is refused before its shards are fetched
        indexed = (folder / SHARD_INDEX).is_file()
        shards = sorted(set(_vision_files(folder).values())) if indexed else [SINGLE_SHARD]
        snapshot_download(name, revision=folder.name, allow_patterns=shards)
    return folder, folder.name  # a snapshot's folder is named after its commit


def whole_checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a whole Qwen2.5-VL checkpoint: `name` itself, or the hub's snapshot of it.

    revision: the hub's commit; None is its newest.
    """
    folder = Path(name)
    if not folder.is_dir():
        with reading(f"{name}: no such folder, and the hub says"):
            folder = Path(
                snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pth"])
            )
    vision_config(folder)
    return folder


def checkpoint_weights_sha256(folder: Path) -> str:
    """sha256 (hex) over the names and hashes of a checkpoint's safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def tower_of_checkpoint(folder: Path) -> tuple[int, str]:
    """Width D of the tokens of a checkpoint's vision tower, and its weights_sha256, not loaded."""
    digest = hashlib.sha256()
    for name, tensor in _vision_tensors(folder):
        _digest_tensor(digest, name, tensor)
    return vision_config(folder).out_hidden_size, digest.hexdigest()


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    # A missing or damaged file is the user's to mend, and the hub's errors are OSErrors.
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what}: {reason.rstrip('.')}: type the folder of a downloaded Qwen2.5-VL checkpoint, "
            "or a hub id that can be reached"
        ) from error


def vision_config(folder: Path) -> PreTrainedConfig:
    with reading(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"{folder}: model_type {config.get('model_type')!r} is not supported: "
            "type a checkpoint of type 'qwen2_5_vl', such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    return Qwen2_5_VLConfig.from_dict(config).vision_config


def _vision_files(folder: Path) -> dict[str, str]:
    # The checkpoint's key -> shard file, of the vision tensors only.
    if (folder / SHARD_INDEX).is_file():
        with reading(folder / SHARD_INDEX):
            files = json.loads((folder / SHARD_INDEX).read_text())["weight_map"]
    else:
        path = folder / SINGLE_SHARD
        with reading(path), safe_open(path, framework="pt") as shard:
            files = dict.fromkeys(shard.keys(), SINGLE_SHARD)
    return {key: file for key, file in files.items() if key.startswith(VISUAL_PREFIXES)}


def _vision_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    # sorted by name, `visual.` and before it left out
    files = _vision_files(folder)
    for name, key in sorted((key.split("visual.", 1)[1], key) for key in files):
        path = folder / files[key]
        with reading(path), safe_open(path, framework="pt") as shard:
            tensor = shard.get_tensor(key).contiguous()
        yield name, tensor


def _digest_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())


def load_tower(
    folder: Path, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, str]:
    # from_pretrained of the vision class on a whole checkpoint would not raise and leave every
    # weight random: so keys are matched here. Built in `dtype` and not cast later: a cast would
    # round the rotary frequencies too, which the whole model keeps in float32.
    with no_init_weights():
        tower = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    digest, state = hashlib.sha256(), {}
    for name, tensor in _vision_tensors(folder):
        _digest_tensor(digest, name, tensor)
        state[name] = tensor.to(device, dtype)
    with reading(folder):
        tower.load_state_dict(state, strict=True, assign=True)
    return tower.to(device).eval().requires_grad_(False), digest.hexdigest()
