"""Writes feature caches (the format of `lowrank_tokens.cache`): shard by shard, resumable, atomic.

    cache = write_cache("feature_cache_vit", items, encoder_id="my-vit")     # tokens of any encoder

A shard holds the readable images of 128 consecutive rows of the data set (fewer where images have
many tokens, and at the start: 16, 16, 32, 64). Shards do not depend on each other, so that several
processes may each write some. A shard is committed by its row fragment (`part-00000.parquet`),
which is written after it; the cache is committed by `manifest.json`, written last. An interrupted
writer goes on with the shards that are missing, and the finished cache is byte-identical to an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lowrank_tokens.cache import CACHE_FORMAT, FeatureCache
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    atomic_path,
    check_files,
    check_keys,
    file_entry,
    load_tensors,
    read_json,
    save_tensors,
    sole_writer,
)
from lowrank_tokens.grids import Grid, checked_grid, most_frequent
from lowrank_tokens.linalg import LARGEST_FEATURE, exact_singular_values, normalise, usable_features
from lowrank_tokens.pixels import upright_rgb
from lowrank_tokens.shards import START_ANEW, ShardWriter, finished_words

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
        # for matching between views of one photograph
        ("photograph", pa.string()),  # its name
        ("view", pa.list_(pa.float64())),  # x, y, w, h of the image in pixels of the photograph
        ("mirrored", pa.bool_()),  # whether the view was mirrored left to right
        ("thumbnail", pa.binary()),  # JPEG of what the encoder saw
    ]
)
FIRST_SHARD_ROWS = 16
OPEN_END = 2**62  # rows of a writer until their number is known
# keys of a part's metadata, JSON
SHARD_ENTRY = b"shard"  # `file_entry` of its shard, null where no image is readable
SKIPPED = b"skipped"  # {"row_id", "reason"} of the rows that are not
NOTES = b"notes"  # {"row_id", "note"} of rows whose values were changed or left out
_PART_SCHEMA = ROW_SCHEMA.append(pa.field("singular_values", pa.list_(pa.float64())))


def first_row(shard: int, size: int) -> int:
    """Return the first row of a shard, where full shards have `size` rows.

    The first shards are small, so that little is lost where a run is interrupted early: of 16, 16,
    32 and 64 rows, then 128.
    """
    row = 0
    while shard and row < size:
        row += min(size, max(FIRST_SHARD_ROWS, row))
        shard -= 1
    return row + shard * size


def shard_of(row: int, size: int) -> int:
    """Return the shard that a row belongs to, where full shards have `size` rows; −1 of row −1."""
    if row < 0:
        return -1
    shard, first = 0, 0
    while first < size:
        shard, first = shard + 1, first_row(shard + 1, size)
        if row < first:
            return shard - 1
    return shard + (row - first) // size


def refuse_finished(cache_dir: Path, but_of: str | None = None) -> None:
    """Refuse a `cache_dir` that holds a finished cache; but_of: unless of that encoder."""
    path = cache_dir / "manifest.json"
    if path.exists():
        remedy = "name another folder"
        finished = read_json(path, remedy)
        check_keys(path, finished, {"kind": str, "encoder": dict}, remedy)
        if finished["encoder"].get("id") != but_of:
            raise InputError(finished_words(cache_dir, _what(finished)))


def _what(manifest: dict) -> str:
    encoder = manifest.get("encoder")
    return f"a finished cache ({encoder.get('id') if isinstance(encoder, dict) else 'damaged'})"


class FeatureCacheWriter(ShardWriter):
    """Writes the shards of a cache in any order, then the manifest.

    Args: as ShardWriter; header: what identifies the features (kind, encoder, image size, resize,
    D …). With `grid` and `num_tokens` all images have that grid; without them each row says its
    own, and singular values are left to who needs them (`RealQwenVLDataset.singular_values`).
    """

    kinds = ("real", "demo", "imported")
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
        header = {"format": CACHE_FORMAT, **header}
        most_tokens = max(most_tokens, header.get("num_tokens", 1))
        super().__init__(cache_dir, header, num_rows, overwrite, conditions, most_tokens)
        self._places: dict[int, dict[int, slice]] = {}  # of shards that images were read back from

    what = staticmethod(_what)

    @property
    def shards(self) -> range:
        return range(shard_of(self.num_rows - 1, self.rows_per_shard) + 1)

    def rows_of(self, shard: int) -> range:
        first, end = (first_row(number, self.rows_per_shard) for number in (shard, shard + 1))
        return range(first, min(end, self.num_rows))

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

    def features_of(self, row_id: int) -> Tensor | None:
        """Return the features [T, D] bfloat16 of a row of another shard; None where it was skipped.

        Waits for a shard that another process is writing.
        """
        shard = shard_of(row_id, self.rows_per_shard)
        if shard not in self._places:
            while not self.commit_path(shard).exists():
                time.sleep(0.05)
            part = pq.read_table(
                self.commit_path(shard), columns=["row_id", "grid_rows", "grid_columns"]
            )
            ends = [0, *accumulate(map(math.prod, grids_of(part)))]
            places = map(slice, ends[:-1], ends[1:])
            self._places[shard] = dict(zip(part["row_id"].to_pylist(), places, strict=True))
        if row_id not in self._places[shard]:
            return None
        tokens = load_tensors(self._shard_path(shard), START_ANEW)["features"]
        return tokens[self._places[shard][row_id]]

    def finish(
        self,
        missing: Sequence[dict] = (),
        encoder_folder: str | None = None,
        least_groups: int = 1,
    ) -> list[dict]:
        """Write rows, singular values and, last of all, the manifest, once every shard is there.

        missing: {"row_id", "reason"} of what no shard counts among its rows. encoder_folder: where
        the encoder's checkpoint lies, for who needs the rest of it; it identifies nothing.
        least_groups: of readable images; with fewer there is no cache. Returns all that was
        skipped, these first.
        """
        parts = [_read_part(self.commit_path(shard)) for shard in self.shards]
        skipped = sum((part.skipped for part in parts), list(missing))
        if not any(part.entry for part in parts):
            raise InputError(
                f"the data set has no readable image (row {skipped[0]['row_id']}: "
                f"{skipped[0]['reason']}): no cache was made of it"
            )
        table = pa.concat_tables(part.rows for part in parts)
        if (groups := len(set(table["group"].to_pylist()))) < least_groups:
            reasons = [f", row {entry['row_id']}: {entry['reason']}" for entry in skipped[:1]]
            raise InputError(
                f"{table.num_rows} readable images of {groups} groups ({len(skipped)} skipped"
                f"{''.join(reasons)}): training, validation and test need at least {least_groups} "
                "different ones; no cache was made"
            )
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
            "groups": groups,
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
    """Return the grid of each row."""
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
    """The table that commits a shard.

    entry: the `file_entry` of its shard, None without readable images.
    """

    rows: pa.Table
    entry: dict | None
    skipped: list[dict]
    notes: list[dict]


def _read_part(path: Path) -> _Part:
    """Read what commits a shard. Raises InputError where it, or the shard, is damaged."""
    try:
        part = pq.read_table(path, page_checksum_verification=True)
        if not part.schema.equals(_PART_SCHEMA):
            raise ValueError("other columns")
        part.validate(full=True)
        found = part.schema.metadata or {}
        entry, skipped, notes = (json.loads(found[key]) for key in (SHARD_ENTRY, SKIPPED, NOTES))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): {START_ANEW}") from None
    check_files(path, [entry] if entry else [], START_ANEW)
    return _Part(part.replace_schema_metadata(None), entry, skipped, notes)


def _count_notes(notes: Iterable[dict]) -> list[dict]:
    """Count notes that are alike: {"note", "rows", "first_row_id"} each."""
    counted: dict[str, dict] = {}
    for entry in notes:
        kind = {"note": entry["note"], "rows": 0, "first_row_id": entry["row_id"]}
        counted.setdefault(entry["note"], kind)["rows"] += 1
    return list(counted.values())


# ------------------------------------------------------------------------- tokens of any encoder

_TEXT, _BOX = (str, "a text"), (list | tuple | np.ndarray | Tensor, "x, y, w, h")
ITEM_FIELDS = {  # what an item may hold beside its tokens and grid
    **dict.fromkeys(("question", "path", "group", "photograph"), _TEXT),
    **dict.fromkeys(("width", "height"), (Integral, "a whole number")),
    **dict.fromkeys(("bbox", "view"), _BOX),
    "mirrored": (bool | np.bool_, "True or False"),
    "image": (bytes, "the bytes of an image file"),
    "answers": (list | tuple | np.ndarray, "a list of texts"),
}
ITEM_KEYS = {"tokens", "grid", *ITEM_FIELDS}
SQUARE_GRID = "its tokens were taken to be a square grid, in raster order"
MOST_EXTRA_TOKENS = 16  # class and register tokens that a message takes for such
THUMBNAIL_SIZE = 224  # pixels, of the longer side


_NO_MORE = object()  # where the names of groups end


def write_cache(
    folder: str | Path,
    items: Iterable[Tensor | np.ndarray | Mapping],
    *,
    encoder_id: str,
    groups: Iterable[str] | None = None,
    overwrite: bool = False,
    most_tokens: int = 2048,
    least_groups: int = 1,
) -> FeatureCache:
    """Write a feature cache of tokens that any encoder made, and return it, opened.

    Items are consumed one after the other, and a shard of them is in memory. Where a call was
    interrupted, the same call goes on: items that are there already are compared with what was
    written, and then left.

    Args:
        folder: to write.
        items: of each image its raw tokens [T_i, D], of any float type, or a mapping with "tokens"
            and any of: "grid" (rows, columns), T_i = rows · columns in raster order; "image", the
            encoded image's bytes; "question"; "answers", a list of texts; "bbox" (x, y, w, h) in
            pixels, with "image" or "width" and "height"; "path"; "group"; "photograph", "view"
            [x, y, w, h in its pixels] and "mirrored", for matching between views. Without a grid a
            square is taken where T_i is one, which a warning and the manifest's notes say.
        encoder_id: name of the encoder. Networks and codecs of one cache serve every other of the
            same encoder_id and D.
        groups: name of each item's group. Items of one group stay on one side of the split. By
            default equal images, or equal tokens where there are no images, are one group.
        overwrite: replace a cache that is there.
        most_tokens: about the largest T_i: shards of larger images hold more bytes.
        least_groups: refuse to finish a cache of fewer; training needs three.

    Items whose tokens are not finite are skipped; manifest["skipped"] lists them. Raises ValueError
    or TypeError that names the item where one cannot be taken.
    """
    if not isinstance(encoder_id, str) or not encoder_id.strip():
        raise InputError(f"encoder_id is {encoder_id!r}: give the encoder's name")
    records = _records(items, groups)
    first = next(records, None)
    if first is None:
        raise InputError("items is empty: no cache was made")
    header = {
        "kind": "imported",
        "encoder": {"id": encoder_id},
        "image_size": None,
        "resize": None,
        "feature_dim": first.tokens.shape[1],
        "split_by": "group" if groups is not None or first.has_group else "image",
        "versions": {"torch": torch.__version__},
    }
    with sole_writer(folder, "folder"):
        writer = FeatureCacheWriter(folder, header, OPEN_END, overwrite, most_tokens=most_tokens)
        _write_records(writer, itertools.chain([first], records))
        writer.finish(least_groups=least_groups)
    return FeatureCache(folder)


class _Record(NamedTuple):
    """An item as it is stored: tokens [T, D] bfloat16 and its row."""

    tokens: Tensor
    row: dict
    notes: list[str]
    has_group: bool


def _records(
    items: Iterable[Tensor | np.ndarray | Mapping], groups: Iterable[str] | None
) -> Iterator[_Record]:
    is_array = isinstance(items, Tensor | np.ndarray)
    if isinstance(items, Mapping | str) or (is_array and items.ndim != 3):
        raise TypeError("items is one item: give a list, or another iterable, of them")
    if isinstance(groups, str):
        raise TypeError(f"groups is {groups!r}: give one name an item")
    names = itertools.repeat(None) if groups is None else iter(groups)
    width, is_said = None, False
    for number, item in enumerate(items):
        group = next(names, _NO_MORE)
        if group is _NO_MORE:
            raise InputError(f"groups ends before item {number}: give one name an item")
        if groups is not None and not isinstance(group, str):
            raise TypeError(f"groups[{number}] is {group!r}, not a text")
        record = _record(number, item, group)
        width = width or record.tokens.shape[1]
        if record.tokens.shape[1] != width:
            raise InputError(
                f"item {number} has {record.tokens.shape[1]} features, the others have {width}: "
                "tokens of one encoder belong in one cache"
            )
        if record.notes and not is_said:
            is_said, side = True, record.row["grid_rows"]
            warnings.warn(
                f"item {number} has no grid: its {side * side} tokens are taken to be {side} × "
                f"{side} in raster order, and so are others without one",
                stacklevel=3,
            )
        yield record
    if groups is not None and next(names, _NO_MORE) is not _NO_MORE:
        raise InputError(f"groups has more names than there are items, {number + 1}")


def _record(number: int, item: Tensor | np.ndarray | Mapping, group: str | None) -> _Record:
    fields = dict(item) if isinstance(item, Mapping) else {"tokens": item}
    if unknown := sorted(map(str, fields.keys() - ITEM_KEYS)):
        raise TypeError(f"item {number} has the unknown key {unknown[0]!r}: {sorted(ITEM_KEYS)}")
    tokens = fields.pop("tokens", None)
    if isinstance(tokens, np.ndarray) and np.issubdtype(tokens.dtype, np.floating):
        tokens = torch.from_numpy(tokens)
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor | np.ndarray) else type(tokens).__name__
        raise TypeError(f"item {number}: its tokens are {kind}, not a float tensor or array [T, D]")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise InputError(f"item {number}: its tokens are {list(tokens.shape)}, not [T, D]")
    grid, notes = fields.pop("grid", None), []
    if grid is None:
        side = math.isqrt(len(tokens))
        if more := len(tokens) - side * side:
            near = f" ({more} more than {side} × {side})" if more <= MOST_EXTRA_TOKENS else ""
            raise InputError(
                f"item {number} has {len(tokens)} tokens, which is no square{near}: say its grid "
                "(rows, columns), or leave out class and register tokens first"
            )
        grid, notes = (side, side), [SQUARE_GRID]
    try:
        grid = checked_grid(grid)
    except InputError as error:
        raise InputError(f"item {number}: {error}") from None
    if min(grid) < 1 or math.prod(grid) != len(tokens):
        raise InputError(
            f"item {number} has {len(tokens)} tokens, its grid is {grid}: leave out class and "
            "register tokens, which have no place on it"
        )
    tokens = tokens.detach().to("cpu", torch.bfloat16)
    fields = _checked_fields(number, fields)
    row = {"row_id": number, "grid_rows": grid[0], "grid_columns": grid[1]} | fields
    row |= _image_fields(number, row.pop("image", None))
    given = group if group is not None else fields.get("group")
    row["group"] = given or row.get("image_sha256") or _sha256_of(tokens)
    return _Record(tokens, row, notes, given is not None)


def _checked_fields(number: int, fields: dict) -> dict:
    """Return the fields of an item beside tokens and grid. Raises TypeError or InputError for one
    that is not what a row holds."""
    fields = {key: value for key, value in fields.items() if value is not None}
    for key, value in fields.items():
        kind, words = ITEM_FIELDS[key]
        texts = value if key == "answers" and isinstance(value, kind) else ()
        if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
            shown = repr(value) if isinstance(value, str | int | float | list) else type(value)
            raise TypeError(f"item {number}: its {key} is {str(shown)[:60]}, not {words}")
        if (kind, words) == _BOX:
            fields[key] = _four_numbers(number, key, value)
    if "bbox" in fields and not ("image" in fields or {"width", "height"} <= fields.keys()):
        raise InputError(f"item {number} has a bbox: give its image, or width and height, too")
    return fields


def _four_numbers(number: int, name: str, values: Sequence) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[2:]) <= 0:
        raise InputError(f"item {number}: its {name} is {list(values)}, not x, y, w, h in pixels")
    return numbers


def _sha256_of(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().view(torch.int16).numpy()).hexdigest()


def _image_fields(number: int, data: bytes | None) -> dict:
    """Return hash, size and thumbnail of an encoded image; nothing of None."""
    if data is None:
        return {}
    try:
        image = upright_rgb(Image.open(io.BytesIO(data)))
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
        raise InputError(f"item {number}: its image cannot be read ({error})") from None
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    sha256 = hashlib.sha256(data).hexdigest()
    size = {"width": image.width, "height": image.height}
    return {"image_sha256": sha256, **size, "thumbnail": file.getvalue()}


def _write_records(writer: FeatureCacheWriter, records: Iterator[_Record]) -> None:
    """Write every shard of the records, but those that are there, and set the number of rows."""
    total = 0
    for shard in itertools.count():
        wanted = len(writer.rows_of(shard))
        chunk = list(itertools.islice(records, wanted))
        total += len(chunk)
        is_last = len(chunk) < wanted
        if is_last:
            writer.num_rows = total
        if chunk and writer.commit_path(shard).exists():
            _check_same(writer, shard, chunk)
        elif chunk:
            usable = [bool(usable_features(record.tokens[None])) for record in chunk]
            kept = list(itertools.compress(chunk, usable))
            skipped = [
                {"row_id": record.row["row_id"], "reason": "its tokens are not finite"}
                for record, fits in zip(chunk, usable, strict=True)
                if not fits
            ]
            notes = [{"row_id": r.row["row_id"], "note": note} for r in kept for note in r.notes]
            tokens = [record.tokens for record in kept]
            writer.write_shard(shard, tokens, [record.row for record in kept], skipped, notes)
        if is_last:
            return


def _check_same(writer: FeatureCacheWriter, shard: int, chunk: list[_Record]) -> None:
    """Refuse to go on where a shard that is there was written from other items."""
    part = _read_part(writer.commit_path(shard))
    same = part.rows.num_rows + len(part.skipped) == len(chunk)
    for record in chunk:
        stored = writer.features_of(record.row["row_id"])
        same = same and (stored is None or torch.equal(stored, record.tokens))
    if not same:
        raise InputError(
            f"items {chunk[0].row['row_id']} to {chunk[-1].row['row_id']} are not those that "
            f"{writer.folder} was begun with: give the same items, or overwrite it"
        )
