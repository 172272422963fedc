"""Disks that are full, files that may not grow, folders that may not be written: each script there.

A limit on the size of files (RLIMIT_FSIZE) needs no rights. A small tmpfs, full or read-only, and a
user without rights need root; without it those cases are left out, and the table says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pydoc  # noqa: F401  # torch imports it late, and a user without rights may not read it
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import damage
import tiny

import compare_svd_nn
import extract_features
import factorize
import train_real_data
import visualize_svd_nn
from common import arguments
from experiments import benchmark, report

NOBODY = 65534


class Outcome(NamedTuple):
    status: int
    output: str  # of both streams


def in_process(run: Callable[[], None]) -> Outcome:
    """Run something that ends with SystemExit in a forked process; its output comes by a pipe,
    which no limit on files meets."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = 70
        try:
            run()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:
            sys.stderr.write(f"Traceback: {type(error).__name__}: {error}\n")
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        output = pipe.read()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output)


def scripts(place: Path, data: Path) -> dict[str, tuple[object, list[object]]]:
    """Command lines that write into `place`, over what an earlier run wrote there."""
    cache, results = place / "cache", place / "results"
    where = ["--cache_dir", cache, "--results_dir", results, "--device", "cpu"]
    train = [*where, "--log_dir", place / "log", *damage.SMALL]
    return {
        "train": (train_real_data, train),
        "train --resume": (
            train_real_data,
            [*where, "--log_dir", place / "log", "--resume", "--epochs", 1],
        ),
        "compare": (compare_svd_nn, where),
        "visualize": (visualize_svd_nn, where),
        "factorize": (factorize, [*where, "--out", place / "new_factors"]),
        "factorize --overwrite": (factorize, [*where, "--out", place / "factors", "--overwrite"]),
        "extract": (
            extract_features,
            ["--dataset_dir", data, "--cache_dir", place / "new_cache", "--device", "cpu"],
        ),
        "benchmark": (benchmark, [*where, "--ranks", 2, "--repeats", 1]),
        "report": (report, ["--results_dir", results]),
    }


def prepare(work: Path) -> tuple[Path, Path]:
    """A place where every script has run once, and a data set; made in processes of their own."""
    place, data = work / "place", work / "images"

    def write_inputs() -> None:
        tiny.write_data_set(data, [tiny.jpeg(i) for i in range(12)])
        tiny.write_cache(place / "cache", tiny.steep_tokens(40))

    in_process(write_inputs)
    commands = scripts(place, data)
    for name in ("train", "compare"):
        assert in_process(command(*commands[name])).status == 0, name
    first = [*commands["factorize"][1][:-1], place / "factors"]
    assert in_process(command(factorize, first)).status == 0
    return place, data


def command(script: object, argv: list[object]) -> Callable[[], None]:
    return lambda: arguments.run(script.main, script.get_args_parser(), [str(a) for a in argv])


def limited(run: Callable[[], None], size: int) -> Callable[[], None]:
    """`run` where no file may grow beyond `size` bytes."""

    def limited_run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run()

    return limited_run


def as_nobody(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a user who may read everything here and write nothing."""

    def run_as_nobody() -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        run()

    return run_as_nobody


@contextlib.contextmanager
def small_disk(place: Path, work: Path, free: int, read_only: bool) -> Iterator[Path | None]:
    """A copy of `place` on a tmpfs with `free` bytes left; None where none may be mounted."""
    mounted = work / "disk"
    mounted.mkdir(exist_ok=True)
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in place.rglob("*") if p.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + 256 * 1024 + free}", "tmpfs", mounted]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        copy = Path(shutil.copytree(place, mounted / "place"))
        left = shutil.disk_usage(mounted).free - free
        if left > 0:
            (mounted / "filler").write_bytes(bytes(left))
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        yield copy
    finally:
        subprocess.run(["umount", mounted], check=True)


def contents(place: Path) -> dict[str, str]:
    """Hash of each file, by its path below `place`."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def judge(name: str, before: dict[str, str], place: Path, outcome: Outcome) -> str:
    """refused, done, or what is wrong in capitals."""
    after = contents(place)
    if outcome.status not in (0, 2) or "Traceback" in outcome.output:
        return f"TRACEBACK {outcome.output.strip().splitlines()[-1:]}"
    if left := [path for path in after if ".tmp" in path or path.endswith(".lock")]:
        return f"LEFT BEHIND {left}"
    if outcome.status == 0:
        return "done"
    errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    if len(errors) != 1:
        return f"NOT ONE LINE {outcome.output[-300:]}"
    # what was there is there, in its place, moved aside by a fresh run, or made again
    written = {
        "train": "results/ResMLP/",
        "train --resume": "results/ResMLP/",
        "compare": "svd_nn_comparison",
        "factorize --overwrite": "factors/",
    }
    for path, digest in before.items():
        known = digest in after.values() or (name in written and written[name] in path)
        if not known:
            return f"GONE {path}"
    if name in ("train", "train --resume"):
        torn = in_process(lambda: check_whole(place))
        if torn.status:
            return f"TORN {torn.output[-300:]}"
    return "refused"


def check_whole(place: Path) -> None:
    """Every checkpoint under `place` loads."""
    from training import checkpoint

    for path in place.rglob("*.pt"):
        checkpoint.load_checkpoint(path)
    raise SystemExit(0)


def full_disk(work: Path) -> Iterator[tuple[str, str, str]]:
    """(way, script, outcome) of every case."""
    extract_features.load_encoder = lambda name, **options: tiny.TinyEncoder()
    place, data = prepare(work)
    for size in (0, 300, 5_000, 20_000, 45_000):
        for name in scripts(place, data):
            copy = Path(shutil.copytree(place, work / "copy" / "place"))
            before = contents(copy)
            run = limited(command(*scripts(copy, data)[name]), size)
            yield f"files of {size} bytes", name, judge(name, before, copy, in_process(run))
            shutil.rmtree(work / "copy")
    for free, read_only in ((0, False), (60_000, False), (200_000, False), (0, True)):
        way = "read-only disk" if read_only else f"{free} bytes free"
        for name in scripts(place, data):
            with small_disk(place, work, free, read_only) as copy:
                if copy is None:
                    yield way, name, "left out: no tmpfs may be mounted here"
                    continue
                before = contents(copy)
                outcome = in_process(command(*scripts(copy, data)[name]))
                yield way, name, judge(name, before, copy, outcome)
    if os.getuid():
        yield "no rights", "all", "left out: only root can become somebody else"
        return
    subprocess.run(["chmod", "-R", "a+rX", work], check=True)
    for name in scripts(place, data):
        before = contents(place)
        outcome = in_process(as_nobody(command(*scripts(place, data)[name])))
        yield "no rights", name, judge(name, before, place, outcome)
