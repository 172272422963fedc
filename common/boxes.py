"""Which tokens of a grid a box covers.

A box is (x, y, w, h) in fractions of what the encoder saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Less than this share of a token's side is rounding of the box's corners.
LEAST_OVERLAP = 1e-6

Box = tuple[float, float, float, float]


def box_in_view(record: dict, resize: str | None) -> Box | None:
    """The answer's box (x, y, w, h) as fractions of what the encoder saw.

    record: a row with bbox in pixels of the original and its width and height; resize: the
    manifest's rule. None where the row has no box.
    """
    box, width, height = record["bbox"], record["width"], record["height"]
    if not box or len(box) != 4:
        return None
    x, y, w, h = box
    if resize != "pad":  # the whole image, whatever became of its aspect ratio
        return x / width, y / height, w / width, h / height
    side = max(width, height)  # pad: centred in a square
    left, top = (side - width) / 2, (side - height) / 2
    return (x + left) / side, (y + top) / side, w / side, h / side


def tokens_in_box(box: Box | None, grid: tuple[int, int]) -> Tensor:
    """Tokens [T] bool, in raster order, whose cell of the grid shares area with the box.

    A box smaller than a cell covers the cell it lies in. None, a box without area and one beside
    the image cover no token.
    """
    rows, columns = grid
    if box is None:
        return torch.zeros(rows * columns, dtype=torch.bool)
    x, y, w, h = box
    across, down = _cells(x, w, columns), _cells(y, h, rows)
    return (down[:, None] & across[None, :]).flatten()


def _cells(start: float, length: float, count: int) -> Tensor:
    """Of `count` equal cells of [0, 1] those that share a length with [start, start + length]."""
    left = torch.arange(count, dtype=torch.float64)
    first, last = start * count, (start + length) * count
    shared = (left + 1).clamp(max=last) - left.clamp(min=first)
    return (shared > LEAST_OVERLAP) & (length > 0)
