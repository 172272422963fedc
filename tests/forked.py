"""Run a command in a forked process: one that is killed inside a write, or may not write much.

The modules are imported once, so a run takes as long as its work.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from common import arguments

POINTS = ("half written", "before the rename", "after the rename")  # moments of an atomic write


class Outcome(NamedTuple):
    """How a process ended: its exit status, or minus the signal, and both streams' text."""

    status: int
    output: str


def command(script: ModuleType, *argv: object) -> Callable[[], None]:
    """Return a function that runs the command line `argv` of a script and exits."""
    return lambda: arguments.run(script.main, script.get_args_parser(), [str(a) for a in argv])


def forked(run: Callable[[], None]) -> Outcome:
    """Call `run`, which exits, in a process of its own. Its output comes through a pipe."""
    read, write = os.pipe()
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.dup2(write, 1), os.dup2(write, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            run()
            status = 0
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


def killed(run: Callable[[], None], nth: int, point: str) -> Outcome:
    """Run in a process that gets SIGKILL at its `nth` rename of a file (from 1), at one of POINTS.

    Every file of the project is written under another name and renamed. A run with fewer renames
    ends by itself: its status is not -9.
    """

    def run_and_kill() -> None:
        renames = itertools.count(1)

        def patched(original: Callable) -> Callable:
            def rename(source: object, target: object, **options: object) -> None:
                last = next(renames) == nth
                if last and point == "half written" and str(source).endswith(".tmp"):
                    os.truncate(source, os.stat(source).st_size // 2)
                if last and point != "after the rename":
                    os.kill(os.getpid(), signal.SIGKILL)
                original(source, target, **options)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

            return rename

        os.replace, os.rename = patched(os.replace), patched(os.rename)
        run()

    return forked(run_and_kill)


def limited(run: Callable[[], None], size: int) -> Outcome:
    """Run in a process in which no file may grow beyond `size` bytes."""

    def run_limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run()

    return forked(run_limited)
