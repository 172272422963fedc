"""Singular values that are computed when they are first asked for, and then kept.

    spectra.safetensors          `values` [Σ m_i] float64, image after image, m_i = min(T_i, D)
    spectra-00003.safetensors    the same of 16 images; removed when all of them are there

The file says of which content its values are and what their hash is: one that does not fit is
computed again. It holds nothing that the features do not, so no manifest counts it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import progress
from common.files import TEMPORARY_SUFFIX, save_tensors
from common.locks import one_at_a_time

FILE = "spectra.safetensors"
IMAGES_PER_PART = 16


class _Each(Dataset):
    """`of(i)` as a data set, for a loader's workers: one process a core, one thread each."""

    def __init__(self, of: Callable[[int], Tensor]) -> None:
        self.of = of

    def __getitem__(self, i: int) -> Tensor:
        return self.of(i)


def stored_spectra(folder: Path, content: str, sizes: Sequence[int]) -> Tensor | None:
    """Singular values [N, max m_i] float64 of `folder`, zero-padded at the right; None where they
    are not there, are those of another content, or damaged."""
    values = _read(folder / FILE, content, sum(sizes))
    if values is None:
        return None
    return torch.nn.utils.rnn.pad_sequence(values.split(list(sizes)), batch_first=True)


def spectra(
    folder: Path, content: str, sizes: Sequence[int], spectrum: Callable[[int], Tensor]
) -> Tensor:
    """The same, computed and kept where they are missing, in parts, on all cores.

    content: hash of what the values are of; sizes: m_i of each image; spectrum: i → σ of image i,
    [m_i] float64. An interrupted computation goes on after its last whole part. Of several
    processes one computes, with all cores, and the others wait for it.
    """
    if (values := stored_spectra(folder, content, sizes)) is not None:
        return values
    with one_at_a_time(folder / ".spectra.lock"):
        if (values := stored_spectra(folder, content, sizes)) is not None:  # another's work
            return values
        for torn in folder.glob(f".spectra*{TEMPORARY_SUFFIX}"):  # what a kill left half-written
            torn.unlink()
        starts = range(0, len(sizes), IMAGES_PER_PART)
        parts = [range(len(sizes))[first : first + IMAGES_PER_PART] for first in starts]
        paths = [folder / f"spectra-{number:05d}.safetensors" for number in range(len(parts))]
        _compute_missing(parts, paths, content, sizes, spectrum)
        wanted = [sum(sizes[i] for i in part) for part in parts]
        done = [_read(path, content, size) for path, size in zip(paths, wanted, strict=True)]
        _write(folder / FILE, content, torch.cat(done))
        for path in paths:
            path.unlink()
    return stored_spectra(folder, content, sizes)


def _compute_missing(
    parts: list[range],
    paths: list[Path],
    content: str,
    sizes: Sequence[int],
    spectrum: Callable[[int], Tensor],
) -> None:
    """Write the parts that are missing or damaged."""
    to_do = [
        (part, path)
        for part, path in zip(parts, paths, strict=True)
        if _read(path, content, sum(sizes[i] for i in part)) is None
    ]
    images = [i for part, _ in to_do for i in part]
    done = len(sizes) - len(images)
    # workers compute with one thread each: the values' bits do not depend on how many there are
    workers = max(1, min(len(os.sched_getaffinity(0)), len(images)))
    kind = {"batch_size": None, "num_workers": workers, "generator": torch.Generator()}
    values = iter(DataLoader(_Each(spectrum), sampler=images, **kind))
    with progress.bar(len(sizes), "singular values", initial=done) as bar:
        for part, path in to_do:
            _write(path, content, torch.cat(list(itertools.islice(values, len(part)))))
            bar.update(len(part))


def _write(path: Path, content: str, values: Tensor) -> None:
    save_tensors(path, {"values": values}, {"content": content, "sha256": _sha256(values)})


def _read(path: Path, content: str, size: int) -> Tensor | None:
    """Values [size]; None where they are missing, of another content, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            values, said = file.get_tensor("values"), file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    fits = values.shape == (size,) and values.dtype == torch.float64
    fits = fits and said.get("content") == content and said.get("sha256") == _sha256(values)
    return values if fits else None


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy()).hexdigest()
