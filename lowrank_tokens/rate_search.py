"""Search of the step with which an image's bytes or error meet a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowrank_tokens.stream import FACTORS, STEP_UNITS, TRANSFORM

FINEST, COARSEST = -12 * STEP_UNITS, 14 * STEP_UNITS  # indices of steps that are tried
SECANTS, TRIES = 3, 8  # steps of a search
# of Δ² that a rounded coefficient loses: 1/12 by uniform rounding; chosen on validation images
LOST_SHARE = {FACTORS: 1 / 12, TRANSFORM: 1 / 6}
CLOSE = 0.01  # a target is met as nearly as this at once, n times this at the n-th try

Result = TypeVar("Result")


class Tried(NamedTuple, Generic[Result]):
    """One step of a search."""

    position: int  # grows with the wanted quantity
    value: float  # log of error or bytes, which grows with the position
    result: Result


def guessed_index(z: Tensor, error: float, form: str) -> int:
    """Guess the index of the step with which coefficients Z are coded to a relative error.

    Each coefficient loses its square or a share of Δ², whichever is less (reverse water-filling).
    """
    exponents = torch.frexp(z).exponent.flatten().clamp_min(-30) + 30
    energy = torch.bincount(exponents, z.flatten().square().double(), minlength=1)
    count = torch.bincount(exponents, minlength=len(energy)).double()
    total = float(energy.sum())
    for index in range(COARSEST, FINEST, -8):
        lost = torch.minimum(energy, count * LOST_SHARE[form] * 4.0 ** (index / STEP_UNITS)).sum()
        if lost <= error**2 * total:
            return index
    return FINEST


def search(
    at: Callable[[int], Tried[Result]],
    target: float,
    start: int,
    first: int,
    slope: float = 0.4 / STEP_UNITS,
) -> tuple[Tried[Result] | None, float]:
    """Find the last position whose value is at most the target, as nearly as CLOSE, by secants.

    at: tries a position; values grow with it. first: the position with the least value. Returns
    the best try, None where none meets the target, and the least value that was seen.
    """
    last = first + COARSEST - FINEST
    below = above = before = None  # best tries on both sides of the target; the secant's other end
    position, least = min(max(start, first), last), math.inf
    for tries in range(COARSEST - FINEST):
        tried = at(position)
        least = min(least, tried.value)
        if tried.value <= target:
            below = tried
            if tried.value >= target - CLOSE * (1 + tries) or position == last:
                break
        else:
            above = tried
            if position == first:
                break
        if below and above:
            if above.position - below.position <= 1 or tries >= TRIES:
                break
            if tries >= SECANTS:  # where secants do not close in, halves do
                position = (below.position + above.position) // 2
                continue
            before = below if tried is above else above
        if before:
            rise = (tried.value - before.value) / (tried.position - before.position)
            slope = max(rise, slope / 4)
        ahead = (target - CLOSE / 2 - tried.value) / slope
        if not (below and above):  # rather too far than once more on the same side
            ahead *= 1 + tries / 4
        before = tried
        position += round(ahead) or (1 if tried is below else -1)
        lowest = below.position + 1 if below else first
        highest = above.position - 1 if above else last
        position = min(max(position, lowest), highest)
    return below, least
