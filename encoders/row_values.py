"""Check the values of a data set's rows: boxes and answers that cannot be meant as they stand.

What is left out or changed is said by a note; notes are counted in the cache's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

NOT_FOUR_NUMBERS = "a box that is not four finite numbers x, y, w, h was left out"
NO_AREA = "a box without area was left out"
FRACTIONS = "a box whose numbers are all at most 1 was left out: boxes are in pixels, not fractions"
OUTSIDE = "a box outside its image was left out"
BEYOND = "a box that reaches beyond its image was cut to it"
EMPTY_ANSWER = "an answer that is null was left out"


class CheckedBox(NamedTuple):
    """A box (x, y, w, h) in pixels inside its image, or None; `note` says what was wrong."""

    box: list[float] | None
    note: str | None = None


class CheckedAnswers(NamedTuple):
    """Answers without nulls, or None where the row has none; `note` says what was wrong."""

    answers: list[str] | None
    note: str | None = None


def check_box(box: Sequence[float | None] | None, width: int, height: int) -> CheckedBox:
    """Check a box (x, y, w, h) in pixels of an upright image of width × height.

    An absent or empty box is none, and no mistake. A box that reaches beyond the image is cut to
    it; one that is no box of pixels is left out.
    """
    if not box:
        return CheckedBox(None)
    if len(box) != 4 or not all(value is not None and math.isfinite(value) for value in box):
        return CheckedBox(None, NOT_FOUR_NUMBERS)
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        return CheckedBox(None, NO_AREA)
    if max(x, y, w, h) <= 1 < min(width, height):
        return CheckedBox(None, FRACTIONS)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        return CheckedBox(None, OUTSIDE)
    inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height
    if inside:
        return CheckedBox([x, y, w, h])
    return CheckedBox([left, top, right - left, bottom - top], BEYOND)


def check_answers(answers: Sequence[str | None] | None) -> CheckedAnswers:
    """Check the texts that answer a row's question."""
    if answers is None:
        return CheckedAnswers(None)
    kept = [answer for answer in answers if answer is not None]
    return CheckedAnswers(kept, EMPTY_ANSWER if len(kept) < len(answers) else None)
