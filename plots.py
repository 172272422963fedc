"""Every figure of the project as a PNG; the only module that imports matplotlib.

One visual language: one colour per method (`METHODS`), labels at the curves, viridis for errors, a
diverging map for signed differences, the finding as title, where the numbers come from as footer.
Arguments are arrays (numpy, or torch on any device), lists and dicts: no model, no cache. T tokens
on a grid (rows, columns), D features, n images, r rank, S = min(T, D); a box is (x, y, w, h) in
fractions of the square photograph, or None. Every function raises OSError where it cannot write.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike
from PIL.Image import Image

from files import atomic_path

Box = tuple[float, float, float, float] | None
Grid = tuple[int, int]

# label and colour of each method in every figure (Okabe & Ito's colours, safe for the colour-blind)
METHODS: dict[str, tuple[str, str]] = {
    "network": ("network", "#D55E00"),
    "svd": ("SVD", "#0072B2"),
    "gram_eigh_f32": ("Gram eigh, float32", "#56B4E9"),
    "randomized_svd": ("randomised SVD", "#009E73"),
    "random_sketch": ("random sketch", "#CC79A7"),
    "pca": ("PCA, one basis", "#B98700"),
}
NETWORK, SVD = METHODS["network"][1], METHODS["svd"][1]
CURVES = {  # of training_curves; paler: the same on training images
    "train_mse": ("training", "#E8935A", "-"),
    "val_mse": ("validation", NETWORK, "-"),
    "train_optimum_mse": ("training floor (SVD)", "#5FA8D3", "--"),
    "val_optimum_mse": ("validation floor (SVD)", SVD, "--"),
}
TERMS = {  # no methods, so no method's colour (Tol's "muted")
    "train_loss": ("sum", "#222222"),
    "loss_reconstruction": ("reconstruction", "#882255"),
    "loss_B": ("B (ridge)", "#999933"),
    "loss_ortho": ("orthogonality", "#332288"),
    "loss_lora_ortho": ("LoRA orthogonality", "#44AA99"),
    "loss_act": ("activations", "#AA4499"),
}
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


def _figure(width: float, height: float, layout: str = "constrained") -> Figure:
    return Figure((width, height), dpi=150, layout=layout, facecolor="white")


def _save(figure: Figure, path: str | Path, title: str, footer: str, ends: dict | None = None):
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
        ax.annotate(text, (1, end), (1.03, y), "axes fraction", color=colour, fontsize=10.5,
                    va="center", annotation_clip=False, arrowprops=arrow)  # fmt: skip


def _note(ax: Axes, x: float, y: float, text: str, colour: str = GREY, **style) -> None:
    """Text inside a panel, in fractions of it."""
    ax.text(x, y, text, color=colour, transform=ax.transAxes, fontsize=10.5, **style)


def _note_undefined(ax: Axes) -> None:
    _note(ax, 0.5, 0.5, "undefined: the optimum is below 1e-6 at this rank", ha="center")
    ax.set_yticks([])


def _array(values: ArrayLike | torch.Tensor) -> np.ndarray:
    """float64; None becomes NaN, which no curve draws."""
    tensor = isinstance(values, torch.Tensor)
    return np.asarray(values.detach().cpu() if tensor else values, dtype=np.float64)


def _column(history: list[dict], key: str) -> np.ndarray:
    return _array([record.get(key) for record in history])


def _pct(value: float) -> str:
    """A percentage with as many digits as mean something."""
    if np.isnan(value) or abs(value) <= ROUNDING_PCT:
        return "undefined" if np.isnan(value) else f"under {ROUNDING} %"
    small = f"{value:.6f}" if abs(value) < 1e-3 else f"{value:.3g}"
    return f"{small if abs(value) < 100 else f'{value:,.0f}'} %"


def _number(value: float, _position: int | None = None) -> str:
    """A tick's label: plain where that is short, else with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g}·"
    return f"{factor}10$^{{{int(exponent)}}}$"


def _log_scale(ax: Axes, which: str = "y") -> None:
    """Logarithmic axis with readable ticks, whether it spans a few per cent or ten decades."""
    axis = getattr(ax, f"{which}axis")
    if not np.isfinite(axis.get_data_interval()).all():
        return  # an empty panel has no scale
    ax.set(**{f"{which}scale": "log"})
    decades = np.ptp(np.log10(axis.get_view_interval()))
    subs = (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(MaxNLocator(5) if decades < 0.7 else LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_locator(NullLocator())


def _epoch_axis(ax: Axes, epochs: list[int]) -> None:
    pad = max(0.02 * (epochs[-1] - epochs[0]), 0.15)
    ax.set(xlim=(epochs[0] - pad, epochs[-1] + pad), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _line(ax: Axes, x: ArrayLike, y: ArrayLike, colour: str, wide: bool = False, **style) -> None:
    """A curve with its points where they are few; a wide pale one leaves another on it visible."""
    marker = "o" if len(x) < 40 and not wide and style.get("ls") != "--" else None
    ax.plot(x, y, color=colour, marker=marker, ms=3.5, lw=6 if wide else 1.8,
            alpha=0.35 if wide else 1, **style)  # fmt: skip


def _band(ax: Axes, values: np.ndarray, colour: str, wide: bool = False) -> None:
    """Median and 10–90 % of positive values [n, k] over the index 1 … k."""
    index = np.flatnonzero((values > 0).any(0))
    values = np.where(values > 0, values, np.nan)[:, index]
    low, middle, high = np.nanpercentile(values, (10, 50, 90), axis=0)
    ax.fill_between(index + 1, low, high, color=colour, alpha=0.13, lw=0)
    _line(ax, index + 1, middle, colour, wide)
    ax.set_title("median and 10–90 % of images")


def _limits(*maps: np.ndarray, symmetric: bool = False) -> tuple[float, float]:
    """One colour scale for all of `maps`."""
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    reach = max(-low, high, 1e-12)
    return (-reach, reach) if symmetric else (low, max(high, low + 1e-12))


def _token_map(ax: Axes, values: np.ndarray, grid: Grid, limits: tuple[float, float], **style):
    """Draw [T] values on their grid, one cell a token; diverging colours where limits are signed.

    Returns the image, for a colour bar.
    """
    rows, columns = grid
    ax.set(xticks=[0, columns // 2, columns], yticks=[0, rows // 2, rows])
    ax.grid(False)
    return ax.imshow(values.reshape(grid), vmin=limits[0], vmax=limits[1],
                     extent=(0, columns, rows, 0), **style)  # fmt: skip


def _colour_bar(figure: Figure, image, axes, label: str, bins: int = 5, **style) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, format=FuncFormatter(_number),
                          ticks=MaxNLocator(bins), **style)  # fmt: skip
    bar.outline.set_visible(False)


def _photograph(ax: Axes, photo: Image, box: Box, grid: Grid = (1, 1), **style) -> None:
    """The photograph in the grid's units, and its box."""
    ax.imshow(photo, extent=(0, grid[1], grid[0], 0), interpolation="bilinear")
    ax.set(xticks=[], yticks=[], **style)
    ax.grid(False)
    _draw_box(ax, box, grid)


def _caption(box: Box) -> str:
    return "photograph" if box is None else "photograph and box of its text"


def _draw_box(ax: Axes, box: Box, grid: Grid) -> None:
    if box is not None:
        (x, y, w, h), (rows, columns) = box, grid
        outline = [withStroke(linewidth=3.6, foreground="black")]
        ax.add_patch(Rectangle((x * columns, y * rows), w * columns, h * rows, fill=False,
                               ec="white", lw=1.8, path_effects=outline))  # fmt: skip


# -------------------------------------------------------------------------------------- training


@rc_context(STYLE)
def training_curves(path: str | Path, history: list[dict], footer: str) -> None:
    """Training and validation mse with their optima as floors; below, the validation excess.

    history: the entries of history.json; a first one without `train_mse` is the untrained model.
    """
    figure = _figure(10, 7.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in history]
    columns = {key: _column(history, key) for key in CURVES}
    for key, (_, colour, dashes) in CURVES.items():
        _line(top, epochs, columns[key], colour, ls=dashes)
    top.set_ylabel("mean squared error\nper entry of X")
    _log_scale(top)
    _epoch_axis(bottom, epochs)
    # best of the final rank only: while a rank is being lowered, errors are not comparable
    final = history[-1]["effective_rank"]
    gaps = np.where(_column(history, "effective_rank") == final,
                    columns["val_mse"] - columns["val_optimum_mse"], np.inf)  # fmt: skip
    untrained = "train_mse" not in history[0]
    best = int(np.argmin(gaps[1:])) + 1 if untrained and len(gaps) > 1 else int(np.argmin(gaps))
    excess = _column(history, "val_excess_pct")
    title = f"Validation error is {_pct(excess[best])} above the SVD's at epoch {epochs[best]}"
    if np.isnan(excess[best]):
        title = (
            f"Validation mse {columns['val_mse'][best]:.3g}; the optimum is too small for a ratio"
        )
    elif untrained and history[0]["effective_rank"] == final:
        title += f" of {epochs[-1]}; untrained {_pct(excess[0])}"
    _excess_panel(bottom, epochs, excess, best, untrained)
    ends = [(columns[key][-1], label, colour) for key, (label, colour, _) in CURVES.items()]
    _save(figure, path, title, footer, {top: ends})


def _excess_panel(ax: Axes, epochs: list[int], excess: np.ndarray, best: int, untrained: bool):
    """Validation excess over epochs; the untrained start is an open circle, the best a full one."""
    ax.set_ylabel("validation error\nabove the optimum (%)")
    if np.isnan(excess).all():
        _note_undefined(ax)
        return
    _line(ax, epochs, excess, NETWORK)
    ax.margins(y=0.25)
    if np.nanmin(excess) > 0 and np.nanmax(excess) > 20 * np.nanmin(excess):
        _log_scale(ax)
    style = {"textcoords": "offset points", "color": NETWORK}
    if untrained:
        ax.plot(epochs[0], excess[0], "o", ms=9, mfc="white", mec=NETWORK, mew=1.8)
        ax.annotate(f"untrained {_pct(excess[0])}", (epochs[0], excess[0]), (10, 8), **style)
    ax.plot(epochs[best], excess[best], "o", ms=8, color=NETWORK)
    side = "right" if 2 * epochs[best] > epochs[0] + epochs[-1] else "left"
    ax.annotate(f"best {_pct(excess[best])}", (epochs[best], excess[best]), (0, -10), ha=side,
                va="top", **style)  # fmt: skip


@rc_context(STYLE)
def loss_terms(path: str | Path, history: list[dict], footer: str) -> None:
    """Weighted loss terms, learning rate, effective rank and, where there are any, the shifts."""
    history = [record for record in history if "train_loss" in record]
    epochs = [record["epoch"] for record in history]
    shifts = _array([record["shifts"] for record in history])  # [epochs, K]
    heights = [3, 1.2, 1.2] + [1.7] * bool(shifts.size)
    figure = _figure(10, 1.3 + 1.3 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    ends: dict[Axes, list] = {axes[0]: []}
    for key, (label, colour) in TERMS.items():
        values = _column(history, key)
        if np.any(values > 0):
            _line(
                axes[0], epochs, np.where(values > 0, values, np.nan), colour, key == "train_loss"
            )
            ends[axes[0]].append((values[-1], label, colour))
    axes[0].set_ylabel("weighted loss term (reconstruction:\nsquared error over its optimum)")
    _line(axes[1], epochs, _column(history, "lr"), BLACK, drawstyle="steps-mid")
    axes[1].set_ylabel("learning\nrate")
    _line(axes[2], epochs, _column(history, "effective_rank"), BLACK, drawstyle="steps-mid")
    axes[2].set_ylabel("effective\nrank")
    axes[2].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _log_scale(axes[0])
    _log_scale(axes[1])
    if shifts.size:
        _line(axes[3], epochs, shifts, BLACK)
        axes[3].set(ylabel="shift / smallest\nRitz value", ylim=(0, 1))
        ends[axes[3]] = [(s, f"step {k}", BLACK) for k, s in enumerate(shifts[-1], 1)]
    _epoch_axis(axes[-1], epochs)
    first, last = (f"{history[i]['loss_reconstruction']:.5g}" for i in (0, -1))
    title = f"Training: squared error over its optimum {first} in epoch {epochs[0]}"
    title += f", {last} in epoch {epochs[-1]}" if len(epochs) > 1 else ""
    _save(figure, path, title, footer, ends)


# --------------------------------------------------------------------------- over the test images


@rc_context(STYLE)
def error_heatmap(
    path: str | Path, token_error: dict[str, ArrayLike], grid: Grid, footer: str
) -> None:
    """Mean relative error per token [T] of network and SVD on one scale, and their difference."""
    errors = {name: _array(token_error[name]) for name in ("network", "svd")}
    apart = errors["network"] - errors["svd"]
    figure = _figure(13, 4.5, "compressed")
    axes = figure.subplots(1, 3)
    for ax, (name, values) in zip(axes, errors.items(), strict=False):
        image = _token_map(ax, values, grid, _limits(*errors.values()))
        ax.set_title(f"{METHODS[name][0]}: mean {values.mean():.4g}", color=METHODS[name][1])
    signed = _token_map(axes[2], apart, grid, _limits(apart, symmetric=True), cmap="RdBu_r")
    axes[2].set_title("network − SVD (red: SVD better)")
    axes[0].set_ylabel("token row")
    for ax in axes:
        ax.set_xlabel("token column")
    _colour_bar(figure, image, list(axes[:2]), "relative error of a token")
    _colour_bar(figure, signed, axes[2], "difference of relative error")
    worst = 100 * np.max(np.abs(apart) / np.maximum(errors["svd"], 1e-12))
    title = f"At every token the network's mean error is within {_pct(worst)} of the SVD's"
    _save(figure, path, title, footer)


@rc_context(STYLE)
def b_row_norms(
    path: str | Path, b_norms: ArrayLike, singular_values: ArrayLike, footer: str
) -> None:
    """Row norms of B [n, r] beside σ_i [n, ≥ r] of the same images: histogram, and over the index.

    For orthonormal A in Ritz order they coincide; a component that is switched off has norm 0.
    """
    norms = _array(b_norms)
    sigma = _array(singular_values)[:, : norms.shape[1]]
    figure = _figure(12, 5.2)
    left, right = figure.subplots(1, 2)
    positive = np.concatenate([norms[norms > 0], sigma[sigma > 0]])
    bins = np.geomspace(positive.min(), positive.max() * 1.001, 50)
    left.hist(sigma[sigma > 0], bins, color=SVD, alpha=0.35)
    left.hist(norms[norms > 0], bins, color=NETWORK, histtype="step", lw=1.8)
    left.set(xlabel="row norm of B, or σ (units of X)", ylabel="components of all images")
    _log_scale(left, "x")
    _band(right, sigma, SVD, wide=True)
    _band(right, norms, NETWORK)
    right.set(xlabel="component index i", ylabel="norm of row i of B, or $σ_i$ (units of X)")
    _log_scale(right)
    _note(right, 0.97, 0.93, "rows of the network's B", NETWORK, ha="right")
    _note(right, 0.97, 0.86, "singular values of X (SVD)", SVD, ha="right")
    on = norms > 0
    apart = 100 * np.median(np.abs(norms - sigma)[on] / np.maximum(sigma[on], 1e-12))
    title = f"Row norms of B differ from the singular values by {_pct(apart)} (median)"
    off = int((~on).all(0).sum())
    _save(figure, path, title + (f"; {off} components are off" if off else ""), footer)


@rc_context(STYLE)
def comparison(
    path: str | Path, per_image: dict[str, dict[str, ArrayLike]], spectra: dict[str, ArrayLike],
    rank: int, footer: str, split: str = "test",
) -> None:  # fmt: skip
    """Error per image against the SVD's, excess of every method, spectra of X and X_hat.

    per_image: method → {"rel_error": [n], "excess_pct": [n]}; spectra: X and X_hat → [n, S].
    """
    figure = _figure(16, 6)
    scatter, strips, spectrum = figure.subplots(1, 3, width_ratios=[1, 1.3, 1])
    network, svd = (_array(per_image[name]["rel_error"]) for name in ("network", "svd"))
    low, high = _limits(network, svd)
    span = (low - 0.06 * (high - low), high + 0.06 * (high - low))
    scatter.plot(span, span, color=SVD, lw=1.4)
    scatter.plot(svd, network, "o", color=NETWORK, ms=5, alpha=0.6, mec="none")
    scatter.set(xlim=span, ylim=span, xlabel="rel_error of the SVD",
                ylabel="rel_error of the network", title=f"each dot one {split} image")  # fmt: skip
    scatter.locator_params(nbins=5)
    _note(scatter, 0.97, 0.03, "on the line: as good as the SVD", SVD, ha="right")
    excess = {name: _array(per_image[name]["excess_pct"]) for name in METHODS if name in per_image}
    excess = {name: values[np.isfinite(values)] for name, values in excess.items()}
    _excess_strips(strips, excess)
    sigma = _array(spectra["X"])
    _band(spectrum, sigma, BLACK, wide=True)
    _band(spectrum, _array(spectra["X_hat"])[:, :rank], NETWORK)
    spectrum.set(xlabel="index i", ylabel="singular value $σ_i$ (units of X)",
                 ylim=np.median(sigma, axis=0).max() * np.array([1e-6, 3]))  # fmt: skip
    spectrum.set_ylim(bottom=max(spectrum.get_ylim()[0], np.median(sigma, axis=0)[-1] / 3))
    _log_scale(spectrum)
    _note(spectrum, 0.97, 0.93, "X", BLACK, ha="right")
    _note(spectrum, 0.97, 0.86, "X_hat = A·B", NETWORK, ha="right")
    spectrum.axvline(rank, color=GREY, lw=1, ls="--")
    spectrum.text(rank, 0.02, f"rank {rank} ", color=GREY, va="bottom", ha="right", rotation=90,
                  transform=spectrum.get_xaxis_transform())  # fmt: skip
    means = {name: _pct(values.mean()) for name, values in excess.items() if values.size}
    others = [f"{METHODS[name][0]} {means[name]}" for name in ("random_sketch", "randomized_svd")
              if name in means]  # fmt: skip
    title = f"At rank {rank} the network's error is {means.get('network', 'undefined')} above the "
    title += "SVD's" + (f" ({', '.join(others)})" if others else "")
    _save(figure, path, title, footer)


def _excess_strips(ax: Axes, excess: dict[str, np.ndarray]) -> None:
    """A row of dots per method over log excess; rounding, of either sign, sits at the left edge."""
    jitter = np.random.default_rng(0)  # the same in every run
    for y, (name, values) in enumerate(reversed(excess.items())):
        label, colour = METHODS[name]
        height = y - 0.08 + jitter.uniform(-0.2, 0.2, len(values))
        ax.plot(np.maximum(values, ROUNDING_PCT), height, "o", color=colour, ms=3.5, alpha=0.45,
                mec="none")  # fmt: skip
        text = f"{label}: " + (f"mean {_pct(values.mean())}" if values.size else "undefined")
        ax.text(0.02, y + 0.24, text, color=colour, transform=ax.get_yaxis_transform())
    highest = max([v.max(initial=10 * ROUNDING_PCT) for v in excess.values()])
    ax.set(xlim=(ROUNDING_PCT / 2, 2 * highest), ylim=(-0.5, len(excess) - 0.4), yticks=[],
           xlabel=f"error above the optimum (%); {ROUNDING} and less is rounding",
           title="excess of every method, each dot one image")  # fmt: skip
    ax.spines["left"].set_visible(False)
    _log_scale(ax, "x")


@rc_context(STYLE)
def rank_sweep(
    path: str | Path, ranks: dict[str, dict], num_tokens: int, feature_dim: int, footer: str
) -> None:
    """Error and excess of every method over the rank: mean, and a band up to the 90th percentile.

    ranks: as in svd_nn_comparison.json, rank → method → metric → {"mean", "p90"}.
    """
    figure = _figure(10, 9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.array(sorted(int(r) for r in ranks))
    ends: dict[Axes, list] = {top: [], bottom: []}
    for name in (name for name in METHODS if name in ranks[str(x[0])]):
        label, colour = METHODS[name]
        for ax, metric, least in ((top, "rel_error", 0), (bottom, "excess_pct", ROUNDING_PCT)):
            if (name, metric) == ("svd", "excess_pct"):
                continue  # zero by definition
            summaries = [ranks[str(r)][name][metric] for r in x]
            mean, p90 = (np.maximum(_column(summaries, key), least) for key in ("mean", "p90"))
            ax.fill_between(x, mean, p90, color=colour, alpha=0.13, lw=0)
            _line(ax, x, mean, colour, wide=name == "svd")
            ends[ax].append((mean[-1], label, colour))
    stored = (num_tokens + feature_dim) / (num_tokens * feature_dim)  # of A and B, per rank
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    bottom.set(xscale="log", xlim=(x[0] / 1.12, x[-1] * 1.12), xlabel="rank r (log scale)",
               ylabel=f"error above the optimum (%)\n{ROUNDING} and less is rounding")  # fmt: skip
    for ax in (top, bottom):
        _log_scale(ax)
    if x[0] < 1 / stored < x[-1]:  # beyond it the factors take more room than X
        for ax in (top, bottom):
            ax.axvline(1 / stored, color=GREY, ls="--", lw=1)
        top.annotate(f"break-even rank {1 / stored:.0f}", (1 / stored, 0.48), (-3, 0),
                     ("data", "axes fraction"), "offset points", color=GREY, rotation=90,
                     ha="right", va="center")  # fmt: skip
    above = top.secondary_xaxis("top")
    above.set_xticks(x, [f"{100 * r * stored:.3g} %" for r in x])
    above.set_xlabel("numbers stored in A and B, r (T + D), of the T·D in X")
    bottom.set_xticks(x, [str(r) for r in x])
    for axis in (bottom.xaxis, above.xaxis):
        axis.set_minor_locator(NullLocator())
    excess = _column([ranks[str(r)]["network"]["excess_pct"] for r in x], "mean")
    if np.isnan(excess).all():
        _note_undefined(bottom)
    worst = _pct(np.fmax.reduce(excess))  # fmax ignores NaN
    reach = f"Rank {x[0]}" if len(x) == 1 else f"Ranks {x[0]} to {x[-1]}"
    title = f"{reach}: the network's mean error is at most {worst} above the SVD's"
    _save(figure, path, title, footer, ends)


# -------------------------------------------------------------------------------------- one image


@rc_context(STYLE)
def channel_comparison(
    path: str | Path, photo: Image, box: Box, maps: dict[str, ArrayLike], channels: list[int],
    grid: Grid, info: dict[str, str],
) -> None:  # fmt: skip
    """C channels of one image: original, network and SVD on one scale each, differences on one.

    maps: original, network, svd → [T, C]; info: title and footer.
    """
    original, network, svd = (_array(maps[name]) for name in ("original", "network", "svd"))
    count = len(channels)
    figure = _figure(4 + 1.6 * count, 9.6)
    grids = figure.add_gridspec(1, 2, width_ratios=[3, 1.6 * count])
    picture = figure.add_subplot(grids[0], anchor="N")
    _photograph(picture, photo, box, title=_caption(box))
    axes = grids[1].subgridspec(5, count).subplots()
    axes = axes.reshape(5, count)
    below = {"location": "bottom", "pad": 0.01, "aspect": 12}
    reach = _limits(network - original, svd - original, symmetric=True)
    for column, j in zip(axes.T, range(count), strict=True):
        values = [v[:, j] for v in (original, network, svd)]
        for ax, v in zip(column[:3], values, strict=True):
            image = _token_map(ax, v, grid, _limits(*values))
        for ax, v in zip(column[3:], values[1:], strict=True):
            signed = _token_map(ax, v - values[0], grid, reach, cmap="RdBu_r")
        column[0].set_title(f"channel {channels[j]}", loc="center")
        _colour_bar(figure, image, list(column[:3]), "units of X", 3, **below)
    _colour_bar(figure, signed, list(axes[3:, -1]), "difference (units of X)", aspect=25)
    labels = [("original X", BLACK), METHODS["network"], METHODS["svd"],
              ("network − original", NETWORK), ("SVD − original", SVD)]  # fmt: skip
    for ax, (label, colour) in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, color=colour)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    _save(figure, path, info["title"], info["footer"])


@rc_context(STYLE)
def spatial_error(
    path: str | Path, photo: Image, box: Box, token_error: dict[str, ArrayLike], grid: Grid,
    info: dict[str, str],
) -> None:  # fmt: skip
    """Relative error per token [T] of one image: network and SVD on one scale, their difference.

    Above as maps, below over the photograph; info: title and footer.
    """
    errors = {name: _array(token_error[name]) for name in ("network", "svd")}
    apart = errors["network"] - errors["svd"]
    figure = _figure(15.5, 7.7, "compressed")
    axes = figure.subplots(2, 4)
    _photograph(axes[0, 0], photo, box, title=_caption(box))
    _inside_outside(axes[1, 0], errors, box, grid)
    scale, signed = _limits(*errors.values()), _limits(apart, symmetric=True)
    panels = [(*METHODS[name], values, scale, "viridis") for name, values in errors.items()]
    panels.append(("network − SVD (red: SVD better)", BLACK, apart, signed, "RdBu_r"))
    images = []
    for (above, below), (label, colour, values, limits, cmap) in zip(
        axes[:, 1:].T, panels, strict=True
    ):
        images.append(_token_map(above, values, grid, limits, cmap=cmap))
        _photograph(below, photo, None, grid)
        _token_map(below, values, grid, limits, cmap=cmap, alpha=0.6)
        above.set_title(label, color=colour)
        below.set_xlabel("token column")
        for ax in (above, below):
            _draw_box(ax, box, grid)
    for ax in axes[:, 1]:
        ax.set_ylabel("token row")
    _colour_bar(figure, images[0], list(axes[:, 2]), "relative error of a token", aspect=40)
    _colour_bar(figure, images[2], list(axes[:, 3]), "difference of relative error", aspect=40)
    _save(figure, path, info["title"], info["footer"])


def _inside_outside(ax: Axes, errors: dict[str, np.ndarray], box: Box, grid: Grid) -> None:
    """Mean and 10–90 % of the tokens' errors, in the box (their centres) and outside it."""
    y, x = np.indices(grid).reshape(2, -1)
    inside = np.zeros(x.shape, bool)
    if box is not None:
        u, v = (x + 0.5) / grid[1] - box[0], (y + 0.5) / grid[0] - box[1]
        inside = (u >= 0) & (u <= box[2]) & (v >= 0) & (v <= box[3])
    parts = {"in the box": inside, "outside" if box else "all": ~inside}
    parts = {f"{name}\n({m.sum()} tokens)": m for name, m in parts.items() if m.any()}
    for position, mask in enumerate(parts.values()):
        for name, side, align in (("network", -0.12, "right"), ("svd", 0.12, "left")):
            label, colour = METHODS[name]
            low, high = np.percentile(errors[name][mask], (10, 90))
            ax.plot([position + side] * 2, [low, high], color=colour, lw=4, alpha=0.4)
            ax.plot(position + side, errors[name][mask].mean(), "o", color=colour, ms=7)
            if position == 0:
                ax.text(side, 1.03 * high, label, color=colour, ha=align)
    ax.set_xticks(range(len(parts)), list(parts))
    ax.set(xlim=(-0.75, len(parts) - 0.25), ylim=(0, 1.15 * ax.get_ylim()[1]), box_aspect=1,
           ylabel="relative error of a token", title="mean and 10–90 % of tokens")  # fmt: skip
