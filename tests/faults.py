"""Kill runs at every moment and see that nothing is lost. Run by hand, prints a table:

    python tests/faults.py                                # every kind, minutes
    python tests/faults.py kill_train --count 50 --seed 1

kill_train, kill_extract, kill_factorize: a process is forked for each run of the real script (torch
is imported once) and killed with SIGKILL, at a random time or inside the n-th write of a file:
half-way through it, before its rename, or after. After every kill each file that is there must be
whole and the next start must go on, or say what is there; the run's final files must equal those of
a run that nobody killed. What does not is a loss, and the exit status is 1.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import argparse
import collections
import hashlib
import json
import mmap
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch

import checkpoint
import cli
import extract_features
import factor_files
import factorize
import feature_cache
import figure_style
import files
import tiny
import train_real_data
from locks import LOCK_NAME
from qwenvl_dataloader import RealQwenVLDataset

POINTS = ("half written", "before rename", "renamed")  # moments of one atomic write
TIMINGS = ("seconds", "samples_per_s")


# ------------------------------------------------------------------------------- runs to kill


class Board:
    """What a run is doing, in memory that it shares with whoever kills it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 256)

    def note(self, phase: str) -> None:
        self.memory[:] = phase.encode()[:256].ljust(256)

    def read(self) -> str:
        return self.memory[:].decode().strip()


class Kill(NamedTuple):
    """Where a run kills itself: in its n-th atomic write, at one of POINTS."""

    write: int
    point: str


def trace(board: Board, kill: Kill | None) -> None:
    """In the child: have every phase noted, and the process killed where `kill` says."""
    writes = 0

    def phase(module: object, name: str, words: str) -> None:
        original = getattr(module, name)

        def noted(*args, **options):
            before = board.read()
            board.note(words)
            result = original(*args, **options)
            board.note(before)
            return result

        setattr(module, name, noted)

    phase(train_real_data, "open_run", "opening")
    phase(train_real_data, "train", "epoch, between steps")
    phase(train_real_data, "train_step", "epoch, in a step")
    phase(train_real_data, "validate", "validation")
    phase(train_real_data, "set_aside", "moving old results")
    phase(train_real_data, "test_and_draw", "test and figures")
    phase(extract_features, "extract", "decoding")
    phase(tiny.TinyEncoder, "encode", "encoding")
    phase(feature_cache, "exact_singular_values", "spectra")
    phase(factorize, "factorise", "factorising")

    original = files.atomic_path

    def reach(name: str, point: str) -> None:
        board.note(f"{point} {name}")
        if kill and writes == kill.write and point == kill.point:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def atomic_path(path: str | Path) -> Iterator[Path]:
        nonlocal writes
        writes, before, name = writes + 1, board.read(), kind_of(Path(path).name)
        board.note(f"writing {name}")
        with original(path) as temporary:
            yield temporary
            if kill and writes == kill.write and kill.point == "half written":
                os.truncate(temporary, temporary.stat().st_size // 2)
            reach(name, "half written")
            reach(name, "before rename")
        reach(name, "renamed")
        board.note(before)

    for module in (files, checkpoint, feature_cache, figure_style):
        module.atomic_path = atomic_path


def kind_of(name: str) -> str:
    """A file's name without its number."""
    return "".join(c for c in name if not c.isdigit()).replace("-.", ".")


def start(run: Callable[[], None], log: Path, board: Board, kill: Kill | None = None) -> int:
    """Fork a process that runs `run`, its output appended to `log`; returns its id."""
    board.note("start")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        trace(board, kill)
        run()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(pid: int) -> int:
    """Exit status of a run; negative, the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, seconds: float, board: Board) -> str | None:
    """Kill a run after `seconds` and say what it was doing; None where it had ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    os.kill(pid, signal.SIGSTOP)  # so that it does nothing between the look and the kill
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    phase = board.read()
    os.kill(pid, signal.SIGKILL)
    return phase


def in_child(function: Callable, *args: object) -> object:
    """function(*args) in a process of its own: the parent's threads stay as the import left them.

    An exception comes back as its text.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            result = (True, function(*args))
        except BaseException as error:
            result = (False, f"{type(error).__name__}: {error}")
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        good, value = pickle.load(pipe)
    finish(pid)
    return value if good else f"! {value}"


def command(script: object, *argv: object) -> Callable[[], None]:
    """A script's command line as something to run."""
    return lambda: cli.run(script.main, script.get_args_parser(), [str(a) for a in argv])


# ------------------------------------------------------------------------------ what must hold


class Scenario(NamedTuple):
    """One kind of run, and what must be true of its folder."""

    folder: Path  # that it writes
    first: Callable[[], None]
    again: Callable[[Path], Callable[[], None]]  # what to run after a kill, by what is there
    torn: Callable[[Path], list[str]]  # files that are not whole
    outcome: Callable[[Path], object]  # of a finished run: to be equal to the unbroken run's
    seconds: float  # of the unbroken run, and of its part that computes
    computing: float
    writes: int
    expected: object


class Tally:
    def __init__(self) -> None:
        self.phases: collections.Counter[str] = collections.Counter()
        self.next: collections.Counter[str] = collections.Counter()
        self.losses: list[str] = []

    @property
    def kills(self) -> int:
        return sum(self.phases.values())


def torture(scenario: Scenario, count: int, rng: random.Random, log: Path, tally: Tally) -> None:
    """Kill runs of a scenario `count` times; after each let the next start go on, and compare."""
    board, wanted = Board(), tally.kills + count
    deadline = time.monotonic() + 600
    while tally.kills < wanted and time.monotonic() < deadline:
        shutil.rmtree(scenario.folder, ignore_errors=True)
        run = scenario.first
        for _ in range(20):
            if tally.kills < wanted and rng.random() < 0.75:
                phase, status = one_kill(run, scenario, rng, log, board)
            else:
                status, phase = finish(start(run, log, board)), None
            if phase is None:
                if status != 0:
                    tally.losses.append(f"the next start ended with {status}: {last_line(log)}")
                break
            tally.phases[phase] += 1
            torn = in_child(scenario.torn, scenario.folder)
            if torn:
                tally.losses.append(f"killed in {phase}: {torn}")
            run = scenario.again(scenario.folder)
            tally.next["went on" if run is not scenario.first else "began anew"] += 1
        found = in_child(scenario.outcome, scenario.folder)
        if found != scenario.expected:
            tally.losses.append(f"another outcome than the unbroken run's: {difference(found)}")


def one_kill(
    run: Callable[[], None], scenario: Scenario, rng: random.Random, log: Path, board: Board
) -> tuple[str | None, int]:
    """Start a run and kill it somewhere: (what it was doing or None, exit status)."""
    if rng.random() < 0.45:
        kill = Kill(rng.randint(1, scenario.writes), rng.choice(POINTS))
        status = finish(start(run, log, board, kill))
        return (board.read() if status == -signal.SIGKILL else None), status
    most = scenario.computing if rng.random() < 0.8 else scenario.seconds
    pid = start(run, log, board)
    phase = kill_at(pid, rng.uniform(0, most), board)
    return phase, finish(pid)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def difference(found: object) -> str:
    return found if isinstance(found, str) else f"{str(found)[:200]} …"


def unbroken(run: Callable[[], None], log: Path, mark: str) -> tuple[float, float, int]:
    """Run to the end: its seconds, those until the phase `mark` began, and its atomic writes."""
    board, begun, marked = Board(), time.monotonic(), None
    pid = start(run, log, board)
    seen = {""}
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        now = board.read()
        if marked is None and mark in now:
            marked = time.monotonic() - begun
        seen.add(now)
        time.sleep(0.001)
    status, seconds = finish(pid), time.monotonic() - begun
    if status:
        sys.exit(f"the unbroken run failed with {status}: {last_line(log)}")
    return seconds, marked or seconds, 0


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != LOCK_NAME]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# -------------------------------------------------------------------------------------- training

TRAIN = "--epochs 8 --rank 4 --hidden_dim 64 --batch_size 2 --lr 1e-3 --dropout 0.2 --device cpu"
TRAIN_KINDS = {
    "ResMLP": "--refine_steps 1 --oversample 2",
    "AdaLoRA": "--factors direct --use_rank_allocator --allocator_init_warmup 4 "
    "--allocator_final_warmup 5 --allocator_mask_interval 2 --allocator_keep_ratio 0.5",
}
FIGURES = ("train_val_loss_comparison.png", "loss_curves.png", "error_heatmap.png",
           "B_row_norm_hist.png")  # fmt: skip


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

    seconds, computing, _ = unbroken(first, log, "test and figures")
    expected = in_child(train_outcome, folder)
    return Scenario(
        results, first, again, torn, lambda _: train_outcome(folder), seconds, computing, 32, expected
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
    from PIL import Image

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
        add({key: state[key] for key in ("config", "model", "optimizer", "scheduler", "allocator",
                                         "rng", "progress")})  # fmt: skip
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
        return RealQwenVLDataset(folder).verify()
    except cli.UserError as error:
        said = "interrupted" in str(error) or "does not exist" in str(error)
        return [] if said and not (folder / "manifest.json").exists() else [str(error)]


def kill_extract(work: Path, count: int, rng: random.Random, log: Path) -> Tally:
    feature_cache.ROWS_PER_SHARD = 8
    images = [tiny.jpeg(i) for i in range(60)]
    images[7], images[8], images[30] = images[3], b"no image", images[3]
    data = tiny.write_data_set(work / "images", images)
    extract_features.load_encoder = lambda name, **options: slow(tiny.TinyEncoder())
    cache = work / "extracted"
    argv = ["--dataset_dir", data, "--cache_dir", cache, "--batch_size", 4, "--device", "cpu"]
    run = command(extract_features, *argv)

    def again(_: Path) -> Callable[[], None]:
        return said_finished(run) if (cache / "manifest.json").exists() else lambda: run()

    seconds, computing, _ = unbroken(run, log, "manifest.json")
    scenario = Scenario(cache, run, again, cache_torn, hashes, seconds, computing, 20, hashes(cache))
    tally = Tally()
    torture(scenario, count - count // 3, rng, log, tally)
    # the same over a finished cache of other images, replaced by --overwrite
    other = tiny.write_data_set(work / "others", images[::-1])
    spare = work / "spare"
    in_child(command(extract_features, *argv[:1], other, *argv[2:3], spare, *argv[4:]))
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
    except cli.UserError as error:
        return [] if not (folder / "manifest.json").exists() else [str(error)]


def kill_factorize(work: Path, count: int, rng: random.Random, log: Path) -> Tally:
    feature_cache.ROWS_PER_SHARD = factor_files.ROWS_PER_SHARD = 8
    in_child(tiny.write_cache, work / "cache", tiny.steep_tokens(60))
    where = ["--cache_dir", work / "cache", "--results_dir", work / "results"]
    train = [*where, "--log_dir", work / "log", *TRAIN.split(), *TRAIN_KINDS["ResMLP"].split()]
    unbroken(command(train_real_data, *train), log, "test")
    tally = Tally()
    for i, more in enumerate((["--rank", 3], ["--target_error", 0.3, "--dtype", "int8"])):
        out = work / f"factors{i}"
        run = command(factorize, *where, "--out", out, "--batch_size", 2, *more)

        def again(_: Path, out: Path = out, run: Callable = run) -> Callable[[], None]:
            return said_finished(run) if (out / "manifest.json").exists() else lambda: run()

        seconds, computing, _ = unbroken(run, log, "manifest.json")
        scenario = Scenario(
            out, run, again, factors_torn, hashes, seconds, computing, 10, hashes(out)
        )
        torture(scenario, count // 2, rng, log, tally)
    return tally


# ------------------------------------------------------------------------------------------ table

KINDS = {
    "kill_train": (kill_train, 90),
    "kill_extract": (kill_extract, 60),
    "kill_factorize": (kill_factorize, 30),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=None, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs")
    args = parser.parse_args()
    lost = 0
    for kind in args.kinds:
        function, count = KINDS[kind]
        work = Path(tempfile.mkdtemp(prefix=f"{kind}_", dir=args.work))
        begun = time.monotonic()
        tally = function(work, args.count or count, random.Random(args.seed), work / "output.txt")
        lost += len(tally.losses)
        print_table(kind, tally, time.monotonic() - begun)
        if not tally.losses:
            shutil.rmtree(work)
        else:
            print(f"  the runs' output: {work}/output.txt")
    return 1 if lost else 0


def print_table(kind: str, tally: Tally, seconds: float) -> None:
    after = ", ".join(f"{n} {words}" for words, n in tally.next.most_common())
    print(f"{kind}: {tally.kills} kills, next start: {after}; {len(tally.losses)} losses "
          f"({seconds:.0f} s)")  # fmt: skip
    for phase, n in tally.phases.most_common():
        print(f"  {n:4}  {phase}")
    for loss in tally.losses[:10]:
        print(f"  LOSS: {loss}")


if __name__ == "__main__":
    sys.exit(main())
