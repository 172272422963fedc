"""Time and memory of opening a cache of the real data set's size, 4370 × 256 × 2048 (run by hand).

    python tests/large_cache.py [folder]

The shards are sparse files (4.3 GiB of zeros that take no disk), everything else has its real size.
Prints seconds and MiB for opening the cache and for reading one batch of scattered rows.
"""

import json
import os
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from common.files import sha256_file
from features.cache_writer import ROW_SCHEMA, ROWS_PER_SHARD
from qwenvl_dataloader import FORMAT, RealQwenVLDataset, normalise

COUNT, TOKENS, WIDTH = 4370, 256, 2048


def sparse_shard(path: Path, rows: int) -> None:
    size = rows * TOKENS * WIDTH * 2
    entry = {"dtype": "BF16", "shape": [rows, TOKENS, WIDTH], "data_offsets": [0, size]}
    header = json.dumps({"features": entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


def write_cache(folder: Path) -> None:
    def entry(path: Path, **more: int) -> dict:
        # opening hashes rows and singular values, and of the shards the sizes only
        sha = "0" * 64 if path.name.startswith("features-") else sha256_file(path)
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha, **more}

    shards = []
    for number, first in enumerate(range(0, COUNT, ROWS_PER_SHARD)):
        path = folder / f"features-{number:05d}.safetensors"
        rows = min(ROWS_PER_SHARD, COUNT - first)
        sparse_shard(path, rows)
        shards.append(entry(path, rows=rows))
    sigma, rows = folder / "singular_values.safetensors", folder / "rows.parquet"
    save_file({"singular_values": torch.rand(COUNT, TOKENS, dtype=torch.float64)}, sigma)
    records = [
        {"row_id": i, "group": str(i), "image_sha256": f"{i:064x}", "question": "what?" * 8,
         "answers": ["a"] * 10, "bbox": [1, 2, 3, 4], "width": 1024, "height": 768,
         "thumbnail": os.urandom(10_000)}
        for i in range(COUNT)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(records, schema=ROW_SCHEMA), rows)
    manifest = {
        "format": FORMAT, "kind": "real", "encoder": {"id": "size test"}, "num_tokens": TOKENS,
        "feature_dim": WIDTH, "grid": [1, TOKENS], "resize": "stretch", "count": COUNT,
        "shards": shards, "rows": entry(rows), "singular_values": entry(sigma), "skipped": [],
        "dtype": "bfloat16", "split_by": "image",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        if (child := os.fork()) == 0:  # what writing takes must not count as what opening takes
            write_cache(Path(name))
            os._exit(0)
        os.waitpid(child, 0)
        before, begun = peak_mib(), time.perf_counter()
        dataset = RealQwenVLDataset(name)
        opened, begun = time.perf_counter() - begun, time.perf_counter()
        print(f"open: {opened:.3f} s, {peak_mib() - before:.0f} MiB for {len(dataset)} images")
        normalise(dataset[list(range(0, COUNT, 600))])
        print(f"one batch of 8: {time.perf_counter() - begun:.3f} s, {peak_mib() - before:.0f} MiB")
