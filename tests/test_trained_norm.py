"""The model that learns its norm: its gradient, its start, its branches, its terms."""

from __future__ import annotations

import math

import pytest
import torch

from compare_svd_nn import network_at_ranks
from heads import metric as task_metric
from heads.saliency import SaliencyHead
from lowrank_tokens.linalg import exact_singular_values
from model import ARCHITECTURES, SVDLinear, get_model_by_name
from svd_baseline import truncated_svd
from training.trained_norm import TaskFactorModel, leading_projector, task_record, task_terms


def test_the_leading_projectors_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)

    def projector(y):
        return leading_projector(y @ y.mT, 3)[0]

    assert torch.autograd.gradcheck(projector, root.requires_grad_())
    # equal eigenvalues on one side of the cut have no say
    equal = torch.diag(torch.tensor([3.0, 3, 3, 1, 1, 1], dtype=torch.float64)).requires_grad_()
    leading_projector(equal, 3)[0].square().sum().backward()
    assert equal.grad.isfinite().all()
    zero = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    leading_projector(zero, 2)[0][0].sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_untrained_task_network_is_the_svd_in_its_metric(arch, metric, test_batch):
    core = get_model_by_name(
        arch, input_dim=1536, num_tokens=16, rank=6, lambda_B=0.0, oversample=10
    )
    model = TaskFactorModel(core, {"head": "saliency"})
    model.weighting.start_from(metric)
    with torch.no_grad():
        for rank in (6, 3):
            expected = torch.matmul(*task_metric.metric_svd(test_batch.x, rank, metric))
            found = torch.matmul(*model(test_batch.x, rank))
            norm = expected.norm()
            assert (found - expected).norm() < 1e-4 * norm
            product, z, sigma = model.exact_product(test_batch.x, rank)
            assert (product - expected).norm() < 1e-4 * norm
            assert torch.allclose(sigma, exact_singular_values(z), atol=1e-4 * sigma.max().item())


def test_the_comparison_takes_a_network_of_a_learned_norm_at_every_rank_as_it_factors(test_batch):
    core = get_model_by_name("MLP", input_dim=1536, num_tokens=16, rank=6, hidden_dim=16)
    model = TaskFactorModel(core, {"head": "saliency", "metric_sha256": None})
    method = network_at_ranks(model)
    with torch.no_grad():
        for rank in (6, 3):
            for found, expected in zip(
                method(test_batch, rank), model(test_batch.x, rank), strict=True
            ):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architectures_branches_learn_a_norm_of_each_image_on_any_grid(
    arch, saliency, test_batch
):
    core = get_model_by_name(arch, input_dim=1536, num_tokens=16, rank=6, hidden_dim=16)
    model = TaskFactorModel(core, {"head": "saliency", "metric_sha256": None})
    branches = dict(model.weighting.named_children())
    assert {type(branch) for branch in branches.values()} == {type(core.row_net)}
    optimizer = torch.optim.Adam(model.weighting.parameters(), 1e-3)
    for step in range(4):  # at first the last layers alone have a gradient: they begin at zero
        optimizer.zero_grad()
        terms = task_terms(model, saliency, test_batch, step)
        terms["task"].backward()
        optimizer.step()
    for name, branch in branches.items():
        assert all(p.grad.abs().max() > 0 for p in branch.parameters() if p.ndim == 2), name
    layers = [m for m in model.modules() if isinstance(m, SVDLinear)]
    gaps = [layer.orthogonality().item() for layer in layers] or [0.0]
    assert terms["lora_ortho"].item() == pytest.approx(sum(gaps) / len(gaps), rel=0.02)
    assert (arch == "AdaLoRA") == any(m in model.weighting.modules() for m in layers)
    x = test_batch.x
    with torch.no_grad():
        z, w = model.in_norm(x)
        gains = (z / w).norm(dim=-2) / x.norm(dim=-2)
        assert w.std(dim=1).min() > 0 and gains.std(dim=0).max() > 1e-6
        # a quarter of the map, on its own grid, has about the gains of the whole
        other = x.unflatten(1, (4, 4))[:, ::2, ::2].flatten(1, 2)
        assert model.in_norm(other, (2, 2))[0].shape == (len(x), 4, 1536)
        a, b = model(other, 3, grid=(2, 2))
        assert a.shape == (len(x), 4, 3) and b.shape == (len(x), 3, 1536)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_after_a_step_of_the_fused_optimiser_the_gains_on_another_grid_are_the_new_ones(
    arch, saliency, test_batch
):
    def build():
        core = get_model_by_name(arch, input_dim=1536, num_tokens=16, rank=3, hidden_dim=16)
        return TaskFactorModel(core, {"head": "saliency", "metric_sha256": None})

    model = build()
    optimizer = torch.optim.AdamW(model.weighting.parameters(), 1e-2, fused=True)
    other = test_batch.x.unflatten(1, (4, 4))[:, ::2, ::2].flatten(1, 2)
    for step in range(2):
        with torch.inference_mode():
            model.in_norm(other, (2, 2))
        task_terms(model, saliency, test_batch, step)["task"].backward()
        optimizer.step()
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model.in_norm(other, (2, 2))[0], fresh.in_norm(other, (2, 2))[0])


@pytest.mark.parametrize("kind", ["fewer tokens than the rank", "equal tokens", "two tokens"])
def test_an_image_whose_loss_is_only_rounding_gives_the_task_no_step(kind, saliency, test_batch):
    core = get_model_by_name("ResMLP", input_dim=1536, num_tokens=64, rank=32, hidden_dim=16)
    model = TaskFactorModel(core, {"head": "saliency", "metric_sha256": None})
    x = test_batch.x
    if kind == "equal tokens":
        x = x[:, :1].expand_as(x)
    elif kind == "two tokens":
        x = torch.cat([x[:, :1].expand_as(x)[:, :8], x[:, 1:2].expand_as(x)[:, :8]], dim=1)
    batch = test_batch._replace(x=x.contiguous())
    # every output is that of this batch: none that the head has kept from another
    head = SaliencyHead(saliency.dataset, "cpu")
    for parameter in model.weighting.parameters():  # none stays at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    for step, rank in reversed(list(enumerate((4, 8, 16, 32)))):
        model.zero_grad()
        terms = task_terms(model, head, batch, step)
        terms["task"].backward()
        task = terms["task"].item()
        assert math.isfinite(task)
        gradients = [p.grad for p in model.weighting.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        if rank >= 16 or kind != "fewer tokens than the rank":
            assert norm < 1e-2 and task == pytest.approx(math.log(1e-8) / 2)
        else:
            assert norm.isfinite() and task > math.log(1e-8) / 2
    record = task_record(model, head, [batch])
    assert all(math.isfinite(value) for value in record.values())


def test_in_a_metric_that_stays_as_it_is_the_sketch_is_trained_on_tokens_in_that_metric(
    metric, test_batch
):
    core = get_model_by_name("ResMLP", input_dim=1536, num_tokens=16, rank=5, oversample=11)
    model = TaskFactorModel(core, {"head": "saliency", "metric_sha256": metric.sha256})
    model.weighting.start_from(metric)
    z = test_batch.x @ metric.root  # up to a rotation, which changes no product's error
    terms = model.loss_terms(test_batch.x, test_batch.singular_values)
    with torch.no_grad():
        left = {"mse": (test_batch.x - torch.matmul(*model(test_batch.x))) @ metric.root}
    left["optimum_mse"] = z - torch.matmul(*truncated_svd(z, 5))
    for name, residual in left.items():
        found = getattr(terms, name).item()
        assert found == pytest.approx(residual.square().mean().item(), rel=1e-3), name


def test_a_task_networks_product_has_its_rank_whatever_the_weights(metric, test_batch):
    core = get_model_by_name("MLP", input_dim=1536, num_tokens=16, rank=5, oversample=11)
    model = TaskFactorModel(core, {"head": "saliency"})
    model.weighting.start_from(metric)
    with torch.no_grad():
        for parameter in model.weighting.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        product = torch.matmul(*model(test_batch.x, 4)).double()
    assert torch.linalg.matrix_rank(product, rtol=1e-5).tolist() == [4] * 6
