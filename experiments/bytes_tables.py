"""Tables of a comparison at equal bytes: bytes at an error, readers' scores at some bytes.

Every method is a curve over mean bytes, swept by one global knob. Between two knobs it is
interpolated (log bytes, linearly in the error or score); nothing is extrapolated. Differences are
paired by image, their intervals are over groups: only they say that one method is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats.t.ppf, without its second of import
from torch import Tensor

from common.tables import print_columns
from experiments.rivals import Knob
from lowrank_tokens.errors import summarise
from svd_baseline import FEWEST_GROUPS, interval_95

TARGETS = {"raw_error": (0.24, 0.16, 0.10, 0.05), "task_error": (0.10, 0.05, 0.037, 0.03)}
BASES = ("coded", "coded_in_metric", "coded_in_metric_head_steps")  # that others are set against
AT_BYTES = (600, 1500, 5000, 20_000)  # an image, at which readers are asked
READERS = {
    "box_precision": "average precision of a probe for boxes",
    "box_precision_trained": "the same, of a probe fitted on decoded tokens and read on full ones",
    "box_iou": "overlap with the nearest box",
    "matching_query_full": "matching, full tokens looked for among decoded ones",
    "matching_decoded": "matching, both decoded",
}
# that readers' scores are set against: full tokens, the two forms of the codec, and a picture
READER_BASES = ("bf16", "coded", "transform", "avif")


@dataclass
class Point:
    """A method at one knob: of each image [n] float64.

    values: bytes, raw_error, rel_error, task_error and the readers' scores, as far as known.
    """

    knob: Knob
    shared_bytes: float
    needs_tower: bool  # to be read
    read_ms: float  # of one core, for an image
    values: dict[str, Tensor]

    def as_json(self) -> dict:
        """Return all but the knob as plain values."""
        values = {name: value.tolist() for name, value in self.values.items()}
        return {**vars(self), "values": values}

    @classmethod
    def from_json(cls, knob: Knob, record: dict) -> Point:
        """Undo `as_json`."""
        values = {k: torch.tensor(v, dtype=torch.float64) for k, v in record["values"].items()}
        return cls(**record | {"knob": knob, "values": values})

    def with_images_of(self, other: Point) -> Point:
        """Return the point of these images and then the other's, which is of the same knob."""
        names = self.values.keys() & other.values.keys()
        values = {name: torch.cat([self.values[name], other.values[name]]) for name in names}
        mine, more = len(self.values["bytes"]), len(other.values["bytes"])

        def mean(own: float, others: float) -> float:
            return (mine * own + more * others) / (mine + more)

        shared = mean(self.shared_bytes, other.shared_bytes)
        read_ms = mean(self.read_ms, other.read_ms)
        return Point(self.knob, shared, self.needs_tower, read_ms, values)


def only_images(point: Point, images: Sequence[bool]) -> Point:
    """Return the point of those of its images that are marked."""
    mask = torch.tensor(images)
    values = {name: value[mask] for name, value in point.values.items()}
    return Point(point.knob, point.shared_bytes, point.needs_tower, point.read_ms, values)


def summarise_point(point: Point, groups: list[str]) -> dict:
    """Return the JSON's entry: what reading takes, and mean, p90 and interval of each value."""
    entry: dict = {
        "knob": point.knob,
        "shared_bytes": point.shared_bytes,
        "needs": needs(point),
        "read_ms": point.read_ms,
    }
    for name, value in point.values.items():
        entry[name] = summarise(value) | {"interval_95": interval_or_none(value, groups)}
    return entry


def needs(point: Point) -> str:
    """Return in words what reading needs beside the image's bytes."""
    if point.needs_tower:
        return "the encoder"
    return f"a file of {point.shared_bytes / 1e6:.1f} MB" if point.shared_bytes else "nothing"


def interval_or_none(values: Tensor, groups: list[str]) -> list[float] | None:
    """Return the 95 % interval of the mean; None where no value is known."""
    return None if values.isnan().all() else interval_95(values, groups)


def bytes_at(error: list[float], size: list[float], target: float) -> float | None:
    """Bytes at which a swept curve reaches `target`; None where it is outside the sweep.

    error, size: of each knob, in any order. Of several crossings the one of fewest bytes counts.
    """
    points = sorted(zip(size, error, strict=True))
    for (low, high_error), (high, low_error) in zip(points, points[1:], strict=False):
        if low_error <= target <= high_error:
            if high_error == low_error:
                return low
            share = (high_error - target) / (high_error - low_error)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return None


def mean_curve(points: list[Point], key: str, images: np.ndarray, share: float = 0.0):
    """Error and bytes of each knob, means over `images` (bool [n]), with this share of what all
    images share."""
    error = [float(point.values[key].numpy()[images].mean()) for point in points]
    size = [
        float(point.values["bytes"].numpy()[images].mean()) + share * point.shared_bytes
        for point in points
    ]
    return error, size


def jackknife_95(
    statistic: Callable[[np.ndarray], float | None], groups: list[str]
) -> dict[str, float | list[float] | None] | None:
    """exp of `statistic` over all images, and its interval over groups: {"mean", "interval_95"}.

    statistic: a logarithm, of the images of a mask (bool [n]), or None where it is not known. Its
    standard error is that of leaving out one group after another (Efron & Tibshirani 1993, 11.5),
    the interval Student's t over groups, as everywhere here. None where the statistic is; the
    interval is None below FEWEST_GROUPS groups, or where one left out takes it out of the sweep.
    """
    names, index = np.unique(groups, return_inverse=True)
    whole = statistic(np.ones(len(groups), dtype=bool))
    if whole is None:
        return None
    found = {"mean": math.exp(whole), "interval_95": None}
    left_out = [statistic(index != g) for g in range(len(names))] if len(names) > 1 else []
    if len(names) >= FEWEST_GROUPS and None not in left_out:
        variance = (len(names) - 1) * float(np.var(left_out))
        spread = float(stdtrit(len(names) - 1, 0.975)) * math.sqrt(variance)
        found["interval_95"] = [math.exp(whole - spread), math.exp(whole + spread)]
    return found


def tables(measured: dict[str, list[Point]], groups: list[str], shared_by: tuple[int, ...]) -> dict:
    """Return bytes_at (`bytes_tables`) and reader_at (`reader_tables`)."""
    return {
        "bytes_at": bytes_tables(measured, groups, shared_by),
        "reader_at": reader_tables(measured, groups),
    }


def scores_at(points: list[Point], key: str, size: float) -> Tensor | None:
    """Return each image's score at mean bytes `size`, [n]; None outside the sweep.

    Between two knobs the scores are mixed linearly in the logarithm of the mean bytes. A method
    without a knob, full tokens, has its score at every size.
    """
    known = [point for point in points if key in point.values]
    if known and known[0].knob is None:
        return known[0].values[key]
    known.sort(key=lambda point: float(point.values["bytes"].mean()))
    logs = [math.log(float(point.values["bytes"].mean())) for point in known]
    for i in range(len(known) - 1):
        if logs[i] <= math.log(size) <= logs[i + 1] and logs[i] < logs[i + 1]:
            share = (math.log(size) - logs[i]) / (logs[i + 1] - logs[i])
            low, high = known[i].values[key], known[i + 1].values[key]
            return (1 - share) * low + share * high
    return None


def reader_tables(measured: dict[str, list[Point]], groups: list[str]) -> dict:
    """Return reader → bytes → method → {"mean", "interval_95", "minus": base → the same}.

    minus: the mean difference to a base at the same bytes (bf16: full tokens), paired by image,
    with its interval over groups.
    """
    reports: dict = {}
    for key in READERS:
        for size in AT_BYTES:
            scores = {
                name: values
                for name, points in measured.items()
                if (values := scores_at(points, key, size)) is not None and not values.isnan().all()
            }
            if set(scores) <= {"bf16"}:
                continue
            entries = reports.setdefault(key, {}).setdefault(str(size), {})
            for name, values in scores.items():
                entries[name] = with_interval(values, groups)
                entries[name]["minus"] = {
                    base: with_interval(values - scores[base], groups)
                    for base in READER_BASES
                    if base in scores and base != name
                }
    return reports


def with_interval(values: Tensor, groups: list[str]) -> dict:
    """Return the mean of what is known, and its interval over groups."""
    return {"mean": float(values.nanmean()), "interval_95": interval_or_none(values, groups)}


def bytes_tables(
    measured: dict[str, list[Point]], groups: list[str], shared_by: tuple[int, ...]
) -> dict:
    """Return error → target → method → bytes an image.

    alone, with `interval_95` over groups; shared_by_N, for each N of `shared_by`, with its share of
    what is shared between N images; each_image, where every image reaches the target by a knob of
    its own; and times → base → how many times the bytes of the base the method takes, {"mean",
    "interval_95"}.
    """
    found: dict = {}
    everyone = np.ones(len(groups), dtype=bool)
    for key, targets in TARGETS.items():
        known = {name: points for name, points in measured.items() if key in points[0].values}
        for target in targets if known else ():

            def log_bytes(name: str, images: np.ndarray, key=key, target=target) -> float | None:
                size = bytes_at(*mean_curve(measured[name], key, images), target)
                return None if size is None else math.log(size)

            def log_ratio(name: str, base: str, images: np.ndarray, of=log_bytes) -> float | None:
                own, other = of(name, images), of(base, images)
                return None if own is None or other is None else own - other

            entries = found.setdefault(key, {}).setdefault(str(target), {})
            for name, points in known.items():
                alone = jackknife_95(lambda m, n=name: log_bytes(n, m), groups)
                entry = {"each_image": each_image(points, key, target)}
                entry["alone"] = alone and alone["mean"]
                entry["interval_95"] = alone and alone["interval_95"]
                for n in shared_by:
                    curve = mean_curve(points, key, everyone, 1 / n)
                    entry[f"shared_by_{n}"] = bytes_at(*curve, target)
                entry["times"] = {
                    base: jackknife_95(lambda m, n=name, b=base: log_ratio(n, b, m), groups)
                    for base in BASES
                    if base in known and base != name
                }
                entries[name] = entry
    return found


def each_image(points: list[Point], key: str, target: float) -> float | None:
    """Mean over images of the bytes at which each one's own curve reaches the target; None where
    one of them does not."""
    error = torch.stack([point.values[key] for point in points], dim=-1).tolist()
    size = torch.stack([point.values["bytes"] for point in points], dim=-1).tolist()
    found = [bytes_at(e, s, target) for e, s in zip(error, size, strict=True)]
    return None if None in found else sum(found) / len(found)


# ---------------------------------------------------------------------------------------- printed


def print_tables(results: dict, shared_by: tuple[int, ...]) -> None:
    """Print what bytes.json holds: bytes at an error, readers at some bytes, what reading takes."""
    print_bytes(results["tables"]["bytes_at"], shared_by)
    print_readers(results["tables"]["reader_at"], results["chance"])
    print("to read an image: what is needed beside its bytes, and milliseconds of one core")
    rows = [
        [
            f"  {name}",
            points[len(points) // 2]["needs"],
            f"{points[len(points) // 2]['read_ms']:.1f}",
        ]
        for name, points in results["methods"].items()
    ]
    print_columns(rows)


def print_readers(reports: dict, chance: dict[str, float]) -> None:
    """Print a table for each reader: score at some bytes, and the difference to full tokens."""
    for key, sizes in reports.items():
        guess = f"; chance {chance[key]:.3f}" if key in chance else ""
        title = f"{READERS[key]}, at so many bytes an image{guess}"
        print(f"{title} [difference to full tokens, 95 % over groups]")
        names = list(dict.fromkeys(name for entries in sizes.values() for name in entries))
        rows = [
            [f"  {name}", *(_score(entries.get(name)) for entries in sizes.values())]
            for name in names
        ]
        print_columns([["", *sizes], *rows])


def _score(entry: dict | None) -> str:
    if entry is None:
        return "-"
    apart = entry["minus"].get("bf16")
    if apart is None or apart["interval_95"] is None:
        return f"{entry['mean']:.3f}"
    low, high = apart["interval_95"]
    return f"{entry['mean']:.3f} [{low:+.3f}, {high:+.3f}]"


def print_bytes(found: dict, shared_by: tuple[int, ...]) -> None:
    """Print bytes at an error, with and without what all images share, and times another's."""
    titles = {
        "alone": "without what all images share",
        **{f"shared_by_{n}": f"with the share of one of {n} images" for n in shared_by},
        "each_image": "the same target for each image, without what all images share",
    }
    for key, targets in found.items():
        words = key.replace("_", " ")
        cells: dict[str, Callable[[dict], str]] = {
            f"bytes an image at {words}, {title}": lambda entry, k=label: _number(entry[k])
            for label, title in titles.items()
        }
        for base in BASES:
            title = f"times the bytes of {base} at {words} [95 % over groups]"
            cells[title] = lambda entry, b=base: _times(entry["times"].get(b))
        for title, cell in cells.items():
            rows = [
                [f"  {name}", *(cell(entries[name]) for entries in targets.values())]
                for name in next(iter(targets.values()))
            ]
            if rows := [row for row in rows if set(row[1:]) != {"-"}]:
                print(title)
                print_columns([["", *targets], *rows])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _times(found: dict | None) -> str:
    if not found:
        return "-"
    digits = 1 if found["mean"] >= 10 else 2
    span = found["interval_95"]
    ends = "" if span is None else f" [{span[0]:.{digits}f}, {span[1]:.{digits}f}]"
    return f"{found['mean']:.{digits}f}{ends}"
