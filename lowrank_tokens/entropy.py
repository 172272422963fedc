"""Entropy code of quantised coefficients: integer tables, one level of scale per coefficient.

    data = encode_symbols([(symbols, levels)], tables)      # int arrays of one length
    symbols = SymbolReader(data, tables).read(levels)       # the same levels, the same symbols

Level l stands for a standard deviation of 2^(l / 4) steps. Its table holds integer frequencies with
sum 2^24 of |q| = 0 … K and of an escape. The tables are stored in the codec file. The coder gets
them as multiples of 2^-24, which it turns into integers without rounding: the same symbols are read
on every machine. A symbol beyond its level's table is sent as an escape and a varint, never
clipped. A coefficient of a level below CODED_FROM is zero by definition and takes no bits.

Stream: varint length of the escapes, escapes, ANS words (little-endian uint32). docs/stream.md has
the format to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import constriction
import numpy as np

from lowrank_tokens.exceptions import InputError

STEPS_AN_OCTAVE = 4
LOWEST, HIGHEST = -24, 28  # of coefficients; those below and above use the table of the last one
CODED_FROM = -22
# what is no coefficient has tables of its own: differences of i_σ, and of offsets of levels
SIGMA_LEVEL, OFFSET_LEVEL = HIGHEST + 1, HIGHEST + 2
TOTAL = 1 << 24
LARGEST_TABLE = 255  # symbols of one sign
SHAPES = (*range(LOWEST, HIGHEST + 1), 0, 1)  # level whose shape a table has
LEVELS = len(SHAPES)
LARGEST_NUMBER = 2**62  # a stream that says more is damaged: sums with it are int64

# Shape of a coefficient about its level, fitted to coefficients of training images as rounded by
# rate: Gaussians of (level difference, weight) and a Laplace distribution for tails.
GAUSSIANS = ((-4, 0.160), (-2, 0.120), (0, 0.660), (2, 0.036))
LAPLACE = 0.024
# 0 reaches to t = 1/2 + 0.4 / (1 + e^((level + 6.5) / 2.5)) where rounding is by rate
DEAD_ZONE = (0.4, 6.5, 2.5)


def table_sizes() -> list[int]:
    """Return K of each table, from LOWEST on: the largest |q| that it holds."""
    return [int(min(LARGEST_TABLE, 4 + 8 * 2 ** (shape / STEPS_AN_OCTAVE))) for shape in SHAPES]


class Tables:
    """The frequencies of all levels, their coder's models and the bits of each symbol.

    Args: frequencies: flat int64, for each level from LOWEST to OFFSET_LEVEL the frequencies of
        |q| = 0, of +k (the same of −k) for k = 1 … K, and of the escape; sizes: K of each level.
    Raises InputError where they are not of such a shape, or do not sum to 2^24.
    """

    def __init__(self, frequencies: np.ndarray, sizes: Sequence[int]) -> None:
        self.frequencies, self.sizes = np.asarray(frequencies, dtype=np.int64), list(sizes)
        if len(self.sizes) != LEVELS or len(self.frequencies) != sum(self.sizes) + 2 * LEVELS:
            raise InputError("tables of another number of levels or symbols: the codec is damaged")
        self._own: list[np.ndarray] = []
        self._models: list[object | None] = [None] * LEVELS
        # bits of |q| at each level, flat [LEVELS · (LARGEST_TABLE + 2)]; beyond a table, an escape
        self.bits = np.empty((LEVELS, LARGEST_TABLE + 2), dtype=np.float32)
        at = 0
        for row, most in zip(self.bits, self.sizes, strict=True):
            own = self.frequencies[at : at + most + 2]
            at += most + 2
            if own.min() < 1 or own[0] + 2 * own[1:-1].sum() + own[-1] != TOTAL:
                raise InputError("a table does not sum to 2^24: the codec is damaged")
            self._own.append(own)
            bits = -np.log2(own / TOTAL)
            row[:] = bits[-1] + 16
            row[: most + 1] = bits[:-1]
        self.bits[: CODED_FROM - LOWEST, 0] = 0  # these are not coded at all
        self.bits[: CODED_FROM - LOWEST, 1:] = 1e9

    def model(self, level: int) -> tuple[object, int]:
        """Return the coder's model of 0, 1, −1, 2, −2 … ±K and the escape, and K."""
        i = level - LOWEST
        if self._models[i] is None:
            own = self._own[i]
            both = np.concatenate([own[:1], np.repeat(own[1:-1], 2), own[-1:]])
            # multiples of 2^-24: sums and products with integers below 2^24 are exact in float64
            self._models[i] = constriction.stream.model.Categorical(both / TOTAL, perfect=False)
        return self._models[i], self.sizes[i]

    def __getstate__(self) -> dict:
        """Leave the coder's models out: they do not pickle and are made again when asked for."""
        return {**self.__dict__, "_models": [None] * LEVELS}

    @classmethod
    def of_mixture(cls) -> Tables:
        """Return the tables that a new codec file stores: the mixture's, rounded to integers.

        Tables fitted to a codec's own training symbols brought 0 to 0.4 % on validation images of
        the demo, and cost some levels as much: the mixture's shape is what was fitted.
        """
        frequencies = []
        for level, most in zip(SHAPES, table_sizes(), strict=True):
            share = mixture(level, most)  # of |q| = 0 … K and the escape
            free = TOTAL - 2 * len(share)  # each symbol has at least 1
            ones = 1 + (share[1:-1] / 2 * free).astype(np.int64)
            escape = 1 + int(share[-1] * free)
            zero = TOTAL - escape - 2 * int(ones.sum())
            frequencies.append(np.concatenate([[zero], ones, [escape]]))
        return cls(np.concatenate(frequencies), table_sizes())


def mixture(level: int, most: int) -> np.ndarray:
    """Return the probabilities of |q| = 0 … `most` and of all beyond at a level, float64."""
    height, middle, width = DEAD_ZONE
    edges = 0.5 + height / (1 + math.exp((level + middle) / width)) + np.arange(most + 1)
    own = 2 ** (level / STEPS_AN_OCTAVE)
    beyond = LAPLACE * np.exp(-math.sqrt(2) * edges / own)
    for difference, weight in GAUSSIANS:
        scale = 2 ** ((level + difference) / STEPS_AN_OCTAVE) * math.sqrt(2)
        beyond = beyond + weight * np.array([math.erfc(edge / scale) for edge in edges])
    return np.append(-np.diff(beyond, prepend=1.0), beyond[-1])


def _by_level(levels: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Return the order of coding, and (level, first, end) of each run in it, lowest level first.

    Coefficients of levels below CODED_FROM are in no run.
    """
    levels = levels.astype(np.int16)
    coded = np.flatnonzero(levels >= CODED_FROM)
    order = coded[np.argsort(levels[coded], kind="stable")]
    counts = np.bincount(levels[coded].astype(np.int64) - CODED_FROM)
    ends = counts.cumsum()
    runs = zip(np.flatnonzero(counts).tolist(), counts[counts > 0], ends[counts > 0], strict=True)
    return order, [(CODED_FROM + i, int(end - n), int(end)) for i, n, end in runs]


def encode_symbols(parts: Sequence[tuple[np.ndarray, np.ndarray]], tables: Tables) -> bytes:
    """Encode parts of integer symbols [n] with their levels [n], read back one after another.

    Raises ValueError where a coefficient of a level below CODED_FROM is not 0.
    """
    coder = constriction.stream.stack.AnsCoder()
    escaped: list[int] = []
    for symbols, levels in reversed(parts):  # a stack: what is read first is written last
        if np.any(symbols[levels < CODED_FROM]):
            raise ValueError("a symbol of a level that is not coded is not 0")
        order, runs = _by_level(levels)
        values = np.asarray(symbols, dtype=np.int64)[order]
        # 0, 1, -1, 2, -2 … are entries 0, 1, 2, 3, 4 …
        entries = np.where(values > 0, 2 * values - 1, -2 * values)
        for level, first, end in reversed(runs):
            model, most = tables.model(level)
            run = entries[first:end]
            beyond = run > 2 * most
            if beyond.any():
                escaped = [e - 2 * most - 1 for e in run[beyond].tolist()] + escaped
                run = np.where(beyond, 2 * most + 1, run)
            coder.encode_reverse(run.astype(np.int32), model)
    tail = b"".join(map(varint, escaped))
    return varint(len(tail)) + tail + coder.get_compressed().astype("<u4").tobytes()


class SymbolReader:
    """Reads the parts of `encode_symbols`' stream, in their order.

    Raises InputError where the data are no such stream.
    """

    def __init__(self, data: bytes, tables: Tables) -> None:
        length, self._at = read_varint(data, 0)
        words = data[self._at + length :]
        if len(data) < self._at + length or len(words) % 4:
            raise InputError("a coded stream is damaged (it ends too soon)")
        self._data, self._tables = data, tables
        words = np.frombuffer(words, dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.stack.AnsCoder(words)

    def read(self, levels: np.ndarray) -> np.ndarray:
        """Return the next part: symbols [n] int64 of levels [n]."""
        order, runs = _by_level(levels)
        entries = np.empty(len(order), dtype=np.int64)
        for level, first, end in runs:
            model, most = self._tables.model(level)
            run = self._coder.decode(model, end - first).astype(np.int64)
            for i in np.flatnonzero(run == 2 * most + 1).tolist():
                beyond, self._at = read_varint(self._data, self._at)
                run[i] = 2 * most + 1 + beyond
            entries[first:end] = run
        symbols = np.zeros(len(levels), dtype=np.int64)
        symbols[order] = np.where(entries % 2 == 1, (entries + 1) // 2, -(entries // 2))
        return symbols


def varint(value: int) -> bytes:
    """Encode an integer ≥ 0, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read the integer that begins at byte `at`; return it and where it ends.

    Raises InputError where it does not end, or is above LARGEST_NUMBER.
    """
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if value > LARGEST_NUMBER:
            raise InputError("a coded stream is damaged (a number is too large)")
        if byte < 128:
            return value, at
    raise InputError("a coded stream is damaged (a number does not end)")


def zigzag(value: int) -> int:
    """Map 0, −1, 1, −2, 2 … to 0, 1, 2, 3, 4 …, as varints take them."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """Undo `zigzag`."""
    return -(value + 1) // 2 if value % 2 else value // 2
