"""Levels of a codec's tables: which table each symbol of an image is coded with.

    levels = Levels(codec.tensors)
    levels.columns(sigma), levels.rows(sigma, grid)     # [d, r] and [T, r] int64

A codec keeps log variances of coefficients over training images, in 1/16 of a level, on one grid;
other grids are mapped onto it by frequency. Levels are integers from end to end, so the same
symbols are read on every machine.

Legend: T tokens of an image, d directions of the KLT, r components; i_σ is σ_k / Δ on the
logarithmic grid of levels.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.transform import on_grid, to_coded, to_levels, tokens_shift


def integers(array: Tensor) -> np.ndarray:
    """Return a tensor of integers as int64."""
    return array.numpy().astype(np.int64)


class Levels:
    """The levels of LayerNorm's statistics, of A and B, and of Z, on any grid.

    arrays: of a `Codec`: statistics and, of the form `factors`, rows, columns and starts; of the
        form `transform`, spectrum_left and spectrum_right.
    """

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self._arrays = arrays
        self._statistics = integers(arrays["statistics"])
        if "rows" in arrays:
            self._rows, self._columns = integers(arrays["rows"]), integers(arrays["columns"])
            self._starts = integers(arrays["starts"])
        self._maps: dict[tuple[str, Grid], np.ndarray] = {}

    def statistics(self, grid: Grid) -> np.ndarray:
        """Return the levels of the statistics' symbols: [2 T]."""
        return to_coded(to_levels(self._on_grid("statistics", self._statistics, grid))).ravel()

    def rows(self, sigma: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the levels of σ_k u_k, of i_σ [r]: [T, r]."""
        maps = self._on_grid("rows", self._rows, grid)
        maps = maps + tokens_shift(self._rows.shape[1:], grid)
        return to_levels(maps[self._bucket(len(sigma))].T) + sigma

    def columns(self, sigma: np.ndarray) -> np.ndarray:
        """Return the levels of σ_k v_k, of i_σ [r]: [d, r]."""
        return to_levels(self._columns[self._bucket(len(sigma))].T) + sigma

    def transform(self, step_index: int, grid: Grid) -> np.ndarray:
        """Return the levels of Z / Δ: [d, T]."""
        if "spectrum_left" not in self._arrays:
            raise InputError("this codec has no section for the form transform: fit one with it")
        return to_levels(self._on_grid("spectrum", self._spectrum, grid) - step_index)

    @cached_property
    def _spectrum(self) -> np.ndarray:
        """Return log standard deviations of Z's coefficients, in UNITS: [d, H, W] int64."""
        left, right = (integers(self._arrays[f"spectrum_{side}"]) for side in ("left", "right"))
        return np.moveaxis((left @ right) >> 8, 2, 0)

    def _bucket(self, rank: int) -> np.ndarray:
        return np.searchsorted(self._starts, np.arange(rank), side="right") - 1

    def _on_grid(self, name: str, maps: np.ndarray, grid: Grid) -> np.ndarray:
        """Return maps [n, H, W] as they are read on a grid: [n, T], computed once a grid."""
        key = (name, grid)
        if key not in self._maps:
            self._maps[key] = on_grid(maps, grid).reshape(len(maps), -1)
        return self._maps[key]
