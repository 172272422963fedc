"""Writes feature caches (the format of qwenvl_dataloader): shard by shard, resumable, atomic.

A shard holds the readable images of 128 consecutive rows of the data set (fewer where images have
many tokens), so that shards do not depend on each other and several processes may each write some.
A shard is committed by its row fragment (`part-00000.parquet`), which is written after it; the
cache is committed by `manifest.json`, written last. An interrupted writer goes on with the shards
that are missing, and the finished cache is byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lowrank_tokens.cache import FORMAT
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    atomic_path,
    check_files,
    check_keys,
    file_entry,
    load_tensors,
    read_json,
    save_tensors,
)
from lowrank_tokens.grids import Grid, most_frequent
from lowrank_tokens.linalg import LARGEST_FEATURE, exact_singular_values, normalise, usable_features
from lowrank_tokens.shards import ShardWriter, finished_words

ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),  # row of the data set, counting unreadable images too
        ("group", pa.string()),  # rows of one group are never on two sides of the split
        ("image_sha256", pa.string()),  # null where features were imported
        ("path", pa.string()),  # the image's or the features' file, as the data set names it
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("bbox", pa.list_(pa.float64())),  # x, y, w, h in pixels of the original image
        ("width", pa.int32()),  # of the original image
        ("height", pa.int32()),
        ("grid_rows", pa.int32()),  # of its tokens, which are their product
        ("grid_columns", pa.int32()),
        ("thumbnail", pa.binary()),  # JPEG of what the encoder saw
    ]
)
# keys of a part's metadata, JSON
SHARD_ENTRY = b"shard"  # `file_entry` of its shard, null where no image is readable
SKIPPED = b"skipped"  # {"row_id", "reason"} of the rows that are not
NOTES = b"notes"  # {"row_id", "note"} of rows whose values were changed or left out
_PART_SCHEMA = ROW_SCHEMA.append(pa.field("singular_values", pa.list_(pa.float64())))


def refuse_finished(cache_dir: Path, but_of: str | None = None) -> None:
    """Refuse a `cache_dir` that holds a finished cache; but_of: unless of that encoder."""
    path = cache_dir / "manifest.json"
    if path.exists():
        remedy = "replace it with --overwrite"
        finished = read_json(path, remedy)
        check_keys(path, finished, {"encoder": dict}, remedy)
        if finished["encoder"].get("id") != but_of:
            raise InputError(finished_words("--cache_dir", cache_dir, _what(finished)))


def _what(manifest: dict) -> str:
    encoder = manifest.get("encoder")
    return f"a finished cache ({encoder.get('id') if isinstance(encoder, dict) else 'damaged'})"


class FeatureCacheWriter(ShardWriter):
    """Writes the shards of a cache in any order, then the manifest.

    Args: as ShardWriter; header: what identifies the features (kind, encoder, image size, resize,
    D …). With `grid` and `num_tokens` all images have that grid; without them each row says its
    own, and singular values are left to who needs them (`RealQwenVLDataset.singular_values`).
    """

    flag, kinds = "--cache_dir", ("real", "demo", "imported")
    commit = "part-{:05d}.parquet"
    others = (
        *("features-*.safetensors", "rows.parquet"),
        *("singular_values.safetensors", "spectra*.safetensors"),
    )

    def __init__(
        self,
        cache_dir: str | Path,
        header: dict,
        num_rows: int,
        overwrite: bool = False,
        conditions: dict | None = None,
        most_tokens: int = 1,
    ) -> None:
        header = {"format": FORMAT, **header}
        most_tokens = max(most_tokens, header.get("num_tokens", 1))
        super().__init__(cache_dir, header, num_rows, overwrite, conditions, most_tokens)
        self._places: dict[int, dict[int, slice]] = {}  # of shards that images were read back from

    what = staticmethod(_what)

    def check_shard(self, path: Path) -> None:
        _read_part(path)

    def remove_leftovers(self) -> None:
        # the last part goes first: what is left of a killed removal are the first ones
        for part in sorted(self.folder.glob("part-*.parquet"), reverse=True):
            part.unlink()
        super().remove_leftovers()

    def write_shard(
        self,
        shard: int,
        features: Iterable[Tensor],
        rows: list[dict],
        skipped: list[dict],
        notes: Sequence[dict] = (),
    ) -> None:
        """Write one shard: its readable images and the rest of its rows.

        features: [T_i, D] of each image, of any float dtype; rows: a dict (ROW_SCHEMA) each, in
        rising order of row_id; skipped: {"row_id", "reason"} of the others; notes: {"row_id",
        "note"} of rows whose values were changed or left out. Raises InputError on NaN or Inf,
        naming the data set's row.
        """
        if len(rows) + len(skipped) != len(self.rows_of(shard)):
            raise ValueError(f"shard {shard} has {len(rows)} images and {len(skipped)} skipped")
        if "grid" in self.header:
            sides = dict(zip(("grid_rows", "grid_columns"), self.header["grid"], strict=True))
            rows = [row | sides for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in ROW_SCHEMA.names}
        columns["singular_values"] = [None] * len(rows)
        if rows:
            images = [image.to("cpu", torch.bfloat16) for image in features]
            _check_images(images, rows)
            save_tensors(self._shard_path(shard), {"features": torch.cat(images)})
            if "grid" in self.header:
                batches = torch.stack(images).split(16)
                sigma = [exact_singular_values(normalise(batch)[0]) for batch in batches]
                columns["singular_values"] = list(torch.cat(sigma).numpy())
        # the hash of what was written: damage until the manifest is made must not be sealed by it
        entry = file_entry(self._shard_path(shard)) if rows else None
        said = {SHARD_ENTRY: entry, SKIPPED: skipped, NOTES: list(notes)}
        metadata = {key: json.dumps(value) for key, value in said.items()}
        part = pa.table(columns, schema=_PART_SCHEMA.with_metadata(metadata))
        with atomic_path(self.commit_path(shard)) as temporary:
            pq.write_table(part, temporary, write_page_checksum=True)

    def features_of(self, row_id: int) -> Tensor:
        """Features [T, D] bfloat16 of a readable row of another shard.

        Waits for a shard that another process is writing.
        """
        shard = row_id // self.rows_per_shard
        if shard not in self._places:
            while not self.commit_path(shard).exists():
                time.sleep(0.05)
            part = pq.read_table(
                self.commit_path(shard), columns=["row_id", "grid_rows", "grid_columns"]
            )
            ends = [0, *accumulate(map(math.prod, grids_of(part)))]
            places = map(slice, ends[:-1], ends[1:])
            self._places[shard] = dict(zip(part["row_id"].to_pylist(), places, strict=True))
        tokens = load_tensors(self._shard_path(shard), "start again with --overwrite")["features"]
        return tokens[self._places[shard][row_id]]

    def finish(self, missing: Sequence[dict] = (), encoder_folder: str | None = None) -> list[dict]:
        """Write rows, singular values and, last of all, the manifest, once every shard is there.

        missing: {"row_id", "reason"} of what no shard counts among its rows. encoder_folder: where
        the encoder's checkpoint lies, for who needs the rest of it; it identifies nothing. Returns
        all that was skipped, these first.
        """
        parts = [_read_part(self.commit_path(shard)) for shard in self.shards]
        skipped = sum((part.skipped for part in parts), list(missing))
        if not any(part.entry for part in parts):
            raise InputError(
                f"the data set has no readable image (row {skipped[0]['row_id']}: "
                f"{skipped[0]['reason']}): no cache was made of it"
            )
        table = pa.concat_tables(part.rows for part in parts)
        grid = most_frequent(grids_of(table))
        sigma_path = self.folder / "singular_values.safetensors"
        if "grid" in self.header:
            sigma = torch.from_numpy(np.stack(table["singular_values"].to_numpy()))
            save_tensors(sigma_path, {"singular_values": sigma})
        rows_path = self.folder / "rows.parquet"
        with atomic_path(rows_path) as temporary:
            pq.write_table(table.drop_columns("singular_values"), temporary)
        manifest = {
            **self.header,
            "num_tokens": math.prod(grid),
            "grid": list(grid),
            **({"encoder_folder": encoder_folder} if encoder_folder else {}),
            "dtype": "bfloat16",
            "count": table.num_rows,
            "groups": len(set(table["group"].to_pylist())),
            "shards": [{**part.entry, "rows": part.rows.num_rows} for part in parts if part.entry],
            "rows": file_entry(rows_path),
            "singular_values": file_entry(sigma_path) if "grid" in self.header else None,
            "skipped": skipped,
            "notes": _count_notes(note for part in parts for note in part.notes),
        }
        self.seal(manifest)
        return skipped

    def _shard_path(self, index: int) -> Path:
        return self.folder / f"features-{index:05d}.safetensors"


def grids_of(rows: pa.Table) -> list[Grid]:
    """The grid of each row."""
    return list(zip(rows["grid_rows"].to_pylist(), rows["grid_columns"].to_pylist(), strict=True))


def _check_images(images: list[Tensor], rows: list[dict]) -> None:
    """Refuse features that are not usable, and (ValueError) of another number than the grid's."""
    for features, row in zip(images, rows, strict=True):
        if len(features) != row["grid_rows"] * row["grid_columns"]:
            raise ValueError(f"row {row['row_id']} has {len(features)} tokens")
        if not usable_features(features[None]):
            raise InputError(
                f"features of data set row {row['row_id']} are not finite, or above "
                f"{LARGEST_FEATURE:.0e}: check the encoder"
            )


class _Part(NamedTuple):
    """What commits a shard; entry: the `file_entry` of its shard, None without readable images."""

    rows: pa.Table
    entry: dict | None
    skipped: list[dict]
    notes: list[dict]


def _read_part(path: Path) -> _Part:
    """Read what commits a shard. Raises InputError where it, or the shard, is damaged."""
    remedy = "start again with --overwrite"
    try:
        part = pq.read_table(path, page_checksum_verification=True)
        if not part.schema.equals(_PART_SCHEMA):
            raise ValueError("other columns")
        part.validate(full=True)
        found = part.schema.metadata or {}
        entry, skipped, notes = (json.loads(found[key]) for key in (SHARD_ENTRY, SKIPPED, NOTES))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None
    check_files(path, [entry] if entry else [], remedy)
    return _Part(part.replace_schema_metadata(None), entry, skipped, notes)


def _count_notes(notes: Iterable[dict]) -> list[dict]:
    """Count notes that are alike: {"note", "rows", "first_row_id"} each."""
    counted: dict[str, dict] = {}
    for entry in notes:
        kind = {"note": entry["note"], "rows": 0, "first_row_id": entry["row_id"]}
        counted.setdefault(entry["note"], kind)["rows"] += 1
    return list(counted.values())
