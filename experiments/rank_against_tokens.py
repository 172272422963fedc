"""Measure how the rank that a photograph needs grows with its number of tokens.

    python -m experiments.rank_against_tokens     # two minutes of one core
    python -m experiments.rank_against_tokens --tokens 64 256 --target_error 0.2

The demo's photographs of the training and validation scenes, whole and in their own aspect, are
scaled down to about each number of --tokens, never enlarged, and last taken at their own pixels.
Writes results/rank_against_tokens.json and .png: the least rank whose truncated SVD has a rel_error
within --target_error, its growth r ∝ T^b, and bytes a pixel of the factors (bf16) and the tokens.

Legend: T tokens of one size of a photograph, D features, r rank, σ singular values.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import arguments
from common.tables import print_columns
from encoders.native_size import PixelRange, native_size
from encoders.towers import DemoEncoder, load_encoder
from experiments.make_demo_data import PHOTOGRAPHS, Photograph
from figures import rank_against_tokens as figure
from lowrank_tokens import progress
from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import write_json
from lowrank_tokens.linalg import exact_singular_values, normalise
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import interval_95

TOKENS = [64, 121, 196, 256, 324, 484, 784, 1369]
NEAR = 0.8  # of its pixels a photograph has to have at a T, or is left out there
SPAN = 1.5  # largest T by smallest, of photographs whose growth is fitted


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    what = parser.flags("what is measured")
    what("--tokens", arguments.Number(int, 16, 4096), TOKENS, "of a photograph, about, scaled down")
    what("--target_error", default=0.1, help="rel_error that the rank has to meet")
    arguments.add_evaluation_flags(parser, metric=False)
    return parser


def main(args: argparse.Namespace) -> None:
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    photographs = known_photographs(dataset)
    if not photographs:
        raise InputError(
            f"--cache_dir {args.cache_dir} holds no photograph of the demo: name a cache that "
            "extract_features.py --demo made"
        )
    encoder = load_encoder("demo", device=device)
    records = []
    for photograph in progress.over(photographs, "ranks", "photographs"):
        image = photograph.open()
        name = Path(photograph.path).stem
        for size, near in sizes(image, sorted(set(args.tokens)), encoder.step).items():
            picture = image.resize(size, Image.Resampling.BICUBIC)
            r, t = rank_of(encoder, picture, args.target_error)
            pixels, features = t * encoder.step**2, encoder.feature_dim
            in_all = {"factors": 2 * r * (t + features), "whole": 2 * t * features}  # bf16
            of = {"photograph": name, "group": photograph.group, "near": near, "tokens": t}
            per_pixel = {key: count / pixels for key, count in in_all.items()}
            records.append({**of, "rank": r, **per_pixel})
    found = {
        "target_error": args.target_error,
        "feature_dim": encoder.feature_dim,
        "environment": arguments.environment(device),
        "growth": growth(records),
        "means": means(records),
        "records": records,
    }
    results_dir = Path(args.results_dir)
    write_json(results_dir / "rank_against_tokens.json", found)
    figure.rank_against_tokens(results_dir / "rank_against_tokens.png", found)
    print_table(found)
    print(f"wrote {results_dir}/rank_against_tokens.json and .png: look at the figure")


def known_photographs(dataset: RealQwenVLDataset) -> list[Photograph]:
    """Those of the demo whose scenes are in the training or validation part of the cache."""
    groups = dataset.rows["group"].to_pylist()
    known = {groups[i] for i in torch.cat([dataset.split.train, dataset.split.val]).tolist()}
    return [p for p in PHOTOGRAPHS if p.group in known]


def sizes(image: Image.Image, tokens: list[int], step: int) -> dict[tuple[int, int], int]:
    """Pixels (width, height), multiples of `step` → the T of `tokens` that they are near.

    A T is left out for which the photograph has no pixels, or whole tokens in its aspect are too
    few; the last is its own size, cut to whole tokens: no side is enlarged.
    """
    own = tuple(side // step * step for side in image.size)
    found = {}
    for t in tokens:
        size = native_size(*image.size, step, PixelRange(step**2, t * step**2))
        if size[0] * size[1] >= NEAR * t * step**2 and size[0] <= own[0] and size[1] <= own[1]:
            found[size] = t
    t = own[0] * own[1] // step**2
    return {**found, own: found.get(own, min(tokens, key=lambda near: abs(np.log(near / t))))}


@torch.inference_mode()
def rank_of(encoder: DemoEncoder, picture: Image.Image, target: float) -> tuple[int, int]:
    """The least r whose optimum is within `target`, by exact σ of the normalised tokens; and T."""
    x = normalise(encoder.encode(encoder.pixels_of(picture)[None]))[0][0]  # [T, D]
    values = exact_singular_values(x)
    rank = next(r for r in range(len(values) + 1) if optimum(values, r) <= target)
    return rank, len(x)


def growth(records: list[dict]) -> dict[str, dict]:
    """b of r ∝ T^b, least squares of logarithms in each photograph: mean, 95 % interval.

    Of all sizes, of those up to the median T of all, and of those from there on; of photographs
    whose T then span a factor SPAN.
    """
    middle = float(np.median([r["tokens"] for r in records]))
    parts = {"all": (0, np.inf), "small": (0, middle), "large": (middle, np.inf)}
    found = {}
    for part, (least, most) in parts.items():
        slopes, groups = [], []
        for name in dict.fromkeys(r["photograph"] for r in records):
            of = [r for r in records if r["photograph"] == name and least <= r["tokens"] <= most]
            t, rank = np.array([[r["tokens"], r["rank"]] for r in of]).reshape(-1, 2).T
            if len(of) > 1 and t.max() >= SPAN * t.min() and rank.all():
                slopes.append(float(np.polyfit(np.log(t), np.log(rank), 1)[0]))
                groups.append(of[0]["group"])
        if slopes:
            found[part] = {
                "b": float(np.mean(slopes)),
                "photographs": len(slopes),
                "tokens": [least, min(most, max(r["tokens"] for r in records))],
                "interval_95": interval_95(torch.tensor(slopes), groups),
            }
    return found


def means(records: list[dict]) -> list[dict]:
    """Geometric means at each size. Sizes that half of the photographs have are `common`: there the
    means are of those that have them all, so that from size to size the photographs are the same.
    """
    of_size: dict[int, dict[str, dict]] = {}
    for r in records:
        of_size.setdefault(r["near"], {}).setdefault(r["photograph"], r)
    count = len({r["photograph"] for r in records})
    common = [near for near, of in of_size.items() if 2 * len(of) >= count]
    every = set.intersection(*(set(of_size[near]) for near in common)) if common else set()
    found = []
    for near, of in sorted(of_size.items()):
        names = every & set(of) if near in common else set(of)
        if names:
            mean = {
                key: float(np.exp(np.mean([np.log(max(of[n][key], 1e-9)) for n in names])))
                for key in ("tokens", "rank", "factors", "whole")
            }
            found.append(
                {"near": near, "common": near in common, "photographs": len(names), **mean}
            )
    return found


def print_table(found: dict) -> None:
    """Means of each size, then the growth."""
    rows = [("T near", "photographs", "T", "rank", "rank / T", "bytes a pixel", "of X")]
    for m in found["means"]:
        rows.append((m["near"], m["photographs"], f"{m['tokens']:.0f}", f"{m['rank']:.1f}"))
        rows[-1] += tuple(f"{v:.2f}" for v in (m["rank"] / m["tokens"], m["factors"], m["whole"]))
    print_columns(rows)
    for part, g in found["growth"].items():
        ends = " [{:.2f}, {:.2f}]".format(*g["interval_95"]) if g["interval_95"] else ""
        print(f"{part} T: rank ∝ T^{g['b']:.2f}{ends}, {g['photographs']} photographs")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
