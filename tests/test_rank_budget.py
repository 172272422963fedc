import itertools
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from figures import comparison
from lowrank_tokens.errors import optimum, rel_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import exact_singular_values
from model import get_model_by_name
from svd_baseline import truncated_svd
from training.rank_budget import (
    against_fixed_rank,
    error_curve,
    first_rank_within,
    nested_factors,
    optimum_curve,
    split_ranks,
)


def falling(n, size, seed):
    values = torch.rand(n, size, generator=torch.Generator().manual_seed(seed)).double()
    return values.sort(descending=True).values


def left_out(sigma, ranks):
    return sum(float(s[r:].square().sum()) for s, r in zip(sigma, ranks, strict=True))


def test_the_smallest_rank_is_the_hand_computed_one():
    # squares 9, 4, 3 of 16: errors 1, √7/4 = .66, √3/4 = .43, 0
    sigma = torch.tensor([[3.0, 2.0, 3**0.5], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double()
    for target, expected in ((0.9, [1, 1, 0]), (0.6, [2, 1, 0]), (0.3, [3, 1, 0])):
        assert first_rank_within(optimum_curve(sigma), target).tolist() == expected
    assert first_rank_within(optimum_curve(sigma), 1.0).tolist() == [0, 0, 0]


def test_the_smallest_rank_meets_the_target_and_one_less_does_not():
    sigma = falling(20, 12, seed=0) ** 6
    for target in (0.5, 0.05, 0.001):
        ranks = first_rank_within(optimum_curve(sigma), target).tolist()
        for values, rank in zip(sigma, ranks, strict=True):
            assert optimum(values, rank) <= target < optimum(values, rank - 1)


def test_the_curve_of_optima_is_the_optimum_at_every_rank():
    sigma = falling(5, 9, seed=1)
    curve = optimum_curve(sigma)
    assert curve.shape == (5, 10) and torch.equal(optimum_curve(sigma, 4), curve[:, :5])
    for rank in range(10):
        assert torch.allclose(curve[:, rank], optimum(sigma, rank), rtol=1e-14)


def test_a_split_is_the_hand_computed_one():
    # squares 100, 64, 36, 1 and 49, 4, 2.25, 1: the four largest are three and one
    sigma = torch.tensor([[10.0, 8.0, 6.0, 1.0], [7.0, 2.0, 1.5, 1.0]]).double()
    assert split_ranks(sigma, 2).tolist() == [3, 1]
    assert split_ranks(sigma, 2, most=2).tolist() == [2, 2]
    assert split_ranks(sigma, 3, least=2).tolist() == [3, 3]
    assert split_ranks(sigma, 2, least=0).tolist() == [3, 1]
    assert split_ranks(sigma, 4).tolist() == [4, 4]


@pytest.mark.parametrize(("least", "most"), [(1, 5), (0, 5), (1, 3), (2, 4)])
def test_no_split_of_the_same_budget_leaves_out_less_energy(least, most):
    for seed in range(4):
        sigma = falling(3, 5, seed) * torch.tensor([[1.0], [3.0], [0.3]])
        for mean_rank in range(max(1, least), most + 1):
            ranks = split_ranks(sigma, mean_rank, least, most)
            splits = itertools.product(range(least, most + 1), repeat=3)
            best = min(left_out(sigma, s) for s in splits if sum(s) == 3 * mean_rank)
            assert left_out(sigma, ranks) == pytest.approx(best, rel=1e-12)


def test_a_split_spends_the_budget_exactly_even_on_ties_and_zeros():
    for sigma in (torch.ones(7, 6).double(), torch.zeros(7, 6).double()):
        ranks = split_ranks(sigma, 4, most=5)
        assert ranks.sum() == 28 and ranks.min() >= 1 and ranks.max() <= 5


def test_a_split_is_never_worse_than_one_fixed_rank():
    for seed in range(20):
        sigma = falling(9, 14, seed) ** (1 + seed)
        for mean_rank in (1, 4, 9, 14):
            split = left_out(sigma, split_ranks(sigma, mean_rank))
            assert split <= left_out(sigma, [mean_rank] * 9) * (1 + 1e-12)


@pytest.mark.parametrize("mean_rank", [0, 7])
def test_a_budget_out_of_range_is_refused(mean_rank):
    with pytest.raises(InputError, match=f"--mean_rank {mean_rank} .* type 1 to 6"):
        split_ranks(torch.ones(2, 8), mean_rank, most=6)


def test_the_error_curve_is_the_measured_error_of_each_cut(tokens):
    generator = torch.Generator().manual_seed(3)
    any_a, any_b = torch.randn(3, 24, 7, generator=generator), torch.randn(3, 7, 40)
    for a, b in (truncated_svd(tokens, 7), (any_a, any_b)):
        curve = error_curve(tokens, a, b)
        assert curve.shape == (3, 8)
        for rank in range(8):
            measured = rel_error(tokens, a[..., :rank], b[..., :rank, :])
            assert torch.allclose(curve[:, rank], measured, rtol=1e-5)
    svd = error_curve(tokens, *truncated_svd(tokens, 24))
    assert torch.allclose(svd, optimum_curve(exact_singular_values(tokens)), atol=1e-6)
    assert error_curve(torch.zeros(1, 24, 40), any_a[:1] * 0, any_b[:1]).abs().max() == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"oversample": 0}, {"factors": "direct"}, {"arch": "AdaLoRA"}],
    ids=["projected", "without extra columns", "direct", "gated"],
)
def test_every_prefix_of_nested_factors_is_as_near_as_the_model_cut_there(options, tokens):
    torch.manual_seed(0)
    options = {"arch": "ResMLP", "rank": 6, "hidden_dim": 8, **options}
    model = get_model_by_name(input_dim=40, num_tokens=24, **options).eval()
    with torch.inference_mode():
        a, b = nested_factors(model, tokens, 6)
        for rank in (1, 3, 5, 6):
            prefix = rel_error(tokens, a[..., :rank], b[..., :rank, :])
            cut = rel_error(tokens, *model(tokens, rank))  # of fewer sketch columns
            assert (prefix <= 1.005 * cut).all()
            assert (prefix >= 0.9 * cut).all()


def test_an_unreachable_target_is_refused_with_one_that_can_be_reached():
    curve = optimum_curve(falling(6, 10, seed=5), highest=7)
    with pytest.raises(InputError, match="6 of 6 images stay above it") as error:
        first_rank_within(curve, 1e-3)
    reachable = float(str(error.value).split("; type --target_error ")[1].split()[0])
    assert first_rank_within(curve, reachable).max() == 7


def test_ranks_per_image_are_held_against_a_fixed_rank_that_stores_no_less():
    curves = torch.tensor([[1, 0.5, 0.1, 0.0], [1, 0.9, 0.6, 0.3]], dtype=torch.float64)
    entry, arrays = against_fixed_rank(curves, torch.tensor([1, 2]), torch.tensor([4, 4]), 6)
    assert entry["stored_values"] == 30 and entry["ranks"]["mean"] == 1.5
    assert entry["fixed"]["rank"] == 2 and entry["fixed"]["stored_values"] == 40
    assert arrays["rel_error"].tolist() == [0.5, 0.6]
    assert arrays["fixed_rel_error"].tolist() == [0.1, 0.6]
    assert entry["gain_pct"]["mean"] == pytest.approx(100 * (1 - 0.55 / 0.35))
    assert entry["gain_pct"]["max"] == 0


def test_the_gain_of_a_target_is_counted_against_the_fixed_ranks_that_meet_it():
    curves = torch.tensor([[1, 0.2, 0.1, 0.0], [1, 0.9, 0.6, 0.3]], dtype=torch.float64)
    ranks = first_rank_within(curves, 0.4)
    entry, _ = against_fixed_rank(curves, ranks, torch.tensor([4, 4]), 6, target_error=0.4)
    assert ranks.tolist() == [1, 3] and entry["stored_values"] == 40
    assert (entry["fixed"]["rank"], entry["fixed"]["images_within_target"]) == (2, 1)
    assert entry["fixed_for_mean"]["rank"] == 2 and entry["fixed_for_all"]["rank"] == 3
    assert entry["fixed_for_all"]["stored_less_pct"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("target_error", [None, 0.3])
def test_the_figure_s_title_holds_the_gain_of_its_data(target_error, tmp_path, monkeypatch):
    figures = []

    def record(figure, path, **kwargs):
        figures.append(figure)
        Path(path).write_bytes(b"not painted")

    monkeypatch.setattr(Figure, "savefig", record)
    sigma = falling(30, 12, seed=2) ** 8
    curves = optimum_curve(sigma, 10)
    if target_error is None:
        ranks = split_ranks(sigma, 4, most=10)
    else:
        ranks = first_rank_within(curves, target_error)
    entry, arrays = against_fixed_rank(curves, ranks, torch.full((30,), 12), 20, target_error)
    data = {"network": arrays, "svd": arrays, "target_error": target_error}
    comparison.rank_per_image(tmp_path / "ranks.png", data, "DEMO data")
    title = figures[0].get_suptitle().replace("\n", " ")
    if target_error is None:
        assert f"rms error {-entry['gain_pct']['rms']:+.1f} %" in title
        assert f"largest error {-entry['gain_pct']['max']:+.1f} %" in title
    else:
        assert f"at {entry['ranks']['mean']:.1f} components on average" in title
        assert title.endswith(f"would have to be {ranks.max()}")
    bars = figures[0].axes[0].containers[0]
    assert sum(bar.get_height() for bar in bars) == 30
