"""The order of an epoch: which rows are in which batch, and which process has which of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from common.grids import Grid


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
    """What one process does in one step; the fields are those of a `Batch`."""

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
        """Images of all processes in the batches that `start` skips."""
        return sum(len(step) for step in self._steps()[: self.start])

    def shares(self) -> list[Share]:
        shares = []
        for step in self._steps()[self.start :]:
            own = step.tensor_split(self.world)[self.rank]
            used = own if len(own) else step[:1]
            shares.append(Share(used.tolist(), len(step), len(own) / len(step)))
        return shares

    def _steps(self) -> list[Tensor]:
        """Rows of all processes in each step of the epoch."""
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
