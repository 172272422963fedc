"""Raw tokens of a folder of factors, as a torch data set with random access.

tokens = VisionTokens("factors/exact")
loader = DataLoader(tokens, batch_size=64, shuffle=True, num_workers=4)  # [64, T, D] raw
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from coding.coded_files import CODED, CodedShards
from coding.factor_files import load_factors, read_manifest


class VisionTokens(Dataset):
    """Raw tokens of a folder of factors, coded or not: `tokens[row]` is [T, D] float32.

    Random access, one image at a time, in DataLoader's worker processes too. Errors as
    `read_factors`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        is_coded = self.manifest["dtype"] == CODED
        self._coded = CodedShards(self.folder, self.manifest) if is_coded else None

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, row: int) -> Tensor:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in {self.folder}: type 0 to {len(self) - 1}")
        if self._coded is not None:
            return self._coded.tokens(row)
        return load_factors(self.folder, [row])[0]
