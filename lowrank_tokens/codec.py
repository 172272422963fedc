"""Codec of factors: the bytes of one image's tokens, from what all images share.

    codec = Codec.load("codecs/demo.safetensors")
    data = codec.encode(raw, grid=(16, 16), step=1.0)    # raw [T, D] tokens in the encoder's units
    raw = codec.decode(data)                             # [T, D] float32

X, the tokens normalised by the statistics that are stored, goes through the 2-D DCT of its grid on
one side and the KLT of training tokens on the other, Z = C X P. Of its SVD Z = U S Vᵀ, σ_k u_k is
rounded in units of the step Δ; then B = QᵀZ, Q an orthonormal basis of what is left of them, is
rounded likewise. The level of a coefficient's table is i_σ + i_var: σ_k / Δ on the logarithmic grid
of `entropy`, and the training images' variance of that coefficient in the bucket of k. All of it is
integers, so that the same symbols are read on every machine. What an image's own component differs
from the training images' by is sent too: an offset of its levels in A, and one in B.

Legend: T tokens on a grid [H, W], D features, d directions kept of the KLT, r rank that Δ leaves.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tokens.entropy import (
    STEPS_AN_OCTAVE,
    decode_symbols,
    encode_symbols,
    read_varint,
    varint,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    save_tensors,
    sha256_file,
)
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import normalise
from lowrank_tokens.transform import (
    UNITS,
    adapted,
    dct,
    independent,
    inverse_dct,
    leading,
    level_offsets,
    off_grid,
    on_grid,
    orthonormal,
    sigma_levels,
    to_levels,
    tokens_shift,
)

FORMAT = 1  # of the codec's file
STREAM, OLDER_STREAM = 2, 1  # of a coded image; the older one is without offsets of levels
KIND = "codec"
# format, crc32 of all that follows, height, width, step, rank, i_σ of the first component
HEADER = struct.Struct("<BIHHfHh")
# coarse: X is normalised by what is stored, so that factors carry what the steps lose
STATISTICS_STEPS = (0.05, 0.3)  # of the mean and of log std
DROPPED_BELOW = 2.0  # components with σ_k less than this many steps
SIGMA_LEVEL = 0  # of differences of i_σ
OFFSET_LEVEL = 1  # of differences of offsets of levels
BUCKETS = 16
UNSEEN_ENERGY = 0.05  # of a v_k outside the span of few training tokens
ENOUGH = 32  # training tokens a feature, from which on they are taken to span those to come
TAIL = 1e-5  # energy of training tokens outside the directions that are kept

Factors = tuple[Tensor, Tensor, Tensor]  # u [T, r], s [r], v [D, r]


class Codec:
    """What all images share, and `encode`, `decode` and `factors` of one image.

    tensors: klt [D, d] bf16 (P), inverse [D, d] bf16 (back to tokens; absent where it is P), rows
    [buckets, H, W], columns [buckets, d] and statistics [2, H, W] int16, all log variances in
    1 / UNITS of a level; starts [buckets] int16, the first component of each bucket. info: what it
    was made from. sha256: of the file, None before it is saved.
    """

    def __init__(self, tensors: dict[str, Tensor], info: dict, sha256: str | None = None) -> None:
        self.tensors, self.info, self.sha256 = tensors, info, sha256
        self._klt = tensors["klt"].float()
        self._inverse = tensors.get("inverse", tensors["klt"]).float()
        self._rows, self._columns, self._statistics, starts = (
            tensors[name].numpy().astype(np.int64)
            for name in ("rows", "columns", "statistics", "starts")
        )
        self._starts = starts
        self.feature_dim = len(self._klt)
        self.statistics_steps = tuple(info["statistics_steps"])

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read a file of `save`. Raises InputError where it is missing, damaged or another."""
        remedy = "make one with experiments.fit_codec"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"--codec {path} is no codec, or damaged ({error}): {remedy}"
            ) from None
        if metadata.get("kind") != KIND or metadata.get("format") != str(FORMAT):
            raise InputError(f"{path} is not a codec of format {FORMAT}: {remedy}")
        if metadata.get("content_sha256") != content_sha256(tensors, metadata.get("info", "")):
            raise InputError(f"{path} is damaged (its content does not match its hash): {remedy}")
        return cls(tensors, json.loads(metadata["info"]), sha256_file(path))

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all, and set `sha256`."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        info = json.dumps(self.info)
        metadata = {"kind": KIND, "format": str(FORMAT), "info": info}
        metadata["content_sha256"] = content_sha256(self.tensors, info)
        save_tensors(Path(path), self.tensors, metadata)
        self.sha256 = sha256_file(path)

    @property
    def num_directions(self) -> int:
        """d, directions of the KLT that are kept."""
        return self._klt.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    # ---------------------------------------------------------------------------------- encoding

    def prepare(
        self, raw: Tensor, grid: tuple[int, int], factors: Factors | None = None
    ) -> Prepared:
        """All of `encode` that does not depend on the step: search a step with this done once."""
        z, statistics = self._transformed(raw, grid, factors)
        return Prepared(z, *leading(z), statistics, grid)

    def _transformed(
        self, raw: Tensor, grid: tuple[int, int], factors: Factors | None
    ) -> tuple[Tensor, np.ndarray]:
        """Z [T, d] and the symbols [2, T] of the statistics."""
        if raw.shape != (grid[0] * grid[1], self.feature_dim):
            raise InputError(
                f"tokens {list(raw.shape)} do not fit a grid of {grid[0]} x {grid[1]} and the "
                f"codec's {self.feature_dim} features: fit a codec on a cache of this encoder"
            )
        raw = raw.float()
        statistics, mean, std = self._round_statistics(raw, grid)
        if factors is None:
            x = (raw - mean[:, None]) / std[:, None]
            z = self.transformed(x, grid)
        else:
            u, s, v = factors
            # they are of X by the exact statistics; what is stored divides by the rounded ones
            u = u * (normalise(raw)[2] / std[:, None])
            z = dct(u.float() * s, grid) @ (v.float().mT @ self._klt)
        return z, statistics

    def transformed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Z = C X P [T, d] of normalised tokens [T, D]."""
        return dct(x @ self._klt, grid)

    def of_gradient(self, gradient: Tensor, grid: tuple[int, int]) -> Tensor:
        """The gradient by the decoded Z [T, d], of that by the decoded X [T, D]."""
        return dct(gradient @ self._inverse, grid)

    def encode(
        self, raw: Tensor, grid: tuple[int, int], step: float, factors: Factors | None = None
    ) -> bytes:
        """The bytes of raw tokens [T, D] float32, all that `decode` needs beside the codec.

        factors: (u [T, r], s [r], v [D, r]) with X ≈ u diag(s) vᵀ of the normalised tokens, e.g.
        from the network; None for the exact ones.
        """
        return self.encode_prepared(self.prepare(raw, grid, factors), step)

    def encode_prepared(self, prepared: Prepared, step: float) -> bytes:
        """The bytes at one step; see `prepare`."""
        z, u, s, statistics, grid = prepared
        step = struct.unpack("<f", struct.pack("<f", step))[0]
        count = int((s >= DROPPED_BELOW * step).sum())
        sigma = sigma_levels(s[:count], step)
        levels = self._row_levels(sigma, grid)
        q_a, _ = adapted((u[:, :count] * (s[:count] / step)).numpy(), levels)
        keep = independent(q_a)
        q_a, sigma = q_a[:, keep], sigma[keep]
        rows, columns = self._row_levels(sigma, grid), self._column_levels(sigma)
        basis = orthonormal(q_a)
        q_b, offsets_b = adapted((basis.mT @ z / step).mT.numpy(), columns)
        offsets = np.stack([level_offsets(q_a, rows), offsets_b])
        steps = np.diff(offsets, prepend=0)  # neighbours are much alike
        first = int(sigma[0]) if len(sigma) else 0
        head = encode_symbols(*self._head(statistics, -np.diff(sigma), steps, grid))
        levels = np.concatenate([(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()])
        body = encode_symbols(np.concatenate([q_a.ravel(), q_b.ravel()]), levels)
        return self._framed(grid, step, len(sigma), first, varint(len(head)) + head + body)

    def _framed(
        self, grid: tuple[int, int], step: float, rank: int, first: int, payload: bytes
    ) -> bytes:
        header = HEADER.pack(STREAM, 0, *grid, step, rank, first)
        return header[:1] + struct.pack("<I", crc(header + payload)) + header[5:] + payload

    # ---------------------------------------------------------------------------------- decoding

    def factors(self, data: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [T, r], B [r, D], mean [T] and std [T] float32; tokens are A·B · std + mean.

        Raises InputError where the bytes are not those that `encode` gave.
        """
        grid, step, rank, first = self._checked_header(data)
        tokens, differences = grid[0] * grid[1], max(rank - 1, 0)
        offsets = 2 * rank if data[0] == STREAM else 0  # of OLDER_STREAM no level is adapted
        symbols, at = self._read_head(data, differences, offsets, grid)
        statistics, differences, offsets = np.split(symbols, [2 * tokens, 2 * tokens + differences])
        mean, std = self._statistics_of(statistics.reshape(2, tokens), grid)
        sigma = first - np.concatenate([[0], differences.cumsum()])[:rank]
        rows, columns = self._row_levels(sigma, grid), self._column_levels(sigma)
        if len(offsets):
            of_rows, of_columns = offsets.reshape(2, rank).cumsum(1)
            rows, columns = rows + of_rows, columns + of_columns
        body = decode_symbols(data[at:], np.concatenate([rows.ravel(), columns.ravel()]))
        q_a = body[: tokens * rank].reshape(tokens, rank)
        q_b = body[tokens * rank :].reshape(self.num_directions, rank)
        a = inverse_dct(orthonormal(q_a), grid)
        b = torch.from_numpy(q_b.T.astype(np.float32)) * step @ self._inverse.mT
        return a, b, mean, std

    def normalised(self, data: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """X_hat [T, D], mean [T] and std [T] float32; errors as `factors`."""
        a, b, mean, std = self.factors(data)
        return a @ b, mean, std

    def decode(self, data: bytes) -> Tensor:
        """Raw tokens [T, D] float32 of `encode`'s bytes; errors as `factors`."""
        x, mean, std = self.normalised(data)
        return x * std[:, None] + mean[:, None]

    def _checked_header(self, data: bytes) -> tuple[tuple[int, int], float, int, int]:
        """Grid, step, rank and `first` of a stream whose checksum fits."""
        grid = grid_of(data)
        if data[0] not in (STREAM, OLDER_STREAM):
            raise InputError("a coded image is of another format: write it again")
        return grid, *HEADER.unpack_from(data)[4:]

    def _read_head(
        self, data: bytes, differences: int, offsets: int, grid: tuple[int, int]
    ) -> tuple[np.ndarray, int]:
        """The symbols of `_head`, and the byte at which the body begins."""
        length, at = read_varint(data, HEADER.size)
        unknown = (np.zeros(n, dtype=np.int64) for n in (differences, offsets))
        levels = self._head(None, *unknown, grid)[1]
        return decode_symbols(data[at : at + length], levels), at + length

    # ------------------------------------------------------------------------------------ levels

    def _row_levels(self, sigma: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Of σ_k u_k: [T, r]."""
        shift = tokens_shift(self._rows.shape[1:], grid)
        maps = on_grid(self._rows, grid).reshape(len(self._rows), -1) + shift
        return to_levels(maps[self._bucket(len(sigma))].T) + sigma

    def _column_levels(self, sigma: np.ndarray) -> np.ndarray:
        """Of σ_k v_k: [d, r]."""
        return to_levels(self._columns[self._bucket(len(sigma))].T) + sigma

    def _bucket(self, rank: int) -> np.ndarray:
        return np.searchsorted(self._starts, np.arange(rank), side="right") - 1

    def _head(
        self,
        statistics: np.ndarray | None,
        differences: np.ndarray,
        offsets: np.ndarray,
        grid: tuple[int, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Symbols and levels of what comes first: the statistics [2, T], differences of i_σ, and
        those of offsets of levels [2, r]."""
        levels = to_levels(on_grid(self._statistics, grid)).ravel()
        others = np.full(len(differences), SIGMA_LEVEL), np.full(offsets.size, OFFSET_LEVEL)
        levels = np.concatenate([levels, *others])
        if statistics is None:
            return differences, levels
        return np.concatenate([statistics.ravel(), differences, offsets.ravel()]), levels

    # -------------------------------------------------------------------------------- statistics

    def _round_statistics(
        self, raw: Tensor, grid: tuple[int, int]
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Symbols [2, T] of LayerNorm's mean and log std, and mean and std [T] as decoded."""
        _, mean, std = normalise(raw)
        both = torch.stack([mean[:, 0], std[:, 0].log() - self.info["log_std"]])
        steps = torch.tensor(self.statistics_steps)[:, None]
        symbols = (dct(both.mT, grid).mT / steps).round().to(torch.int64).numpy()
        return symbols, *self._statistics_of(symbols, grid)

    def _statistics_of(self, symbols: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        steps = torch.tensor(self.statistics_steps)[:, None]
        mean, log_std = inverse_dct((torch.from_numpy(symbols).float() * steps).mT, grid).mT
        return mean, (log_std + self.info["log_std"]).exp()


class Prepared(tuple):
    """z [T, d], u [T, r], s [r], statistics [2, T] and the grid of one image."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)


def grid_of(data: bytes) -> tuple[int, int]:
    """Rows and columns of a coded image's tokens. Raises InputError where the bytes are none."""
    if len(data) < HEADER.size or crc(data) != HEADER.unpack_from(data)[1]:
        raise InputError("a coded image is damaged (its checksum differs): write it again")
    return HEADER.unpack_from(data)[2:4]


def content_sha256(tensors: dict[str, Tensor], info: str) -> str:
    """Of all that a codec's file holds."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def crc(data: bytes) -> int:
    """Checksum of a coded image without the four bytes in which it stands."""
    return zlib.crc32(data[5:], zlib.crc32(data[:1]))


# --------------------------------------------------------------------------------------- fitting


def fit(
    batches: Callable[[], Iterable[tuple[Tensor, Grid]]],
    grid: Grid,
    metric: Tensor | None = None,
    info: dict | None = None,
    statistics_steps: tuple[float, float] = STATISTICS_STEPS,
) -> Codec:
    """A codec from training images, streamed twice.

    batches: gives raw tokens [b, T, D] and their grid anew at each call; grid: of the tables, one
    that images have, best the most frequent; metric: M [D, D].
    """
    root, inverse_root = _roots(metric)
    moment, log_std, images, tokens = 0.0, 0.0, 0, 0
    for raw, _ in batches():
        x, _, std = normalise(raw)
        x = x.flatten(0, 1)
        x = x if root is None else x @ root.to(x)
        moment = moment + (x.mT @ x).double().cpu()
        log_std += float(std.log().mean()) * len(raw)
        images += len(raw)
        tokens += len(x)
    if not images:
        raise InputError("there are no training images to fit a codec on")
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(moment))
    outside = values.clamp_min(0).flip(0).cumsum(0).flip(0) / values.clamp_min(0).sum()
    # few training tokens do not span those to come: then all directions are kept, and the energy
    # that others have in them is guessed (25 images of the demo: 24 % fewer bytes)
    unseen = max(0.0, 1 - tokens / (ENOUGH * len(moment))) ** 2
    if not unseen:
        vectors = vectors[:, outside > TAIL]
    tensors = {"klt": vectors if root is None else root.double() @ vectors}
    if root is not None:
        tensors["inverse"] = inverse_root.double() @ vectors
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    made = (info or {}) | {
        "images": images,
        "log_std": log_std / images,
        "statistics_steps": list(statistics_steps),
        "grid": list(grid),
    }
    floor = UNSEEN_ENERGY * unseen / len(moment)
    tensors |= _variances(batches, tensors["klt"].float(), grid, made, floor)
    return Codec(tensors, made)


def _roots(metric: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if metric is None:
        return None, None
    values, vectors = torch.linalg.eigh(metric.double().cpu())
    return (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT


def bucket_starts(rank: int) -> list[int]:
    """First component of each bucket, at most BUCKETS, geometric in k."""
    edges = {round(rank ** (i / BUCKETS)) - 1 for i in range(BUCKETS)}
    return sorted(edges)


def _variances(
    batches: Callable[[], Iterable[tuple[Tensor, Grid]]],
    klt: Tensor,
    grid: Grid,
    info: dict,
    floor: float,
) -> dict[str, Tensor]:
    """Log variances of u_k and v_k, a bucket of k each, of the statistics in their steps."""
    steps = torch.tensor(info["statistics_steps"])[:, None]
    tokens, width = grid[0] * grid[1], klt.shape[1]
    rank = min(tokens, width)
    starts = bucket_starts(rank)
    bounds = list(zip(starts, [*starts[1:], rank], strict=True))
    rows, columns = torch.zeros(len(starts), tokens), torch.zeros(len(starts), width)
    statistics = torch.zeros(2, tokens)
    images = torch.zeros(len(starts), 1)  # that have components of a bucket
    for batch, own in batches():
        longer = own[0] * own[1] / tokens
        for raw in batch.float().cpu():
            x, mean, std = normalise(raw)
            z = dct(x @ klt, own)
            u, s = leading(z)
            u, s = u[:, :rank], s[:rank]
            v = z.mT @ u / s.clamp_min(1e-6 * s[0])
            there = [(a, b) for a, b in bounds if a < len(s)]
            squares = torch.stack([u[:, a:b].square().mean(1) for a, b in there])
            rows[: len(there)] += longer * off_grid(squares, own, grid)
            columns[: len(there)] += torch.stack([v[:, a:b].square().mean(1) for a, b in there])
            images[: len(there)] += 1
            both = torch.stack([mean[:, 0], std[:, 0].log() - info["log_std"]])
            statistics += off_grid((dct(both.mT, own).mT / steps).square(), own, grid)

    def levels(total: Tensor, images: Tensor | int) -> Tensor:
        variance = (total / images).double().clamp_min(1e-12)
        return (variance.log2() / 2 * STEPS_AN_OCTAVE * UNITS).round().to(torch.int16)

    return {
        "rows": levels(rows, images).reshape(-1, *grid),
        "columns": levels(columns + (floor * images.double()).float(), images),
        "statistics": levels(statistics, info["images"]).reshape(2, *grid),
        "starts": torch.tensor(starts, dtype=torch.int16),
    }


# One image at a step, or at the largest step with which a target is met.

# a search tries steps 2^(i / 16): 3 % of bytes apart, at most 9 tries
FINEST, COARSEST = -96, 192


def coded_image(
    codec: Codec, raw: Tensor, grid: tuple[int, int], step: float, factors: Factors | None = None
) -> CodedImage:
    """Raw tokens [T, D] at one step."""
    return _measured(codec, raw, codec.encode(raw, grid, step, factors), step)


def image_for_target(
    codec: Codec,
    raw: Tensor,
    grid: tuple[int, int],
    factors: Factors | None = None,
    *,
    target_error: float | None = None,
    target_kb: float | None = None,
) -> CodedImage:
    """Raw tokens [T, D] at the largest step whose error of the raw tokens is at most target_error,
    or at the smallest whose bytes are at most 1000 · target_kb.

    Raises InputError where no step does.
    """
    prepared = codec.prepare(raw, grid, factors)

    def at(index: int) -> CodedImage:
        step = 2 ** (index / 16)
        return _measured(codec, raw, codec.encode_prepared(prepared, step), step)

    if target_error is not None:
        found = _last(lambda i: at(i).errors["rel_error_original"] <= target_error)
        if found is None:
            least = at(FINEST).errors["rel_error_original"]
            raise InputError(
                f"--target_error {target_error:g} is out of reach, the least is {least:.4f}: "
                "type a larger one"
            )
        return at(found)
    # the bytes fall as the step grows: the first step that fits is after the last that does not
    last = _last(lambda i: len(at(i).data) > 1000 * target_kb)
    if last == COARSEST:
        least = len(at(COARSEST).data) / 1000
        raise InputError(
            f"--target_kb {target_kb:g} is out of reach, the least is {least:.3f}: type more"
        )
    return at(FINEST if last is None else last + 1)


def _last(holds: Callable[[int], bool]) -> int | None:
    """The last index from FINEST to COARSEST at which `holds`, true up to some index, still is."""
    low, high = FINEST - 1, COARSEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return None if low < FINEST else low


def _measured(codec: Codec, raw: Tensor, data: bytes, step: float) -> CodedImage:
    """What was stored, with its errors as decoded from these very bytes."""
    decoded, mean, std = codec.normalised(data)
    raw = raw.float()
    errors = {
        "rel_error": _relative(normalise(raw)[0], decoded),
        "rel_error_original": _relative(raw, decoded * std[:, None] + mean[:, None]),
    }
    return CodedImage(data, HEADER.unpack_from(data)[5], step, errors)


def _relative(x: Tensor, decoded: Tensor) -> float:
    """‖x − decoded‖ / ‖x‖, in float64; 0 of zeros that stay zeros."""
    x, decoded = x.double(), decoded.double()
    return float((x - decoded).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))


class CodedImage(NamedTuple):
    """One image as it is stored."""

    data: bytes
    rank: int
    step: float
    errors: dict[str, float]  # CODED_ERRORS
