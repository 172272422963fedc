"""Raw tokens of a folder of factors, as a torch data set with random access.

tokens = VisionTokens("factors/exact")
loader = DataLoader(tokens, batch_size=64, shuffle=True, num_workers=4)  # [64, T, D] raw
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from coding.factor_files import open_shards, read_manifest
from common.grids import Grid


class VisionTokens(Dataset):
    """Raw tokens of a folder of factors, coded or not: `tokens[row]` is [T, D] float32.

    Random access, one image at a time, in DataLoader's worker processes too. Images of other grids
    have another T: then a loader needs a collate_fn, or batch_size=None. Errors as `read_factors`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shards = open_shards(self.folder, read_manifest(folder))

    def __len__(self) -> int:
        return self._shards.manifest["count"]

    def __getitem__(self, row: int) -> Tensor:
        return self._shards.tokens(self._checked(row))

    def grid(self, row: int) -> Grid:
        """(rows, columns) of an image's tokens, which stand in raster order."""
        return self._shards.grid(self._checked(row))

    def _checked(self, row: int) -> int:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in {self.folder}: type 0 to {len(self) - 1}")
        return row
