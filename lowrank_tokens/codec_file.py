"""The codec's file: arrays that all images share, where they are from, and hashes of both.

docs/stream.md specifies it. The arrays, with T tokens on a grid [H, W], D features and d directions
kept of the KLT P:

    klt [D, d] bfloat16                 P
    inverse [D, d] bfloat16             from directions back to features; absent where it is P
    scales [3] float32                  steps of the mean and of log std; the mean of log std
    statistics [2, H, W] int16          log variances of the statistics' DCT
    tables int32, table_sizes int16     as `entropy.Tables`
    channel_exponents [D] int8          tokens are divided by 2^exponent; absent where all are 0
    rows [buckets, H, W] int16          form `factors`: log variances of u_k and of v_k, in buckets
    columns [buckets, d] int16          of components k,
    starts [buckets] int16              and the first component of each bucket
    spectrum_left [H, W, n] int16       form `transform`: their product is the log standard
    spectrum_right [n, d] int16         deviations of Z, in 1/256 of a unit
    fitted_images [n, 8] uint8          first bytes of the SHA-256 of images that it was fitted on

A unit is 1/16 of a level.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import save_tensors
from lowrank_tokens.stream import FACTORS, TRANSFORM

KIND, CODEC_FORMAT = "codec", 1
FORM_ARRAYS = {  # what only one form reads
    FACTORS: ("rows", "columns", "starts"),
    TRANSFORM: ("spectrum_left", "spectrum_right"),
}
PROVENANCE = "fitted_images"  # array that no decoding uses
FIT_ONE = "fit one with Codec.fit (in the checkout: python -m experiments.fit_codec)"


def read_codec_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return the arrays and the info of a file.

    Raises InputError where it is missing, damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no codec, or damaged ({error}): {FIT_ONE}") from None
    if metadata.get("kind") != KIND or metadata.get("format") != str(CODEC_FORMAT):
        raise InputError(f"{path} is not a codec of format {CODEC_FORMAT}: {FIT_ONE}")
    info = metadata.get("info", "")
    hashes = arrays_sha256(arrays), provenance_sha256(arrays, info)
    if hashes != (metadata.get("identity"), metadata.get("provenance_sha256")):
        raise InputError(f"{path} is damaged (its content does not match its hash): {FIT_ONE}")
    return arrays, json.loads(info)


def write_codec_file(path: Path, arrays: dict[str, Tensor], info: dict) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps(info)
    metadata = {
        "kind": KIND,
        "format": str(CODEC_FORMAT),
        "info": text,
        "identity": arrays_sha256(arrays),
        "provenance_sha256": provenance_sha256(arrays, text),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, arrays, metadata)


def arrays_sha256(arrays: dict[str, Tensor]) -> str:
    """Return a codec's identity: SHA-256 of the format and of the arrays that decoding uses."""
    digest = hashlib.sha256(f"lowrank_tokens codec {CODEC_FORMAT}".encode())
    for name in sorted(set(arrays) - {PROVENANCE}):
        _add_array(digest, name, arrays[name])
    return digest.hexdigest()


def provenance_sha256(arrays: dict[str, Tensor], info: str) -> str:
    """Return SHA-256 of what a codec was made from."""
    digest = hashlib.sha256(info.encode())
    if PROVENANCE in arrays:
        _add_array(digest, PROVENANCE, arrays[PROVENANCE])
    return digest.hexdigest()


def _add_array(digest: hashlib._Hash, name: str, array: Tensor) -> None:
    digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
    digest.update(array.contiguous().flatten().view(torch.uint8).numpy())
