"""Figure of the benchmark: error above the SVD's against time, and time over tokens.

Arguments are lists and dicts: no model, no cache. Raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from figures.style import (
    GREY,
    METHODS,
    ROUNDING,
    ROUNDING_PCT,
    SAME_METHOD,
    STYLE,
    as_array,
    curve,
    log_scale,
    new_figure,
    save,
)

# where a label may stand, points from its dot: (right, up, horizontal alignment)
PLACES = [(9, 0, "left"), (-9, 0, "right"), (0, 16, "center"), (0, -16, "center")] + [
    (side * 12, up * 16, "left" if side > 0 else "right")
    for up in (1, -1, 2, -2, 3, -3, 4, -4)
    for side in (1, -1)
]
SHARE = {"left": 0, "center": 0.5, "right": 1}  # of a label's width left of where it is placed


@rc_context(STYLE)
def error_against_time(path: str | Path, records: list[dict], footer: str) -> None:
    """Draw mean excess over ms per matrix; below it, of several sizes, ms over the tokens.

    records: of benchmark.json, all with "ms_median". The rank is the largest that a network
    reaches. The upper panel shows the smallest number of tokens at which it does. An excess that is
    rounding or undefined lies at the lower edge.
    """
    rank = max(r["rank"] for r in records if r["method"] == "network")
    records = [record for record in records if record["rank"] == rank]
    sizes = sorted({record["tokens"] for record in records})
    heights = [6.2] + [4.2] * (len(sizes) > 1)
    figure = new_figure(11, 1.2 + sum(heights))
    top, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    first = [record for record in records if record["tokens"] == sizes[0]]
    _points(top, first)
    top.set_title(f"T = {sizes[0]} tokens")
    top.set_xlabel("ms per matrix, median; bar: interquartile range")
    top.set_ylabel("rel_error above the SVD's (%), mean")
    top.set_ylim(ROUNDING_PCT / 8, 8 * max(_excess(first).max(), 10 * ROUNDING_PCT))
    log_scale(top)
    ends = {ax: _time_over_tokens(ax, records, sizes) for ax in below}
    figure.get_layout_engine().execute(figure)  # labels are placed in pixels
    _labels(top, first)
    save(figure, path, f"Error against time, rank {rank}", footer, ends)


def _time_over_tokens(ax: Axes, records: list[dict], sizes: list[int]) -> list[tuple]:
    """Draw ms per matrix of each method; return the labels at the curves' ends."""
    ends = []
    for name in dict.fromkeys((r["method"], r["arch"]) for r in records):
        own = sorted(
            (r for r in records if (r["method"], r["arch"]) == name), key=lambda r: r["tokens"]
        )
        label, colour = _style(own[0])
        curve(ax, [r["tokens"] for r in own], [r["ms_median"] for r in own], colour)
        if own[-1]["tokens"] == sizes[-1]:  # the SVD may end earlier, and its dots say where
            ends.append((own[-1]["ms_median"], label, colour))
    ax.set(xlabel="tokens T", ylabel="ms per matrix, median")
    for which in ("x", "y"):
        log_scale(ax, which)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    return ends


def front(records: list[dict]) -> list[int]:
    """Return the indices, by time, of records that no other beats in both time and error.

    Errors below rounding are equal: of those, the fastest is on the front. Undefined ones are not.
    """
    excess = _excess(records)
    defined = [i for i, record in enumerate(records) if record["excess_mean"] is not None]
    order = sorted(defined, key=lambda i: (records[i]["ms_median"], excess[i]))
    kept: list[int] = []
    for i in order:
        if not kept or excess[i] < excess[kept[-1]]:
            kept.append(i)
    return kept


def _front_corners(records: list[dict]) -> np.ndarray:
    """Return the front as steps, [·, 2] of (ms, excess), to 6 times the slowest method."""
    on = front(records)
    times, excess = as_array([r["ms_median"] for r in records]), _excess(records)
    right = np.append(times[on], 6 * times.max())[1:]  # a step ends where the next begins
    return np.column_stack([np.column_stack([times[on], right]).ravel(), np.repeat(excess[on], 2)])


def _excess(records: list[dict]) -> np.ndarray:
    """Return the mean excess, at least that of rounding; undefined ones are set to it."""
    values = as_array([record["excess_mean"] for record in records])
    return np.fmax(values, ROUNDING_PCT)  # fmax ignores NaN


def _style(record: dict) -> tuple[str, str]:
    return METHODS[SAME_METHOD.get(record["method"], record["method"])]


def _label(record: dict) -> str:
    label = _style(record)[0]
    if record["method"] == "network":
        label += f" {record['arch']}" + ", untrained" * (record["sketch"] == "untrained")
    if record["K"] is not None:
        label += f" (K = {record['K']}, p = {record['p']})"
    return label + (", undefined" if record["excess_mean"] is None else "")


def _points(ax: Axes, records: list[dict]) -> None:
    """Draw dots with their spread, and the front as steps."""
    excess = _excess(records)
    for record, y in zip(records, excess, strict=True):
        colour = _style(record)[1]
        half = record["ms_iqr"] / 2
        low = max(record["ms_median"] - half, record["ms_median"] / 10)  # a log axis
        ax.hlines(y, low, record["ms_median"] + half, color=colour, lw=2)
        ax.plot(record["ms_median"], y, "o", color=colour, ms=8, zorder=3)
    times = as_array([record["ms_median"] for record in records])
    corners = _front_corners(records)
    ax.plot(*corners.T, color=GREY, lw=1.2, zorder=1)
    ax.set_xlim(times.min() / 3, 6 * times.max())
    log_scale(ax, "x")
    ax.axhline(ROUNDING_PCT, color=GREY, lw=0.8, ls=":")
    style = {"color": GREY, "fontsize": 9.5, "transform": ax.get_yaxis_transform()}
    words = f"{ROUNDING} % and less is rounding, or undefined"
    ax.text(0.01, ROUNDING_PCT / 1.3, words, va="top", **style)
    if len(corners):
        ax.text(0.99, corners[-1, 1] * 1.2, "Pareto front", ha="right", **style)


def _labels(ax: Axes, records: list[dict]) -> None:
    """Write each label at the first of PLACES where it hides no dot and no other label."""
    times, excess = as_array([r["ms_median"] for r in records]), _excess(records)
    dots = ax.transData.transform(np.column_stack([times, excess]))
    point = ax.figure.dpi / 72  # pixels
    taken = [Bbox.from_extents(*(dot - 6 * point), *(dot + 6 * point)) for dot in dots]
    taken += [text.get_window_extent() for text in ax.texts]
    corners = ax.transData.transform(_front_corners(records))
    taken += [Bbox([a, b]).padded(point) for a, b in zip(corners, corners[1:], strict=False)]
    inside = ax.get_window_extent()
    rounding = ax.transData.transform((1, ROUNDING_PCT))[1]
    taken.append(Bbox.from_extents(inside.x0, rounding - 1, inside.x1, rounding + 1))
    for i in np.argsort(times):
        words = ax.text(0, 0, _label(records[i]), fontsize=10.5)
        width, height = words.get_window_extent().size
        words.remove()
        boxes = []
        for right, up, side in PLACES:
            x, y = dots[i] + np.array([right, up]) * point
            left = x - SHARE[side] * width
            boxes.append(Bbox.from_bounds(left, y - height / 2, width, height))
        hidden = [
            box.count_overlaps(taken[:i] + taken[i + 1 :])
            + 9 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1))
            for box in boxes
        ]
        best = int(np.argmin(hidden))  # the first of the best
        right, up, side = PLACES[best]
        colour = _style(records[i])[1]
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4}
        arrow["relpos"] = (SHARE[side], 0.5 - np.sign(up) / 2)
        style = {"ha": side, "va": "center", "color": colour, "fontsize": 10.5}
        style |= {"textcoords": "offset points", "arrowprops": arrow if up else None}
        ax.annotate(_label(records[i]), (times[i], excess[i]), (right, up), **style)
        taken.append(boxes[best])
