"""The runs that tests/faults.py kills: training, extraction, factorisation; and what must hold."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from killing import Scenario, Tally, command, hashes, in_child, torture, unbroken
from PIL import Image

import extract_features
import factorize
import train_real_data
from experiments import fit_codec
from lowrank_tokens import factor_files
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset
from training import checkpoint

# -------------------------------------------------------------------------------------- training

TIMINGS = ("seconds", "samples_per_s")
TRAIN = "--epochs 8 --rank 4 --hidden_dim 64 --batch_size 2 --lr 1e-3 --dropout 0.2 --device cpu"
TRAIN_KINDS = {
    "ResMLP": "--refine_steps 1 --oversample 2",
    "AdaLoRA": "--factors direct --use_rank_allocator --allocator_init_warmup 4 "
    "--allocator_final_warmup 5 --allocator_mask_interval 2 --allocator_keep_ratio 0.5",
}
FIGURES = (
    "train_val_loss_comparison.png",
    "loss_curves.png",
    "error_heatmap.png",
    "B_row_norm_hist.png",
)


def train_scenario(work: Path, arch: str, old: Path | None, log: Path) -> Scenario:
    """Training of `arch`; with `old`, a fresh run over the finished results there."""
    results = work / f"{arch}{'_over' if old else ''}"
    folder = results / arch
    cache = work / "cache"
    where = ["--cache_dir", cache, "--results_dir", results, "--log_dir", work / "log"]
    begin = command(
        train_real_data, "--arch", arch, *where, *TRAIN.split(), *TRAIN_KINDS[arch].split()
    )

    def first() -> None:
        if old and not folder.exists():
            shutil.copytree(old, folder)
        begin()

    resume = command(train_real_data, "--arch", arch, "--resume", "last", *where)

    def again(_: Path) -> Callable[[], None]:
        now = folder / "last_model.pt"
        if not now.exists() or (old and now.read_bytes() == (old / "last_model.pt").read_bytes()):
            return first
        if (folder / "test_results.json").exists():
            return check_complete(folder, resume)
        return resume

    def torn(_: Path) -> list[str]:
        found = not_whole(folder)
        if old and (lost := missing_bytes(old, folder)):
            found.append(f"{lost} of the earlier run is gone")
        return found

    seconds, computing = unbroken(first, log, "test and figures")
    expected = in_child(train_outcome, folder)
    return Scenario(
        results,
        first,
        again,
        torn,
        lambda _: train_outcome(folder),
        seconds,
        computing,
        26,
        expected,
        {"validation": 9, "epoch, in a step": 90},
    )


def check_complete(folder: Path, resume: Callable[[], None]) -> Callable[[], None]:
    """A run that has its test numbers is finished: resuming it says so, with status 2."""

    def run() -> None:
        try:
            resume()
        except SystemExit as end:
            whole = all((folder / name).exists() for name in FIGURES)
            sys.exit(0 if end.code == 2 and whole else 3)

    return run


def not_whole(folder: Path) -> list[str]:
    """Checkpoints that do not load, JSON that does not parse, figures that do not open."""
    bad = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".pt":
                checkpoint.load_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:
            bad.append(f"{path.name}: {error}")
    return bad


def missing_bytes(old: Path, folder: Path) -> list[str]:
    """Files of `old` of which no copy is left in `folder` or below it."""
    kept = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    return [p.name for p in old.iterdir() if p.is_file() and p.read_bytes() not in kept]


def train_outcome(folder: Path) -> str:
    """A digest of all that a finished run is: history, weights, optimiser, RNG, test, figures."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                if key not in TIMINGS:
                    digest.update(str(key).encode())
                    add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for name in ("best_model.pt", "last_model.pt"):
        state = checkpoint.load_checkpoint(folder / name)
        add(
            {
                key: state[key]
                for key in (
                    "config",
                    "model",
                    "optimizer",
                    "scheduler",
                    "allocator",
                    "rng",
                    "progress",
                )
            }
        )
    history = json.loads((folder / "history.json").read_text())
    add(history)
    add(json.loads((folder / "test_results.json").read_text()))
    figures = sum((folder / name).exists() for name in FIGURES)
    temporaries = len(list(folder.glob(".*tmp*")))
    return (
        f"{len(history)} epochs, {figures} figures, {temporaries} left over, "
        f"{digest.hexdigest()[:16]}"
    )


def kill_train(work: Path, count: int, rng: random.Random, log: Path) -> Tally:
    in_child(tiny.write_cache, work / "cache", tiny.steep_tokens(40))
    tally = Tally()
    scenarios = [train_scenario(work, arch, None, log) for arch in TRAIN_KINDS]
    old = Path(shutil.copytree(work / "ResMLP" / "ResMLP", work / "old"))
    for name in ("test_results.json", "history.json"):  # another run's bytes, to be found again
        (old / name).write_text((old / name).read_text() + "\n")
    scenarios.append(train_scenario(work, "ResMLP", old, log))
    for i, scenario in enumerate(scenarios):
        torture(scenario, count * (i + 1) // 3 - count * i // 3, rng, log, tally)
    return tally


# ------------------------------------------------------------------------ extraction, factorizing


def cache_torn(folder: Path) -> list[str]:
    """A cache folder opens and matches its hashes, or says in words that it is not finished."""
    try:
        return list(RealQwenVLDataset(folder).verify())
    except InputError as error:
        said = "interrupted" in str(error) or "does not exist" in str(error)
        return [] if said and not (folder / "manifest.json").exists() else [str(error)]


def kill_extract(work: Path, count: int, rng: random.Random, log: Path) -> Tally:
    shard_folder.ROWS_PER_SHARD = 8
    images = [tiny.jpeg(i) for i in range(60)]
    images[7], images[8], images[30] = images[3], b"no image", images[3]
    data = tiny.write_data_set(work / "images", images)
    extract_features.load_encoder = lambda name, **options: slow(tiny.TinyEncoder())
    cache = work / "extracted"
    argv = ["--dataset_dir", data, "--cache_dir", cache, "--batch_size", 4, "--device", "cpu"]
    run = command(extract_features, *argv)

    def again(_: Path) -> Callable[[], None]:
        return said_finished(run) if (cache / "manifest.json").exists() else lambda: run()

    seconds, computing = unbroken(run, log, "manifest.json")
    scenario = Scenario(
        cache, run, again, cache_torn, hashes, seconds, computing, 20, hashes(cache)
    )
    tally = Tally()
    torture(scenario, count - count // 3, rng, log, tally)
    # the same over a finished cache of other images, replaced by --overwrite
    other = tiny.write_data_set(work / "others", images[::-1])
    spare = work / "spare"
    unbroken(command(extract_features, *argv[:1], other, *argv[2:3], spare, *argv[4:]), log, "-")
    replace = command(extract_features, *argv, "--overwrite")

    def over() -> None:
        if not cache.exists():
            shutil.copytree(spare, cache)
        replace()

    def resume(_: Path) -> Callable[[], None]:
        manifest = cache / "manifest.json"
        if manifest.exists() and manifest.read_bytes() == (spare / "manifest.json").read_bytes():
            return over
        if not manifest.exists() and not list(cache.glob("part*")):
            return over  # what is left has no name of its own: the same command again
        return again(cache)

    replaced = scenario._replace(first=over, again=resume)
    torture(replaced, count // 3, rng, log, tally)
    return tally


def slow(encoder: tiny.TinyEncoder) -> tiny.TinyEncoder:
    """An encoder that takes its time, so that a kill can fall into every batch."""
    encode = encoder.encode

    def slowly(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return encode(pixels)

    encoder.encode = slowly
    return encoder


def said_finished(run: Callable[[], None]) -> Callable[[], None]:
    """A start over something finished must refuse with status 2 and change nothing of it."""

    def check() -> None:
        try:
            run()
        except SystemExit as end:
            sys.exit(0 if end.code == 2 else 3)

    return check


def factors_torn(folder: Path) -> list[str]:
    """A folder of factors reads back whole, or says that it is not finished."""
    try:
        factor_files.read_factors(folder)
        return []
    except InputError as error:
        return [] if not (folder / "manifest.json").exists() else [str(error)]


def kill_factorize(work: Path, count: int, rng: random.Random, log: Path) -> Tally:
    shard_folder.ROWS_PER_SHARD = 8
    in_child(tiny.write_cache, work / "cache", tiny.steep_tokens(60))
    where = ["--cache_dir", work / "cache", "--results_dir", work / "results"]
    train = [*where, "--log_dir", work / "log", *TRAIN.split(), *TRAIN_KINDS["ResMLP"].split()]
    unbroken(command(train_real_data, *train), log, "test")
    codec = work / "codec.safetensors"
    unbroken(command(fit_codec, *where[:2], "--out", codec), log, "-")
    tally = Tally()
    ways = (
        ["--rank", 3],
        ["--target_error", 0.3, "--dtype", "int8"],
        ["--exact", "--codec", codec, "--step", 0.5],
    )
    for i, more in enumerate(ways):
        out = work / f"factors{i}"
        run = command(factorize, *where, "--out", out, "--batch_size", 2, *more)

        def again(_: Path, out: Path = out, run: Callable = run) -> Callable[[], None]:
            return said_finished(run) if (out / "manifest.json").exists() else lambda: run()

        seconds, computing = unbroken(run, log, "manifest.json")
        scenario = Scenario(
            out, run, again, factors_torn, hashes, seconds, computing, 10, hashes(out)
        )
        torture(scenario, count * (i + 1) // 3 - count * i // 3, rng, log, tally)
    return tally
