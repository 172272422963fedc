"""Compare every way to write an image's tokens at equal bytes, on held-out images.

    python -m experiments.compare_bytes --codec codecs/demo.safetensors
    python -m experiments.compare_bytes --codec codecs/demo.safetensors --quick

Writes bytes.json and bytes.png to --results_dir: bytes of an image against raw_error and, where
a head reads the cache's tokens, task error, each method's one knob swept; and how often the
nearest mean token is that of another picture of the same photograph (`retrieval`), which no metric
was made for. Everything is fitted on training images; test images are only measured.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from common import arguments
from encoders.image_sources import image_bytes, open_source, read_image
from encoders.native_size import size_in
from experiments import rivals
from experiments.bytes_tables import Point, print_tables, tables
from experiments.coded_rivals import (
    CodecStatistics,
    Coded,
    KltDct,
    has_metric,
)
from experiments.head_steps import CodedHeadSteps, FactorsHeadSteps
from experiments.partial_results import PartialResults
from experiments.rivals import (
    PICTURE_FORMS,
    PcaDeflate,
    Pictures,
    Rival,
    Statistics,
    TokenImage,
    fit_token_basis,
)
from figures.bytes_against_error import bytes_against_error
from heads.load_head import HEADS, load_head
from heads.metric import cache_hashes
from heads.task_head import TaskHead
from lowrank_tokens import progress
from lowrank_tokens.codec import Codec
from lowrank_tokens.errors import summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import write_json
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from svd_baseline import interval_95

if TYPE_CHECKING:
    from encoders.towers import VisionEncoder

QUICK_METHODS = ("factors_quantised", "factors_deflate", "transform", "coded")
QUICK_KNOBS, QUICK_IMAGES = 5, 24
DATA_SETS = {"demo": "demo_data", "real": "textVQA_groundingtask_bbox"}


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    what = parser.flags("what is compared")
    what("--codec", arguments.file, nargs="+")(
        "of experiments.fit_codec, a plain one, one in a metric or both; without one only their "
        "rivals"
    )
    what("--head", HEADS, None, "whose output counts; default saliency on the demo's cache")
    what("--images")
    few = f"{len(QUICK_METHODS)} methods, {QUICK_KNOBS} knobs, {QUICK_IMAGES} images"
    what.switch("--quick", f"{few}: a minute and a half")
    where = parser.flags("files and device")
    where("--cache_dir")
    where("--dataset_dir", arguments.folder)(
        f"the cache's pictures, for JPEG and WebP; default {' or '.join(DATA_SETS.values())}"
    )
    where("--results_dir", help="where bytes.json and bytes.png go")
    where("--device")
    return parser


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    head_name = args.head or ("saliency" if dataset.is_demo else None)
    head = load_head(head_name, dataset, device=device) if head_name else None
    rows = test_rows(dataset, args.images or (QUICK_IMAGES if args.quick else None))
    groups = dataset.rows["group"].take(rows).to_pylist()
    footer = f"{dataset.label}; {len(rows)} test images of {len(set(groups))} groups"
    grids = [dataset.grids[row] for row in rows]
    footer += f" and {len(set(grids))} grids" if dataset.ragged else ""
    print(footer + (f"; head {head.name}" if head else "; no head reads these tokens"))
    paths = args.codec or []
    codecs = load_codecs(paths, dataset)
    # every method's statistics are coded by the codec's own coder, where there is a codec
    statistics = CodecStatistics(codecs[0]) if codecs else Statistics()
    methods = every_rival(args, dataset, rows, device, codecs, statistics, head)
    images = [
        TokenImage(row, dataset[[row]][0], grid, statistics)
        for row, grid in zip(rows, grids, strict=True)
    ]
    folder = Path(args.results_dir)
    made = {
        "rows": rows,
        "cache": cache_hashes(dataset),
        "head": head.sha256 if head else None,
        "codecs": [codec.sha256 for codec in codecs],
    }
    done = PartialResults(folder / "bytes.partial.jsonl", made, anew=True)
    if done.records:
        print(f"{len(done.records)} points are already there, in {done.path}")
    measured = measure(methods, images, head, groups, device, done)
    results = {
        "data": dataset.label,
        "split": "test",
        "n_images": len(rows),
        "n_groups": len(set(groups)),
        "head": head.name if head else None,
        "quick": args.quick,
        "codec": describe(paths, codecs, in_metric=False),
        "codec_in_metric": describe(paths, codecs, in_metric=True),
        "methods": {name: summarise_method(points, groups) for name, points in measured.items()},
    }
    results["tables"] = tables(measured, groups)
    print_tables(results["tables"])
    print_retrieval(results["methods"])
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(folder / "bytes.json", results)
    bytes_against_error(folder / "bytes.png", results, footer)
    done.remove()
    print(f"wrote {folder}/bytes.json and bytes.png in {results['seconds']:.0f} s")


def test_rows(dataset: RealQwenVLDataset, most: int | None) -> list[int]:
    """Rows of the test split, or `most` of them at even distances, so that all groups have some."""
    rows = dataset.split.test.tolist()
    if most is None or most >= len(rows):
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


# ----------------------------------------------------------------------------------------- rivals


def load_codecs(paths: list[str], dataset: RealQwenVLDataset) -> list[Codec]:
    """The codecs of --codec; InputError for two of one kind, or one of another width."""
    codecs = [Codec.load(path) for path in paths]
    for path, codec in zip(paths, codecs, strict=True):
        if codec.feature_dim != dataset.feature_dim:
            raise InputError(
                f"--codec {path} codes {codec.feature_dim} features, {dataset.cache_dir} has "
                f"{dataset.feature_dim}: fit one with experiments.fit_codec"
            )
    if len({has_metric(codec) for codec in codecs}) < len(codecs):
        raise InputError("--codec: type one file without a metric, one with a metric, or both")
    return codecs


def describe(paths: list[str], codecs: list[Codec], in_metric: bool) -> dict | None:
    """The JSON's entry of the codec with or without a metric."""
    for path, codec in zip(paths, codecs, strict=True):
        if has_metric(codec) == in_metric:
            size = Path(path).stat().st_size
            return {"file": str(path), "sha256": codec.sha256, "bytes": size}
    return None


def every_rival(
    args: argparse.Namespace,
    dataset: RealQwenVLDataset,
    rows: list[int],
    device: torch.device,
    codecs: list[Codec],
    statistics: Statistics,
    head: TaskHead | None,
) -> list[Rival]:
    """All methods that this cache and these files allow; what is left out is said in one line."""
    grids = [dataset.grids[row] for row in rows]
    shape = (max(map(math.prod, grids)), dataset.feature_dim)
    found: list[Rival] = [
        rivals.Bf16(shape),
        rivals.FactorsQuantised(shape, statistics),
        rivals.FactorsDeflate(shape, statistics),
        rivals.TokensAveraged(shape, max(map(max, grids))),
        rivals.TokensDropped(shape),
    ]
    for codec in codecs:
        found += [
            Coded(codec, shape, statistics),
            KltDct(codec, shape, statistics),
        ]
        if has_metric(codec) and head is not None:
            found.append(CodedHeadSteps(codec, shape, statistics, head, device))
    if head is not None:
        found.append(FactorsHeadSteps(shape, statistics, head, device))
    if args.quick:
        # of a codec in a metric, its four methods in the metric
        found = [rival for rival in found if rival.name.removesuffix("_in_metric") in QUICK_METHODS]
        if any(has_metric(codec) for codec in codecs) and len(codecs) == 1:
            plain = ("factors_quantised", "factors_deflate")
            found = [r for r in found if r.name.endswith("_in_metric") or r.name in plain]
        for rival in found:
            # the coarse quarter of a sweep is seldom looked at, and the finest knob takes longest
            rival.knobs = thinned(rival.knobs[len(rival.knobs) // 4 : -1], QUICK_KNOBS)
        return found
    loader = create_data_loaders_real(dataset, device=device).train
    tokens = sum(math.prod(dataset.grids[row]) for row in dataset.split.train.tolist())
    basis = fit_token_basis(loader.with_progress("basis of training tokens"), tokens)
    found.append(PcaDeflate(shape, basis, statistics))
    return found + picture_rivals(args, dataset, rows, device)


def thinned(knobs, most: int) -> list:
    """At most `most` of the knobs, at even distances, first and last among them."""
    if len(knobs) <= most:
        return list(knobs)
    return [knobs[round(i * (len(knobs) - 1) / (most - 1))] for i in range(most)]


def picture_rivals(
    args: argparse.Namespace, dataset: RealQwenVLDataset, rows: list[int], device: torch.device
) -> list[Rival]:
    """JPEG and WebP of the encoder's input, where the cache's own pictures and encoder are."""
    if dataset.ragged:
        print("note: no JPEG and WebP of a native-resolution cache: use one of --resize stretch")
        return []
    kind = dataset.manifest["kind"]
    folder = Path(args.dataset_dir or DATA_SETS.get(kind, ""))
    if not args.dataset_dir and (kind not in DATA_SETS or not folder.is_dir()):
        print("note: no JPEG and WebP, the cache's pictures are not here: name --dataset_dir")
        return []
    manifest = dataset.manifest
    name = "demo" if dataset.is_demo else manifest["encoder"]["id"]
    from encoders.towers import load_encoder

    encoder = load_encoder(
        name, device=device, image_size=size_in(manifest), resize=manifest["resize"]
    )
    if encoder.weights_sha256 != manifest["encoder"]["weights_sha256"]:
        raise InputError(f"{name} has other weights than the encoder of {dataset.cache_dir}")
    pictures = read_pictures(dataset, rows, folder, encoder)
    shape = (dataset.num_tokens, dataset.feature_dim)
    return [Pictures(form, shape, pictures.__getitem__, encoder) for form in PICTURE_FORMS]


def read_pictures(
    dataset: RealQwenVLDataset, rows: list[int], folder: Path, encoder: VisionEncoder
) -> dict[int, Image.Image]:
    """Row of the cache → picture as the encoder saw it; InputError where it is another one."""
    records = {r: dataset.image_record(r) for r in rows}
    wanted = {record["row_id"]: (row, record) for row, record in records.items()}
    found = {}
    for batch in open_source(folder).batches(16):
        for row_id, entry in batch:
            if row_id not in wanted:
                continue
            row, record = wanted[row_id]
            cell = entry["image"]
            if hashlib.sha256(image_bytes(cell)).hexdigest() != record["image_sha256"]:
                raise InputError(
                    f"--dataset_dir {folder}: the picture of row {row_id} is not the one that "
                    f"{dataset.cache_dir} was made from: name that data set's folder"
                )
            found[row] = encoder.seen(read_image(cell))
    if len(found) < len(rows):
        raise InputError(
            f"--dataset_dir {folder} lacks {len(rows) - len(found)} pictures of "
            f"{dataset.cache_dir}: name the folder that it was made from"
        )
    return found


# ------------------------------------------------------------------------------------ measurement


def measure(
    methods: list[Rival],
    images: list[TokenImage],
    head: TaskHead | None,
    groups: list[str],
    device: torch.device,
    done: PartialResults,
) -> dict[str, list[Point]]:
    """Every method at every knob, from few bytes to many; what is `done` is taken from there."""
    pairs = [(method, knob) for method in methods for knob in method.knobs]
    full = [output(head, image.raw, image.row, device) for image in images]
    found: dict[str, list[Point]] = {method.name: [] for method in methods}
    for method, knob in progress.over(pairs, "bytes and errors", "points"):
        if kept := done.records.get((method.name, knob)):
            values = {k: torch.tensor(v, dtype=torch.float64) for k, v in kept["values"].items()}
            found[method.name].append(Point(knob, kept["shared_bytes"], values))
            continue
        parts, means = [], []
        for image, wanted in zip(images, full, strict=True):
            data = method.encode(image, knob)
            raw = method.decode(data, knob, image.grid)
            parts.append({"bytes": float(len(data)), **errors(raw, image)})
            if head is not None:
                got = output(head, raw, image.row, device)
                parts[-1]["task_error"] = float(head.error(got, wanted))
            means.append(raw.mean(0))
        values = {
            name: torch.tensor([part[name] for part in parts], dtype=torch.float64)
            for name in parts[0]
        }
        values["retrieval"] = nearest_is_kin(torch.stack(means), groups)
        point = Point(knob, method.shared_bytes(knob), values)
        found[method.name].append(point)
        kept = {name: value.tolist() for name, value in values.items()}
        done.add(method.name, {knob: {"shared_bytes": point.shared_bytes, "values": kept}})
    return found


def errors(raw: Tensor, image: TokenImage) -> dict[str, float]:
    """raw_error, and rel_error of the normalised tokens of what was decoded."""
    x, wanted = normalise(raw)[0], normalise(image.raw)[0]
    return {
        "raw_error": float((raw - image.raw).double().norm() / image.raw.double().norm()),
        "rel_error": float((x - wanted).double().norm() / wanted.double().norm()),
    }


@torch.no_grad()
def output(head: TaskHead | None, raw: Tensor, row: int, device: torch.device) -> Tensor | None:
    """The head's output [1, ...] of one image's raw tokens [T, D]."""
    if head is None:
        return None
    return head.outputs(raw[None].to(device), torch.tensor([row], device=device))


def nearest_is_kin(means: Tensor, groups: list[str]) -> Tensor:
    """1 where the nearest other mean token [n, D] by cosine has the same group, else 0: [n].

    NaN for an image that is alone in its group.
    """
    unit = torch.nn.functional.normalize(means.double(), dim=-1)
    near = (unit @ unit.mT).fill_diagonal_(-torch.inf).argmax(-1)
    right = torch.tensor([groups[i] == groups[j] for i, j in enumerate(near.tolist())]).double()
    alone = torch.tensor([groups.count(group) == 1 for group in groups])
    return right.masked_fill(alone, math.nan)


def summarise_method(points: list[Point], groups: list[str]) -> list[dict]:
    """The JSON's entry: knob, shared bytes, and mean, 90th percentile and interval of each."""
    return [
        {"knob": point.knob, "shared_bytes": point.shared_bytes}
        | {
            name: summarise(value) | {"interval_95": interval_95(value, groups)}
            for name, value in point.values.items()
        }
        for point in points
    ]


def print_retrieval(methods: dict[str, list[dict]]) -> None:
    """What a reader that no metric was made for finds, at the fewest bytes of each method."""
    print("nearest mean token is of the same photograph (share of images), from few bytes to many")
    for name, points in methods.items():
        cells = (
            f"{point['retrieval']['mean']:.2f} at {point['bytes']['mean']:,.0f}"
            for point in points
            if point["retrieval"]["mean"] is not None
        )
        print(f"  {name:<28}" + ", ".join(cells))


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
