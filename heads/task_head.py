"""The interface of a head: a network that reads vision tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank_tokens.linalg import denormalise
from qwenvl_dataloader import Batch

FULL_KEPT = 2**30  # bytes, where the head computes
Score = Callable[[Tensor, Tensor], Tensor]  # (raw tokens [b, T, D], rows [b]) → [b]


class TaskHead(ABC):
    """A frozen network that reads the tokens of the rows of one cache.

    name: one of HEADS; sha256: of its weights, hexadecimal; output: what `outputs` holds, in words
    """

    name: str
    sha256: str
    output: str
    loss_name: str | None = None  # what `loss` is where it says more than `error`, in words

    @abstractmethod
    def outputs(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits [b, ...] float32 of raw tokens [b, T, D] of the cache's rows [b] int64."""

    @abstractmethod
    def loss(self, outputs: Tensor, full: Tensor) -> Tensor:
        """Return what training lowers, [b] ≥ 0; 0 where `outputs` equals `full`, of full tokens."""

    @abstractmethod
    def agreement(self, outputs: Tensor, full: Tensor) -> Tensor:
        """Return how much of the answer is the one that the full tokens give: [b] in [0, 1]."""

    def of_batch(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """Return `outputs` of a batch's tokens, or of x [b, T, D] normalised as they are."""
        tokens = denormalise(batch.x if x is None else x, batch.mean, batch.std)
        return self.outputs(tokens, batch.rows)

    @torch.no_grad()
    def of_full(self, batch: Batch) -> Tensor:
        """Return `of_batch` of the cache's own tokens.

        Neither they nor the head change. What fits into FULL_KEPT bytes is kept, which saves every
        epoch but the first a pass of the head.
        """
        rows = batch.rows.tolist()
        if not all(row in self._kept for row in rows):
            full = self.of_batch(batch)
            if sum(y.nbytes for y in self._kept.values()) + full.nbytes > FULL_KEPT:
                return full
            own = zip(rows, full, self.own_shapes(full, batch.rows), strict=True)
            self._kept |= {row: y[tuple(slice(n) for n in shape)].clone() for row, y, shape in own}
        return pad_sequence([self._kept[row] for row in rows], batch_first=True)

    @cached_property
    def _kept(self) -> dict[int, Tensor]:
        return {}

    @property
    def scores(self) -> dict[str, Score]:
        """Return the scores of what it generates: name → (raw tokens, rows) → [b] float64."""
        return {}

    def compared(self, outputs: Tensor) -> Tensor:
        """Remove from `outputs` what changes nothing in their meaning: y of error and metric."""
        return outputs

    def own_shapes(self, outputs: Tensor, rows: Tensor) -> list[torch.Size]:
        """Return the shape of each image's own output, first in a batch's padded one."""
        return [outputs.shape[1:]] * len(outputs)

    def error(self, outputs: Tensor, full: Tensor) -> Tensor:
        """Return the task error ‖ŷ − y‖ / ‖y‖ of each image's `compared` logits, [b] float64."""
        return squared_error(self.compared(outputs), self.compared(full)).double().sqrt()


def squared_error(outputs: Tensor, full: Tensor) -> Tensor:
    """‖ŷ − y‖² / ‖y‖² of each image, [b], with gradient; 0 where both are zero."""
    difference = (outputs - full).flatten(1).square().sum(-1)
    return difference / full.flatten(1).square().sum(-1).clamp_min(torch.finfo(full.dtype).tiny)
