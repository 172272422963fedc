"""Refinement of A and B by the head itself: a few of its gradient steps for each image.

    a, b = refine_factors(head, batch, a, b, metric, steps=4)

What a metric cannot see, the curvature of this image's own head, the head can: each step is one
forward and one backward pass. A·B keeps its rank, and reading the factors costs what it did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heads.metric import TaskMetric
from lowrank_tokens.linalg import Factors
from qwenvl_dataloader import Batch

if TYPE_CHECKING:
    from heads.task_head import TaskHead

# Chosen on validation images of the demo (saliency head, 4 steps, 0.15, 0.3 and 0.6 tried): task
# error below the plain SVD's 49, 52 and 45 % at rank 4.
STEP = 0.3
LARGEST = 0.15
MOMENTS = (0.9, 0.99)


def refine_factors(
    head: TaskHead,
    batch: Batch,
    a: Tensor,
    b: Tensor,
    metric: TaskMetric | None,
    steps: int,
    full: Tensor | None = None,
) -> Factors:
    """Improve A [b, T, r], B [b, r, D] by Adam steps on the head's loss against the full X.

    Steps are taken on A Σ^½ and Σ^-½ B M^½, Σ the norms of the rows of B M^½: there both factors
    have one scale. Without a metric M = I: the steps then know nothing of it. A step moves a number
    by about STEP · e of that scale, e the task error that the image has now (at most LARGEST), so
    that a good start is changed little. Where a step makes an image's loss larger it is taken back
    and the next is half as long: no image ends worse than it began. The head's loss decides:
    relative error, or KL.

    Args: full: the head's output of the full tokens where it is known already.
    Cost: steps + 1 forward and `steps` backward passes of the head, an image.
    """
    with torch.no_grad():
        if full is None:
            full = head.of_batch(batch)
        scaled = b if metric is None else b @ metric.root  # [b, r, D]
        norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1e-12).sqrt()
        start = (a * norms.mT, scaled / norms)

    def mapped_back(right: Tensor) -> Tensor:
        return right if metric is None else right @ metric.inverse_root

    adam = [_Adam(p) for p in start]
    best, slope = [p.clone() for p in start], [torch.zeros_like(p) for p in start]
    lowest = torch.full((len(a), 1, 1), torch.inf, device=a.device)
    length, error = torch.ones_like(lowest), torch.zeros_like(lowest)
    now = [p.clone() for p in start]
    for step in range(steps + 1):
        left, right = (p.detach().requires_grad_(step < steps) for p in now)
        with torch.enable_grad():
            outputs = head.of_batch(batch, left @ mapped_back(right))
            loss = head.loss(outputs, full)
            if step < steps:
                gradients = torch.autograd.grad(loss.sum(), (left, right))
        here = loss.detach()[:, None, None]
        better = here < lowest
        lowest = torch.where(better, here, lowest)
        best = [torch.where(better, p, q) for p, q in zip(now, best, strict=True)]
        if step == steps:
            break
        slope = [torch.where(better, g, s) for g, s in zip(gradients, slope, strict=True)]
        length = torch.where(better, length, length / 2)
        found = head.error(outputs.detach(), full).to(a.dtype)[:, None, None]
        error = torch.where(better, found.clamp_max(LARGEST), error)
        sizes = STEP * error * length
        now = [p + o.step(g, sizes) for p, g, o in zip(best, slope, adam, strict=True)]
    return best[0], mapped_back(best[1])


class _Adam:
    """Kingma & Ba 2015, with a step size for each image and in units of the factor's own scale."""

    def __init__(self, start: Tensor) -> None:
        self.scale = start.square().mean((-2, -1), keepdim=True).sqrt()
        self.first, self.second, self.steps = torch.zeros_like(start), torch.zeros_like(start), 0

    @torch.no_grad()
    def step(self, gradient: Tensor, size: Tensor) -> Tensor:
        # a gradient falls with the loss; at one length, old and new ones weigh alike
        rms = gradient.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)
        gradient = gradient / rms
        self.steps += 1
        self.first.lerp_(gradient, 1 - MOMENTS[0])
        self.second.lerp_(gradient.square(), 1 - MOMENTS[1])
        mean = self.first / (1 - MOMENTS[0] ** self.steps)
        root = (self.second / (1 - MOMENTS[1] ** self.steps)).sqrt()
        return -size * self.scale * mean / (root + 1e-8)
