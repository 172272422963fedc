"""The codec among its rivals: coded factors, and the transform code with the same coder.

Legend: T tokens on a grid, D features, d directions of the codec's KLT P [D, d], Z = C X P with the
DCT C of the grid. A codec in a metric M has P = M^½ V and maps back by M^-½ V.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from experiments.rivals import Knob, Rival, Statistics, TokenImage
from lowrank_tokens.codec import OFFSET_LEVEL, Codec, Prepared
from lowrank_tokens.entropy import (
    HIGHEST,
    LOWEST,
    STEPS_AN_OCTAVE,
    TOTAL,
    decode_symbols,
    encode_symbols,
    read_varint,
    table,
    varint,
)
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import denormalise, normalise
from lowrank_tokens.transform import UNITS, adapted, dct, inverse_dct, off_grid, on_grid, to_levels

STEPS = (32.0, 22.6, 16.0, 11.3, 8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18)


class CodecStatistics(Statistics):
    """LayerNorm's statistics by the codec's own steps, transform, tables and entropy code."""

    def __init__(self, codec: Codec) -> None:
        self.log_std = codec.info["log_std"]
        self.steps = torch.tensor(codec.statistics_steps)[:, None]
        self.units = codec.tensors["statistics"].numpy().astype(np.int64)

    def levels(self, grid: Grid) -> np.ndarray:
        """Of the symbols [2 T]."""
        return to_levels(on_grid(self.units, grid)).ravel()

    def encode(self, raw: Tensor, grid: Grid) -> bytes:
        _, mean, std = normalise(raw)
        both = torch.stack([mean[:, 0], std[:, 0].log() - self.log_std])  # [2, T]
        symbols = (dct(both.mT, grid).mT / self.steps).round().long().numpy()
        return encode_symbols(symbols.ravel(), self.levels(grid))

    def decode(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        symbols = torch.from_numpy(decode_symbols(data, self.levels(grid))).unflatten(0, (2, -1))
        mean, log_std = inverse_dct((symbols.float() * self.steps).mT, grid).mT
        return mean[:, None], (log_std + self.log_std).exp()[:, None]


def has_metric(codec: Codec) -> bool:
    """Whether the codec was fitted in a head's metric."""
    return "inverse" in codec.tensors


def back(codec: Codec) -> Tensor:
    """[D, d] float32 that maps Z back to features."""
    return codec.tensors.get("inverse", codec.tensors["klt"]).float()


class OfCodec(Rival):
    """A rival that is named after the codec's metric, where it has one."""

    plain_name: str

    def __init__(self, codec: Codec, shape: tuple[int, int], statistics: Statistics) -> None:
        super().__init__(shape, statistics)
        self.codec = codec
        self.name = self.plain_name + ("_in_metric" if has_metric(codec) else "")


class Coded(OfCodec):
    """Factors by the codec itself; the knob is its step Δ."""

    plain_name, knobs = "coded", STEPS

    def prepared(self, image: TokenImage) -> Prepared:
        """Of one image after another every step is asked for: factors are found once."""
        key = f"prepared, metric {has_metric(self.codec)}"
        if key not in image.__dict__:
            image.__dict__[key] = self.codec.prepare(image.raw, image.grid)
        return image.__dict__[key]

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        return self.codec.encode_prepared(self.prepared(image), knob)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        return self.codec.decode(data)

    def shared_bytes(self, knob: Knob) -> int:
        return self.codec.nbytes


class CountedTables:
    """Tables of levels with the shape that counted symbols have: `entropy.table` times a factor for
    each bin of |q| between EDGES, the share counted there over the table's own.

    A level with few symbols keeps the table's shape: PRIOR of that shape are counted in.
    """

    EDGES = np.array([0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 129, 257, 513, 1025, 2049])
    PRIOR = 8.0

    def __init__(self) -> None:
        self.counts = np.zeros((HIGHEST - LOWEST + 1, len(self.EDGES)))
        self._made: dict[int, tuple[int, ...]] = {}

    def count(self, symbols: np.ndarray, levels: np.ndarray) -> None:
        """Before any table is asked for."""
        bins = self._bin(np.minimum(np.abs(symbols), self.EDGES[-1])).ravel()
        rows = (np.clip(levels, LOWEST, HIGHEST) - LOWEST).ravel()
        size = self.counts.size
        found = np.bincount(rows * len(self.EDGES) + bins, minlength=size)
        self.counts += found.reshape(self.counts.shape)

    @property
    def nbytes(self) -> int:
        """Two bytes a bin of the levels that were seen."""
        return 2 * len(self.EDGES) * int((self.counts.sum(1) > 0).sum())

    def __call__(self, level: int) -> tuple[int, ...]:
        if level not in self._made:
            own = np.array(table(level), dtype=np.float64) / TOTAL
            share = np.concatenate([own[:1], 2 * own[1:-1:2], own[-1:]])  # of |q| = 0 … K, escape
            bins = self._bin(np.arange(len(share)))
            of_bin = np.bincount(bins, share, minlength=len(self.EDGES))
            seen = self.counts[level - LOWEST].copy()
            seen[bins[-1]] += seen[bins[-1] + 1 :].sum()  # beyond the table: escapes
            factor = (seen + self.PRIOR * of_bin) / of_bin.clip(1e-300)
            share = share * factor[bins]
            share = (share / share.sum() * (TOTAL - 2 * len(share))).astype(np.int64)
            ones = share[1:-1] // 2 + 1
            escape = int(share[-1]) + 1
            zero = TOTAL - escape - 2 * int(ones.sum())
            self._made[level] = (zero, *np.repeat(ones, 2).tolist(), escape)
        return self._made[level]

    def _bin(self, size: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.EDGES, size, side="right") - 1


class KltDct(OfCodec):
    """Transform code of the tokens: Z rounded and coded as the codec does, one level a coefficient
    and an offset of it for each frequency in an image (11 % fewer bytes on validation images of the
    demo; an offset for each direction of the KLT: 1 to 3 %).

    batches: raw tokens [b, T, D] of training images and their grid, from which the variance of each
    coefficient of `grid` is taken; and its tables at each step, from some of them. Another grid
    reads the levels at its frequencies, as the codec does. The knob is the step Δ.
    """

    plain_name, knobs = "transform", (*STEPS, 0.13)
    SAMPLED = 16  # images at least, where there are as many, whose symbols are counted

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        statistics: Statistics,
        grid: Grid,
        batches: Iterable[tuple[Tensor, Grid]],
    ) -> None:
        super().__init__(codec, shape, statistics)
        self.grid, self.klt = grid, codec.tensors["klt"].float()
        energy, images, every = 0.0, 0, 1
        self.sample: list[tuple[np.ndarray, Grid]] = []
        for raw, own in batches:
            x = normalise(raw.float().cpu())[0]
            z = dct(x @ self.klt, own)  # [b, T, d]
            energy = energy + off_grid(z.square().sum(0).mT, own, grid).mT
            for one in z:
                if images % every == 0:
                    self.sample.append((one.numpy().copy(), own))
                images += 1
                if len(self.sample) == 2 * self.SAMPLED:
                    self.sample, every = self.sample[::2], 2 * every
        self.octaves = (energy / images).double().clamp_min(1e-12).log2() / 2  # of Z, [T, d]
        self._tables: dict[Knob, CountedTables] = {}

    def tables(self, step: float) -> CountedTables:
        """Of training symbols at this step, themselves rounded by the rates of a first count."""
        if step not in self._tables:
            levels = {grid: self.levels(step, grid) for _, grid in self.sample}
            counted = table
            for _ in range(2):
                of_level, counted = counted, CountedTables()
                for z, grid in self.sample:
                    symbols, offsets = adapted(z.T / step, levels[grid], of_level)
                    counted.count(symbols, levels[grid] + offsets)
            self._tables[step] = counted
        return self._tables[step]

    def shared_bytes(self, knob: Knob) -> int:
        """The KLT, as in the codec's file, a byte of level a coefficient, and the tables."""
        klt = [self.codec.tensors[n] for n in ("klt", "inverse") if n in self.codec.tensors]
        return 2 * sum(t.numel() for t in klt) + self.octaves.numel() + self.tables(knob).nbytes

    def levels(self, step: float, grid: Grid) -> np.ndarray:
        """Of the tables, [d, T] int64."""
        found = (STEPS_AN_OCTAVE * (self.octaves.mT - np.log2(step))).round()
        maps = UNITS * found.long().unflatten(1, self.grid).numpy()
        return to_levels(on_grid(maps, grid)).reshape(len(maps), -1)

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        levels, tables = self.levels(knob, image.grid), self.tables(knob)
        z = dct(image.x @ self.klt, image.grid) / knob
        symbols, offsets = adapted(z.mT.numpy(), levels, tables)
        steps = np.diff(offsets, prepend=0)
        head = encode_symbols(steps, np.full(len(steps), OFFSET_LEVEL))
        body = encode_symbols(symbols.ravel(), (levels + offsets).ravel(), tables)
        return self._with_statistics(image, varint(len(head)) + head + body)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        payload, mean, std = self._payload(data, grid)
        levels = self.levels(knob, grid)
        length, at = read_varint(payload, 0)
        steps = np.full(levels.shape[1], OFFSET_LEVEL)
        levels = levels + decode_symbols(payload[at : at + length], steps).cumsum()
        body = payload[at + length :]
        symbols = decode_symbols(body, levels.ravel(), self.tables(knob)).reshape(levels.shape)
        z = torch.from_numpy(symbols.T.astype(np.float32)) * knob
        return denormalise(inverse_dct(z, grid) @ back(self.codec).mT, mean, std)
