import pytest
import torch

from lowrank_tokens.errors import excess_pct, optimum, rel_error
from lowrank_tokens.grids import default_grid
from lowrank_tokens.linalg import (
    exact_singular_values,
    gram_is_cheaper,
    gram_operator,
    orth,
    refine,
    smallest_ritz_estimate,
    start_shifts,
)
from model import Resize


def degenerate_tokens():
    """Named [2, 12, 20] float32 inputs of the kinds that make torch.linalg.qr's backward NaN."""
    x = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(1))
    return {
        "zero": torch.zeros(2, 12, 20),
        "constant": torch.ones(2, 12, 20),
        "duplicate": x[:, :3].repeat(1, 4, 1),
        "rank 2": x[:, :, :2] @ x[:, :2],
        "one token": torch.cat([x[:, :1], torch.zeros(2, 11, 20)], dim=1),
        "huge": 1e4 * x,
        "tiny": 1e-12 * x,
    }


def test_orth_has_the_analytic_gradient():
    y = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orth, (y,))
    assert torch.autograd.gradcheck(lambda y: orth(y, passes=1), (y,))


def test_orth_is_the_q_of_a_qr_factorisation():
    y = torch.randn(3, 30, 8, dtype=torch.float64)
    q, r = torch.linalg.qr(y)
    signs = r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    assert torch.allclose(orth(y), q * signs, atol=1e-12)


def test_orth_is_orthonormal_to_rounding_where_float32_cholesky_fails():
    left = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    y = left * torch.logspace(0, -5, 40, dtype=torch.float64) @ right
    assert int(torch.linalg.cholesky_ex((y.mT @ y).float()).info) > 0
    q = orth(y)
    assert torch.allclose(q.mT @ q, torch.eye(40, dtype=torch.float64), atol=1e-13)


def test_dependent_columns_become_zero_and_the_others_stay_orthonormal():
    y = torch.randn(20, 3, dtype=torch.float64)
    y = torch.cat([y, y @ torch.randn(3, 2, dtype=torch.float64)], dim=1)
    q = orth(y)
    assert torch.allclose(
        q.mT @ q, torch.diag(torch.tensor([1.0, 1, 1, 0, 0])).double(), atol=1e-12
    )


def test_forward_and_gradient_are_finite_on_degenerate_tokens():
    for name, x in degenerate_tokens().items():
        weight = torch.randn(20, 6, requires_grad=True)
        space = refine(x @ weight, x, start_shifts(2), 4, ordered=True)
        space.theta.sum().neg().backward()
        assert weight.grad.isfinite().all(), name
        best = optimum(exact_singular_values(x), 4)
        u = space.u.float()
        assert (rel_error(x, u, u.mT @ x) <= best + 1e-2).all(), name


def test_plain_qr_has_no_gradient_there():
    x = degenerate_tokens()["one token"]
    weight = torch.randn(20, 6, requires_grad=True)
    torch.linalg.qr(x @ weight)[0][..., 0].sum().backward()
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("ordered", [True, False])
def test_without_steps_the_subspace_is_that_of_x_on_the_right_basis_of_the_sketch(tokens, ordered):
    x = tokens.double()
    sketch = torch.randn(3, 24, 5, dtype=torch.float64)
    space = refine(sketch, x, torch.zeros(0), 5, ordered=ordered)
    p = torch.linalg.qr(x.mT @ torch.linalg.qr(sketch)[0])[0]  # [3, 40, 5] P
    q = torch.linalg.qr(x @ p)[0]
    assert torch.allclose(space.u @ space.u.mT, q @ q.mT, atol=1e-10)
    assert torch.allclose(space.theta.sum(-1), (x @ p).square().sum((-2, -1)))


def test_components_come_largest_first_and_theta_bounds_their_energy_from_below(tokens):
    x = tokens.double()
    space = refine(torch.randn(3, 24, 8), x, start_shifts(1), 6, ordered=True)
    assert torch.allclose(space.u.mT @ space.u, torch.eye(6, dtype=torch.float64), atol=1e-10)
    energies = torch.linalg.vector_norm(space.u.mT @ x, dim=-1).square()
    assert (space.theta.diff() <= 0).all()
    assert (space.theta <= energies + 1e-9).all()
    assert (space.theta.sum(-1) < energies.sum(-1)).all()


def test_both_ways_to_multiply_by_the_gram_matrix_give_the_same_subspace(tokens):
    few, many = gram_operator(tokens, 6, products=1), gram_operator(tokens, 24, products=4)
    assert gram_is_cheaper(24, 40, 24, 4) and not gram_is_cheaper(24, 40, 6, 1)
    q = torch.linalg.qr(torch.randn(3, 24, 6, dtype=torch.float64))[0]
    exact = tokens.double() @ (tokens.double().mT @ q)
    assert torch.allclose(many(q), exact, atol=1e-12)
    assert torch.allclose(few(q), exact, atol=1e-4)


def test_steps_and_extra_columns_bring_the_error_towards_the_optimum(tokens):
    sigma = exact_singular_values(tokens)
    sketch = torch.randn(3, 24, 12, generator=torch.Generator().manual_seed(2))

    def excess(steps, columns):
        u = refine(sketch[..., :columns], tokens, start_shifts(steps), 6, ordered=True).u.float()
        return float(excess_pct(rel_error(tokens, u, u.mT @ tokens), optimum(sigma, 6)).mean())

    assert excess(0, 6) > excess(1, 6) > excess(3, 6) > -1e-3
    assert excess(0, 6) > excess(0, 12) > -1e-3
    assert excess(3, 12) < 1e-3


def test_cutting_a_higher_rank_subspace_is_nearly_optimal_at_every_lower_rank(tokens):
    sigma = exact_singular_values(tokens)
    u = refine(torch.randn(3, 24, 16), tokens, start_shifts(3), 16, ordered=True).u.float()
    for rank in (1, 2, 4, 8):
        a = u[..., :rank]
        assert (excess_pct(rel_error(tokens, a, a.mT @ tokens), optimum(sigma, rank)) < 0.01).all()


def test_the_shift_estimate_bounds_the_smallest_ritz_value_from_above_and_is_0_where_singular():
    h = torch.randn(5, 6, 6, dtype=torch.float64)
    h = h @ h.mT
    estimate, rounding = smallest_ritz_estimate(h).flatten(), 1 + 1e-12
    assert (estimate * rounding >= torch.linalg.eigvalsh(h)[:, 0]).all()
    assert (estimate <= h.diagonal(dim1=-2, dim2=-1).amin(-1) * rounding).all()
    h[:, -1], h[:, :, -1] = 0, 0
    assert (smallest_ritz_estimate(h) == 0).all()


def test_a_table_at_its_own_grid_is_unchanged_and_at_another_it_is_the_same_surface():
    table = torch.randn(3, 20)
    assert torch.equal(Resize((4, 5), (4, 5)).values(table, 1), table)
    row, column = torch.arange(16.0)[:, None], torch.arange(16.0)
    plane = (2 * row + column).flatten()[:, None]  # [256, 1], positions first
    fine = Resize((16, 16), (32, 32)).values(plane).reshape(32, 32)
    # a token's centre: half the coordinate, half a token further
    centre = (torch.arange(32.0) + 0.5) / 2 - 0.5
    inside = slice(4, -4)
    # torch's cubic has a = −0.75, which follows a slope of 1.5 a token to 0.15
    assert torch.allclose(
        fine[inside, inside], (2 * centre[:, None] + centre)[inside, inside], atol=0.2
    )
    coarse = Resize((16, 16), (8, 8)).values(plane).reshape(8, 8)
    centre = 2 * torch.arange(8.0) + 0.5
    assert torch.allclose(coarse[2:-2, 2:-2], (2 * centre[:, None] + centre)[2:-2, 2:-2], atol=1e-4)


def test_a_table_that_shrinks_passes_over_no_position():
    one = torch.eye(64)  # a one at each position in turn
    assert (Resize((8, 8), (3, 3)).values(one, 1).abs().sum(1) > 0.01).all()
    assert default_grid(64) == (8, 8) and default_grid(60) == (1, 60)
