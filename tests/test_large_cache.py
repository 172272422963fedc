"""A cache of the real data set's size: 4370 images of 256 tokens × 2048, in sparse files."""

import json
import os
import resource
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import forked
from safetensors.torch import save_file

from lowrank_tokens.cache import CACHE_FORMAT
from lowrank_tokens.cache_writer import ROW_SCHEMA
from lowrank_tokens.files import file_entry
from lowrank_tokens.shards import ROWS_PER_SHARD
from qwenvl_dataloader import RealQwenVLDataset

COUNT, SIDE, WIDTH = 4370, 16, 2048
TOKENS = SIDE * SIDE


def sparse_shard(path, rows):
    """Write a shard of zeros that takes no disk; opening compares its size and not its hash."""
    size = rows * TOKENS * WIDTH * 2
    entry = {"dtype": "BF16", "shape": [rows * TOKENS, WIDTH], "data_offsets": [0, size]}
    header = json.dumps({"features": entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64, "rows": rows}


def write_large_cache(folder):
    shards = []
    for number, first in enumerate(range(0, COUNT, ROWS_PER_SHARD)):
        path = folder / f"features-{number:05d}.safetensors"
        shards.append(sparse_shard(path, min(ROWS_PER_SHARD, COUNT - first)))
    records = [
        {
            "row_id": i,
            "group": str(i),
            "image_sha256": f"{i:064x}",
            "question": "what?" * 8,
            "answers": ["a"] * 10,
            "bbox": [1, 2, 3, 4],
            "width": 1024,
            "height": 768,
            "thumbnail": os.urandom(10_000),
            "grid_rows": SIDE,
            "grid_columns": SIDE,
        }
        for i in range(COUNT)
    ]
    rows, sigma = folder / "rows.parquet", folder / "singular_values.safetensors"
    pq.write_table(pa.Table.from_pylist(records, schema=ROW_SCHEMA), rows)
    save_file({"singular_values": torch.rand(COUNT, TOKENS, dtype=torch.float64)}, sigma)
    manifest = {
        "format": CACHE_FORMAT,
        "kind": "real",
        "encoder": {"id": "size test"},
        "num_tokens": TOKENS,
        "feature_dim": WIDTH,
        "grid": [SIDE, SIDE],
        "resize": "stretch",
        "count": COUNT,
        "shards": shards,
        "rows": file_entry(rows),
        "singular_values": file_entry(sigma),
        "notes": [],
        "skipped": [],
        "dtype": "bfloat16",
        "split_by": "image",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_cache_of_four_gigabytes_opens_and_gives_images_in_little_memory(tmp_path):
    assert forked(lambda: write_large_cache(tmp_path)).status == 0

    def open_cache():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset = RealQwenVLDataset(tmp_path)
        assert len(dataset) == COUNT
        for row in range(0, COUNT, 600):
            assert dataset[[row]].shape == (1, TOKENS, WIDTH)
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{used:.0f} MiB")
        assert used < 200

    outcome = forked(open_cache)
    assert outcome.status == 0, outcome.output
