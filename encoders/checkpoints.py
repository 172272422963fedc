"""Checkpoints that encoders are made of: the families, and their vision tensors and nothing else.

    checkpoint = open_checkpoint("Qwen/Qwen2.5-VL-3B-Instruct")        # or a folder
    tower, weights_sha256 = load_tower(checkpoint, torch.device("cpu"), torch.float32)

`model_type` in config.json says which line of FAMILIES a checkpoint belongs to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, Dinov2Model, PreTrainedConfig, SiglipVisionModel
from transformers import BitImageProcessorPil as BitImageProcessor
from transformers import Dinov2WithRegistersModel as RegistersModel
from transformers import Qwen2VLImageProcessorPil as QwenImageProcessor
from transformers import Qwen3VLVisionModel as Qwen3Tower
from transformers import SiglipImageProcessorPil as SiglipImageProcessor
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sha256_file

SHARD_INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
ADAPTER = "adapter_config.json"
CONFIG_FILES = [
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *(SHARD_INDEX, ADAPTER),
]
READING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


class Kind(NamedTuple):
    """A family of encoders that are read alike.

    prefixes: of the vision tensors' keys, the first of these that a checkpoint has
    processor: the image processor that uses PIL, whatever a checkpoint says: the default one needs
    torchvision, and their last bits differ, so a cache would depend on what happens to be installed
    dtype: of the published weights; merges: whether the tower merges 2 x 2 patches to a token
    interpolates: whether the tower must be asked to fit its positions to the image
    """

    prefixes: tuple[str, ...]
    processor: type
    dtype: torch.dtype = torch.float32
    merges: bool = False
    interpolates: bool = False


class Family(NamedTuple):
    """The checkpoints of one `model_type`; width: the entry of the tower's config that is D."""

    name: str
    example: str  # hub id
    tower: type[nn.Module]
    width: str
    kind: Kind


QWEN = Kind(("visual.", "model.visual."), QwenImageProcessor, torch.bfloat16, merges=True)
SIGLIP = Kind(("vision_model.",), SiglipImageProcessor, interpolates=True)
# a classifier's keys; those of the model alone
DINOV2 = Kind(("dinov2.", "dinov2_with_registers.", ""), BitImageProcessor)
Qwen2Tower = qwen2_vl.Qwen2VisionTransformerPretrainedModel
Qwen2_5Tower = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
OUT, OWN = "out_hidden_size", "hidden_size"
SIGLIPS, REGISTERS_BASE = "SigLIP (1 or 2)", "facebook/dinov2-with-registers-base"

FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", "Qwen/Qwen2-VL-2B-Instruct", Qwen2Tower, OWN, QWEN),
    "qwen2_5_vl": Family("Qwen2.5-VL", "Qwen/Qwen2.5-VL-3B-Instruct", Qwen2_5Tower, OUT, QWEN),
    "qwen3_vl": Family("Qwen3-VL", "Qwen/Qwen3-VL-2B-Instruct", Qwen3Tower, OUT, QWEN),
    "siglip": Family(SIGLIPS, "google/siglip2-base-patch16-224", SiglipVisionModel, OWN, SIGLIP),
    "dinov2": Family("DINOv2", "facebook/dinov2-base", Dinov2Model, OWN, DINOV2),
    "dinov2_with_registers": Family("DINOv2", REGISTERS_BASE, RegistersModel, OWN, DINOV2),
}
QWEN2_5 = ("qwen2_5_vl",)  # whose language model reads tokens again
AS_READER = (
    " as a language model that reads stored tokens (Qwen3-VL's also reads deepstack features, "
    "which are not stored)"
)


def names(families: Iterable[str] = FAMILIES) -> str:
    """Return the families' names for people: "a, b or c"."""
    *most, last = dict.fromkeys(FAMILIES[family].name for family in families)
    return " or ".join([", ".join(most), last] if most else [last])


class Checkpoint(NamedTuple):
    """A folder of which at least configs and vision tensors are there."""

    folder: Path
    revision: str | None  # the hub's commit; None of a folder that was named as one
    family: Family
    vision: PreTrainedConfig  # of the tower alone

    @property
    def width(self) -> int:
        """Return D, the features of a token."""
        return getattr(self.vision, self.family.width)


def open_checkpoint(name: str) -> Checkpoint:
    """Open a folder; of a hub's checkpoint fetch the configs and the shards of vision tensors only.

    Raises InputError for another family, offline too, and for what cannot be found or read.
    """
    if Path(name).is_dir():
        return read_checkpoint(Path(name))
    with reading(f"--model {name}: no such folder, and the hub says"):
        folder = Path(snapshot_download(name, allow_patterns=CONFIG_FILES))
        # another family is refused before its shards are fetched
        checkpoint = read_checkpoint(folder, revision=folder.name)  # named after its commit
        indexed = (folder / SHARD_INDEX).is_file()
        files = _vision_files(checkpoint).values() if indexed else ()
        shards = sorted({file for _, file in files}) or [SINGLE_SHARD]
        snapshot_download(name, revision=folder.name, allow_patterns=shards)
    return checkpoint


def read_checkpoint(
    folder: Path, revision: str | None = None, accepted: Iterable[str] = FAMILIES, by: str = ""
) -> Checkpoint:
    """Read a folder's checkpoint; InputError where its model_type is not `accepted` (`by` whom)."""
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is a LoRA adapter, no whole model: merge it into its base model "
            "(peft: merge_and_unload), save that, and type its folder"
        )
    with reading(folder / "config.json", accepted):
        config = json.loads((folder / "config.json").read_text())
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in accepted:
        known = ", ".join(f"{key!r} (such as {FAMILIES[key].example})" for key in accepted)
        raise InputError(
            f"{folder}: model_type {model_type!r} is not supported{by}: "
            f"type a checkpoint of {known}"
        )
    with reading(folder / "config.json", accepted):
        whole = CONFIG_MAPPING[model_type].from_dict(config)
        vision = getattr(whole, "vision_config", whole)
        if not isinstance(vision.patch_size, int):
            raise ValueError(f"patch_size {vision.patch_size}, where one side of a square belongs")
    return Checkpoint(folder, revision, FAMILIES[model_type], vision)


def whole_checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a whole Qwen2.5-VL checkpoint: `name`, or the hub's snapshot of it.

    revision: the hub's commit; None is its newest. Another family is refused before its weights are
    fetched.
    """
    folder = Path(name)
    if folder.is_dir():
        read_checkpoint(folder, accepted=QWEN2_5, by=AS_READER)
        return folder
    with reading(f"{name}: no such folder, and the hub says", QWEN2_5):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIG_FILES))
        read_checkpoint(folder, accepted=QWEN2_5, by=AS_READER)
        fetched = {"revision": revision or folder.name, "ignore_patterns": ["*.bin", "*.pth"]}
        return Path(snapshot_download(name, **fetched))


def checkpoint_weights_sha256(folder: Path) -> str:
    """Return the sha256 (hex) over names and hashes of a checkpoint's safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def tower_of_checkpoint(folder: Path) -> tuple[int, str]:
    """Return D of a checkpoint's vision tower and its weights_sha256, without loading it."""
    checkpoint, digest = read_checkpoint(folder), hashlib.sha256()
    for name, tensor in _vision_tensors(checkpoint):
        _digest_tensor(digest, name, tensor)
    return checkpoint.width, digest.hexdigest()


def load_tower(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, str]:
    """Return the vision tower, frozen, and its weights_sha256.

    That is over the vision tensors as they are stored, sorted by name (the prefix left out): of
    each a line "name dtype [shape]" and the bytes, so folder and sharding do not matter.
    """
    # from_pretrained of the vision class on a whole checkpoint would not raise and leave every
    # weight random: so keys are matched here. Built in `dtype` and not cast later: a cast would
    # round the rotary frequencies too, which the whole model keeps in float32.
    with reading(checkpoint.folder / "config.json"), no_init_weights():
        tower = checkpoint.family.tower._from_config(
            checkpoint.vision, dtype=dtype, attn_implementation="sdpa"
        )
    digest, state, dtypes = hashlib.sha256(), {}, {}
    for name, tensor in _vision_tensors(checkpoint):
        _digest_tensor(digest, name, tensor)
        state[name], dtypes[name] = tensor.to(device, dtype), tensor.dtype
    if checkpoint.family.kind is DINOV2:
        state = dinov2_weights(state)
    refuse_quantised(checkpoint.folder, dtypes, tower.state_dict())
    with reading(checkpoint.folder):
        tower.load_state_dict(state, strict=True, assign=True)
    return tower.to(device).eval().requires_grad_(False), digest.hexdigest()


def refuse_quantised(
    folder: Path, dtypes: Mapping[str, torch.dtype], needed: Mapping[str, Tensor]
) -> None:
    """Refuse vision weights that a quantisation has replaced by codes and scales.

    dtypes: of the stored vision tensors; needed: the tower's own.
    """
    config = json.loads((folder / "config.json").read_text())
    quantisation = config.get("quantization_config")
    floats = all(dtype.is_floating_point for dtype in dtypes.values())
    plain = floats and len(dtypes) == len(needed)  # scales are tensors of their own
    if quantisation and not plain:
        method = quantisation.get("quant_method", "unknown method")
        raise InputError(
            f"{folder}: its vision weights are quantised ({method}): type the checkpoint that it "
            "was made from"
        )


def dinov2_weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map published DINOv2 weights (transformers 4) to transformers 5's names and layout."""
    weights = {}
    for name, tensor in stored.items():
        name = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.\1_proj", name)
        name = name.replace("attention.output.dense.", "attention.o_proj.")
        name = name.replace("mlp.weights_out.", "mlp.down_proj.")
        if "mlp.weights_in." in name:  # of a SwiGLU layer, both halves in one
            gate, up = tensor.chunk(2)
            weights[name.replace("weights_in", "gate_proj")] = gate
            weights[name.replace("weights_in", "up_proj")] = up
        else:
            weights[name] = tensor
    return weights


@contextmanager
def reading(what: Path | str, accepted: Iterable[str] = FAMILIES) -> Iterator[None]:
    """Turn a missing or damaged file, and the hub's errors, into an InputError about `what`."""
    try:
        yield
    except InputError:  # says what to do already
        raise
    except READING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{what}: {reason.rstrip('.')}: type the folder of a downloaded checkpoint of "
            f"{names(accepted)}, or a hub id that can be reached"
        ) from error


def _vision_files(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    # The tower's name of each vision tensor → the checkpoint's key, shard file.
    folder, prefixes = checkpoint.folder, checkpoint.family.kind.prefixes
    if (folder / SHARD_INDEX).is_file():
        with reading(folder / SHARD_INDEX):
            files = json.loads((folder / SHARD_INDEX).read_text())["weight_map"]
    else:
        path = folder / SINGLE_SHARD
        if not path.is_file() and (pickles := sorted(folder.glob("*.bin"))):
            raise InputError(
                f"{folder} holds {pickles[0].name}, a pickle, and no safetensors: save it again "
                "with transformers' save_pretrained, and type that folder"
            )
        with reading(path), safe_open(path, framework="pt") as shard:
            files = dict.fromkeys(shard.keys(), SINGLE_SHARD)
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in files)), prefixes[0])
    of_tower = {key: file for key, file in files.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): (key, file) for key, file in of_tower.items()}


def _vision_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    # sorted by name, the prefix left out
    for name, (key, file) in sorted(_vision_files(checkpoint).items()):
        path = checkpoint.folder / file
        with reading(path), safe_open(path, framework="pt") as shard:
            tensor = shard.get_tensor(key).contiguous()
        yield name, tensor


def _digest_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
