"""Writes feature caches (the format of qwenvl_dataloader): shard by shard, resumable, atomic.

A shard is committed by its row fragment (`part-00000.parquet`), which is written after it; the
cache is committed by `manifest.json`, written last. An interrupted writer goes on after the last
committed shard, and its finished cache is byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from cli import UserError
from files import (
    atomic_path,
    check_files,
    check_same_header,
    file_entry,
    read_json,
    save_tensors,
    sweep_temporaries,
    with_content_hash,
    write_json,
)
from qwenvl_dataloader import FORMAT, LARGEST_FEATURE, normalise, usable_features
from svd_baseline import exact_singular_values

ROWS_PER_SHARD = 128

ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),  # row of the data set, counting unreadable images too
        ("group", pa.string()),  # rows of one group are never on two sides of the split
        ("image_sha256", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("bbox", pa.list_(pa.float64())),  # x, y, w, h in pixels of the original image
        ("width", pa.int32()),  # of the original image
        ("height", pa.int32()),
        ("thumbnail", pa.binary()),  # JPEG of what the encoder saw
    ]
)
SHARD_ENTRY = b"shard"  # key of a part's metadata: `file_entry` of its shard, JSON
_PART_SCHEMA = ROW_SCHEMA.append(pa.field("singular_values", pa.list_(pa.float64())))


class FeatureCacheWriter:
    """Collects features and rows, writes a shard whenever one is full, then the manifest.

    Args:
        cache_dir: folder to write. A finished cache in it is refused unless `overwrite`.
        header: what identifies the features (kind, encoder, image size, resize, T, D, grid …);
            an interrupted cache with another header is refused with both values.
    After construction `rows_done` rows are already safe on disk; go on with the next row.
    """

    def __init__(self, cache_dir: str | Path, header: dict, overwrite: bool = False) -> None:
        self.cache_dir = Path(cache_dir)
        self.header = {"format": FORMAT, **header}
        self._features: list[Tensor] = []
        self._rows: list[dict] = []
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()
        if (self.cache_dir / "manifest.json").exists():
            self._remove_leftovers()  # it may have been killed after the manifest
            raise UserError(
                f"--cache_dir {self.cache_dir} holds a finished cache: use it, type another "
                "--cache_dir, or --overwrite to replace it"
            )
        sweep_temporaries(self.cache_dir)
        self._check_or_write_header()
        self.shards_done = len(list(self.cache_dir.glob("part-*.parquet")))
        read = [_read_part(self._part_path(s)) for s in range(self.shards_done)]
        self._parts = [part for part, _ in read]
        self._entries = [entry for _, entry in read]  # of the shards, for the manifest
        self.rows_done = sum(part.num_rows for part in self._parts)
        self.last_row_id = self._parts[-1]["row_id"][-1].as_py() if self._parts else -1

    def append(self, features: Tensor, rows: list[dict]) -> None:
        """Add images: features [n, T, D] of any float dtype, one dict (ROW_SCHEMA) each.

        Raises UserError on NaN or Inf, naming the data set's row.
        """
        features = features.to("cpu", torch.bfloat16)
        usable = usable_features(features) if len(features) else torch.ones(0)
        if not usable.all():
            bad = rows[int((~usable).nonzero()[0])]["row_id"]
            raise UserError(
                f"features of data set row {bad} are not finite, or above {LARGEST_FEATURE:.0e}: "
                "check the encoder"
            )
        self._features.extend(features)
        self._rows.extend(rows)
        while len(self._rows) >= ROWS_PER_SHARD:
            self._write_shard(ROWS_PER_SHARD)

    @property
    def count(self) -> int:
        """Images appended so far: the next one's row of the cache."""
        return self.rows_done + len(self._rows)

    def features_of(self, position: int) -> Tensor:
        """Features [T, D] bfloat16 of an image appended earlier, by its row of the cache."""
        if position >= self.rows_done:
            return self._features[position - self.rows_done]
        with safe_open(self._shard_path(position // ROWS_PER_SHARD), framework="pt") as shard:
            return shard.get_slice("features")[position % ROWS_PER_SHARD]

    def image_hashes(self) -> list[str]:
        """Hashes of all images appended so far, in order of the cache's rows."""
        done = [h for part in self._parts for h in part["image_sha256"].to_pylist()]
        return done + [row["image_sha256"] for row in self._rows]

    def finish(self, skipped: list[dict]) -> None:
        """Write the last shard, rows, singular values and, last of all, the manifest."""
        if self._rows:
            self._write_shard(len(self._rows))
        if not self._parts:
            raise UserError("the data set has no readable image: nothing was written")
        table = pa.concat_tables(self._parts)
        sigma = torch.from_numpy(np.stack(table["singular_values"].to_numpy()))
        sigma_path = self.cache_dir / "singular_values.safetensors"
        save_tensors(sigma_path, {"singular_values": sigma})
        rows_path = self.cache_dir / "rows.parquet"
        with atomic_path(rows_path) as temporary:
            pq.write_table(table.drop_columns("singular_values"), temporary)
        manifest = {
            **self.header,
            "dtype": "bfloat16",
            "count": table.num_rows,
            "groups": len(set(table["group"].to_pylist())),
            "shards": [
                {**entry, "rows": part.num_rows}
                for entry, part in zip(self._entries, self._parts, strict=True)
            ],
            "rows": file_entry(rows_path),
            "singular_values": file_entry(sigma_path),
            "skipped": skipped,
        }
        write_json(self.cache_dir / "manifest.json", with_content_hash(manifest))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        # the last part goes first: what is left of a killed removal are the first ones
        for part in sorted(self.cache_dir.glob("part-*.parquet"), reverse=True):
            part.unlink()
        (self.cache_dir / "partial.json").unlink(missing_ok=True)
        sweep_temporaries(self.cache_dir)

    def _write_shard(self, count: int) -> None:
        features, self._features = torch.stack(self._features[:count]), self._features[count:]
        rows, self._rows = self._rows[:count], self._rows[count:]
        save_tensors(self._shard_path(self.shards_done), {"features": features})
        sigma = torch.cat([exact_singular_values(normalise(f)[0]) for f in features.split(16)])
        columns = {name: [row[name] for row in rows] for name in ROW_SCHEMA.names}
        columns["singular_values"] = list(sigma.numpy())
        # the hash of what was written: damage until the manifest is made must not be sealed by it
        entry = json.dumps(file_entry(self._shard_path(self.shards_done)))
        part = pa.table(columns, schema=_PART_SCHEMA.with_metadata({SHARD_ENTRY: entry}))
        with atomic_path(self._part_path(self.shards_done)) as temporary:
            pq.write_table(part, temporary, write_page_checksum=True)
        # read back: rows of this process and of an interrupted one must be laid out alike
        part, entry = _read_part(self._part_path(self.shards_done))
        self._parts.append(part)
        self._entries.append(entry)
        self.rows_done += count
        self.shards_done += 1

    def _check_or_write_header(self) -> None:
        path = self.cache_dir / "partial.json"
        if not path.exists():
            if any(self.cache_dir.glob("part-*.parquet")):
                raise UserError(f"{path} is missing: start again with --overwrite")
            write_json(path, self.header)
            return
        started = read_json(path, "start again with --overwrite")
        check_same_header(f"--cache_dir {self.cache_dir}", started, self.header)

    def _clear(self) -> None:
        # the manifest goes first: a half-removed cache must not look like a whole one
        (self.cache_dir / "manifest.json").unlink(missing_ok=True)
        # then what commits the shards, before the shards
        self._remove_leftovers()
        for pattern in ("features-*.safetensors", "rows.parquet", "singular_values.safetensors"):
            for path in self.cache_dir.glob(pattern):
                path.unlink()

    def _shard_path(self, index: int) -> Path:
        return self.cache_dir / f"features-{index:05d}.safetensors"

    def _part_path(self, index: int) -> Path:
        return self.cache_dir / f"part-{index:05d}.parquet"


def _read_part(path: Path) -> tuple[pa.Table, dict]:
    """The rows that commit a shard, and its `file_entry`. Raises UserError where one is damaged."""
    remedy = "start again with --overwrite"
    try:
        part = pq.read_table(path, page_checksum_verification=True)
        if not part.schema.equals(_PART_SCHEMA):
            raise ValueError("other columns")
        part.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    entry = json.loads((part.schema.metadata or {}).get(SHARD_ENTRY, b"null"))
    if not entry:
        raise UserError(f"{path} is of an older version: {remedy}")
    check_files(path, [entry], remedy)
    return part.replace_schema_metadata(None), entry
