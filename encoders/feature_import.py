"""Tokens that another encoder made, in files: what extract_features.py --import_features reads.

    files = FeatureFiles("tensors", grid=(12, 14), drop_tokens=1)
    for item in files:                            # {"tokens": [T, D], "grid": …, "path": …}
        ...

A file holds one image, [T, D], or many, [n, T, D]: .npy (no pickles), .safetensors (any number of
tensors, by name), or .pt (a tensor, a list of tensors, or a dict of them, read by
`torch.load(weights_only=True)`: a pickle cannot run code). Order: by file name, then by tensor name
or position; numbers in names count as numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encoders.pt_import import DamagedFile, load_pt
from lowrank_tokens.cache_writer import MOST_EXTRA_TOKENS
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid

SUFFIXES = (".npy", ".pt", ".safetensors")


class _Images(NamedTuple):
    """Images of one tensor of a file; `read` gives it, [T, D] or [n, T, D]."""

    name: str  # of the file, with "#" and the tensor's name where it has several
    count: int
    tokens: int  # T, with those that are dropped
    read: Callable[[], Tensor]


class FeatureFiles:
    """The images of a folder of .pt, .npy and .safetensors files, one after the other.

    Iterating gives `lowrank_tokens.write_cache`'s items. Nothing but shapes is read and checked
    before that, and one tensor at a time is in memory.

    Args:
        folder: with the files; folders in it are not looked at.
        grid: rows and columns of every image's tokens; None: a square where T is one.
        drop_tokens: how many of each image's first tokens are left out.

    Raises InputError where there is no file, or one that cannot be read or holds no [T, D], or
    tokens that do not fit the grid.
    """

    def __init__(self, folder: str | Path, grid: Grid | None = None, drop_tokens: int = 0) -> None:
        self.folder, self.grid, self.drop_tokens = Path(folder), grid, drop_tokens
        if not self.folder.is_dir():
            raise InputError(f"--import_features {folder} is no folder: name one of tensors")
        paths = [p for p in self.folder.glob("*") if p.suffix.lower() in SUFFIXES]
        if not paths:
            raise InputError(
                f"--import_features {folder} holds no {', '.join(SUFFIXES)} file (folders in it "
                "are not looked at): name a folder of tensors"
            )
        self.num_files = len(paths)
        self._images: list[_Images] = []
        for path in sorted(paths, key=lambda path: _natural(path.name)):
            self._images += _in_file(path)
        for images in self._images:
            self._check_grid(images)

    def __len__(self) -> int:
        return sum(images.count for images in self._images)

    def __iter__(self) -> Iterator[dict]:
        for images in self._images:
            tensor = images.read()
            stacked = tensor.dim() == 3
            for i, tokens in enumerate(tensor if stacked else [tensor]):
                path = f"{images.name}#{i}" if stacked and images.count > 1 else images.name
                yield {"tokens": tokens[self.drop_tokens :], "grid": self.grid, "path": path}

    def _check_grid(self, images: _Images) -> None:
        """Refuse images whose tokens do not fit the grid, or without one are no square."""
        left, dropped = images.tokens - self.drop_tokens, f"--drop_tokens {self.drop_tokens}"
        has = f"{self.folder / images.name} has {images.tokens} tokens"
        if left < 1:
            raise InputError(f"{has}: {dropped} leaves none")
        if self.drop_tokens:
            has += f", {left} after {dropped}"
        if self.grid and math.prod(self.grid) != left:
            h, w = self.grid
            raise InputError(
                f"{has}: --grid {h} {w} is of {h * w}; leave out class and register tokens by "
                "--drop_tokens N"
            )
        side = math.isqrt(left)
        if not self.grid and (more := left - side * side):
            near = f" (N = {self.drop_tokens + more} leaves {side} x {side})"
            raise InputError(
                f"{has}, which is no square: type --grid H W, or leave out class and register "
                f"tokens by --drop_tokens N{near if more <= MOST_EXTRA_TOKENS else ''}"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by their numbers: a2 before a10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _in_file(path: Path) -> list[_Images]:
    try:
        if path.suffix.lower() == ".npy":
            return [_of(path.name, lambda: _from_numpy(path))]
        if path.suffix.lower() == ".pt":
            return _in_pt(path)
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), key=_natural)
        shown = {n: f"{path.name}#{n}" if len(names) > 1 else path.name for n in names}
        return [_of(shown[n], lambda n=n: _from_safetensors(path, n)) for n in names]
    except (DamagedFile, SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix("is damaged ").strip("()")
        raise InputError(f"--import_features: {path} cannot be read: {reason}") from None


def _of(name: str, read: Callable[[], Tensor]) -> _Images:
    tensor = read()
    if tensor.dim() not in (2, 3) or 0 in tensor.shape or not tensor.is_floating_point():
        raise ValueError(
            f"it holds {tensor.dtype} of shape {tuple(tensor.shape)}, not floats [T, D] or "
            "[n, T, D]"
        )
    return _Images(name, len(tensor) if tensor.dim() == 3 else 1, tensor.shape[-2], read)


def _from_numpy(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: torch wants to write
    return torch.from_numpy(array)


def _from_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _in_pt(path: Path) -> list[_Images]:
    value = load_pt(path)
    if isinstance(value, Tensor):
        return [_of(path.name, lambda: load_pt(path).detach())]
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: _natural(str(key)))
    elif isinstance(value, (list, tuple)):
        keys = list(range(len(value)))
    else:
        raise ValueError(f"it holds a {type(value).__name__}, no tensors")
    if not keys or not all(isinstance(value[key], Tensor) for key in keys):
        raise ValueError("it holds other objects beside tensors")
    return [_of(f"{path.name}#{key}", lambda key=key: load_pt(path)[key].detach()) for key in keys]
