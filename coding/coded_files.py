"""Coded factors on disk: folders of coded images, written and read.

As a folder of factors (factor_files) with the dtype "coded": manifest.json, written last, and
shards of 128 images, each whole or absent. Beside them stands the codec, without which nothing is
read: codec.safetensors, by its sha256 the one they were written with. A shard of n images holds

    streams [bytes] uint8      coded images end to end, as `Codec.encode` gives them
    offsets [n + 1] int64      image i is streams[offsets[i] : offsets[i + 1]]
    ranks [n] int64, steps [n] float64, and the errors of each image, [n] float64

The grid of an image is in its stream. Formats 1 and 2 of the folder differ in nothing here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from coding.codec import Codec, grid_of
from common.errors import UserError
from common.files import atomic_path, check_tensors, load_tensors, save_tensors, sha256_file
from common.grids import Grid
from common.shard_folder import ShardReader

CODED = "coded"
CODEC_FILE = "codec.safetensors"
CODED_ERRORS = ("rel_error", "rel_error_original")
WRITE_AGAIN = "write the factors again with factorize.py --overwrite"

Image = tuple[Tensor, Tensor, Tensor, Tensor]  # A [T, r], B [r, D], mean [T] and std [T] float32
T = TypeVar("T")


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


class CodedShards(ShardReader):
    """Images of a finished folder of coded factors, by row."""

    def __init__(self, folder: str | Path, manifest: dict) -> None:
        super().__init__(folder, manifest)
        self.codec = read_codec(self.folder, manifest)
        self.feature_dim = self.codec.feature_dim

    def open(self, path: Path, rows: int) -> tuple[Tensor, list[int]]:
        """The streams and the offsets of a shard."""
        tensors = load_tensors(path, WRITE_AGAIN)
        check_tensors(path, tensors, {"offsets": (rows + 1, torch.int64)}, WRITE_AGAIN)
        offsets = tensors["offsets"]
        if offsets[0] != 0 or not (offsets.diff() >= 0).all():
            raise UserError(f"{path} is damaged (its offsets do not rise from 0): {WRITE_AGAIN}")
        sizes = {"streams": (int(offsets[-1]), torch.uint8)}
        check_tensors(path, tensors, sizes, WRITE_AGAIN)
        return tensors["streams"], offsets.tolist()

    def bytes_of(self, row: int) -> bytes:
        """The coded image of a row. Raises UserError for a row that is not there."""
        (streams, offsets), i = self.find(row)
        return streams[offsets[i] : offsets[i + 1]].numpy().tobytes()

    def grid(self, row: int) -> Grid:
        """Rows and columns of an image's tokens. Errors as `factors`."""
        return self._named(row, grid_of)

    def factors(self, row: int) -> Image:
        """A [T, r], B [r, D], mean [T] and std [T] float32. Raises UserError where damaged."""
        return self._named(row, self.codec.factors)

    def tokens(self, row: int) -> Tensor:
        """Raw tokens [T, D] float32. Errors as `factors`."""
        return self._named(row, self.codec.decode)

    def _named(self, row: int, read: Callable[[bytes], T]) -> T:
        try:
            return read(self.bytes_of(row))
        except UserError as error:
            raise UserError(f"{self.folder}, row {row}: {error}") from None
