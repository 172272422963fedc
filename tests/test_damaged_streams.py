"""A coded image that is damaged is refused in words, also where its checksum was made to fit."""

import math
import random
import struct
import warnings
import zlib

import pytest
import torch
from test_codec import GRID, by_form, of_grid, some_tokens

from lowrank_tokens.codec import Codec
from lowrank_tokens.entropy import read_varint, varint, zigzag
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.stream import EXTREMES, FACTORS, FORMS, HEADER

FIELDS = ("rows", "columns", "step", "rank", "first")


@pytest.fixture(scope="module")
def codec():
    return Codec.fit(of_grid(some_tokens(64).split(5)))


def sealed(first, rest):
    """Build a stream of its first five bytes and what follows the checksum, made to fit."""
    return first + struct.pack("<I", zlib.crc32(rest, zlib.crc32(first))) + rest


def altered(data, first=None, extremes=None, **fields):
    """Return the stream with other fields, its checksum made to fit.

    fields: integers as the stream holds them; extremes: bytes that take the place of those of a
    stream that has none.
    """
    names = FIELDS if FORMS[data[0] & 1] == FACTORS else FIELDS[:3]
    at, head = HEADER.size, b""
    for name in names:
        value, at = read_varint(data, at)
        head += varint(fields.get(name, value))
    bits = data[0] if extremes is None else data[0] | EXTREMES
    first = bytes([bits if first is None else first]) + data[1:5]
    return sealed(first, head + (extremes or b"") + data[at:])


@by_form
def test_any_flipped_byte_and_any_shorter_stream_is_refused(codec, form):
    data = codec.encode(some_tokens(1, seed=4)[0], GRID, step=1.5, form=form)
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        with pytest.raises(InputError, match="damaged"):
            codec.decode(bytes(flipped))
        with pytest.raises(InputError, match="damaged"):
            codec.decode(data[:i])


@by_form
def test_fields_of_a_header_that_no_image_has_are_refused_though_the_checksum_fits(codec, form):
    data = codec.encode(some_tokens(1)[0], GRID, step=0.3, form=form)
    assert altered(data) == data
    cases = [
        ({"rows": rows, "columns": columns}, f"its grid is {rows} x {columns} tokens")
        for rows, columns in ((0, 24), (1, 65537), (2**40, 2**40), (65536, 65536))
    ]
    cases += [({"step": zigzag(i)}, "its step is out of range") for i in (-2049, 2049, 2**60)]
    cases += [({"step": 2**62 + 1}, "a number is too large")]
    cases += [({"first": 16 * 15 + data[0] % 16}, "of another format")]
    cases += [({"first": data[0] | bit}, "of another format") for bit in (4, 8)]  # nothing's yet
    if form == FACTORS:
        cases += [({"rank": rank}, "its rank or its extreme") for rank in (25, 2**30, 2**62)]
        cases += [({"rank": 2**80}, "a number is too large")]
    tokens, value = math.prod(GRID) * 48, struct.pack("<H", 0x4480)
    not_finite = struct.pack("<H", 0x7FC0), struct.pack("<H", 0x7F80)
    cases += [
        ({"extremes": varint(1) + varint(tokens) + value}, "its extreme entries do not fit"),
        ({"extremes": varint(1) + varint(2**61) + value}, "its extreme entries do not fit"),
        ({"extremes": varint(2**40) + varint(1)}, "a coded stream is damaged"),
        ({"extremes": varint(2**80)}, "a number is too large"),
        ({"extremes": varint(2) + 2 * varint(2**62) + 2 * value}, "extreme entries do not end"),
        ({"extremes": varint(2) + varint(7) + varint(0) + 2 * value}, "no order of numbers"),
        *(({"extremes": varint(1) + varint(7) + bad}, "no order of numbers") for bad in not_finite),
    ]
    for fields, says in cases:
        damaged = altered(data, **fields)
        for decode in (codec.decode, lambda stream: codec.decode_batch([data, stream])):
            with pytest.raises(InputError, match=says):
                decode(damaged)
    entry = altered(data, extremes=varint(1) + varint(tokens - 1) + value)  # the last one there is
    assert codec.decode(entry)[-1, -1] == 1024


def test_components_that_depend_on_each_other_are_refused_with_the_image_named(codec):
    """Two equal columns of symbols gave a LinAlgError."""
    prepared = codec.prepare(some_tokens(1)[0], GRID)
    rounded = codec._rounded(prepared, 0, FACTORS)
    count = len(rounded.symbols[0][0])
    body = rounded.parts[-1][0][: 24 * count].reshape(24, count)
    assert count > 1
    body[:, 1] = body[:, 0]  # of levels that are as good as those of the first
    data = codec._written(rounded)
    with pytest.raises(InputError, match="its components are dependent"):
        codec.decode(data)
    with pytest.raises(InputError, match=r"one of streams\[0, 1\]: .* components are dependent"):
        codec.decode_batch([codec.encode(some_tokens(1)[0], GRID, step=1), data])


def test_whatever_its_bytes_are_a_stream_gives_tokens_of_its_grid_or_an_error_in_words(codec):
    """A valid checksum of damaged bytes: LinAlgError and OverflowError were 6 % of 2700 cases."""
    raw, rng = some_tokens(1)[0], random.Random(0)
    extreme = raw.clone()
    extreme[2, 10] = 4000.0
    whole = [
        codec.encode(tokens, GRID, step=step, form=form)
        for form in FORMS
        for tokens in (raw, extreme)
        for step in (0.3, 2.0)
    ]
    outcomes = {"refused": 0, "decoded": 0}
    for _ in range(600):
        data = rng.choice(whole)
        rest = bytearray(data[HEADER.size :])
        at = rng.randrange(2, 30 if rng.random() < 0.5 else len(rest))  # not the grid
        how = rng.choice(("change", "cut", "insert", "large"))
        if how == "change":
            rest[at] = rng.randrange(256)
        elif how == "cut":
            del rest[at:]
        elif how == "insert":
            rest[at:at] = rng.randbytes(rng.randint(1, 10))
        else:
            rest[at : at + 1] = varint(2 ** rng.randint(20, 100))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tokens = codec.decode(sealed(data[:5], bytes(rest)))
            assert tokens.shape == (24, 48) and tokens.dtype == torch.float32
            outcomes["decoded"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
