import numpy as np
import pytest
import torch

import svd_baseline
from lowrank_tokens.errors import (
    excess_pct,
    image_metrics,
    optimum,
    rel_error,
    summarise,
    token_error,
)
from lowrank_tokens.linalg import exact_factors, exact_singular_values
from svd_baseline import (
    fit_pca,
    gain,
    interval_95,
    pca,
    random_sketch,
    randomized_svd,
    truncated_svd,
)


def test_optimum_and_error_of_a_hand_computed_matrix():
    x = torch.diag(torch.tensor([4.0, 3.0, 0.0]))  # ‖X‖ = 5
    sigma = exact_singular_values(x)
    assert sigma.tolist() == pytest.approx([4, 3, 0])
    assert [float(optimum(sigma, r)) for r in (0, 1, 2)] == pytest.approx([1, 0.6, 0])
    a, b = torch.tensor([[1.0], [0], [0]]), torch.tensor([[4.0, 0, 0]])
    assert float(rel_error(x, a, b)) == pytest.approx(0.6)
    # keeping the 3 instead of the 4 leaves 4/5, a third above the optimum
    wrong = torch.tensor([[0.0], [1], [0]]), torch.tensor([[0.0, 3, 0]])
    assert float(excess_pct(rel_error(x, *wrong), optimum(sigma, 1))) == pytest.approx(100 / 3)
    assert token_error(x, a, b).tolist() == pytest.approx([0, 1, 0])


def test_the_error_is_of_the_whole_matrix_and_not_a_mean_over_tokens():
    x = torch.tensor([[10.0, 0], [0, 1.0]])
    a, b = torch.tensor([[1.0], [0]]), torch.tensor([[10.0, 0]])
    assert float(rel_error(x, a, b)) == pytest.approx(1 / 101**0.5)
    assert float(token_error(x, a, b).mean()) == pytest.approx(0.5)


def test_excess_is_undefined_where_the_optimum_is_rounding():
    assert excess_pct(torch.tensor(1e-7), torch.tensor(1e-8)).isnan()
    assert summarise(torch.tensor([torch.nan, torch.nan])) == {"mean": None, "p90": None}
    assert summarise(torch.tensor([1.0, torch.nan, 3.0]))["mean"] == 2


def test_singular_values_and_exact_references_equal_torch_linalg_svd(tokens):
    sigma = torch.linalg.svdvals(tokens.double())
    assert torch.allclose(exact_singular_values(tokens), sigma, rtol=1e-6)
    for rank in (1, 5, 23):
        best = optimum(sigma, rank)
        for method in (truncated_svd, exact_factors):
            a, b = method(tokens, rank)
            assert a.shape == (3, 24, rank) and b.shape == (3, rank, 40)
            assert torch.allclose(rel_error(tokens, a, b), best, rtol=1e-5), method


def test_the_smaller_side_decides_the_cost_of_exact_references_and_not_their_result(monkeypatch):
    """T = 200 tokens of D = 64 features, one image of rank 40: no Gram matrix is 200 × 200."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 64, generator=generator) * torch.logspace(1, -2, 64)
    x[1, :, 40:] = 0
    sizes = set()
    for name in ("eigh", "eigvalsh"):
        solve = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda m, f=solve: sizes.add(tuple(m.shape[-2:])) or f(m)
        )
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    # what lies below 1e-8 σ_1 is rounding
    assert torch.allclose(
        exact_singular_values(x), sigma, rtol=1e-6, atol=1e-6 * float(sigma.max())
    )
    for rank in (1, 8, 30):
        a, b = exact_factors(x, rank)
        best = (u[..., :rank] * sigma[..., None, :rank]) @ vh[..., :rank, :]
        assert a.shape == (2, 200, rank) and b.shape == (2, rank, 64)
        assert torch.allclose((a @ b).double(), best, atol=1e-4)
        assert torch.allclose(rel_error(x, a, b), optimum(sigma, rank), rtol=1e-5)
    # beyond the rank of the second image A is orthonormal all the same
    a, b = exact_factors(x, 60)
    assert torch.allclose(a.mT @ a, torch.eye(60).expand(2, 60, 60), atol=1e-5)
    assert float(rel_error(x, a, b)[1]) < 1e-6
    assert sizes == {(64, 64)}


def test_nothing_beats_the_svd(tokens):
    sigma = exact_singular_values(tokens)
    axes = fit_pca([tokens])
    for rank in (1, 4, 12):
        for a, b in (
            truncated_svd(tokens, rank),
            exact_factors(tokens, rank, torch.float32),
            randomized_svd(tokens, rank),
            random_sketch(tokens, rank, 2, 8),
            pca(tokens, rank, axes),
        ):
            metrics = image_metrics(tokens, a, b, sigma)
            assert (metrics["excess_pct"] > -1e-3).all()
            assert (metrics["cosine"] <= 1 + 1e-6).all()


def test_pca_shares_one_basis_and_is_optimal_for_the_images_it_was_fitted_to_together(tokens):
    stacked = tokens.flatten(0, 1)
    a, b = pca(tokens, 5, fit_pca([tokens[:2], tokens[2:]]))
    assert torch.equal(b[0], b[2])
    best = optimum(torch.linalg.svdvals(stacked.double()), 5)
    assert rel_error(stacked, a.flatten(0, 1), b[0]) == pytest.approx(float(best), rel=1e-5)


def test_random_references_are_reproducible_and_leave_the_global_generator_alone(tokens):
    before = torch.get_rng_state()
    first, second = randomized_svd(tokens, 4), randomized_svd(tokens, 4)
    assert torch.equal(first[0], second[0])
    first = random_sketch(tokens, 4, 1, 6)
    svd_baseline._nothing_learned.cache_clear()  # drawn again
    assert torch.equal(first[0], random_sketch(tokens, 4, 1, 6)[0])
    assert torch.equal(before, torch.get_rng_state())


EIGHT = [str(i // 8) for i in range(64)]  # 8 groups of 8 images


def draws(kind, count=1500):
    """Group effects [count, 8, 1] of mean 0 and spread 1, and noise [count, 8, 8] of the images."""
    random = np.random.default_rng(0)
    effects = {"normal": random.standard_normal, "exponential": random.standard_exponential}[kind]
    groups = effects((count, 8, 1)) - (kind == "exponential")
    return groups, 0.5 * random.standard_normal((count, 8, 8))


@pytest.mark.parametrize(("kind", "least"), [("normal", 0.93), ("exponential", 0.88)])
def test_the_interval_of_a_mean_covers_what_it_says(kind, least):
    groups, noise = draws(kind)
    found = [interval_95(torch.tensor(v).flatten(), EIGHT) for v in groups + noise]
    assert np.mean([low <= 0 <= high for low, high in found]) >= least


@pytest.mark.parametrize(("kind", "least"), [("normal", 0.93), ("exponential", 0.88)])
def test_the_interval_of_a_gain_covers_what_it_says(kind, least):
    groups, noise = draws(kind)
    # a group's errors have a level of their own, which both methods share, and a ratio of their own
    base = torch.tensor(np.exp(0.3 * draws("normal")[0][::-1].copy() + 0.2 * noise))
    own = base * torch.tensor(0.5 + 0.1 * groups)
    found = [gain(a.flatten(), b.flatten(), EIGHT) for a, b in zip(own, base, strict=True)]
    covered = [low <= 50 <= high for low, high in (entry["interval_95"] for entry in found)]
    assert np.mean(covered) >= least
    assert all(e["interval_95"][0] < e["mean"] < e["interval_95"][1] for e in found)


def test_groups_scatter_and_not_their_images_and_lie_about_the_mean_over_images():
    values = torch.tensor([0.0] * 50 + [1.0] * 50)
    alone = interval_95(values, [str(i) for i in range(100)])
    together = interval_95(values, [str(i // 25) for i in range(100)])
    assert alone == pytest.approx([0.4003, 0.5997], abs=1e-3)
    # four means 0, 0, 1, 1: 0.5 ± 3.1824 · (1/3)^½ / 2
    assert together == pytest.approx([0.5 - 0.91869, 0.5 + 0.91869], abs=1e-4)
    uneven = torch.tensor([1.0] * 30 + [2.0, 3.0, 4.0, torch.nan])
    low, high = interval_95(uneven, ["a"] * 30 + ["b", "c", "d", "e"])
    assert (low + high) / 2 == pytest.approx(39 / 33)


def test_a_gain_is_of_the_ratio_of_both_means():
    base = torch.tensor([1.0, 2, 3, 4])
    assert gain(0.75 * base, base, list("abcd"))["interval_95"] == pytest.approx([25, 25])
    found = gain(torch.tensor([1.0, 1, 1, 1]), base, list("abcd"))
    assert found["mean"] == pytest.approx(60)
    low, high = found["interval_95"]
    assert 0 < low < 60 < high < 100
    assert gain(base, 0 * base, list("abcd")) == {"mean": None, "interval_95": None}


def test_fewer_than_four_groups_have_no_interval():
    values = torch.tensor([1.0, 2, 3, 4])
    assert interval_95(values, list("abcc")) is None and interval_95(values, list("abcd"))
    assert interval_95(values.where(values < 4, torch.nan), list("abcd")) is None
    assert gain(values / 2, values, list("abcc")) == {"mean": 50, "interval_95": None}
