"""Part `correctness` of `experiments.gpu_check`: what CUDA gives is what the CPU gives."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import torch
from torch import Tensor

import train_real_data
from common import cli
from experiments.gpu_bench import Setting, Skipped, compared, error_line, row
from qwenvl_dataloader import Batch, RealQwenVLDataset, create_data_loaders_real
from subspace import orth, refine, start_shifts
from svd_baseline import exact_singular_values, gram_eigh, rel_error
from training.checkpoint import load_checkpoint, save_checkpoint
from training.state import TERMS, TrainState, build_run

CPU = torch.device("cpu")


def new_run(setting: Setting, device: torch.device, *flags: str) -> TrainState:
    """A run that has not begun, of the sizes of `setting`, as train_real_data.py makes it."""
    sizes = setting.sizes
    argv = ["--rank", str(sizes.rank), "--device", str(device), *flags]
    if setting.tiny:
        argv += ["--hidden_dim", "16"]
    args = cli.parse(train_real_data.get_args_parser(), argv)
    args.arch = train_real_data.canonical_arch(args.arch)
    none = torch.zeros(0, dtype=torch.int64)  # rows: the batch is given, no cache is read
    dataset = SimpleNamespace(feature_dim=sizes.features, num_tokens=sizes.tokens)
    dataset.grid = (1, sizes.tokens)  # as of `new_batch`
    dataset.manifest, dataset.is_demo = {"encoder": {"id": "check"}}, False
    dataset.split = SimpleNamespace(hash="check", train=none, val=none)
    dataset.rows = pa.table({})
    run = build_run(args, dataset, device)
    run.model.train()
    return run


def new_batch(setting: Setting, device: torch.device, images: int) -> Batch:
    """A batch of the tokens at hand."""
    x = setting.x(images, setting.sizes.tokens, setting.sizes.features)
    sigma = exact_singular_values(x[: min(8, images)])
    sigma = sigma.repeat(-(-images // len(sigma)), 1)[:images]
    ones = torch.ones(images, setting.sizes.tokens, 1, device=device)
    rows = torch.arange(images, device=device)
    grid = (1, x.shape[1])
    return Batch(rows, x.to(device), 0 * ones, ones, sigma.to(device), images, 1.0, grid)


def check_orth(setting: Setting) -> Iterator[dict]:
    t, c = setting.sizes.tokens, setting.sizes.rank
    y = torch.randn(4, t, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[1, :, c // 2 :] = y[1, :, : c - c // 2]  # dependent columns
    y[2] = 0
    found = []
    for device in (CPU, setting.device):
        own = y.to(device).requires_grad_()
        q = orth(own)
        weight = torch.arange(q.numel(), device=device, dtype=q.dtype).view_as(q).sin()
        (q * weight).sum().backward()
        found.append((q.detach().cpu(), own.grad.cpu()))
    names = ("orth: Q, float64", "orth: its gradient")
    for name, cpu, other in zip(names, *found, strict=True):
        note = "with dependent and zero columns; largest entry = 1"
        yield compared(name, (cpu - other) / cpu.abs().max(), 1e-9, note)


def check_refine(setting: Setting) -> Iterator[dict]:
    sizes = setting.sizes
    x = setting.x(4, sizes.tokens, sizes.features)
    p = min(32, sizes.tokens - sizes.rank)
    omega = torch.randn(sizes.features, sizes.rank + p, generator=torch.Generator().manual_seed(0))
    found = []
    for device in (CPU, setting.device):
        own = x.to(device)
        sketch = own @ omega.to(device)
        space = refine(sketch, own, start_shifts(1).to(device), sizes.rank, ordered=True)
        u = space.u.float()
        found.append((rel_error(own, u, u.mT @ own).cpu(), space.theta.cpu()))
    (error_cpu, theta_cpu), (error, theta) = found
    yield compared("refine: rel_error", error - error_cpu, 1e-5)
    yield compared("refine: energies", (theta - theta_cpu) / theta_cpu, 1e-4)
    best = rel_error(x, *gram_eigh(x, sizes.rank))
    yield row("refine: excess of a random sketch", float((100 * (error / best - 1)).mean()), "%")


def step_gradients(setting: Setting, device: torch.device, *flags: str) -> tuple[float, Tensor]:
    """Loss before, and all gradients after, the first step."""
    run = new_run(setting, device, *flags)
    images = setting.sizes.batches[0]
    means, broken = train_real_data.train_step(run, new_batch(setting, device, images))
    if broken.item():
        raise RuntimeError("the step is not finite")
    gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
    return float(means[TERMS.index("reconstruction")]), torch.cat(gradients).cpu()


def check_training_step(setting: Setting) -> Iterator[dict]:
    for name, flags, of_loss, of_gradient in (
        ("ResMLP", (), 1e-3, 0.01),
        ("AdaLoRA", ("--arch", "AdaLoRA"), 1e-3, 0.01),
        ("direct factors", ("--factors", "direct"), 1e-3, 0.01),
        ("ResMLP bf16", ("--precision", "bf16"), 0.02, 0.3),
    ):
        loss_cpu, gradient_cpu = step_gradients(setting, CPU, *flags)
        loss, gradient = step_gradients(setting, setting.device, *flags)
        what = f"training step, {name}"
        yield compared(f"{what}: reconstruction loss, relative", loss / loss_cpu - 1, of_loss)
        apart = (gradient - gradient_cpu).norm() / gradient_cpu.norm()
        yield compared(f"{what}: gradient, ‖difference‖ / ‖gradient‖", apart, of_gradient)


def weights_after(run: TrainState, batch: Batch, steps: int) -> Tensor:
    for _ in range(steps):
        train_real_data.train_step(run, batch)
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).cpu()


def check_same_seed(setting: Setting) -> Iterator[dict]:
    """Weights after 4 steps with dropout: those of the same seed, and resumed from a file."""
    batch = new_batch(setting, setting.device, setting.sizes.batches[0])
    new = partial(new_run, setting, setting.device, "--dropout", "0.1")
    unbroken = weights_after(new(), batch, 4)
    again = weights_after(new(), batch, 4)
    yield compared("same seed twice, weights after 4 steps with dropout", again - unbroken, 0.0)
    run = new()
    weights_after(run, batch, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last_model.pt"
        save_checkpoint(path, run.checkpoint())
        state = load_checkpoint(path)
    run = new()
    run.restore(state)
    resumed = weights_after(run, batch, 2)
    yield compared("resume from a file after 2 of 4 steps, weights", resumed - unbroken, 0.0)


def check_waits(setting: Setting) -> Iterator[dict]:
    """A step without an eigenproblem waits for nothing; with one, where it waits is listed."""
    setting.need_cuda("torch.cuda.set_sync_debug_mode")
    batch = new_batch(setting, setting.device, setting.sizes.batches[0])
    runs = {"p = 0": "--oversample 0", "direct": "--factors direct"}
    runs |= {"default p": "", "AdaLoRA": "--arch AdaLoRA"}
    for name, flags in runs.items():
        run = new_run(setting, setting.device, *flags.split())
        weights_after(run, batch, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step_in_mode("warn", run, batch)
        waits = [w for w in caught if "synchroniz" in str(w.message)]
        places = {f"{Path(w.filename).name}:{w.lineno}" for w in waits}
        note, status = ", ".join(sorted(places)) or "none", "measured"
        if name in ("p = 0", "direct"):  # elsewhere the eigensolver's status is read on the host
            status = "ok"
            try:
                step_in_mode("error", run, batch)
            except RuntimeError as error:
                note, status = f"{note}; {error_line(error)}", "differs"
        yield row(f"host waits in a step, {name}", len(places), "places", note, status)


def step_in_mode(mode: str, run: TrainState, batch: Batch) -> None:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        train_real_data.train_step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_out_of_memory(setting: Setting) -> Iterator[dict]:
    setting.need_cuda("out of memory")
    images = 2**22
    batch = new_batch(setting, setting.device, 2)
    run = new_run(setting, setting.device)
    try:
        huge = batch.x[:1].expand(images, -1, -1)
        train_real_data.train_step(
            run, batch._replace(x=huge, singular_values=batch.singular_values[:1])
        )
        raise RuntimeError(f"a batch of {images} images fitted")
    except torch.cuda.OutOfMemoryError as error:
        message = cli.mistake(error, argparse.Namespace(batch_size=images))
    good = f"--batch_size {images} is too large, try --batch_size {images // 2}" in message
    yield row("out of memory: what the user reads", None, "", message, "ok" if good else "differs")
    run = new_run(setting, setting.device)
    means, broken = train_real_data.train_step(run, batch)
    fine = not broken.item() and bool(means.isfinite().all())
    yield row("a step after it", None, "", "finite", "ok" if fine else "differs")


def check_loaders(setting: Setting) -> Iterator[dict]:
    """Batches of the cache from device memory, and through pinned memory and worker processes."""
    if not Path(setting.cache_dir).is_dir():
        raise Skipped(f"no cache at --cache_dir {setting.cache_dir}")
    wanted = next(iter(create_data_loaders_real(RealQwenVLDataset(setting.cache_dir), 4).val))
    resident = create_data_loaders_real(
        RealQwenVLDataset(setting.cache_dir), 4, device=setting.device
    )
    lazy_set = RealQwenVLDataset(setting.cache_dir)
    lazy_set.keep_resident = lambda *_, **__: False
    lazy = create_data_loaders_real(lazy_set, 4, device=setting.device)
    for name, loaders in (("in device memory", resident), ("read as needed", lazy)):
        batch = next(iter(loaders.val))
        if batch.x.device.type != setting.device.type:
            raise RuntimeError(f"the batch is on {batch.x.device}")
        apart = batch.x.cpu() - wanted.x
        yield compared(f"loader, {name}: largest difference of x", apart, 1e-4)


CHECKS = {
    "correctness": {
        "orth": check_orth,
        "refine": check_refine,
        "training step": check_training_step,
        "same seed": check_same_seed,
        "host waits": check_waits,
        "out of memory": check_out_of_memory,
        "loaders": check_loaders,
    }
}
