"""Codes that an image's tokens could be written with instead: real bytes, one global knob each.

    rival = FactorsQuantised(shape, statistics)
    data = rival.encode(image, knob)          # everything that this image needs, as bytes
    raw = rival.decode(data, knob, grid)      # tokens in the encoder's own units, from them alone

What all images share (a basis) is fitted on training images and counted apart, in `shared_bytes`.
The width and each image's grid are the cache's and cost nothing. LayerNorm's statistics are coded
by one coder, `Statistics`, for every code that needs them.

Legend: T tokens on a grid, D features, r rank, X normalised tokens, X = Σ_k σ_k u_k v_kᵀ.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import denormalise, normalise
from qwenvl_dataloader import Batch

if TYPE_CHECKING:
    from encoders.towers import VisionEncoder

Knob = int | float | None
LOG_STD_STEP, MEAN_STEP = 0.02, 0.01  # 0.004 of task error on the demo; 0.006 of raw_error at most
DEAD_ZONE = 0.1  # values below half a step and this much more of one become 0


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
    """Return u [T, S], σ [S], v [S, D] float32 of x [T, D].

    They come from the float64 Gram matrix of its smaller side.
    """
    if len(x) > x.shape[1]:
        v, sigma, u = decompose(x.mT)
        return u.mT, sigma, v.mT
    wide = x.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    u = vectors.flip(-1)
    sigma = values.flip(-1).clamp_min(1e-20).sqrt()
    return u.float(), sigma.float(), ((u.mT @ wide) / sigma[:, None]).float()


def round_down(values: Tensor, dead_zone: float = DEAD_ZONE) -> Tensor:
    """Return the nearest integers, int16; 0 already for |value| < 0.5 + dead_zone."""
    return torch.where(values.abs() < 0.5 + dead_zone, 0, values.round()).to(torch.int16)


# --------------------------------------------------------------------------------------- streams


def deflate(symbols: Tensor) -> bytes:
    """Return DEFLATE of int16 symbols: a byte each, -128 for those beyond ±127.

    Those stand behind the others in two bytes each. Two bytes for every symbol would cost negative
    ones a second byte: 40 % more on the demo's factors.
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


def pack_streams(*parts: bytes) -> bytes:
    """Return streams one after another, each but the last behind its length (4 bytes)."""
    head = b"".join(struct.pack("<I", len(part)) + part for part in parts[:-1])
    return head + parts[-1]


def unpack_streams(data: bytes, count: int) -> list[bytes]:
    """Undo `pack_streams` of `count` streams."""
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
        """Return the bytes of the statistics of raw tokens [T, D] float32."""
        _, mean, std = normalise(raw)
        levels = torch.stack([std.log() / LOG_STD_STEP, mean / MEAN_STEP]).squeeze(-1).round()
        return deflate(torch.diff(levels, prepend=torch.zeros(2, 1)))

    def decode(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return mean and std [T, 1] float32."""
        levels = inflate(data, (2, math.prod(grid))).long().cumsum(-1)[..., None]
        return MEAN_STEP * levels[1].float(), (LOG_STD_STEP * levels[0]).exp().float()


# ----------------------------------------------------------------------------------------- rivals


class Rival(ABC):
    """A code with one global knob.

    name: in bytes.json; knobs: from few bytes to many (None: it has none); needs_tower: whether
    reading runs the encoder; shape: (T, D) of the image with most tokens; statistics: the coder
    that images are given to it with.
    """

    name: str
    knobs: Sequence[Knob]
    needs_tower = False

    def __init__(self, shape: tuple[int, int], statistics: Statistics | None = None) -> None:
        self.shape, self.statistics = shape, statistics or Statistics()

    @abstractmethod
    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        """Return everything that this image needs."""

    @abstractmethod
    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        """Return the raw tokens [T, D] float32 of an image of this grid."""

    def shared_bytes(self, knob: Knob) -> int:
        """Return the bytes of what all images share at this knob."""
        return 0

    def _with_statistics(self, image: TokenImage, payload: bytes) -> bytes:
        return pack_streams(image.statistics, payload)

    def _payload(self, data: bytes, grid: Grid) -> tuple[bytes, Tensor, Tensor]:
        """Return payload, mean, std."""
        coded, payload = unpack_streams(data, 2)
        return payload, *self.statistics.decode(coded, grid)


class Bf16(Rival):
    """The cache's own form: the full tokens."""

    name, knobs = "bf16", (None,)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        return image.raw.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        words = torch.from_numpy(np.frombuffer(data, np.int16).copy())
        return words.view(torch.bfloat16).float().reshape(math.prod(grid), -1)


# ---------------------------------------------------------------------------------------- factors


class FactorsQuantised(Rival):
    """The r largest components at a few bits a number, and DEFLATE; the knob is the rank r.

    u_k and σ_k v_k have a float16 scale each. An image has min(T, D) components at most.
    """

    name = "factors_quantised"
    knobs = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    # bits of each rank, of 4, 5, 6 and 8: see `bits`
    BITS = {2: 4, 4: 4, 8: 5, 16: 5, 24: 5, 32: 6, 48: 6, 64: 6, 96: 6, 128: 8}

    def __init__(
        self, shape: tuple[int, int], statistics: Statistics | None = None, bits: int | None = None
    ) -> None:
        """bits: of every rank, instead of those that BITS chooses."""
        super().__init__(shape, statistics)
        self.knobs = [rank for rank in self.knobs if rank <= min(shape)]
        self.fixed_bits = bits

    def bits(self, rank: int) -> int:
        """Return the bits of a number at this rank.

        By default those on the lower edge of the curves of 4, 5, 6 and 8 bits, bytes against
        raw_error, of the demo's validation images.
        """
        return self.fixed_bits or self.BITS[max(r for r in self.BITS if r <= max(2, rank))]

    def factors(self, image: TokenImage, rank: int) -> tuple[Tensor, Tensor]:
        """Return A [T, r] and B [r, D] of X."""
        u, sigma, v = image.factors
        return u[:, :rank], sigma[:rank, None] * v[:rank]

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        a, b = self.factors(image, knob)
        symbols, scales = [], []
        for values in (a.mT, b):  # [r, T] and [r, D]
            integers, scale = quantise(values, self.bits(knob))
            symbols.append(integers)
            scales.append(scale)
        payload = torch.cat(scales).numpy().tobytes() + deflate(torch.cat(symbols, -1))
        return self._with_statistics(image, payload)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        tokens, width = math.prod(grid), self.shape[1]
        rank = min(knob, tokens, width)
        scales = torch.from_numpy(np.frombuffer(payload, np.float16, 2 * rank).copy()).float()
        symbols = inflate(payload[4 * rank :], (rank, tokens + width)).float()
        a, b = symbols.split([tokens, width], dim=-1)
        a_scale, b_scale = scales[:, None].split(rank)
        return denormalise((a_scale * a).mT @ (b_scale * b), mean, std)


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row [k, n] to symmetric integers of `bits` ≥ 2 bits.

    Returns: integers [k, n] int16, and the float16 scale [k] of each row.
    """
    largest = 2 ** (bits - 1) - 1
    scale = (values.abs().amax(-1) / largest).clamp(2.0**-14, 6e4).half()
    symbols = (values / scale.float()[:, None]).round().clamp(-largest, largest)
    return symbols.to(torch.int16), scale


class FactorsDeflate(Rival):
    """σ_k u_k and σ_k v_k rounded with one step Δ, the knob, and DEFLATE: nothing is fitted.

    Components with σ_k < 2 Δ are left out; of the others σ_k is sent in float16.
    """

    name = "factors_deflate"
    knobs = (16.0, 11.0, 8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        u, sigma, v = image.factors
        kept = max(1, int((sigma >= 2 * knob).sum()))
        sigma = sigma[:kept].half()
        scale = sigma.float()[:, None] / knob
        symbols = torch.cat([round_down(scale * u.mT[:kept]), round_down(scale * v[:kept])], -1)
        return self._with_statistics(image, pack_streams(sigma.numpy().tobytes(), deflate(symbols)))

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        tokens, width = math.prod(grid), self.shape[1]
        sigma, coded = unpack_streams(payload, 2)
        sigma = torch.from_numpy(np.frombuffer(sigma, np.float16).copy()).float()
        symbols = inflate(coded, (len(sigma), tokens + width)).float() * knob
        u, v = symbols.split([tokens, width], dim=-1)  # σ_k u_k and σ_k v_k
        return denormalise((u / sigma[:, None]).mT @ v, mean, std)


# ---------------------------------------------------------------------------------- fewer tokens


def tokens_as_bytes(tokens: Tensor) -> bytes:
    """Return k raw tokens [k, D] at 8 bits with a float16 scale each, and DEFLATE."""
    symbols, scales = quantise(tokens, 8)
    return scales.numpy().tobytes() + deflate(symbols)


def tokens_from_bytes(data: bytes, count: int, width: int) -> Tensor:
    """Undo `tokens_as_bytes`: [count, width] float32."""
    scales = torch.from_numpy(np.frombuffer(data, np.float16, count).copy()).float()
    return scales[:, None] * inflate(data[2 * count :], (count, width)).float()


class TokensAveraged(Rival):
    """Means of blocks of side × side raw tokens; the knob is the side.

    Every place on the grid is filled with the mean of its block. A block at the edge is as large
    as the grid allows.
    """

    name, knobs = "tokens_averaged", (8, 6, 4, 3, 2)

    def __init__(self, shape: tuple[int, int], longest: int) -> None:
        """longest: the longest side of any image's grid."""
        super().__init__(shape)
        self.knobs = [side for side in self.knobs if side <= longest]

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        maps = image.raw.mT.unflatten(-1, image.grid)[None]  # [1, D, rows, columns]
        means = F.avg_pool2d(maps, knob, ceil_mode=True, count_include_pad=False)
        return tokens_as_bytes(means[0].flatten(1).mT)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        rows, columns = (-(-side // knob) for side in grid)
        blocks = tokens_from_bytes(data, rows * columns, self.shape[1])
        blocks = blocks.unflatten(0, (rows, columns))
        spread = blocks.repeat_interleave(knob, 0).repeat_interleave(knob, 1)
        return spread[: grid[0], : grid[1]].flatten(0, 1)


class TokensDropped(Rival):
    """k tokens that are least alike, and for every other place the kept one most like it.

    The knob is k, of which an image has T at most. Tokens are kept one after another, each the
    least similar by cosine to those kept so far, beginning with the largest. Which kept token
    stands at which place is sent too.
    """

    name = "tokens_dropped"

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.knobs = [k for k in (2, 4, 8, 16, 32, 64, 128, 192) if k < shape[0]]

    def choose(self, tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Return which raw tokens [T, D] are kept, [k], and which of them fills each place, [T]."""
        unit = F.normalize(tokens, dim=-1)
        kept = [int(tokens.norm(dim=-1).argmax())]
        nearest = unit @ unit[kept[0]]  # cosine to the nearest kept token
        for _ in range(min(keep, len(tokens)) - 1):
            kept.append(int(nearest.argmin()))
            nearest = torch.maximum(nearest, unit @ unit[kept[-1]])
            nearest[kept] = torch.inf
        chosen = torch.tensor(kept).sort().values
        filled = (unit @ unit[chosen].mT).argmax(-1)
        filled[chosen] = torch.arange(len(chosen))
        return chosen, filled

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        chosen, filled = self.choose(image.raw, knob)
        return pack_streams(deflate(filled.short()), tokens_as_bytes(image.raw[chosen]))

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        places, tokens = unpack_streams(data, 2)
        filled = inflate(places, (math.prod(grid),)).long()
        return tokens_from_bytes(tokens, int(filled.max()) + 1, self.shape[1])[filled]


# ------------------------------------------------------------------------------------------- PCA

GROUP = 16  # components that share a number of bits and, in an image, a scale
BITS = (0, 2, 3, 4, 5, 6, 7, 8)
SAMPLE_TOKENS = 16_384  # of training, on which bits are chosen


class TokenBasis(NamedTuple):
    """Principal components of training tokens, centred, and some of those tokens in them."""

    centre: Tensor  # [D] float32
    axes: Tensor  # [D, D] float32, columns, largest first
    sample: Tensor  # [n, D] float32, coordinates of SAMPLE_TOKENS tokens at most
    of_images: list[int]  # tokens of each image in it, n in all


def fit_token_basis(batches: Iterable[Batch], num_tokens: int) -> TokenBasis:
    """Fit the basis of training images with so many tokens in one pass.

    The sampled tokens are spread over all images.
    """
    total, moment, count, kept = 0.0, 0.0, 0, []
    every = -(-num_tokens // SAMPLE_TOKENS)
    images = 0
    for batch in batches:
        tokens = batch.x.flatten(0, 1)
        total = total + tokens.sum(0).double()
        moment = moment + (tokens.mT @ tokens).double()
        count += len(tokens)
        kept += [x for i, x in enumerate(batch.x, start=images) if i % every == 0]
        images += len(batch.x)
    centre = total / count
    _, axes = torch.linalg.eigh(moment / count - centre[:, None] * centre)
    centre, axes = centre.float().cpu(), axes.flip(-1).float().cpu()
    ends = [min(end, SAMPLE_TOKENS) for end in accumulate(map(len, kept))]
    sample = (torch.cat(kept).cpu()[:SAMPLE_TOKENS] - centre) @ axes
    of_images = [end - first for first, end in pairwise([0, *ends]) if end > first]
    return TokenBasis(centre, axes, sample, of_images)


def allocate_bits(distortion: Tensor, budget: int) -> list[int]:
    """Return an index into BITS for each group: the least sum of distortion within `budget`.

    distortion [groups, len(BITS)] float64; budget: sum of bits over groups. By dynamic programming.
    """
    reach = torch.zeros(budget + 1, dtype=torch.float64)
    choices = []
    for row in distortion:
        options = torch.full((len(BITS), budget + 1), torch.inf, dtype=torch.float64)
        for i, bits in enumerate(BITS):
            if bits <= budget:
                options[i, bits:] = reach[: budget + 1 - bits] + row[i]
        reach, chosen = options.min(0)
        choices.append(chosen)
    left, indices = budget, []
    for chosen in reversed(choices):
        indices.append(int(chosen[left]))
        left -= BITS[indices[-1]]
    return indices[::-1]


class PcaDeflate(Rival):
    """KVTC's recipe: PCA of training tokens, bits by dynamic programming, DEFLATE.

    The knob is the budget in bits of a token, over GROUP: Σ of the bits of all groups of GROUP
    components. Distortion is measured on training tokens; a group has a float16 scale an image.
    """

    name = "pca_deflate"
    knobs = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)

    def __init__(
        self, shape: tuple[int, int], basis: TokenBasis, statistics: Statistics | None = None
    ) -> None:
        super().__init__(shape, statistics)
        self.basis = basis
        starts = range(0, shape[1], GROUP)
        # a scale for each image's tokens of a group, as in coding
        table = torch.zeros(len(starts), len(BITS), dtype=torch.float64)
        for g, first in enumerate(starts):
            for values in basis.sample[:, first : first + GROUP].split(basis.of_images):
                flat = values.reshape(1, -1)
                table[g, 0] += flat.square().sum()
                for i, bits in enumerate(BITS[1:], start=1):
                    symbols, scale = quantise(flat, bits)
                    table[g, i] += (flat - symbols.float() * scale.float()).square().sum()
        self.bits = {k: [BITS[i] for i in allocate_bits(table, k)] for k in self.knobs}

    def shared_bytes(self, knob: Knob) -> int:
        """Return the bytes of the bf16 axes that get bits, the centre, and a byte a group."""
        d, bits = self.shape[1], self.bits[knob]
        used = sum(min(GROUP, d - g * GROUP) for g, b in enumerate(bits) if b)
        return 2 * d * (used + 1) + len(bits)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        values = (image.x - self.basis.centre) @ self.basis.axes
        scales, symbols = b"", b""
        for group, bits in zip(values.split(GROUP, -1), self.bits[knob], strict=True):
            if bits:
                integers, scale = quantise(group.reshape(1, -1), bits)
                scales += scale.numpy().tobytes()
                # component after component
                by_component = integers.reshape(group.shape).mT.to(torch.int8)
                symbols += by_component.contiguous().numpy().tobytes()
        return self._with_statistics(image, scales + zlib.compress(symbols, 9))

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        bits = self.bits[knob]
        groups = [g for g, b in enumerate(bits) if b]
        scales = np.frombuffer(payload[: 2 * len(groups)], np.float16).astype(np.float32)
        symbols = np.frombuffer(zlib.decompress(payload[2 * len(groups) :]), np.int8)
        values, at = torch.zeros(math.prod(grid), self.shape[1]), 0
        for g, scale in zip(groups, scales.tolist(), strict=True):
            part = values[:, g * GROUP : (g + 1) * GROUP]
            integers = torch.from_numpy(symbols[at : at + part.numel()].astype(np.float32))
            part.copy_(scale * integers.reshape(part.shape[1], part.shape[0]).mT)
            at += part.numel()
        return denormalise(values @ self.basis.axes.mT + self.basis.centre, mean, std)


# ---------------------------------------------------------------------------------------- pictures

# the best settings that Pillow offers for each form; the knob is the quality. At equal bytes 4:4:4
# has less raw_error than 4:2:0 on validation images of the demo: JPEG 0.09 and 0.12 at 27 kB, AVIF
# 0.105 and 0.129 at 19.5 kB. WebP has 4:2:0 alone
PICTURE_FORMS: dict[str, dict] = {
    "jpeg": {"optimize": True, "subsampling": "4:4:4"},
    "webp": {"method": 6},
    "avif": {"subsampling": "4:4:4"},
}


class Pictures(Rival):
    """The encoder's input as a picture file, decoded and encoded again; the knob is the quality.

    picture: row of the cache → the picture as the encoder resized it.
    """

    knobs = (5, 10, 15, 30, 50, 75, 90, 95)
    needs_tower = True

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        picture: Callable[[int], Image.Image],
        encoder: VisionEncoder,
    ) -> None:
        """name: one of PICTURE_FORMS."""
        super().__init__(shape)
        self.name, self.picture, self.encoder = name, picture, encoder

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        file = io.BytesIO()
        self.picture(image.row).save(
            file, self.name.upper(), quality=knob, **PICTURE_FORMS[self.name]
        )
        return file.getvalue()

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return self.encoder.encode(self.encoder.preprocess(picture)[None])[0].float().cpu()
