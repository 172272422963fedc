"""Time and memory of opening caches of the real data set's size, 4370 images (run by hand).

    python tests/large_cache.py [folder]

One of 256 tokens an image, one of 256 to 4096, D = 2048. The shards are sparse files (26 GiB of
zeros that take no disk), everything else has its real size. Prints seconds and MiB for opening the
cache, for reading one batch of scattered rows, and for the singular values once they are there.
"""

import json
import math
import os
import random
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

from lowrank_tokens import cache as spectra
from lowrank_tokens.cache import FORMAT
from lowrank_tokens.cache_writer import ROW_SCHEMA
from lowrank_tokens.files import sha256_file
from lowrank_tokens.grids import most_frequent
from lowrank_tokens.linalg import normalise
from lowrank_tokens.shards import ROWS_PER_SHARD
from qwenvl_dataloader import RealQwenVLDataset

COUNT, WIDTH = 4370, 2048
SIDES = {"256 tokens": (16, 16), "256 to 4096 tokens": (16, 64)}  # least and most of a grid


def sparse_shard(path: Path, tokens: int) -> None:
    size = tokens * WIDTH * 2
    entry = {"dtype": "BF16", "shape": [tokens, WIDTH], "data_offsets": [0, size]}
    header = json.dumps({"features": entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


def write_cache(folder: Path, least: int, most: int) -> None:
    def entry(path: Path, **more: int) -> dict:
        # opening hashes rows and singular values, and of the shards the sizes only
        sha = "0" * 64 if path.name.startswith("features-") else sha256_file(path)
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha, **more}

    draw = random.Random(0)
    grids = [(draw.randint(least, most), draw.randint(least, most)) for _ in range(COUNT)]
    tokens, grid = [math.prod(grid) for grid in grids], most_frequent(grids)
    shards = []
    for number, first in enumerate(range(0, COUNT, ROWS_PER_SHARD)):
        path = folder / f"features-{number:05d}.safetensors"
        of_shard = tokens[first : first + ROWS_PER_SHARD]
        sparse_shard(path, sum(of_shard))
        shards.append(entry(path, rows=len(of_shard)))
    rows = folder / "rows.parquet"
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
            "grid_rows": grids[i][0],
            "grid_columns": grids[i][1],
        }
        for i in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=ROW_SCHEMA), rows)
    sigma = None
    if least == most:
        path = folder / "singular_values.safetensors"
        values = torch.rand(COUNT, min(tokens[0], WIDTH), dtype=torch.float64)
        save_file({"singular_values": values}, path)
        sigma = entry(path)
    manifest = {
        "format": FORMAT,
        "kind": "real",
        "encoder": {"id": "size test"},
        "num_tokens": math.prod(grid),
        "feature_dim": WIDTH,
        "grid": list(grid),
        "resize": "stretch" if sigma else "native",
        "count": COUNT,
        "shards": shards,
        "rows": entry(rows),
        "singular_values": sigma,
        "skipped": [],
        "dtype": "bfloat16",
        "split_by": "image",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not sigma:
        dataset = RealQwenVLDataset(folder)
        values = torch.rand(sum(dataset._spectrum_sizes), dtype=torch.float64)
        spectra._write(folder / spectra.SPECTRA_FILE, dataset.content_sha256, values)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path) -> None:
    before, begun = peak_mib(), time.perf_counter()
    dataset = RealQwenVLDataset(folder)
    opened, begun = time.perf_counter() - begun, time.perf_counter()
    print(f"open: {opened:.3f} s, {peak_mib() - before:.0f} MiB for {len(dataset)} images")
    for row in range(0, COUNT, 600):
        normalise(dataset[[row]])
    print(f"8 images: {time.perf_counter() - begun:.3f} s, {peak_mib() - before:.0f} MiB")
    begun = time.perf_counter()
    shape = tuple(dataset.singular_values.shape)
    print(
        f"singular values {shape}: {time.perf_counter() - begun:.3f} s, "
        f"{peak_mib() - before:.0f} MiB"
    )


def in_a_process(call, *args) -> None:
    """What another call takes must not count as what this one takes."""
    if (child := os.fork()) == 0:
        call(*args)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    for label, sides in SIDES.items():
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
            print(label, flush=True)
            in_a_process(write_cache, Path(name), *sides)
            in_a_process(measure, Path(name))
