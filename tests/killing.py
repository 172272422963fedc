"""Kill runs of the real scripts with SIGKILL, and see that nothing is lost (for tests/faults.py).

Each run is a forked process, so torch is imported once. It is killed at a random time, or inside
the n-th write of a file: half-way through it, before its rename, or after. After every kill each
file that is there must be whole and the next start must go on, or say what is there; the run's
final files must equal those of a run that nobody killed. What does not is a loss.
"""

from __future__ import annotations

import collections
import hashlib
import mmap
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tiny

import extract_features
import factorize
import train_real_data
from common import arguments
from figures import style
from lowrank_tokens import cache_writer, files
from lowrank_tokens import factor_files as coded_files
from lowrank_tokens.files import LOCK_NAME
from training import checkpoint

POINTS = ("half written", "before rename", "renamed")  # moments of one atomic write


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
    """Where a run kills itself: in its n-th atomic write, at one of POINTS, or `delay` seconds
    after it has begun a phase for the n-th time."""

    nth: int
    point: str
    delay: float = 0


def trace(board: Board, kill: Kill | None) -> None:
    """In the child: have every phase noted, and the process killed where `kill` says."""
    writes, begun = 0, collections.Counter()

    def phase(module: object, name: str, words: str) -> None:
        original = getattr(module, name)

        def noted(*args, **options):
            before = board.read()
            board.note(words)
            begun[words] += 1
            if kill and (kill.point, kill.nth) == (words, begun[words]):
                threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
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
    phase(cache_writer, "exact_singular_values", "spectra")
    phase(factorize, "factorise", "factorising")
    phase(factorize, "coded_image", "coding")

    original = files.atomic_path

    def reach(name: str, point: str) -> None:
        board.note(f"{point} {name}")
        if kill and writes == kill.nth and point == kill.point:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def atomic_path(path: str | Path) -> Iterator[Path]:
        nonlocal writes
        writes, before, name = writes + 1, board.read(), kind_of(Path(path).name)
        board.note(f"writing {name}")
        with original(path) as temporary:
            yield temporary
            if kill and writes == kill.nth and kill.point == "half written":
                os.truncate(temporary, temporary.stat().st_size // 2)
            reach(name, "half written")
            reach(name, "before rename")
        reach(name, "renamed")
        board.note(before)

    for module in (files, checkpoint, cache_writer, coded_files, style):
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
    return lambda: arguments.run(script.main, script.get_args_parser(), [str(a) for a in argv])


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
    writes: int  # of which a random one is cut off
    expected: object
    phases: dict[str, int] = {}  # that a run is killed in, and how often it goes through each


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
    way = rng.random()
    if way < 0.7:
        kill = Kill(rng.randint(1, scenario.writes), rng.choice(POINTS))
        if way < 0.35 and scenario.phases:
            point = rng.choice(list(scenario.phases))
            kill = Kill(rng.randint(1, scenario.phases[point]), point, rng.uniform(0, 0.01))
        status = finish(start(run, log, board, kill))
        return (board.read() if status == -signal.SIGKILL else None), status
    most = scenario.computing if rng.random() < 0.9 else scenario.seconds
    pid = start(run, log, board)
    phase = kill_at(pid, rng.uniform(0, most), board)
    return phase, finish(pid)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def difference(found: object) -> str:
    return found if isinstance(found, str) else f"{str(found)[:200]} …"


def unbroken(run: Callable[[], None], log: Path, mark: str) -> tuple[float, float]:
    """Run to the end: its seconds, and those until the phase `mark` began."""
    board, begun, marked = Board(), time.monotonic(), None
    pid = start(run, log, board)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        now = board.read()
        if marked is None and mark in now:
            marked = time.monotonic() - begun
        time.sleep(0.001)
    status, seconds = finish(pid), time.monotonic() - begun
    if status:
        sys.exit(f"the unbroken run failed with {status}: {last_line(log)}")
    return seconds, marked or seconds


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != LOCK_NAME]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
