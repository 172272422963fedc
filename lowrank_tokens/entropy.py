"""Entropy code of quantised coefficients: integer tables, one level of scale a coefficient.

    data = encode_symbols(symbols, levels)       # int arrays of one length
    symbols = decode_symbols(data, levels)       # the same levels, the same symbols

Level l stands for a standard deviation of 2^(l / 4) steps. Its table is a mixture of Gaussians and
a Laplace distribution, rounded to integer frequencies with sum 2^24. Every table is computed in
decimal arithmetic (exactly rounded by its standard) and handed to the coder as multiples of 2^-24,
which it turns into integers without rounding: the same symbols on every machine. A symbol beyond
its level's table is sent as an escape and a varint, never clipped.

Stream: varint length of the escapes, escapes, ANS words (little-endian uint32).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise

import constriction
import numpy as np

from lowrank_tokens.exceptions import InputError

STEPS_AN_OCTAVE = 4
LOWEST, HIGHEST = -24, 48  # levels below and above use the table of the last one
TOTAL = 1 << 24
LARGEST_TABLE = 2048  # symbols of one sign

Table = Callable[[int], tuple[int, ...]]  # of a level, as `table`; hashable

# Shape of a coefficient about its level, fitted to coefficients of training images as rounded by
# rate: Gaussians of (level difference, weight in thousandths) and a Laplace for tails. 5.5 % fewer
# bytes than a Laplace alone.
GAUSSIANS = ((-4, 160), (-2, 120), (0, 660), (2, 36))
LAPLACE = 24
# 0 reaches to t = 1/2 + 0.4 / (1 + e^((level + 6.5) / 2.5)) where rounding is by rate
DEAD_ZONE = (Decimal("0.4"), Decimal("6.5"), Decimal("2.5"))
DENSITY_FROM = 16  # from this level on a symbol's share is the density at its middle

_context = Context(prec=40)
_ROOT_2 = _context.sqrt(Decimal(2))
_PI = Decimal("3.14159265358979323846264338327950288419717")


@cache
def table(level: int) -> tuple[int, ...]:
    """Frequencies with sum 2^24 of 0, 1, -1, 2, -2 … ±K and last the escape, of a level."""
    with localcontext(_context):
        most = int(min(Decimal(LARGEST_TABLE), 4 + 8 * _power_of_two(level)))
        beyond = _beyond_dense(level, most) if level >= DENSITY_FROM else _beyond(level, most)
        free = TOTAL - 2 * most - 2  # each symbol has at least 1
        ones = [1 + int((a - b) * free / 2) for a, b in pairwise(beyond)]
        escape = 1 + int(beyond[-1] * free)
    zero = TOTAL - escape - 2 * sum(ones)
    return (zero, *(f for one in ones for f in (one, one)), escape)


def _beyond(level: int, most: int) -> list[Decimal]:
    """Probability of |q| > k for k = 0 … most."""
    height, middle, width = DEAD_ZONE
    start = Decimal("0.5") + height / (1 + ((level + middle) / width).exp())
    edges = [start + k for k in range(most + 1)]
    own = _power_of_two(level)
    total = [LAPLACE * (-_ROOT_2 * edge / own).exp() for edge in edges]
    for difference, weight in GAUSSIANS:
        scale = _power_of_two(level + difference) * _ROOT_2
        total = [t + weight * _erfc(edge / scale) for t, edge in zip(total, edges, strict=True)]
    return [t / 1000 for t in total]


def _beyond_dense(level: int, most: int) -> list[Decimal]:
    """`_beyond` by densities, for tables of many symbols."""
    own = _power_of_two(level)
    height, ratio = LAPLACE * _ROOT_2 / own, (-_ROOT_2 / own).exp()
    density = []
    for _ in range(most + 1):
        density.append(height)
        height *= ratio
    for difference, weight in GAUSSIANS:
        scale = _power_of_two(level + difference)
        height = weight * 2 / scale / (2 * _PI).sqrt()
        ratio = (-1 / (2 * scale * scale)).exp()  # e^(-(2k + 1) / 2σ²) from k to k + 1
        square = ratio * ratio
        for k in range(most + 1):
            density[k] += height
            height *= ratio
            ratio *= square
    density[0] /= 2
    tail = LAPLACE * (-_ROOT_2 * (most + Decimal("0.5")) / own).exp()
    total = sum(density) + tail
    left, beyond = tail, [tail]
    for share in reversed(density[1:]):
        left += share
        beyond.append(left)
    return [b / total for b in reversed(beyond)]


def _erfc(x: Decimal) -> Decimal:
    """Complementary error function of x ≥ 0 by its power series, 0 beyond 6.5 (below 1e-19)."""
    if x > Decimal("6.5"):
        return Decimal(0)
    term, total, n = x, x, 0
    while abs(term) > Decimal("1e-20"):
        n += 1
        term = -term * x * x / n
        total += term / (2 * n + 1)
    return max(1 - 2 * total / _PI.sqrt(), Decimal(0))


def _power_of_two(level: int) -> Decimal:
    """2^(level / 4)."""
    return (Decimal(2).ln() * level / STEPS_AN_OCTAVE).exp()


@cache
def _model(level: int, of_level: Table) -> tuple[object, int]:
    """The coder's model of a level, and K."""
    frequencies = np.array(of_level(level), dtype=np.float64)
    # multiples of 2^-24: sums and products with integers below 2^24 are exact in float64
    model = constriction.stream.model.Categorical(frequencies / TOTAL, perfect=False)
    return model, (len(frequencies) - 2) // 2


@cache
def bits_table(of_level: Table = table) -> np.ndarray:
    """Bits of |q| at each level, [levels, LARGEST_TABLE + 2] float32; beyond a table, an escape."""
    bits = np.empty((HIGHEST - LOWEST + 1, LARGEST_TABLE + 2), dtype=np.float32)
    for row, level in zip(bits, range(LOWEST, HIGHEST + 1), strict=True):
        own = -np.log2(np.array(of_level(level), dtype=np.float64) / TOTAL)
        one_sign = np.concatenate([own[:1], own[1:-1:2]])
        row[:] = own[-1] + 16
        row[: len(one_sign)] = one_sign
    return bits


def _sorted_by_level(levels: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The order of coding, and (level, first, end) of each run in it, lowest level first."""
    levels = np.clip(levels, LOWEST, HIGHEST).astype(np.int16)
    order = np.argsort(levels, kind="stable")
    found, starts = np.unique(levels[order], return_index=True)
    ends = [*starts.tolist(), len(order)][1:]
    return order, list(zip(found.tolist(), starts.tolist(), ends, strict=True))


def encode_symbols(symbols: np.ndarray, levels: np.ndarray, of_level: Table = table) -> bytes:
    """The stream of integer symbols [n], each with the table of its level [n] int."""
    order, runs = _sorted_by_level(levels)
    values = np.asarray(symbols, dtype=np.int64)[order]
    # 0, 1, -1, 2, -2 … are entries 0, 1, 2, 3, 4 …
    entries = np.where(values > 0, 2 * values - 1, -2 * values)
    coder = constriction.stream.stack.AnsCoder()
    escaped = []
    for level, first, end in reversed(runs):
        model, most = _model(level, of_level)
        run = entries[first:end]
        beyond = run > 2 * most
        if beyond.any():
            escaped = [e - 2 * most - 1 for e in run[beyond].tolist()] + escaped
            run = np.where(beyond, 2 * most + 1, run)
        coder.encode_reverse(run.astype(np.int32), model)
    tail = b"".join(varint(e) for e in escaped)
    return varint(len(tail)) + tail + coder.get_compressed().astype("<u4").tobytes()


def decode_symbols(data: bytes, levels: np.ndarray, of_level: Table = table) -> np.ndarray:
    """The symbols [n] int64 of `encode_symbols`; raises InputError where data is no such stream."""
    length, at = read_varint(data, 0)
    words = data[at + length :]
    if len(data) < at + length or len(words) % 4:
        raise InputError("a coded stream is damaged (it ends too soon)")
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    order, runs = _sorted_by_level(levels)
    entries = np.empty(len(order), dtype=np.int64)
    for level, first, end in runs:
        model, most = _model(level, of_level)
        run = coder.decode(model, end - first).astype(np.int64)
        for i in np.flatnonzero(run == 2 * most + 1).tolist():
            beyond, at = read_varint(data, at)
            run[i] = 2 * most + 1 + beyond
        entries[first:end] = run
    values = np.where(entries % 2 == 1, (entries + 1) // 2, -(entries // 2))
    symbols = np.empty_like(values)
    symbols[order] = values
    return symbols


def varint(value: int) -> bytes:
    """An integer ≥ 0, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at byte `at`, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise InputError("a coded stream is damaged (a number does not end)")
