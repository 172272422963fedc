"""Check and time what only a GPU can tell: results against the CPU's, speed, memory, waits.

    python -m experiments.gpu_check --out gpu_check   # on the machine with a GPU
    python -m experiments.gpu_check --out check --parts correctness

Sizes are those of the 3B model on CUDA and tiny elsewhere. Writes OUT/gpu_check.json and
OUT/gpu_check.md after each row: a call that is cut off leaves what it had, slow parts are last. A
check that raises is a row with its error, and the next one runs.

Legend: T tokens, D features, r rank.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

import train_real_data
from common import cli
from common.errors import UserError
from common.files import write_json
from common.timing import Timing, matmul_rates, matrix_products, seconds_of, warm_up
from experiments import benchmark
from experiments.contenders import Contender, network_contender, solvers
from experiments.gpu_tower import save_tower
from features.encoders import load_encoder
from model import get_model_by_name
from qwenvl_dataloader import Batch, RealQwenVLDataset, create_data_loaders_real, normalise
from subspace import orth, refine, start_shifts
from svd_baseline import exact_singular_values, excess_pct, optimum, rel_error, summarise
from training.checkpoint import load_checkpoint, save_checkpoint
from training.state import TERMS, TrainState, build_run

CPU = torch.device("cpu")


class Sizes(NamedTuple):
    """Of tokens, batches and the encoder's image: the 3B model's, or tiny ones."""

    tokens: tuple[int, int]  # of training, and of a large image
    features: int
    rank: int
    batches: tuple[int, int]  # of training
    svd_batch: int
    svd_ranks: tuple[int, int]
    encode_batches: tuple[int, ...]
    image_size: int
    hidden_dim: int
    seconds: float  # that one timing may take


FULL = Sizes((256, 1369), 2048, 128, (8, 128), 256, (32, 128), (1, 16, 64), 448, 256, 1.0)
TINY = Sizes((16, 24), 48, 8, (2, 4), 3, (2, 4), (1, 2), 112, 16, 0.05)


@dataclass
class Setting:
    """Where, how large, and of which tokens."""

    device: torch.device
    cache_dir: str

    @property
    def sizes(self) -> Sizes:
        return FULL if self.device.type == "cuda" else TINY

    @cached_property
    def found_tokens(self) -> tuple[Tensor, str]:
        """A few images' tokens [n, T, D] as cached, and what they are."""
        if Path(self.cache_dir).is_dir():
            dataset = RealQwenVLDataset(self.cache_dir)
            return dataset[list(range(min(8, len(dataset))))], dataset.label
        generator = torch.Generator().manual_seed(0)
        t, d = self.sizes.tokens[0], self.sizes.features
        wide = torch.randn(4, t, t, generator=generator) * torch.logspace(1, -2, t)
        return wide @ torch.randn(4, t, d, generator=generator), "made-up tokens, no cache at hand"

    def x(self, batch: int, tokens: int | None = None) -> Tensor:
        """[batch, T, D] float32 normalised, on the CPU: `found_tokens` repeated.

        1 % of noise keeps repeated rows and columns independent.
        """
        tokens, features = tokens or self.sizes.tokens[0], self.sizes.features
        found = self.found_tokens[0][:batch].float()
        repeats = -(-tokens // found.shape[1]), -(-features // found.shape[2])
        found = found.repeat(1, *repeats)[:, :tokens, :features]
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(found.shape, generator=generator) * found.std()
        x = normalise(found + 0.01 * noise)[0]
        return x.repeat(-(-batch // len(x)), 1, 1)[:batch]


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.flags("what is run")("--parts", PARTS, list(PARTS), ", ".join(PARTS), metavar="PART")
    where = parser.flags("files and device")
    where("--out", cli.folder, "gpu_check", "folder of the two files that are written")
    where("--device")
    where("--cache_dir", help="cache whose first images' tokens are used, if it exists")
    return parser


def main(args: argparse.Namespace) -> int:
    out, device = Path(args.out), cli.pick_device(args.device)
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, args.cache_dir)
    environment = cli.environment(device) | {"cuda": torch.version.cuda}
    environment |= {"tokens": setting.found_tokens[1], **setting.sizes._asdict()}
    rows: list[dict] = []
    for part in args.parts:
        for what, check in PARTS[part].items():
            for found in attempt(what, partial(check, setting)):
                rows.append({"part": part, **found})
                print(as_line(rows[-1]), flush=True)
                write_json(out / "gpu_check.json", {"environment": environment, "rows": rows})
                (out / "gpu_check.md").write_text(as_markdown(environment, rows))
    wrong = [r for r in rows if r["status"] in ("failed", "differs")]
    found = f"{len(rows)} rows, {len(wrong)} of them failed or differ"
    print(f"wrote {out}/gpu_check.json and gpu_check.md: {found}")
    return 1 if wrong else 0


def as_markdown(environment: dict, rows: list[dict]) -> str:
    """One table of all rows, below the line of card and versions."""
    lines = ["# One call on " + environment["device"], ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += ["", "| part | what | status | value | unit | note |", "| --- " * 6 + "|"]
    return "\n".join([*lines, *map(as_line, rows)]) + "\n"


def as_line(row: dict) -> str:
    cells = row | {"value": "" if row["value"] is None else f"{row['value']:.4g}"}
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells.values())} |"


# ------------------------------------------------------------------------------------------ rows


def row(what: str, value: float | None = None, unit="", note="", status="measured") -> dict:
    """One line of the table. status: measured, ok, differs, failed or skipped."""
    return {"what": what, "status": status, "value": value, "unit": unit, "note": note}


def compared(what: str, difference: float | Tensor, tolerance: float) -> dict:
    """A row that is ok where the difference's largest entry is within the tolerance; NaN is not."""
    largest = float(torch.as_tensor(difference).abs().max())
    status = "ok" if largest <= tolerance else "differs"
    return row(what, largest, note=f"at most {tolerance:g}", status=status)


def attempt(what: str, check: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The rows of a check; what it raises is one more: a bug of ours shows and stops no other."""
    try:
        yield from check()
    except (RuntimeError, ValueError, TypeError, LookupError, OSError, UserError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:300]
        yield row(what, note=f"{type(error).__name__}: {line}", status="failed")


def speed(what: str, count: int, time: Timing, note: str) -> dict:
    """A row of images a second of a call on `count`, with the memory that it takes on CUDA."""
    return row(what, count / time.median, "images/s", note + peak_of(time))


def peak_of(time: Timing) -> str:
    return "" if time.peak_mb is None else f"; peak {time.peak_mb:.0f} MiB beside what was there"


def timed(call: Callable[[], object], setting: Setting) -> Timing:
    """Warmed up, repeated up to 30 times for `sizes.seconds`; for twice that up to three times."""
    peak = warm_up(call, setting.device)
    seconds: list[float] = []
    limit = setting.sizes.seconds
    while len(seconds) < 30 and sum(seconds) < (limit if len(seconds) >= 3 else 2 * limit):
        seconds.append(seconds_of(call, setting.device))
    return Timing(seconds, peak)


# ------------------------------------------------------------------------------------- correctness


def new_run(setting: Setting, device: torch.device, *flags: str) -> TrainState:
    """A run that has not begun, of the sizes of `setting`, as train_real_data.py makes it."""
    sizes = setting.sizes
    flags = *flags, "--rank", str(sizes.rank), "--hidden_dim", str(sizes.hidden_dim)
    args = cli.parse(train_real_data.get_args_parser(), ["--device", str(device), *flags])
    none = torch.zeros(0, dtype=torch.int64)  # rows: the batch is given, no cache is read
    dataset = SimpleNamespace(
        feature_dim=sizes.features,
        num_tokens=sizes.tokens[0],
        grid=(1, sizes.tokens[0]),
        manifest={"encoder": {"id": "check"}},
        is_demo=False,
        split=SimpleNamespace(hash="check", train=none, val=none),
        rows=pa.table({}),
    )
    run = build_run(args, dataset, device)
    run.model.train()
    return run


def new_batch(setting: Setting, device: torch.device, images: int) -> Batch:
    """A batch of the tokens at hand."""
    x = setting.x(images)
    sigma = exact_singular_values(x[: min(8, images)])
    sigma = sigma.repeat(-(-images // len(sigma)), 1)[:images]
    ones = torch.ones(*x.shape[:2], 1, device=device)
    rows = torch.arange(images, device=device)
    grid = (1, x.shape[1])
    return Batch(rows, x.to(device), 0 * ones, ones, sigma.to(device), images, 1.0, grid)


def check_orth(setting: Setting) -> Iterator[dict]:
    t, c = setting.sizes.tokens[0], setting.sizes.rank
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
    for name, cpu, other in zip(("Q", "gradient"), *found, strict=True):
        what = f"orth of dependent and zero columns: {name}, relative to the largest entry"
        yield compared(what, (cpu - other) / cpu.abs().max(), 1e-9)


def check_refine(setting: Setting) -> Iterator[dict]:
    sizes = setting.sizes
    x, p = setting.x(4), min(32, sizes.tokens[0] - sizes.rank)
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
    yield compared("refine: energies, relative", (theta - theta_cpu) / theta_cpu, 1e-4)


def first_step(setting: Setting, device: torch.device, *flags: str) -> tuple[float, Tensor]:
    """Loss before the first step, and all its gradients."""
    run = new_run(setting, device, *flags)
    batch = new_batch(setting, device, setting.sizes.batches[0])
    means, _ = train_real_data.train_step(run, batch)
    gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
    return float(means[TERMS.index("reconstruction")]), torch.cat(gradients).cpu()


def check_training_step(setting: Setting) -> Iterator[dict]:
    for flags, of_loss, of_gradient in (
        ("--arch ResMLP", 1e-3, 0.01),
        ("--arch AdaLoRA", 1e-3, 0.01),
        ("--factors direct", 1e-3, 0.01),
        ("--precision bf16", 0.02, 0.3),
    ):
        loss_cpu, gradient_cpu = first_step(setting, CPU, *flags.split())
        loss, gradient = first_step(setting, setting.device, *flags.split())
        what = f"training step, {flags}"
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
    """Where a step waits: nowhere, but for the eigenproblem's status, which the host reads."""
    if setting.device.type != "cuda":
        yield row("host waits", note="torch.cuda.set_sync_debug_mode needs CUDA", status="skipped")
        return
    batch = new_batch(setting, setting.device, setting.sizes.batches[0])
    for flags in ("--oversample 0", "--factors direct", "--arch ResMLP", "--arch AdaLoRA"):
        run = new_run(setting, setting.device, *flags.split())
        weights_after(run, batch, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_real_data.train_step(run, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchroniz" in str(w.message)]
        places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})
        status = "measured"
        if flags in ("--oversample 0", "--factors direct"):
            status = "differs" if places else "ok"
        what = f"host waits in a step, {flags}"
        yield row(what, len(places), "places", ", ".join(places), status)


def check_loaders(setting: Setting) -> Iterator[dict]:
    """Batches of the cache from device memory, and through pinned memory and worker processes."""
    if not Path(setting.cache_dir).is_dir():
        yield row("loaders", note=f"no cache at --cache_dir {setting.cache_dir}", status="skipped")
        return
    wanted = next(iter(create_data_loaders_real(RealQwenVLDataset(setting.cache_dir), 4).val))
    resident, lazy = (RealQwenVLDataset(setting.cache_dir) for _ in range(2))
    lazy.keep_resident = lambda *_, **__: False
    for name, dataset in (("in device memory", resident), ("read as needed", lazy)):
        batch = next(iter(create_data_loaders_real(dataset, 4, device=setting.device).val))
        if batch.x.device.type != setting.device.type:
            raise RuntimeError(f"the batch is on {batch.x.device}")
        yield compared(f"loader, {name}: difference of x", batch.x.cpu() - wanted.x, 1e-4)


# ------------------------------------------------------------------------------- speed and memory


def check_training(setting: Setting) -> Iterator[dict]:
    """Steps of train_real_data.py on a batch that is on the device already."""
    for precision in ("float32", "bf16"):
        for images in setting.sizes.batches:
            run = new_run(setting, setting.device, "--precision", precision)
            batch = new_batch(setting, setting.device, images)
            time = timed(partial(train_real_data.train_step, run, batch), setting)
            note = f"{time.median * 1e3:.2f} ms a step, {len(time.seconds)} steps"
            yield speed(f"training, {precision}, batch {images}", images, time, note)


def check_tower(setting: Setting) -> Iterator[dict]:
    """features.encoders' own path: what extract_features.py computes for a batch of images."""
    size = setting.sizes.image_size
    with tempfile.TemporaryDirectory() as folder:
        save_tower(Path(folder), setting.device)
        encoder = load_encoder(folder, device=setting.device, image_size=size)
    image = Image.linear_gradient("L").convert("RGB").resize((640, 480))
    time = timed(partial(encoder.preprocess, image), setting)
    yield row("preprocessing on one CPU thread", 1 / time.median, "images/s", "640 × 480, in PIL")
    one = encoder.preprocess(image)
    for batch in setting.sizes.encode_batches:
        pixels = one.expand(batch, *one.shape).contiguous()
        if setting.device.type == "cuda":
            pixels = pixels.pin_memory()
        time = timed(partial(encoder.encode, pixels), setting)
        note = f"random weights, {encoder.dtype}, copy of the pixels included"
        yield speed(f"tower, batch {batch}", batch, time, note)


def check_solvers(setting: Setting) -> Iterator[dict]:
    """ms a matrix of an untrained network and of its rivals; training changes no time."""
    sizes, device = setting.sizes, setting.device
    rates = matmul_rates(device, repeats=3)
    for name, rate in rates.items():
        yield row(f"large matrix product, {name}", rate / 1e12, "T multiply-adds/s")
    environment = {"device_type": device.type, "matmul_multiply_adds_per_s": rates}
    environment |= cli.environment(device)
    for tokens in sizes.tokens:  # the short matrices first: a limit cuts off what is slow
        x = setting.x(sizes.svd_batch, tokens).to(device)
        sigma = exact_singular_values(x[:2])
        for rank in sizes.svd_ranks:
            torch.manual_seed(0)
            shape = {"input_dim": sizes.features, "num_tokens": tokens, "rank": rank}
            model = get_model_by_name("ResMLP", **shape, hidden_dim=sizes.hidden_dim)
            own = network_contender(model.to(device).eval())
            best = optimum(sigma, rank)
            for contender in [own, *solvers(min(x.shape[1:]), device)]:
                what = f"{contender.method}, T = {tokens}, r = {rank}"
                measure = partial(solver, what, contender, x, best, rank, environment, setting)
                yield from attempt(what, measure)


def solver(
    what: str,
    contender: Contender,
    x: Tensor,
    best: Tensor,
    rank: int,
    environment: dict,
    setting: Setting,
) -> Iterator[dict]:
    """The row of one method, as `experiments.benchmark` measures it, on as many of x [b, T, D]
    as it gets through in time: loops over matrices would take minutes."""
    batch = 1
    with torch.inference_mode():
        while True:
            call = partial(contender.factorise, x[:batch], rank)
            call()  # a first call takes longer
            if batch == len(x) or 8 * seconds_of(call, setting.device) > setting.sizes.seconds:
                break
            batch = min(len(x), 8 * batch)
        time = timed(call, setting)
        factors = contender.factorise(x[: len(best)], rank)
        excess = excess_pct(rel_error(x[: len(best)], *factors), best)
    of = benchmark.record(
        contender, rank, batch, environment, summarise(excess), (time, matrix_products(call))
    )
    note = f"batch {batch} of {len(x)}, {len(time.seconds)} calls; "
    note += f"excess of {len(best)}: {of['excess_mean']:.4f} %"
    if of["floor_fraction"] is not None:
        note += f"; its products at full rate: {of['floor_fraction']:.0%} of the time"
    yield row(what, of["ms_median"], "ms a matrix", note + peak_of(time))


PARTS = {
    "correctness": {
        "orth": check_orth,
        "refine": check_refine,
        "training step": check_training_step,
        "same seed": check_same_seed,
        "host waits": check_waits,
        "loaders": check_loaders,
    },
    "training": {"training": check_training},
    "extraction": {"tower": check_tower},
    "svd": {"solvers": check_solvers},
}

if __name__ == "__main__":
    cli.run(main, get_args_parser())
