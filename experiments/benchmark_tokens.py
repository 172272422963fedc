"""Cost and error of each factorisation against the number of tokens (`benchmark --tokens`).

Tokens are those of real photographs, square pieces at the demo encoder's 28 pixels a token. Up to
a photograph's own size a piece is one photograph's; beyond it is a tiling of square crops of
several at their own pixels, which is said wherever its numbers stand.

Legend: T tokens, D features, r rank, K refinement steps, c columns of the sketch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import arguments
from common.tables import print_columns
from encoders.towers import DemoEncoder, load_encoder
from experiments.contenders import solvers
from experiments.make_demo_data import PHOTOGRAPHS
from experiments.timing import peak_tensor_mb, time_in_turn
from figures import time_against_tokens
from lowrank_tokens import progress
from lowrank_tokens.errors import excess_pct, optimum, rel_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import write_json
from lowrank_tokens.linalg import Factors, exact_singular_values, normalise, refine, start_shifts
from model import LowRankFactorModel, get_model_by_name
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import load_model

PIXELS = 28  # along a side of a merged token
OWN_TOKENS = 256  # of the 16 × 16 grid that an untrained network is made for
RANKS = [32, 128]
PICTURES = 3  # of each T; one from LARGE tokens on, of which each is a minute's work
LARGE = 4096
# its time grows as T²; a table of these sizes needs it no further
SVD_UP_TO = 2048
NEAR_PCT = 0.06  # excess: what counts as the SVD where times are compared
Method = Callable[[Tensor, int], Factors]


def main(args: argparse.Namespace) -> None:
    """Measure all methods at each T of args.tokens; write benchmark_tokens.json and .png."""
    arguments.refuse_beside(
        args, "tokens", {"ranks", "threads", "repeats", "results_dir", "cache_dir", "device"}
    )
    sides = [grid_side(tokens) for tokens in sorted(set(args.tokens))]
    ranks = sorted(set(args.ranks)) if "ranks" in args.typed else RANKS
    device = arguments.pick_device(args.device)
    torch.set_num_threads(args.threads)
    repeats = args.repeats if "repeats" in args.typed else 3
    networks, name = networks_of(Path(args.results_dir), ranks, device)
    encoder = load_encoder("demo", device=device)
    photographs = held_out_photographs(RealQwenVLDataset(args.cache_dir))
    records: list[dict] = []
    for side in progress.over(sides, "tokens", "numbers of tokens"):
        count = PICTURES if side**2 < LARGE else 1
        x, source = tokens_of(photographs, encoder, side, count)
        for r in [r for r in ranks if r <= min(x.shape[-2:])]:
            found = measure(methods(networks[r], side, r), x, r, repeats)
            records += [{"tokens": side**2, "source": source, "rank": r, **f} for f in found]
    growth = exponents(records)
    environment = arguments.environment(device) | {"cores": torch.multiprocessing.cpu_count()}
    environment |= {"encoder": encoder.id, "feature_dim": encoder.feature_dim}
    environment |= {"network": name, "repeats": repeats}
    print_table(records, growth)
    for line in (lines := verdicts(records)):
        print(line)
    results_dir = Path(args.results_dir)
    found = {"environment": environment, "exponents": growth, "records": records}
    write_json(results_dir / "benchmark_tokens.json", found)
    sources = {r["tokens"]: r["source"] for r in records}
    of = ", ".join(f"T = {t}: {s}" for t, s in sources.items())
    footer = (
        f"tokens of {encoder.id}, D = {encoder.feature_dim}, of held-out photographs ({of}); "
        f"{name}; SVD up to T = {SVD_UP_TO}; {environment['device']}, {environment['threads']} "
        f"CPU thread(s) of {environment['cores']}, torch {environment['torch']}; median of "
        f"{repeats} calls, all methods in turn"
    )
    path = results_dir / "benchmark_tokens.png"
    title = lines[-1].split(" (")[0] if lines else "Time of a factorisation against tokens"
    time_against_tokens.growth(path, records, growth, title, footer)
    print(f"wrote {results_dir}/benchmark_tokens.json and {path}: look at it")


def grid_side(tokens: int) -> int:
    """√T. Raises InputError where that is no whole number."""
    if (side := math.isqrt(tokens)) ** 2 != tokens:
        raise InputError(
            f"--tokens {tokens} is no square: type {side**2} or {(side + 1) ** 2}, tokens of a "
            "square picture"
        )
    return side


# ------------------------------------------------------------------------------------- pictures


def held_out_photographs(dataset: RealQwenVLDataset) -> list[Image.Image]:
    """Photographs of the demo of which the cache's split holds the crops out, largest first."""
    groups = dataset.rows["group"].to_pylist()
    held_out = {groups[row] for row in dataset.split.test.tolist()}
    if not dataset.is_demo:
        held_out = {photograph.group for photograph in PHOTOGRAPHS}
    found = []
    for photograph in PHOTOGRAPHS:
        if photograph.group in held_out:
            found.append(photograph.open())
    return sorted(found, key=lambda image: -min(image.size))


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of a photograph, never enlarged: at most `size` pixels a side."""
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    crop = image.crop((left, top, left + side, top + side))
    return crop.resize((size, size), Image.Resampling.BICUBIC) if side > size else crop


def tiling(photographs: list[Image.Image], size: int, first: int) -> Image.Image:
    """A picture of size × size pixels, tiled from left to right with squares of the photographs.

    Tiles are as large as the second smallest photograph allows; the last of a row is cut.
    """
    tile = min(size, sorted(min(image.size) for image in photographs)[1])
    picture = Image.new("RGB", (size, size))
    large = [image for image in photographs if min(image.size) >= tile]
    places = [(x, y) for y in range(0, size, tile) for x in range(0, size, tile)]
    for i, place in enumerate(places):
        picture.paste(square(large[(first + i) % len(large)], tile), place)
    return picture


def tokens_of(
    photographs: list[Image.Image], encoder: DemoEncoder, side: int, count: int
) -> tuple[Tensor, str]:
    """Normalised tokens [count, side², D] float32 and what they are of."""
    size = PIXELS * side
    whole = [image for image in photographs if min(image.size) >= size][:count]
    pictures = [square(image, size) for image in whole]
    pictures += [tiling(photographs, size, i) for i in range(len(pictures), count)]
    tokens = [encoder.encode(encoder.pixels_of(picture)[None]) for picture in pictures]
    source = f"{len(whole)} at their own size, {count - len(whole)} tiled from crops"
    return normalise(torch.cat(tokens))[0], source


# -------------------------------------------------------------------------------------- methods


def networks_of(
    results_dir: Path, ranks: list[int], device: torch.device
) -> tuple[dict[int, LowRankFactorModel], str]:
    """Rank → the trained ResMLP of results_dir where it is one of the Frobenius norm and of these
    ranks, else an untrained one of that rank made for the 16 × 16 grid; and their name.

    Another grid asks for a few columns more than one's own: p = 32 is 0.065 % above the optimum at
    rank 128 and T = 1369 (training and validation photographs), 40 is 0.038 %; 16 is 0.013 % at
    rank 32. Hence p = 8 + r/4.
    """
    path = results_dir / "ResMLP" / "best_model.pt"
    if path.exists():
        model, _ = load_model(path, device)
        if model.factors == "projected" and model.norm is None and model.rank >= max(ranks):
            grid = f"{model.grid[0]} × {model.grid[1]}"
            return dict.fromkeys(ranks, model), f"network: ResMLP trained at {grid}"
    torch.manual_seed(0)
    found = {}
    for rank in ranks:
        size = {"input_dim": 4 * 384, "num_tokens": OWN_TOKENS, "rank": rank}
        extra = max(0, min(8 + rank // 4, OWN_TOKENS - rank))
        found[rank] = get_model_by_name("ResMLP", **size, oversample=extra).to(device).eval()
    return found, "network: ResMLP made for 16 × 16, untrained, p = 8 + r/4 extra columns"


def methods(network: LowRankFactorModel, side: int, rank: int) -> dict[str, Method]:
    """Name → method; what one draws or interpolates once for a grid is made before the clock."""
    grid, columns = (side, side), min(network.sketch_columns(rank), side**2)
    found = {
        "network": lambda x, r: network(x, r, ordered=False, grid=grid),
        "random_sketch": fresh_sketch(side**2, columns, network.refine_steps),
    }
    of_all = solvers(side**2, network.shift_logits.device)
    exact = {c.method: c.factorise for c in of_all if c.method != "svd" or side**2 <= SVD_UP_TO}
    return found | exact


def fresh_sketch(tokens: int, columns: int, steps: int) -> Method:
    """Y = X Xᵀ Ω with Gaussian Ω [T, c], refined and finished as a network's sketch is."""
    omega = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    shifts = start_shifts(steps)

    def factorise(x: Tensor, rank: int) -> Factors:
        sketch = x @ (x.mT @ omega.to(x))
        u = refine(sketch, x, shifts.to(x.device), rank, ordered=False).u.to(x.dtype)
        return u, u.mT @ x

    return factorise


# ------------------------------------------------------------------------------------- measures


@torch.inference_mode()
def measure(methods: dict[str, Method], x: Tensor, rank: int, repeats: int) -> list[dict]:
    """One record a method: time of the first picture of x [n, T, D], mean excess of all."""
    best = optimum(exact_singular_values(x), rank)  # [n]
    one = x[:1]
    calls = [lambda f=f: f(one, rank) for f in methods.values()]
    timings = time_in_turn(calls, repeats, x.device)
    records = []
    for (name, factorise), call, timing in zip(methods.items(), calls, timings, strict=True):
        excess = [
            excess_pct(rel_error(image, *factorise(image, rank)), b)
            for image, b in zip(x.split(1), best, strict=True)
        ]
        ms = np.asarray(timing.seconds) * 1e3
        peak = timing.peak_mb if x.is_cuda else peak_tensor_mb(call)
        record = {"method": name, "ms_median": float(np.median(ms)), "ms": ms.tolist()}
        record |= {"peak_mb": peak, "excess_mean": float(torch.cat(excess).mean())}
        records.append(record | {"pictures": len(x)})
    return records


def exponents(records: list[dict]) -> list[dict]:
    """For each method and rank the k of ms ∝ T^k, least squares of logarithms; two T or more."""
    found = []
    for rank in sorted({r["rank"] for r in records}):
        for name in dict.fromkeys(r["method"] for r in records):
            of = [r for r in records if (r["rank"], r["method"]) == (rank, name)]
            if len(of) > 1:
                logs = np.log([[r["tokens"], r["ms_median"]] for r in of]).T
                k = float(np.polyfit(*logs, 1)[0])
                found.append({"rank": rank, "method": name, "exponent": k})
    return found


def print_table(records: list[dict], growth: list[dict]) -> None:
    """All records and exponents, by rank and T."""
    rows = [("method", "rank", "T", "ms", "peak MB", "excess %", "of")]
    for r in sorted(records, key=lambda r: (r["rank"], r["tokens"])):
        peak = "-" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        numbers = f"{r['ms_median']:.1f}", peak, f"{r['excess_mean']:.4f}"
        rows.append((r["method"], r["rank"], r["tokens"], *numbers, r["source"]))
    rows += [
        (g["method"], g["rank"], "growth", f"T^{g['exponent']:.2f}", "", "", "") for g in growth
    ]
    print_columns(rows)


def verdicts(records: list[dict]) -> list[str]:
    """For each T and rank, by how much the network is ahead of the exact methods as near."""
    lines = []
    for tokens, rank in sorted({(r["tokens"], r["rank"]) for r in records}):
        of = {r["method"]: r for r in records if (r["tokens"], r["rank"]) == (tokens, rank)}
        exact = {"gram_eigh_f32", "gram_eigh_f64", "svd"} & of.keys()
        near = [m for m in sorted(exact) if of[m]["excess_mean"] <= NEAR_PCT]
        fastest = min(near, key=lambda m: of[m]["ms_median"])
        own, other = of["network"], of["svd_lowrank"]
        lines.append(
            f"T = {tokens}, rank {rank}: the network is "
            f"{of[fastest]['ms_median'] / own['ms_median']:.1f} times as fast as the fastest exact "
            f"method ({fastest}; float64: "
            f"{of['gram_eigh_f64']['ms_median'] / own['ms_median']:.1f} times), "
            f"{own['excess_mean']:.3f} % above the optimum; "
            f"{own['ms_median'] / other['ms_median']:.1f} times the time of svd_lowrank, "
            f"which is {other['excess_mean']:.2f} % above"
        )
    return lines
