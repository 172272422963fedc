"""Which images are for training, validation and test: the same in every script and every run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

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
