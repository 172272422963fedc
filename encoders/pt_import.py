"""Features of an older cache: a folder of features_<i>.pt files, one image each.

    features = PtFeatures("old_cache")          # reads every file once, keeps none
    for row_id in features.row_ids:
        tokens = features[row_id]               # [T, D]

Files are read by `torch.load(weights_only=True)`, memory-mapped where their format allows: a pickle
cannot run code, and one file at a time is in memory.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor

from common import processes
from lowrank_tokens import progress
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import LARGEST_FEATURE, usable_features


class DamagedFile(Exception):
    """Why a file cannot be imported, in one line."""


class _Seen(NamedTuple):
    shape: tuple[int, int]
    dtype: str
    sha256: str  # of the values in bfloat16, as a cache stores them


class PtFeatures:
    """The files that can be imported, and what is wrong with the others.

    row_ids: the numbers i of importable files, rising; num_tokens, feature_dim: T and D, those of
    most readable files; sha256: of all importable values in bfloat16; dtypes: name → files;
    skipped: {"row_id", "reason", "count"} of gaps in the numbering (which starts at 0, or at 1
    where there is no 0) and of files that are damaged, not finite or of another shape.

    Raises InputError where no file can be imported, or two have one number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._paths = _numbered_files(self.folder)
        self.skipped = _gaps(sorted(self._paths))
        seen: dict[int, _Seen] = {}
        show = processes.is_main()
        for row_id in progress.over(sorted(self._paths), "check", "files", show=show):
            try:
                seen[row_id] = _examine(read_pt(self._paths[row_id]))
            except DamagedFile as error:
                self._skip(row_id, str(error))
        if not seen:
            raise InputError(
                f"--import_pt {folder}: none of {len(self._paths)} files can be read, the first: "
                f"{self.skipped[0]['reason']}: name a folder of features_<i>.pt"
            )
        shapes = Counter(entry.shape for entry in seen.values())
        shape = shapes.most_common(1)[0][0]
        self.num_tokens, self.feature_dim = shape
        for row_id in [row_id for row_id, entry in seen.items() if entry.shape != shape]:
            found = seen.pop(row_id).shape
            self._skip(row_id, f"is of shape {found}, {shapes[shape]} files are of {shape}")
        self.skipped.sort(key=lambda entry: entry["row_id"])
        self.row_ids = list(seen)
        self.dtypes = dict(sorted(Counter(entry.dtype for entry in seen.values()).items()))
        self._hashes = {row_id: entry.sha256 for row_id, entry in seen.items()}
        digest = hashlib.sha256("".join(f"{i} {h}\n" for i, h in self._hashes.items()).encode())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def num_different(self) -> int:
        """Return the number of files whose values differ."""
        return len(set(self._hashes.values()))

    def __getitem__(self, row_id: int) -> Tensor:
        """Return a file's values [T, D]. Raises InputError where the file changed or is gone."""
        path = self._paths[row_id]
        try:
            tokens = read_pt(path)
            if _examine(tokens).sha256 == self._hashes[row_id]:
                return tokens
            reason = "has changed"
        except DamagedFile as error:
            reason = str(error)
        raise InputError(f"{path} {reason} during the import: type the same command again")

    def record(self, row_id: int) -> dict:
        """Return a cache's row (`cache_writer.ROW_SCHEMA`). Features that are equal are one group.

        There are no image hashes, but the same image asked about twice has the same features; as
        rows of their own they would stand on both sides of the split.
        """
        return {
            "row_id": row_id,
            "group": self._hashes[row_id],
            "path": self._paths[row_id].name,
        }

    def _skip(self, row_id: int, reason: str) -> None:
        name = self._paths[row_id].name
        self.skipped.append({"row_id": row_id, "reason": f"{name} {reason}", "count": 1})


def read_pt(path: Path) -> Tensor:
    """Return the tensor [T, D] of a file that holds [1, T, D] or [T, D], in its own float type.

    Raises DamagedFile for anything else; no code of the file runs.
    """
    value = load_pt(path)
    if not isinstance(value, Tensor):
        raise DamagedFile(f"holds a {type(value).__name__}, not a tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise DamagedFile(f"holds {value.dtype} ({value.layout}), not dense floats")
    tokens = value.detach()
    if tokens.dim() == 3 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise DamagedFile(f"is of shape {tuple(value.shape)}, not [1, T, D] or [T, D]")
    return tokens


def load_pt(path: Path) -> object:
    """Return what a file of torch.save holds, memory-mapped where its format allows.

    Raises DamagedFile where it is damaged or holds more than tensors and plain containers.
    """
    try:
        # files of torch before 1.6 are no archives, which alone can be mapped
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except UnpicklingError:
        raise DamagedFile("is damaged, or holds objects beside tensors") from None
    except Exception as error:
        # damaged bytes make zip, pickle and torch raise nearly anything; all of it means one thing
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DamagedFile(f"is damaged ({reason})") from None


def _examine(tokens: Tensor) -> _Seen:
    stored = tokens.to(torch.bfloat16)
    if not usable_features(stored.unsqueeze(0)):
        raise DamagedFile(f"holds NaN or Inf, or features above {LARGEST_FEATURE:.0e}")
    digest = hashlib.sha256(stored.contiguous().view(torch.int16).numpy())
    name = str(tokens.dtype).removeprefix("torch.")
    return _Seen(tuple(tokens.shape), name, digest.hexdigest())


def _numbered_files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise InputError(f"--import_pt {folder} is not a folder: name one of features_<i>.pt files")
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"features_(\d+)\.pt", path.name):
            number = int(match[1])
            if number in paths:
                raise InputError(
                    f"--import_pt {folder}: {paths[number].name} and {path.name} are both number "
                    f"{number}: remove one"
                )
            paths[number] = path
    if not paths:
        raise InputError(f"--import_pt {folder} has no features_<i>.pt: name the older cache")
    return paths


def _gaps(numbers: list[int]) -> list[dict]:
    """Return one entry for each run of numbers that no file has."""
    gaps, expected = [], int(numbers[0] == 1)
    for number in numbers:
        if count := number - expected:
            last = f" to features_{number - 1}.pt" if count > 1 else ""
            reason = f"features_{expected}.pt{last} missing"
            gaps.append({"row_id": expected, "reason": reason, "count": count})
        expected = number + 1
    return gaps
