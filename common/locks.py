"""One writer per folder: a lock that names its holder and that a crash does not leave behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def sole_writer(folder: str | Path, flag: str) -> Iterator[None]:
    """Be the only process that writes `folder`, which is made where it is missing; `flag` names it.

    Raises UserError, naming the process and host that hold it, where another one does. Readers are
    not kept out. The kernel gives the lock (flock) up when its holder ends, however it ends; the
    file `.lock` may then stay behind, and the next run takes it over. On NFS the lock holds between
    hosts where the server has a lock service; a file system without locks gets a note and no lock.
    Under torchrun only the first process may ask for it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{flag}: {folder} is being written by {_holder(path)}: wait until it ends, or name "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        no_locks = f"{folder} is on a file system without locks"
        print(f"note: {no_locks}: see to it that no other run writes there")
    try:
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
        path.write_text(json.dumps(holder))
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: nobody else has got it
        lock.release()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is inside, whatever user or host it belongs to.

    path: the lock's file, which stays; on a file system without locks nobody waits.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            error.filename = str(path)
            raise
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not said so yet, or has just ended
        return "another process"
