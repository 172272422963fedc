"""Rows of a data set, wherever its images lie: parquet files, or a folder of plain images.

    source = open_source("textVQA_groundingtask_bbox")
    for batch in source.batches(16):
        for row_id, row in batch:                # row: image, question, answers, bbox, group
            picture = read_image(row["image"])

A row's `image` is an `ImageCell`: bytes that the data set holds, or a file that it names; the
other values are None where the data set does not have them.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sha256_file
from lowrank_tokens.pixels import upright_rgb, upright_size

# formats of which Pillow knows the names alone, or that need another program
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
LEFT_OUT_SHOWN = 5  # suffixes
READ_AT_ONCE = 2**20  # bytes of a parquet file


class ImageCell(NamedTuple):
    """One row's image before it is read."""

    data: bytes | None  # an encoded image; where None, `path` is read
    path: str | None  # as the data set names it: relative to one of `folders`, or absolute
    folders: tuple[Path, ...] = ()  # the last is the data set's, out of which no path may lead


class UnreadableImage(Exception):
    """Why an image cannot be read, in one line."""


def read_image(cell: ImageCell) -> Image.Image:
    """Return the decoded image, upright, RGB, in its own size (`lowrank_tokens.pixels`).

    Raises UnreadableImage: no bytes and no path, no such file, damaged, pixels of an unknown scale,
    or more pixels than Pillow takes for honest (twice `Image.MAX_IMAGE_PIXELS`), which is found
    before decoding.
    """
    with _readable(cell):
        return upright_rgb(Image.open(io.BytesIO(image_bytes(cell))))


def read_image_file(path: str | Path) -> Image.Image:
    """Return the image of a file as `read_image` does. Raises InputError where it is none."""
    try:
        return read_image(ImageCell(Path(path).read_bytes(), str(path)))
    except (UnreadableImage, OSError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from None


def image_size(cell: ImageCell) -> tuple[int, int]:
    """Return width and height of `read_image`'s result from the file's header, without decoding it.

    Raises UnreadableImage where there is no header to read.
    """
    with _readable(cell):
        data = image_bytes(cell)
        return upright_size(Image.open(io.BytesIO(data)), data)


@contextmanager
def _readable(cell: ImageCell) -> Iterator[None]:
    name = f"{printable(cell.path)}: " if cell.path else ""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:  # whose own words hold a memory address
        raise UnreadableImage(f"{name}not an image file that Pillow knows") from None
    except Exception as error:
        # damaged bytes make Pillow's decoders raise nearly anything; all of it means one thing
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UnreadableImage(f"{name}{reason}"[:300]) from None


def image_bytes(cell: ImageCell) -> bytes:
    """Return the image file's bytes. Raises ValueError or OSError where there are none to read."""
    if cell.data is not None:
        return cell.data
    if not cell.path:
        raise ValueError("no image bytes and no path")
    for folder in cell.folders:
        # an absolute path replaces the folder; links are the user's own and may lead anywhere
        path = Path(os.path.abspath(folder / cell.path))
        if not path.is_relative_to(os.path.abspath(cell.folders[-1])):
            raise ValueError("leads outside the data set's folder")
        if path.is_file():
            return path.read_bytes()
    raise ValueError("no such file")


class ImageSource(ABC):
    """Rows in a fixed order, read as they are needed.

    kind: "real" or "demo"; split_by: "group" where rows name their group, else "image";
    sha256: of everything in the files, in order: another value is another data set
    notes: what a user may not expect about what is read, one line each
    """

    kind = "real"
    split_by = "image"
    notes: list[str]
    sha256: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
        """Yield lists of (row number in the data set, row), at most `batch_size` long."""


def open_source(folder: str | Path) -> ImageSource:
    """Open the data set in `folder`: *.parquet there or in its data/, else every image below it.

    Parquet files win over image files beside them, which their rows may name. Raises InputError
    where there is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--dataset_dir {folder} is not a folder: name the data set's folder")
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    below = find_images(folder)
    if files:
        source = ParquetSource(folder, files)
        if below.images:
            source.notes.append(
                f"{folder} holds parquet files and {len(below.images)} image files: the rows are "
                "the parquet's, a file is read only where a row names it"
            )
        return source
    if below.images:
        return FolderSource(folder, below)
    raise InputError(
        f"--dataset_dir {folder} has no *.parquet, no data/*.parquet and no image (.jpg, .png, "
        f".webp, .avif or another format that Pillow reads)"
        f"{'; ' + below.left_out_note if below.left_out_note else ''}: name the data set's folder"
    )


def image_suffixes() -> set[str]:
    """Return the lower-case suffixes, with their dot, of the formats that Pillow decodes."""
    registered = Image.registered_extensions()
    return {
        suffix
        for suffix, form in registered.items()
        if form in Image.OPEN and form not in NOT_DECODED
    }


class FoundFiles(NamedTuple):
    """Files below a folder; hidden files and folders are not looked at.

    images: paths of images relative to the folder, sorted, as the file system spells them
    left_out: suffix → number of files that are no images
    closed: folders that cannot be read
    """

    images: list[str]
    left_out: Counter[str]
    closed: list[str]

    @property
    def left_out_note(self) -> str | None:
        """Say in one line what is not read, or None where everything is."""
        parts = []
        if self.left_out:
            kinds = [f"{n} {suffix}" for suffix, n in self.left_out.most_common(LEFT_OUT_SHOWN)]
            kinds += ["…"] * (len(self.left_out) > LEFT_OUT_SHOWN)
            parts.append(f"{self.left_out.total()} files are no images ({', '.join(kinds)})")
        if self.closed:
            parts.append(f"{len(self.closed)} folders cannot be read ({self.closed[0]} is one)")
        return " and ".join(parts) or None


def find_images(folder: Path) -> FoundFiles:
    """Find the images in a folder and in all folders below it, those that links lead to included.

    A folder that several links lead to is read once.
    """
    suffixes, images, left_out, closed = image_suffixes(), [], Counter(), []
    visited = set()

    def note_closed(error: OSError) -> None:
        closed.append(printable(os.path.relpath(error.filename, folder)))

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=note_closed):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in suffixes:
                images.append(Path(parent, name).relative_to(folder).as_posix())
            else:
                left_out[printable(suffix) or "without a suffix"] += 1
    return FoundFiles(sorted(images), left_out, closed)


def printable(path: str) -> str:
    """Return a path whose bytes are not UTF-8 as text that prints: such bytes are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class FolderSource(ImageSource):
    """A folder of plain images: a row for each file, without question, answers and box."""

    def __init__(self, folder: Path, found: FoundFiles) -> None:
        self.folder, self.paths = folder, found.images
        self.notes = [found.left_out_note] if found.left_out_note else []
        digest = hashlib.sha256()
        for path in self.paths:
            content = sha256_file(folder / path) if (folder / path).is_file() else "no file"
            digest.update(os.fsencode(path) + f"\n{content}\n".encode())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
        for first in range(0, len(self.paths), batch_size):
            paths = self.paths[first : first + batch_size]
            yield [
                (row_id, {"image": ImageCell(None, path, (self.folder,))})
                for row_id, path in enumerate(paths, start=first)
            ]


class ParquetSource(ImageSource):
    """Rows of parquet files, one file after the other.

    Column image is struct(bytes, path), raw bytes or file paths (relative to the parquet files'
    folder or to the data set's); question (text), answer or answers (text or a list of texts), bbox
    (x, y, w, h in pixels), group (text), and, for matching between views, photograph (text), view
    (x, y, w, h in its pixels) and mirrored (bool) may be missing; other columns are not read.
    """

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.files = files
        self.folders = (files[0].parent, folder)
        parquets = [_open_parquet(path) for path in files]
        self.counts = [parquet.metadata.num_rows for parquet in parquets]
        schema = parquets[0].schema_arrow
        for path, parquet in zip(files, parquets, strict=True):
            _check_columns(path, parquet.schema_arrow)
            if (found := _columns(parquet.schema_arrow)) != (first := _columns(schema)):
                raise InputError(
                    f"{path} has the columns {', '.join(found)}, {files[0]} has "
                    f"{', '.join(first)}: keep files of one data set in a folder"
                )
        self.columns = _columns(schema)
        unread = [name for name in schema.names if name not in self.columns]
        self.notes = [f"columns that are not read: {', '.join(unread)}"] if unread else []
        kind = (schema.metadata or {}).get(b"kind", b"real")
        if kind not in (b"real", b"demo"):
            raise InputError(f"{files[0]} is damaged (its kind is {kind!r}): download it again")
        self.kind = kind.decode()
        self.split_by = "group" if "group" in self.columns else "image"
        digest = hashlib.sha256()
        for path in files:
            digest.update(bytes.fromhex(sha256_file(path)))
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return sum(self.counts)

    def batches(self, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
        row_id = 0
        for path in self.files:
            chunks = _open_parquet(path).iter_batches(batch_size, columns=self.columns)
            while True:
                with _undamaged(path):
                    chunk = next(chunks, None)
                    rows = chunk.to_pylist() if chunk else []
                if chunk is None:
                    break
                yield list(enumerate(map(self._row, rows), start=row_id))
                row_id += len(rows)

    def _row(self, row: dict) -> dict:
        image, answer = row.pop("image"), row.pop("answer", row.pop("answers", None))
        if isinstance(image, dict):
            cell = ImageCell(image.get("bytes"), image.get("path"), self.folders)
        elif isinstance(image, str):
            cell = ImageCell(None, image, self.folders)
        else:
            cell = ImageCell(image, None)
        return {**row, "image": cell, "answers": [answer] if isinstance(answer, str) else answer}


def _open_parquet(path: Path) -> pq.ParquetFile:
    with _undamaged(path):
        # read page by page: a row group of large images may be far larger than a batch
        reading = {"pre_buffer": False, "buffer_size": READ_AT_ONCE}
        file = pq.ParquetFile(path, page_checksum_verification=True, **reading)
        _ = file.schema_arrow  # read here, where damage is looked for
        return file


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is damaged ({reason}): download it again") from None


_NULL = pa.null()
_TEXT = (pa.string(), pa.large_string(), _NULL)
_BYTES = (pa.binary(), pa.large_binary())


def _value_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of a list's entries; None for what is no list."""
    lists = pa.ListType, pa.LargeListType, pa.FixedSizeListType
    return kind.value_type if isinstance(kind, lists) else None


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return kind in _BYTES + _TEXT
    fields = {field.name: field.type for field in kind}
    if not fields.keys() & {"bytes", "path"}:
        return False
    return fields.get("bytes", _NULL) in (*_BYTES, _NULL) and fields.get("path", _NULL) in _TEXT


def _is_box(kind: pa.DataType) -> bool:
    value = _value_type(kind)
    numbers = value and (pa.types.is_integer(value) or pa.types.is_floating(value))
    return bool(numbers) or _NULL in (kind, value)


def _is_answer(kind: pa.DataType) -> bool:
    return kind in _TEXT or _value_type(kind) in _TEXT


_COLUMNS = {
    "image": (_is_image, "struct(bytes, path), bytes or a file's path"),
    "question": (_TEXT.__contains__, "text"),
    "answer": (_is_answer, "text or a list of texts"),
    "answers": (_is_answer, "text or a list of texts"),
    "bbox": (_is_box, "a list of the numbers x, y, w, h"),
    "group": (_TEXT.__contains__, "text"),
    "photograph": (_TEXT.__contains__, "text"),
    "view": (_is_box, "a list of the numbers x, y, w, h"),
    "mirrored": (lambda kind: kind in (pa.bool_(), _NULL), "true or false"),
}


def _columns(schema: pa.Schema) -> list[str]:
    names = [name for name in _COLUMNS if name in schema.names]
    return [name for name in names if name != "answers" or "answer" not in names]


def _check_columns(path: Path, schema: pa.Schema) -> None:
    if "image" not in schema.names:
        raise InputError(f"{path} has no column image, only {', '.join(schema.names) or 'none'}")
    for name in _columns(schema):
        if schema.names.count(name) > 1:
            raise InputError(f"{path} has several columns named {name}: rename all but one")
        fits, words = _COLUMNS[name]
        kind = schema.field(name).type
        if not fits(kind):
            raise InputError(f"{path}: column {name} is of type {kind}, it has to be {words}")
