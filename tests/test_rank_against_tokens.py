"""Rank against tokens: sizes are a photograph's own pixels or fewer, ranks and growth are right."""

import json

import pytest
import tiny
import torch
from PIL import Image

from encoders.towers import load_encoder
from experiments import rank_against_tokens
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import truncated_svd


def test_known_photographs_at_sizes_they_have_pixels_for(script, tiny_cache, tmp_path):
    done = script(
        "experiments.rank_against_tokens",
        "--cache_dir",
        tiny_cache,
        "--tokens",
        16,
        36,
        "--target_error",
        0.5,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results" / "rank_against_tokens.json").read_text())
    dataset = RealQwenVLDataset(tiny_cache)
    groups = dataset.rows["group"].to_pylist()
    assert {r["group"] for r in found["records"]}.isdisjoint(
        {groups[i] for i in dataset.split.test.tolist()}
    )
    for r in found["records"]:
        assert 1 <= r["rank"] < r["tokens"] and r["near"] in (16, 36)
        assert r["factors"] == pytest.approx(
            2 * r["rank"] * (r["tokens"] + 1536) / (784 * r["tokens"])
        )
    assert "all T: rank ∝ T^" in done.stdout
    with Image.open(tmp_path / "results" / "rank_against_tokens.png") as figure:
        assert min(figure.size) > 300


def test_no_side_is_enlarged_and_a_size_without_pixels_is_left_out():
    image = Image.new("RGB", (300, 200))  # 10 × 7 tokens of 28 pixels
    found = rank_against_tokens.sizes(image, [24, 70, 256], 28)
    assert list(found.values()) == [24, 70, 70] and list(found)[-1] == (280, 196)
    assert all(w <= 300 and h <= 200 and w % 28 == h % 28 == 0 for w, h in found)
    assert list(found)[:2] == [(168, 112), (280, 168)]  # 6 × 4 and 10 × 6 tokens


def test_the_rank_is_the_least_that_meets_the_target():
    encoder = load_encoder("demo", device="cpu")
    picture = Image.effect_mandelbrot((112, 140), (-2, -1, 1, 1), 30).convert("RGB")
    rank, tokens = rank_against_tokens.rank_of(encoder, picture, 0.3)
    x = torch.nn.functional.layer_norm(encoder.encode(encoder.pixels_of(picture)[None])[0], (1536,))
    errors = []
    for r in (rank - 1, rank):
        a, b = truncated_svd(x, r)
        errors.append(float((x - a @ b).norm() / x.norm()))
    assert tokens == 20 and errors[1] <= 0.3 < errors[0]


def test_means_of_common_sizes_are_of_the_same_photographs():
    of = {"factors": 1.0, "whole": 2.0}
    records = [
        {"photograph": p, "near": t, "tokens": t, "rank": rank, **of}
        for p, t, rank in [
            ("a", 16, 2),
            ("a", 64, 8),
            ("b", 16, 8),
            ("b", 64, 8),
            ("c", 16, 90),
            ("b", 256, 5),
        ]
    ]
    found = {m["near"]: m for m in rank_against_tokens.means(records)}
    assert [m["common"] for m in found.values()] == [True, True, False]
    assert [m["photographs"] for m in found.values()] == [2, 2, 1]  # not c, which lacks 64
    assert found[16]["rank"] == pytest.approx(4) and found[256]["rank"] == pytest.approx(5)


def test_the_growth_is_the_slope_of_the_logarithms_of_each_photograph():
    records = [
        {"photograph": f"p{i}", "group": f"g{i}", "tokens": t, "rank": 2 * i * t**0.7}
        for i in range(1, 6)
        for t in (16, 64, 256)
    ]
    found = rank_against_tokens.growth(records)
    assert found["all"]["photographs"] == 5
    for part in found.values():
        assert part["b"] == pytest.approx(0.7)
        assert part["interval_95"] == pytest.approx([0.7, 0.7])


def test_a_cache_of_other_images_is_one_line(script, tmp_path):
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(12))
    done = script("experiments.rank_against_tokens", "--cache_dir", cache, "--device", "cpu")
    assert done.returncode == 2 and "holds no photograph of the demo" in done.stderr
