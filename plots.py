"""Every figure of the project as a PNG; the only module that imports matplotlib.

One visual language: one colour per method (`METHODS`), labels at the curves, viridis for errors,
a diverging map for signed differences, the finding as title, where the numbers come from as footer.
Networks, tensors and files are the callers' business: arguments are arrays (numpy, or torch on any
device), lists and dicts. T tokens, D features, n images, r rank, S = min(T, D).
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
NETWORK_PALE, SVD_PALE = "#F2B48C", "#8CC0DD"  # the same on training images
# loss terms are no methods and share no colour with one (Tol's "muted")
TERMS = {
    "train_loss": ("sum", "#222222"),
    "loss_reconstruction": ("reconstruction", "#882255"),
    "loss_B": ("B (ridge)", "#999933"),
    "loss_ortho": ("orthogonality", "#332288"),
    "loss_lora_ortho": ("LoRA orthogonality", "#44AA99"),
    "loss_act": ("activations", "#AA4499"),
}
GREY = "#777777"
# The SVD itself, computed in float32, lies within this of its optimum: less is rounding.
ROUNDING_PCT = 1e-5
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
    "savefig.dpi": 150,
}


# ---------------------------------------------------------------------------------- shared parts


def save(figure: Figure, path: str | Path, title: str, footer: str) -> None:
    """Add title and footer, and write the PNG, whole or not at all. Raises OSError."""
    width = figure.get_figwidth()
    wrapped = "\n".join(textwrap.wrap(" ".join(footer.split()), int(width * 15.5)))
    height = 0.08 + 0.17 * (wrapped.count("\n") + 1)  # inches that the footer takes
    figure.get_layout_engine().set(rect=(0, height / figure.get_figheight(), 1, 1))
    # a question may hold a dollar sign, which must not start a formula
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 9.4))), x=0.01, ha="left",
                    fontsize=14, fontweight="bold", parse_math=False)  # fmt: skip
    figure.text(0.01, 0.05 / figure.get_figheight(), wrapped, fontsize=8.5, color=GREY,
                ha="left", va="bottom", parse_math=False)  # fmt: skip
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _figure(width: float, height: float) -> Figure:
    """An empty white figure, inches."""
    return Figure((width, height), layout="constrained", facecolor="white")


def _array(values: ArrayLike | torch.Tensor) -> np.ndarray:
    """float64; None becomes NaN, which no curve draws."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _pct(value: float) -> str:
    """A percentage with three digits that carry meaning, rounding named as such."""
    if np.isnan(value):
        return "undefined"
    if abs(value) <= ROUNDING_PCT:
        return "0 %"
    return f"{value:.1e} %" if abs(value) < 1e-3 else f"{value:,.3g} %" if value < 1e3 else (
        f"{value:,.0f} %")  # fmt: skip


def _number(value: float, _position: int | None = None) -> str:
    """A tick label: plain where that is short, else a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10$^{{{int(exponent)}}}$"
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def _log_scale(ax: Axes, axis: str = "y") -> None:
    """Logarithmic axis with readable ticks whether it spans a few per cent or ten decades."""
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    axis_object = getattr(ax, f"{axis}axis")
    decades = np.log10(high / low)
    if decades < 0.7:
        axis_object.set_major_locator(MaxNLocator(5))
    else:
        subs = (1, 2, 5) if decades < 2 else (1,)
        axis_object.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis_object.set_major_formatter(FuncFormatter(_number))
    axis_object.set_minor_locator(NullLocator())


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]], size: float = 10.5) -> None:
    """Write (y, text, colour) right of the axes, moved apart where they would overlap.

    Call it when limits and scale of the axes are final and the panel's height is known.
    """
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    wanted = np.array([to_axes.transform((1, end[0]))[1] for end in ends])
    panel = ax.get_position().height * ax.figure.get_figheight()
    gap = 1.3 * size / 72 / panel
    placed = wanted.copy()
    for _ in range(500):
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 0:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
    for (_, text, colour), y, end_y in zip(ends, placed, wanted, strict=True):
        ax.annotate(
            text, (1.0, end_y), (1.03, y), xycoords="axes fraction", textcoords="axes fraction",
            color=colour, fontsize=size, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _epoch_axis(axes: list[Axes], epochs: list[int]) -> None:
    pad = max(0.02 * (epochs[-1] - epochs[0]), 0.15)
    for ax in axes:
        ax.set_xlim(epochs[0] - pad, epochs[-1] + pad)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].set_xlabel("epoch" + (" (0 = untrained)" if epochs[0] == 0 else ""))


def _column(history: list[dict], key: str) -> np.ndarray:
    """One value per epoch, NaN where an entry lacks it or holds null."""
    return _array([record.get(key) for record in history])


def _draw_box(ax: Axes, box: tuple[float, ...] | None, columns: float, rows: float) -> None:
    """Outline of box (x, y, w, h in fractions) on an image that spans columns × rows units."""
    if box is not None:
        x, y, w, h = box
        ax.add_patch(
            Rectangle((x * columns, y * rows), w * columns, h * rows, fill=False, ec="white",
                      lw=1.8, path_effects=[withStroke(linewidth=3.6, foreground="black")])
        )  # fmt: skip


def _token_map(ax: Axes, values: ArrayLike, grid: tuple[int, int], limits: tuple, cmap: str, **kw):
    """Draw [T] values on their grid, one cell a token; returns the image for a colour bar."""
    rows, columns = grid
    low, high = limits
    image = ax.imshow(_array(values).reshape(rows, columns), cmap=cmap, vmin=low, vmax=high,
                      extent=(0, columns, rows, 0), **kw)  # fmt: skip
    ax.set_xticks([0, columns // 2, columns])
    ax.set_yticks([0, rows // 2, rows])
    ax.grid(False)
    return image


def _colour_bar(figure: Figure, image, axes, label: str, bins: int = 5, **kw) -> None:
    bar = figure.colorbar(image, ax=axes, **kw)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(bins)
    bar.formatter = FuncFormatter(_number)
    bar.update_ticks()


def _shared_limits(*maps: ArrayLike) -> tuple[float, float]:
    low = min(_array(m).min() for m in maps)
    high = max(_array(m).max() for m in maps)
    return (low, high) if high > low else (low, low + 1e-12)


def _symmetric_limits(*maps: ArrayLike) -> tuple[float, float]:
    reach = max(float(np.abs(_array(m)).max()) for m in maps) or 1e-12
    return -reach, reach


# -------------------------------------------------------------------------------------- training


@rc_context(STYLE)
def training_curves(path: str | Path, history: list[dict], footer: str) -> None:
    """Training and validation mse with their optima as floors; below, the validation excess.

    history: entries of history.json; one without `train_mse` is the untrained model.
    """
    figure = _figure(10, 7.6)
    top, bottom = axes = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in history]
    curves = [
        ("train_mse", "training", NETWORK_PALE, "-"),
        ("val_mse", "validation", NETWORK, "-"),
        ("train_optimum_mse", "training floor (SVD)", SVD_PALE, "--"),
        ("val_optimum_mse", "validation floor (SVD)", SVD, "--"),
    ]
    for key, _, colour, dashes in curves:
        marker = "o" if len(history) < 40 and dashes == "-" else None
        top.plot(epochs, _column(history, key), dashes, color=colour, marker=marker, ms=3.5)
    top.set_ylabel("mean squared error per entry of X")
    _log_scale(top)
    excess = _column(history, "val_excess_pct")
    trained = [i for i, record in enumerate(history) if "train_mse" in record]
    best = _best_entry(history, trained)
    _excess_panel(bottom, epochs, excess, trained, best)
    _epoch_axis(list(axes), epochs)
    start = f" (untrained {_pct(excess[0])})" if trained[:1] != [0] else ""
    reached = f"{_pct(excess[best])} above the SVD's"
    if np.isnan(excess[best]):
        start, reached = "", f"{history[best]['val_mse']:.3g} (excess undefined: optimum is 0)"
    title = f"Validation error is {reached} at epoch {epochs[best]} of {epochs[-1]}{start}"
    figure.get_layout_engine().execute(figure)
    _label_ends(top, [(_last(history, key), label, c) for key, label, c, _ in curves])
    save(figure, path, title, footer)


def _best_entry(history: list[dict], trained: list[int]) -> int:
    """Index of the smallest validation mse above its optimum, among those of the final rank."""
    final = history[-1]["effective_rank"]
    same = [i for i in trained if history[i]["effective_rank"] == final] or [len(history) - 1]
    return min(same, key=lambda i: history[i]["val_mse"] - history[i]["val_optimum_mse"])


def _last(history: list[dict], key: str) -> float:
    values = _column(history, key)
    values = values[np.isfinite(values)]
    return float(values[-1]) if values.size else np.nan


def _excess_panel(
    ax: Axes, epochs: list[int], excess: np.ndarray, trained: list[int], best: int
) -> None:
    """Validation excess over epochs; the untrained start is an open circle."""
    ax.set_ylabel("validation error above\nthe optimum (%)")
    if np.isnan(excess).all():
        ax.text(0.5, 0.5, "undefined: the optimum is below 1e-6 at this rank", ha="center",
                transform=ax.transAxes, color=GREY)  # fmt: skip
        return
    ax.plot(epochs, excess, color=NETWORK, marker="o" if len(epochs) < 40 else None, ms=3.5)
    if trained[:1] != [0]:
        ax.plot(epochs[0], excess[0], "o", ms=9, mfc="white", mec=NETWORK, mew=1.8)
        ax.annotate(f"untrained {_pct(excess[0])}", (epochs[0], excess[0]), (11, 0),
                    textcoords="offset points", va="center", color=NETWORK)  # fmt: skip
    ax.plot(epochs[best], excess[best], "o", ms=8, color=NETWORK)
    right = epochs[best] > np.mean([epochs[0], epochs[-1]])
    ax.annotate(f"best {_pct(excess[best])}", (epochs[best], excess[best]), (0, -10),
                textcoords="offset points", ha="right" if right else "left", va="top",
                color=NETWORK)  # fmt: skip
    ax.margins(y=0.22)
    low, high = np.nanmin(excess), np.nanmax(excess)
    if low > 0 and high > 20 * low:
        _log_scale(ax)


@rc_context(STYLE)
def loss_terms(path: str | Path, history: list[dict], footer: str) -> None:
    """Weighted loss terms, learning rate, effective rank and, where there are any, the shifts."""
    history = [record for record in history if "train_loss" in record]
    epochs = [record["epoch"] for record in history]
    with_shifts = any(record.get("shifts") for record in history)
    heights = [3, 1.2, 1.2] + [1.6] * with_shifts
    figure = _figure(10, 1.3 + 1.35 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    mark = "o" if len(history) < 40 else None
    terms = {key: _column(history, key) for key in TERMS}
    terms = {key: values for key, values in terms.items() if np.nan_to_num(values).any()}
    for key, values in terms.items():
        width = 3.6 if key == "train_loss" else 1.6
        axes[0].plot(epochs, np.where(values > 0, values, np.nan), color=TERMS[key][1], lw=width,
                     alpha=0.35 if key == "train_loss" else 1, marker=mark, ms=3)  # fmt: skip
    axes[0].set_ylabel("weighted loss term\n(reconstruction: squared\nerror / optimum)")
    axes[1].plot(epochs, _column(history, "lr"), color="#222222", marker=mark, ms=3)
    axes[1].set_ylabel("learning rate")
    axes[2].plot(epochs, _column(history, "effective_rank"), color="#222222", marker=mark, ms=3)
    axes[2].set_ylabel("effective rank\n(components)")
    axes[2].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[:2]:
        _log_scale(ax)
    if with_shifts:
        shifts = _array([record["shifts"] for record in history])
        axes[3].plot(epochs, shifts, color="#222222", marker=mark, ms=3)
        axes[3].set_ylabel("shifts $s_k$\n(of smallest Ritz value)")
        axes[3].set_ylim(0, 1)
    _epoch_axis(list(axes), epochs)
    figure.get_layout_engine().execute(figure)
    _label_ends(axes[0], [(v[-1], TERMS[key][0], TERMS[key][1]) for key, v in terms.items()])
    if with_shifts:
        _label_ends(axes[3], [(s, f"step {k}", "#222222") for k, s in enumerate(shifts[-1], 1)])
    first, last = (f"{history[i]['loss_reconstruction']:.5g}" for i in (0, -1))
    title = f"Squared error over its optimum: {first} in epoch {epochs[0]}, {last} in {epochs[-1]}"
    save(figure, path, title, footer)


# ---------------------------------------------------------------------------- over the test images


@rc_context(STYLE)
def error_heatmap(
    path: str | Path, token_error: dict[str, ArrayLike], grid: tuple[int, int], footer: str
) -> None:
    """Mean relative error per token [T] of network and SVD on one scale, and their difference."""
    network, svd = (_array(token_error[name]) for name in ("network", "svd"))
    figure = _figure(13, 4.6)
    axes = figure.subplots(1, 3)
    limits = _shared_limits(network, svd)
    for ax, name, values in zip(axes, ("network", "svd"), (network, svd), strict=False):
        label, colour = METHODS[name]
        image = _token_map(ax, values, grid, limits, "viridis")
        ax.set_title(f"{label}: mean {values.mean():.4g}", color=colour)
    signed = _token_map(axes[2], network - svd, grid, _symmetric_limits(network - svd), "RdBu_r")
    axes[2].set_title("network − SVD (red: network is worse)")
    axes[0].set_ylabel("token row")
    for ax in axes:
        ax.set_xlabel("token column")
    _colour_bar(figure, image, list(axes[:2]), "relative error of a token")
    _colour_bar(figure, signed, axes[2], "difference of relative error")
    worst = 100 * np.max(np.abs(network - svd) / np.maximum(svd, 1e-12))
    title = f"Token by token, the network's mean error is within {_pct(worst)} of the SVD's"
    save(figure, path, title, footer)


@rc_context(STYLE)
def b_row_norms(
    path: str | Path, b_norms: ArrayLike, singular_values: ArrayLike, footer: str
) -> None:
    """Row norms of B [n, r] beside σ_i [n, r] of the same images: histogram, and over the index.

    For orthonormal A in Ritz order they coincide; components switched off have norm 0.
    """
    norms, sigma = _array(b_norms), _array(singular_values)
    sigma = sigma[:, : norms.shape[1]]
    figure = _figure(12, 5)
    left, right = figure.subplots(1, 2)
    positive = np.concatenate([v[v > 0] for v in (norms, sigma)])
    bins = np.geomspace(positive.min(), positive.max() * 1.001, 50)
    left.hist(sigma[sigma > 0], bins, color=SVD, alpha=0.35)
    left.hist(norms[norms > 0], bins, color=NETWORK, histtype="step", lw=1.8)
    left.set(xlabel="norm of a row of B, or σ (units of X)", ylabel="components of all images")
    _log_scale(left, "x")
    index = np.arange(1, norms.shape[1] + 1)
    for values, colour, width in ((sigma, SVD, 5), (norms, NETWORK, 1.6)):
        low, middle, high = np.percentile(
            np.where(values > 0, values, np.nan), (10, 50, 90), axis=0
        )
        right.fill_between(index, low, high, color=colour, alpha=0.15, lw=0)
        right.plot(index, middle, color=colour, lw=width, alpha=0.4 if width > 2 else 1)
    right.set(xlabel="component index i", ylabel="norm of row i of B, or $σ_i$ (units of X)",
              title="median and 10–90 % of images")  # fmt: skip
    _log_scale(right)
    labels = (("rows of the network's B", NETWORK, 0.93), ("singular values of X (SVD)", SVD, 0.86))
    for text, colour, y in labels:
        right.text(0.97, y, text, color=colour, ha="right", transform=right.transAxes)
    on = norms > 0
    apart = 100 * np.median(np.abs(norms - sigma)[on] / np.maximum(sigma[on], 1e-12))
    off = int((~on).all(0).sum())
    title = f"Row norms of B differ from the singular values by {_pct(apart)} (median)"
    save(figure, path, title + (f"; {off} components are off" if off else ""), footer)


@rc_context(STYLE)
def comparison(
    path: str | Path,
    per_image: dict[str, dict[str, ArrayLike]],
    spectra: dict[str, ArrayLike],
    rank: int,
    footer: str,
    split: str = "test",
) -> None:
    """Error per image against the SVD's, excess of every method, spectra of X and X_hat.

    per_image: method → {"rel_error": [n], "excess_pct": [n]}; spectra: X and X_hat → [n, S].
    """
    figure = _figure(16, 5.6)
    scatter, strips, spectrum = figure.subplots(1, 3, width_ratios=[1, 1.35, 1])
    network, svd = (_array(per_image[name]["rel_error"]) for name in ("network", "svd"))
    low, high = min(svd.min(), network.min()), max(svd.max(), network.max())
    margin = 0.06 * (high - low) or 1e-6
    span = (low - margin, high + margin)
    scatter.plot(span, span, color=SVD, lw=1.4)
    scatter.plot(svd, network, "o", color=NETWORK, ms=5, alpha=0.6, mec="none")
    scatter.set(xlim=span, ylim=span, aspect="equal", xlabel="rel_error of the SVD",
                ylabel="rel_error of the network", title=f"each dot one {split} image")  # fmt: skip
    scatter.text(0.97, 0.03, "on the line: as good as the SVD", color=SVD, ha="right",
                 transform=scatter.transAxes, fontsize=10)  # fmt: skip
    for axis in (scatter.xaxis, scatter.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    excess = {name: _array(per_image[name]["excess_pct"]) for name in METHODS if name in per_image}
    _excess_strips(strips, excess)
    for name, colour, label in (("X", "#222222", "X"), ("X_hat", NETWORK, "X_hat = A·B")):
        values = _array(spectra[name])[:, : None if name == "X" else rank]
        index = np.arange(1, values.shape[1] + 1)
        low, middle, high = np.percentile(values, (10, 50, 90), axis=0)
        spectrum.fill_between(index, low, high, color=colour, alpha=0.13, lw=0)
        wide = name == "X"
        spectrum.plot(index, middle, color=colour, lw=5 if wide else 1.6, alpha=0.35 if wide else 1)
        spectrum.text(0.96, 0.93 if wide else 0.86, label, color=colour, ha="right",
                      transform=spectrum.transAxes)  # fmt: skip
    spectrum.axvline(rank, color=GREY, lw=1, ls="--")
    spectrum.text(rank, 0.02, f" rank {rank}", color=GREY, va="bottom", rotation=90,
                  ha="right", transform=spectrum.get_xaxis_transform())  # fmt: skip
    spectrum.set(xlabel="index i", ylabel="singular value $σ_i$ (units of X)",
                 title="median and 10–90 % of images")  # fmt: skip
    middle = np.median(_array(spectra["X"]), axis=0)
    spectrum.set_ylim(max(middle[-1] / 3, 1e-6 * middle[0]), 3 * middle[0])
    _log_scale(spectrum)
    means = {name: _pct(np.nanmean(v)) for name, v in excess.items() if np.isfinite(v).any()}
    others = [f"{METHODS[n][0]} {means[n]}" for n in ("random_sketch", "randomized_svd")
              if n in means]  # fmt: skip
    title = (
        f"At rank {rank} the network's error is {means.get('network', 'undefined')} above the SVD's"
    )
    save(figure, path, title + (f" ({', '.join(others)})" if others else ""), footer)


def _excess_strips(ax: Axes, excess: dict[str, np.ndarray]) -> None:
    """One row of dots per method over log excess; what is rounding or below zero sits at the edge."""
    rng = np.random.default_rng(0)  # the jitter is the same in every run
    names = list(excess)[::-1]
    for y, name in enumerate(names):
        values, (label, colour) = excess[name][np.isfinite(excess[name])], METHODS[name]
        drawn = np.maximum(values, ROUNDING_PCT)
        ax.plot(drawn, y + rng.uniform(-0.2, 0.2, len(values)) - 0.08, "o", color=colour, ms=3.5,
                alpha=0.45, mec="none")  # fmt: skip
        text = f"{label}: " + (f"mean {_pct(values.mean())}" if values.size else "undefined")
        ax.text(0.02, y + 0.3, text, color=colour, fontsize=10.5,
                transform=ax.get_yaxis_transform())  # fmt: skip
    ax.set(ylim=(-0.5, len(names) - 0.3), yticks=[], title="every method, each dot one image",
           xlabel=f"error above the optimum (%); {ROUNDING_PCT:.0e} and less is rounding")  # fmt: skip
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlim(ROUNDING_PCT / 2, max([10 * ROUNDING_PCT, *map(_top, excess.values())]) * 2)
    _log_scale(ax, "x")


def _top(values: np.ndarray) -> float:
    return float(np.max(values[np.isfinite(values)], initial=0))


@rc_context(STYLE)
def rank_sweep(
    path: str | Path, ranks: dict[str, dict], num_tokens: int, feature_dim: int, footer: str
) -> None:
    """Error and excess of every method over the rank, mean and up to the 90th percentile.

    ranks: as in svd_nn_comparison.json, rank → method → metric → {"mean", "p90"}.
    """
    figure = _figure(10, 9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.array(sorted(int(r) for r in ranks))
    names = [name for name in METHODS if name in ranks[str(x[0])]]
    ends: dict[Axes, list] = {top: [], bottom: []}
    for ax, metric in ((top, "rel_error"), (bottom, "excess_pct")):
        for name in names if ax is top else [n for n in names if n != "svd"]:
            label, colour = METHODS[name]
            mean, p90 = (
                _array([ranks[str(r)][name][metric][k] for r in x]) for k in ("mean", "p90")
            )
            if ax is bottom:
                mean, p90 = np.maximum(mean, ROUNDING_PCT), np.maximum(p90, ROUNDING_PCT)
            wide = name == "svd"
            ax.fill_between(x, mean, p90, color=colour, alpha=0.13, lw=0)
            ax.plot(x, mean, "-o", color=colour, ms=4, lw=6 if wide else 1.8,
                    alpha=0.35 if wide else 1)  # fmt: skip
            ends[ax].append((mean[-1], label, colour))
    whole = num_tokens * feature_dim
    stored = (num_tokens + feature_dim) / whole  # per rank: A and B together over X
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    bottom.set(xlabel="rank r (log scale)", xlim=(x[0] / 1.12, x[-1] * 1.12),
               ylabel=f"error above the optimum (%)\n{ROUNDING_PCT:.0e} and less is rounding")  # fmt: skip
    for ax in (top, bottom):
        _log_scale(ax)
        if x[0] < 1 / stored < x[-1]:
            ax.axvline(1 / stored, color=GREY, ls="--", lw=1)
            ax.text(1 / stored, 0.03, f"break-even rank {1 / stored:.0f} ", color=GREY, ha="right",
                    rotation=90, va="bottom", transform=ax.get_xaxis_transform())  # fmt: skip
    bottom.set_xscale("log")
    bottom.set_xticks(x, [str(r) for r in x])
    bottom.xaxis.set_minor_locator(NullLocator())
    above = top.secondary_xaxis("top")
    above.set_xticks(x, [f"{100 * r * stored:.3g} %" for r in x])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("numbers stored, r (T + D), of T·D")
    figure.get_layout_engine().execute(figure)
    for ax, labels in ends.items():
        _label_ends(ax, labels)
    worst = np.nanmax(
        [np.nan] + [_array(ranks[str(r)]["network"]["excess_pct"]["mean"]) for r in x]
    )
    title = f"Ranks {x[0]} to {x[-1]}: the network's mean error is at most {_pct(worst)} above the SVD's"
    save(figure, path, title, footer)


# -------------------------------------------------------------------------------------- one image


@rc_context(STYLE)
def channel_comparison(
    path: str | Path,
    photo: Image,
    box: tuple[float, float, float, float] | None,
    maps: dict[str, ArrayLike],
    channels: list[int],
    grid: tuple[int, int],
    info: dict[str, str],
) -> None:
    """Chosen channels of one image: original, network, SVD on one scale each; differences on one.

    box: (x, y, w, h) in fractions of the square photo; maps: original, network, svd → [T, C];
    info: title and footer.
    """
    maps = {name: _array(values) for name, values in maps.items()}
    count = len(channels)
    figure = _figure(4 + 1.65 * count, 9.6)
    outer = figure.add_gridspec(1, 2, width_ratios=[3.2, 1.65 * count])
    picture = figure.add_subplot(outer[0])
    _photograph(picture, photo, box)
    inner = outer[1].subgridspec(5, count)
    axes = np.array([[figure.add_subplot(inner[i, j]) for j in range(count)] for i in range(5)])
    values = {name: maps[name] for name in ("original", "network", "svd")}
    signed = {name: maps[name] - maps["original"] for name in ("network", "svd")}
    reach = _symmetric_limits(*signed.values())
    for j, channel in enumerate(channels):
        limits = _shared_limits(*(v[:, j] for v in values.values()))
        for ax, v in zip(axes[:3, j], values.values(), strict=True):
            image = _token_map(ax, v[:, j], grid, limits, "viridis")
        for ax, v in zip(axes[3:, j], signed.values(), strict=True):
            difference = _token_map(ax, v[:, j], grid, reach, "RdBu_r")
        axes[0, j].set_title(f"channel {channel}", loc="center")
        _colour_bar(figure, image, list(axes[:3, j]), "", location="bottom", shrink=0.9, pad=0.01,
                    aspect=12, bins=2)  # fmt: skip
    _colour_bar(figure, difference, list(axes[3:, -1]), "difference (same units)", aspect=25)
    rows = [("original X", "#222222"), METHODS["network"], METHODS["svd"],
            ("network − original", NETWORK), ("SVD − original", SVD)]  # fmt: skip
    for ax, (label, colour) in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(label, color=colour)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    save(figure, path, info["title"], info["footer"])


@rc_context(STYLE)
def spatial_error(
    path: str | Path,
    photo: Image,
    box: tuple[float, float, float, float] | None,
    token_error: dict[str, ArrayLike],
    grid: tuple[int, int],
    info: dict[str, str],
) -> None:
    """Relative error per token [T] of network and SVD of one image: maps, overlays, difference.

    box and info as in `channel_comparison`.
    """
    errors = {name: _array(token_error[name]) for name in ("network", "svd")}
    rows, columns = grid
    figure = _figure(15.5, 8.4)
    axes = figure.subplots(2, 4)
    _photograph(axes[0, 0], photo, box)
    _inside_outside(axes[1, 0], errors, box, grid)
    limits, apart = _shared_limits(*errors.values()), errors["network"] - errors["svd"]
    columns_of_maps = [(*METHODS[n], errors[n], limits, "viridis") for n in errors]
    columns_of_maps += [("network − SVD", "#222222", apart, _symmetric_limits(apart), "RdBu_r")]
    for (above, below), (label, colour, values, scale, cmap) in zip(
        axes[:, 1:].T, columns_of_maps, strict=True
    ):
        image = _token_map(above, values, grid, scale, cmap)
        above.set_title(label, color=colour)
        below.imshow(photo, extent=(0, columns, rows, 0), interpolation="bilinear")
        _token_map(below, values, grid, scale, cmap, alpha=0.6)
        for ax in (above, below):
            _draw_box(ax, box, columns, rows)
        if cmap == "viridis":
            errors_image = image
    for ax in axes[1, 1:]:
        ax.set_xlabel("token column")
    for ax in axes[:, 1]:
        ax.set_ylabel("token row")
    _colour_bar(figure, errors_image, list(axes[:, 2]), "relative error of a token", aspect=40)
    _colour_bar(figure, image, list(axes[:, 3]), "difference of relative error", aspect=40)
    save(figure, path, info["title"], info["footer"])


def _photograph(ax: Axes, photo: Image, box: tuple | None) -> None:
    ax.imshow(photo, extent=(0, 1, 1, 0), interpolation="bilinear")
    _draw_box(ax, box, 1, 1)
    ax.set(xticks=[], yticks=[], title="what the encoder saw" + (", text box" if box else ""))
    ax.grid(False)


def _inside_outside(ax: Axes, errors: dict, box: tuple | None, grid: tuple[int, int]) -> None:
    """Mean and 10–90 % of the tokens' errors in the box and outside it (all tokens without one)."""
    rows, columns = grid
    y, x = np.divmod(np.arange(rows * columns), columns)
    if box is None:
        parts = {"all tokens": np.ones(rows * columns, bool)}
    else:  # a token counts as inside when its centre is
        u, v = (x + 0.5) / columns - box[0], (y + 0.5) / rows - box[1]
        inside = (u >= 0) & (u <= box[2]) & (v >= 0) & (v <= box[3])
        parts = {"in the box": inside, "outside": ~inside}
    parts = {f"{name}\n({mask.sum()} tokens)": mask for name, mask in parts.items() if mask.any()}
    for position, mask in enumerate(parts.values()):
        for shift, name in ((-0.12, "network"), (0.12, "svd")):
            label, colour = METHODS[name]
            low, high = np.percentile(errors[name][mask], (10, 90))
            ax.plot([position + shift] * 2, [low, high], color=colour, lw=3, alpha=0.4)
            ax.plot(position + shift, errors[name][mask].mean(), "o", color=colour, ms=7)
            ax.text(position + shift, high, f"{label}\n", color=colour, va="baseline",
                    ha="right" if shift < 0 else "left", fontsize=10)  # fmt: skip
    ax.set_xticks(range(len(parts)), list(parts))
    ax.set(xlim=(-0.6, len(parts) - 0.4), ylabel="relative error of a token",
           title="mean and 10–90 % of tokens")  # fmt: skip
    ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
