"""Folders of results: what a new run replaces is moved aside, never lost in silence."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import new_folder, read_json


def move_aside(paths: Iterable[Path], folder: Path) -> Path:
    """Move files to a new folder `previous-<time>` in `folder`, and return that folder."""
    target = new_folder(folder / time.strftime("previous-%Y%m%d-%H%M%S"))
    for path in paths:
        path.rename(target / path.name)
    return target


def keep_other_caches_results(record: Path, patterns: Iterable[str], cache_sha256: str) -> None:
    """Move results of another cache aside before results of this one take their place.

    record: the JSON file that is about to be written. Its entry "cache_sha256" is the
    `content_sha256` of the cache that it was made from. patterns: names, or glob patterns, of the
    files beside it that were made with it. Nothing happens where there is no such file, or where it
    was made from this cache.
    """
    if not record.exists():
        return
    try:
        made_from = read_json(record, "").get("cache_sha256")
    except InputError:  # damaged: nobody knows what it was made from
        made_from = None
    if made_from != cache_sha256:
        names = {record, *(path for pattern in patterns for path in record.parent.glob(pattern))}
        target = move_aside(sorted(names), record.parent)
        print(f"note: {record.name} was made from another cache: it was moved to {target}")
