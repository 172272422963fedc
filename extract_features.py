"""Encode a data set's images into vision tokens, once, as a feature cache.

    python -m experiments.make_demo_data && python extract_features.py --demo
    python extract_features.py --dataset_dir textVQA_groundingtask_bbox
    python extract_features.py --dataset_dir folder_of_jpegs   # plain images
    python extract_features.py --import_features tensors --encoder_id my-vit   # your own encoder's
    python extract_features.py --import_pt old_cache   # features_<i>.pt files
    torchrun --nproc_per_node 2 extract_features.py --demo   # two processes

Writes --cache_dir (feature_cache_real/): bfloat16 features [T, D] an image in safetensors shards,
a table of rows (question, answers, box, thumbnail), the singular values of every normalised X, and
last of all manifest.json. Interrupted, the same command goes on with the first missing image.
Several processes write the same features as one.
"""

from __future__ import annotations

import argparse
import math
import warnings
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from PIL import Image

from common import arguments, processes
from encoders import checkpoints
from encoders.extraction import Look, extract, look_at
from encoders.feature_import import FeatureFiles
from encoders.image_sources import ImageSource, open_source
from encoders.native_size import PixelRange
from encoders.pt_import import PtFeatures
from encoders.towers import VisionEncoder, load_encoder
from lowrank_tokens import progress
from lowrank_tokens.cache_writer import FeatureCacheWriter, refuse_finished, write_cache
from lowrank_tokens.errors import energy_note, optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import token_range
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import report_ranks

DEMO_DATA = "demo_data"
DEMO_ENCODER = "demo"
# images of 256 tokens that are encoded at once: of more, a CPU's activations are so large that the
# C library asks the system for pages at every call (the demo's tower: 2 0.37 s an image, 8 0.43 s)
GPU_BATCH, CPU_BATCH = 16, 2
TOKEN_PIXELS = 28**2  # a token of Qwen2.5-VL's tower and of the demo's
# tokens of the largest image with --resize native: the published processor's, and as many as the
# demo's position table has entries, beyond which its CPU would take minutes an image
MOST_TOKENS, DEMO_MOST_TOKENS = 16384, 37**2
LEAST_GROUPS = 3  # training, validation and test
NAMES_SHOWN = 5
ENERGY_IMAGES = 64  # that the summary looks at


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_dir",
        type=arguments.folder,
        metavar="DIR",
        help="images to encode: a folder with *.parquet or data/*.parquet (columns image, "
        "question, answer, bbox, group), or with image files in it and below",
    )
    group.add_argument(
        "--demo",
        action="store_true",
        help=f"encode {DEMO_DATA}/ (or --dataset_dir) with a small pretrained DINOv2 that the "
        "package index has; nothing is downloaded from a model hub",
    )
    group.add_argument(
        "--import_features",
        type=arguments.folder,
        metavar="DIR",
        help="take tokens that your own encoder made, from .pt, .npy and .safetensors files of one "
        "image [T, D] or many [n, T, D]; needs --encoder_id",
    )
    group.add_argument(
        "--import_pt",
        type=arguments.folder,
        metavar="DIR",
        help="take the features of an older cache, one file features_<i>.pt an image",
    )
    arguments.add_cache_dir(group, "folder to write, or to check with --verify")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the cache in --cache_dir; without it the same command goes on where an "
        "earlier one stopped",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="check every file of the cache against its hash, describe it, and write nothing",
    )

    group = parser.add_argument_group("imported tokens")
    group.add_argument(
        "--encoder_id",
        type=arguments.name,
        metavar="NAME",
        help="name of the encoder that made them; a network or codec trained on one cache serves "
        "every other of the same name and width",
    )
    group.add_argument(
        "--grid",
        type=arguments.positive_int,
        nargs=2,
        metavar=("H", "W"),
        help="rows and columns of every image's tokens, in raster order; default a square where T "
        "is one",
    )
    group.add_argument(
        "--drop_tokens",
        type=arguments.non_negative_int,
        default=0,
        metavar="N",
        help="leave out the first N tokens of each image: class and register tokens, which have "
        "no place on the grid",
    )

    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--model",
        type=arguments.name,
        default="Qwen/Qwen2.5-VL-3B-Instruct",
        metavar="NAME",
        help=f"hub id or folder of a checkpoint of {checkpoints.names()}; only its vision tower is "
        "fetched and loaded",
    )
    group.add_argument(
        "--image_size",
        type=arguments.Number(int, 28, 4096),
        default=448,
        metavar="N",
        help="side, in pixels, of the square that the encoder sees: T grows with its square",
    )
    group.add_argument(
        "--resize",
        choices=("stretch", "pad", "native"),
        default="stretch",
        help="stretch to the square, keep the aspect ratio and pad, or keep aspect ratio and size: "
        "then larger images have more tokens, and each image its own grid",
    )
    area = arguments.Number(int, TOKEN_PIXELS, 2**28)
    group.add_argument(
        "--min_pixels",
        type=area,
        default=4 * TOKEN_PIXELS,
        metavar="N",
        help=f"with --resize native: enlarge images of fewer pixels; {TOKEN_PIXELS} pixels are one "
        "token of Qwen2.5-VL's tower and of the demo's",
    )
    group.add_argument(
        "--max_pixels",
        type=area,
        metavar="N",
        help="with --resize native: shrink images of more pixels; memory and time grow with the "
        f"tokens, attention with their square; default {MOST_TOKENS} tokens, with --demo "
        f"{DEMO_MOST_TOKENS}",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        metavar="N",
        help=f"images encoded at once, memory against speed; default {GPU_BATCH}, on a CPU "
        f"{CPU_BATCH}",
    )
    group.add_argument(
        "--batch_tokens",
        type=arguments.Number(int, 1, 2**28),
        metavar="N",
        help="with --resize native in place of --batch_size: tokens encoded at once, or one image "
        f"that has more; default {256 * GPU_BATCH}, on a CPU {256 * CPU_BATCH}",
    )
    arguments.add_device(group)
    return parser


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.verify:
        if processes.is_main():
            print_summary(RealQwenVLDataset(args.cache_dir), verify=True)
        return
    if args.import_features:
        skipped = import_tokens(args)
    elif args.import_pt:
        skipped = import_pt(args)
    else:
        skipped = encode_images(args)
    if not processes.is_main():
        return
    print_skipped(skipped)
    print_summary(RealQwenVLDataset(args.cache_dir), verify=False)
    again = arguments.flags_again(args, "cache_dir", "device")
    print(f"next: python train_real_data.py --arch ResMLP{again}")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do nothing beside, or without, another one."""
    imported = {"encoder_id", "grid", "drop_tokens"}
    modes = {
        "verify": {"cache_dir"},
        "import_pt": {"cache_dir", "overwrite"},
        "import_features": {"cache_dir", "overwrite"} | imported,
    }
    for mode, used in modes.items():
        if mode in args.typed:
            arguments.refuse_beside(args, mode, used)
    native = args.resize == "native"
    of_native = {"min_pixels", "max_pixels", "batch_tokens"}
    useless = {
        "beside --demo, which brings its own encoder": {"model"} if args.demo else set(),
        "beside --resize native: type --min_pixels, --max_pixels and --batch_tokens": (
            {"image_size", "batch_size"} if native else set()
        ),
        "without --resize native: add that, or omit it": set() if native else of_native,
        "without --import_features: add that, or omit it": (
            set() if args.import_features else imported
        ),
    }
    for words, flags in useless.items():
        if typed := sorted(args.typed & flags):
            raise InputError(f"--{typed[0]} does nothing {words}")
    if args.import_features and not args.encoder_id:
        raise InputError("--import_features needs --encoder_id: name the encoder of the tokens")
    if args.max_pixels is None:
        args.max_pixels = TOKEN_PIXELS * (DEMO_MOST_TOKENS if args.demo else MOST_TOKENS)
    if native and args.min_pixels > args.max_pixels:
        raise InputError(
            f"--min_pixels {args.min_pixels} is above --max_pixels {args.max_pixels}: type a "
            "smaller one"
        )


def encode_images(args: argparse.Namespace) -> list[dict]:
    """Make the cache from images. Returns the rows that were skipped, with their reasons."""
    rows = find_rows(args)
    check_enough("--dataset_dir", len(rows))
    device = arguments.pick_device(args.device)
    images = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    args.batch_size = args.batch_size or images
    args.batch_tokens = args.batch_tokens or 256 * images
    if not (args.overwrite or args.demo or Path(args.model).is_dir()):
        # before gigabytes are fetched from a hub
        refuse_finished(Path(args.cache_dir), but_of=args.model)
    native = args.resize == "native"
    encoder = load_encoder(
        DEMO_ENCODER if args.demo else args.model,
        device=device,
        image_size=PixelRange(args.min_pixels, args.max_pixels) if native else args.image_size,
        resize=args.resize,
    )
    looks = look_at(rows, encoder)
    check_enough("--dataset_dir", len({look.group for look in looks} - {None}))
    with processes.sole_writer(args.cache_dir, "--cache_dir"):
        return fill_cache(args, rows, encoder, looks)


def check_enough(flag: str, images: int) -> None:
    """Refuse what cannot be split, before the work is done."""
    if images < LEAST_GROUPS:
        raise InputError(
            f"{flag} has {images} different image(s), or groups of them: training, validation and "
            f"test need at least {LEAST_GROUPS}"
        )


def fill_cache(
    args: argparse.Namespace, rows: ImageSource, encoder: VisionEncoder, looks: list[Look]
) -> list[dict]:
    """Fill --cache_dir from where it was left. Returns the rows that were skipped."""
    grids = [look.grid for look in looks]
    batch = "batch_size" if encoder.grid else "batch_tokens"
    with processes.main_first():
        writer = FeatureCacheWriter(
            args.cache_dir,
            cache_header(encoder, rows),
            len(rows),
            overwrite=args.overwrite and processes.is_main(),
            conditions={**encoder.conditions(), f"--{batch}": getattr(args, batch)},
            most_tokens=max(map(math.prod, grids)),
        )
    demo = "DEMO data, " if rows.kind == "demo" else ""
    print(
        f"{demo}{len(rows)} rows, encoder {encoder.id} on {encoder.device}: "
        f"{token_range(grids)} tokens × {encoder.feature_dim} an image, "
        f"{sum(map(math.prod, grids))} tokens in all"
    )
    for note in rows.notes:
        print(f"note: {note}")
    if writer.rows_done:
        print(f"going on after {writer.rows_done} images that {args.cache_dir} already holds")
    tokens = args.batch_size * encoder.num_tokens if encoder.grid else args.batch_tokens
    try:
        extract(rows, encoder, writer, looks, tokens)
    except KeyboardInterrupt:
        print_how_to_go_on(args, writer)
        raise
    if not processes.is_main():
        return []
    return writer.finish(encoder_folder=encoder.folder, least_groups=LEAST_GROUPS)


def print_how_to_go_on(args: argparse.Namespace, writer: FeatureCacheWriter) -> None:
    """Say what an interrupted run has kept, and what to type."""
    kept = f"{writer.rows_done} of {writer.num_rows} images are in {args.cache_dir}"
    command = "the same command without --overwrite" if args.overwrite else "the same command"
    print(f"{kept}: go on with {command}")


def import_tokens(args: argparse.Namespace) -> list[dict]:
    """Make the cache from --import_features' files. Returns what was skipped."""
    files = FeatureFiles(args.import_features, args.grid, args.drop_tokens)
    check_enough("--import_features", len(files))
    if processes.is_main():
        print(f"{len(files)} images in {files.num_files} files, stored in bfloat16")
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                # of a square grid: the summary notes it
                write_cache(
                    args.cache_dir,
                    progress.over(files, "import", "images"),
                    encoder_id=args.encoder_id,
                    overwrite=args.overwrite,
                    least_groups=LEAST_GROUPS,
                )
        except KeyboardInterrupt:
            print("go on with the same command, without --overwrite")
            raise
    processes.barrier()
    return RealQwenVLDataset(args.cache_dir).manifest["skipped"]


def import_pt(args: argparse.Namespace) -> list[dict]:
    """Make the cache from --import_pt's files. Returns what is missing or damaged."""
    features = PtFeatures(args.import_pt)
    check_enough("--import_pt", features.num_different)
    header = import_header(features)
    kinds = ", ".join(f"{count} in {name}" for name, count in features.dtypes.items())
    with processes.sole_writer(args.cache_dir, "--cache_dir"):
        with processes.main_first():
            overwrite = args.overwrite and processes.is_main()
            writer = FeatureCacheWriter(args.cache_dir, header, len(features), overwrite)
        print(
            f"{len(features)} files ({kinds}): {features.num_tokens} tokens × "
            f"{features.feature_dim} an image, stored in bfloat16"
        )
        with processes.Progress(len(features), "import", writer.rows_done) as bar:
            for shard in processes.own_part(writer.shards_to_do()):
                row_ids = [features.row_ids[i] for i in writer.rows_of(shard)]
                tokens = torch.stack([features[i].to(torch.bfloat16) for i in row_ids])
                writer.write_shard(shard, tokens, [features.record(i) for i in row_ids], [])
                bar.update(len(row_ids))
        return writer.finish(features.skipped) if processes.is_main() else []


def find_rows(args: argparse.Namespace) -> ImageSource:
    """Return the rows that --dataset_dir or --demo name. Raises InputError where there are none."""
    if args.dataset_dir is None and not args.demo:
        raise InputError("--dataset_dir is missing: name the data set's folder, or type --demo")
    try:
        return open_source(args.dataset_dir or DEMO_DATA)
    except InputError as error:
        if args.dataset_dir:
            raise
        raise InputError(f"{error}: run experiments.make_demo_data first") from None


def cache_header(encoder: VisionEncoder, rows: ImageSource) -> dict:
    """Return what identifies the features: another value of any of these is another cache.

    In the order in which a difference is reported: what a user typed before what follows from it.
    """
    revision = {"revision": encoder.revision} if encoder.revision else {}
    fixed, limits = {}, {}
    if encoder.limits:
        limits = {"min_pixels": encoder.limits.least, "max_pixels": encoder.limits.most}
    else:
        fixed = {"num_tokens": encoder.num_tokens, "grid": list(encoder.grid)}
    return {
        "kind": rows.kind,  # of the data: the encoder says for itself what it is
        "dataset_sha256": rows.sha256,
        "image_size": encoder.image_size,
        "resize": encoder.resize,
        **limits,
        "encoder": {
            "id": encoder.id,
            **revision,
            "weights_sha256": encoder.weights_sha256,
            "preprocessor": encoder.preprocessor,
        },
        "feature_dim": encoder.feature_dim,
        **fixed,
        "split_by": rows.split_by,
        "versions": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "pillow": Image.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def import_header(features: PtFeatures) -> dict:
    """Return what identifies imported features: their values, as their encoder is not known."""
    side = math.isqrt(features.num_tokens)
    square = side**2 == features.num_tokens
    return {
        "kind": "imported",
        "encoder": {"id": "imported features", "features_sha256": features.sha256},
        "image_size": None,
        "resize": None,
        "num_tokens": features.num_tokens,
        "feature_dim": features.feature_dim,
        # square images give square grids in raster order; of others only the order is known
        "grid": [side, side] if square else [1, features.num_tokens],
        "split_by": "row",
        "split_note": "no image hashes: each row is a group of its own, except that rows whose "
        "features are equal stay together",
        "imported_dtypes": features.dtypes,
        "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
    }


def print_skipped(skipped: list[dict]) -> None:
    for entry in skipped[:NAMES_SHOWN]:
        print(f"skipped row {entry['row_id']}: {entry['reason']}")
    if len(skipped) > NAMES_SHOWN:
        print(f"and {len(skipped) - NAMES_SHOWN} more, all of them in manifest.json")


def count_rows(entry: dict) -> str:
    """Say how many rows a note of the manifest is about, and which is the first."""
    if entry["rows"] == 1:
        return f"row {entry['first_row_id']}"
    return f"{entry['rows']} rows, the first is row {entry['first_row_id']}"


def print_summary(dataset: RealQwenVLDataset, verify: bool) -> None:
    """Print one screen: what the cache holds, and how well rank r could do on it."""
    if verify and (damaged := dataset.verify()):
        name, reason = next(iter(damaged.items()))
        others = f", and {len(damaged) - 1} more files are damaged" if len(damaged) > 1 else ""
        raise InputError(
            f"{dataset.cache_dir / name} {reason}{others}: extract again with --overwrite"
        )
    manifest = dataset.manifest
    print(dataset.label)
    hashes = set(dataset.rows["image_sha256"].to_pylist())
    images = "images not known" if None in hashes else f"of {len(hashes)} different images"
    skipped = sum(entry.get("count", 1) for entry in manifest["skipped"])
    print(f"  rows       {len(dataset)}, {images}; {skipped} skipped as unreadable or missing")
    for entry in manifest["notes"]:
        print(f"  note       {entry['note']}: {count_rows(entry)}")
    megabytes = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    many = f"{len(set(dataset.grids))} grids, most often " if dataset.ragged else "grid "
    shape = f"{token_range(dataset.grids)} × {dataset.feature_dim}, {manifest['dtype']}"
    files = f"{len(manifest['shards'])} shards, {megabytes:.0f} MB"
    print(f"  tokens     {shape}, {many}{dataset.grid[0]} × {dataset.grid[1]}; {files}")
    some = torch.linspace(0, len(dataset) - 1, min(ENERGY_IMAGES, len(dataset))).round().long()
    if note := energy_note(dataset[[row]][0] for row in some.tolist()):
        print(f"  note       {note}")
    encoder = manifest["encoder"]
    print("  encoder    " + ", ".join(encoder[k] for k in ("id", "preprocessor") if k in encoder))
    groups = dataset.rows["group"].to_pylist()
    parts = {name: getattr(dataset.split, name).tolist() for name in ("train", "val", "test")}
    sizes = [
        f"{name} {len(part)} rows in {len({groups[row] for row in part})} groups"
        for name, part in parts.items()
    ]
    print(f"  split      by {manifest['split_by']}: {', '.join(sizes)}")
    if "split_note" in manifest:
        print(f"             {manifest['split_note']}")
    if dataset.spectra_are_known:
        ranks = report_ranks(min(dataset.num_tokens, dataset.feature_dim))[:-1]
        best = "  ".join(f"{r}: {optimum(dataset.singular_values, r).mean():.4f}" for r in ranks)
        print(f"  optimum    mean rel_error at rank  {best}")
    else:
        print("  optimum    not known yet: singular values are computed where they are needed")
    if verify:
        print("the cache is whole: every file matches its sha256, every feature is finite")
    else:
        print(f"wrote {dataset.cache_dir}/manifest.json")


if __name__ == "__main__":
    processes.run(main, get_args_parser())
