"""Codes that an image's tokens could be written with instead: real bytes, one global knob each.

    rival = FactorsInt8(shape)
    data = rival.encode(image, knob)          # everything that this image needs, as bytes
    raw = rival.decode(data, knob, grid)      # tokens in the encoder's own units, from them alone

What all images share (a basis, code books) is fitted on training images and counted apart, in
`shared_bytes`; width and each image's grid are the cache's and cost nothing. LayerNorm's
statistics are coded by one coder, `Statistics`, for every code that needs them.

Legend: T tokens on a grid, D features, r rank, X normalised tokens, X = Σ_k σ_k u_k v_kᵀ.
"""

from __future__ import annotations

import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from experiments.token_reduction import average_tokens, drop_tokens, tokens_kept
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import Stored, restore, store
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import denormalise, normalise

Knob = int | float | None
LOG_STD_STEP, MEAN_STEP = 0.02, 0.01  # 0.004 of task error on the demo; 0.006 of raw_error at most
DEAD_ZONE = 0.1  # values below half a step and this much more of one become 0


def needed(package: str):
    """An optional package by its import name; InputError with what to type where it is missing."""
    try:
        return __import__(package)
    except ImportError:
        raise InputError(
            f"compare_bytes needs {package}: type pip install -r experiments/requirements.txt"
        ) from None


class TokenImage:
    """One image to be coded: its row of the cache, raw tokens [T, D], their grid, and X.

    X is normalised by the statistics that are stored, as rounded: what they lose, X keeps.
    """

    def __init__(
        self, row: int, raw: Tensor, grid: Grid, statistics: Statistics | None = None
    ) -> None:
        self.row, self.raw, self.grid = row, raw.float(), grid
        statistics = statistics or Statistics()
        self.statistics = statistics.encode(self.raw, grid)
        self.mean, self.std = statistics.decode(self.statistics, grid)  # [T, 1]
        self.x = (self.raw - self.mean) / self.std  # [T, D]

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """u [T, S], σ [S], v [S, D] float32 of X, largest first, S = min(T, D)."""
        return decompose(self.x)


def decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [T, S], σ [S], v [S, D] float32 of x [T, D], by the float64 Gram matrix of its smaller
    side."""
    if len(x) > x.shape[1]:
        v, sigma, u = decompose(x.mT)
        return u.mT, sigma, v.mT
    wide = x.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    u = vectors.flip(-1)
    sigma = values.flip(-1).clamp_min(1e-20).sqrt()
    return u.float(), sigma.float(), ((u.mT @ wide) / sigma[:, None]).float()


def round_down(values: Tensor, dead_zone: float = DEAD_ZONE) -> Tensor:
    """Nearest integers of `values`, int16; 0 already for |value| < 0.5 + dead_zone."""
    return torch.where(values.abs() < 0.5 + dead_zone, 0, values.round()).to(torch.int16)


# --------------------------------------------------------------------------------------- streams


def deflate(symbols: Tensor) -> bytes:
    """DEFLATE of int16 symbols: a byte each, -128 for those beyond ±127, which stand behind them.

    Two bytes each would cost negative symbols a second one: 40 % more on the demo's factors.
    """
    wide = symbols.flatten().int()
    beyond = wide.abs() > 127
    narrow = torch.where(beyond, -128, wide).to(torch.int8).numpy().tobytes()
    # few long matches to be found: Z_FILTERED is 2 % smaller than the default
    packer = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    return packer.compress(narrow + wide[beyond].numpy().astype("<i2").tobytes()) + packer.flush()


def inflate(data: bytes, shape: Sequence[int]) -> Tensor:
    """Undo `deflate`: int16 symbols of `shape`."""
    plain, count = zlib.decompress(data), math.prod(shape)
    symbols = np.frombuffer(plain, np.int8, count).astype(np.int16)
    symbols[symbols == -128] = np.frombuffer(plain, "<i2", offset=count)
    return torch.from_numpy(symbols.reshape(tuple(shape)))


def joined(*parts: bytes) -> bytes:
    """Streams one after another, each but the last behind its length (4 bytes)."""
    head = b"".join(struct.pack("<I", len(part)) + part for part in parts[:-1])
    return head + parts[-1]


def parted(data: bytes, count: int) -> list[bytes]:
    """Undo `joined` of `count` streams."""
    parts = []
    for _ in range(count - 1):
        (size,) = struct.unpack_from("<I", data)
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return [*parts, data]


class Statistics:
    """LayerNorm's mean and std [T, 1] as bytes: steps of log std and of the mean, DEFLATE of the
    differences from token to token."""

    def encode(self, raw: Tensor, grid: Grid) -> bytes:
        """Of raw tokens [T, D] float32."""
        _, mean, std = normalise(raw)
        levels = torch.stack([std.log() / LOG_STD_STEP, mean / MEAN_STEP]).squeeze(-1).round()
        return deflate(torch.diff(levels, prepend=torch.zeros(2, 1)))

    def decode(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        """mean and std [T, 1] float32."""
        levels = inflate(data, (2, math.prod(grid))).long().cumsum(-1)[..., None]
        return MEAN_STEP * levels[1].float(), (LOG_STD_STEP * levels[0]).exp().float()


# ----------------------------------------------------------------------------------------- rivals


class Rival(ABC):
    """A code with one global knob.

    name: of DESIGN's list; knobs: from few bytes to many (None: it has none); shape: (T, D), of the
    image with most tokens; statistics: the coder that images are given to it with.
    """

    name: str
    knobs: Sequence[Knob]

    def __init__(self, shape: tuple[int, int], statistics: Statistics | None = None) -> None:
        self.shape, self.statistics = shape, statistics or Statistics()

    @abstractmethod
    def encode(self, image: TokenImage, knob: Knob) -> bytes: ...

    @abstractmethod
    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        """Raw tokens [T, D] float32 of an image of this grid."""

    def shared_bytes(self, knob: Knob) -> int:
        """Bytes of what all images share at this knob."""
        return 0

    def _with_statistics(self, image: TokenImage, payload: bytes) -> bytes:
        return joined(image.statistics, payload)

    def _payload(self, data: bytes, grid: Grid) -> tuple[bytes, Tensor, Tensor]:
        """payload, mean, std."""
        coded, payload = parted(data, 2)
        return payload, *self.statistics.decode(coded, grid)


class Bf16(Rival):
    """The cache's own form."""

    name, knobs = "bf16", (None,)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        return _bf16_bytes(image.raw)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        return _from_bf16(data).reshape(math.prod(grid), -1)


class Bf16Zstd(Rival):
    """zstd of bf16 tokens, their high bytes (sign and exponent) apart from the low ones."""

    name, knobs = "bf16_zstd", (None,)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        pairs = np.frombuffer(_bf16_bytes(image.raw), np.uint8).reshape(-1, 2)
        compressor = needed("zstandard").ZstdCompressor(level=9)
        return compressor.compress(np.ascontiguousarray(pairs.T).tobytes())

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        planes = needed("zstandard").ZstdDecompressor().decompress(data)
        pairs = np.frombuffer(planes, np.uint8).reshape(2, -1).T
        return _from_bf16(np.ascontiguousarray(pairs).tobytes()).reshape(math.prod(grid), -1)


def _bf16_bytes(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def _from_bf16(data: bytes) -> Tensor:
    words = torch.from_numpy(np.frombuffer(data, np.int16).copy())
    return words.view(torch.bfloat16).float()


class Factors(Rival):
    """The r largest components as `factorize.py` stores them: U, and σ V; the knob is r, of which
    an image has min(T, D) at most."""

    knobs = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

    def __init__(self, shape: tuple[int, int], statistics: Statistics | None = None) -> None:
        super().__init__(shape, statistics)
        self.knobs = [rank for rank in self.knobs if rank <= min(shape)]

    def factors(self, image: TokenImage, rank: int) -> tuple[Tensor, Tensor]:
        """A [T, r] and B [r, D] of X."""
        u, sigma, v = image.factors
        return u[:, :rank], sigma[:rank, None] * v[:rank]

    def sizes(self, rank: int, grid: Grid) -> tuple[int, int, int]:
        """T, D, and the rank of an image of this grid."""
        tokens, width = math.prod(grid), self.shape[1]
        return tokens, width, min(rank, tokens, width)


class FactorsBf16(Factors):
    """A and B in bfloat16."""

    name = "factors_bf16"

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        a, b = self.factors(image, knob)
        return self._with_statistics(image, _bf16_bytes(torch.cat([a.flatten(), b.flatten()])))

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        t, d, r = self.sizes(knob, grid)
        a, b = _from_bf16(payload).split([t * r, r * d])
        return denormalise(a.reshape(t, r) @ b.reshape(r, d), mean, std)


class FactorsInt8(Factors):
    """int8 with a float32 scale for each column of A and row of B."""

    name = "factors_int8"

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        a, b = self.factors(image, knob)
        stored = store(a[None], b[None], "int8")
        # scales first: float32 has to lie at a multiple of 4 bytes
        parts = (stored.a_scale, stored.b_scale, stored.a, stored.b)
        payload = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        return self._with_statistics(image, payload)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        t, d, r = self.sizes(knob, grid)
        values = torch.from_numpy(np.frombuffer(payload, np.int8).copy())
        scales, a, b = values.split([8 * r, t * r, r * d])
        a_scale, b_scale = scales.view(torch.float32).split(r)
        a, b = restore(Stored(a.view(t, r), b.view(r, d), a_scale, b_scale))
        return denormalise(a @ b, mean, std)


class FactorsDeflate(Rival):
    """σ_k u_k and σ_k v_k rounded with one step Δ, the knob, and DEFLATE: nothing is fitted.

    Components with σ_k < 2 Δ are left out; of the others σ_k is sent in float16.
    """

    name = "factors_deflate"
    knobs = (16.0, 11.0, 8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25)

    @property
    def width(self) -> int:
        """d, numbers of a v_k."""
        return self.shape[1]

    def components(self, image: TokenImage) -> tuple[Tensor, Tensor, Tensor]:
        """u [T, S], σ [S], v [S, d] that are coded."""
        return image.factors

    def mapped_back(self, x: Tensor) -> Tensor:
        """X of the matrix that was factored."""
        return x

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        u, sigma, v = self.components(image)
        kept = max(1, int((sigma >= 2 * knob).sum()))
        sigma = sigma[:kept].half()
        scale = sigma.float()[:, None] / knob
        symbols = torch.cat([round_down(scale * u.mT[:kept]), round_down(scale * v[:kept])], -1)
        return self._with_statistics(image, joined(sigma.numpy().tobytes(), deflate(symbols)))

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        tokens = math.prod(grid)
        sigma, coded = parted(payload, 2)
        sigma = torch.from_numpy(np.frombuffer(sigma, np.float16).copy()).float()
        symbols = inflate(coded, (len(sigma), tokens + self.width)).float() * knob
        u, v = symbols.split([tokens, self.width], dim=-1)  # σ_k u_k and σ_k v_k
        return denormalise(self.mapped_back((u / sigma[:, None]).mT @ v), mean, std)


class TokensAveraged(Rival):
    """Means of blocks of side × side raw tokens, bf16; the knob is the side.

    longest: side of any image's grid.
    """

    name, knobs = "tokens_averaged", (8, 4, 3, 2)

    def __init__(self, shape: tuple[int, int], longest: int) -> None:
        super().__init__(shape)
        self.knobs = [side for side in self.knobs if side <= longest]

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        blocks = average_tokens(image.raw[None], knob, image.grid)[0].unflatten(0, image.grid)
        return _bf16_bytes(blocks[::knob, ::knob])

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        rows, columns = (-(-side // knob) for side in grid)
        assert rows * columns == tokens_kept(knob, grid)
        blocks = _from_bf16(data).reshape(rows, columns, -1)
        spread = blocks.repeat_interleave(knob, 0).repeat_interleave(knob, 1)
        return spread[: grid[0], : grid[1]].flatten(0, 1)


class TokensDropped(Rival):
    """k random tokens at the same places in every image of a grid, bf16, filled in by the nearest;
    all of an image that has no more."""

    name = "tokens_dropped"

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.knobs = [k for k in (4, 8, 16, 32, 64, 128, 192) if k < shape[0]]

    def sources(self, keep: int, grid: Grid) -> tuple[Tensor, Tensor]:
        """Places kept [k], and which of them fills every place [T]."""
        places = torch.arange(math.prod(grid))[None, :, None]
        filled = drop_tokens(places, keep, grid)[0, :, 0]
        return torch.unique(filled, return_inverse=True)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        return _bf16_bytes(image.raw[self.sources(knob, image.grid)[0]])

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        places, filled = self.sources(knob, grid)
        return _from_bf16(data).reshape(len(places), -1)[filled]
