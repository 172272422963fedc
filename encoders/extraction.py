"""Images into tokens into a cache, shard by shard: decoded ahead by threads, encoded in batches.

Images with the same bytes are encoded once, where they come first. Batches hold images of one grid
and begin anew with each shard: the bits of features do not depend on where a run was interrupted,
nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import dropwhile, islice
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from common import processes
from encoders.image_sources import (
    ImageCell,
    ImageSource,
    UnreadableImage,
    image_bytes,
    image_size,
    printable,
    read_image,
)
from encoders.row_values import check_answers, check_box
from encoders.towers import VisionEncoder, resize_image
from lowrank_tokens import progress
from lowrank_tokens.cache_writer import FeatureCacheWriter
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import LARGEST_FEATURE, usable_features

THUMBNAIL_SIZE = 224  # pixels, of the longer side
# Threads and not a DataLoader's processes: decoders leave Python's lock to each other, and pixels
# would have to pass through /dev/shm, which containers keep small.
DECODERS = 8  # threads at most: so many keep an H100's tower fed
BATCHES_AHEAD = 1
READ_AT_ONCE = 16  # rows of the data set
LEAST_ESTIMATE = 60  # seconds: of a shorter run no estimate is printed
NOT_USABLE = f"its features are not finite, or above {LARGEST_FEATURE:.0e}"

Row = tuple[int, dict]  # row number in the data set, row


class Look(NamedTuple):
    """A row's image as it is known before it is decoded."""

    sha256: str | None  # of its file; None where there is none
    grid: Grid  # of its tokens; (1, 1) where it cannot be read
    group: str | None  # what must stay on one side of the split


class Sample(NamedTuple):
    """One row on its way to the encoder; `reason` says why it cannot be read.

    notes: what was wrong with its values (`encoders.row_values`).
    """

    row_id: int
    first: int | None  # the first row with the same image: itself where it has to be encoded
    record: dict | None
    pixels: torch.Tensor | None  # where it has to be encoded
    reason: str | None
    notes: tuple[str, ...] = ()


class RowBatch(NamedTuple):
    """Rows of one shard whose images have one grid."""

    shard: int
    rows: list[Row]


def look_at(rows: ImageSource, encoder: VisionEncoder) -> list[Look]:
    """Return hash, grid and group of each row's image; no image is decoded."""
    found = (row for batch in rows.batches(READ_AT_ONCE) for _, row in batch)
    show = processes.is_main()
    found = progress.over(found, "hash", "images", total=len(rows), show=show)
    return [_look(row, encoder) for row in found]


def _look(row: dict, encoder: VisionEncoder) -> Look:
    sha = _sha256(row["image"])
    return Look(sha, _grid(row["image"], encoder), sha and (row.get("group") or sha))


def _sha256(cell: ImageCell) -> str | None:
    try:
        return hashlib.sha256(image_bytes(cell)).hexdigest()
    except (OSError, ValueError):  # read_image finds words for it
        return None


def _grid(cell: ImageCell, encoder: VisionEncoder) -> Grid:
    if encoder.grid:
        return encoder.grid
    try:
        width, height = encoder.size_of(*image_size(cell))
    except UnreadableImage:  # found again where it is decoded, and listed there
        return 1, 1
    return height // encoder.step, width // encoder.step


def extract(
    rows: ImageSource,
    encoder: VisionEncoder,
    writer: FeatureCacheWriter,
    looks: list[Look],
    batch_tokens: int,
) -> None:
    """Encode and write the shards that are missing, each of them in one of the processes.

    At most `batch_tokens` tokens are encoded at once, or one image that has more. While the encoder
    works on a batch, threads decode and preprocess the next.
    """
    begun = time.perf_counter()
    tokens_to_do = sum(
        math.prod(looks[row].grid)
        for shard in writer.shards_to_do()
        for row in writer.rows_of(shard)
    )
    is_first = True
    samples: list[Sample] = []  # of the shard that is being made
    encoded: dict[int, torch.Tensor] = {}  # row → its features [T, D]
    to_do = batches_to_do(rows, writer, looks, batch_tokens)
    with processes.Progress(len(rows), "encode", writer.rows_done) as bar:
        for shard, batch in prepared(to_do, encoder, looks):
            samples += batch
            if fresh := [s for s in batch if s.pixels is not None]:
                features = encoder.encode(torch.stack([s.pixels for s in fresh]))
                features = features.to("cpu", torch.bfloat16)
                encoded |= zip((s.row_id for s in fresh), features, strict=True)
            # their pixels are not needed any more
            samples[-len(batch) :] = [s._replace(pixels=None) for s in batch]
            if len(samples) == len(writer.rows_of(shard)):
                write_samples(writer, shard, samples, encoded)
                samples, encoded = [], {}
            bar.update(len(batch))
            if is_first:
                done = sum(math.prod(looks[s.row_id].grid) for s in batch) * processes.world()
                print_estimate(time.perf_counter() - begun, done, tokens_to_do)
                is_first = False


def print_estimate(seconds: float, done: int, tokens: int) -> None:
    """Print how long all tokens may take, by those that are done, where it is over a minute."""
    estimate = seconds * tokens / done
    if estimate > LEAST_ESTIMATE:
        tqdm.write(
            f"the first {done} of {tokens} tokens took {seconds:.1f} s: about "
            f"{estimate / 60:.0f} minutes for all"
        )


def batches_to_do(
    rows: ImageSource, writer: FeatureCacheWriter, looks: list[Look], batch_tokens: int
) -> Iterator[RowBatch]:
    """Yield batches of the shards that this process makes; no batch is of two shards or grids."""
    every = (row for batch in rows.batches(READ_AT_ONCE) for row in batch)
    for shard in processes.own_part(writer.shards_to_do()):
        wanted = writer.rows_of(shard)
        here = dropwhile(lambda row, first=wanted.start: row[0] < first, every)
        by_grid: dict[Grid, list[Row]] = {}
        for row in islice(here, len(wanted)):
            by_grid.setdefault(looks[row[0]].grid, []).append(row)
        for grid, alike in by_grid.items():
            size = max(1, batch_tokens // math.prod(grid))
            for first in range(0, len(alike), size):
                yield RowBatch(shard, alike[first : first + size])


def write_samples(
    writer: FeatureCacheWriter, shard: int, samples: list[Sample], encoded: dict[int, torch.Tensor]
) -> None:
    """Write a shard. An image that came in an earlier shard gets its features from there.

    Images whose features are not usable are skipped with their reason, as unreadable ones are.
    """
    samples = sorted(samples, key=lambda sample: sample.row_id)
    features: dict[int, torch.Tensor] = {}
    for i, s in enumerate(samples):
        if s.reason is None:
            found = encoded[s.first] if s.first in encoded else writer.features_of(s.first)
            if found is None or not usable_features(found[None]):
                samples[i] = s._replace(reason=NOT_USABLE)
            else:
                features[s.row_id] = found
    readable = [s for s in samples if s.reason is None]
    skipped = [{"row_id": s.row_id, "reason": s.reason} for s in samples if s.reason]
    notes = [{"row_id": s.row_id, "note": note} for s in readable for note in s.notes]
    tokens = [features[s.row_id] for s in readable]
    writer.write_shard(shard, tokens, [s.record for s in readable], skipped, notes)


def prepared(
    batches: Iterator[RowBatch], encoder: VisionEncoder, looks: list[Look]
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield shard and samples of batches, made by threads some batches ahead of who asks."""
    first_of: dict[str | None, int] = {}
    for row_id, look in enumerate(looks):
        first_of.setdefault(look.sha256, row_id)
    pending: deque[tuple[int, list[Future[Sample]]]] = deque()

    def oldest() -> tuple[int, list[Sample]]:
        shard, samples = pending.popleft()
        return shard, [sample.result() for sample in samples]

    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        for shard, rows in batches:
            samples = []
            for row_id, row in rows:
                look = looks[row_id]
                first = first_of[look.sha256]
                samples.append(pool.submit(prepare_row, row_id, row, encoder, look, first))
            pending.append((shard, samples))
            if len(pending) > BATCHES_AHEAD:
                yield oldest()
        while pending:
            yield oldest()


def prepare_row(row_id: int, row: dict, encoder: VisionEncoder, look: Look, first: int) -> Sample:
    """Decode and preprocess one row.

    look: at its file, before; first: the first row with these bytes.
    """
    # rows with the same bytes rely on the first one
    if (sha := _sha256(row["image"])) != look.sha256:
        raise InputError(f"the image of row {row_id} has changed: type the same command again")
    try:
        image = read_image(row["image"])
        thumbnail = thumbnail_of(image, encoder)
    except UnreadableImage as error:
        return Sample(row_id, None, None, None, f"unreadable image: {error}")
    box = check_box(row.get("bbox"), *image.size)
    answers = check_answers(row.get("answers"))
    record = {
        "row_id": row_id,
        "group": row.get("group") or sha,
        "image_sha256": sha,
        "path": printable(row["image"].path) if row["image"].path else row["image"].path,
        "question": row.get("question"),
        "answers": answers.answers,
        "bbox": box.box,
        "width": image.width,
        "height": image.height,
        "grid_rows": look.grid[0],
        "grid_columns": look.grid[1],
        "photograph": row.get("photograph"),
        "view": row.get("view"),
        "mirrored": row.get("mirrored"),
        "thumbnail": thumbnail,
    }
    pixels = encoder.preprocess(image) if first == row_id else None
    return Sample(
        row_id, first, record, pixels, None, tuple(filter(None, (box.note, answers.note)))
    )


def thumbnail_of(image: Image.Image, encoder: VisionEncoder) -> bytes:
    """Return a small JPEG of what the encoder sees, in its aspect ratio."""
    if encoder.limits:
        sides = encoder.size_of(*image.size)
        size = [max(1, round(side * THUMBNAIL_SIZE / max(sides))) for side in sides]
        small = image.resize(size, Image.Resampling.BICUBIC)
    else:
        small = resize_image(image, THUMBNAIL_SIZE, encoder.resize)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()
