"""Encode a data set's images into vision tokens, once, as a feature cache.

    python make_demo_data.py && python extract_features.py --demo        # minutes on two CPU cores
    python extract_features.py --dataset_dir textVQA_groundingtask_bbox  # Qwen2.5-VL-3B's tower

Writes --cache_dir (feature_cache_real/): bfloat16 features [T, D] an image in safetensors shards,
a table of rows (question, answers, box, thumbnail), the singular values of every normalised X, and
last of all manifest.json. Interrupted, the same command goes on with the first missing image.
`torchrun --nproc_per_node N extract_features.py …` encodes in N processes, into the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import dropwhile, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from PIL import Image, UnidentifiedImageError

import cli
import distributed
from cli import UserError
from encoders import VisionEncoder, load_encoder, resize_image
from feature_cache import ROWS_PER_SHARD, FeatureCacheWriter
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import optimum, report_ranks

THUMBNAIL_SIZE = 224  # pixels, both sides
DEMO_DATA = "demo_data"
DEMO_ENCODER = "demo"


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Encode images into a feature cache of vision tokens.",
        epilog="examples:\n  python make_demo_data.py && python extract_features.py --demo\n"
        "  torchrun --nproc_per_node 2 extract_features.py --demo   # two processes",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_dir", help="folder with *.parquet, or data/*.parquet in it")
    data.add_argument("--demo", action="store_true",
                      help=f"encode {DEMO_DATA}/ (or --dataset_dir) with a small pretrained DINOv2 "
                      "that the package index has")  # fmt: skip
    data.add_argument("--cache_dir", default="feature_cache_real", help="folder to write")
    data.add_argument("--overwrite", action="store_true", help="replace a cache that is there")
    data.add_argument("--verify", action="store_true", help="only check the cache that is there "
                      "against its hashes and print what it holds")  # fmt: skip
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
    encoder.add_argument("--image_size", type=cli.number(int, 28, 4096), default=448,
                         help="side of the square the encoder sees, pixels")  # fmt: skip
    encoder.add_argument("--resize", choices=("stretch", "pad"), default="stretch",
                         help="stretch to the square, or keep the aspect and pad")  # fmt: skip
    encoder.add_argument("--batch_size", type=cli.number(int, 1), default=16,
                         help="images encoded at once: memory against speed")  # fmt: skip
    encoder.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.verify:
        if distributed.is_main():
            print_summary(RealQwenVLDataset(args.cache_dir), verify=True)
        return
    if args.demo and "model" in args.typed:
        raise UserError("--demo brings its own encoder: leave --model or --demo away")
    rows = DatasetRows(find_parquet(args))
    device = cli.pick_device(args.device)
    encoder = load_encoder(
        DEMO_ENCODER if args.demo else args.model,
        device=device,
        image_size=args.image_size,
        resize=args.resize,
    )
    with distributed.main_first():
        overwrite = args.overwrite and distributed.is_main()
        header = cache_header(args, encoder, rows)
        writer = FeatureCacheWriter(args.cache_dir, header, len(rows), overwrite)
    demo = "DEMO data, " if is_demo(args, rows) else ""
    print(
        f"{demo}{len(rows)} rows, encoder {encoder.id} on {device}: "
        f"{encoder.num_tokens} tokens × {encoder.feature_dim} an image"
    )
    if writer.rows_done:
        print(f"going on after {writer.rows_done} images that {args.cache_dir} already holds")
    extract(rows, encoder, writer, args.batch_size)
    if not distributed.is_main():
        return
    for entry in writer.finish():
        print(f"skipped row {entry['row_id']}: {entry['reason']}")
    print_summary(RealQwenVLDataset(args.cache_dir), verify=False)
    print("next: python train_real_data.py --arch ResMLP")


def extract(
    rows: DatasetRows, encoder: VisionEncoder, writer: FeatureCacheWriter, batch_size: int
) -> None:
    """Encode and write the shards that are missing, each of them in one of the processes.

    While the encoder works on a batch, a thread decodes and preprocesses the next. Images with the
    same bytes are encoded once, where they come first. Batches begin anew with each shard: bits
    do not depend on where a run was interrupted, nor on the number of processes.
    """
    first_of = first_rows(rows)
    to_do = batches_to_do(rows, writer, batch_size)
    options = {"unit": "image", "desc": "encode", "mininterval": 1}
    options["disable"] = not distributed.is_main()
    samples: list[Sample] = []  # of the shard that is being made
    encoded: dict[int, torch.Tensor] = {}  # row → its features [T, D]
    with (
        distributed.Progress(len(rows), writer.rows_done, **options) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        batch = next(to_do, None)
        pending = pool.submit(prepare, batch, encoder, first_of)
        while batch is not None:
            shard, prepared, batch = batch.shard, pending.result(), next(to_do, None)
            pending = pool.submit(prepare, batch, encoder, first_of)
            samples += prepared
            if fresh := [s for s in prepared if s.pixels is not None]:
                features = encoder.encode(torch.stack([s.pixels for s in fresh]))
                features = features.to("cpu", torch.bfloat16)
                encoded |= zip((s.row_id for s in fresh), features, strict=True)
            if batch is None or batch.shard != shard:
                write_samples(writer, shard, samples, encoded)
                samples, encoded = [], {}
            bar.update(len(prepared))


def first_rows(rows: DatasetRows) -> dict[str, int]:
    """The first row of each different image, by the SHA-256 of its bytes."""
    first: dict[str, int] = {}
    for batch in rows.batches(ROWS_PER_SHARD):
        for row_id, row in batch:
            if (data := image_bytes(row)) is not None:
                first.setdefault(hashlib.sha256(data).hexdigest(), row_id)
    return first


class Batch(NamedTuple):
    shard: int
    rows: list[tuple[int, dict]]  # row number in the data set, row


def batches_to_do(
    rows: DatasetRows, writer: FeatureCacheWriter, batch_size: int
) -> Iterator[Batch]:
    """Batches of the shards that this process has to make; no batch is of two shards."""
    every = (row for batch in rows.batches(ROWS_PER_SHARD) for row in batch)
    for shard in distributed.deal(writer.shards_to_do()):
        wanted = writer.rows_of(shard)
        here = dropwhile(lambda row, first=wanted.start: row[0] < first, every)
        for first in range(0, len(wanted), batch_size):
            yield Batch(shard, list(islice(here, min(batch_size, len(wanted) - first))))


def write_samples(
    writer: FeatureCacheWriter, shard: int, samples: list[Sample], encoded: dict[int, torch.Tensor]
) -> None:
    """Write a shard; an image that came in an earlier shard gets its features from there."""
    readable = [s for s in samples if s.reason is None]
    features = [
        encoded[s.first] if s.first in encoded else writer.features_of(s.first) for s in readable
    ]
    writer.write_shard(
        shard,
        torch.stack(features) if features else torch.empty(0),
        [s.record for s in readable],
        [{"row_id": s.row_id, "reason": s.reason} for s in samples if s.reason],
    )


class Sample(NamedTuple):
    """One row on its way to the encoder; `reason` says why it cannot be read."""

    row_id: int
    first: int | None  # the first row with the same image: itself where it has to be encoded
    record: dict | None
    pixels: torch.Tensor | None  # where it has to be encoded
    reason: str | None


def prepare(batch: Batch | None, encoder: VisionEncoder, first_of: dict[str, int]) -> list[Sample]:
    rows = batch.rows if batch else []
    return [_prepare_row(row_id, row, encoder, first_of) for row_id, row in rows]


def _prepare_row(
    row_id: int, row: dict, encoder: VisionEncoder, first_of: dict[str, int]
) -> Sample:
    try:
        data = image_bytes(row)
        if data is None:
            raise ValueError("no image bytes")
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # what Pillow raises for damaged files; the row is listed in the manifest
        unknown = isinstance(error, UnidentifiedImageError)  # whose words hold a memory address
        reason = "no image format that Pillow knows" if unknown else error
        return Sample(row_id, None, None, None, f"unreadable image: {reason}")
    sha = hashlib.sha256(data).hexdigest()
    thumbnail = io.BytesIO()
    resize_image(image, THUMBNAIL_SIZE, encoder.resize).save(thumbnail, "JPEG", quality=85)
    record = {
        "row_id": row_id,
        "group": row.get("group") or sha,
        "image_sha256": sha,
        "question": row["question"],
        "answers": row["answer"],
        "bbox": row["bbox"],
        "width": width,
        "height": height,
        "thumbnail": thumbnail.getvalue(),
    }
    first = first_of[sha]
    pixels = encoder.preprocess(image) if first == row_id else None
    return Sample(row_id, first, record, pixels, None)


def image_bytes(row: dict) -> bytes | None:
    return (row["image"] or {}).get("bytes")


class DatasetRows:
    """Rows of a data set's parquet files, in file order, read as they are needed."""

    needed = ("image", "question", "answer", "bbox")

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        try:
            parquets = [pq.ParquetFile(f) for f in files]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"--dataset_dir: a parquet file is damaged ({error})") from None
        self.counts = [p.metadata.num_rows for p in parquets]
        schema = parquets[0].schema_arrow
        self.columns = schema.names
        self.kind = (schema.metadata or {}).get(b"kind", b"real").decode()
        missing = [name for name in self.needed if name not in self.columns]
        if missing:
            raise UserError(f"{files[0]} lacks the column(s) {', '.join(missing)}")
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return sum(self.counts)

    def batches(self, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
        """Lists of (row number in the data set, row as a dict)."""
        row_id = 0
        columns = [c for c in (*self.needed, "group") if c in self.columns]
        for path in self.files:
            for chunk in pq.ParquetFile(path).iter_batches(batch_size, columns=columns):
                rows = chunk.to_pylist()
                yield list(enumerate(rows, start=row_id))
                row_id += len(rows)


def find_parquet(args: argparse.Namespace) -> list[Path]:
    """Parquet files of the data set. Raises UserError where there is none."""
    if args.dataset_dir is None and not args.demo:
        raise UserError("--dataset_dir is missing: name the data set's folder, or type --demo")
    folder = Path(args.dataset_dir or DEMO_DATA)
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not files:
        make = ": run make_demo_data.py first" if args.demo else ""
        raise UserError(f"--dataset_dir {folder} has no *.parquet and no data/*.parquet{make}")
    return files


def is_demo(args: argparse.Namespace, rows: DatasetRows) -> bool:
    """Whether images or encoder are the demo's, which the cache and all made from it must say."""
    return args.demo or args.model == DEMO_ENCODER or rows.kind == "demo"


def cache_header(args: argparse.Namespace, encoder: VisionEncoder, rows: DatasetRows) -> dict:
    """What identifies the features: another value of any of these is another cache."""
    return {
        "kind": "demo" if is_demo(args, rows) else "real",
        "encoder": {
            "id": encoder.id,
            "weights_sha256": encoder.weights_sha256,
            "preprocessor": encoder.preprocessor,
        },
        "dataset_sha256": rows.sha256,
        "image_size": encoder.image_size,
        "resize": encoder.resize,
        "num_tokens": encoder.num_tokens,
        "feature_dim": encoder.feature_dim,
        "grid": list(encoder.grid),
        "split_by": "group" if "group" in rows.columns else "image",
        "versions": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "pillow": Image.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def print_summary(dataset: RealQwenVLDataset, verify: bool) -> None:
    """One screen: what the cache holds and how well rank r could do on it."""
    if verify and (damaged := dataset.verify()):
        raise UserError(
            f"{dataset.cache_dir}: {', '.join(damaged)} does not match its sha256: extract again "
            "with --overwrite"
        )
    split = dataset.split
    print(dataset.label + (", every file matches its sha256" if verify else ""))
    groups = dataset.rows["group"].to_pylist()
    for name in ("train", "val", "test"):
        rows = getattr(split, name)
        count = len({groups[row] for row in rows.tolist()})
        print(f"  {name:5} {len(rows):5} images in {count:4} groups")
    skipped = len(dataset.manifest["skipped"])
    print(f"  skipped {skipped} unreadable images")
    ranks = report_ranks(dataset.singular_values.shape[1])[:-1]
    best = "  ".join(f"{r}: {optimum(dataset.singular_values, r).mean():.4f}" for r in ranks)
    print(f"  optimum rel_error at rank  {best}")
    print(f"wrote {dataset.cache_dir}/manifest.json" if not verify else "the cache is whole")


if __name__ == "__main__":
    distributed.run(main, get_args_parser())
