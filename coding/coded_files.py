"""Coded factors on disk: folders of coded images, written and read.

As a folder of factors (factor_files) with the dtype "coded": manifest.json, written last, and
shards of 128 images, each whole or absent. Beside them stands the codec, without which nothing is
read: codec.safetensors, by its sha256 the one they were written with. A shard of n images holds

    streams [bytes] uint8      coded images end to end, as `Codec.encode` gives them
    offsets [n + 1] int64      image i is streams[offsets[i] : offsets[i + 1]]
    ranks [n] int64, steps [n] float64, and the errors of each image, [n] float64
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coding.codec import Codec
from common.errors import UserError
from common.files import atomic_path, save_tensors, sha256_file

CODED = "coded"
CODEC_FILE = "codec.safetensors"
CODED_ERRORS = ("rel_error", "rel_error_original")
WRITE_AGAIN = "write the factors again with factorize.py --overwrite"


class CodedImage(NamedTuple):
    """One image as it is stored."""

    data: bytes
    rank: int
    step: float
    errors: dict[str, float]  # CODED_ERRORS


def write_coded_shard(path: Path, images: list[CodedImage]) -> None:
    """Write one shard, whole or not at all."""
    sizes = torch.tensor([0, *(len(image.data) for image in images)])
    streams = torch.frombuffer(bytearray(b"".join(i.data for i in images)), dtype=torch.uint8)
    tensors = {
        "streams": streams,
        "offsets": sizes.cumsum(0),
        "ranks": torch.tensor([image.rank for image in images]),
        "steps": torch.tensor([image.step for image in images], dtype=torch.float64),
    }
    for name in CODED_ERRORS:
        tensors[name] = torch.tensor([i.errors[name] for i in images], dtype=torch.float64)
    save_tensors(path, tensors)


def copy_codec(source: Path, folder: Path) -> None:
    """Put the codec beside the shards that are written with it."""
    with atomic_path(folder / CODEC_FILE) as temporary:
        shutil.copyfile(source, temporary)


def read_codec(folder: Path, manifest: dict) -> Codec:
    """The codec of a finished folder. Raises UserError where it is missing or another one."""
    path = folder / CODEC_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: put the codec there that wrote the factors")
    if sha256_file(path) != manifest.get("codec_sha256"):
        raise UserError(
            f"{path} is another codec than the one that {folder} was written with, or damaged: "
            "put that one there"
        )
    return Codec.load(path)


class CodedShards:
    """Images of a finished folder by row; shards are memory-mapped when first asked for."""

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.codec = read_codec(self.folder, manifest)
        self._ends = torch.tensor([shard["rows"] for shard in manifest["shards"]]).cumsum(0)
        self._opened: dict[int, tuple] = {}

    def bytes_of(self, row: int) -> bytes:
        """The coded image of a row. Raises UserError for a row that is not there."""
        if not 0 <= row < self.manifest["count"]:
            raise UserError(
                f"row {row} is not in {self.folder}: type 0 to {self.manifest['count'] - 1}"
            )
        index = int(torch.searchsorted(self._ends, row, right=True))
        entry = self.manifest["shards"][index]
        if index not in self._opened:
            self._opened[index] = _open_shard(self.folder / entry["file"], entry["rows"])
        streams, offsets = self._opened[index]
        i = row - (int(self._ends[index]) - entry["rows"])
        return streams[int(offsets[i]) : int(offsets[i + 1])].numpy().tobytes()

    def factors(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [T, r], B [r, D], mean [T] and std [T] float32. Raises UserError where damaged."""
        return self._named(row, self.codec.factors)

    def tokens(self, row: int) -> Tensor:
        """Raw tokens [T, D] float32. Errors as `factors`."""
        return self._named(row, self.codec.decode)

    def _named(self, row: int, read):
        try:
            return read(self.bytes_of(row))
        except UserError as error:
            raise UserError(f"{self.folder}, row {row}: {error}") from None

    # memory maps do not pickle: a loader's worker process maps the shards for itself
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}


def _open_shard(path: Path, rows: int) -> tuple[object, Tensor]:
    """The streams, to be sliced, and the offsets of a shard."""
    try:
        shard = safe_open(path, framework="pt")
        offsets, streams = shard.get_tensor("offsets"), shard.get_slice("streams")
        size = streams.get_shape()
        fits = streams.get_dtype() == "U8" and offsets.dtype == torch.int64
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {WRITE_AGAIN}") from None
    rising = offsets.shape == (rows + 1,) and bool((offsets.diff() >= 0).all())
    if not (fits and rising and [int(offsets[-1])] == size and offsets[0] == 0):
        raise UserError(f"{path} is damaged (its offsets do not fit its streams): {WRITE_AGAIN}")
    return streams, offsets


def coded_images(
    folder: Path, manifest: dict, rows: list[int] | range
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A [T, r], B [r, D], mean [T] and std [T] float32 of each row."""
    shards = CodedShards(folder, manifest)
    yield from (shards.factors(row) for row in rows)
