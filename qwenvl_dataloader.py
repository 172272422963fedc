"""Vision-token features on disk and in batches: cache, normalisation, loaders.

A feature cache is a folder (DESIGN: one format for real, demo and imported features):

    manifest.json                 written last: a folder without it is not a cache
    features-00000.safetensors    tensor `features` [Σ T_i, D] bfloat16, as the encoder gave them:
                                  tokens of its images end to end (format 1: [n, T, D])
    rows.parquet                  one row per image: question, answers, box, thumbnail, hashes, grid
    singular_values.safetensors   `singular_values` [N, min(T, D)] float64 of the normalised X
    spectra.safetensors           the same of a native-resolution cache, once they are asked for

N images, T tokens of an image (T_i where they differ), D features per token, b images in a batch.
`features/cache_writer.py` writes such folders; this module only reads them.
"""

from __future__ import annotations

import hashlib
import io
import math
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import cli, progress, spectra
from common.cache_manifest import BUILD_CACHE, read_manifest, tables_of
from common.epoch_order import Batch, EpochSampler
from common.errors import UserError
from common.files import (
    check_hash,
    check_tensors,
    content_hash_fits,
    load_tensors,
    sha256_file,
)
from common.grids import Grid, most_frequent, token_range
from common.split import split_by_group
from svd_baseline import exact_singular_values

LAYER_NORM_EPS = 1e-6
# the square of a larger one is beyond float32, in which tokens are normalised
LARGEST_FEATURE = 1e15
MAX_SIDE = 65536  # tokens


def normalise(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over D without affine parameters, the only normalisation of the project.

    Args: features [..., T, D], any float dtype, as cached.
    Returns: x [..., T, D] float32, mean [..., T, 1] and std [..., T, 1] float32, where
        std = (var + 1e-6)^1/2 and features = x · std + mean (`denormalise`).
    """
    features = features.float()
    mean = features.mean(dim=-1, keepdim=True)
    centred = features - mean
    std = (centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
    return centred / std, mean, std


def usable_features(features: Tensor) -> Tensor:
    """Which images of features [n, T, D] have finite numbers within ±LARGEST_FEATURE: [n] bool."""
    # by the extremes, infinite or NaN if any number is: a twentieth of isfinite's time on bfloat16
    low, high = features.flatten(1).aminmax(dim=1)
    return (low >= -LARGEST_FEATURE) & (high <= LARGEST_FEATURE)


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise`: tokens in the encoder's own units, [..., T, D]."""
    return x * std + mean


class RealQwenVLDataset(Dataset):
    """A feature cache, opened lazily: manifest, rows and singular values; features by row.

    `dataset[rows]` with rows of one grid is the raw features [len(rows), T, D] bfloat16. Shards are
    memory-mapped on first use, so opening thousands of images costs no time and no memory.
    Attributes: manifest (dict), rows (pyarrow table without thumbnails), split (Split), grids
    (rows, columns) of each image, grid the most frequent of them and num_tokens its T, feature_dim
    D, ragged (whether there is more than one grid).

    Raises UserError where a file is missing, has another size than the manifest says, or
    disagrees in shape.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self.cache_dir = Path(cache_dir)
        self.manifest = read_manifest(self.cache_dir)
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
        self.split = split_by_group(self.rows["group"].to_pylist())

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Tensor:
        if self.ragged and len(grids := {self.grids[int(row)] for row in rows}) > 1:
            raise ValueError(f"rows of different grids do not stack: {sorted(grids)}")
        if self._resident is not None:
            grid = self.grids[int(rows[0])] if self.ragged else self.grid
            return self.resident(torch.as_tensor(rows, device=self._resident.device), grid)
        return torch.stack([self._read_row(int(row)) for row in rows])

    def resident(self, rows: Tensor, grid: Grid) -> Tensor:
        """Raw features [b, T, D] of rows [b] of one grid, all where the features are held."""
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
        return spectra.spectra(self.cache_dir, self._content, self._spectrum_sizes, self._spectrum)

    @property
    def spectra_are_known(self) -> bool:
        """Whether `singular_values` takes no computation."""
        if "singular_values" in self.__dict__:
            return True
        stored = spectra.stored_spectra(self.cache_dir, self._content, self._spectrum_sizes)
        return stored is not None

    @property
    def _spectrum_sizes(self) -> list[int]:
        return [min(math.prod(grid), self.feature_dim) for grid in self.grids]

    @property
    def _content(self) -> str:
        """Hash of what the features are: shards and grids."""
        files = [*self.manifest["shards"], self.manifest["rows"]]
        return hashlib.sha256(" ".join(f["sha256"] for f in files).encode()).hexdigest()

    def _spectrum(self, row: int) -> Tensor:
        return exact_singular_values(normalise(self._read_row(row))[0])

    @property
    def is_demo(self) -> bool:
        """Whether the images are the demo's, whatever encoded them."""
        return self.manifest["kind"] == "demo"

    @property
    def label(self) -> str:
        """What the numbers were made from, for first lines and figure footers."""
        encoder = self.manifest["encoder"]["id"]
        demo = "DEMO data, " if self.is_demo else ""
        if not demo and encoder.startswith("demo-"):  # a user's own images
            demo = "demo encoder "
        tokens = token_range(self.grids)
        return f"{demo}{encoder}, {len(self)} images, T={tokens}, D={self.feature_dim}"

    def mean_tokens(self, rows: Sequence[int]) -> float:
        """Mean T of these images; an int where it is a whole number."""
        return statistics.mean(math.prod(self.grids[row]) for row in rows)

    def of_main_grid(self, rows: Tensor) -> Tensor:
        """Those of rows [n] int64 whose image has the most frequent grid."""
        return rows[[self.grids[row] == self.grid for row in rows.tolist()]] if len(rows) else rows

    def image_record(self, row: int) -> dict:
        """Question, answers, bbox, width, height, group … of one row, as a dict."""
        return self.rows.slice(row, 1).to_pylist()[0]

    def thumbnail(self, row: int) -> Image.Image | None:
        """The image as the encoder saw it, small, RGB; None of imported features."""
        table = pq.read_table(self.cache_dir / "rows.parquet", columns=["thumbnail"])
        data = table["thumbnail"][row].as_py()
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGB")

    def keep_resident(self, device: torch.device, share: float = 0.5) -> bool:
        """Hold all features on `device` where they take at most `share` of its free memory."""
        if self._resident is not None and self._resident.device.type == device.type:
            return True
        shape = self._tokens[-1], self.feature_dim
        if 2 * math.prod(shape) > share * cli.free_memory(device):
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
            raise UserError(
                f"{self.cache_dir}: the features of row {row} are not finite, or above "
                f"{LARGEST_FEATURE:.0e}: look for damage with extract_features.py --verify "
                f"--cache_dir {self.cache_dir}"
            )

    def _shard(self, index: int) -> Tensor:
        """All tokens of a shard of either format, [Σ T_i, D], memory-mapped."""
        if index not in self._shards:
            path = self.cache_dir / self.manifest["shards"][index]["file"]
            rows, end = self.manifest["shards"][index]["rows"], int(self._shard_ends[index])
            shape = self._tokens[end] - self._tokens[end - rows], self.feature_dim
            if self.manifest["format"] == 1:
                shape = rows, self.num_tokens, self.feature_dim
            tensors = load_tensors(path, BUILD_CACHE)
            check_tensors(path, tensors, {"features": (*shape, torch.bfloat16)}, BUILD_CACHE)
            self._shards[index] = tensors["features"].flatten(0, -2)
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
            raise UserError(f"{path} is damaged ({error}): {BUILD_CACHE}") from None
        if rows.num_rows != len(self):
            raise UserError(
                f"{path} has {rows.num_rows} rows, its manifest says {len(self)}: {BUILD_CACHE}"
            )
        if "group" not in rows.column_names:
            raise UserError(f"{path} has no column group: {BUILD_CACHE}")
        return rows

    def _read_grids(self) -> list[Grid]:
        if self.manifest["format"] == 1:
            return [self.grid] * len(self)
        path, names = self.cache_dir / "rows.parquet", ("grid_rows", "grid_columns")
        if missing := [name for name in names if name not in self.rows.column_names]:
            raise UserError(f"{path} has no column {missing[0]}: {BUILD_CACHE}")
        grids = list(zip(*(self.rows[name].to_pylist() for name in names), strict=True))
        for row, grid in enumerate(grids):
            if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in grid):
                raise UserError(f"{path} is damaged (row {row} has the grid {grid}): {BUILD_CACHE}")
        if (grid := most_frequent(grids)) != self.grid:
            manifest = self.cache_dir / "manifest.json"
            raise UserError(
                f"{manifest} is damaged (grid is {list(self.grid)}, most images have "
                f"{list(grid)}): {BUILD_CACHE}"
            )
        return grids

    # what is mapped is not sent: a loader's worker process maps the shards for itself
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}


class BatchLoader:
    """Iterates over `Batch`es on the device; `set_epoch` decides the order of a shuffled one."""

    def __init__(
        self,
        dataset: RealQwenVLDataset,
        rows: Tensor,
        batch_size: int,
        device: torch.device,
        shuffle_seed: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        grids = dataset.grids if dataset.ragged else None
        self.sampler = EpochSampler(rows, batch_size, shuffle_seed, part, grids)
        self.device = device
        self.dataset = dataset
        lazy_cuda = dataset._resident is None and device.type == "cuda"
        self.loader = DataLoader(
            dataset,
            sampler=self.sampler,
            batch_size=None,  # the sampler gives whole batches
            num_workers=2 if lazy_cuda else 0,
            pin_memory=lazy_cuda,
            # its own generator: a loader must not draw from the RNG that dropout uses
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler) - self.sampler.start

    @property
    def num_images(self) -> int:
        return len(self.sampler.rows)

    @cached_property
    def singular_values(self) -> Tensor:
        return self.dataset.singular_values.to(self.device)

    def only(self, rows: Tensor) -> BatchLoader:
        """A loader of these rows of the cache, shuffled as this one is; for one process."""
        sampler = self.sampler
        size, seed = sampler.batch_size, sampler.shuffle_seed
        return BatchLoader(self.dataset, rows, size, self.device, seed)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.sampler.epoch, self.sampler.start = epoch, start

    def with_progress(self, desc: str, *, show: bool = True) -> Iterator[Batch]:
        """The batches, counted on stderr in images of all processes."""
        done = self.sampler.images_before
        with progress.bar(self.num_images, desc, initial=done, show=show) as bar:
            for batch in self:
                yield batch
                bar.update(batch.images)

    def __iter__(self) -> Iterator[Batch]:
        # the epoch's order goes to the device once: no step waits for a copy of its rows
        shares = self.sampler.shares()
        rows = sum((s.rows for s in shares), [])
        order = torch.tensor(rows, dtype=torch.int64, device=self.device)
        order = order.split([len(s.rows) for s in shares])
        data, grids = self.dataset, self.sampler.grids
        of_batch = [data.grid if grids is None else grids[share.rows[0]] for share in shares]
        resident = data._resident is not None
        sources = map(data.resident, order, of_batch) if resident else self.loader
        for rows, grid, features, (_, images, share) in zip(
            order, of_batch, sources, shares, strict=True
        ):
            x, mean, std = normalise(features.to(self.device, non_blocking=True))
            sigma = self.singular_values[rows, : min(x.shape[1:])]
            yield Batch(rows, x, mean, std, sigma, images, share, grid)


class Loaders(NamedTuple):
    """The loaders of the three parts of the split."""

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader


def create_data_loaders_real(
    dataset: RealQwenVLDataset,
    batch_size: int = 8,
    *,
    seed: int = 42,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
    tenants: int = 1,
) -> Loaders:
    """Loaders of the dataset's split; features live on the device where they fit comfortably.

    Training order is reshuffled each epoch from `seed`; validation and test keep cache order.
    part: (rank, world) of several processes: batch_size is each one's, training batches and the
    validation images are shared between them, test images are not. tenants: processes that share
    the host's memory.
    """
    device = torch.device(device)
    dataset.keep_resident(device, share=0.5 / (tenants if device.type == "cpu" else 1))
    split = dataset.split
    rank, world = part
    validation = split.val.tensor_split(world)[rank]
    return Loaders(
        BatchLoader(dataset, split.train, batch_size, device, shuffle_seed=seed, part=part),
        BatchLoader(dataset, validation, batch_size, device),
        BatchLoader(dataset, split.test, batch_size, device),
    )


def of_one_grid(loaders: Loaders) -> Loaders:
    """The loaders with images of the cache's most frequent grid alone, and a note that says so.

    For measurements that need matrices of one shape. Raises UserError where a part has none.
    """
    dataset = loaders.test.dataset
    if not dataset.ragged:
        return loaders
    parts, grid = [], "{} × {}".format(*dataset.grid)
    for name, loader in zip(loaders._fields, loaders, strict=True):
        parts.append(loader.only(dataset.of_main_grid(loader.sampler.rows)))
        if not parts[-1].num_images:
            raise UserError(
                f"{dataset.cache_dir} has no {name} image of its most frequent grid, {grid}: "
                "name a cache made with extract_features.py --resize stretch or pad"
            )
    counts = f"{parts[2].num_images} of {loaders.test.num_images} test images"
    print(f"note: images of {grid} tokens only, {counts}: matrices of one shape are compared")
    return Loaders(*parts)
