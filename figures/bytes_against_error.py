"""Figure of a comparison at equal bytes: bytes of an image against raw_error and task error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from figures.style import STYLE, as_array, column, log_scale, new_figure, save

# label, colour and line of each code (Okabe & Ito's colours)
CODES: dict[str, tuple[str, str, str]] = {
    "coded_in_metric_head_steps": ("coded, head steps", "#661100", "--"),
    "coded_in_metric": ("coded, metric", "#AA4466", "-"),
    "coded": ("coded factors", "#D55E00", "-"),
    "transform_in_metric": ("KLT × DCT, metric", "#56B4E9", "--"),
    "transform": ("KLT × DCT", "#0072B2", "-"),
    "factors_deflate_in_metric": ("DEFLATE, metric", "#66AA77", "--"),
    "factors_deflate": ("one step, DEFLATE", "#009E73", "-"),
    "factors_int8_in_metric": ("int8, metric", "#999999", "--"),
    "factors_int8": ("int8 factors", "#222222", "-"),
    "factors_head_steps": ("int8, head steps", "#882255", "--"),
    "factors_bf16": ("bf16 factors", "#777777", "-"),
    "pca_deflate": ("PCA, DEFLATE", "#B98700", "-"),
    "pq": ("PQ", "#CC79A7", "-"),
    "jpeg": ("JPEG", "#332288", ":"),
    "webp": ("WebP", "#117777", ":"),
}
# what each panel is for: its errors, and its methods. A talk can show eight curves; bytes.json has
# every method at both errors
RAW = "coded klt_dct factors_deflate factors_int8 pca_deflate jpeg webp".split()
TASK = """coded_in_metric coded_in_metric_head_steps klt_dct_in_metric coded factors_int8
    factors_head_steps pca_deflate jpeg webp""".split()
PANELS = {"raw_error": ((0.045, 0.3), RAW), "task_error": ((0.02, 0.15), TASK)}
BANDS = ("coded", "coded_in_metric")  # whose interval is drawn: the others' scatter with them


@rc_context(STYLE)
def bytes_against_error(path: str | Path, results: dict, footer: str) -> None:
    """raw_error left and, where there is a head, task error right, over bytes an image (log).

    results: of bytes.json. Each curve is labelled at its end inside the panel.
    """
    methods = results["methods"]
    keys = [key for key in PANELS if any(key in points[0] for points in methods.values())]
    figure = new_figure(5.0 * len(keys), 6.2)
    panels = np.atleast_1d(figure.subplots(1, len(keys)))
    for ax, key in zip(panels, keys, strict=True):
        span, names = PANELS[key]
        if "coded_in_metric" not in methods:  # then the rivals are shown plain too
            names = dict.fromkeys(name.removesuffix("_in_metric") for name in names)
        ends = []
        for name in names:
            if key in methods.get(name, [{}])[0]:
                ends += _curve(ax, methods[name], key, span, name)
        ax.set_ylim(span)  # before the scale, whose ticks follow what is shown
        for which in "xy":
            log_scale(ax, which)
        ax.set_xlabel("bytes an image (log scale)")
        ax.set_title(f"{key.replace('_', ' ')} (log scale)")
        _label(ax, ends)
    footer += "; bands: 95 % of the mean over groups"
    save(figure, path, _finding(results), footer)


def _curve(
    ax: Axes, points: list[dict], key: str, span: tuple[float, float], name: str
) -> list[tuple[float, float, str, str]]:
    """Draw one method; its end inside the panel as (bytes, error, label, colour), if it has one."""
    label, colour, line = CODES[name]
    points = sorted(points, key=lambda point: point["bytes"]["mean"])
    size = column([point["bytes"] for point in points], "mean")
    error = column([point[key] for point in points], "mean")
    low, high = span
    inside = np.flatnonzero((error >= low) & (error <= high))
    if not inside.size:
        return []
    shown = slice(max(0, inside[0] - 1), inside[-1] + 2)
    wide = 2.6 if name.startswith("coded") else 1.6
    ax.plot(size[shown], error[shown], color=colour, ls=line, lw=wide)
    if name in BANDS:
        spans = [point[key]["interval_95"] or (np.nan, np.nan) for point in points[shown]]
        ax.fill_between(size[shown], *as_array(spans).T, color=colour, alpha=0.13, lw=0)
    end = inside[-1]
    if end + 1 < len(error) and error[end + 1] < low:  # where it leaves through the floor
        share = np.log(error[end] / low) / np.log(error[end] / error[end + 1])
        return [(size[end] ** (1 - share) * size[end + 1] ** share, low, label, colour)]
    return [(size[end], error[end], label, colour)]


def _label(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Labels in a column right of the panel, a line from each to the end of its curve.

    In order of error, and of bytes where several leave through the floor: lines do not cross.
    """
    ends = sorted(ends, key=lambda end: (end[1], -end[0]))
    low, high = np.log(ax.get_ylim())
    gap = 0.062
    places = [(np.log(end[1]) - low) / (high - low) for end in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - 1) if places else 0.0
    for i in reversed(range(len(places))):  # pushed back where the column is too long
        highest = places[i + 1] - gap if i + 1 < len(places) else places[-1] - over
        places[i] = min(places[i], highest)
    for (size, error, text, colour), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.6, "shrinkA": 0}
        style = {"color": colour, "fontsize": 12.5, "va": "center", "annotation_clip": False}
        style["arrowprops"] = line | {"relpos": (0, 0.5)}
        ax.annotate(text, (size, error), (1.02, place), "data", "axes fraction", **style)


def _finding(results: dict) -> str:
    """Bytes of the coded factors, and how many times as many others take, at one error."""
    for key, target in (("raw_error", "0.16"), ("raw_error", "0.24"), ("task_error", "0.1")):
        found = results["tables"].get(key, {}).get(target, {})
        sizes = {name: entry["alone"] for name, entry in found.items() if entry["alone"]}
        best = "coded" if "coded" in sizes else min(sizes, key=sizes.get, default=None)
        rivals = "factors_int8", "factors_deflate", "transform", "webp"
        others = [name for name in rivals if name in sizes and name != best]
        if best and others:
            times = ", ".join(
                f"{CODES[n][0]} {_times(sizes[n] / sizes[best], found[n], best)}" for n in others
            )
            return (
                f"At {key.replace('_', ' ')} {target} {CODES[best][0]} take {sizes[best]:,.0f} "
                f"bytes an image; times as many: {times}"
            )
    return "Bytes an image against error"


def _times(ratio: float, entry: dict, base: str) -> str:
    span = (entry["times"].get(base) or {}).get("interval_95")
    return f"{ratio:.1f}" + (f" [{span[0]:.1f}, {span[1]:.1f}]" if span else "")
