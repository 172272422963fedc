"""Rivals of the codec that are fitted on training images, and the pictures that tokens come from.

Legend: n training tokens, T tokens of an image, D features, X normalised tokens.
"""

from __future__ import annotations

import io
import math
import time
import zlib
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.rivals import Knob, Rival, Statistics, TokenImage, needed
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import denormalise
from qwenvl_dataloader import Batch

if TYPE_CHECKING:
    from encoders.towers import VisionEncoder

GROUP = 16  # components that share a number of bits and, in an image, a scale
BITS = (0, 2, 3, 4, 5, 6, 7, 8)
SAMPLE_TOKENS = 16_384  # of training, on which bits and code books are chosen


class TokenBasis(NamedTuple):
    """Principal components of training tokens, centred, and some of those tokens in them."""

    centre: Tensor  # [D] float32
    axes: Tensor  # [D, D] float32, columns, largest first
    variances: Tensor  # [D] float64
    sample: Tensor  # [n, D] float32, coordinates of SAMPLE_TOKENS tokens at most
    of_images: list[int]  # tokens of each image in it, n in all


def fit_token_basis(batches: Iterable[Batch], num_tokens: int) -> TokenBasis:
    """Of training images with so many tokens, in one pass; the sampled ones are spread over all."""
    total, moment, count, kept = 0.0, 0.0, 0, []
    every = -(-num_tokens // SAMPLE_TOKENS)
    seen = 0
    for batch in batches:
        tokens = batch.x.flatten(0, 1)
        total = total + tokens.sum(0).double()
        moment = moment + (tokens.mT @ tokens).double()
        count += len(tokens)
        kept += [x for i, x in enumerate(batch.x, start=seen) if i % every == 0]
        seen += len(batch.x)
    centre = total / count
    variances, axes = torch.linalg.eigh(moment / count - centre[:, None] * centre)
    centre, axes = centre.float().cpu(), axes.flip(-1).float().cpu()
    ends = [min(end, SAMPLE_TOKENS) for end in accumulate(map(len, kept))]
    sample = torch.cat(kept).cpu()[:SAMPLE_TOKENS]
    of_images = [end - first for first, end in pairwise([0, *ends]) if end > first]
    sample = (sample - centre) @ axes
    return TokenBasis(centre, axes, variances.flip(-1).cpu(), sample, of_images)


# ------------------------------------------------------------------------------------------- PCA


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers of `bits` ≥ 2 bits, and the float16 scale: one for all of `values`."""
    largest = 2 ** (bits - 1) - 1
    scale = (values.abs().max() / largest).clamp(2.0**-14, 6e4).half()
    symbols = (values / scale.float()).round().clamp(-largest, largest)
    return symbols.to(torch.int8), scale


def allocate_bits(distortion: Tensor, budget: int) -> list[int]:
    """Index into BITS for each group, by dynamic programming: the least sum within `budget`.

    Args: distortion [groups, len(BITS)] float64; budget: sum of bits over groups.
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
    left, found = budget, []
    for chosen in reversed(choices):
        found.append(int(chosen[left]))
        left -= BITS[found[-1]]
    return found[::-1]


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
                table[g, 0] += values.square().sum()
                for i, bits in enumerate(BITS[1:], start=1):
                    symbols, scale = quantise(values, bits)
                    table[g, i] += (values - symbols.float() * scale.float()).square().sum()
        self.bits = {k: [BITS[i] for i in allocate_bits(table, k)] for k in self.knobs}

    def shared_bytes(self, knob: Knob) -> int:
        """bf16 axes of the components that get bits, the centre, and a byte of bits a group."""
        d, bits = self.shape[1], self.bits[knob]
        used = sum(min(GROUP, d - g * GROUP) for g, b in enumerate(bits) if b)
        return 2 * d * (used + 1) + len(bits)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        values = (image.x - self.basis.centre) @ self.basis.axes
        scales, symbols = b"", b""
        for group, bits in zip(values.split(GROUP, -1), self.bits[knob], strict=True):
            if bits:
                integers, scale = quantise(group, bits)
                scales += scale.numpy().tobytes()
                symbols += integers.mT.contiguous().numpy().tobytes()
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
            found = torch.from_numpy(symbols[at : at + part.numel()].astype(np.float32))
            part.copy_(scale * found.reshape(part.shape[1], part.shape[0]).mT)
            at += part.numel()
        return denormalise(values @ self.basis.axes.mT + self.basis.centre, mean, std)


# -------------------------------------------------------------------------- product quantisation


def balanced(variances: Tensor, parts: int, size: int) -> Tensor:
    """Order of the first parts · size components that balances the parts' products of variances
    (Ge et al. 2013, parametric OPQ): [parts · size], part after part."""
    logs = variances.clamp_min(1e-12).log().tolist()
    groups: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for component in range(parts * size):
        free = [p for p in range(parts) if len(groups[p]) < size]
        # fewest first, so that sums of equally many are compared
        part = min(free, key=lambda p: (len(groups[p]), sums[p]))
        groups[part].append(component)
        sums[part] += logs[component]
    return torch.tensor(groups).flatten()


class ProductQuantiser(Rival):
    """Product quantisation (faiss) of the first KLT components; the knob is bytes a token."""

    name = "pq"
    knobs = (1, 2, 4, 8, 16, 32, 64)
    COMPONENTS = 256

    def __init__(
        self, shape: tuple[int, int], basis: TokenBasis, statistics: Statistics | None = None
    ) -> None:
        super().__init__(shape, statistics)
        faiss = needed("faiss")
        self.basis, self.books = basis, {}
        most = min(self.COMPONENTS, shape[1])
        self.knobs = [m for m in self.knobs if m <= most]
        for m in self.knobs:
            order = balanced(basis.variances, m, most // m)
            book = faiss.ProductQuantizer(len(order), m, 8)
            book.cp.niter, book.cp.seed = 12, 0
            book.train(np.ascontiguousarray(basis.sample[:, order].numpy()))
            self.books[m] = order, book

    def shared_bytes(self, knob: Knob) -> int:
        """bf16 axes, centre and code books."""
        components = len(self.books[knob][0])
        return 2 * self.shape[1] * (components + 1) + 2 * 256 * components

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        order, book = self.books[knob]
        values = (image.x - self.basis.centre) @ self.basis.axes[:, order]
        codes = book.compute_codes(np.ascontiguousarray(values.numpy()))
        return self._with_statistics(image, codes.tobytes())

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        order, book = self.books[knob]
        codes = np.frombuffer(payload, np.uint8).reshape(-1, knob)
        values = torch.from_numpy(book.decode(np.ascontiguousarray(codes)))
        x = values @ self.basis.axes[:, order].mT + self.basis.centre
        return denormalise(x, mean, std)


# ---------------------------------------------------------------------------------------- pictures


class Pictures(Rival):
    """The encoder's input as a JPEG or WebP file, decoded and encoded again; the knob: quality.

    pictures: row of the cache → the picture as the encoder resized it; seconds: what decoding with
    the encoder took, one image after another.
    """

    knobs = (5, 10, 15, 30, 50, 75, 90, 95)

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        pictures: dict[int, Image.Image],
        encoder: VisionEncoder,
    ) -> None:
        super().__init__(shape)
        self.name, self.pictures, self.encoder = name, pictures, encoder
        self.seconds: list[float] = []

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        file = io.BytesIO()
        self.pictures[image.row].save(file, self.name.upper(), quality=knob)
        return file.getvalue()

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        started = time.perf_counter()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        tokens = self.encoder.encode(self.encoder.preprocess(picture)[None])[0].float().cpu()
        self.seconds.append(time.perf_counter() - started)
        return tokens
