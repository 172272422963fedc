"""The order of an epoch: which rows are in which batch, and which process has which of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


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
    """

    def __init__(
        self,
        rows: Tensor,
        batch_size: int,
        shuffle_seed: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.rows, self.batch_size, self.shuffle_seed = rows, batch_size, shuffle_seed
        self.rank, self.world = part
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.world))

    def shares(self) -> list[Share]:
        rows = self.rows
        if self.shuffle_seed is not None:
            key = np.random.SeedSequence([self.shuffle_seed, self.epoch]).generate_state(1)[0]
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(key)))
            rows = rows[order]
        size, shares = self.batch_size * self.world, []
        for first in range(self.start * size, len(rows), size):
            step = rows[first : first + size]
            own = step.tensor_split(self.world)[self.rank]
            used = own if len(own) else step[:1]
            shares.append(Share(used.tolist(), len(step), len(own) / len(step)))
        return shares

    def __iter__(self) -> Iterator[list[int]]:
        for share in self.shares():
            yield share.rows
