"""Rows of a data set, wherever its images lie: parquet files, or a folder of plain images.

    source = open_source("textVQA_groundingtask_bbox")
    for batch in source.batches(16):
        for row_id, row in batch:                # row: image, question, answer, bbox, group
            picture = read_image(row["image"])

A row's `image` is an `ImageCell`: bytes that the data set holds, or a file that it names; the
other values are None where the data set does not have them.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sha256_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageCell(NamedTuple):
    """One row's image before it is read."""

    data: bytes | None  # an encoded image; where None, `path` is read
    path: str | None  # as the data set names it: relative to one of `folders`, or absolute
    folders: tuple[Path, ...] = ()  # the last is the data set's, out of which no path may lead


class UnreadableImage(Exception):
    """Why an image cannot be read, in one line."""


def read_image(cell: ImageCell) -> Image.Image:
    """The decoded image, RGB, in its own size.

    Raises UnreadableImage: no bytes and no path, no such file, damaged, or more pixels than
    Pillow takes for honest (twice `Image.MAX_IMAGE_PIXELS`), which is found before decoding.
    """
    with _readable(cell):
        return Image.open(io.BytesIO(image_bytes(cell))).convert("RGB")


def image_size(cell: ImageCell) -> tuple[int, int]:
    """Width and height as the file's head says, nothing decoded. Raises UnreadableImage."""
    with _readable(cell):
        return Image.open(io.BytesIO(image_bytes(cell))).size


@contextmanager
def _readable(cell: ImageCell) -> Iterator[None]:
    name = f"{cell.path}: " if cell.path else ""
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
    """The image file's bytes. Raises ValueError or OSError where there are none to read."""
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
    note: what a user may not expect about the choice of rows, or None
    """

    kind = "real"
    split_by = "image"
    note: str | None = None
    sha256: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
        """Lists of (row number in the data set, row), at most `batch_size` long."""


def open_source(folder: str | Path) -> ImageSource:
    """The data set in `folder`: *.parquet there or in its data/, else every image below it.

    Parquet files win over image files beside them, which their rows may name. Raises InputError
    where there is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--dataset_dir {folder} is not a folder: name the data set's folder")
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    images = _images_below(folder)
    if files:
        source = ParquetSource(folder, files)
        if images:
            source.note = (
                f"{folder} holds parquet files and {len(images)} image files: the rows are the "
                "parquet's, a file is read only where a row names it"
            )
        return source
    if images:
        return FolderSource(folder, images)
    raise InputError(
        f"--dataset_dir {folder} has no *.parquet, no data/*.parquet and no image "
        f"({' '.join(IMAGE_SUFFIXES)}): name the data set's folder"
    )


def _images_below(folder: Path) -> list[str]:
    """Paths of images relative to `folder`, sorted; hidden files and folders are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                found.append(Path(parent, name).relative_to(folder).as_posix())
    return sorted(found)


class FolderSource(ImageSource):
    """A folder of plain images: a row for each file, without question, answers and box."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.folder, self.paths = folder, paths
        digest = hashlib.sha256()
        for path in paths:
            content = sha256_file(folder / path) if (folder / path).is_file() else "no file"
            digest.update(f"{path}\n{content}\n".encode())
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
    folder or to the data set's); question (text), answer (text or a list of texts), bbox (x, y,
    w, h in pixels) and group (text) may be missing, and other columns are not read.
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
        image, answer = row["image"], row.get("answer")
        if isinstance(image, dict):
            cell = ImageCell(image.get("bytes"), image.get("path"), self.folders)
        elif isinstance(image, str):
            cell = ImageCell(None, image, self.folders)
        else:
            cell = ImageCell(image, None)
        return {**row, "image": cell, "answer": [answer] if isinstance(answer, str) else answer}


def _open_parquet(path: Path) -> pq.ParquetFile:
    with _undamaged(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
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
    """Of a list's entries; None for what is no list."""
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


_COLUMNS = {
    "image": (_is_image, "struct(bytes, path), bytes or a file's path"),
    "question": (_TEXT.__contains__, "text"),
    "answer": (lambda kind: kind in _TEXT or _value_type(kind) in _TEXT, "text or a list of texts"),
    "bbox": (_is_box, "a list of the numbers x, y, w, h"),
    "group": (_TEXT.__contains__, "text"),
}


def _columns(schema: pa.Schema) -> list[str]:
    return [name for name in _COLUMNS if name in schema.names]


def _check_columns(path: Path, schema: pa.Schema) -> None:
    if "image" not in schema.names:
        raise InputError(f"{path} has no column image, only {', '.join(schema.names) or 'none'}")
    for name in _columns(schema):
        fits, words = _COLUMNS[name]
        kind = schema.field(name).type
        if not fits(kind):
            raise InputError(f"{path}: column {name} is of type {kind}, it has to be {words}")
