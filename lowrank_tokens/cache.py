"""Feature caches: vision tokens of many images in one folder, opened lazily and read by row.

    cache = FeatureCache("feature_cache_real")
    tokens = cache[[0, 1]]                        # [2, T, D] bfloat16, as the encoder gave them

A cache is a folder:

    manifest.json                 written last: a folder without it is not a cache
    features-00000.safetensors    tensor `features` [Σ T_i, D] bfloat16: tokens of its images end
                                  to end
    rows.parquet                  one row per image: question, answers, box, thumbnail, hashes, grid
    singular_values.safetensors   `singular_values` [N, min(T, D)] float64 of the normalised X
    spectra.safetensors           the same of a native-resolution cache, once they are asked for

N images, T tokens of an image (T_i where they differ), D features per token, b images in a batch.
`cache_writer` writes such folders; this module only reads them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowrank_tokens import progress
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    TEMPORARY_SUFFIX,
    check_hash,
    check_keys,
    check_tensors,
    content_hash_fits,
    load_tensors,
    save_tensors,
    sha256_file,
)
from lowrank_tokens.grids import MAX_SIDE, Grid, most_frequent, token_range
from lowrank_tokens.linalg import LARGEST_FEATURE, exact_singular_values, normalise, usable_features
from lowrank_tokens.shards import check_shards, read_finished
from lowrank_tokens.token_dataset import TokenDataset, row_numbers

CACHE_FORMAT = 1
BUILD_CACHE = "write the cache again (in the checkout: extract_features.py --overwrite)"
MANIFEST_KEYS = {
    **{"format": int, "kind": str, "encoder": dict, "resize": (str, type(None)), "grid": list},
    **{"num_tokens": int, "feature_dim": int, "count": int, "shards": list, "skipped": list},
    **{"rows": dict, "singular_values": (dict, type(None)), "dtype": str, "split_by": str},
    "notes": list,
}


def read_cache_manifest(cache_dir: Path) -> dict:
    """Return the manifest of a finished cache.

    Raises InputError where it, or a file it names, is not as it should be; of the files only their
    sizes are looked at.
    """
    if not cache_dir.is_dir():
        raise InputError(
            f"{cache_dir} does not exist: make it with lowrank_tokens.write_cache (in the "
            "checkout: extract_features.py, or experiments.make_demo_data and extract_features.py "
            "--demo)"
        )
    again = "its writing was interrupted, run the same command to finish it"
    path, manifest = read_finished(cache_dir, again, BUILD_CACHE)
    if isinstance(manifest, dict) and manifest.get("kind") == "factors":
        raise InputError(f"{path} is of factors, no feature cache: read it with VisionTokens")
    check_keys(path, manifest, MANIFEST_KEYS, BUILD_CACHE)
    if manifest["format"] != CACHE_FORMAT:
        raise InputError(
            f"{path} has format {manifest['format']}, not {CACHE_FORMAT}: {BUILD_CACHE}"
        )
    check_shards(path, manifest, BUILD_CACHE, tables_of(manifest))
    check_keys(path, manifest["encoder"], {"id": str}, BUILD_CACHE)
    wrong = {
        "kind": manifest["kind"] not in ("real", "demo", "imported"),
        # None: imported, not known
        "resize": manifest["resize"] not in ("stretch", "pad", "native", None),
        "grid": [type(side) for side in manifest["grid"]] != [int, int]
        or math.prod(manifest["grid"]) != manifest["num_tokens"],
        "feature_dim": manifest["feature_dim"] < 1,
        "rows": manifest["rows"]["file"] != "rows.parquet",
        "singular_values": [f["file"] for f in tables_of(manifest)[1:]]
        not in ([], ["singular_values.safetensors"]),
    }
    for key in [key for key, is_wrong in wrong.items() if is_wrong]:
        value = json.dumps(manifest[key])[:60]
        raise InputError(f"{path} is damaged ({key} is {value}): {BUILD_CACHE}")
    return manifest


def tables_of(manifest: dict) -> list[dict]:
    """Return a manifest's entries of its rows and, where it has them, its singular values."""
    spectrum = manifest["singular_values"]
    return [manifest["rows"], *([spectrum] if spectrum else [])]


# Singular values that are computed when they are first asked for, and then kept.
#
#     spectra.safetensors          `values` [Σ m_i] float64, image after image, m_i = min(T_i, D)
#     spectra-00003.safetensors    the same of 16 images; removed when all of them are there
#
# The file says of which content its values are and what their hash is: one that does not fit is
# computed again. It holds nothing that the features do not, so no manifest counts it.

SPECTRA_FILE = "spectra.safetensors"
IMAGES_PER_PART = 16


class _Each(Dataset):
    """`of(i)` as a data set, for a loader's workers: one process a core, one thread each."""

    def __init__(self, of: Callable[[int], Tensor]) -> None:
        self.of = of

    def __getitem__(self, i: int) -> Tensor:
        return self.of(i)


def stored_spectra(folder: Path, content: str, sizes: Sequence[int]) -> Tensor | None:
    """Return the singular values [N, max m_i] float64 of `folder`, zero-padded at the right.

    None where they are not there, are those of another content, or damaged.
    """
    values = _read(folder / SPECTRA_FILE, content, sum(sizes))
    if values is None:
        return None
    return torch.nn.utils.rnn.pad_sequence(values.split(list(sizes)), batch_first=True)


def compute_spectra(
    folder: Path, content: str, sizes: Sequence[int], spectrum: Callable[[int], Tensor]
) -> Tensor:
    """Return the singular values, computed in parts on all cores, and kept, where they are missing.

    content: hash of what the values are of; sizes: m_i of each image; spectrum: i → σ of image i,
    [m_i] float64. An interrupted computation goes on after its last whole part. Of several
    processes one computes, with all cores, and the others wait for it. In a folder that cannot be
    written nothing is kept, and each process computes for itself.
    """
    if (values := stored_spectra(folder, content, sizes)) is not None:
        return values
    if not os.access(folder, os.W_OK):  # a read-only mount, or another user's cache
        print(f"note: {folder} is read-only: singular values are computed and not kept")
        values = _in_parallel(range(len(sizes)), spectrum)
        values = list(progress.over(values, "singular values", "images", total=len(sizes)))
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    with FileLock(folder / ".spectra.lock"):
        if (values := stored_spectra(folder, content, sizes)) is not None:  # another's work
            return values
        for torn in folder.glob(f".spectra*{TEMPORARY_SUFFIX}"):  # what a kill left half-written
            torn.unlink()
        starts = range(0, len(sizes), IMAGES_PER_PART)
        parts = [range(len(sizes))[first : first + IMAGES_PER_PART] for first in starts]
        paths = [folder / f"spectra-{number:05d}.safetensors" for number in range(len(parts))]
        _compute_missing(parts, paths, content, sizes, spectrum)
        wanted = [sum(sizes[i] for i in part) for part in parts]
        done = [_read(path, content, size) for path, size in zip(paths, wanted, strict=True)]
        _write(folder / SPECTRA_FILE, content, torch.cat(done))
        for path in paths:
            path.unlink()
    return stored_spectra(folder, content, sizes)


def _compute_missing(
    parts: list[range],
    paths: list[Path],
    content: str,
    sizes: Sequence[int],
    spectrum: Callable[[int], Tensor],
) -> None:
    """Write the parts that are missing or damaged."""
    to_do = [
        (part, path)
        for part, path in zip(parts, paths, strict=True)
        if _read(path, content, sum(sizes[i] for i in part)) is None
    ]
    images = [i for part, _ in to_do for i in part]
    done = len(sizes) - len(images)
    values = _in_parallel(images, spectrum)
    with progress.bar(len(sizes), "singular values", initial=done) as bar:
        for part, path in to_do:
            _write(path, content, torch.cat(list(itertools.islice(values, len(part)))))
            bar.update(len(part))


def _in_parallel(images: Sequence[int], spectrum: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """Yield `spectrum(i)` of each image, computed by one worker process a core.

    Workers compute with one thread each, so the values' bits do not depend on how many there are.
    """
    workers = max(1, min(len(os.sched_getaffinity(0)), len(images)))
    kind = {"batch_size": None, "num_workers": workers, "generator": torch.Generator()}
    return iter(DataLoader(_Each(spectrum), sampler=images, **kind))


def _write(path: Path, content: str, values: Tensor) -> None:
    save_tensors(path, {"values": values}, {"content": content, "sha256": _sha256(values)})


def _read(path: Path, content: str, size: int) -> Tensor | None:
    """Return values [size]; None where they are missing, of another content, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            values, said = file.get_tensor("values"), file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    fits = values.shape == (size,) and values.dtype == torch.float64
    fits = fits and said.get("content") == content and said.get("sha256") == _sha256(values)
    return values if fits else None


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy()).hexdigest()


class FeatureCache(TokenDataset):
    """A feature cache, opened lazily: manifest, rows and singular values; features by row.

        cache = FeatureCache("feature_cache_real")
        cache[7]                                      # [T, D] bfloat16, as the encoder gave them
        cache[[3, 5]], cache[-4:]                     # [n, T, D], rows of one grid
        DataLoader(cache, batch_size=8)               # [8, T, D]

    It is a torch Dataset: rows may be negative, one beyond the end raises IndexError, it pickles,
    and a loader's worker processes, forked or spawned, open its files for themselves. Shards are
    memory-mapped on first use, so opening thousands of images costs no time and no memory.

    Args:
        cache_dir: the folder.
        lists: a loader's batch is a list of tokens [T_i, D], which a collate_fn of yours takes,
            such as `collate_fn=list`: images of different grids do not stack.

    Attributes: manifest (dict), rows (pyarrow table without thumbnails), grids (rows,
    columns) of each image, grid the most frequent of them and num_tokens its T, feature_dim
    D, ragged (whether there is more than one grid).

    Raises InputError where a file is missing, has another size than the manifest says, or
    disagrees in shape.
    """

    def __init__(self, cache_dir: str | Path, *, lists: bool = False) -> None:
        super().__init__(cache_dir, lists)
        self.cache_dir = self.folder
        self.manifest = read_cache_manifest(self.cache_dir)
        self.num_tokens: int = self.manifest["num_tokens"]
        self.feature_dim: int = self.manifest["feature_dim"]
        self.grid: Grid = tuple(self.manifest["grid"])
        self._shard_ends = np.cumsum([shard["rows"] for shard in self.manifest["shards"]])
        self._shards: dict[int, Tensor] = {}
        self._resident: Tensor | None = None  # [Σ T_i, D]
        if self.manifest["singular_values"]:
            self.singular_values = self._read_singular_values()
        self.rows = self._read_rows()
        self.grids: list[Grid] = self._read_grids()
        self.ragged = len(set(self.grids)) > 1
        # the first token of each image, and their number
        self._tokens = [0, *accumulate(map(math.prod, self.grids))]

    def __len__(self) -> int:
        return self.manifest["count"]

    def grid_of(self, row: int) -> Grid:
        return self.grids[row]

    def read(self, rows: list[int]) -> Tensor | list[Tensor]:
        if not rows:
            return torch.empty(0, self.num_tokens, self.feature_dim, dtype=torch.bfloat16)
        if self._resident is None:
            return [self._read_row(row) for row in rows]
        if len({self.grids[row] for row in rows}) == 1:
            on_device = torch.tensor(rows, device=self._resident.device)
            return self.resident(on_device, self.grids[rows[0]])
        return [self._resident[self._tokens[row] : self._tokens[row + 1]] for row in rows]

    def rows_of_image(self, sha256: str) -> list[int]:
        """Return the rows whose image has this SHA-256 (hexadecimal) of its file; [] without one.

        A data set that asks several questions about an image has several.
        """
        return self._rows_by_image.get(sha256, [])

    @cached_property
    def _rows_by_image(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, sha256 in enumerate(self.rows["image_sha256"].to_pylist()):
            if sha256 is not None:
                rows.setdefault(sha256, []).append(row)
        return rows

    def row_of_id(self, row_id: int) -> int:
        """Return the row of the data set's row `row_id`, which counts skipped images too.

        Raises KeyError where that row was skipped, or never was.
        """
        if row_id not in self._row_by_id:
            raise KeyError(f"{self.cache_dir} has no row of the data set's row {row_id}")
        return self._row_by_id[row_id]

    @cached_property
    def _row_by_id(self) -> dict[int, int]:
        return {row_id: row for row, row_id in enumerate(self.rows["row_id"].to_pylist())}

    def resident(self, rows: Tensor, grid: Grid) -> Tensor:
        """Return raw features [b, T, D] of rows [b] of one grid, on the device that holds them."""
        if not self.ragged:
            return self._resident.unflatten(0, (len(self), -1))[rows]
        first = self._first_tokens[rows]
        tokens = torch.arange(math.prod(grid), device=first.device)
        return self._resident[first[:, None] + tokens]

    @cached_property
    def singular_values(self) -> Tensor:
        """σ [N, max min(T_i, D)] float64 of the normalised X, zero-padded at the right.

        Of caches without a singular_values.safetensors they are computed here, at first need.
        """
        return compute_spectra(
            self.cache_dir, self.content_sha256, self._spectrum_sizes, self._spectrum
        )

    @property
    def spectra_are_known(self) -> bool:
        """Say whether `singular_values` takes no computation."""
        if "singular_values" in self.__dict__:
            return True
        stored = stored_spectra(self.cache_dir, self.content_sha256, self._spectrum_sizes)
        return stored is not None

    @property
    def _spectrum_sizes(self) -> list[int]:
        return [min(math.prod(grid), self.feature_dim) for grid in self.grids]

    @property
    def content_sha256(self) -> str:
        """Return the SHA-256 of features and rows, which tells results of caches apart."""
        files = [*self.manifest["shards"], self.manifest["rows"]]
        return hashlib.sha256(" ".join(f["sha256"] for f in files).encode()).hexdigest()

    def _spectrum(self, row: int) -> Tensor:
        return exact_singular_values(normalise(self._read_row(row))[0])

    @property
    def is_demo(self) -> bool:
        """Say whether the images are the demo's, whatever encoded them."""
        return self.manifest["kind"] == "demo"

    @property
    def label(self) -> str:
        """Name what numbers were made from, for first lines and figure footers."""
        encoder = self.manifest["encoder"]["id"]
        demo = "DEMO data, " if self.is_demo else ""
        if not demo and encoder.startswith("demo-"):  # a user's own images
            demo = "demo encoder "
        tokens = token_range(self.grids)
        return f"{demo}{encoder}, {len(self)} images, T={tokens}, D={self.feature_dim}"

    def mean_tokens(self, rows: Sequence[int]) -> float:
        """Return the mean T of these images; an int where it is a whole number."""
        return statistics.mean(math.prod(self.grids[row]) for row in rows)

    def of_main_grid(self, rows: Tensor) -> Tensor:
        """Return those of rows [n] int64 whose image has the most frequent grid."""
        return rows[[self.grids[row] == self.grid for row in rows.tolist()]] if len(rows) else rows

    def image_record(self, row: int) -> dict:
        """Return question, answers, bbox, width, height, group … of one row, as a dict."""
        number = row_numbers(row, len(self), self.folder)
        return self.rows.slice(number, 1).to_pylist()[0]

    def thumbnail(self, row: int) -> Image.Image | None:
        """Return the image as the encoder saw it, small, RGB; None of imported features."""
        table = pq.read_table(self.cache_dir / "rows.parquet", columns=["thumbnail"])
        data = table["thumbnail"][row_numbers(row, len(self), self.folder)].as_py()
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGB")

    def keep_resident(self, device: torch.device, share: float = 0.5) -> bool:
        """Hold all features on `device` where they take at most `share` of its free memory."""
        if self._resident is not None and self._resident.device.type == device.type:
            return True
        shape = self._tokens[-1], self.feature_dim
        if 2 * math.prod(shape) > share * free_memory(device):
            return False
        resident = torch.empty(shape, dtype=torch.bfloat16, device=device)
        ends = self._shard_ends.tolist()
        for index, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            part = resident[self._tokens[first] : self._tokens[end]]
            part.copy_(self._shard(index))
            self._check_finite(part, self._tokens[first])
        self._resident = resident
        self._first_tokens = torch.tensor(self._tokens[:-1], device=device)
        return True

    def verify(self) -> dict[str, str]:
        """Re-read every file: its sha256, of shards also finiteness; the manifest's own hash.

        Returns damaged file → what is wrong, empty where all is well. One shard at a time is in
        memory.
        """
        files = [*self.manifest["shards"], *tables_of(self.manifest)]
        damaged = {}
        for index, entry in enumerate(progress.over(files, "verify", "files")):
            name = entry["file"]
            if sha256_file(self.cache_dir / name) != entry["sha256"]:
                damaged[name] = "does not match its sha256"
            elif index < len(self.manifest["shards"]):
                if not usable_features(self._shard(index)).all():
                    damaged[name] = f"holds NaN or Inf, or features above {LARGEST_FEATURE:.0e}"
        if self.spectra_are_known and not self.singular_values.isfinite().all():
            damaged["singular_values.safetensors"] = "holds NaN or Inf"
        if not content_hash_fits(self.manifest):
            damaged["manifest.json"] = "is not as it was written"
        return damaged

    def _read_row(self, row: int) -> Tensor:
        shard = int(np.searchsorted(self._shard_ends, row, side="right"))
        first = int(self._shard_ends[shard]) - self.manifest["shards"][shard]["rows"]
        start, end = (self._tokens[i] - self._tokens[first] for i in (row, row + 1))
        features = self._shard(shard)[start:end]
        self._check_finite(features, self._tokens[row])
        return features

    def _check_finite(self, features: Tensor, first: int) -> None:
        """Refuse features [n, D] of the cache's tokens from `first` on that are not usable."""
        if not (usable := usable_features(features)).all():
            token = first + int((~usable).nonzero()[0])
            row = bisect_right(self._tokens, token) - 1
            raise InputError(
                f"{self.cache_dir}: the features of row {row} are not finite, or above "
                f"{LARGEST_FEATURE:.0e}: look for damage with FeatureCache.verify (in the "
                f"checkout: extract_features.py --verify --cache_dir {self.cache_dir})"
            )

    def _shard(self, index: int) -> Tensor:
        """Return all tokens of a shard, [Σ T_i, D], memory-mapped."""
        if index not in self._shards:
            path = self.cache_dir / self.manifest["shards"][index]["file"]
            rows, end = self.manifest["shards"][index]["rows"], int(self._shard_ends[index])
            shape = self._tokens[end] - self._tokens[end - rows], self.feature_dim
            tensors = load_tensors(path, BUILD_CACHE)
            check_tensors(path, tensors, {"features": (*shape, torch.bfloat16)}, BUILD_CACHE)
            self._shards[index] = tensors["features"]
        return self._shards[index]

    def _read_singular_values(self) -> Tensor:
        path = self.cache_dir / "singular_values.safetensors"
        check_hash(path, self.manifest["singular_values"], BUILD_CACHE)
        tensors = load_tensors(path, BUILD_CACHE)
        shape = len(self), min(self.num_tokens, self.feature_dim)
        check_tensors(path, tensors, {"singular_values": (*shape, torch.float64)}, BUILD_CACHE)
        return tensors["singular_values"]

    def _read_rows(self) -> pa.Table:
        path = self.cache_dir / "rows.parquet"
        check_hash(path, self.manifest["rows"], BUILD_CACHE)
        try:
            names = [n for n in pq.read_schema(path).names if n != "thumbnail"]
            rows = pq.read_table(path, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged ({error}): {BUILD_CACHE}") from None
        if rows.num_rows != len(self):
            raise InputError(
                f"{path} has {rows.num_rows} rows, its manifest says {len(self)}: {BUILD_CACHE}"
            )
        if "group" not in rows.column_names:
            raise InputError(f"{path} has no column group: {BUILD_CACHE}")
        return rows

    def _read_grids(self) -> list[Grid]:
        path, names = self.cache_dir / "rows.parquet", ("grid_rows", "grid_columns")
        if missing := [name for name in names if name not in self.rows.column_names]:
            raise InputError(f"{path} has no column {missing[0]}: {BUILD_CACHE}")
        grids = list(zip(*(self.rows[name].to_pylist() for name in names), strict=True))
        for row, grid in enumerate(grids):
            if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in grid):
                raise InputError(
                    f"{path} is damaged (row {row} has the grid {grid}): {BUILD_CACHE}"
                )
        if (grid := most_frequent(grids)) != self.grid:
            manifest = self.cache_dir / "manifest.json"
            raise InputError(
                f"{manifest} is damaged (grid is {list(self.grid)}, most images have "
                f"{list(grid)}): {BUILD_CACHE}"
            )
        return grids

    # neither what is mapped nor what is resident is sent: a spawned worker maps shards for itself
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}, "_resident": None}


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device, or of this host; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not tell: read shards as they are needed
        return 0
