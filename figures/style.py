"""Style of every figure: colours, scales, labels, title and footer; and the file it becomes.

One visual language: one colour a method (`METHODS`), labels at the curves instead of legends, the
quantity as title, the numbers' source as footer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from lowrank_tokens.files import atomic_path

# label and colour of each method in every figure (Okabe & Ito's colours, safe for the colour-blind)
METHODS: dict[str, tuple[str, str]] = {
    "network": ("network", "#D55E00"),
    "svd": ("SVD", "#0072B2"),
    "gram_eigh_f32": ("Gram eigh, float32", "#56B4E9"),
    "gram_eigh_f64": ("Gram eigh, float64", "#332288"),
    "svd_gesvda": ("SVD, gesvda", "#117777"),
    "randomized_svd": ("randomised SVD", "#009E73"),
    "random_sketch": ("random sketch", "#CC79A7"),
    "pca": ("PCA, one basis", "#B98700"),
    "svd_in_metric": ("SVD in the metric", "#6699CC"),
    "network_in_metric": ("network in the metric", "#E8935A"),
}
SAME_METHOD = {"svd_lowrank": "randomized_svd"}  # torch.svd_lowrank is the randomised SVD
NETWORK, SVD = METHODS["network"][1], METHODS["svd"][1]
BLACK, GREY = "#222222", "#777777"
ROUNDING_PCT = 1e-5  # float32 puts the SVD itself this far from its optimum: less says nothing
ROUNDING = f"{ROUNDING_PCT:.5f}"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "image.interpolation": "nearest",
    "savefig.dpi": "figure",
}


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort names of methods as in METHODS. Raises KeyError for one that has no colour.

    A figure that drew only the methods it knows would hide the others.
    """
    position = {name: i for i, name in enumerate(METHODS)}
    return sorted(methods, key=position.__getitem__)


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """Return an empty figure of `width` by `height` inches, at 150 pixels an inch."""
    return Figure((width, height), dpi=150, layout=layout, facecolor="white")


def rows_of_axes(figure: Figure, heights: list[float]) -> list[Axes]:
    """Return axes one below the other over one x axis, of these relative heights."""
    shared = {"sharex": True, "squeeze": False}
    return list(figure.subplots(len(heights), 1, height_ratios=heights, **shared)[:, 0])


def save(figure: Figure, path: str | Path, title: str, footer: str, ends: dict | None = None):
    """Add title, footer and `ends` (axes → labels at the ends of curves); write the PNG, whole."""
    width, height = figure.get_size_inches()
    footer = "\n".join(textwrap.wrap(" ".join(footer.split()), int(15.5 * width)))
    below = (0.1 + 0.17 * (footer.count("\n") + 1)) / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    # parse_math: a question may hold dollar signs
    style = {"x": 0.01, "ha": "left", "parse_math": False}
    title = "\n".join(textwrap.wrap(title, int(8.6 * width)))
    figure.suptitle(title, fontsize=14, fontweight="bold", **style)
    figure.text(y=0.05 / height, s=footer, fontsize=8.5, color=GREY, va="bottom", **style)
    if ends:
        figure.get_layout_engine().execute(figure)  # the labels need the panels' heights
    for ax, labels in (ends or {}).items():
        _label_ends(ax, labels)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) to the right of the axes, moved apart where they would overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = sorted((to_axes.transform((1, y))[1], text, colour) for y, text, colour in ends)
    ends = [end for end in ends if -0.01 < end[0] < 1.01]  # what the panel does not show, or NaN
    gap = 1.35 * 10.5 / 72 / (ax.get_position().height * ax.figure.get_figheight())
    placed = [end[0] for end in ends]
    for _ in range(500):
        placed = [min(max(y, 0), 1) for y in placed]
        for i in range(len(placed) - 1):
            overlap = max(0, gap - (placed[i + 1] - placed[i]))
            placed[i] -= overlap / 2
            placed[i + 1] += overlap / 2
    for (end, text, colour), y in zip(ends, placed, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 0, "relpos": (0, 0.5)}
        style = {"color": colour, "fontsize": 10.5, "va": "center", "annotation_clip": False}
        ax.annotate(text, (1, end), (1.03, y), "axes fraction", arrowprops=arrow, **style)


def curve(ax: Axes, x: ArrayLike, y: ArrayLike, colour: str, wide: bool = False, **style) -> None:
    """Draw a curve, with its points where they are few; a wide pale one shows another on it."""
    marker = "o" if len(x) < 40 and not wide and style.get("ls") != "--" else None
    pen = {"lw": 6, "alpha": 0.35} if wide else {"lw": 1.8}
    ax.plot(x, y, color=colour, marker=marker, ms=3.5, **pen, **style)


def band(ax: Axes, values: np.ndarray, colour: str, wide: bool = False) -> None:
    """Draw median and 10–90 % of positive values [n, k] over the index 1 … k."""
    index = np.flatnonzero((values > 0).any(0))
    if not index.size:
        return
    values = np.where(values > 0, values, np.nan)[:, index]
    low, middle, high = np.nanpercentile(values, (10, 50, 90), axis=0)
    ax.fill_between(index + 1, low, high, color=colour, alpha=0.13, lw=0)
    curve(ax, index + 1, middle, colour, wide)
    ax.set_title("median and 10–90 % of images")


def spread(ax: Axes, parts: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw mean and 10–90 % of network and SVD, for each part (label → method → [n])."""
    for position, values in enumerate(parts.values()):
        for name, side, align in (("network", -0.12, "right"), ("svd", 0.12, "left")):
            label, colour = METHODS[name]
            low, high = np.percentile(values[name], (10, 90))
            ax.plot([position + side] * 2, [low, high], color=colour, lw=4, alpha=0.4)
            ax.plot(position + side, values[name].mean(), "o", color=colour, ms=7)
            if position == 0:
                ax.text(side, 1.03 * high, label, color=colour, ha=align)
    ax.set_xticks(range(len(parts)), list(parts))
    ax.set(xlim=(-0.75, len(parts) - 0.25), ylim=(0, 1.15 * ax.get_ylim()[1]))


def note(ax: Axes, x: float, y: float, text: str, colour: str = GREY, **style) -> None:
    """Write text inside a panel, at fractions of it."""
    ax.text(x, y, text, color=colour, transform=ax.transAxes, fontsize=10.5, **style)


def note_undefined(ax: Axes) -> None:
    """Say in an empty panel why it is empty."""
    note(ax, 0.5, 0.5, "undefined: the optimum is below 1e-6 at this rank", ha="center")
    ax.set_yticks([])


def as_array(values: ArrayLike | torch.Tensor) -> np.ndarray:
    """Return float64 values; None becomes NaN, which no curve draws."""
    tensor = isinstance(values, torch.Tensor)
    return np.asarray(values.detach().cpu() if tensor else values, dtype=np.float64)


def column(history: list[dict], key: str) -> np.ndarray:
    """One value of every record, float64; NaN where a record lacks it or holds None."""
    return as_array([record.get(key) for record in history])


def percent(value: float) -> str:
    """Format a percentage with as many digits as mean something."""
    if np.isnan(value) or abs(value) <= ROUNDING_PCT:
        return "undefined" if np.isnan(value) else f"under {ROUNDING} %"
    small = f"{value:.6f}" if abs(value) < 1e-3 else f"{value:.3g}"
    return f"{small if abs(value) < 100 else f'{value:,.0f}'} %"


def tick_label(value: float, _position: int | None = None) -> str:
    """Format a tick's label: plain where that is short, else with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g}·"
    return f"{factor}10$^{{{int(exponent)}}}$"


def log_scale(ax: Axes, which: str = "y") -> None:
    """Set a logarithmic axis with readable ticks over a few per cent or ten decades."""
    axis = getattr(ax, f"{which}axis")
    interval = axis.get_data_interval()
    if not np.isfinite(interval).all() or interval[1] <= 0:
        return  # an empty panel has no scale, nor has one of zeros
    ax.set(**{f"{which}scale": "log"})
    decades = np.ptp(np.log10(axis.get_view_interval()))
    subs = (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(MaxNLocator(5) if decades < 0.7 else LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(tick_label))
    axis.set_minor_locator(NullLocator())


def rank_axis(ax: Axes, ranks: Iterable[int]) -> None:
    """Set a logarithmic axis of ranks, with a tick at each of them."""
    ranks = sorted(ranks)
    ax.set(xscale="log", xlim=(ranks[0] / 1.12, ranks[-1] * 1.12), xlabel="rank r (log scale)")
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.xaxis.set_minor_locator(NullLocator())


def common_limits(*maps: np.ndarray, symmetric: bool = False) -> tuple[float, float]:
    """One (low, high) for the values of all `maps`; around zero where `symmetric`."""
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    reach = max(-low, high, 1e-12)
    return (-reach, reach) if symmetric else (low, max(high, low + 1e-12))
