"""Folders of shards: written by several processes in any order, gone on with, read by row.

    partial.json     only while unfinished: what the folder was begun with
    manifest.json    written last: a folder without it is not finished

A shard belongs to ROWS_PER_SHARD consecutive rows, or fewer of large images, is whole or absent and
depends on no other, so that the finished folder is byte-identical to that of one uninterrupted
process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import (
    check_files,
    check_keys,
    check_same_header,
    file_entry,
    first_difference,
    read_json,
    sweep_temporaries,
    with_content_hash,
    write_json,
)

ROWS_PER_SHARD = 128
TOKENS_PER_SHARD = 2**18  # at most: a shard is in memory whole when it is written


START_ANEW = "start again and overwrite the folder"


def finished_words(folder: Path, what: str) -> str:
    """Say that a folder is finished, and what to do instead of writing it."""
    return f"{folder} holds {what}: use it, name another folder, or overwrite it"


class ShardWriter:
    """The base of writers of such folders; a subclass writes the shards, then calls `seal`.

    A subclass says what it is about: `kinds` of header that are its own; `commit`, the name, but
    for the number, of the file that commits a shard; `others`, patterns of its further files.

    A subclass whose shard is one file commits it by `commit_file`: a small JSON file, written after
    it, with its size and the hash that it had when it was written. `committed_file` gives these
    back for the manifest, so that damage between two runs is never sealed. A cache's shards do the
    same in their row fragments, with `file_entry`.

    Args:
        folder: to write. A finished one in it is refused unless `overwrite`; a folder of another
            kind always is.
        header: what the content depends on, with "kind" and "format". A folder that was begun
            with another one is refused with both values.
        num_rows: of all shards.
        most_tokens: of a row.
        conditions: settings beside the header that must match when an unfinished folder is gone on
            with. A finished one need not match them.
    """

    kinds: tuple[str, ...]
    commit: str
    others: tuple[str, ...] = ()

    def __init__(
        self,
        folder: str | Path,
        header: dict,
        num_rows: int,
        overwrite: bool = False,
        conditions: dict | None = None,
        most_tokens: int = 1,
    ) -> None:
        self.folder, self.header, self.num_rows = Path(folder), header, num_rows
        self.rows_per_shard = max(1, min(ROWS_PER_SHARD, TOKENS_PER_SHARD // most_tokens))
        self._pattern = self.commit.replace("{:05d}", "*")
        begun = header | (conditions or {})
        self._refuse_others(begun, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()
        sweep_temporaries(self.folder)
        partial = self.folder / "partial.json"
        if not partial.exists():
            write_json(partial, begun)
        for path in sorted(self.folder.glob(self._pattern)):
            self.check_shard(path)

    def what(self, manifest: dict) -> str:
        """Say what a finished folder with this manifest is."""
        raise NotImplementedError

    def check_shard(self, path: Path) -> None:
        """Raise InputError where a shard that is gone on from, by its `commit` file, is damaged."""
        raise NotImplementedError

    def commit_path(self, shard: int) -> Path:
        """Return the file that commits a shard."""
        return self.folder / self.commit.format(shard)

    def commit_file(self, shard: int, path: Path) -> None:
        """Commit a shard that is the file `path`, with its size and hash."""
        write_json(self.commit_path(shard), file_entry(path))

    def committed_file(self, commit_path: Path) -> dict:
        """Return name, size and hash of a shard's file, as it was when it was committed.

        Raises InputError where the file is missing or has another size.
        """
        entry = read_json(commit_path, START_ANEW)
        check_files(commit_path, [entry], START_ANEW)
        return entry

    def rows_of(self, shard: int) -> range:
        """Return the rows that belong to a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    @property
    def shards(self) -> range:
        """Return the numbers of all shards."""
        return range(-(-self.num_rows // self.rows_per_shard))

    def shards_to_do(self) -> list[int]:
        """Return the shards that are not on disk yet, lowest first."""
        return [shard for shard in self.shards if not self.commit_path(shard).exists()]

    @property
    def rows_done(self) -> int:
        """Return how many rows have their shards on disk."""
        return self.num_rows - sum(len(self.rows_of(shard)) for shard in self.shards_to_do())

    def seal(self, manifest: dict) -> dict:
        """Write the manifest, which commits the folder, with a hash of itself; return it."""
        manifest = with_content_hash(manifest)
        write_json(self.folder / "manifest.json", manifest)
        self.remove_leftovers()
        return manifest

    def remove_leftovers(self) -> None:
        """Remove what a finished folder does not need: a run killed after its manifest left it."""
        (self.folder / "partial.json").unlink(missing_ok=True)
        if (self.folder / "manifest.json").exists():
            for path in sorted(self.folder.glob(self._pattern), reverse=True):
                path.unlink()
        sweep_temporaries(self.folder)

    def _refuse_others(self, begun: dict, overwrite: bool) -> None:
        manifest, partial = (self.folder / f"{name}.json" for name in ("manifest", "partial"))
        for path in filter(Path.exists, (manifest, partial)):
            try:
                found = read_json(path, START_ANEW)
            except InputError:
                if not self._holds_own_files():
                    found = None
                elif overwrite:
                    continue
                else:
                    raise
            if not isinstance(found, dict) or found.get("kind") not in self.kinds:
                raise InputError(f"{self.folder} holds something else: name another folder")
            if overwrite:
                continue
            if path == partial:
                check_same_header(str(self.folder), found, begun)
            else:
                # what a manifest says beyond its header is no difference
                found_header = {key: found.get(key) for key in self.header}
                if different := first_difference(found_header, self.header):
                    key, before, now = different
                    raise InputError(
                        f"{self.folder} holds {self.what(found)}, which was begun with "
                        f"{key} = {before}, now it is {now}: name another folder, or overwrite it"
                    )
                self.remove_leftovers()
                raise InputError(finished_words(self.folder, self.what(found)))
        if not overwrite and not partial.exists() and any(self.folder.glob(self._pattern)):
            raise InputError(f"{partial} is missing: {START_ANEW}")

    def _holds_own_files(self) -> bool:
        """Say whether the folder holds files of this kind beside its JSON."""
        return any(any(self.folder.glob(pattern)) for pattern in (self._pattern, *self.others))

    def _clear(self) -> None:
        # the manifest goes first: a half-removed folder must not look like a whole one; then what
        # commits the shards, the last one first, before what it commits
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for path in sorted(self.folder.glob(self._pattern), reverse=True):
            path.unlink()
        self.remove_leftovers()
        for pattern in self.others:
            for path in self.folder.glob(pattern):
                path.unlink()


def read_finished(folder: Path, again: str, remedy: str) -> tuple[Path, dict]:
    """Return path and content of a folder's manifest.json.

    Raises InputError where it is missing or no JSON, with `again` as the remedy of a folder that
    was begun, else `remedy`.
    """
    path = folder / "manifest.json"
    return path, read_json(path, again if (folder / "partial.json").exists() else remedy)


def check_shards(path: Path, manifest: dict, remedy: str, others: Iterable[dict] = ()) -> None:
    """Refuse the manifest at `path` whose shards, or `others` of its files, are not as it says
    (`check_files`), or whose shards have not its count of rows between them."""
    check_files(path, [*manifest["shards"], *others], remedy)
    for shard in manifest["shards"]:
        check_keys(path, shard, {"rows": int}, remedy)
    if sum(shard["rows"] for shard in manifest["shards"]) != manifest["count"]:
        raise InputError(f"{path}: the shards' rows do not add up to its count: {remedy}")


class ShardReader:
    """Rows of a finished folder; a shard is opened by the subclass when it is first asked for.

    manifest: with "count" and, of each of its "shards", "file" and "rows".
    """

    def __init__(self, folder: str | Path, manifest: dict) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self._ends = torch.tensor([shard["rows"] for shard in manifest["shards"]]).cumsum(0)
        self._opened: dict[int, object] = {}

    def open(self, path: Path, rows: int):
        """Open a shard of so many rows. Raises InputError where it is damaged."""
        raise NotImplementedError

    def find(self, row: int) -> tuple[object, int]:
        """Return the opened shard of a row, and the row's number in it.

        Raises InputError where the row is not there.
        """
        if not 0 <= row < self.manifest["count"]:
            raise InputError(
                f"row {row} is not in {self.folder}: give 0 to {self.manifest['count'] - 1}"
            )
        index = int(torch.searchsorted(self._ends, row, right=True))
        entry = self.manifest["shards"][index]
        if index not in self._opened:
            self._opened[index] = self.open(self.folder / entry["file"], entry["rows"])
        return self._opened[index], row - (int(self._ends[index]) - entry["rows"])

    # memory maps do not pickle: a loader's worker process maps the shards for itself
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}
