"""The stream of a coded image: header, checksum, and the entries that are kept apart.

docs/stream.md specifies it to the bit.
"""

from __future__ import annotations

import math
import numbers
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.entropy import OFFSET_LEVEL, SIGMA_LEVEL, read_varint, unzigzag, varint
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import MAX_SIDE, Grid

STREAM_FORMAT = 1
FORMS = ("factors", "transform")
FACTORS, TRANSFORM = FORMS
EXTREMES = 2  # bit of a stream's first byte: extreme entries follow its header
KNOWN_BITS = 1 | EXTREMES
# 16 · format + bits, first four bytes of the codec's identity, CRC-32 of all other bytes
HEADER = struct.Struct("<B4sI")
BYTES = bytes | bytearray | memoryview  # what a coded image may be given as
STEP_UNITS = 64  # of an octave of Δ: the grid of levels, UNITS to a level
LARGEST_STEP_INDEX = 32 * STEP_UNITS  # either way: of finer steps symbols are no integers
MOST_TOKENS = 2**20  # of an image: 14336 pixels square at 14 a token

# An entry of a token is extreme above this share of the token's energy, and that many of its std.
EXTREME_SHARE, EXTREME_STD = 0.1, 8.0
MOST_EXTREME_PASSES = 32


class Extremes(NamedTuple):
    """Entries of an image's tokens that are stored one by one."""

    positions: np.ndarray  # t · D + j, [n] int64
    values: np.ndarray  # [n] float32


class StreamHeader(NamedTuple):
    """The header of a coded image, before its symbols."""

    form: str
    grid: Grid
    step_index: int
    rank: int  # 0 of the form `transform`
    first: int  # i_σ of the first component
    extremes: Extremes | None
    end: int  # byte at which the symbols begin

    @property
    def step(self) -> float:
        """Return Δ in units of normalised tokens."""
        return step_of(self.step_index)


def step_index(step: float) -> int:
    """Return the index of the nearest step 2^(i / 64).

    Raises InputError where it is not a number from 2^-32 to 2^32.
    """
    index = round(STEP_UNITS * math.log2(positive_number("step", step)))
    if abs(index) > LARGEST_STEP_INDEX:
        raise InputError(f"step = {step!r} is out of range: give 2^-32 to 2^32")
    return index


def step_of(index: int) -> float:
    """Return the step Δ of an index, in units of normalised tokens."""
    return 2.0 ** (index / STEP_UNITS)


def positive_number(name: str, value: float | np.number | Tensor) -> float:
    """Return a number of Python, numpy or a tensor of one entry as a float.

    Raises InputError, naming the argument, where it is no number, not finite or not above 0.
    """
    scalar = isinstance(value, Tensor | np.ndarray) and value.ndim == 0
    is_number = scalar or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    number = float(value) if is_number else math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} = {value!r} is not a finite number above 0")
    return number


def is_grid(grid: Grid) -> bool:
    """Return whether rows and columns are those of an image that can be coded."""
    return 0 < min(grid) <= max(grid) <= MAX_SIDE and math.prod(grid) <= MOST_TOKENS


def stream_header(data: bytes) -> StreamHeader:
    """Return the header of a stream of any codec.

    Raises InputError where the bytes are damaged or of another format, TypeError for no bytes.
    """
    if not isinstance(data, BYTES):
        raise TypeError(
            f"a coded image is bytes, as Codec.encode gives them, not {type(data).__name__}"
        )
    if len(data) < HEADER.size or data[0] & ~KNOWN_BITS != 16 * STREAM_FORMAT:
        raise InputError("a coded image is damaged, or of another format: write it again")
    if zlib.crc32(data[HEADER.size :], zlib.crc32(data[:5])) != HEADER.unpack_from(data)[2]:
        raise InputError("a coded image is damaged (its checksum differs): write it again")
    form = FORMS[data[0] & 1]
    height, at = read_varint(data, HEADER.size)
    width, at = read_varint(data, at)
    index, at = read_varint(data, at)
    if not is_grid((height, width)):
        raise InputError(
            f"a coded image is damaged (its grid is {height} x {width} tokens): write it again"
        )
    if abs(unzigzag(index)) > LARGEST_STEP_INDEX:
        raise InputError("a coded image is damaged (its step is out of range): write it again")
    rank = first = 0
    if form == FACTORS:
        rank, at = read_varint(data, at)
        first, at = read_varint(data, at)
    extremes = None
    if data[0] & EXTREMES:
        extremes, at = read_extremes(data, at)
    return StreamHeader(form, (height, width), unzigzag(index), rank, unzigzag(first), extremes, at)


def grid_of(data: bytes) -> Grid:
    """Return rows and columns of a coded image's tokens; errors as `stream_header`."""
    return stream_header(data).grid


def checksummed(flags: int, identity: str, rest: bytes) -> bytes:
    """Return a stream of what follows its header, with the header before it."""
    first = bytes([16 * STREAM_FORMAT + flags]) + bytes.fromhex(identity[:8])
    return first + struct.pack("<I", zlib.crc32(rest, zlib.crc32(first))) + rest


def side_information(
    falls: np.ndarray | list, *offsets: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return symbols and levels of differences of i_σ, where there are some, and of offsets."""
    steps = np.concatenate([np.diff(o, prepend=0) for o in offsets])  # neighbours are much alike
    parts = [(np.asarray(falls, dtype=np.int64), np.full(len(falls), SIGMA_LEVEL))]
    return parts + [(steps, np.full(len(steps), OFFSET_LEVEL))]


# ------------------------------------------------------------------------- extreme entries


def extreme_entries(tokens: Tensor) -> Tensor | None:
    """Return which entries of tokens [T, D] are extreme, [T, D] bool; None where none is.

    An entry is extreme where it alone has EXTREME_SHARE of its token's energy about the mean, and
    is EXTREME_STD from it, all without those that were found before.
    """
    threshold = max(EXTREME_SHARE * tokens.shape[1], EXTREME_STD**2)
    found = None
    for _ in range(MOST_EXTREME_PASSES):
        kept = tokens if found is None else tokens.masked_fill(found, 0)
        count = tokens.shape[1] if found is None else (~found).sum(1, keepdim=True)
        centred = kept - kept.sum(1, keepdim=True) / count
        if found is not None:
            centred.masked_fill_(found, 0)
        square = centred.square_()
        energy = square.sum(1, keepdim=True)
        if found is None and not (square.amax(1) > threshold / count * energy[:, 0]).any():
            return None
        more = (square > threshold / count * energy) & (energy > 0)
        if not more.any():
            break
        found = more if found is None else found | more
    return found


def replace_extremes(tokens: Tensor, extreme: Tensor) -> Tensor:
    """Replace the extreme entries of tokens [T, D] by the mean of their token's others."""
    others = (~extreme).sum(1, keepdim=True).clamp_min(1)
    mean = tokens.masked_fill(extreme, 0).sum(1, keepdim=True) / others
    return torch.where(extreme, mean, tokens)


def write_extremes(tokens: Tensor, extreme: Tensor) -> bytes:
    """Return the extreme entries of tokens [T, D] as bytes, values in bfloat16."""
    positions = extreme.flatten().nonzero().flatten()
    values = tokens.flatten()[positions].to(torch.bfloat16)
    steps = np.diff(positions.numpy(), prepend=0).tolist()
    stored = values.view(torch.int16).numpy().astype("<i2").tobytes()
    return varint(len(steps)) + b"".join(map(varint, steps)) + stored


def read_extremes(data: bytes, at: int) -> tuple[Extremes, int]:
    """Read extreme entries from byte `at`; return them and where they end.

    Raises InputError where they are cut off, not in rising order or not finite.
    """
    count, at = read_varint(data, at)
    steps = []
    for _ in range(count):
        step, at = read_varint(data, at)
        steps.append(step)
    if at + 2 * count > len(data) or sum(steps) >= 2**62:
        raise InputError(
            "a coded image is damaged (its extreme entries do not end): write it again"
        )
    bits = np.frombuffer(data, "<u2", count, at).astype(np.uint32) << 16
    positions, values = np.cumsum(np.array(steps, dtype=np.int64)), bits.view(np.float32)
    if 0 in steps[1:] or not np.isfinite(values).all():
        raise InputError(
            "a coded image is damaged (its extreme entries are no order of numbers): write it again"
        )
    return Extremes(positions, values), at + 2 * count
