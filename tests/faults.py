"""Inject faults into the real scripts and count what is lost. Run by hand, prints a table:

    python tests/faults.py                               # every kind, some 5 minutes
    python tests/faults.py kill_train --count 50 --seed 1

kill_train, kill_extract, kill_factorize: killing.py, kill_cases.py; corrupt: damage.py; disk:
full_disk.py.
The exit status is 1 where anything was lost, or was wrong without a word.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import argparse
import collections
import contextlib
import io
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import damage  # noqa: E402
import full_disk  # noqa: E402
import kill_cases  # noqa: E402
import killing  # noqa: E402


def kill(torture: Callable[[Path, int, random.Random, Path], killing.Tally]) -> Callable:
    """A kind of `main` from one of killing.py."""

    def count_kills(work: Path, count: int, rng: random.Random) -> int:
        tally = torture(work, count, rng, work / "output.txt")
        after = ", ".join(f"{n} {words}" for words, n in tally.next.most_common())
        print(f"  {tally.kills} kills, next start: {after}; {len(tally.losses)} losses; killed in")
        for phase, n in tally.phases.most_common():
            print(f"  {n:4}  {phase}")
        for loss in tally.losses[:10]:
            print(f"  LOSS: {loss}")
        return len(tally.losses)

    return count_kills


def corrupt(work: Path, count: int, rng: random.Random) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        table, defects = damage.corrupt(work, count, rng)
    outcomes = ("refused", "found by --verify", "harmless")
    print(f"  {'':40}" + "".join(f"{outcome:>19}" for outcome in outcomes))
    for name, found in table.items():
        print(f"  {name:40}" + "".join(f"{found[outcome]:>19}" for outcome in outcomes))
    for defect in defects:
        print(f"  DEFECT: {defect}")
    return len(defects)


def disk(work: Path, count: int, rng: random.Random) -> int:
    ways: dict[str, collections.Counter] = {}
    defects = []
    for way, name, outcome in full_disk.full_disk(work):
        ways.setdefault(way, collections.Counter())[outcome if outcome[1:2].islower() else "x"] += 1
        if outcome[1:2].isupper():
            defects.append(f"{way}, {name}: {outcome}")
    for way, found in ways.items():
        print(f"  {way:22}" + ", ".join(f"{n} {words}" for words, n in found.items()))
    for defect in defects:
        print(f"  DEFECT: {defect}")
    return len(defects)


KINDS = {  # and how many cases of each
    "kill_train": (kill(kill_cases.kill_train), 90),
    "kill_extract": (kill(kill_cases.kill_extract), 60),
    "kill_factorize": (kill(kill_cases.kill_factorize), 30),
    "corrupt": (corrupt, 640),
    "disk": (disk, 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument("--count", type=int, default=None, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs")
    args = parser.parse_args()
    lost = 0
    for kind in args.kinds:
        function, count = KINDS[kind]
        work = Path(tempfile.mkdtemp(prefix=f"{kind}_", dir=args.work))
        print(f"{kind}:", flush=True)
        begun = time.monotonic()
        defects = function(work, args.count or count, random.Random(args.seed))
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
        if defects:
            print(f"  what the runs left is in {work}")
        else:
            shutil.rmtree(work)
        lost += defects
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
