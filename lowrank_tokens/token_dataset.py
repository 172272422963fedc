"""Tokens by row, as torch and numpy users ask for them: the base of FeatureCache, VisionTokens."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid

Rows = int | slice | Sequence[int] | Tensor | np.ndarray


def row_numbers(rows: Rows, count: int, folder: Path) -> int | list[int]:
    """Return the number of one row of `count`, or a list of those of several, each 0 or more.

    rows: a whole number, a slice, a sequence or array of whole numbers, or a mask [count] of bools;
    a negative number counts from the end.
    Raises IndexError for a row that is not there, TypeError or IndexError for anything else.
    """
    if isinstance(rows, slice):
        return list(range(count)[rows])
    if isinstance(rows, Tensor | np.ndarray):
        rows = rows.tolist()
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        return _row_number(rows, count, folder)
    if rows and all(isinstance(row, bool | np.bool_) for row in rows):
        if len(rows) != count:
            raise IndexError(f"a mask of {len(rows)} rows does not fit the {count} of {folder}")
        return np.flatnonzero(rows).tolist()
    return [_row_number(row, count, folder) for row in rows]


def _row_number(row: int, count: int, folder: Path) -> int:
    try:
        number = None if isinstance(row, bool) else operator.index(row)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(
            f"row {row!r} is no row of {folder}: give whole numbers, a slice, or a mask of bools"
        )
    if not -count <= number < count:
        raise IndexError(f"row {number} is not in {folder}: give 0 to {count - 1}")
    return number % count


def check_one_grid(grids: Iterable[Grid], folder: Path, remedy: str) -> None:
    """Raise InputError, with the remedy, where images have several grids: they do not stack."""
    if len(different := list(dict.fromkeys(grids))) > 1:
        (h, w), (other_h, other_w) = different[:2]
        raise InputError(
            f"{folder} has images of {h} × {w} and of {other_h} × {other_w} tokens, which do not "
            f"stack: {remedy}"
        )


class TokenDataset(Dataset, ABC):
    """A torch Dataset of the tokens of images, by row.

        data[7], data[-1]              # [T, D]
        data[[3, 5]], data[-4:]        # [n, T, D], rows of one grid
        data[mask]                     # likewise; mask [len(data)] of bools
        DataLoader(data, batch_size=8) # [8, T, D]

    Args:
        folder: that messages name.
        lists: a loader's batch is a list of tokens [T_i, D], which a collate_fn of yours takes,
            such as `collate_fn=list`: images of different grids do not stack.

    A subclass says `__len__`, `grid_of` and `read`.
    """

    def __init__(self, folder: str | Path, lists: bool) -> None:
        self.folder, self.lists = Path(folder), lists

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def grid_of(self, row: int) -> Grid:
        """Return (rows, columns) of an image's tokens, which stand in raster order."""

    @abstractmethod
    def read(self, rows: list[int]) -> Sequence[Tensor]:
        """Return the tokens [T_i, D] of rows that are there, counted from 0; of none [0, T, D]."""

    def __getitem__(self, rows: Rows) -> Tensor:
        """Return one image's tokens [T, D], or those of several rows, [n, T, D].

        Raises IndexError for a row that is not there, InputError (a ValueError) for rows of
        different grids.
        """
        numbers = row_numbers(rows, len(self), self.folder)
        if isinstance(numbers, int):
            return self.read([numbers])[0]
        check_one_grid(map(self.grid_of, numbers), self.folder, "read them one by one")
        tokens = self.read(numbers)
        return tokens if isinstance(tokens, Tensor) else torch.stack(tokens)

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """Return the tokens of a loader's batch, [T_i, D] each."""
        numbers = row_numbers(rows, len(self), self.folder)
        if not self.lists:
            remedy = (
                f"open it with {type(self).__name__}(folder, lists=True) and give the DataLoader "
                "collate_fn=list, or a batch_size of 1"
            )
            check_one_grid(map(self.grid_of, numbers), self.folder, remedy)
        return list(self.read(numbers))
