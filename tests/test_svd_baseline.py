import pytest
import torch

from svd_baseline import (
    bootstrap_interval,
    exact_singular_values,
    excess_pct,
    fit_pca,
    gram_eigh,
    image_metrics,
    optimum,
    pca,
    random_sketch,
    randomized_svd,
    rel_error,
    summarise,
    token_error,
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
        for method in (truncated_svd, gram_eigh):
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
        a, b = gram_eigh(x, rank)
        best = (u[..., :rank] * sigma[..., None, :rank]) @ vh[..., :rank, :]
        assert a.shape == (2, 200, rank) and b.shape == (2, rank, 64)
        assert torch.allclose((a @ b).double(), best, atol=1e-4)
        assert torch.allclose(rel_error(x, a, b), optimum(sigma, rank), rtol=1e-5)
    # beyond the rank of the second image A is orthonormal all the same
    a, b = gram_eigh(x, 60)
    assert torch.allclose(a.mT @ a, torch.eye(60).expand(2, 60, 60), atol=1e-5)
    assert float(rel_error(x, a, b)[1]) < 1e-6
    assert sizes == {(64, 64)}


def test_nothing_beats_the_svd(tokens):
    sigma = exact_singular_values(tokens)
    axes = fit_pca([tokens])
    for rank in (1, 4, 12):
        for a, b in (
            truncated_svd(tokens, rank),
            gram_eigh(tokens, rank, torch.float32),
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
    assert torch.equal(random_sketch(tokens, 4, 1, 2)[0], random_sketch(tokens, 4, 1, 2)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_the_bootstrap_resamples_groups_and_not_images():
    values = torch.tensor([0.0] * 50 + [1.0] * 50)
    low, high = bootstrap_interval(values, ["a"] * 50 + ["b"] * 50)
    assert (low, high) == (0, 1)  # two groups: one of them may be missing
    low, high = bootstrap_interval(values, [str(i) for i in range(100)])
    assert 0.35 < low < 0.5 < high < 0.65
