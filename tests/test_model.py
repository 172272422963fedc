import dataclasses
import itertools

import pytest
import torch
from PIL import Image

from encoders.towers import load_encoder
from experiments.make_demo_data import PHOTOGRAPHS
from lowrank_tokens.errors import excess_pct, optimum, rel_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import locate
from lowrank_tokens.linalg import exact_singular_values, truncate_product
from model import (
    ARCHITECTURES,
    Resize,
    SVDLinear,
    activation_orth_regu_A,
    build_model,
    canonical_arch,
    get_model_by_name,
    pivoted_features,
)
from svd_baseline import random_sketch

ALL = [(arch, factors) for arch in ARCHITECTURES for factors in ("projected", "direct")]


def build(arch="ResMLP", rank=6, **options):
    torch.manual_seed(0)
    options = {"hidden_dim": 32, **options}
    model = get_model_by_name(arch, input_dim=40, num_tokens=24, rank=rank, **options)
    for parameter in model.parameters():  # no layer stays at its zero initialisation
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("arch", "factors"), ALL)
def test_x_hat_is_a_times_b_of_rank_r_with_factors_of_both_signs(arch, factors, tokens):
    a, b = build(arch, factors=factors)(tokens)
    assert a.shape == (3, 24, 6) and b.shape == (3, 6, 40)
    assert (torch.linalg.matrix_rank(a.double() @ b.double()) == 6).all()
    assert (a < 0).any() and (b < 0).any()


@pytest.mark.parametrize(("arch", "factors"), ALL)
def test_no_network_beats_the_svd(arch, factors, tokens):
    sigma = exact_singular_values(tokens)
    model = build(arch, factors=factors)
    for rank in (1, 3, 6):
        excess = excess_pct(rel_error(tokens, *model(tokens, rank)), optimum(sigma, rank))
        assert (excess > -1e-3).all()


@pytest.mark.parametrize(("arch", "factors"), ALL)
def test_the_logged_error_is_that_of_the_factors_users_get_and_the_loss_bounds_it(
    arch, factors, tokens
):
    sigma = exact_singular_values(tokens)
    model = build(arch, factors=factors, lambda_B=0.05)
    with torch.no_grad():
        terms = model.loss_terms(tokens, sigma)
        a, b = model(tokens)
    error = (tokens - a @ b).double().square().mean((-2, -1))
    assert float(terms.mse) == pytest.approx(float(error.mean()), rel=1e-5)
    best = optimum(sigma, 6).square() * tokens.double().square().mean((-2, -1))
    ratio, size_of_b = float((error / best).mean()), float(b.double().square().mean() * 6 / 24)
    if factors == "direct":
        assert float(terms.reconstruction) == pytest.approx(ratio, rel=1e-5)
        assert float(terms.B) == pytest.approx(size_of_b, rel=1e-5)
    else:  # the same of U and of B before it is solved again
        assert (1 - 1e-6) * ratio < float(terms.reconstruction) < 1.5 * ratio
        assert 0.9 * size_of_b < float(terms.B) < size_of_b


@pytest.mark.parametrize(("arch", "factors"), ALL)
def test_no_term_depends_on_the_batch_size(arch, factors, tokens):
    sigma = exact_singular_values(tokens)
    model = build(arch, factors=factors)
    with torch.no_grad():
        whole = model.loss_terms(tokens, sigma)
        parts = [model.loss_terms(tokens[i : i + 1], sigma[i : i + 1]) for i in range(3)]
    for name in ("reconstruction", "mse", "B", "ortho", "act", "lora_ortho"):
        mean = sum(float(getattr(part, name)) for part in parts) / 3
        assert float(getattr(whole, name)) == pytest.approx(mean, rel=1e-5), name


def slope_and_difference(model, parameters, value):
    """Derivative of value() along a random direction, by autograd and by central difference."""
    direction = [torch.randn_like(p) for p in parameters]
    model.zero_grad()
    result = value()
    if result.requires_grad:
        result.backward()
    pairs = list(zip(parameters, direction, strict=True))
    slope = sum(float((p.grad * d).sum()) for p, d in pairs if p.grad is not None)
    ends, step = [], 1e-5
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, d in pairs:
                p.add_(d, alpha=move)
            ends.append(float(value()))
    return slope, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize(("arch", "factors"), ALL)
@pytest.mark.parametrize("term", ["reconstruction", "B", "ortho", "act", "lora_ortho"])
def test_the_gradient_of_each_term_is_a_finite_difference(arch, factors, term, tokens):
    options = {"refine_steps": 0, "oversample": 4} if factors == "projected" else {}
    model = build(arch, factors=factors, **options).double()
    x, sigma = tokens.double(), exact_singular_values(tokens)
    slope, difference = slope_and_difference(
        model,
        [p for p in model.parameters() if p.numel()],
        lambda: getattr(model.loss_terms(x, sigma), term).double(),
    )
    assert slope == pytest.approx(difference, rel=1e-3, abs=1e-8)
    assert (slope == 0) == (term == "lora_ortho" and arch != "AdaLoRA")


@pytest.mark.parametrize(("steps", "extra"), [(1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("only_shifts", [True, False])
def test_the_gradient_through_shifted_steps_is_a_finite_difference(
    steps, extra, only_shifts, tokens
):
    model = build(refine_steps=steps, oversample=extra).double()
    x, sigma = tokens.double(), exact_singular_values(tokens)
    parameters = [model.shift_logits] if only_shifts else list(model.parameters())
    slope, difference = slope_and_difference(
        model, parameters, lambda: model.loss_terms(x, sigma).reconstruction
    )
    assert slope != 0
    assert slope == pytest.approx(difference, rel=1e-3)


def test_b_is_the_exact_ridge_solution_for_its_a(tokens):
    model = build(lambda_B=0.3)
    a, b = (t.double() for t in model(tokens))
    eye = torch.eye(6, dtype=torch.float64)
    solution = torch.linalg.solve(a.mT @ a + 0.3 * eye, a.mT @ tokens.double())
    assert torch.allclose(b, solution, atol=1e-5)


def test_rank_deficient_tokens_are_reproduced_exactly_when_the_rank_allows():
    x = (torch.randn(2, 24, 3) @ torch.randn(2, 3, 40)).float()
    a, b = build(lambda_B=0.0)(x)
    assert (rel_error(x, a, b) < 1e-5).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_finite_on_zero_constant_and_duplicate_tokens(arch):
    model = build(arch)
    random = torch.randn(1, 24, 40)
    duplicate = random[:, :2].repeat(1, 12, 1)
    for x in (torch.zeros(1, 24, 40), random[:, :1].expand(1, 24, 40), duplicate):
        model.zero_grad()
        terms = model.loss_terms(x, exact_singular_values(x))
        (terms.reconstruction + terms.ortho + terms.act).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_lower_rank_of_direct_factors_is_the_svd_of_their_product(tokens):
    model = build(factors="direct")
    a, b = model(tokens)
    u, sigma, vh = torch.linalg.svd(a @ b)
    cut_a, cut_b = model(tokens, 2)
    expected = u[..., :2] * sigma[..., None, :2] @ vh[..., :2, :]
    assert torch.allclose(cut_a @ cut_b, expected, atol=1e-4)
    assert torch.allclose(torch.matmul(*truncate_product(a, b, 6)), a @ b, atol=1e-4)


def test_every_alias_in_any_case_is_its_architecture_and_other_names_are_refused():
    for alias, name in {
        "resmlp": "ResMLP",
        "SYMMETRIC": "ResMLP",
        "LowRankProjSymmetric": "ResMLP",
        "mlp": "MLP",
        "lowrankprojmlp": "MLP",
        "adaptive_adalora": "AdaLoRA",
        "Adaptive": "AdaLoRA",
    }.items():
        assert canonical_arch(alias) == name
    with pytest.raises(InputError, match="ResMLP, MLP, AdaLoRA"):
        canonical_arch("transformer")


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="4 × 6 positions and 40 features are expected, not 23"):
        build(grid=(4, 6))(torch.randn(1, 23, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 25}, "--rank 25"),
        ({"rank": 0}, "--rank 0"),
        ({"factors": "direct", "refine_steps": 1}, "--refine_steps"),
        ({"factors": "direct", "oversample": 0}, "--oversample"),
        ({"oversample": 19}, "--oversample 19"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_a_new_resmlp_is_a_random_power_step_on_the_features_it_sees(tokens):
    torch.manual_seed(0)
    model = get_model_by_name("ResMLP", input_dim=40, num_tokens=24, rank=6)
    sketch = model.sketch(tokens, 8).y
    power = tokens @ (tokens.mT @ model.col_net.skip.weight[:8].mT)
    assert float(torch.linalg.matrix_norm(sketch - power).max()) < 2e-4 * float(power.norm())
    assert model.row_gain.requires_grad


def test_features_chosen_on_other_images_bring_a_new_sketch_nearer():
    generator = torch.Generator().manual_seed(3)
    # 600 features, of which few carry what images have in common
    mixing = torch.randn(30, 600, generator=generator) * (torch.rand(600, generator=generator) ** 8)
    x = torch.randn(24, 24, 30, generator=generator) * torch.linspace(0, -5, 30).exp2() @ mixing
    x = x + 0.01 * torch.randn(x.shape, generator=generator)
    torch.manual_seed(0)
    model = get_model_by_name(
        "ResMLP", input_dim=600, num_tokens=24, rank=6, refine_steps=0, oversample=0
    )
    sigma = exact_singular_values(x[20:])

    def excess():
        return excess_pct(rel_error(x[20:], *model(x[20:])), optimum(sigma, 6)).mean()

    assert len(model.selected) == 256
    evenly = excess()
    model.start_from(sum((image.mT @ image).double() for image in x[:20]))
    assert excess() < 0.8 * evenly


def test_pivoted_features_are_those_that_explain_the_others_best():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    x[:, 3] = 3 * x[:, 0] + 1e-3 * x[:, 3]  # says what feature 0 says, louder
    x[:, 5] *= 2
    moment = x.mT @ x
    assert pivoted_features(moment, 2).tolist() == [3, 5]
    assert 0 not in pivoted_features(moment, 5).tolist()
    q = torch.linalg.qr(x[:, pivoted_features(moment, 3)])[0]
    left = [
        float((x - q2 @ (q2.mT @ x)).square().sum())
        for q2 in (torch.linalg.qr(x[:, list(c)])[0] for c in itertools.combinations(range(6), 3))
    ]
    assert float((x - q @ (q.mT @ x)).square().sum()) <= sorted(left)[len(left) // 4]
    low_rank = torch.outer(torch.arange(6.0), torch.arange(6.0))
    assert pivoted_features(low_rank, 3).tolist() == [3, 4, 5]


def test_a_lower_rank_computes_only_the_columns_it_needs(tokens):
    model = build(rank=12, oversample=8)
    assert [model.sketch_columns(r) for r in (1, 6, 9, 12)] == [9, 14, 18, 20]
    assert model(tokens, 3)[0].shape == (3, 24, 3)


def test_svd_linear_is_the_triplet_form():
    layer = SVDLinear(5, 3, k=2, alpha=6)
    layer.lora_E.data = torch.tensor([[0.5], [-2.0]])
    x = torch.randn(4, 5)
    update = layer.lora_B @ torch.diag(layer.lora_E.flatten()) @ layer.lora_A
    expected = x @ layer.weight_0.mT + 3 * x @ update.mT + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_activation_orthogonality_is_zero_for_orthogonal_and_largest_for_equal_columns():
    assert float(activation_orth_regu_A(3 * torch.eye(4)[None])) == pytest.approx(0)
    assert float(activation_orth_regu_A(torch.ones(1, 4, 4))) == pytest.approx(12 / 16)


def test_the_config_rebuilds_the_same_model(tokens):
    for arch, factors in ALL:
        model = build(arch, factors=factors)
        twin = build_model(dataclasses.replace(model.config))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(tokens)[0], model(tokens)[0])


# ------------------------------------------------------------------------------- other grids
GRID = (4, 6)  # the models' own; none of its numbers is a width, so a shape tells what it is of


def smooth_tokens(grid, count=2):
    """x [count, T, 40]: maps of few waves over the grid, sampled at its tokens."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = (torch.linspace(0, 1, 2 * n + 1)[1::2] for n in grid)
    waves = [
        torch.cos(torch.pi * (i * rows[:, None] + j * columns)) for i in range(4) for j in range(4)
    ]
    amplitude = torch.randn(count, 16, 40, generator=generator) / (1 + torch.arange(16.0))[:, None]
    x = torch.stack(waves).flatten(1).mT @ amplitude
    noise = 0.01 * torch.randn(x.shape, generator=generator)
    return torch.nn.functional.layer_norm(x + noise, (40,))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_its_own_grid_nothing_is_resized(arch, tokens):
    model = build(arch, grid=GRID)
    assert torch.equal(model(tokens, grid=GRID)[0], model(tokens)[0])
    assert torch.equal(model(tokens, grid=[4, 6])[1], model(tokens)[1])
    assert not torch.equal(model(tokens, grid=(6, 4))[0], model(tokens)[0])  # as many tokens


@pytest.mark.parametrize("grid", [(7, 9), (3, 4), (1, 30)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_model_serves_every_grid_about_as_well_as_a_fresh_random_sketch(arch, grid):
    x = smooth_tokens(grid)
    sigma = exact_singular_values(x)
    model = build(arch, grid=GRID)
    if arch == "AdaLoRA":
        torch.nn.init.ones_(model.lora_E)  # a gate beside 1 is an error of its own
    a, b = model(x, grid=grid)
    assert a.shape == (2, grid[0] * grid[1], 6) and b.shape == (2, 6, 40)
    excess = excess_pct(rel_error(x, a, b), optimum(sigma, 6))
    fresh = random_sketch(x, 6, steps=1, columns=12)
    assert (excess > -1e-3).all()
    assert excess.mean() < 0.2 + 3 * excess_pct(rel_error(x, *fresh), optimum(sigma, 6)).mean()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_reads_positions_gives_the_same_for_a_map_sampled_more_finely(arch):
    model = build(arch, grid=GRID, num_blocks=2).eval()
    with torch.no_grad():
        for parameter in model.col_net.parameters():  # tables that are constant over positions
            if parameter.ndim == 2 and parameter.shape[1] == 24:
                parameter.copy_(parameter[:, :1].expand_as(parameter))
            elif parameter.shape[0] == 24:
                parameter.copy_(parameter[:1].expand_as(parameter))
        x = torch.arange(5.0)[:, None]
        own = model.col_net(x.expand(5, 24), 12)
        for grid in ((3, 4), (7, 9)):
            map_of_grid = x.expand(5, grid[0] * grid[1])
            assert torch.allclose(
                model.col_net(map_of_grid, 12, Resize(GRID, grid)), own, atol=1e-4
            )


def test_an_image_of_fewer_tokens_than_the_rank_is_factored_at_its_own_limit():
    x = smooth_tokens((2, 2))
    for arch in ARCHITECTURES:
        model = build(arch, grid=GRID)
        a, b = model(x, grid=(2, 2))
        assert a.shape == (2, 4, 4) and b.shape == (2, 4, 40)
        terms = model.loss_terms(x, exact_singular_values(x), (2, 2))
        assert terms.component_energy.shape == (6,) and (terms.component_energy[4:] == 0).all()
        assert terms.reconstruction.isfinite()
    a, b = build("ResMLP", grid=GRID, lambda_B=0.0)(x, grid=(2, 2))
    assert (rel_error(x, a, b) < 1e-5).all()


def test_direct_factors_are_tied_to_their_grid_and_say_so_in_one_line():
    with pytest.raises(InputError, match="4 × 6, not 3 × 4: train with --factors projected") as e:
        build(factors="direct", grid=GRID)(smooth_tokens((3, 4)), grid=(3, 4))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("grid", [(5, 7), (2, 5)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_weight_learns_from_images_of_another_grid(arch, grid):
    x = smooth_tokens(grid).double()
    model = build(arch, grid=GRID, refine_steps=0, oversample=4).double()
    parameters = [p for n, p in model.named_parameters() if p.numel() and n != "lora_E"]
    slope, difference = slope_and_difference(
        model, parameters, lambda: model.loss_terms(x, exact_singular_values(x), grid).ortho
    )
    assert all(p.grad is not None for p in parameters)
    # the noise's scale is taken without gradient: the skip of ResMLP has some where T > T₀
    assert slope == pytest.approx(difference, rel=0.5 if arch == "ResMLP" else 1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_after_each_step_of_the_fused_optimiser_another_grid_sees_the_new_weights(arch):
    model, x = build(arch, grid=GRID), smooth_tokens((5, 7))
    sigma = exact_singular_values(x)
    # as in training: a fused AdamW raises no version counter of the weights that it changes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        with torch.inference_mode():
            model.eval()(x, grid=(5, 7))
        model.train().loss_terms(x, sigma, (5, 7)).ortho.backward()
        optimizer.step()
    fresh = build(arch, grid=GRID)
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        found, expected = (m.eval().sketch(x, 8, (5, 7)).y for m in (model, fresh))
    assert torch.equal(found, expected)


def test_a_config_without_a_grid_is_of_a_square_or_of_one_row():
    for tokens, grid in ((25, (5, 5)), (24, (1, 24))):
        model = get_model_by_name("MLP", input_dim=40, num_tokens=tokens, rank=4)
        assert model.config.grid == grid
    with pytest.raises(ValueError, match="has not 24 tokens"):
        build(grid=(5, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "most"), [("ResMLP", 0.1), ("MLP", 0.1), ("AdaLoRA", 0.1)])
def test_real_tokens_of_a_larger_grid_are_within_a_thousandth_of_the_svd(arch, most, larger_tokens):
    """A model made for 16 × 16, T = 529 of the demo's encoder, rank 128: see the class."""
    torch.manual_seed(0)
    model = get_model_by_name(arch, input_dim=1536, num_tokens=256, rank=128).eval()
    best = optimum(exact_singular_values(larger_tokens), 128)
    with torch.inference_mode():
        excess = excess_pct(rel_error(larger_tokens, *model(larger_tokens, grid=(23, 23))), best)
    assert float(excess.mean()) < most


@pytest.fixture(scope="module")
def larger_tokens():
    """x [1, 529, 1536] of a photograph at 644 × 644 pixels, of which its own are 512 × 512."""
    encoder = load_encoder("demo", device="cpu", image_size=644)
    photograph = next(p for p in PHOTOGRAPHS if p.group == "imagenet_00")
    with Image.open(locate(photograph.package, photograph.path)) as image:
        tokens = encoder.encode(encoder.preprocess(image)[None])
    return torch.nn.functional.layer_norm(tokens, (1536,))
