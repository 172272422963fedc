"""Encode a data set's images into vision tokens, once, as a feature cache.

    python -m experiments.make_demo_data && python extract_features.py --demo
    python extract_features.py --dataset_dir textVQA_groundingtask_bbox
    python extract_features.py --dataset_dir folder_of_jpegs   # plain images
    python extract_features.py --import_pt old_cache   # features_<i>.pt files
    torchrun --nproc_per_node 2 extract_features.py --demo   # two processes

Writes --cache_dir (feature_cache_real/): bfloat16 features [T, D] an image in safetensors shards,
a table of rows (question, answers, box, thumbnail), the singular values of every normalised X, and
last of all manifest.json. Interrupted, the same command goes on with the first missing image.
Several processes write the same bytes as one.
"""

from __future__ import annotations

import argparse
import math
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from PIL import Image

from common import arguments, processes
from encoders import checkpoints
from encoders.extraction import extract, look_at
from encoders.image_sources import ImageSource, open_source
from encoders.native_size import PixelRange
from encoders.pt_import import PtFeatures
from encoders.towers import VisionEncoder, load_encoder
from lowrank_tokens.cache_writer import FeatureCacheWriter, refuse_finished
from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import token_range
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import report_ranks

DEMO_DATA = "demo_data"
DEMO_ENCODER = "demo"
# images of 256 tokens that are encoded at once: of more, a CPU's activations are so large that the
# C library asks the system for pages at every call (the demo's tower: 2 0.37 s an image, 8 0.43 s)
GPU_BATCH, CPU_BATCH = 16, 2
NAMES_SHOWN = 5


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    data = parser.flags("data")
    data("--dataset_dir", arguments.folder)(
        "folder with *.parquet, with data/*.parquet in it, or with images in it and below"
    )
    data("--import_pt", arguments.folder)(
        "take the features of an older cache, features_<i>.pt files, instead of encoding images"
    )
    data.switch("--demo")(
        f"encode {DEMO_DATA}/ (or --dataset_dir) with a small pretrained DINOv2 that the package "
        "index has"
    )
    data("--cache_dir", help="folder to write")
    data.switch("--overwrite", "replace a cache that is there")
    data.switch(
        "--verify", "only check the cache that is there against its hashes, and describe it"
    )
    encoder = parser.flags("encoder")
    encoder("--model", arguments.name, "Qwen/Qwen2.5-VL-3B-Instruct")(
        f"hub id or folder of a checkpoint of {checkpoints.names()}"
    )
    pixels = arguments.Number(int, 28, 4096)
    encoder("--image_size", pixels, 448, "side of the square the encoder sees, pixels")
    encoder("--resize", ("stretch", "pad", "native"), "stretch")(
        "stretch to the square, keep the aspect and pad, or keep aspect and size: larger images "
        "have more tokens"
    )
    area = arguments.Number(int, 28**2, 2**28)
    encoder("--min_pixels", area, 4 * 28**2)(
        "--resize native enlarges smaller images; 784 pixels are a token of Qwen2.5-VL's tower and "
        "of the demo's"
    )
    encoder("--max_pixels", area, 16384 * 28**2, "--resize native shrinks larger images")
    encoder("--batch_size", arguments.size, None)(
        f"images encoded at once, memory against speed: default {GPU_BATCH}, on a CPU {CPU_BATCH}"
    )
    encoder("--batch_tokens", arguments.Number(int, 1, 2**28))(
        "with --resize native in place of --batch_size: tokens encoded at once, or one image that "
        f"has more; default {256 * GPU_BATCH}, on a CPU {256 * CPU_BATCH}"
    )
    encoder("--device")
    return parser


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.verify:
        if processes.is_main():
            print_summary(RealQwenVLDataset(args.cache_dir), verify=True)
        return
    skipped = import_features(args) if args.import_pt else encode_images(args)
    if not processes.is_main():
        return
    print_skipped(skipped)
    print_summary(RealQwenVLDataset(args.cache_dir), verify=False)
    again = arguments.flags_again(args, "cache_dir", "device")
    print(f"next: python train_real_data.py --arch ResMLP{again}")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, by name."""
    if args.verify:
        arguments.refuse_beside(args, "verify", {"cache_dir"})
    if args.import_pt:
        arguments.refuse_beside(args, "import_pt", {"cache_dir", "overwrite"})
    if args.demo and "model" in args.typed:
        raise InputError("--demo brings its own encoder: omit --model")
    square, native = {"image_size", "batch_size"}, {"min_pixels", "max_pixels", "batch_tokens"}
    if args.resize == "native":
        if others := sorted(args.typed & square):
            raise InputError(
                f"--{others[0]} does nothing beside --resize native: type --min_pixels, "
                "--max_pixels and --batch_tokens"
            )
        if args.min_pixels > args.max_pixels:
            raise InputError(
                f"--min_pixels {args.min_pixels} is above --max_pixels {args.max_pixels}: type a "
                "smaller one"
            )
    elif others := sorted(args.typed & native):
        raise InputError(
            f"--{others[0]} does nothing without --resize native: add that, or omit it"
        )


def encode_images(args: argparse.Namespace) -> list[dict]:
    """Make the cache from images; returns the rows that cannot be read."""
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
    with processes.sole_writer(args.cache_dir, "--cache_dir"):
        return write_cache(args, rows, encoder, device)


def check_enough(flag: str, images: int) -> None:
    """Refuse what cannot be split, before the work is done."""
    if images < 3:
        raise InputError(
            f"{flag} has {images} image(s): training, validation and test need at least 3 "
            "different ones"
        )


def write_cache(
    args: argparse.Namespace, rows: ImageSource, encoder: VisionEncoder, device: torch.device
) -> list[dict]:
    """Fill --cache_dir, from where it was left; returns the rows that cannot be read."""
    looks = look_at(rows, encoder)
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
        f"{demo}{len(rows)} rows, encoder {encoder.id} on {device}: "
        f"{token_range(grids)} tokens × {encoder.feature_dim} an image"
    )
    for note in rows.notes:
        print(f"note: {note}")
    if writer.rows_done:
        print(f"going on after {writer.rows_done} images that {args.cache_dir} already holds")
    tokens = args.batch_size * encoder.num_tokens if encoder.grid else args.batch_tokens
    extract(rows, encoder, writer, looks, tokens)
    return writer.finish(encoder_folder=encoder.folder) if processes.is_main() else []


def import_features(args: argparse.Namespace) -> list[dict]:
    """Make the cache from --import_pt's files; returns what is missing or damaged."""
    features = PtFeatures(args.import_pt)
    check_enough("--import_pt", len(features))
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
            for shard in processes.deal(writer.shards_to_do()):
                row_ids = [features.row_ids[i] for i in writer.rows_of(shard)]
                tokens = torch.stack([features[i].to(torch.bfloat16) for i in row_ids])
                writer.write_shard(shard, tokens, [features.record(i) for i in row_ids], [])
                bar.update(len(row_ids))
        return writer.finish(features.skipped) if processes.is_main() else []


def find_rows(args: argparse.Namespace) -> ImageSource:
    """The rows that --dataset_dir or --demo name. Raises InputError where there are none."""
    if args.dataset_dir is None and not args.demo:
        raise InputError("--dataset_dir is missing: name the data set's folder, or type --demo")
    try:
        return open_source(args.dataset_dir or DEMO_DATA)
    except InputError as error:
        if args.dataset_dir:
            raise
        raise InputError(f"{error}: run experiments.make_demo_data first") from None


def cache_header(encoder: VisionEncoder, rows: ImageSource) -> dict:
    """What identifies the features: another value of any of these is another cache.

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
    """What identifies imported features: their values, since nothing is known of their encoder."""
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
    """One screen: what the cache holds and how well rank r could do on it."""
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
    for entry in manifest.get("notes", []):
        print(f"  note       {entry['note']}: {count_rows(entry)}")
    megabytes = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    many = f"{len(set(dataset.grids))} grids, most often " if dataset.ragged else "grid "
    shape = f"{token_range(dataset.grids)} × {dataset.feature_dim}, {manifest['dtype']}"
    files = f"{len(manifest['shards'])} shards, {megabytes:.0f} MB"
    print(f"  tokens     {shape}, {many}{dataset.grid[0]} × {dataset.grid[1]}; {files}")
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
