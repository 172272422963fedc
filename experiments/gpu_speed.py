"""Parts `training` and `svd` of `experiments.gpu_check`: images/s, shares, and time of each rival.

Legend: b matrices of a batch, T tokens, D features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd import DeviceType

import train_real_data
from common.timing import matmul_rates, matrix_products
from experiments.contenders import Contender, network_contender, solvers
from experiments.gpu_bench import FAILURES, Setting, error_line, largest_batch, row, speed, timed
from experiments.gpu_correctness import new_batch, new_run
from model import get_model_by_name
from svd_baseline import exact_singular_values, excess_pct, optimum, rel_error

LARGEST_SHARES = 10  # operators that the profile lists

# -------------------------------------------------------------------------------------- training


def check_training(setting: Setting) -> Iterator[dict]:
    """Steps of train_real_data.py on a batch that is on the device already."""
    for precision in ("float32", "bf16"):
        for images in setting.sizes.batches:
            run = new_run(setting, setting.device, "--precision", precision)
            batch = new_batch(setting, setting.device, images)
            step = partial(train_real_data.train_step, run, batch)
            time = timed(step, setting)
            note = f"ResMLP, r = {run.model.rank}, p = {run.model.oversample}; "
            note += f"{time.median * 1e3:.2f} ms a step, {len(time.seconds)} steps; "
            note += tokens_of(setting)
            yield from speed(f"training, {precision}, batch {images}", images, time, note)


def check_shares(setting: Setting) -> Iterator[dict]:
    """What a training step's time goes to, by the profiler: the operators' own time."""
    images = setting.sizes.batches[-1]
    run, batch = new_run(setting, setting.device), new_batch(setting, setting.device, images)
    step = partial(train_real_data.train_step, run, batch)
    wall = timed(step, setting).median
    on_cuda = setting.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    # kernels are listed too, beside the operators that launched them
    events = [e for e in profile.key_averages() if e.device_type == DeviceType.CPU]
    own = {
        e.key: (e.self_device_time_total if on_cuda else e.self_cpu_time_total) / 1e6
        for e in events
    }
    total = sum(own.values())
    note = f"float32, batch {images}; {wall * 1e3:.2f} ms a step unprofiled, "
    note += f"{1e3 * total:.2f} ms in operators while profiled"
    yield row("time in operators, of a step's wall time", 100 * total / wall, "%", note)
    for name in sorted(own, key=own.get, reverse=True)[:LARGEST_SHARES]:
        yield row(f"share of {name}", 100 * own[name] / total, "%", f"{1e3 * own[name]:.3f} ms")


def tokens_of(setting: Setting) -> str:
    return f"tokens repeated from {setting.found_tokens[1]}"


# ----------------------------------------------------------------------------- against the SVD


def ceilings(setting: Setting) -> dict[str, float]:
    """Multiply-adds per second by data type, and bytes per second of a copy (read and written)."""
    rates = matmul_rates(setting.device, repeats=3)
    count = 2**18 if setting.tiny else 2**29
    source = torch.zeros(count, dtype=torch.float16, device=setting.device)
    target = torch.empty_like(source)
    time = timed(lambda: target.copy_(source), setting)
    return rates | {"bytes": 2 * source.numel() * source.element_size() / time.median}


def contenders(tokens: int, features: int, rank: int, setting: Setting) -> list[Contender]:
    """The network and its rivals at one T and r; training does not change a network's time."""
    torch.manual_seed(0)
    hidden = {"hidden_dim": 16} if setting.tiny else {}
    shape = {"input_dim": features, "num_tokens": tokens, "rank": rank}
    network = get_model_by_name("ResMLP", **shape, **hidden)
    own = network_contender(network.to(setting.device).eval())
    return [own, *solvers(min(tokens, features), setting.device)]


def compare(
    contender: Contender, x: Tensor, best: Tensor, rank: int, limits: dict, setting: Setting
) -> dict:
    """ms a matrix of one method on as many of x [b, T, D] as it gets through in time."""
    tokens, features = x.shape[-2:]
    call: Callable[[int], object] = lambda b: contender.factorise(x[:b], rank)  # noqa: E731
    with torch.inference_mode():
        batch = largest_batch(call, len(x), setting)
        time = timed(partial(call, batch), setting)
        judged = min(batch, len(best))
        error = rel_error(x[:judged], *contender.factorise(x[:judged], rank))
        excess = float(excess_pct(error, best[:judged]).mean())
    ms = 1e3 * time.median / batch
    moved = 4 * (tokens * features + rank * (tokens + features))  # X read, A and B written
    floors = [1e3 * moved / limits["bytes"]]
    if counts := matrix_products(partial(call, batch)):
        floors.append(sum(1e3 * n / limits[dtype] for dtype, n in counts.items()) / batch)
    note = f"batch {batch} of {len(x)}, {len(time.seconds)} calls; excess {excess:.4f} %; "
    note += f"floor by bytes {floors[0]:.5f} ms"
    note += f", by products {floors[1]:.5f} ms" if len(floors) > 1 else ", no products"
    note += f": {100 * max(floors) / ms:.0f} % of the time"
    note += f"; peak {time.peak_mb:.0f} MiB" if time.peak_mb is not None else ""
    note += "; untrained" if contender.method == "network" else ""
    return row(f"{contender.method}, T = {tokens}, r = {rank}", ms, "ms a matrix", note)


def check_against_svd(setting: Setting) -> Iterator[dict]:
    sizes = setting.sizes
    limits = ceilings(setting)
    for name, value in limits.items():
        unit = "TB/s, copy" if name == "bytes" else "T multiply-adds/s, matrix product"
        yield row(f"ceiling: {name}", value / 1e12, unit)
    if setting.device.type != "cuda":
        yield row("svd_gesvda", note="the driver needs CUDA", status="skipped")
    # the short matrices first: a limit cuts off what is slow
    for tokens in (sizes.tokens, sizes.long_tokens):
        x = setting.x(sizes.svd_batch, tokens, sizes.features).to(setting.device)
        sigma = exact_singular_values(x[:2])
        for rank in sizes.svd_ranks:
            best = optimum(sigma, rank)
            for contender in contenders(tokens, sizes.features, rank, setting):
                try:
                    yield compare(contender, x, best, rank, limits, setting)
                except FAILURES as error:  # a driver that refuses a shape, or memory: the next one
                    what = f"{contender.method}, T = {tokens}, r = {rank}"
                    yield row(what, note=error_line(error), status="failed")
        del x
    note = "1 % of noise added; only what iterates (svd, eigh) can depend on them"
    yield row("what the values are", note=f"{tokens_of(setting)}, {note}")


CHECKS = {
    "training": {"images/s": check_training, "shares": check_shares},
    "svd": {"against the SVD": check_against_svd},
}
