"""The size of an image at native resolution: its own, but for what whole tokens ask for."""

from __future__ import annotations

import math
from typing import NamedTuple

from encoders.image_sources import UnreadableImage

MAX_ASPECT = 200  # of Qwen's processor


class PixelRange(NamedTuple):
    """Pixels that an image may have: smaller and larger ones are scaled."""

    least: int
    most: int


def size_in(manifest: dict) -> int | PixelRange:
    """Return the `image_size` of `towers.load_encoder` that a cache was made with."""
    if manifest["resize"] == "native":
        return PixelRange(manifest["min_pixels"], manifest["max_pixels"])
    return manifest["image_size"]


def native_size(width: int, height: int, step: int, limits: PixelRange) -> tuple[int, int]:
    """Return width and height, multiples of `step`, as near as can be to the image's own.

    Where their product is outside `limits` both sides are scaled alike, towards its inside, as
    `smart_resize` of transformers' Qwen2-VL processors does (a test compares the two). A side is at
    least one step: a very long image may have more than `limits.most`. Raises UnreadableImage where
    a side is over 200 times the other.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        size = f"{width} × {height} pixels"
        raise UnreadableImage(f"{size}: a side is over {MAX_ASPECT} times the other")
    sides = width, height
    across, down = (round(side / step) * step for side in sides)
    # the library's order of operations: a last bit decides where floor and ceil fall
    if across * down > limits.most:
        shrink = math.sqrt(height * width / limits.most)
        across, down = (max(step, math.floor(side / shrink / step) * step) for side in sides)
    elif across * down < limits.least:
        grow = math.sqrt(limits.least / (height * width))
        across, down = (math.ceil(side * grow / step) * step for side in sides)
    return across, down
