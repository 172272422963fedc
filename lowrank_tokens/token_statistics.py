"""LayerNorm's statistics of an image's tokens, mean and log std, as symbols of the codec.

Their 2-D DCT over the grid is rounded in steps that the codec's file holds. X is normalised by
what is stored, so that factors carry what the steps lose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.entropy import CODED_FROM, SymbolReader, Tables, encode_symbols
from lowrank_tokens.grids import Grid
from lowrank_tokens.levels import Levels
from lowrank_tokens.transform import inverse_dct, statistics_dct


class TokenStatistics:
    """Rounds, writes and reads the statistics of one image.

    scales: the steps of the mean and of log std, and the mean of log std over training tokens.
    """

    def __init__(self, scales: Sequence[float], levels: Levels, tables: Tables) -> None:
        self.scales, self.levels, self.tables = scales, levels, tables

    def encode(self, tokens: Tensor, grid: Grid) -> bytes:
        """Return the statistics of raw tokens [T, D] as bytes, as streams hold them."""
        symbols, _, _ = self.rounded(tokens.float(), grid)
        return encode_symbols([(symbols.ravel(), self.levels.statistics(grid))], self.tables)

    def decode(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return mean and std [T, 1] float32 from the bytes of `encode`."""
        symbols = SymbolReader(data, self.tables).read(self.levels.statistics(grid))
        return self.of_symbols(symbols.reshape(2, -1), grid)

    def rounded(self, tokens: Tensor, grid: Grid) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return symbols [2, T] of mean and log std, and mean and std [T, 1] as decoded."""
        symbols = statistics_dct(tokens, grid, self.scales).round().to(torch.int64).numpy()
        symbols[self.levels.statistics(grid).reshape(2, -1) < CODED_FROM] = 0
        return symbols, *self.of_symbols(symbols, grid)

    def of_symbols(self, symbols: np.ndarray, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return mean and std [T, 1] float32 of symbols [2, T]."""
        mean_step, log_step, log_std = self.scales
        steps = torch.tensor([[mean_step], [log_step]])
        mean, log = inverse_dct((torch.from_numpy(symbols).float() * steps).mT, grid).mT
        return mean[:, None], (log + log_std).exp()[:, None]
