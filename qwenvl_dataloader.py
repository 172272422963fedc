"""Cached features for training: the split, the order of an epoch, batches, loaders.

N images, T tokens of an image, D features per token, b images in a batch. The cache itself is read
by `lowrank_tokens.cache.FeatureCache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lowrank_tokens import progress
from lowrank_tokens.cache import FeatureCache
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import normalise

# Which images are for training, validation and test: the same in every script and every run.

# A constant, not --seed: every script and every run must hold out the same images.
SPLIT_SEED = 42
MIN_HELD_OUT_GROUPS = 8


@dataclass(frozen=True)
class Split:
    """Rows of the cache by part; parts share no group."""

    train: Tensor  # [n] int64
    val: Tensor
    test: Tensor
    hash: str  # of which row is in which part, 16 hexadecimal digits

    def part_of(self, row: int) -> str:
        """Return 'train', 'val' or 'test'."""
        return next(name for name in ("train", "val", "test") if row in getattr(self, name))


def split_by_group(groups: list[str]) -> Split:
    """Split 80/10/10 by group: rows of one group (one image, one photograph) stay together.

    With few groups, 10 % would be too few to judge by: validation and test get at least 8 groups
    each where that leaves them at most a fifth of the groups, and at least one. Deterministic in
    the group names alone. Raises InputError for fewer than three groups.
    """
    names = sorted(set(groups))
    if len(names) < 3:
        raise InputError(
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


# The order of an epoch: which rows are in which batch, and which process has which of them.


class Batch(NamedTuple):
    """b normalised images of one grid on the device; what every model and reference is given."""

    rows: Tensor  # [b] int64, rows of the cache
    x: Tensor  # [b, T, D] float32, normalised
    mean: Tensor  # [b, T, 1] float32
    std: Tensor  # [b, T, 1] float32
    singular_values: Tensor  # [b, min(T, D)] float64, of x, largest first
    images: int  # of this step in all processes
    share: float  # of them that are this process's: b / images, or 0 where it computes along
    grid: Grid  # (rows, columns) of each image's tokens; T is their product


class Share(NamedTuple):
    """The images of one process in one step; the fields are those of a `Batch`."""

    rows: list[int]
    images: int
    share: float


class EpochSampler(Sampler):
    """Lists of rows, one list a batch, in an order that only (seed, epoch) decide.

    `start` skips that many batches of the epoch: an interrupted epoch goes on where it was.
    part: (rank, world); of several processes each takes its part of every world · batch_size rows
    in that order. Where the last rows are too few for all, a process computes on one of another's
    with share 0: no step may lack a process, and a network has no gradient of no image.
    grids: of every row of the cache; a batch then holds rows of one grid only. Batches stand where
    they become full in the epoch's order, those that do not at its end. Without a seed `rows` has
    the order of the batches.
    """

    def __init__(
        self,
        rows: Tensor,
        batch_size: int,
        shuffle_seed: int | None = None,
        part: tuple[int, int] = (0, 1),
        grids: Sequence[Grid] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.shuffle_seed = rows, batch_size, shuffle_seed
        self.rank, self.world = part
        self.grids = grids
        self.epoch = 0
        self.start = 0
        if grids is not None and shuffle_seed is None and len(rows):
            self.rows = torch.cat(self._steps())
        self._count = len(self._steps())

    def __len__(self) -> int:
        return self._count

    @property
    def images_before(self) -> int:
        """Return the number of images of all processes in the batches that `start` skips."""
        return sum(len(step) for step in self._steps()[: self.start])

    def shares(self) -> list[Share]:
        shares = []
        for step in self._steps()[self.start :]:
            own = step.tensor_split(self.world)[self.rank]
            used = own if len(own) else step[:1]
            shares.append(Share(used.tolist(), len(step), len(own) / len(step)))
        return shares

    def _steps(self) -> list[Tensor]:
        """Return the rows of all processes in each step of the epoch."""
        rows = self.rows
        if self.shuffle_seed is not None:
            key = np.random.SeedSequence([self.shuffle_seed, self.epoch]).generate_state(1)[0]
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(key)))
            rows = rows[order]
        size = self.batch_size * self.world
        if self.grids is None:
            return list(rows.split(size)) if len(rows) else []
        full: list[list[int]] = []
        filling: dict[Grid, list[int]] = {}
        for row in rows.tolist():
            step = filling.setdefault(self.grids[row], [])
            step.append(row)
            if len(step) == size:
                full.append(filling.pop(self.grids[row]))
        return [torch.tensor(step, dtype=rows.dtype) for step in [*full, *filling.values()]]

    def __iter__(self) -> Iterator[list[int]]:
        for share in self.shares():
            yield share.rows


class RealQwenVLDataset(FeatureCache):
    """A feature cache with its split into training, validation and test images.

    Attributes beside `FeatureCache`'s: split (Split). Raises as `FeatureCache`, and InputError for
    images of fewer than three groups.
    """

    def __init__(self, cache_dir: str | Path, *, lists: bool = False) -> None:
        super().__init__(cache_dir, lists=lists)
        self.split = split_by_group(self.rows["group"].to_pylist())


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
        """Return a loader of these rows of the cache, shuffled as this one is; for one process."""
        sampler = self.sampler
        size, seed = sampler.batch_size, sampler.shuffle_seed
        return BatchLoader(self.dataset, rows, size, self.device, seed)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.sampler.epoch, self.sampler.start = epoch, start

    def with_progress(self, desc: str, *, show: bool = True) -> Iterator[Batch]:
        """Yield the batches, counted on stderr in images of all processes."""
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
    """Return the split's loaders; features live on the device where they fit comfortably.

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
    """Return the loaders with images of the most frequent grid alone, and print a note about it.

    For measurements that need matrices of one shape. Raises InputError where a part has none.
    """
    dataset = loaders.test.dataset
    if not dataset.ragged:
        return loaders
    parts, grid = [], "{} × {}".format(*dataset.grid)
    for name, loader in zip(loaders._fields, loaders, strict=True):
        parts.append(loader.only(dataset.of_main_grid(loader.sampler.rows)))
        if not parts[-1].num_images:
            raise InputError(
                f"{dataset.cache_dir} has no {name} image of its most frequent grid, {grid}: "
                "name a cache made with extract_features.py --resize stretch or pad"
            )
    counts = f"{parts[2].num_images} of {loaders.test.num_images} test images"
    print(f"note: images of {grid} tokens only, {counts}: matrices of one shape are compared")
    return Loaders(*parts)
