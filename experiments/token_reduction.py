"""What else saves memory: fewer tokens. Dropped at random, or averaged over blocks of the grid.

Both keep k tokens of D numbers; to be read by the same head, every place on the grid is filled from
what was kept. Legend: b images, T tokens on a grid of (rows, columns), D features, k tokens kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def drop_tokens(x: Tensor, keep: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """x [b, T, D] with all but `keep` random tokens replaced by their nearest kept neighbour.

    The same places for all images of a batch; 1 ≤ keep ≤ T. Ties go to the earlier place.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(x.shape[-2], generator=generator)[:keep].sort().values
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).double()
    nearest = torch.cdist(places, places[kept]).argmin(-1)
    return x[..., kept[nearest].to(x.device), :]


def average_tokens(x: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """x [b, T, D] with every token replaced by the mean of its block of side × side tokens.

    Keeps ⌈rows/side⌉ · ⌈columns/side⌉ tokens; a block at the edge is as large as the grid allows.
    """
    tokens = x.mT.unflatten(-1, grid)  # [b, D, rows, columns]
    pooled = F.avg_pool2d(tokens, side, ceil_mode=True, count_include_pad=False)
    spread = pooled.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return spread[..., : grid[0], : grid[1]].flatten(-2).mT


def tokens_kept(side: int, grid: tuple[int, int]) -> int:
    """Tokens that `average_tokens` keeps."""
    return -(-grid[0] // side) * -(-grid[1] // side)
