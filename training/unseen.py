"""Test images that nothing was fitted to: the guard that every judge of test images calls.

    judged = unseen_test(loaders, {"network": state["images"], "metric": metric.info.get("seen")})
    judged.loaders.test          # without the images that one of them has seen
    judged.left_out              # {"network": 3, "metric": None}; None: it cannot be known

What was fitted stores what it has seen: {"image_sha256": […], "group": […]}, hexadecimal hashes of
the image files, which may be cut to 16 digits, and the groups (photographs) of the images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import Loaders, RealQwenVLDataset

HASH_DIGITS = 16
Seen = dict[str, list[str]]


def images_of(dataset: RealQwenVLDataset, rows: Tensor) -> Seen:
    """Return the hashes and groups of these rows of a cache, sorted, each once."""
    table = dataset.rows.take(rows.tolist())
    columns = {
        name: table[name].to_pylist() if name in table.column_names else []
        for name in ("image_sha256", "group")
    }
    columns["image_sha256"] = [value and value[:HASH_DIGITS] for value in columns["image_sha256"]]
    return {name: sorted({v for v in values if v}) for name, values in columns.items()}


def fitted_images(dataset: RealQwenVLDataset) -> Seen:
    """Return hashes and groups of a cache's training and validation images."""
    return images_of(dataset, torch.cat([dataset.split.train, dataset.split.val]))


def all_seen(*parts: Seen | None) -> Seen | None:
    """Return what several have seen together, sorted, each once; None where one of them is None."""
    if None in parts:
        return None
    return {name: sorted({v for p in parts for v in p[name]}) for name in ("image_sha256", "group")}


def rows_seen(seen: Seen, dataset: RealQwenVLDataset, rows: Tensor) -> Tensor:
    """Return which of `rows` [n] of a cache are among the images, by hash or group: [n] bool."""
    hashes = {value[:HASH_DIGITS] for value in seen["image_sha256"]}
    groups = set(seen["group"])
    found = []
    for row in rows.tolist():
        own = images_of(dataset, torch.tensor([row]))
        found.append(bool(hashes & set(own["image_sha256"]) or groups & set(own["group"])))
    return torch.tensor(found, dtype=torch.bool)


def can_be_compared(seen: Seen, dataset: RealQwenVLDataset) -> bool:
    """Say whether images of a cache would be recognised: by hash, or by names of groups in common.

    Imported tokens have no hashes, and groups that somebody else named.
    """
    hashed = seen["image_sha256"] and dataset.rows["image_sha256"].null_count < len(dataset)
    return bool(hashed or set(seen["group"]) & set(dataset.rows["group"].to_pylist()))


class Judged(NamedTuple):
    """The loaders that a judge uses, and what was left out of the test images."""

    loaders: Loaders
    left_out: dict[str, int | None]  # what was fitted → images that it has seen, None: unknown

    @property
    def words(self) -> str:
        """Return what was left out or is unknown, for first lines and footers; "" for nothing."""
        parts = [
            f"{count} test images left out that the {name} has seen"
            for name, count in self.left_out.items()
            if count
        ]
        unknown = [name for name, count in self.left_out.items() if count is None]
        parts += [f"overlap with the images of the {name} unknown" for name in unknown]
        return "; ".join(parts)


def unseen_test(loaders: Loaders, fitted: dict[str, Seen | None]) -> Judged:
    """Return the loaders without the test images that one of `fitted` has seen.

    fitted: "network", "metric" or "codec" → what it has seen; None where its file does not say.
    Overlap is unknown there, and of images that `can_be_compared` by nothing.
    Raises InputError where no test image is left.
    """
    test = loaders.test
    rows = test.sampler.rows
    keep = torch.ones(len(rows), dtype=torch.bool)
    left_out: dict[str, int | None] = {}
    for name, seen in fitted.items():
        if seen is None or not can_be_compared(seen, test.dataset):
            left_out[name] = None
            continue
        overlap = rows_seen(seen, test.dataset, rows)
        left_out[name] = int(overlap.sum())
        keep &= ~overlap
    if not keep.any():
        who = ", ".join(f"the {name}" for name, count in left_out.items() if count)
        raise InputError(
            f"{test.dataset.cache_dir}: {who} was fitted to every test image of this cache: name "
            "the cache that it was fitted on, or one of other images"
        )
    if not keep.all():
        loaders = loaders._replace(test=test.only(rows[keep]))
    return Judged(loaders, left_out)
