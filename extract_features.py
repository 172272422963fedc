"""Encode a data set's images into vision tokens, once, as a feature cache.

    python make_demo_data.py && python extract_features.py --demo        # minutes on two CPU cores
    python extract_features.py --dataset_dir textVQA_groundingtask_bbox  # Qwen2.5-VL-3B's tower

Writes --cache_dir (feature_cache_real/): bfloat16 features [T, D] an image in safetensors shards,
a table of rows (question, answers, box, thumbnail), the singular values of every normalised X, and
last of all manifest.json. Interrupted, the same command goes on with the first missing image.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from PIL import Image
from tqdm import tqdm

import cli
from cli import UserError
from encoders import VisionEncoder, load_encoder, resize_image
from feature_cache import FeatureCacheWriter
from locks import sole_writer
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import optimum, report_ranks

THUMBNAIL_SIZE = 224  # pixels, both sides
DEMO_DATA = "demo_data"
DEMO_ENCODER = "demo"


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Encode images into a feature cache of vision tokens.",
        epilog="example:\n  python make_demo_data.py && python extract_features.py --demo",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_dir", type=cli.folder,
                      help="folder with *.parquet, or data/*.parquet in it")  # fmt: skip
    data.add_argument("--demo", action="store_true",
                      help=f"encode {DEMO_DATA}/ (or --dataset_dir) with a small pretrained DINOv2 "
                      "that the package index has")  # fmt: skip
    data.add_argument("--cache_dir", type=cli.folder, default="feature_cache_real",
                      help="folder to write")  # fmt: skip
    data.add_argument("--overwrite", action="store_true", help="replace a cache that is there")
    data.add_argument("--verify", action="store_true", help="only check the cache that is there "
                      "against its hashes and print what it holds")  # fmt: skip
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--model", type=cli.name, default="Qwen/Qwen2.5-VL-3B-Instruct",
                         help="hub id or folder")  # fmt: skip
    encoder.add_argument("--image_size", type=cli.number(int, 28, 4096), default=448,
                         help="side of the square the encoder sees, pixels")  # fmt: skip
    encoder.add_argument("--resize", choices=("stretch", "pad"), default="stretch",
                         help="stretch to the square, or keep the aspect and pad")  # fmt: skip
    encoder.add_argument("--batch_size", type=cli.number(int, 1, 65536), default=16,
                         help="images encoded at once: memory against speed")  # fmt: skip
    encoder.add_argument(
        "--device", type=cli.name, default="auto", help="auto, cpu, cuda or cuda:N"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.verify:
        cli.refuse_beside(args, "verify", {"cache_dir"})
        print_summary(RealQwenVLDataset(args.cache_dir), verify=True)
        return
    if args.demo and "model" in args.typed:
        raise UserError("--demo brings its own encoder: leave --model or --demo away")
    rows = DatasetRows(find_parquet(args))
    if len(rows) < 3:
        raise UserError(f"--dataset_dir has {len(rows)} image(s): training, validation and test "
                        "need at least 3 different ones")  # fmt: skip
    device = cli.pick_device(args.device)
    encoder = load_encoder(
        DEMO_ENCODER if args.demo else args.model,
        device=device,
        image_size=args.image_size,
        resize=args.resize,
    )
    with sole_writer(args.cache_dir, "--cache_dir"):
        write_cache(args, rows, encoder, device)


def write_cache(
    args: argparse.Namespace, rows: DatasetRows, encoder: VisionEncoder, device: torch.device
) -> None:
    """Fill --cache_dir, from where it was left, and print what it holds."""
    writer = FeatureCacheWriter(args.cache_dir, cache_header(args, encoder, rows), args.overwrite)
    demo = "DEMO data, " if is_demo(args, rows) else ""
    print(
        f"{demo}{len(rows)} rows, encoder {encoder.id} on {device}: "
        f"{encoder.num_tokens} tokens × {encoder.feature_dim} an image"
    )
    if writer.rows_done:
        print(f"going on after {writer.rows_done} images that {args.cache_dir} already holds")
    skipped = extract(rows, encoder, writer, args.batch_size)
    writer.finish(skipped)
    for entry in skipped:
        print(f"skipped row {entry['row_id']}: {entry['reason']}")
    print_summary(RealQwenVLDataset(args.cache_dir), verify=False)
    print("next: python train_real_data.py --arch ResMLP")


def extract(
    rows: DatasetRows, encoder: VisionEncoder, writer: FeatureCacheWriter, batch_size: int
) -> list[dict]:
    """Encode all rows that the writer has not got yet; returns the unreadable ones.

    While the encoder works on a batch, a thread decodes and preprocesses the next. An image that
    came before (the same bytes) is not encoded again.
    """
    skipped: list[dict] = []
    position_of = {sha: i for i, sha in enumerate(writer.image_hashes())}
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=len(rows), unit="image", desc="encode", mininterval=1) as bar,
    ):
        # rows before the first missing one are decoded only where they may have been unreadable
        batches = rows.batches(batch_size)
        pending = pool.submit(_prepare, next(batches, []), encoder, writer.last_row_id)
        while batch := pending.result():
            pending = pool.submit(_prepare, next(batches, []), encoder, writer.last_row_id)
            skipped += [{"row_id": s.row_id, "reason": s.reason} for s in batch if s.reason]
            todo = [s for s in batch if not s.reason and s.row_id > writer.last_row_id]
            fresh = {s.record["image_sha256"]: s.pixels for s in todo}
            fresh = {sha: pixels for sha, pixels in fresh.items() if sha not in position_of}
            if fresh:
                encoded = encoder.encode(torch.stack(list(fresh.values()))).to(
                    "cpu", torch.bfloat16
                )
                features = dict(zip(fresh, encoded, strict=True))
            for sample in todo:
                sha = sample.record["image_sha256"]
                known = sha in position_of
                tokens = writer.features_of(position_of[sha]) if known else features[sha]
                position_of.setdefault(sha, writer.count)
                writer.append(tokens.unsqueeze(0), [sample.record])
            bar.update(len(batch))
    return skipped


class Sample(NamedTuple):
    """One row on its way to the encoder; `reason` says why it cannot be read."""

    row_id: int
    record: dict | None
    pixels: torch.Tensor | None
    reason: str | None


def _prepare(batch: list[tuple[int, dict]], encoder: VisionEncoder, last_done: int) -> list[Sample]:
    return [_prepare_row(row_id, row, encoder, last_done) for row_id, row in batch]


def _prepare_row(row_id: int, row: dict, encoder: VisionEncoder, last_done: int) -> Sample:
    try:
        data = (row["image"] or {}).get("bytes")
        if data is None:
            raise ValueError("no image bytes")
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # what Pillow raises for damaged files; the row is listed in the manifest, without the
        # address of a buffer, which would make two manifests of the same data differ
        reason = str(error).partition(" <_io.BytesIO")[0]
        return Sample(row_id, None, None, f"unreadable image: {reason}")
    if row_id <= last_done:
        return Sample(row_id, None, None, None)
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
    return Sample(row_id, record, encoder.preprocess(image), None)


class DatasetRows:
    """Rows of a data set's parquet files, in file order, read as they are needed."""

    needed = ("image", "question", "answer", "bbox")

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        try:
            parquets = [pq.ParquetFile(f) for f in files]
            self.counts = [p.metadata.num_rows for p in parquets]
            schema = parquets[0].schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"--dataset_dir: a parquet file is damaged ({error})") from None
        self.columns = schema.names
        kind = (schema.metadata or {}).get(b"kind", b"real")
        if kind not in (b"real", b"demo"):
            raise UserError(f"{files[0]} is damaged (its kind is {kind!r}): copy it again")
        self.kind = kind.decode()
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
            file = pq.ParquetFile(path, page_checksum_verification=True)
            chunks = file.iter_batches(batch_size, columns=columns)
            while rows := _next_rows(chunks, path):
                yield list(enumerate(rows, start=row_id))
                row_id += len(rows)


def _next_rows(chunks: Iterator[pa.RecordBatch], path: Path) -> list[dict]:
    """Rows of the next chunk, none at the end. Raises UserError where the file is damaged."""
    try:
        chunk = next(chunks, None)
        return [] if chunk is None else chunk.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"--dataset_dir: {path} is damaged ({error}): copy it again") from None


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
    cli.run(main, get_args_parser())
