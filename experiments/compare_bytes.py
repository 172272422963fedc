"""Compare every way to write an image's tokens at equal bytes, by readers with labels.

    python -m experiments.compare_bytes --codec codecs/demo-dinov2-vits14.safetensors --quick
    python -m experiments.compare_bytes --folds 5   # hours; every scene once, all fitted anew

Writes bytes.json and bytes.png to --results_dir: real bytes of an image against raw_error, the
task error of a head, and what readers with labels see (heads/readers.py), each method's one knob
swept. Everything is fitted on training images; the images that are measured are only measured.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from common import arguments
from common.codecs import codec_for_cache
from common.results import keep_other_caches_results
from encoders.demo_weights import DEMO_ENCODER_ID
from encoders.image_sources import image_bytes, open_source, read_image
from encoders.native_size import size_in
from experiments import rivals
from experiments.bytes_tables import Point, only_images, print_tables, summarise_point, tables
from experiments.coded_rivals import CodecStatistics, Coded, CodedTransform
from experiments.head_steps import CodedHeadSteps, FactorsHeadSteps
from experiments.partial_results import PartialResults
from experiments.rivals import PICTURE_FORMS, Pictures, Rival, Statistics, TokenImage
from figures.bytes_against_error import bytes_against_error
from heads.load_head import HEADS, load_head
from heads.metric import MomentSum, shrunk
from heads.readers import PROBE_TOKENS, VIEW_COLUMNS, Readers, fit_readers
from heads.task_head import TaskHead
from lowrank_tokens import progress
from lowrank_tokens.codec import Codec
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import load_tensors, save_tensors, write_json
from lowrank_tokens.grids import Grid, batches_of_one_grid, most_frequent
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset, create_data_loaders_real
from training.unseen import fitted_images, images_of, rows_seen, unseen_test

if TYPE_CHECKING:
    from encoders.towers import VisionEncoder

QUICK_IMAGES, QUICK_PROBE_TOKENS = 24, 12_000
PUBLISHED_ROWS = 4370  # of the TextVQA grounding data set: a table shares the codec file by them
FEW_KNOBS = 5  # of a method in --folds; --quick leaves out the finest
# of each method, about 0.6 to 20 kB an image, or what it has of that: bytes of 8 validation images
# of the demo, one of each scene
FEW: dict[str, tuple] = {
    "coded": (5.6, 2.8, 1.4, 0.7, 0.35),
    "coded_in_metric": (16.0, 5.6, 2.8, 1.4, 0.5),
    "coded_in_metric_head_steps": (8.0, 4.0, 2.0),  # seconds an image
    "transform": (5.6, 2.8, 1.4, 0.7, 0.35),
    "transform_in_metric": (16.0, 5.6, 2.8, 1.4, 0.5),
    "factors_quantised": (2, 4, 8, 16, 32),
    "factors_head_steps": (8, 16, 32),
    "factors_deflate": (16.0, 8.0, 4.0, 2.0, 1.0),
    "pca_deflate": (4, 8, 16, 32, 64),
    "tokens_averaged": (8, 6, 4, 3, 2),
    "tokens_dropped": (2, 4, 8, 16, 32),
    "jpeg": (5, 10, 15, 30, 50),
    "webp": (5, 10, 15, 30, 50),
    "avif": (5, 10, 15, 30, 50),
}
CROPS = 2  # of a group, that a fold measures and that a probe is fitted to as decoded
TRAINED_AT = (1500, 5000)  # bytes an image, near which a probe is fitted to decoded tokens
TRAINED_IMAGES = 200  # at most, of all training images alike
TIMED = 2  # images whose reading is timed at each knob
FOLDS_SEED = 42
# of a fold's own metric: 25 images with one probe give a validation task error of 0.0463, 200 with
# three 0.0455 (docs/measured.md), and three take a third of an hour a fold
METRIC_PROBES, METRIC_SHRINKAGE = 1, 1e-2
DATA_SETS = {"demo": "demo_data", "real": "textVQA_groundingtask_bbox"}


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what is compared")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--codec",
        type=arguments.file,
        nargs="+",
        metavar="FILE",
        help="codecs of experiments.fit_codec: a plain one, one in a metric, or both. Without one "
        "only their rivals are compared",
    )
    either.add_argument(
        "--folds",
        type=arguments.Number(int, 3, 20),
        metavar="N",
        help=f"measure every group once, {CROPS} images of each, in N parts; codec, metric, "
        "rivals' tables and probe are fitted anew to the other parts, at least two. Takes hours, "
        "resumes",
    )
    group.add_argument(
        "--head",
        choices=HEADS,
        help="head whose output counts; default saliency on the demo's cache, else none",
    )
    group.add_argument(
        "--images",
        type=arguments.positive_int,
        metavar="N",
        help="test images to measure, of all groups alike; default all",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help=f"5 methods, {FEW_KNOBS - 1} knobs, {QUICK_IMAGES} images: a minute",
    )
    group = parser.add_argument_group("files and device")
    arguments.add_cache_dir(group)
    group.add_argument(
        "--dataset_dir",
        type=arguments.folder,
        metavar="DIR",
        help="the cache's pictures, for JPEG, WebP and AVIF; default "
        f"{' or '.join(DATA_SETS.values())}",
    )
    arguments.add_results_dir(group, help="where bytes.json and bytes.png go")
    arguments.add_device(group)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.folds and args.quick:
        raise InputError("--quick does nothing beside --folds: omit one of them")
    folder = Path(args.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".bytes.lock")
    try:
        with lock.acquire(timeout=0):
            compare(args, folder)
    except Timeout:
        raise InputError(
            f"--results_dir {folder}: another compare_bytes writes bytes.json there: wait for it, "
            "or name another folder"
        ) from None


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Measure all parts, make the tables, and write bytes.json and bytes.png."""
    started = time.perf_counter()
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    of_demo = dataset.manifest["encoder"]["id"] == DEMO_ENCODER_ID
    head_name = args.head or ("saliency" if of_demo else None)
    head = load_head(head_name, dataset, device=device) if head_name else None
    paths = args.codec or []
    codecs = load_codecs(paths, dataset)
    parts, left_out = chosen_parts(dataset, codecs, args)
    rows = [row for part in parts for row in part.test]
    groups = dataset.rows["group"].take(rows).to_pylist()
    footer = footer_of(dataset, rows, args.folds, left_out)
    print(footer + (f"; head {head.name}" if head else "; no --head judges"))

    # every method at every knob, in each part
    setting = Setting(
        dataset=dataset,
        head=head,
        codecs=None if args.folds else codecs,
        towers=Towers(args, dataset, rows, device, folder / "bytes.towers"),
        device=device,
        quick=args.quick,
    )
    done = partial_results(folder / "bytes.partial.jsonl", setting, codecs, parts)
    measured: dict[str, list[Point]] = {}
    for number, part in enumerate(parts):
        points, readers = measure_part(part, f"part {number}", setting, done)
        measured = joined(measured, points)

    # tables
    headline = in_headline(dataset, groups)
    results = {
        "data": dataset.label,
        "cache_sha256": dataset.content_sha256,
        "split": f"{args.folds} folds" if args.folds else "test",
        "n_images": sum(headline),
        "n_groups": len({g for g, is_in in zip(groups, headline, strict=True) if is_in}),
        "head": head.name if head else None,
        "quick": args.quick,
        "left_out": left_out,
        "codec": describe(paths, codecs, in_metric=False),
        "codec_in_metric": describe(paths, codecs, in_metric=True),
        "notes": readers.notes(),
        "chance": readers.chance(),
    }
    shared_by = len(dataset), PUBLISHED_ROWS
    results |= summarised(measured, groups, headline, shared_by)
    if not all(headline):
        everyone = [True] * len(groups)
        results["all_groups"] = {"n_images": len(groups), "n_groups": len(set(groups))}
        results["all_groups"] |= summarised(measured, groups, everyone, shared_by)
    print_tables(results, shared_by)
    for note in results["notes"]:
        print(f"note: {note}")

    # files
    results["seconds"] = round(time.perf_counter() - started, 1)
    keep_other_caches_results(folder / "bytes.json", ["bytes.png"], dataset.content_sha256)
    write_json(folder / "bytes.json", results)
    shown = [row for row, is_in in zip(rows, headline, strict=True) if is_in]
    footer = footer_of(dataset, shown, args.folds, left_out)
    bytes_against_error(folder / "bytes.png", results, footer)
    done.remove()
    setting.towers.remove()
    print(f"wrote {folder}/bytes.json and bytes.png in {results['seconds']:.0f} s")


def footer_of(dataset: RealQwenVLDataset, rows: list[int], folds: int | None, left_out: str) -> str:
    """Name the data and the images that are measured, for the first line and the figure."""
    groups = set(dataset.rows["group"].take(rows).to_pylist())
    images = f"{len(rows)} {'held-out' if folds else 'test'} images of {len(groups)} groups"
    grids = {dataset.grids[row] for row in rows}
    images += f" and {len(grids)} grids" if dataset.ragged else ""
    return "; ".join(filter(None, [dataset.label, images, left_out]))


def partial_results(
    path: Path, setting: Setting, codecs: list[Codec], parts: list[Part]
) -> PartialResults:
    """Open the points that an interrupted run of the same inputs has left; begin anew if others."""
    made = {
        "cache": setting.dataset.content_sha256,
        "head": setting.head.sha256 if setting.head else None,
        "codecs": [codec.identity for codec in codecs],
        "quick": setting.quick,
        "parts": [list(part) for part in parts],
    }
    done = PartialResults(path, made, anew=True)
    if done.records:
        print(f"{len(done.records)} points are already there, in {done.path}")
    return done


def in_headline(dataset: RealQwenVLDataset, groups: list[str]) -> list[bool]:
    """Say of which groups the headline is: not of the split's validation groups.

    Constants of the methods were chosen on those.
    """
    chosen_on = set(dataset.rows["group"].take(dataset.split.val.tolist()).to_pylist())
    return [group not in chosen_on for group in groups]


def summarised(
    measured: dict[str, list[Point]],
    groups: list[str],
    images: list[bool],
    shared_by: tuple[int, ...],
) -> dict:
    """Return methods, full_tokens and tables of those images."""
    kept = [group for group, is_in in zip(groups, images, strict=True) if is_in]
    points = {name: [only_images(p, images) for p in own] for name, own in measured.items()}
    methods = {name: [summarise_point(p, kept) for p in own] for name, own in points.items()}
    return {
        "methods": methods,
        "full_tokens": methods["bf16"][0],
        "tables": tables(points, kept, shared_by),
    }


def joined(one: dict[str, list[Point]], other: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """Return the points of two parts' images, one after the other; `one` may be empty."""
    if not one:
        return other
    return {
        name: [a.with_images_of(b) for a, b in zip(points, other[name], strict=True)]
        for name, points in one.items()
    }


# ------------------------------------------------------------------------------------------ images


class Part(NamedTuple):
    """Rows that are measured, and those that everything is fitted on."""

    train: list[int]
    validation: list[int]
    test: list[int]


def chosen_parts(
    dataset: RealQwenVLDataset, codecs: list[Codec], args: argparse.Namespace
) -> tuple[list[Part], str]:
    """Return the folds, or the split as one part; and in words which test images are left out."""
    if args.folds:
        return fold_parts(dataset, args.folds, args.images), ""
    part, left_out = split_part(dataset, codecs, args)
    return [part], left_out


def split_part(
    dataset: RealQwenVLDataset, codecs: list[Codec], args: argparse.Namespace
) -> tuple[Part, str]:
    """Return the split, without test images that codec or probe have seen, and that in words."""
    split = dataset.split
    fitted = {"probe": fitted_images(dataset)}
    for codec in codecs:
        fitted["codec in a metric" if codec.in_metric else "codec"] = codec.seen
    judged = unseen_test(create_data_loaders_real(dataset), fitted)
    rows = judged.loaders.test.sampler.rows.tolist()
    most = args.images or (QUICK_IMAGES if args.quick else None)
    part = Part(split.train.tolist(), split.val.tolist(), spread(rows, most))
    return part, judged.words


def fold_parts(dataset: RealQwenVLDataset, folds: int, images: int | None) -> list[Part]:
    """Return parts that measure every group once, CROPS rows of it.

    Part k fits on the groups of the other folds; those of fold k + 1 are its validation images.
    """
    names = list(dict.fromkeys(dataset.rows["group"].to_pylist()))
    if len(names) < 3 * folds:
        raise InputError(f"--folds {folds}: {len(names)} groups are too few, type fewer folds")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(FOLDS_SEED))
    fold_of = {names[i]: place % folds for place, i in enumerate(order.tolist())}
    rows_of: list[list[int]] = [[] for _ in range(folds)]
    for row, group in enumerate(dataset.rows["group"].to_pylist()):
        rows_of[fold_of[group]].append(row)
    parts = []
    for k, own in enumerate(rows_of):
        after = (k + 1) % folds
        train = [row for i, rows in enumerate(rows_of) if i not in (k, after) for row in rows]
        # one file may be in two groups
        known = images_of(dataset, torch.tensor(train + rows_of[after]))
        seen = rows_seen(known | {"group": []}, dataset, torch.tensor(own)).tolist()
        test = [row for row, is_seen in zip(own, seen, strict=True) if not is_seen]
        test = spread(few_of_each_group(dataset, test), images and -(-images // folds))
        parts.append(Part(train, rows_of[after], test))
    return parts


def few_of_each_group(dataset: RealQwenVLDataset, rows: list[int]) -> list[int]:
    """Return CROPS of the rows of each group: of one photograph, where the cache says which."""
    known = set(VIEW_COLUMNS) <= set(dataset.rows.column_names)
    photographs = dataset.rows["photograph"].to_pylist() if known else None
    groups = dataset.rows["group"].to_pylist()
    of_group: dict[str, list[int]] = {}
    for row in rows:
        of_group.setdefault(groups[row], []).append(row)
    chosen = []
    for own in of_group.values():
        if photographs:
            own = [row for row in own if photographs[row] == photographs[own[0]]]
        chosen += spread(own, CROPS)
    return chosen


def spread(rows: list[int], most: int | None) -> list[int]:
    """Return the rows, or `most` of them at even distances, so that all groups have some."""
    if most is None or most >= len(rows):
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


# ----------------------------------------------------------------------------------------- methods


def load_codecs(paths: list[str], dataset: RealQwenVLDataset) -> list[Codec]:
    """Return the codecs of --codec. Raises InputError where one does not fit, or two are alike."""
    codecs = [codec_for_cache(path, dataset) for path in paths]
    if len({codec.in_metric for codec in codecs}) < len(codecs):
        raise InputError("--codec: type one file without a metric, one with a metric, or both")
    return codecs


def describe(paths: list[str], codecs: list[Codec], in_metric: bool) -> dict | None:
    """Return the JSON's entry of the codec with or without a metric."""
    for path, codec in zip(paths, codecs, strict=True):
        if codec.in_metric == in_metric:
            size = Path(path).stat().st_size
            return {"file": str(path), "sha256": codec.sha256, "bytes": size}
    return None


def fit_codecs(
    part: Part, dataset: RealQwenVLDataset, head: TaskHead | None, device: torch.device
) -> list[Codec]:
    """Fit a fold's codecs to its training images: a plain one and, with a head, one in its metric.

    The metric is that of METRIC_PROBES probes, shrunk by METRIC_SHRINKAGE.
    """
    parts = list(batches_of_one_grid(part.train, dataset.grids, 8))

    def batches() -> Iterator[tuple[Tensor, Grid]]:
        for rows in progress.over(parts, "fit a codec", "batches"):
            yield dataset[rows].to(device), dataset.grids[rows[0]]

    grid = most_frequent([dataset.grids[row] for row in part.train])
    codecs = [Codec.fit(batches, grid=grid)]
    if head:
        moment = MomentSum()
        loader = BatchLoader(dataset, torch.tensor(part.train), 8, device)
        for batch in loader.with_progress("gradients of the head"):
            moment.add(head, batch, METRIC_PROBES, FOLDS_SEED)
        metric = shrunk(moment.mean(head), METRIC_SHRINKAGE)
        codecs.append(Codec.fit(batches, grid=grid, metric=metric))
    return codecs


@dataclass
class Setting:
    """The objects that all parts share. codecs: None where each part fits its own."""

    dataset: RealQwenVLDataset
    head: TaskHead | None
    codecs: list[Codec] | None
    towers: Towers
    device: torch.device
    quick: bool


def every_method(
    part: Part, setting: Setting, codecs: list[Codec], statistics: Statistics
) -> list[Rival]:
    """Return all methods that this cache and these codecs allow, fitted to training images."""
    dataset, head, device, towers = setting.dataset, setting.head, setting.device, setting.towers
    grids = dataset.grids
    shape = (max(map(math.prod, grids)), dataset.feature_dim)
    methods: list[Rival] = [
        rivals.Bf16(shape),
        rivals.FactorsQuantised(shape, statistics),
        rivals.FactorsDeflate(shape, statistics),
    ]
    for codec in codecs:
        methods += [Coded(codec, shape, statistics), CodedTransform(codec, shape, statistics)]
    if setting.quick:
        return methods
    if head is not None:
        in_metric = [codec for codec in codecs if codec.in_metric]
        methods += [CodedHeadSteps(c, shape, statistics, head, device) for c in in_metric]
        methods.append(FactorsHeadSteps(shape, statistics, head, device))
    loader = BatchLoader(dataset, torch.tensor(part.train), 8, device)
    tokens = sum(math.prod(grids[row]) for row in part.train)
    basis = rivals.fit_token_basis(loader.with_progress("basis of training tokens"), tokens)
    methods += [
        rivals.PcaDeflate(shape, basis, statistics),
        rivals.TokensAveraged(shape, max(map(max, grids))),
        rivals.TokensDropped(shape),
    ]
    if encoder := towers.encoder:
        methods += [Pictures(form, shape, towers.picture, encoder) for form in PICTURE_FORMS]
    return methods


class Towers:
    """The encoder of a cache with its pictures, and its outputs for coded ones, kept in a folder.

    encoder: None where the cache's pictures or their size are not at hand; a note says so.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        dataset: RealQwenVLDataset,
        rows: list[int],
        device: torch.device,
        kept: Path,
    ) -> None:
        self.encoder: VisionEncoder | None = None
        self.kept, self.dataset = kept, dataset
        if args.quick:
            return
        if dataset.ragged:
            print("note: no picture codecs of a native-resolution cache: use --resize stretch")
            return
        manifest = dataset.manifest
        kind = manifest["kind"]
        self.folder = Path(args.dataset_dir or DATA_SETS.get(kind, ""))
        if not args.dataset_dir and (kind not in DATA_SETS or not self.folder.is_dir()):
            print(
                "note: no JPEG, WebP, AVIF: the cache's pictures are not here, name --dataset_dir"
            )
            return
        from encoders.towers import load_encoder

        # a checkpoint in a folder is found there, one of the hub by its id
        name = manifest.get("encoder_folder") or manifest["encoder"]["id"]
        self.encoder = load_encoder(
            name, device=device, image_size=size_in(manifest), resize=manifest["resize"]
        )
        if self.encoder.weights_sha256 != manifest["encoder"]["weights_sha256"]:
            raise InputError(f"{name} has other weights than the encoder of {dataset.cache_dir}")
        self.pictures = read_pictures(dataset, rows, self.folder, self.encoder)
        kept.mkdir(exist_ok=True)

    def picture(self, row: int) -> Image.Image:
        """Return the picture of a row as the encoder resized it."""
        if row not in self.pictures:
            self.pictures |= read_pictures(self.dataset, [row], self.folder, self.encoder)
        return self.pictures[row]

    def decoded(self, method: Rival, data: bytes, knob: rivals.Knob, grid: Grid) -> Tensor:
        """Return raw tokens [T, D] float32 of `data`; the encoder runs once for each picture file.

        What the encoder gives is kept as a cache keeps it, in bfloat16.
        """
        if not method.needs_tower:
            return method.decode(data, knob, grid)
        encoder = self.encoder.weights_sha256 + self.encoder.preprocessor
        key = hashlib.sha256(encoder.encode() + data).hexdigest()
        path = self.kept / f"{key[:32]}.safetensors"
        if path.exists():
            return load_tensors(path, f"remove {self.kept}")["tokens"].float()
        tokens = method.decode(data, knob, grid).bfloat16()
        save_tensors(path, {"tokens": tokens}, {})
        return tokens.float()

    def remove(self) -> None:
        """Remove the folder: everything is measured."""
        if self.kept.exists():
            for path in self.kept.iterdir():
                path.unlink()
            self.kept.rmdir()


def read_pictures(
    dataset: RealQwenVLDataset, rows: list[int], folder: Path, encoder: VisionEncoder
) -> dict[int, Image.Image]:
    """Return row of the cache → picture as the encoder saw it; InputError where it is another."""
    records = {r: dataset.image_record(r) for r in rows}
    wanted = {record["row_id"]: (row, record) for row, record in records.items()}
    pictures = {}
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
            pictures[row] = encoder.seen(read_image(cell))
    if len(pictures) < len(rows):
        raise InputError(
            f"--dataset_dir {folder} lacks {len(rows) - len(pictures)} pictures of "
            f"{dataset.cache_dir}: name the folder that it was made from"
        )
    return pictures


# ------------------------------------------------------------------------------------ measurement


def measure_part(
    part: Part, stage: str, setting: Setting, done: PartialResults
) -> tuple[dict[str, list[Point]], Readers]:
    """Return every method's points on the part's test images, and the readers that judged them.

    What is `done` of this stage is taken from there.
    """
    dataset, quick = setting.dataset, setting.quick
    tokens = QUICK_PROBE_TOKENS if quick else PROBE_TOKENS
    readers = fit_readers(dataset, part.train, part.validation, part.test, tokens)
    codecs = setting.codecs
    if codecs is None:
        codecs = fit_codecs(part, dataset, setting.head, setting.device)
    # every method's statistics are coded by the codec's own coder, where there is a codec
    statistics = CodecStatistics(codecs[0]) if codecs else Statistics()
    methods = every_method(part, setting, codecs, statistics)
    if quick or setting.codecs is None:
        for method in methods:
            known = [knob for knob in FEW.get(method.name, ()) if knob in method.knobs]
            method.knobs = known or thinned(method.knobs, FEW_KNOBS)
            if quick and len(method.knobs) == FEW_KNOBS:
                method.knobs = method.knobs[:-1]
    measurement = Measurement(part, setting, readers, statistics)
    points: dict[str, list[Point]] = {method.name: [] for method in methods}
    pairs = [(method, knob) for method in methods for knob in method.knobs]
    for method, knob in progress.over(pairs, "bytes and errors", "points"):
        key = f"{stage} {method.name}"
        if (key, knob) not in done.records:
            done.add(key, {knob: measurement.point(method, knob).as_json()})
        points[method.name].append(Point.from_json(knob, done.records[key, knob]))
    if not quick and readers.probe:
        # tokens that were moved for one head are nobody's cache, and head steps take seconds
        caches = [m for m in methods if not isinstance(m, CodedHeadSteps | FactorsHeadSteps)]
        trained = [(method, knob) for method in caches for knob in trained_knobs(method, points)]
        for method, knob in progress.over(trained, "probes of decoded tokens", "points"):
            key = f"{stage} {method.name} trained"
            if (key, knob) not in done.records:
                values = measurement.precision_trained(method, knob)
                done.add(key, {knob: {"values": values.tolist()}})
            point = points[method.name][list(method.knobs).index(knob)]
            values = torch.tensor(done.records[key, knob]["values"], dtype=torch.float64)
            point.values["box_precision_trained"] = values
    return points, readers


def thinned(knobs, most: int) -> list:
    """Return at most `most` of the knobs, at even distances, first and last among them."""
    if len(knobs) <= most:
        return list(knobs)
    return [knobs[round(i * (len(knobs) - 1) / (most - 1))] for i in range(most)]


def trained_knobs(method: Rival, points: dict[str, list[Point]]) -> list:
    """Return the knobs with mean bytes nearest to TRAINED_AT, each once."""
    sizes = [math.log(float(point.values["bytes"].mean())) for point in points[method.name]]
    nearest = {
        min(range(len(sizes)), key=lambda i, at=at: abs(sizes[i] - math.log(at)))
        for at in TRAINED_AT
    }
    return [method.knobs[i] for i in sorted(nearest)]


class Measurement:
    """Measures one method at one knob on the test images of a part."""

    def __init__(
        self, part: Part, setting: Setting, readers: Readers, statistics: Statistics
    ) -> None:
        self.dataset, self.head, self.towers = setting.dataset, setting.head, setting.towers
        self.readers, self.statistics, self.device = readers, statistics, setting.device
        self.images = [self.image(row) for row in part.test]
        self.full = [output(self.head, image.raw, image.row, self.device) for image in self.images]
        trained = [row for row in readers.train if readers.boxes[row]]
        self.trained = spread(few_of_each_group(self.dataset, trained), TRAINED_IMAGES)

    def image(self, row: int) -> TokenImage:
        return TokenImage(row, self.dataset[[row]][0], self.dataset.grids[row], self.statistics)

    def point(self, method: Rival, knob: rivals.Knob) -> Point:
        """Return bytes, errors, and what the head and the readers make of it, of each image."""
        records, streams = [], []

        def decoded() -> Iterator[Tensor]:
            for image, wanted in zip(self.images, self.full, strict=True):
                data = method.encode(image, knob)
                raw = self.towers.decoded(method, data, knob, image.grid)
                records.append({"bytes": float(len(data)), **errors(raw, image)})
                if self.head is not None:
                    got = output(self.head, raw, image.row, self.device)
                    records[-1]["task_error"] = float(self.head.error(got, wanted))
                if len(streams) < TIMED:
                    streams.append((data, image.grid))
                yield raw

        scores = self.readers.scores(decoded())
        values = {
            name: torch.tensor([record[name] for record in records], dtype=torch.float64)
            for name in records[0]
        }
        read_ms = milliseconds_to_read(method, knob, streams)
        return Point(knob, method.shared_bytes(knob), method.needs_tower, read_ms, values | scores)

    def precision_trained(self, method: Rival, knob: rivals.Knob) -> Tensor:
        """Return the precision on full tokens of a probe fitted to decoded training tokens, [n]."""

        def decoded() -> Iterator[Tensor]:
            for row in self.trained:
                image = self.image(row)
                data = method.encode(image, knob)
                yield self.towers.decoded(method, data, knob, image.grid)

        return self.readers.precision_trained_on(self.trained, decoded())


def milliseconds_to_read(
    method: Rival, knob: rivals.Knob, streams: list[tuple[bytes, Grid]]
) -> float:
    """Return the mean time of one core to decode a stream, encoder included where it is needed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        for data, grid in streams:
            method.decode(data, knob, grid)
        return 1e3 * (time.process_time() - started) / len(streams)
    finally:
        torch.set_num_threads(threads)


def errors(raw: Tensor, image: TokenImage) -> dict[str, float]:
    """Return raw_error, and rel_error of the normalised tokens, of what was decoded."""
    x, wanted = normalise(raw)[0], normalise(image.raw)[0]
    return {
        "raw_error": float((raw - image.raw).double().norm() / image.raw.double().norm()),
        "rel_error": float((x - wanted).double().norm() / wanted.double().norm()),
    }


@torch.no_grad()
def output(head: TaskHead | None, raw: Tensor, row: int, device: torch.device) -> Tensor | None:
    """Return the head's output [1, ...] of one image's raw tokens [T, D]; None without a head."""
    if head is None:
        return None
    return head.outputs(raw[None].to(device), torch.tensor([row], device=device))


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
