"""Factors on disk: folders of A and B for every image of a feature cache, written and read.

    manifest.json                 written last: a folder without it is not finished
    factors-00000.safetensors     the factors of 128 images, in the cache's order of rows
    partial.json                  only while unfinished: what the folder was begun with

A shard of n images holds, at one fixed rank r,

    A [n, T, r]   B [n, r, D]     in the manifest's dtype: bfloat16, float32 or int8
    A_scale [n, r]   B_scale [n, r]                float32, int8 only: A = A · A_scale, column by
                                                   column, and B = B · B_scale, row by row
    mean [n, T]   std [n, T]      float32: what LayerNorm removed of each token

and at ranks that differ, r_i of image i, all components one after another, R = Σ r_i,

    A_columns [R, T]   B_rows [R, D]   A_scale [R]   B_scale [R]   ranks [n] int64

so that image i has those from Σ_{j<i} r_j on; row k of A_columns is a column of its A. Both hold
the errors of each image, [n] float64, as measured when it was written: `rel_error` of what is
stored, `rel_error_float32` before rounding to the dtype, and `rel_error_original`, ‖F − F̂‖ / ‖F‖
of the tokens F in the encoder's own units. Coded factors (dtype "coded"): see coded_files.

Tokens are A·B · std + mean. A shard is whole or absent and depends on no other: several processes
may each write some, an interrupted writer goes on with those that are missing, and the finished
folder is byte-identical to that of one uninterrupted process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coding.coded_files import (
    CODEC_FILE,
    CODED,
    CODED_ERRORS,
    CodedImage,
    coded_images,
    copy_codec,
    write_coded_shard,
)
from common.errors import UserError
from common.files import (
    check_files,
    check_keys,
    check_same_header,
    content_hash_fits,
    file_entry,
    read_json,
    save_tensors,
    sha256_file,
    sweep_temporaries,
    with_content_hash,
    write_json,
)
from features.cache_writer import ROWS_PER_SHARD
from qwenvl_dataloader import denormalise
from svd_baseline import Factors, summarise

FORMAT = 1
KIND = "factors"
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
ERRORS = ("rel_error", "rel_error_float32", "rel_error_original")
WRITE_AGAIN = "write the factors again with factorize.py --overwrite"
MANIFEST_KEYS = {
    **{"format": int, "dtype": str, "rank": (int, type(None)), "num_tokens": int},
    **{"feature_dim": int, "count": int, "shards": list},
}
SAFETENSORS_DTYPES = {"bf16": "BF16", "float32": "F32", "int8": "I8"}


# ------------------------------------------------------------------------------------------ values


class Stored(NamedTuple):
    """A [n, T, r] and B [n, r, D] as they are stored; scales [n, r] float32 for int8, else None."""

    a: Tensor
    b: Tensor
    a_scale: Tensor | None = None
    b_scale: Tensor | None = None


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
    """A [n, T, r] and B [n, r, D] float32 of what is stored."""
    a, b = stored.a.float(), stored.b.float()
    if stored.a_scale is None:
        return a, b
    return a * stored.a_scale.unsqueeze(-2), b * stored.b_scale.unsqueeze(-1)


# ----------------------------------------------------------------------------------------- writing


class FactorWriter:
    """Writes the shards of a folder of factors in any order, then the manifest.

    Args:
        folder: to write. A finished one in it is refused unless `overwrite`; a folder with another
            kind of manifest is always refused.
        header: what the factors depend on (checkpoint, cache, dtype, rank or target_error, T, D,
            count); an interrupted folder with another header is refused with both values.
    """

    def __init__(self, folder: str | Path, header: dict, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.header = {"format": FORMAT, "kind": KIND, **header}
        self.ranks_differ = header["rank"] is None
        self.errors = CODED_ERRORS if header["dtype"] == CODED else ERRORS
        self._refuse_other_folders(overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()
        sweep_temporaries(self.folder)
        partial = self.folder / "partial.json"
        if not partial.exists():
            write_json(partial, self.header)
        for path in self.folder.glob("factors-*.safetensors"):
            _open(path, "start again with --overwrite")

    def put_codec(self, path: Path) -> None:
        """Copy the codec beside the shards, where it is not yet."""
        copy_codec(path, self.folder)

    def rows_of(self, shard: int) -> range:
        """Rows of the cache that belong to a shard."""
        first = shard * ROWS_PER_SHARD
        return range(first, min(first + ROWS_PER_SHARD, self.header["count"]))

    def shards_to_do(self) -> list[int]:
        """Shards that are not on disk yet, lowest first."""
        every = range(-(-self.header["count"] // ROWS_PER_SHARD))
        return [shard for shard in every if not self._shard_path(shard).exists()]

    @property
    def rows_done(self) -> int:
        left = sum(len(self.rows_of(shard)) for shard in self.shards_to_do())
        return self.header["count"] - left

    def write_shard(
        self,
        shard: int,
        stored: list[Stored],
        mean: Tensor,
        std: Tensor,
        errors: dict[str, Tensor],
    ) -> None:
        """Write one shard: one `Stored` per image (n = 1 each), already cut to its rank.

        mean, std [n, T, 1] float32 as `normalise` gives them; errors: ERRORS → [n] float64.
        """
        tensors = _ragged(stored) if self.ranks_differ else _stacked(stored)
        tensors |= {"mean": mean.squeeze(-1), "std": std.squeeze(-1), **errors}
        path = self._shard_path(shard)
        save_tensors(path, {name: t.cpu().contiguous() for name, t in tensors.items()})

    def write_coded(self, shard: int, images: list[CodedImage]) -> None:
        """Write one shard of coded images."""
        write_coded_shard(self._shard_path(shard), images)

    def finish(self) -> dict:
        """Write the manifest, which commits the folder, once every shard is there; return it."""
        shards = range(-(-self.header["count"] // ROWS_PER_SHARD))
        paths = {self._shard_path(shard): len(self.rows_of(shard)) for shard in shards}
        errors, ranks = {name: [] for name in self.errors}, []
        for path, rows in paths.items():
            with _open(path, WRITE_AGAIN) as shard:
                for name in self.errors:
                    errors[name].append(shard.get_tensor(name))
                if self.ranks_differ:
                    ranks.append(shard.get_tensor("ranks"))
                else:
                    ranks.append(torch.full((rows,), self.header["rank"]))
        ranks = torch.cat(ranks)
        manifest = {
            **self.header,
            "shards": [{**file_entry(path), "rows": rows} for path, rows in paths.items()],
            "ranks": {
                **summarise(ranks.double()),
                "min": int(ranks.min()),
                "max": int(ranks.max()),
            },
            "errors": {name: summarise(torch.cat(values)) for name, values in errors.items()},
        }
        manifest = with_content_hash(manifest)
        write_json(self.folder / "manifest.json", manifest)
        (self.folder / "partial.json").unlink()
        return manifest

    def _refuse_other_folders(self, overwrite: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is a file: type the name of a folder")
        for name in ("manifest.json", "partial.json"):
            path = self.folder / name
            if not path.exists():
                continue
            found = read_json(path, "type another --out, or remove it")
            if not isinstance(found, dict) or found.get("kind") != KIND:
                raise UserError(f"--out {self.folder} holds something else: type another --out")
            if name == "partial.json" and not overwrite:
                check_same_header(f"--out {self.folder}", found, self.header)
            if name == "manifest.json" and not overwrite:
                # a run killed after its manifest has left it behind
                (self.folder / "partial.json").unlink(missing_ok=True)
                sweep_temporaries(self.folder)
                raise UserError(
                    f"--out {self.folder} holds finished factors: use them, type another --out, or "
                    "--overwrite to replace them"
                )
        if not (self.folder / "partial.json").exists() and not overwrite:
            if any(self.folder.glob("factors-*.safetensors")):
                raise UserError(
                    f"{self.folder}/partial.json is missing: start again with --overwrite"
                )

    def _clear(self) -> None:
        # the manifest goes first: a half-removed folder must not look like a whole one
        for pattern in ("manifest.json", "partial.json", "factors-*.safetensors", CODEC_FILE):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _shard_path(self, index: int) -> Path:
        return self.folder / f"factors-{index:05d}.safetensors"


def _stacked(stored: list[Stored]) -> dict[str, Tensor]:
    tensors = {"A": torch.cat([s.a for s in stored]), "B": torch.cat([s.b for s in stored])}
    if stored[0].a_scale is not None:
        tensors["A_scale"] = torch.cat([s.a_scale for s in stored])
        tensors["B_scale"] = torch.cat([s.b_scale for s in stored])
    return tensors


def _ragged(stored: list[Stored]) -> dict[str, Tensor]:
    tensors = {
        "A_columns": torch.cat([s.a[0].mT for s in stored]),
        "B_rows": torch.cat([s.b[0] for s in stored]),
        "ranks": torch.tensor([s.b.shape[1] for s in stored]),
    }
    if stored[0].a_scale is not None:
        tensors["A_scale"] = torch.cat([s.a_scale[0] for s in stored])
        tensors["B_scale"] = torch.cat([s.b_scale[0] for s in stored])
    return tensors


# ----------------------------------------------------------------------------------------- reading


class StoredImages(NamedTuple):
    """Factors of n images, float32, with what turns X_hat = A·B into tokens again."""

    a: Tensor  # [n, T, r]; r is the largest of the ranks, columns after an image's own are zero
    b: Tensor  # [n, r, D]; likewise rows
    mean: Tensor  # [n, T, 1]
    std: Tensor  # [n, T, 1]
    ranks: Tensor  # [n] int64


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a finished folder of factors.

    Raises UserError where the folder is missing, unfinished or something else, or where a file of
    it is missing or has another size. sha256 of each file is there for `sha256sum`.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    unfinished = (folder / "partial.json").exists()
    manifest = read_json(
        path,
        "factorize.py was interrupted, run the same command to finish it"
        if unfinished
        else "name a folder that factorize.py wrote",
    )
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{path} is not of factors: name a folder that factorize.py wrote")
    check_keys(path, manifest, MANIFEST_KEYS, WRITE_AGAIN)
    if manifest["format"] != FORMAT or manifest["dtype"] not in {*DTYPES, CODED}:
        raise UserError(
            f"{path} has format {manifest['format']} and dtype {manifest['dtype']}, this version "
            f"reads format {FORMAT} and {', '.join(DTYPES)}: {WRITE_AGAIN}"
        )
    check_files(path, manifest["shards"], WRITE_AGAIN)
    for shard in manifest["shards"]:
        check_keys(path, shard, {"rows": int}, WRITE_AGAIN)
    if sum(shard["rows"] for shard in manifest["shards"]) != manifest["count"]:
        raise UserError(f"{path}: the shards' rows do not add up to its count: {WRITE_AGAIN}")
    return manifest


def damaged_files(folder: str | Path) -> list[str]:
    """Names of the files that are not as they were written, by their sha256; all are read whole.

    Errors as `read_manifest`.
    """
    manifest = read_manifest(folder)
    bad = [
        s["file"] for s in manifest["shards"] if sha256_file(Path(folder, s["file"])) != s["sha256"]
    ]
    if manifest["dtype"] == CODED:
        codec = Path(folder, CODEC_FILE)
        if not codec.is_file() or sha256_file(codec) != manifest.get("codec_sha256"):
            bad.append(CODEC_FILE)
    return bad + ["manifest.json"] * (not content_hash_fits(manifest))


def read_factors(folder: str | Path, rows: list[int] | range | None = None) -> StoredImages:
    """A, B, mean and std of `rows` of the cache, in that order; default all.

    Raises UserError as `read_manifest` does, for a row that is not there, and for a damaged shard.
    """
    manifest = read_manifest(folder)
    rows = range(manifest["count"]) if rows is None else [int(row) for row in rows]
    images = list(_images(Path(folder), manifest, rows))
    ranks = torch.tensor([b.shape[0] for _, b, _, _ in images], dtype=torch.int64)
    most = int(ranks.max()) if images else 0
    tokens, width = manifest["num_tokens"], manifest["feature_dim"]
    a, b = torch.zeros(len(images), tokens, most), torch.zeros(len(images), most, width)
    mean, std = torch.empty(len(images), tokens, 1), torch.empty(len(images), tokens, 1)
    for i, (a_i, b_i, mean_i, std_i) in enumerate(images):
        a[i, :, : len(b_i)], b[i, : len(b_i)] = a_i, b_i
        mean[i, :, 0], std[i, :, 0] = mean_i, std_i
    return StoredImages(a, b, mean, std, ranks)


def load_factors(folder: str | Path, rows: list[int] | range | None = None) -> Tensor:
    """Tokens in the encoder's own units, A·B · std + mean, of `rows` (default all) of the cache.

    Returns: [n, T, D] float32, 4·T·D bytes an image: name rows where all of them are too many.
    Errors as `read_factors`.
    """
    manifest = read_manifest(folder)
    rows = range(manifest["count"]) if rows is None else [int(row) for row in rows]
    tokens = torch.empty(len(rows), manifest["num_tokens"], manifest["feature_dim"])
    # one image at a time: factors and tokens together never take twice the room
    for i, (a, b, mean, std) in enumerate(_images(Path(folder), manifest, rows)):
        tokens[i] = denormalise(a @ b, mean.unsqueeze(-1), std.unsqueeze(-1))
    return tokens


def _images(
    folder: Path, manifest: dict, rows: list[int] | range
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A [T, r], B [r, D], mean [T] and std [T] float32 of each row, coded or not."""
    read = coded_images if manifest["dtype"] == CODED else _read_images
    return read(folder, manifest, rows)


def _read_images(
    folder: Path, manifest: dict, rows: list[int] | range
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A [T, r], B [r, D], mean [T] and std [T] float32 of each row."""
    ends = torch.tensor([shard["rows"] for shard in manifest["shards"]]).cumsum(0)
    opened: dict[int, tuple] = {}
    for row in rows:
        if not 0 <= row < manifest["count"]:
            raise UserError(f"row {row} is not in {folder}: type 0 to {manifest['count'] - 1}")
        index = int(torch.searchsorted(ends, row, right=True))
        entry = manifest["shards"][index]
        if index not in opened:
            opened[index] = _checked_shard(folder / entry["file"], manifest, entry["rows"])
        shard, starts = opened[index]
        i = row - (int(ends[index]) - entry["rows"])
        if starts is None:
            names, at = ("A", "B"), i
        else:
            names, at = ("A_columns", "B_rows"), slice(int(starts[i]), int(starts[i + 1]))
        a, b = (shard.get_slice(name)[at] for name in names)
        a = a if starts is None else a.mT
        scales = []
        if manifest["dtype"] == "int8":
            scales = [shard.get_slice(name)[at][None] for name in ("A_scale", "B_scale")]
        a, b = restore(Stored(a[None], b[None], *scales))
        yield a[0], b[0], shard.get_slice("mean")[i], shard.get_slice("std")[i]


def _checked_shard(path: Path, manifest: dict, rows: int) -> tuple[object, Tensor | None]:
    """A shard opened, its shapes as the manifest says; where ranks differ also the first component
    of each image, and the number of components, [rows + 1]."""
    shard = _open(path, WRITE_AGAIN)
    tokens, width, rank = (manifest[key] for key in ("num_tokens", "feature_dim", "rank"))
    expected = {"mean": [rows, tokens], "std": [rows, tokens]}
    starts = None
    try:
        if rank is not None:
            expected |= {"A": [rows, tokens, rank], "B": [rows, rank, width]}
            scales = [rows, rank]
        else:
            ranks = shard.get_tensor("ranks")
            starts = torch.cat([ranks.new_zeros(1), ranks.cumsum(0)])
            total = int(starts[-1])
            expected |= {"ranks": [rows], "A_columns": [total, tokens], "B_rows": [total, width]}
            scales = [total]
        if manifest["dtype"] == "int8":
            expected |= {"A_scale": scales, "B_scale": scales}
        found = {name: shard.get_slice(name).get_shape() for name in expected}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): {WRITE_AGAIN}") from None
    dtypes = dict.fromkeys(expected, "F32") | {"ranks": "I64"}
    dtypes |= dict.fromkeys(
        ("A", "B", "A_columns", "B_rows"), SAFETENSORS_DTYPES[manifest["dtype"]]
    )
    for name in expected:
        if (dtype := shard.get_slice(name).get_dtype()) != dtypes[name]:
            raise UserError(
                f"{path} holds {name} as {dtype}, its manifest says {dtypes[name]}: {WRITE_AGAIN}"
            )
        if found[name] != expected[name]:
            raise UserError(
                f"{path} holds {name} {found[name]}, its manifest says {expected[name]}: "
                f"{WRITE_AGAIN}"
            )
    return shard, starts


def _open(path: Path, remedy: str):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
