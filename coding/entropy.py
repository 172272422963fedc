"""Entropy code of quantised coefficients: integer tables, one level of scale a coefficient.

    data = encode_symbols(symbols, levels)       # int arrays of one length
    symbols = decode_symbols(data, levels)       # the same levels, the same symbols

Level l stands for a standard deviation of 2^(l / 4) steps. Its table is a Laplace distribution,
rounded to integer frequencies with sum 2^24. Every table is computed in decimal arithmetic (exactly
rounded by its standard) and handed to the coder as multiples of 2^-24, which it turns into integers
without rounding: the same symbols on every machine. A symbol beyond its level's table is sent as an
escape and a varint, never clipped.

Stream: varint length of the escapes, escapes, ANS words (little-endian uint32).
"""

from __future__ import annotations

from decimal import Context, Decimal
from functools import cache

import constriction
import numpy as np

from common.errors import UserError

STEPS_AN_OCTAVE = 4
LOWEST, HIGHEST = -24, 48  # levels below and above use the table of the last one
TOTAL = 1 << 24
LARGEST_TABLE = 2048  # symbols of one sign

_context = Context(prec=40)


@cache
def table(level: int) -> tuple[int, ...]:
    """Frequencies with sum 2^24 of 0, 1, -1, 2, -2 … ±K and last the escape, of a level."""
    scale = _power_of_two(Decimal(level) / STEPS_AN_OCTAVE)
    root = _context.sqrt(Decimal(2))
    ratio = _context.exp(_context.divide(-root, scale))  # of one symbol to the next
    first = _context.exp(_context.divide(-root, 2 * scale))  # probability of not 0
    most = int(min(Decimal(LARGEST_TABLE), 4 + 8 * scale))
    both = []  # of ±1, ±2 … together
    left = first
    for _ in range(most):
        both.append(_context.multiply(left, 1 - ratio))
        left = _context.multiply(left, ratio)
    free = TOTAL - 2 * most - 2  # each symbol has at least 1
    ones = [1 + int(p * free / 2) for p in both]
    escape = 1 + int(left * free)
    zero = TOTAL - escape - 2 * sum(ones)
    return (zero, *(f for one in ones for f in (one, one)), escape)


def _power_of_two(exponent: Decimal) -> Decimal:
    return _context.exp(_context.multiply(exponent, _context.ln(Decimal(2))))


@cache
def _model(level: int) -> tuple[object, int]:
    """The coder's model of a level, and K."""
    frequencies = np.array(table(level), dtype=np.float64)
    # multiples of 2^-24: sums and products with integers below 2^24 are exact in float64
    model = constriction.stream.model.Categorical(frequencies / TOTAL, perfect=False)
    return model, (len(frequencies) - 2) // 2


@cache
def bits_table() -> np.ndarray:
    """Bits of |q| at each level, [levels, LARGEST_TABLE + 2] float32; beyond a table, an escape."""
    bits = np.empty((HIGHEST - LOWEST + 1, LARGEST_TABLE + 2), dtype=np.float32)
    for row, level in zip(bits, range(LOWEST, HIGHEST + 1), strict=True):
        own = -np.log2(np.array(table(level), dtype=np.float64) / TOTAL)
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


def encode_symbols(symbols: np.ndarray, levels: np.ndarray) -> bytes:
    """The stream of integer symbols [n], each with the table of its level [n] int."""
    order, runs = _sorted_by_level(levels)
    values = np.asarray(symbols, dtype=np.int64)[order]
    # 0, 1, -1, 2, -2 … are entries 0, 1, 2, 3, 4 …
    entries = np.where(values > 0, 2 * values - 1, -2 * values)
    coder = constriction.stream.stack.AnsCoder()
    escaped = []
    for level, first, end in reversed(runs):
        model, most = _model(level)
        run = entries[first:end]
        beyond = run > 2 * most
        if beyond.any():
            escaped = [e - 2 * most - 1 for e in run[beyond].tolist()] + escaped
            run = np.where(beyond, 2 * most + 1, run)
        coder.encode_reverse(run.astype(np.int32), model)
    tail = b"".join(varint(e) for e in escaped)
    return varint(len(tail)) + tail + coder.get_compressed().astype("<u4").tobytes()


def decode_symbols(data: bytes, levels: np.ndarray) -> np.ndarray:
    """The symbols [n] int64 of `encode_symbols`; raises UserError where data is no such stream."""
    length, at = read_varint(data, 0)
    words = data[at + length :]
    if len(data) < at + length or len(words) % 4:
        raise UserError("a coded stream is damaged (it ends too soon)")
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    order, runs = _sorted_by_level(levels)
    entries = np.empty(len(order), dtype=np.int64)
    for level, first, end in runs:
        model, most = _model(level)
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
    raise UserError("a coded stream is damaged (a number does not end)")
