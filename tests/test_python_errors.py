"""Mistakes in a call from Python: a ValueError or TypeError that names the argument, no flag."""

import numpy as np
import pytest
import torch
from tiny import steep_tokens

from lowrank_tokens import (
    Codec,
    FeatureCache,
    VisionTokens,
    exact_factors,
    load_factors,
    read_factors,
)

GRID, RAW = (4, 4), steep_tokens(8, 16, 24)
FACTORS = torch.zeros(16, 2), torch.zeros(2), torch.zeros(24, 2)


@pytest.fixture(scope="module")
def codec():
    return Codec.fit([(RAW, GRID)])


@pytest.fixture(scope="module")
def data(codec):
    return codec.encode(RAW[0], GRID, step=0.5)


def refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "--" not in str(caught.value)


FIT = {
    "tokens alone": (RAW, {}, TypeError, r"batches\[0\] is no pair of float tokens \[b, T, D\]"),
    "one pair": ((RAW, GRID), {}, TypeError, r"batches\[0\] is no pair"),
    "nothing": ([], {}, ValueError, "batches: there are no training images"),
    "generator": (iter([(RAW, GRID)]), {}, TypeError, "batches can be read only once"),
    "another grid": ([(RAW, (4, 5))], {}, ValueError, r"batches\[0\].*grid of 4 x 5"),
    "one image": ([(RAW[0], GRID)], {}, ValueError, r"batches\[0\]: tokens \[16, 24\]"),
    "numpy": ([(RAW.numpy(), GRID)], {}, TypeError, r"batches\[0\] is no pair of float tokens"),
    "integers": ([(RAW.int(), GRID)], {}, TypeError, r"batches\[0\] is no pair of float tokens"),
    "not finite": ([(RAW / 0, GRID)], {}, ValueError, "batches: training tokens are not finite"),
    "other width": ([(RAW, GRID), (RAW[..., :9], GRID)], {}, ValueError, r"batches\[1\].*T, 24\]"),
    "grid": ([(RAW, GRID)], {"grid": 4}, ValueError, "grid = 4 is not"),
    "metric": ([(RAW, GRID)], {"metric": torch.eye(3)}, ValueError, r"metric \[3, 3\] is not M"),
    "metric below 0": ([(RAW, GRID)], {"metric": -torch.eye(24)}, ValueError, "metric is not pos"),
    "numpy metric": ([(RAW, GRID)], {"metric": np.eye(24)}, TypeError, "metric is no float tensor"),
    "info": ([(RAW, GRID)], {"info": "mine"}, TypeError, "info is a str: give a dict"),
    "hashes": ([(RAW, GRID)], {"image_hashes": ["a.jpg"]}, ValueError, "image_hashes: 'a.jpg'"),
}


@pytest.mark.parametrize("kind", FIT)
def test_fit_names_the_argument_that_is_wrong(kind):
    batches, options, error, message = FIT[kind]
    refused(lambda: Codec.fit(batches, **options), error, message)


ENCODE = {
    "no target": ({}, ValueError, "give one of step, error and max_bytes, not none"),
    "two targets": ({"step": 1, "error": 0.1}, ValueError, "give one of step, error and max_bytes"),
    "per cent": ({"error": 16}, ValueError, "error = 16 is a fraction: give less than 1"),
    "truth": ({"error": True}, ValueError, "error = True is not a finite number above 0"),
    "text": ({"error": "0.1"}, ValueError, "error = '0.1' is not a finite number"),
    "unreachable": ({"max_bytes": 3}, ValueError, "max_bytes = 3 is out of reach"),
    "tiny step": ({"step": 1e-30}, ValueError, "step = 1e-30 is out of range"),
    "form": ({"step": 1, "form": "svd"}, ValueError, "form = 'svd' is not one of"),
    "two factors": (
        {"step": 1, "factors": FACTORS[:2]},
        TypeError,
        "factors are not three tensors",
    ),
    "factors' shapes": ({"step": 1, "factors": FACTORS[::-1]}, ValueError, "factors have the sha"),
}


@pytest.mark.parametrize("kind", ENCODE)
def test_encode_names_the_argument_that_is_wrong(kind, codec):
    options, error, message = ENCODE[kind]
    refused(lambda: codec.encode(RAW[0], GRID, **options), error, message)


def test_encode_names_tokens_or_grid(codec):
    for tokens, grid, error, message in (
        (RAW[:2], GRID, ValueError, r"tokens \[2, 16, 24\] are not \[T, 24\]"),
        (
            RAW[0].int(),
            GRID,
            TypeError,
            "tokens have to be a torch tensor of floats, not torch.int",
        ),
        (
            RAW[0].numpy(),
            GRID,
            TypeError,
            "tokens have to be a torch tensor of floats, not ndarray",
        ),
        (RAW[0], 4, ValueError, "grid = 4 is not"),
        (torch.zeros(17, 24), GRID, ValueError, "does not fit 17 tokens: leave out class and reg"),
        (RAW[0] / 0, GRID, ValueError, "tokens have NaN or infinite entries"),
    ):
        refused(lambda t=tokens, g=grid: codec.encode(t, g, step=1), error, message)


def test_what_is_no_coded_image_is_a_type_error_and_damaged_bytes_are_a_value_error(codec, data):
    for wrong in ("abc", None, 7, [data], np.frombuffer(data, np.uint8), RAW[0]):
        refused(lambda w=wrong: codec.decode(w), TypeError, "a coded image is bytes, as Codec.enc")
        refused(lambda w=wrong: codec.decode_batch([data, w]), TypeError, r"streams\[1\]: a coded")
    refused(lambda: codec.decode(data[:-1]), ValueError, "damaged")
    refused(lambda: codec.decode_batch(data), TypeError, "streams is one coded image: give a list")
    for same in (bytearray(data), memoryview(data)):
        assert torch.equal(codec.decode(same), codec.decode(data))
    assert len(codec.decode_batch(iter([data, data]))) == 2


def test_exact_factors_name_the_argument_that_is_wrong():
    for x, rank, error, message in (
        (RAW, 0, ValueError, r"rank = 0 of x \[8, 16, 24\]"),
        (RAW, -1, ValueError, "rank = -1 of x"),
        (RAW, 17, ValueError, "a rank from 1 to the smaller of T and D"),
        (RAW, 2.5, TypeError, "rank = 2.5 is no whole number"),
        (RAW, None, TypeError, "rank = None is no whole number"),
        (RAW[0, 0], 1, ValueError, r"give x \[..., T, D\]"),
        (RAW.int(), 1, TypeError, "x has to be a torch tensor of floats"),
        (RAW.numpy(), 1, TypeError, "x has to be a torch tensor of floats .* not ndarray"),
        (RAW / 0, 1, ValueError, "x has NaN or infinite entries"),
    ):
        refused(lambda x=x, r=rank: exact_factors(x, r), error, message)


def test_folders_of_something_else_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for read in (VisionTokens, load_factors, read_factors):
        for folder in (tmp_path / "nowhere", tmp_path / "file"):
            refused(lambda r=read, f=folder: r(f), ValueError, "name a folder of factors")
    (tmp_path / "manifest.json").write_text('{"kind": "factors"}')
    refused(lambda: FeatureCache(tmp_path), ValueError, "is of factors, .* read it with VisionTok")
