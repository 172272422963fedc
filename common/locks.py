"""One writer per folder: a lock that names its holder and that a crash does not leave behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    descriptor = _locked(path, flag)
    try:
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: nobody else has got it
        os.close(descriptor)


def _locked(path: Path, flag: str) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{flag}: {path.parent} is being written by {holder}: wait until it ends, or name "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"note: {path.parent} is on a file system without locks: "
                  "see to it that no other run writes there")  # fmt: skip
            return descriptor
        os.close(descriptor)  # its holder removed it between the opening and the locking


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not said so yet
        return "another process"
