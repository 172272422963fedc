"""What a comparison at equal bytes comes to: bytes at an error, and how many times another's.

Every method is a curve of mean bytes over mean error, swept by one global knob. Bytes at an error
between two knobs are interpolated (log bytes, linearly in the error); nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from common.tables import print_columns
from experiments.rivals import Knob
from svd_baseline import FEWEST_GROUPS

TARGETS = {"raw_error": (0.24, 0.16, 0.10, 0.05), "task_error": (0.10, 0.05, 0.037, 0.03)}
SHARED_BY = (328, 4370)  # images that a table shares the codec file between
BASES = ("coded", "coded_in_metric", "coded_in_metric_head_steps")  # that others are set against


class Point(NamedTuple):
    """A method at one knob: of each image [n] float64."""

    knob: Knob
    shared_bytes: int
    values: dict[str, Tensor]  # bytes, raw_error, rel_error, retrieval, …


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
        spread = float(student_t.ppf(0.975, len(names) - 1)) * math.sqrt(variance)
        found["interval_95"] = [math.exp(whole - spread), math.exp(whole + spread)]
    return found


def tables(measured: dict[str, list[Point]], groups: list[str]) -> dict:
    """error → target → method → bytes an image.

    alone, with `interval_95` over groups; shared_by_N, with its share of what is shared between N
    images; each_image, where every image reaches the target by a knob of its own; and times → base
    → how many times the bytes of the base the method takes, {"mean", "interval_95"}.
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
                for n in SHARED_BY:
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


def print_tables(found: dict) -> None:
    titles = {
        "alone": "without what all images share",
        **{f"shared_by_{n}": f"with the share of one of {n} images" for n in SHARED_BY},
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
