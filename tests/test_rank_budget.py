import pytest
import torch

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
)


def falling(n, size, seed):
    values = torch.rand(n, size, generator=torch.Generator().manual_seed(seed)).double()
    return values.sort(descending=True).values


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
