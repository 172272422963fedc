"""What runs on CUDA, tried without it: torch's meta device.

It computes shapes only, refuses to mix with the CPU's tensors, and has no numbers to hand to the
host: a tensor left on the CPU, or a step that waits for a value, raises here as it would be wrong
or slow there. What an eigensolver or a Cholesky checks for itself does not show.
"""

import contextlib
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

import train_real_data
from common import arguments
from lowrank_tokens import factor_files
from lowrank_tokens.errors import image_metrics, token_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import denormalise, exact_factors, exact_singular_values, normalise
from model import get_model_by_name
from qwenvl_dataloader import Batch
from svd_baseline import pca, random_sketch, randomized_svd, truncated_svd
from training import rank_budget
from training.state import build_run
from training.trained_norm import TaskFactorModel

META = torch.device("meta")
B, T, D, R = 2, 16, 48, 8
ONE_ROW = torch.zeros(1, dtype=torch.int64)
SHAPE = {"input_dim": D, "num_tokens": T, "rank": R, "hidden_dim": 16}


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """The device has none; it changes types, not places."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.fixture
def x():
    return torch.empty(B, T, D, device=META)


class UnfusedAdamW(torch.optim.AdamW):
    """The fused kernel is not made for this device; here only its flag is looked at."""

    def __init__(self, *args, fused, **options):
        super().__init__(*args, foreach=False, **options)

    def step(self):
        assert self.found_inf.device == META


def test_the_device_refuses_what_these_tests_look_for():
    with pytest.raises(RuntimeError, match="not on the expected device meta"):
        torch.ones(2, device=META) + torch.ones(2)
    with pytest.raises(RuntimeError, match="item"):
        torch.ones(2, device=META).sum().item()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--oversample 0",
        "--arch AdaLoRA",
        "--factors direct",
        "--dropout 0.1",
        "--arch MLP",
        "--arch AdaLoRA --use_rank_allocator",
    ],
)
def test_a_training_step_stays_on_its_device_and_asks_it_for_no_value(flags, x, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", UnfusedAdamW)
    argv = f"--rank {R} --hidden_dim 16 {flags}".split()
    args = arguments.parse(train_real_data.get_args_parser(), argv)
    dataset = SimpleNamespace(
        feature_dim=D,
        num_tokens=T,
        grid=None,
        manifest={"encoder": {}},
        is_demo=False,
        split=SimpleNamespace(hash="", train=ONE_ROW, val=ONE_ROW),
        rows=pa.table({"image_sha256": ["00"]}),
    )
    run = build_run(args, dataset, META)
    run.model.train()
    ones = torch.ones(B, T, 1, device=META)
    sigma = torch.empty(B, T, dtype=torch.float64, device=META)
    rows = torch.arange(B, device=META)
    grid = (
        run.model.config.grid if "direct" in flags else (2, T // 2)
    )  # another one, where it may be
    batch = Batch(rows, x, ones, ones, sigma, B, 1.0, grid)
    means, broken = train_real_data.train_step(run, batch)
    assert means.device == broken.device == META
    assert {p.grad.device for p in run.model.parameters() if p.grad is not None} == {META}


@pytest.mark.parametrize("options", [{}, {"factors": "direct"}, {"oversample": 0}])
def test_a_model_factors_at_every_rank_on_its_device(options, x):
    model = get_model_by_name("ResMLP", **SHAPE, **options).to(META).eval()
    for rank in (None, R // 2):
        assert {factor.device for factor in model(x, rank)} == {META}
    assert rank_budget.nested_factors(model, x, R)[0].device == META


def test_the_model_of_a_task_stays_on_its_device(x):
    model = TaskFactorModel(get_model_by_name("ResMLP", **SHAPE), {}).to(META)
    product, z, sigma = model.exact_product(x, 4)
    error = model.loss_terms(x, exact_singular_values(x)).reconstruction
    assert {t.device for t in (model(x)[0], product, z, sigma, error)} == {META}


@pytest.mark.parametrize(
    "method",
    [
        truncated_svd,
        exact_factors,
        randomized_svd,
        lambda x, r: random_sketch(x, r, 1, 2 * r),
        lambda x, r: pca(x, r, torch.empty(D, D, device=META)),
    ],
)
def test_references_and_metrics_stay_on_their_device(method, x):
    a, b = method(x, 4)
    found = image_metrics(x, a, b, exact_singular_values(x))
    assert {t.device for t in (a, b, token_error(x, a, b), *found.values())} == {META}


def test_normalisation_and_storage_stay_on_their_device(x):
    assert denormalise(*normalise(x)).device == META
    a, b = exact_factors(x, 4)
    assert rank_budget.error_curve(x, a, b).device == META
    for dtype in ("bf16", "int8"):
        assert factor_files.restore(factor_files.store(a, b, dtype))[0].device == META


def test_a_mistake_found_in_a_loaders_worker_process_is_told_in_its_own_words():
    class Damaged(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, row):
            raise InputError("the features of row 0 are not finite: look for damage")

    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Damaged(), batch_size=None, num_workers=1)))
    message = arguments.mistake(caught.value, SimpleNamespace())
    assert message == "the features of row 0 are not finite: look for damage"
