"""Small synthetic inputs for tests of faults: caches of any tokens, and a data set with an encoder.

Nothing here is presented as a result: these are tokens to break things with, in a moment each.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from encoders.towers import VisionEncoder
from experiments import make_demo_data
from lowrank_tokens.cache_writer import FeatureCacheWriter
from qwenvl_dataloader import RealQwenVLDataset


def steep_tokens(n: int, t: int = 16, d: int = 48, seed: int = 0) -> Tensor:
    """[n, t, d] float32 with singular values that fall by three decades."""
    generator = torch.Generator().manual_seed(seed)
    core = min(t, d)
    left = torch.randn(n, t, core, generator=generator)
    right = torch.randn(n, core, d, generator=generator)
    return left * torch.logspace(1, -2, core) @ right


def jpeg(seed: int = 0, size: tuple[int, int] = (20, 16)) -> bytes:
    """Return a small photograph-like image, JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def header(t: int, d: int) -> dict:
    """Return what extract_features.py would say of such a cache."""
    return {
        "kind": "real",
        "encoder": {"id": "tiny", "weights_sha256": "0" * 64, "preprocessor": "none"},
        "dataset_sha256": "0" * 64,
        "image_size": 28,
        "resize": "stretch",
        "num_tokens": t,
        "feature_dim": d,
        "grid": [t, 1],
        "split_by": "image",
        "versions": {},
    }


def row(i: int, group: str | None = None) -> dict:
    """Return a row of a cache."""
    return {
        "row_id": i,
        "group": group or f"group {i}",
        "image_sha256": hashlib.sha256(str(i).encode()).hexdigest(),
        "question": "what?",
        "answers": ["that"],
        "bbox": [2.0, 2.0, 5.0, 5.0],
        "width": 20,
        "height": 16,
        "thumbnail": jpeg(),
    }


def begin_cache(folder: str | Path, features: Tensor, **options) -> FeatureCacheWriter:
    """Open the writer of a cache of `features` [n, T, D], each image a group of its own."""
    return FeatureCacheWriter(folder, header(*features.shape[1:]), len(features), **options)


def write_shards(writer: FeatureCacheWriter, features: Tensor, leave: int = 0) -> None:
    """Write what is missing of the cache, but for the last `leave` shards."""
    to_do = writer.shards_to_do()
    for shard in to_do[: len(to_do) - leave]:
        rows = writer.rows_of(shard)
        writer.write_shard(shard, features[rows.start : rows.stop], [row(i) for i in rows], [])


def write_cache(folder: str | Path, features: Tensor) -> Path:
    """Write a whole cache of `features`."""
    writer = begin_cache(folder, features)
    write_shards(writer, features)
    writer.finish()
    return Path(folder)


GRIDS = [(8, 8), (6, 8), (8, 8), (4, 5), (8, 6)]


def write_ragged(folder: Path, square: RealQwenVLDataset) -> Path:
    """Write a cache of several grids: of image i the upper left GRIDS[i % 5] of its tokens.

    Width, height and box become those of that part of the photograph; its thumbnail is cut too.
    """
    names = ("num_tokens", "grid", "image_size", "resize", "format", "dtype", "count", "groups")
    names += ("shards", "rows", "singular_values", "skipped", "content_sha256", "encoder_folder")
    header = {key: value for key, value in square.manifest.items() if key not in names}
    limits = {"min_pixels": 4 * 28**2, "max_pixels": 64 * 28**2, "resize": "native"}
    writer = FeatureCacheWriter(folder, header | limits, len(square))
    for shard in writer.shards_to_do():
        images, rows = [], []
        for i in writer.rows_of(shard):
            grid = GRIDS[i % len(GRIDS)]
            images.append(
                square[[i]][0].unflatten(0, square.grid)[: grid[0], : grid[1]].flatten(0, 1)
            )
            rows.append(part_of_row(square, i, grid))
        writer.write_shard(shard, images, rows, [])
    writer.finish()
    return folder


def part_of_row(square: RealQwenVLDataset, i: int, grid: tuple[int, int]) -> dict:
    """Return what the row of the upper left `grid` of image i says."""
    record, whole = square.image_record(i), square.thumbnail(i)
    down, across = grid[0] / square.grid[0], grid[1] / square.grid[1]
    file = io.BytesIO()
    size = round(whole.width * across), round(whole.height * down)
    whole.crop((0, 0, *size)).save(file, "JPEG")
    width, height = round(record["width"] * across), round(record["height"] * down)
    x, y, w, h = record["bbox"]
    box = [min(x, width - 2), min(y, height - 2)]
    box += [min(w, width - box[0]), min(h, height - box[1])]
    changed = {"width": width, "height": height, "bbox": box, "thumbnail": file.getvalue()}
    return record | changed | {"grid_rows": grid[0], "grid_columns": grid[1]}


def write_data_set(folder: Path, images: list[bytes]) -> Path:
    """Write a parquet in the real schema without groups, one row per image."""
    rows = [
        {
            "image": {"bytes": data, "path": f"{i}.jpg"},
            "question": f"question {i}",
            "answer": ["answer"],
            "bbox": [1.0, 2.0, 3.0, 4.0],
            "dataset_id": str(i),
        }
        for i, data in enumerate(images)
    ]
    schema = pa.schema([f for f in make_demo_data.SCHEMA if f.name != "group"])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path = folder / "data" / "train-00000-of-00001.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), path, row_group_size=16, write_page_checksum=True
    )
    return folder


class TinyEncoder(VisionEncoder):
    """4 × 4 tokens of an image's own pixels, at once: an encoder for tests of everything else."""

    id, weights_sha256, preprocessor, feature_dim = "tiny", "0" * 64, "mean colour", 12

    def __init__(self, device: str = "cpu", image_size: int = 28, resize: str = "stretch") -> None:
        super().__init__(device, image_size, resize, torch.float32, step=7)

    def pixels_of(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32).copy())

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        return 4, 4

    def encode(self, pixels: Tensor) -> Tensor:
        blocks = pixels.reshape(-1, 4, 2, 4, 2, 3).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(-1, 16, 12)
