import pytest
import torch

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import exact_singular_values
from model import get_model_by_name
from training.rank_allocator import RankAllocator


def build(factors="projected", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = get_model_by_name(
        "AdaLoRA", input_dim=40, num_tokens=24, rank=8, hidden_dim=16, factors=factors
    ).to(dtype)
    options = {"init_warmup": 4, "final_warmup": 8, "mask_interval": 2, **options}
    return model, RankAllocator(model, **options)


def steps(model, allocator, tokens, count, start=0, lr=1e-2):
    """Yields after every optimiser step: its number."""
    sigma = exact_singular_values(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for step in range(start + 1, start + count + 1):
        terms = model.loss_terms(tokens, sigma)
        optimizer.zero_grad()
        terms.reconstruction.backward()
        allocator.observe(model, terms.component_energy)
        optimizer.step()
        allocator.apply(model, step)
        yield step


def test_the_budget_is_full_then_cubic_then_final():
    _, allocator = build(init_warmup=1000, final_warmup=1000)
    assert [allocator.budget(s) for s in (0, 999, 1000, 2000, 9999)] == [8, 8, 8, 2, 2]
    # half way: 2 + 6 (1/2)³ = 2.75
    assert allocator.budget(1500) == 3
    budgets = [allocator.budget(s) for s in range(900, 2100)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize(
    ("factors", "importance"),
    [("projected", "energy"), ("direct", "energy"), ("direct", "sensitivity")],
)
def test_the_stated_rank_is_the_rank_of_x_hat_after_every_step(factors, importance, tokens):
    model, allocator = build(factors, torch.float64, importance=importance)
    tokens = tokens.double()
    ranks = []
    for step in steps(model, allocator, tokens, 16):
        rank = model.current_effective_rank()
        assert rank == int(model.effective_rank_mask().sum())
        a, b = model(tokens)
        # the masked columns of A are exactly zero, whatever the optimiser did to lora_E
        assert int((a.abs().amax((0, 1)) > 0).sum()) == rank
        assert (torch.linalg.matrix_rank(a @ b) == rank).all()
        if step % 2 == 0 or step >= 12:
            assert rank == allocator.budget(step)
        ranks.append(rank)
    assert ranks[0] == 8 and ranks[-1] == 2


def test_an_optimiser_step_does_not_undo_the_mask(tokens):
    model, allocator = build("direct")
    for _ in steps(model, allocator, tokens, 12):
        pass
    mask = model.effective_rank_mask().clone()
    for _ in steps(model, allocator, tokens, 10, start=12, lr=0.5):
        assert torch.equal(model.effective_rank_mask(), mask)
        assert (model(tokens)[0][..., ~mask] == 0).all()


def test_energy_keeps_the_components_whose_loss_costs_most(tokens):
    model, allocator = build("direct")
    energy = torch.tensor([1.0, 9, 3, 7, 2, 8, 4, 6])
    for step in range(1, 13):
        allocator.observe(model, energy)
        allocator.apply(model, step)
    assert model.effective_rank_mask().nonzero().flatten().tolist() == [1, 5]


def test_sensitivity_is_adalora_s_smoothed_product_times_its_uncertainty(tokens):
    model, allocator = build("direct", importance="sensitivity")
    sigma = exact_singular_values(tokens)
    mean = uncertainty = 0
    for _ in range(3):
        model.zero_grad()
        model.loss_terms(tokens, sigma).reconstruction.backward()
        allocator.observe(model, None)
        value = (model.lora_E * model.lora_E.grad).abs()
        mean = 0.85 * mean + 0.15 * value
        uncertainty = 0.85 * uncertainty + 0.15 * (value - mean).abs()
    got_mean, got_uncertainty = allocator.averages[0]
    assert torch.allclose(got_mean, mean) and torch.allclose(got_uncertainty, uncertainty)
    rows = [(m * u).mean(-1) for m, u in allocator.averages]
    assert torch.allclose(allocator.score, sum(rows))


def test_the_sketch_narrows_once_the_rank_is_final(tokens):
    model, allocator = build()
    assert model.sketch_columns() == 8 + 16
    for step in steps(model, allocator, tokens, 14):
        assert model.sketch_columns() == (2 + 16 if step >= 12 else 8 + 16)
    assert model.sketch(tokens, model.sketch_columns())[0].shape[-1] == 18
    a, b = model(tokens)
    assert a.shape[-1] == b.shape[-2] == 2


def test_mask_and_averages_survive_a_checkpoint(tokens):
    model, allocator = build()
    for _ in steps(model, allocator, tokens, 9):
        pass
    twin, twin_allocator = build()
    twin.load_state_dict(model.state_dict())
    twin_allocator.load_state_dict(allocator.state_dict())
    assert twin.current_effective_rank() == model.current_effective_rank() < 8
    assert torch.equal(twin(tokens)[0], model(tokens)[0])
    assert torch.equal(twin_allocator.score, allocator.score)


def test_a_budget_of_the_full_rank_prunes_nothing(tokens):
    model, allocator = build(keep_ratio=1.0)
    for _ in steps(model, allocator, tokens, 14):
        assert model.current_effective_rank() == 8


def test_a_schedule_that_cannot_finish_is_refused_with_numbers_that_fit():
    _, allocator = build(init_warmup=1000, final_warmup=1000)
    with pytest.raises(InputError, match="--epochs 80 or more"):
        allocator.check_fits(steps=500, steps_per_epoch=25)
    allocator.check_fits(steps=2000, steps_per_epoch=25)


def test_sensitivity_is_refused_for_projected_factors():
    with pytest.raises(InputError, match="--factors direct"):
        build("projected", importance="sensitivity")
