"""Vision-token features on disk and in batches: cache, split, normalisation, loaders.

A feature cache is a folder (DESIGN: one format for real, demo and imported features):

    manifest.json                 written last: a folder without it is not a cache
    features-00000.safetensors    tensor `features` [n, T, D] bfloat16, as the encoder gave them
    rows.parquet                  one row per image: question, answers, box, thumbnail, hashes
    singular_values.safetensors   `singular_values` [N, min(T, D)] float64 of the normalised X

N images, T tokens per image, D features per token, b images in a batch.
`features/cache_writer.py` writes such folders; this module only reads them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import cli, progress
from common.epoch_order import EpochSampler
from common.errors import UserError
from common.files import (
    check_files,
    check_hash,
    check_keys,
    content_hash_fits,
    read_json,
    sha256_file,
)

FORMAT = 1
LAYER_NORM_EPS = 1e-6
# the square of a larger one is beyond float32, in which tokens are normalised
LARGEST_FEATURE = 1e15
# A constant, not --seed: every script and every run must hold out the same images.
SPLIT_SEED = 42
MIN_HELD_OUT_GROUPS = 8
BUILD_CACHE = "build the cache again with extract_features.py --overwrite"
MANIFEST_KEYS = {
    **{"format": int, "kind": str, "encoder": dict, "resize": (str, type(None)), "grid": list},
    **{"num_tokens": int, "feature_dim": int, "count": int, "shards": list, "skipped": list},
    **{"rows": dict, "singular_values": dict, "dtype": str, "split_by": str},
}


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


def box_in_view(record: dict, resize: str) -> tuple[float, float, float, float] | None:
    """The answer's box (x, y, w, h) as fractions of the square that the encoder saw.

    record: a row with bbox in pixels of the original and its width and height; resize: the
    manifest's rule. None where the row has no box.
    """
    box, width, height = record["bbox"], record["width"], record["height"]
    if not box or len(box) != 4:
        return None
    x, y, w, h = box
    if resize == "stretch":
        return x / width, y / height, w / width, h / height
    side = max(width, height)  # pad: centred in a square
    left, top = (side - width) / 2, (side - height) / 2
    return (x + left) / side, (y + top) / side, w / side, h / side


class Batch(NamedTuple):
    """b normalised images on the device; what every model and reference is given."""

    rows: Tensor  # [b] int64, rows of the cache
    x: Tensor  # [b, T, D] float32, normalised
    mean: Tensor  # [b, T, 1] float32
    std: Tensor  # [b, T, 1] float32
    singular_values: Tensor  # [b, min(T, D)] float64, of x, largest first
    images: int  # of this step in all processes
    share: float  # of them that are this process's: b / images, or 0 where it computes along


@dataclass(frozen=True)
class Split:
    """Rows of the cache by part; parts share no group."""

    train: Tensor  # [n] int64
    val: Tensor
    test: Tensor
    hash: str  # of which row is in which part, 16 hexadecimal digits

    def part_of(self, row: int) -> str:
        """'train', 'val' or 'test'."""
        return next(name for name in ("train", "val", "test") if row in getattr(self, name))


def split_by_group(groups: list[str]) -> Split:
    """80/10/10 by group: rows with one group name (one image, one photograph) stay together.

    With few groups, 10 % would be too few to judge by: validation and test get at least 8 groups
    each where that leaves them at most a fifth of the groups, and at least one. Deterministic in
    the group names alone. Raises UserError for fewer than three groups.
    """
    names = sorted(set(groups))
    if len(names) < 3:
        raise UserError(
            f"the cache has {len(names)} group(s) of images: training, validation and test need "
            "at least 3 different images"
        )
    held_out = max(round(len(names) / 10), min(MIN_HELD_OUT_GROUPS, len(names) // 5), 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    part_of_name = {
        names[index]: 0 if position < held_out else 1 if position < 2 * held_out else 2
        for position, index in enumerate(order)
    }
    part = np.array([part_of_name[group] for group in groups], dtype=np.uint8)
    test, val, train = (torch.from_numpy(np.flatnonzero(part == p)) for p in range(3))
    digest = hashlib.sha256(part.tobytes()).hexdigest()[:16]
    return Split(train, val, test, digest)


class RealQwenVLDataset(Dataset):
    """A feature cache, opened lazily: manifest, rows and singular values; features by row.

    `dataset[rows]` with a list of rows is the raw features [len(rows), T, D] bfloat16. Shards are
    memory-mapped on first use, so opening thousands of images costs no time and no memory.
    Attributes: manifest (dict), rows (pyarrow table without thumbnails), singular_values
    [N, min(T, D)] float64, split (Split), num_tokens T, feature_dim D, grid (rows, columns).

    Raises UserError where a file is missing, has another size than the manifest says, or
    disagrees in shape.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self.cache_dir = Path(cache_dir)
        self.manifest = _read_manifest(self.cache_dir)
        self.num_tokens: int = self.manifest["num_tokens"]
        self.feature_dim: int = self.manifest["feature_dim"]
        self.grid: tuple[int, int] = tuple(self.manifest["grid"])
        self._shard_ends = np.cumsum([shard["rows"] for shard in self.manifest["shards"]])
        self._shards: dict[int, object] = {}
        self._resident: Tensor | None = None
        self.singular_values = self._read_singular_values()
        self.rows = self._read_rows()
        self.split = split_by_group(self.rows["group"].to_pylist())

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, rows: list[int] | Tensor) -> Tensor:
        if self._resident is not None:
            return self._resident[torch.as_tensor(rows, device=self._resident.device)]
        return torch.stack([self._read_row(int(row)) for row in rows])

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
        return f"{demo}{encoder}, {len(self)} images, T={self.num_tokens}, D={self.feature_dim}"

    def image_record(self, row: int) -> dict:
        """Question, answers, bbox, width, height, group … of one row, as a dict."""
        return self.rows.slice(row, 1).to_pylist()[0]

    def thumbnail(self, row: int) -> Image.Image | None:
        """The image as the encoder saw it (square), small, RGB; None of imported features."""
        table = pq.read_table(self.cache_dir / "rows.parquet", columns=["thumbnail"])
        data = table["thumbnail"][row].as_py()
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGB")

    def keep_resident(self, device: torch.device, share: float = 0.5) -> bool:
        """Hold all features on `device` where they take at most `share` of its free memory."""
        if self._resident is not None and self._resident.device.type == device.type:
            return True
        shape = (len(self), self.num_tokens, self.feature_dim)
        if 2 * math.prod(shape) > share * cli.free_memory(device):
            return False
        resident = torch.empty(shape, dtype=torch.bfloat16, device=device)
        ends = self._shard_ends.tolist()
        for index, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            resident[first:end].copy_(self._shard(index).get_tensor("features"))
            self._check_finite(resident[first:end], first)
        self._resident = resident
        return True

    def verify(self) -> dict[str, str]:
        """Re-read every file: its sha256, of shards also finiteness; the manifest's own hash.

        Returns damaged file → what is wrong, empty where all is well. One shard at a time is in
        memory.
        """
        files = [*self.manifest["shards"], self.manifest["rows"], self.manifest["singular_values"]]
        damaged = {}
        for index, entry in enumerate(progress.over(files, "verify", "files")):
            name = entry["file"]
            if sha256_file(self.cache_dir / name) != entry["sha256"]:
                damaged[name] = "does not match its sha256"
            elif index < len(self.manifest["shards"]):
                if not usable_features(self._shard(index).get_tensor("features")).all():
                    damaged[name] = f"holds NaN or Inf, or features above {LARGEST_FEATURE:.0e}"
        if not self.singular_values.isfinite().all():
            damaged["singular_values.safetensors"] = "holds NaN or Inf"
        if not content_hash_fits(self.manifest):
            damaged["manifest.json"] = "is not as it was written"
        return damaged

    def _read_row(self, row: int) -> Tensor:
        shard = int(np.searchsorted(self._shard_ends, row, side="right"))
        first = int(self._shard_ends[shard]) - self.manifest["shards"][shard]["rows"]
        features = self._shard(shard).get_slice("features")[row - first]
        self._check_finite(features[None], row)
        return features

    def _check_finite(self, features: Tensor, first: int) -> None:
        """Refuse features [n, T, D] of the rows from `first` on that are not usable."""
        if not (usable := usable_features(features)).all():
            row = first + int((~usable).nonzero()[0])
            raise UserError(
                f"{self.cache_dir}: the features of row {row} are not finite, or above "
                f"{LARGEST_FEATURE:.0e}: look for damage with extract_features.py --verify "
                f"--cache_dir {self.cache_dir}"
            )

    def _shard(self, index: int):
        if index not in self._shards:
            path = self.cache_dir / self.manifest["shards"][index]["file"]
            try:
                shard = safe_open(path, framework="pt")
                features = shard.get_slice("features")
                found = features.get_shape(), features.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}): {BUILD_CACHE}") from None
            rows = self.manifest["shards"][index]["rows"]
            expected = [rows, self.num_tokens, self.feature_dim], "BF16"
            if found != expected:
                raise UserError(
                    f"{path} holds {found}, its manifest says {expected}: {BUILD_CACHE}"
                )
            self._shards[index] = shard
        return self._shards[index]

    def _read_singular_values(self) -> Tensor:
        path = self.cache_dir / "singular_values.safetensors"
        check_hash(path, self.manifest["singular_values"], BUILD_CACHE)
        try:
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor("singular_values")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): {BUILD_CACHE}") from None
        expected = (len(self), min(self.num_tokens, self.feature_dim))
        if values.shape != expected:
            raise UserError(
                f"{path} holds {tuple(values.shape)}, its manifest says {expected}: {BUILD_CACHE}"
            )
        return values

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

    # safetensors handles do not pickle: a loader's worker process maps the shards for itself
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}


def _read_manifest(cache_dir: Path) -> dict:
    if not cache_dir.is_dir():
        raise UserError(
            f"--cache_dir {cache_dir} does not exist: make it with extract_features.py, or with "
            "experiments.make_demo_data and extract_features.py --demo"
        )
    path = cache_dir / "manifest.json"
    unfinished = (cache_dir / "partial.json").exists()
    manifest = read_json(
        path,
        "the extraction was interrupted, run the same extract_features.py command to finish it"
        if unfinished
        else BUILD_CACHE,
    )
    check_keys(path, manifest, MANIFEST_KEYS, BUILD_CACHE)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, not {FORMAT}: {BUILD_CACHE}")
    files = [*manifest["shards"], manifest["rows"], manifest["singular_values"]]
    check_files(path, files, BUILD_CACHE)
    check_keys(path, manifest["encoder"], {"id": str}, BUILD_CACHE)
    for shard in manifest["shards"]:
        check_keys(path, shard, {"rows": int}, BUILD_CACHE)
    wrong = {
        "kind": manifest["kind"] not in ("real", "demo", "imported"),
        "resize": manifest["resize"] not in ("stretch", "pad", None),  # None: imported, not known
        "grid": [type(side) for side in manifest["grid"]] != [int, int]
        or math.prod(manifest["grid"]) != manifest["num_tokens"],
        "feature_dim": manifest["feature_dim"] < 1,
        "rows": manifest["rows"]["file"] != "rows.parquet",
        "singular_values": manifest["singular_values"]["file"] != "singular_values.safetensors",
    }
    for key in [key for key, is_wrong in wrong.items() if is_wrong]:
        value = json.dumps(manifest[key])[:60]
        raise UserError(f"{path} is damaged ({key} is {value}): {BUILD_CACHE}")
    if sum(shard["rows"] for shard in manifest["shards"]) != manifest["count"]:
        raise UserError(f"{path}: the shards' rows do not add up to its count: {BUILD_CACHE}")
    return manifest


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
        self.sampler = EpochSampler(rows, batch_size, shuffle_seed, part)
        self.device = device
        self.dataset = dataset
        self.singular_values = dataset.singular_values.to(device)
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

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.sampler.epoch, self.sampler.start = epoch, start

    def with_progress(self, desc: str, *, show: bool = True) -> Iterator[Batch]:
        """The batches, counted on stderr in images of all processes."""
        sampler = self.sampler
        done = min(self.num_images, sampler.start * sampler.batch_size * sampler.world)
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
        resident = self.dataset._resident is not None
        sources = (self.dataset[rows] for rows in order) if resident else self.loader
        for rows, features, (_, images, share) in zip(order, sources, shares, strict=True):
            x, mean, std = normalise(features.to(self.device, non_blocking=True))
            yield Batch(rows, x, mean, std, self.singular_values[rows], images, share)


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
