"""Head steps where bytes count: what is coded is moved by the head's own gradient.

    data = encode_with_head_steps(codec, prepared, step, reader)

Steps taken before the factors are rounded (`heads.refinement`) are lost in the rounding: 0.7 % less
task error on validation images of the demo. So the head reads what is decoded, and the tokens that
are coded next move against its gradient there, as if rounding had slope 1 (straight-through, Bengio
et al. 2013). Reading the bytes costs what it did. On the same images, 4 steps: 17 to 18 % less task
error for 4 to 6 % more bytes.

Legend: T tokens, D features, d directions of the codec, Z = C X P [T, d] as in `codec`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from experiments.coded_rivals import STEPS, Coded
from experiments.rivals import FactorsQuantised, Knob, Statistics, TokenImage
from heads.refinement import refine_factors
from heads.task_head import TaskHead
from lowrank_tokens.codec import Codec, Prepared
from qwenvl_dataloader import Batch

HEAD_STEPS = 4
# of the error that is left, were the loss quadratic in it; 1 is as good at coarse steps Δ and worse
# at fine ones
LENGTH = 0.5


class HeadReader:
    """A head, and its output of one image's full raw tokens [T, D], row of the cache."""

    def __init__(self, head: TaskHead, raw: Tensor, row: int, device: torch.device | str) -> None:
        self.head, self.device = head, device
        self.rows = torch.tensor([row], device=device)
        with torch.no_grad():
            self.full = self.outputs(raw)

    def outputs(self, raw: Tensor) -> Tensor:
        """Return the head's output [1, ...] of raw tokens [T, D]."""
        return self.head.outputs(raw[None].to(self.device), self.rows)

    def loss(self, raw: Tensor) -> Tensor:
        """Return the head's loss of decoded tokens [T, D], a scalar, with gradient."""
        return self.head.loss(self.outputs(raw), self.full)[0]


def encode_with_head_steps(
    codec: Codec, prepared: Prepared, step: float, reader: HeadReader, steps: int = HEAD_STEPS
) -> bytes:
    """Find the bytes at step Δ with the least loss of the head, of `steps` + 1 tries.

    Cost: a try is one encoding, one decoding, and one pass of the head forward and back.
    """
    moved, grid = prepared, prepared.grid
    best, lowest = b"", float("inf")
    for i in range(steps + 1):
        data = codec.encode_prepared(moved, step)
        x, mean, std = codec.normalised(data)
        x.requires_grad_(i < steps)
        extremes = codec.header(data).extremes
        loss = reader.loss(codec.finished(x * std[:, None] + mean[:, None], extremes))
        if (here := float(loss.detach())) < lowest:
            best, lowest = data, here
        if i == steps:
            break
        (gradient,) = torch.autograd.grad(loss, x)
        gradient = codec.of_gradient(gradient, grid)  # [T, d], of the loss by the decoded Z
        error = codec.transformed(x.detach(), grid) - prepared.z
        square = gradient.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        length = ((error * gradient).sum() / square).clamp_min(0)
        moved = replace(moved, z=moved.z - LENGTH * length * gradient)
    return best


class CodedHeadSteps(Coded):
    """Coded factors with head steps; the knob is the step Δ."""

    plain_name, knobs = "coded_head_steps", STEPS[2:11]

    def __init__(
        self, codec: Codec, shape: tuple[int, int], statistics: Statistics, head: TaskHead, device
    ) -> None:
        super().__init__(codec, shape, statistics)
        self.head, self.device = head, device
        self.name = self.name.replace("_head_steps_in_metric", "_in_metric_head_steps")

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        reader = reader_of(image, self.head, self.device)
        return encode_with_head_steps(self.codec, self.prepared(image), knob, reader)


class FactorsHeadSteps(FactorsQuantised):
    """Quantised factors refined by the head in the plain norm: what head steps bring alone."""

    name = "factors_head_steps"

    def __init__(
        self, shape: tuple[int, int], statistics: Statistics, head: TaskHead, device
    ) -> None:
        super().__init__(shape, statistics)
        self.head, self.device = head, device

    def factors(self, image: TokenImage, rank: int) -> tuple[Tensor, Tensor]:
        a, b = super().factors(image, rank)
        reader = reader_of(image, self.head, self.device)
        parts = (part[None].to(self.device) for part in (image.x, image.mean, image.std, a, b))
        x, mean, std, a, b = parts
        # no step needs singular values
        batch = Batch(reader.rows, x, mean, std, None, 1, 1.0, image.grid)
        a, b = refine_factors(self.head, batch, a, b, None, HEAD_STEPS, reader.full)
        return a[0].cpu(), b[0].cpu()


def reader_of(image: TokenImage, head: TaskHead, device: torch.device | str) -> HeadReader:
    """Return the image's reader, made once for each head and device."""
    readers = image.__dict__.setdefault("readers", {})
    key = head, str(device)
    if key not in readers:
        readers[key] = HeadReader(head, image.raw, image.row, device)
    return readers[key]
