"""Figure of a comparison at equal bytes: bytes of an image against what each reader sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from figures.style import STYLE, as_array, column, log_scale, new_figure, save

# label, colour and line of each curve (Okabe & Ito's colours)
CURVES: dict[str, tuple[str, str, str]] = {
    "coded": ("coded factors", "#D55E00", "-"),
    "transform": ("transform", "#0072B2", "-"),
    "factors_deflate": ("quantised SVD", "#009E73", "-"),
    "factors_quantised": ("quantised SVD", "#009E73", "-"),
    "avif": ("AVIF picture", "#882255", "--"),
}
# of a reader: the panel's title, and whether more is better
PANELS: dict[str, tuple[str, bool]] = {
    "box_precision": ("boxes: average precision", True),
    "box_precision_trained": ("boxes, probe fitted on decoded tokens", True),
    "matching_decoded": ("matching: share of tokens found", True),
    "task_error": ("head: relative error of its output", False),
    "raw_error": ("reconstruction: raw_error", False),
}
BYTES = (400, 40_000)  # that are shown, where a curve has that many
LABEL_GAP = 0.075  # between two labels, of the panel's height


@rc_context(STYLE)
def bytes_against_error(path: str | Path, results: dict, footer: str) -> None:
    """Draw a panel for each reader, bytes an image (log) on x; full tokens are a grey line.

    results: of bytes.json. Of SVD factors the form with fewer bytes at equal raw_error is shown;
    a codec in a metric stands for one without where there is no other.
    """
    methods = shown(results["methods"])
    keys = [key for key in PANELS if any(key in p for points in methods.values() for p in points)]
    columns = min(2, len(keys))
    lines = -(-len(keys) // columns)
    figure = new_figure(5.2 * columns, 3.7 * lines)
    panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for ax, key in zip(panels, keys, strict=False):
        title, more_is_better = PANELS[key]
        ends = []
        for name, points in methods.items():
            ends += _curve(ax, points, key, name)
        ax.set_xlim(BYTES)
        if more_is_better:
            ax.set_ylim(bottom=0)
            full = results["full_tokens"].get(key, {}).get("mean")
            if full is not None:
                ax.axhline(full, color="#777777", lw=1.2, ls=":")
                ends.append((BYTES[1], full, "full tokens", "#777777"))
        else:
            log_scale(ax, "y")
        log_scale(ax, "x")
        ax.set_xlabel("bytes an image (log scale)")
        ax.set_title(title)
        _label(ax, ends)
    for ax in panels[len(keys) :]:
        ax.set_axis_off()
    save(figure, path, "What readers see at equal bytes", f"{footer}; bands: 95 % over groups")


def shown(methods: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return the methods of CURVES that are drawn: name there → points."""
    plain = [name for name in ("factors_deflate", "factors_quantised") if name in methods]
    worse = max(plain, key=lambda name: _bytes_near(methods[name])) if len(plain) > 1 else None
    found = {}
    for name in CURVES:
        points = methods.get(name) or methods.get(f"{name}_in_metric")
        if points and name != worse:
            found[name] = points
    return found


def _bytes_near(points: list[dict], error: float = 0.16) -> float:
    """Return the bytes at a raw_error, interpolated, to compare two methods by."""
    points = sorted(points, key=lambda point: point["raw_error"]["mean"])
    errors, sizes = (
        column([p["raw_error"] for p in points], "mean"),
        column([p["bytes"] for p in points], "mean"),
    )
    return float(np.interp(error, errors, sizes))


def _curve(
    ax: Axes, points: list[dict], key: str, name: str
) -> list[tuple[float, float, str, str]]:
    """Draw one method; its right end as (bytes, value, label, colour), if it has one."""
    label, colour, line = CURVES[name]
    points = sorted((p for p in points if key in p), key=lambda point: point["bytes"]["mean"])
    points = [p for p in points if p[key]["mean"] is not None]
    if not points:
        return []
    size = column([point["bytes"] for point in points], "mean")
    value = column([point[key] for point in points], "mean")
    ax.plot(size, value, color=colour, ls=line, lw=2.2, marker="o", ms=3.5)
    spans = [point[key]["interval_95"] or (math.nan, math.nan) for point in points]
    if name in ("coded", "transform"):
        ax.fill_between(size, *as_array(spans).T, color=colour, alpha=0.10, lw=0)
    inside = np.flatnonzero((size >= BYTES[0]) & (size <= BYTES[1]))
    return [(size[inside[-1]], value[inside[-1]], label, colour)] if inside.size else []


def _label(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write labels in a column right of the panel, in order of height, a line to each curve."""
    transform = ax.transData + ax.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    places = [float(transform.transform((end[0], end[1]))[1]) for end in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    over = max(0.0, places[-1] - 1) if places else 0.0
    for i in reversed(range(len(places))):  # pushed back where the column is too long
        highest = places[i + 1] - LABEL_GAP if i + 1 < len(places) else places[-1] - over
        places[i] = min(places[i], highest)
    for (size, value, text, colour), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.6, "shrinkA": 0}
        style = {"color": colour, "fontsize": 12, "va": "center", "annotation_clip": False}
        style["arrowprops"] = line | {"relpos": (0, 0.5)}
        ax.annotate(text, (size, value), (1.02, place), "data", "axes fraction", **style)
