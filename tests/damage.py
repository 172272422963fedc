"""One of every kind of file that is read, and what its readers make of damaged bytes.

A case ends in one of: refused (one line of our own), found by --verify, harmless (what is read is
as before), or a defect: a traceback, or other numbers without a word.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import tiny
import torch

import compare_svd_nn
import factorize
import train_real_data
from common import arguments
from encoders.image_sources import open_source
from experiments import fit_codec, report
from lowrank_tokens import factor_files
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset
from training import checkpoint

SMALL = "--epochs 2 --rank 4 --hidden_dim 8 --refine_steps 1 --oversample 2 --device cpu".split()


class Kind(NamedTuple):
    """A kind of file: where it is, how it is read, and what --verify says of it."""

    folder: Path
    file: str
    read: Callable[[Path], object]  # digest of all that a user gets from it
    verify: Callable[[Path], object] | None = None  # something true, or InputError: it is damaged


def run(script: object, *argv: object) -> None:
    """Run a script in this process."""
    script.main(arguments.parse(script.get_args_parser(), [str(a) for a in argv]))


def digest(*values: object) -> str:
    """Return one hash of tensors, tables, dicts and lists."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{list(value.shape)}".encode())
            found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add([key, value[key]])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, pa.Table):
            add(value.to_pydict())
        else:
            found.update(repr(value).encode() + b";")

    add(list(values))
    return found.hexdigest()


def read_cache(folder: Path) -> str:
    dataset = RealQwenVLDataset(folder)
    features = dataset[list(range(len(dataset)))]
    resident = RealQwenVLDataset(folder)
    resident.keep_resident(torch.device("cpu"))
    thumbnails = [dataset.thumbnail(row).tobytes() for row in (0, len(dataset) - 1)]
    return digest(
        dataset.manifest,
        dataset.rows,
        dataset.singular_values,
        features,
        resident[list(range(len(dataset)))],
        thumbnails,
        dataset.label,
        dataset.split.hash,
    )


def read_checkpoint(folder: Path) -> str:
    model, state = checkpoint.load_model(folder / "best_model.pt", torch.device("cpu"))
    return digest(state, model.state_dict())


def read_results(folder: Path) -> str:
    return digest(report.read_runs([folder.parent]))


def read_rows(folder: Path) -> str:
    rows = [row for batch in open_source(folder).batches(8) for _, row in batch]
    return digest([[row, row.pop("image")[:2]] for row in rows])  # without the folders' names


def write_begun(folder: Path, leave: int = 0) -> None:
    """Write a cache of three shards, or all but the last `leave` of them."""
    tokens = tiny.steep_tokens(20)
    shards, shard_folder.ROWS_PER_SHARD = shard_folder.ROWS_PER_SHARD, 8
    try:
        writer = tiny.begin_cache(folder, tokens)
        tiny.write_shards(writer, tokens, leave)
        if not leave:
            writer.finish()
    finally:
        shard_folder.ROWS_PER_SHARD = shards


def finish_cache(folder: Path) -> str:
    """Go on with an interrupted cache; damage before it must not be sealed by its manifest."""
    write_begun(folder)
    dataset = RealQwenVLDataset(folder)
    if damaged := dataset.verify():
        raise InputError(f"--verify finds {damaged}")
    return read_cache(folder)


def read_factors(folder: Path) -> str:
    return digest(factor_files.read_factors(folder), factor_files.read_factors_manifest(folder))


def build(work: Path) -> dict[str, Kind]:
    """Have the program make one of each kind of file."""
    cache = tiny.write_cache(work / "cache", tiny.steep_tokens(40))
    results = work / "results"
    where = ["--cache_dir", cache, "--results_dir", results]
    run(train_real_data, *where, "--log_dir", work / "log", *SMALL)
    run(compare_svd_nn, *where, "--device", "cpu")
    run(factorize, *where, "--rank", 3, "--out", work / "factors")
    run(factorize, *where, "--target_error", 0.3, "--dtype", "int8", "--out", work / "ragged")
    codec = work / "codec.safetensors"
    run(fit_codec, "--cache_dir", cache, "--out", codec)
    run(factorize, *where, "--exact", "--codec", codec, "--step", 0.5, "--out", work / "coded")
    data = tiny.write_data_set(work / "images", [tiny.jpeg(i) for i in range(20)])
    write_begun(work / "begun", leave=1)

    def verify_cache(folder: Path) -> object:
        return RealQwenVLDataset(folder).verify()

    kinds = {
        name: Kind(cache, name, read_cache, verify_cache)
        for name in (
            "manifest.json",
            "features-00000.safetensors",
            "rows.parquet",
            "singular_values.safetensors",
        )
    }
    kinds |= {
        name: Kind(results / "ResMLP", name, read_results)
        for name in ("test_results.json", "svd_nn_comparison.json")
    }
    kinds["best_model.pt"] = Kind(results / "ResMLP", "best_model.pt", read_checkpoint)
    kinds["data set *.parquet"] = Kind(data, "data/train-00000-of-00001.parquet", read_rows)
    for name in ("partial.json", "part-00001.parquet", "features-00001.safetensors"):
        kinds[f"interrupted {name}"] = Kind(work / "begun", name, finish_cache)
    for folder in ("factors", "ragged"):
        for name in ("manifest.json", "factors-00000.safetensors"):
            kinds[f"{folder} {name}"] = Kind(
                work / folder, name, read_factors, factor_files.damaged_files
            )
    for name in ("manifest.json", "factors-00000.safetensors", "codec.safetensors"):
        kinds[f"coded {name}"] = Kind(
            work / "coded", name, read_factors, factor_files.damaged_files
        )
    return kinds


def damage(path: Path, rng: random.Random) -> str:
    """Change a file at random; return in words how."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    way = rng.choice(("bit", "bit", "bytes", "cut", "hole", "longer"))
    if way == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "bytes":
        for _ in range(rng.randint(2, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "hole":  # a page that never reached the disk
        end = min(len(data), at + rng.choice((16, 512, 4096)))
        data[at:end] = bytes(end - at)
    else:
        data += rng.randbytes(rng.randint(1, 100))
    path.write_bytes(data)
    return f"{way} at {at} of {len(data)}"


def one_case(kind: Kind, clean: object, copy: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a copy and read it: refused, found by --verify, harmless, TRACEBACK or SILENT."""
    shutil.rmtree(copy, ignore_errors=True)
    folder = Path(shutil.copytree(kind.folder, copy / kind.folder.name))
    how = damage(folder / kind.file, rng)
    try:
        found = kind.read(folder)
        outcome = "harmless" if found == clean else "other"
    except InputError as error:
        outcome = "refused" if "\n" not in arguments.one_line(str(error)) else "TRACEBACK"
    except Exception as error:
        return "TRACEBACK", f"{how}: {type(error).__name__}: {error}"
    if outcome == "other":
        try:
            found = kind.verify and kind.verify(folder)
        except InputError:
            found = True
        outcome = "found by --verify" if found else "SILENT"
    return outcome, how
