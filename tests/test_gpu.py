"""What only a GPU can show: the CPU's results, and a training step that never waits for the host.

    python -m pytest -m gpu

Skipped without CUDA. Speeds and memory are printed by `experiments.benchmark --device cuda`.
"""

import pytest
import torch
from tiny import steep_tokens

from lowrank_tokens.codec import Codec
from lowrank_tokens.errors import rel_error
from lowrank_tokens.linalg import (
    exact_factors,
    exact_singular_values,
    normalise,
    orth,
    refine,
    start_shifts,
)
from lowrank_tokens.stream import FORMS
from model import get_model_by_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")
T, D, RANK = 64, 160, 16
SHAPE = {"input_dim": D, "num_tokens": T, "rank": RANK, "hidden_dim": 32}


@pytest.fixture
def x():
    return normalise(steep_tokens(4, T, D))[0]


def make_model(device, **options):
    torch.manual_seed(0)
    options = {"arch": "ResMLP", **SHAPE, **options}
    return get_model_by_name(options.pop("arch"), **options).to(device)


def test_orth_and_its_gradient_are_the_cpus_for_dependent_and_zero_columns():
    y = torch.randn(3, T, RANK, dtype=torch.float64)
    y[1, :, RANK // 2 :] = y[1, :, : RANK // 2]
    y[2] = 0
    found = []
    for device in DEVICES:
        own = y.to(device).requires_grad_()
        q = orth(own)
        weight = torch.arange(q.numel(), dtype=q.dtype, device=device).view_as(q).sin()
        (q * weight).sum().backward()
        found.append((q.detach().cpu(), own.grad.cpu()))
    for cpu, cuda in zip(*found, strict=True):
        assert (cpu - cuda).abs().max() <= 1e-9 * cpu.abs().max()


def test_refinement_reaches_the_cpus_error_and_energies(x):
    omega = torch.randn(D, RANK + 8)
    found = []
    for device in DEVICES:
        own = x.to(device)
        space = refine(own @ omega.to(device), own, start_shifts(1).to(device), RANK, ordered=True)
        u = space.u.float()
        found.append((rel_error(own, u, u.mT @ own).cpu(), space.theta.cpu()))
    (error_cpu, theta_cpu), (error, theta) = found
    torch.testing.assert_close(error, error_cpu, rtol=0, atol=1e-5)
    torch.testing.assert_close(theta, theta_cpu, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "of_loss", "of_gradient"),
    [
        ({"arch": "ResMLP"}, 1e-3, 0.01),
        ({"arch": "MLP"}, 1e-3, 0.01),
        ({"arch": "AdaLoRA"}, 1e-3, 0.01),
        ({"factors": "direct"}, 1e-3, 0.01),
        ({"precision": "bf16"}, 0.02, 0.3),
    ],
)
def test_loss_and_gradient_of_the_factor_model_are_the_cpus(options, of_loss, of_gradient, x):
    found = []
    for device in DEVICES:
        model = make_model(device, **options)
        loss = model.loss_terms(x.to(device), exact_singular_values(x).to(device)).reconstruction
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients).cpu()))
    (loss_cpu, gradient_cpu), (loss, gradient) = found
    assert abs(loss / loss_cpu - 1) <= of_loss
    assert (gradient - gradient_cpu).norm() <= of_gradient * gradient_cpu.norm()


@pytest.mark.parametrize("options", [{"oversample": 0}, {"factors": "direct"}])
def test_a_training_step_never_waits_for_the_host(options, x):
    model, sigma = make_model("cuda", **options), exact_singular_values(x).cuda()
    x = x.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model.loss_terms(x, sigma).reconstruction.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_a_gpu_factors_is_coded_and_decoded_as_what_the_cpu_factors():
    raw = steep_tokens(24, T, D)
    codec = Codec.fit([(raw, (8, 8))])
    errors = []
    for device in DEVICES:
        x = normalise(raw[0].to(device))[0]
        u, b = exact_factors(x, RANK)
        s = b.norm(dim=-1)
        factors = u.cpu(), s.cpu(), (b / s[:, None]).mT.cpu()
        stream = codec.encode(raw[0], (8, 8), step=0.05, factors=factors)
        errors.append(float((codec.decode(stream) - raw[0]).norm() / raw[0].norm()))
    assert abs(errors[1] - errors[0]) <= 1e-3 * errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_encodes_its_tokens_and_decodes_streams_as_the_cpu_does(form):
    raw = steep_tokens(24, T, D)
    codec = Codec.fit([(raw, (8, 8))])
    streams = [codec.encode(one, (8, 8), step=0.05, form=form) for one in raw[:3]]
    assert streams[0] == codec.encode(raw[0].cuda(), (8, 8), step=0.05, form=form)
    found = codec.decode_batch(streams, "cuda")
    for cpu, cuda in zip(codec.decode_batch(streams), found, strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-3 * float(cpu.std()))
