"""Factors on disk: folders of A and B for every image of a feature cache, written and read.

    manifest.json                 written last: a folder without it is not finished
    factors-00000.safetensors     the factors of 128 images, in the cache's order of rows
    partial.json                  only while unfinished: what the folder was begun with

Image i of the n of a shard has T_i tokens and r_i components; all components of a shard, and all
tokens, stand one after another in the images' order:

    A_columns [Σ r_i T_i]   B_rows [Σ r_i, D]    in the manifest's dtype: bfloat16, float32 or int8;
                                                 a column of an A, T_i numbers, after another
    A_scale [Σ r_i]   B_scale [Σ r_i]            float32, int8 only: A = A · A_scale, column by
                                                 column, and B = B · B_scale, row by row
    mean [Σ T_i]   std [Σ T_i]                   float32: what LayerNorm removed of each token
    ranks [n] int64   grids [n, 2] int32         r_i, and rows and columns of the tokens

and the errors of each image, [n] float64, as measured when it was written: `rel_error` of what is
stored, `rel_error_float32` before rounding to the dtype, and `rel_error_original`, ‖F − F̂‖ / ‖F‖
of the tokens F in the encoder's own units. Tokens are A·B · std + mean.

A folder of coded tokens (dtype "coded") holds codec.safetensors beside its shards, by its sha256
the one that they were written with. Without it nothing is read. A shard of n images holds

    streams [bytes] uint8      coded images end to end, as `Codec.encode` gives them
    offsets [n + 1] int64      image i is streams[offsets[i] : offsets[i + 1]]
    ranks [n] int64, steps [n] float64, and the errors of each image, [n] float64

The grid of an image and the form of its stream are in the stream. `shards` says how such folders
are begun, gone on with and finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lowrank_tokens.codec import Codec, CodedImage, ImageFactors
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    atomic_path,
    check_keys,
    check_tensors,
    content_hash_fits,
    load_tensors,
    save_tensors,
    sha256_file,
)
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import Factors, denormalise
from lowrank_tokens.shards import ShardReader, ShardWriter, check_shards, read_finished
from lowrank_tokens.stream import TRANSFORM, grid_of
from lowrank_tokens.token_dataset import Rows, TokenDataset, check_one_grid, row_numbers

FACTORS_FORMAT = 1
KIND = "factors"
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
ERRORS = ("rel_error", "rel_error_float32", "rel_error_original")
WRITE_AGAIN = "write the factors again (in the checkout: factorize.py --overwrite)"
MANIFEST_KEYS = {
    **{"format": int, "dtype": str, "rank": (int, type(None)), "num_tokens": int},
    **{"feature_dim": int, "count": int, "shards": list},
}


# ------------------------------------------------------------------------------------------ values


class Stored(NamedTuple):
    """A [..., T, r] and B [..., r, D] as they are stored; scales [..., r] float32 for int8."""

    a: Tensor
    b: Tensor
    a_scale: Tensor | None = None
    b_scale: Tensor | None = None


class StoredImage(NamedTuple):
    """One image as it is written."""

    stored: Stored  # without a dimension of images
    grid: Grid
    mean: Tensor  # [T, 1] float32, as `normalise` gives it
    std: Tensor
    errors: dict[str, float]  # ERRORS


def store(a: Tensor, b: Tensor, dtype: str) -> Stored:
    """Round a [n, T, r] and b [n, r, D] float32 to a dtype of DTYPES.

    int8 is symmetric, with one scale per column of A and row of B: s = max|v| / 127, v ≈ s · q,
    |v − s q| ≤ s / 2. Components do not mix, so leaving some out changes nothing of the others.
    """
    if dtype != "int8":
        return Stored(a.to(DTYPES[dtype]), b.to(DTYPES[dtype]))
    a_scale, b_scale = a.abs().amax(-2) / 127, b.abs().amax(-1) / 127
    tiny = torch.finfo(torch.float32).tiny  # a column of zeros has scale 0
    q_a = (a / a_scale.clamp_min(tiny).unsqueeze(-2)).round().to(torch.int8)
    q_b = (b / b_scale.clamp_min(tiny).unsqueeze(-1)).round().to(torch.int8)
    return Stored(q_a, q_b, a_scale, b_scale)


def restore(stored: Stored) -> Factors:
    """Return A [n, T, r] and B [n, r, D] float32 of what is stored."""
    a, b = stored.a.float(), stored.b.float()
    if stored.a_scale is None:
        return a, b
    return a * stored.a_scale.unsqueeze(-2), b * stored.b_scale.unsqueeze(-1)


# ---------------------------------------------------------------------------------- coded images

CODED = "coded"
CODEC_FILE = "codec.safetensors"
CODED_ERRORS = ("rel_error", "rel_error_original")

T = TypeVar("T")


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


# open folders of one codec share it: it is megabytes
_CODECS: WeakValueDictionary[str, Codec] = WeakValueDictionary()


def read_codec(folder: Path, manifest: dict) -> Codec:
    """Return the codec of a finished folder, the same object for all folders that it wrote.

    Raises InputError where it is missing or another one.
    """
    path = folder / CODEC_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: put the codec there that wrote the factors")
    sha256 = sha256_file(path)
    if sha256 != manifest.get("codec_sha256"):
        raise InputError(
            f"{path} is another codec than the one that {folder} was written with, or damaged: "
            "put that one there"
        )
    codec = _CODECS.get(sha256)
    if codec is None:
        codec = _CODECS[sha256] = Codec.load(path)
    return codec


class CodedShards(ShardReader):
    """Images of a finished folder of coded tokens, by row."""

    def __init__(self, folder: str | Path, manifest: dict) -> None:
        super().__init__(folder, manifest)
        self.codec = read_codec(self.folder, manifest)

    def __getstate__(self) -> dict:
        """Leave the codec out: a worker process reads it from the folder."""
        state = super().__getstate__()
        del state["codec"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.codec = read_codec(self.folder, self.manifest)

    @property
    def feature_dim(self) -> int:
        """Return D."""
        return self.codec.feature_dim

    def open(self, path: Path, rows: int) -> tuple[Tensor, list[int]]:
        """Read the streams and the offsets of a shard."""
        tensors = load_tensors(path, WRITE_AGAIN)
        check_tensors(path, tensors, {"offsets": (rows + 1, torch.int64)}, WRITE_AGAIN)
        offsets = tensors["offsets"]
        if offsets[0] != 0 or not (offsets.diff() >= 0).all():
            raise InputError(f"{path} is damaged (its offsets do not rise from 0): {WRITE_AGAIN}")
        sizes = {"streams": (int(offsets[-1]), torch.uint8)}
        check_tensors(path, tensors, sizes, WRITE_AGAIN)
        return tensors["streams"], offsets.tolist()

    def bytes_of(self, row: int) -> bytes:
        """Return the coded image of a row. Raises InputError for a row that is not there."""
        (streams, offsets), i = self.find(row)
        return streams[offsets[i] : offsets[i + 1]].numpy().tobytes()

    def grid(self, row: int) -> Grid:
        """Return rows and columns of an image's tokens. Errors as `factors`."""
        return self._named(row, grid_of)

    def factors(self, row: int) -> ImageFactors:
        """Return the factors of an image. Raises InputError where they are damaged."""
        return self._named(row, self.codec.factors)

    def tokens(self, row: int) -> Tensor:
        """Return raw tokens [T, D] float32. Errors as `factors`."""
        return self._named(row, self.codec.decode)

    def tokens_of(self, rows: list[int]) -> list[Tensor]:
        """Return raw tokens of several rows, decoded together. Errors as `factors`."""
        try:
            return self.codec.decode_batch([self.bytes_of(row) for row in rows])
        except InputError:
            return [self.tokens(row) for row in rows]  # names the row

    def _named(self, row: int, read: Callable[[bytes], T]) -> T:
        try:
            return read(self.bytes_of(row))
        except InputError as error:
            raise InputError(f"{self.folder}, row {row}: {error}") from None


# ----------------------------------------------------------------------------------------- writing


class FactorWriter(ShardWriter):
    """Writes the shards of a folder of factors in any order, then the manifest.

    Args: as ShardWriter; header: what the factors depend on (checkpoint, cache, dtype, rank or
    target_error, grid, T, D, count).
    """

    kinds = (KIND,)
    commit, others = "factors-{:05d}.json", ("factors-*.safetensors", CODEC_FILE)

    def __init__(
        self, folder: str | Path, header: dict, overwrite: bool = False, most_tokens: int = 1
    ) -> None:
        header = {"format": FACTORS_FORMAT, "kind": KIND, **header}
        super().__init__(folder, header, header["count"], overwrite, most_tokens=most_tokens)
        self.errors = CODED_ERRORS if header["dtype"] == CODED else ERRORS

    def what(self, manifest: dict) -> str:
        return "a finished folder of factors"

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"factors-{shard:05d}.safetensors"

    def check_shard(self, path: Path) -> None:
        self.committed_file(path)

    def write_shard(self, shard: int, images: list[StoredImage]) -> None:
        """Write one shard."""
        stored = [image.stored for image in images]
        tensors = {
            "A_columns": torch.cat([s.a.mT.flatten() for s in stored]),
            "B_rows": torch.cat([s.b for s in stored]),
            "mean": torch.cat([image.mean.flatten() for image in images]),
            "std": torch.cat([image.std.flatten() for image in images]),
            "ranks": torch.tensor([len(s.b) for s in stored]),
            "grids": torch.tensor([image.grid for image in images], dtype=torch.int32),
        }
        if stored[0].a_scale is not None:
            tensors["A_scale"] = torch.cat([s.a_scale for s in stored])
            tensors["B_scale"] = torch.cat([s.b_scale for s in stored])
        for name in ERRORS:
            tensors[name] = torch.tensor([i.errors[name] for i in images], dtype=torch.float64)
        save_tensors(self.shard_path(shard), tensors)
        self.commit_file(shard, self.shard_path(shard))

    def write_coded(self, shard: int, images: list[CodedImage]) -> None:
        """Write one shard of coded images."""
        write_coded_shard(self.shard_path(shard), images)
        self.commit_file(shard, self.shard_path(shard))

    def finish(self) -> dict:
        """Write the manifest, which commits the folder, once every shard is there; return it."""
        entries = [self.committed_file(self.commit_path(shard)) for shard in self.shards]
        tensors = [load_tensors(self.shard_path(shard), WRITE_AGAIN) for shard in self.shards]
        ranks = torch.cat([t["ranks"] for t in tensors])
        rows = map(self.rows_of, self.shards)
        manifest = {
            **self.header,
            "shards": [{**e, "rows": len(own)} for e, own in zip(entries, rows, strict=True)],
            "ranks": summarise(ranks.double()) | {"min": int(ranks.min()), "max": int(ranks.max())},
            "errors": {
                name: summarise(torch.cat([t[name] for t in tensors])) for name in self.errors
            },
        }
        return self.seal(manifest)


# ----------------------------------------------------------------------------------------- reading


class StoredImages(NamedTuple):
    """Factors of n images, float32, with what turns X_hat = A·B into tokens again."""

    a: Tensor  # [n, T, r]; r is the largest of the ranks, columns after an image's own are zero
    b: Tensor  # [n, r, D]; likewise rows
    mean: Tensor  # [n, T, 1]
    std: Tensor  # [n, T, 1]
    ranks: Tensor  # [n] int64


def read_factors_manifest(folder: str | Path) -> dict:
    """Read the manifest of a finished folder of factors.

    Raises InputError where the folder is missing, unfinished or something else, or where a file of
    it is missing or has another size. sha256 of each file is there for `sha256sum`.
    """
    again = "its writing was interrupted, run the same command to finish it"
    path, manifest = read_finished(Path(folder), again, "name a folder of factors")
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{path} is not of factors: name a folder of factors")
    check_keys(path, manifest, MANIFEST_KEYS, WRITE_AGAIN)
    if manifest["format"] != FACTORS_FORMAT or manifest["dtype"] not in {*DTYPES, CODED}:
        raise InputError(
            f"{path} has format {manifest['format']} and dtype {manifest['dtype']}, this version "
            f"reads format {FACTORS_FORMAT} and {', '.join([*DTYPES, CODED])}: {WRITE_AGAIN}"
        )
    check_shards(path, manifest, WRITE_AGAIN)
    return manifest


def damaged_files(folder: str | Path) -> list[str]:
    """List the files that are not as they were written, by their sha256; all are read whole.

    Errors as `read_factors_manifest`.
    """
    manifest = read_factors_manifest(folder)
    bad = [
        s["file"] for s in manifest["shards"] if sha256_file(Path(folder, s["file"])) != s["sha256"]
    ]
    if manifest["dtype"] == CODED:
        codec = Path(folder, CODEC_FILE)
        if not codec.is_file() or sha256_file(codec) != manifest.get("codec_sha256"):
            bad.append(CODEC_FILE)
    return bad + ["manifest.json"] * (not content_hash_fits(manifest))


class FactorShards(ShardReader):
    """Images of a finished folder of factors that are not coded, by row."""

    @property
    def feature_dim(self) -> int:
        """Return D."""
        return self.manifest["feature_dim"]

    def open(self, path: Path, rows: int) -> tuple[dict[str, Tensor], list[Grid], list, list, list]:
        """Read tensors and grids, and where each image's tokens, components and numbers begin."""
        tensors = load_tensors(path, WRITE_AGAIN)
        sizes = {"ranks": (rows, torch.int64), "grids": (rows, 2, torch.int32)}
        check_tensors(path, tensors, sizes, WRITE_AGAIN)
        ranks, grids = tensors["ranks"].tolist(), list(map(tuple, tensors["grids"].tolist()))
        if min(ranks) < 0 or min(map(min, grids)) < 1:
            raise InputError(f"{path} is damaged (its ranks or grids are below 0): {WRITE_AGAIN}")
        tokens = [h * w for h, w in grids]
        numbers = [r * t for r, t in zip(ranks, tokens, strict=True)]
        starts = [[0, *accumulate(sizes)] for sizes in (tokens, ranks, numbers)]
        total_tokens, total_ranks, total_numbers = (s[-1] for s in starts)
        dtype = DTYPES[self.manifest["dtype"]]
        sizes = {
            "A_columns": (total_numbers, dtype),
            "B_rows": (total_ranks, self.manifest["feature_dim"], dtype),
            "mean": (total_tokens, torch.float32),
            "std": (total_tokens, torch.float32),
        }
        if self.manifest["dtype"] == "int8":
            sizes |= dict.fromkeys(("A_scale", "B_scale"), (total_ranks, torch.float32))
        check_tensors(path, tensors, sizes, WRITE_AGAIN)
        return tensors, grids, *starts

    def grid(self, row: int) -> Grid:
        """Return rows and columns of an image's tokens."""
        (_, grids, *_), i = self.find(row)
        return grids[i]

    def factors(self, row: int) -> ImageFactors:
        """Return the factors of an image."""
        (tensors, _, *starts), i = self.find(row)
        tokens, components, numbers = (slice(s[i], s[i + 1]) for s in starts)
        b, mean = tensors["B_rows"][components], tensors["mean"][tokens]
        a = tensors["A_columns"][numbers].view(len(b), len(mean)).mT
        scales = (tensors[n][components] for n in ("A_scale", "B_scale") if n in tensors)
        return ImageFactors(*restore(Stored(a, b, *scales)), mean, tensors["std"][tokens])

    def tokens(self, row: int) -> Tensor:
        """Return raw tokens [T, D] float32."""
        a, b, mean, std = self.factors(row)
        return denormalise(a @ b, mean.unsqueeze(-1), std.unsqueeze(-1))

    def tokens_of(self, rows: list[int]) -> list[Tensor]:
        """Return raw tokens of several rows."""
        return [self.tokens(row) for row in rows]


def open_shards(folder: str | Path, manifest: dict) -> FactorShards | CodedShards:
    """Open the images of a finished folder by row: grid, factors and tokens; coded or not."""
    return (CodedShards if manifest["dtype"] == CODED else FactorShards)(folder, manifest)


def read_factors(folder: str | Path, rows: Rows | None = None) -> StoredImages:
    """Read A, B, mean and std of `rows` of the cache, in that order; default all.

    rows: a list, a slice, an array or a mask, as `FeatureCache` takes them.

    Of coded tokens they are as `Codec.clean` gives them: extreme entries are put back by
    `load_factors` alone. Raises InputError as `read_factors_manifest` does, for a damaged shard,
    for rows of more than one grid, and for coded tokens of the form `transform`, which have no
    factors; IndexError for a row that is not there.
    """
    if read_factors_manifest(folder).get("form") == TRANSFORM:
        raise InputError(
            f"{folder} holds coded tokens of the form transform, which have no factors A and B: "
            "read tokens with lowrank_tokens.load_factors or VisionTokens"
        )
    shards, rows, grid = _rows_of_one_grid(folder, rows)
    images = [shards.factors(row) for row in rows]
    ranks = torch.tensor([len(b) for _, b, _, _ in images], dtype=torch.int64)
    tokens, most = grid[0] * grid[1], int(ranks.max()) if images else 0
    a = torch.zeros(len(images), tokens, most)
    b = torch.zeros(len(images), most, shards.feature_dim)
    mean, std = torch.empty(len(images), tokens, 1), torch.empty(len(images), tokens, 1)
    for i, (a_i, b_i, mean_i, std_i) in enumerate(images):
        a[i, :, : len(b_i)], b[i, : len(b_i)] = a_i, b_i
        mean[i, :, 0], std[i, :, 0] = mean_i, std_i
    return StoredImages(a, b, mean, std, ranks)


def load_factors(folder: str | Path, rows: Rows | None = None) -> Tensor:
    """Read tokens in the encoder's own units, A·B · std + mean, of `rows` (default all).

    Returns: [n, T, D] float32, 4·T·D bytes an image: name rows where all of them are too many.
    Errors as `read_factors`.
    """
    shards, rows, grid = _rows_of_one_grid(folder, rows)
    tokens = torch.empty(len(rows), grid[0] * grid[1], shards.feature_dim)
    # one image at a time: factors and tokens together never take twice the room
    for i, row in enumerate(rows):
        tokens[i] = shards.tokens(row)
    return tokens


def _rows_of_one_grid(
    folder: str | Path, rows: Rows | None
) -> tuple[FactorShards | CodedShards, list[int], Grid]:
    """Open a folder; return its reader, the rows, and their one grid."""
    manifest = read_factors_manifest(folder)
    shards = open_shards(folder, manifest)
    rows = row_numbers(slice(None) if rows is None else rows, manifest["count"], shards.folder)
    if isinstance(rows, int):
        raise TypeError(f"rows = {rows} is one row: give a list, such as [{rows}]")
    grids = [shards.grid(row) for row in rows] or [(manifest["num_tokens"], 1)]
    remedy = f'read them one by one with lowrank_tokens.VisionTokens("{folder}")'
    check_one_grid(grids, shards.folder, remedy)
    return shards, rows, grids[0]


class VisionTokens(TokenDataset):
    """Raw tokens of a folder of factors, coded or not: `tokens[row]` is [T, D] float32.

        tokens = VisionTokens("factors/exact")
        loader = DataLoader(tokens, batch_size=64, shuffle=True, num_workers=4)  # [64, T, D]

    Random access, in DataLoader's worker processes too, forked or spawned; it pickles. Rows are
    those of the cache that was factored, and are asked for as `FeatureCache`'s. Many open folders
    of one codec share it. Args as TokenDataset's; errors as `read_factors`.
    """

    def __init__(self, folder: str | Path, *, lists: bool = False) -> None:
        super().__init__(folder, lists)
        self._shards = open_shards(self.folder, read_factors_manifest(folder))

    def __len__(self) -> int:
        return self._shards.manifest["count"]

    def grid_of(self, row: int) -> Grid:
        return self._shards.grid(row_numbers(row, len(self), self.folder))

    def read(self, rows: list[int]) -> list[Tensor] | Tensor:
        if not rows:
            return torch.empty(0, self._shards.manifest["num_tokens"], self._shards.feature_dim)
        return self._shards.tokens_of(rows)
