"""Time against tokens: pictures are what their label says, numbers are of those pictures."""

import json

import pytest
import torch
from PIL import Image

from experiments import benchmark_tokens
from experiments.make_demo_data import PHOTOGRAPHS
from experiments.timing import peak_tensor_mb
from lowrank_tokens.errors import excess_pct, optimum, rel_error
from lowrank_tokens.linalg import exact_factors, exact_singular_values
from qwenvl_dataloader import RealQwenVLDataset


def test_time_error_memory_and_growth_of_every_method(script, tiny_cache, tmp_path):
    done = script(
        "experiments.benchmark",
        "--cache_dir",
        tiny_cache,
        "--tokens",
        25,
        16,
        "--ranks",
        4,
        "--repeats",
        1,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results" / "benchmark_tokens.json").read_text())
    names = {"network", "random_sketch", "svd_lowrank", "gram_eigh_f32", "gram_eigh_f64", "svd"}
    for tokens in (16, 25):
        of = {r["method"]: r for r in found["records"] if r["tokens"] == tokens}
        assert set(of) == names and all(r["ms_median"] > 0 for r in of.values())
        assert abs(of["svd"]["excess_mean"]) < 1e-2 > abs(of["gram_eigh_f64"]["excess_mean"])
        # X of 16 × 1536 in float64 alone is 0.19 MB
        assert 0.1 < of["gram_eigh_f64"]["peak_mb"] < 20
        assert {r["source"] for r in of.values()} == {"2 at their own size, 1 tiled from crops"}
    assert {e["method"] for e in found["exponents"]} == names
    assert "T = 25, rank 4: the network is" in done.stdout
    with Image.open(tmp_path / "results" / "benchmark_tokens.png") as figure:
        assert min(figure.size) > 300


def test_pictures_are_of_held_out_photographs_and_never_enlarged(tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    groups = dataset.rows["group"].to_pylist()
    seen = {groups[i] for i in torch.cat([dataset.split.train, dataset.split.val]).tolist()}
    held_out = benchmark_tokens.held_out_photographs(dataset)
    assert len(held_out) == sum(p.group not in seen and p.group in groups for p in PHOTOGRAPHS)
    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 30).convert("RGB")
    assert benchmark_tokens.square(image, 200).size == (60, 60)
    assert benchmark_tokens.square(image, 28).size == (28, 28)
    tiled = benchmark_tokens.tiling([image, image.rotate(90, expand=True)], 150, 0)
    assert tiled.size == (150, 150)
    crop = benchmark_tokens.square(image, 60)
    assert tiled.crop((0, 0, 60, 60)).tobytes() == crop.tobytes()  # at its own pixels


def test_the_exponent_is_the_slope_of_the_logarithms():
    records = [
        {"method": "svd", "rank": 4, "tokens": t, "ms_median": 3.0 * t**1.5} for t in (16, 64, 400)
    ]
    (found,) = benchmark_tokens.exponents([*records, {**records[0], "rank": 8}])
    assert found["exponent"] == pytest.approx(1.5) and found["rank"] == 4


def test_a_number_of_tokens_that_is_no_square_is_one_line(script, tiny_cache):
    done = script("experiments.benchmark", "--cache_dir", tiny_cache, "--tokens", 300)
    assert done.returncode == 2 and "--tokens 300 is no square: type 289 or 324" in done.stderr
    done = script("experiments.benchmark", "--tokens", 256, "--batch_size", 4)
    assert done.returncode == 2 and "nothing beside --tokens" in done.stderr


def test_peak_memory_is_that_of_the_tensors_held_at_once():
    mega = 2**20
    found = peak_tensor_mb(lambda: (torch.ones(mega) + 1).sum())  # two of 4 MB, then a scalar
    assert found == pytest.approx(8, abs=0.1)


def test_a_fresh_sketch_is_near_the_optimum(tokens):
    best = optimum(exact_singular_values(tokens), 6)
    for method in (benchmark_tokens.fresh_sketch(24, 16, 1), exact_factors):
        assert (excess_pct(rel_error(tokens, *method(tokens, 6)), best) < 0.1).all()
