"""Figures as curves and dots: training, and all models of a batch side by side.

Arguments are arrays (numpy, or torch on any device), lists and dicts: no model, no cache. T tokens,
D features, n images, r rank. Every function raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from figures.style import (
    BLACK,
    GREY,
    NETWORK,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    band,
    column,
    curve,
    log_scale,
    new_figure,
    note,
    note_undefined,
    percent,
    save,
)

CURVES = {  # of training_curves; paler: the same on training images
    "train_mse": ("training", "#E8935A", "-"),
    "val_mse": ("validation", NETWORK, "-"),
    "train_optimum_mse": ("training floor (SVD)", "#5FA8D3", "--"),
    "val_optimum_mse": ("validation floor (SVD)", SVD, "--"),
}
TERMS = {  # no methods, so no method's colour (Tol's "muted")
    "loss_reconstruction": ("reconstruction", "#882255"),
    "loss_B": ("B (ridge)", "#999933"),
    "loss_ortho": ("orthogonality", "#332288"),
    "loss_lora_ortho": ("LoRA orthogonality", "#44AA99"),
    "loss_act": ("activations", "#AA4499"),
}


def _epoch_axis(ax: Axes, epochs: list[int]) -> None:
    pad = max(0.02 * (epochs[-1] - epochs[0]), 0.15)
    ax.set(xlim=(epochs[0] - pad, epochs[-1] + pad), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


@rc_context(STYLE)
def training_curves(path: str | Path, history: list[dict], best_epoch: int, footer: str) -> None:
    """Training and validation mse with their optima as floors; below, the validation excess, the
    learning rate and the effective rank; the best epoch is marked in all of them.

    history: the entries of history.json; a first one without `train_mse` is the untrained model.
    best_epoch: the epoch of best_model.pt.
    """
    figure = new_figure(10, 9.8)
    axes = top, above, lr, rank = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 1.2, 1.2])
    epochs = [record["epoch"] for record in history]
    columns = {key: column(history, key) for key in CURVES}
    for key, (_, colour, dashes) in CURVES.items():
        curve(top, epochs, columns[key], colour, ls=dashes)
    top.set_ylabel("mean squared error\nper entry of X")
    log_scale(top)
    curve(lr, epochs, column(history, "lr"), BLACK, drawstyle="steps-mid")
    lr.set_ylabel("learning\nrate")
    log_scale(lr)
    ranks = column(history, "effective_rank")
    curve(rank, epochs, ranks, BLACK, drawstyle="steps-mid")
    rank.set_ylabel("effective\nrank")
    rank.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _epoch_axis(rank, epochs)
    untrained = "train_mse" not in history[0]
    best = epochs.index(best_epoch)
    excess = column(history, "val_excess_pct")
    title = f"Validation error is {percent(excess[best])} above the SVD's at epoch {epochs[best]}"
    if np.isnan(excess[best]):
        title = (
            f"Validation mse {columns['val_mse'][best]:.3g}; the optimum is too small for a ratio"
        )
    elif untrained and best == 0:
        title = f"The network starts {percent(excess[0])} above the SVD's error, which is the least"
        title += f" at this rank: training has nothing to win (best of {epochs[-1]} epochs: none)"
    elif untrained and history[0]["effective_rank"] == history[best]["effective_rank"]:
        title += f" of {epochs[-1]}; untrained {percent(excess[0])}"
    # at other ranks the optimum is another one: the best epoch is not the lowest point there
    mark = "best" if np.ptp(ranks) == 0 else f"best at rank {ranks[best]:.0f}:"
    if untrained and best == 0:
        mark = f"untrained, {mark}"
    _excess_panel(above, epochs, excess, best, untrained, mark)
    for ax in axes:
        if ax.lines:
            ax.axvline(best_epoch, color=GREY, lw=1, ls=":", zorder=1)
    ends = [(columns[key][-1], label, colour) for key, (label, colour, _) in CURVES.items()]
    save(figure, path, title, footer, {top: ends})


def _excess_panel(
    ax: Axes, epochs: list[int], excess: np.ndarray, best: int, untrained: bool, mark: str
) -> None:
    """Validation excess over epochs; the untrained start is an open circle, the best a full one.

    mark: the words before the best one's value.
    """
    ax.set_ylabel("validation error\nabove the optimum (%)")
    if np.isnan(excess).all():
        note_undefined(ax)
        return
    curve(ax, epochs, excess, NETWORK)
    ax.margins(y=0.25)
    if np.nanmin(excess) > 0 and np.nanmax(excess) > 20 * np.nanmin(excess):
        log_scale(ax)
    paper = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1}  # readable on a curve
    style = {"textcoords": "offset points", "color": NETWORK, "bbox": paper}
    if untrained and best > 0:
        ax.plot(epochs[0], excess[0], "o", ms=9, mfc="white", mec=NETWORK, mew=1.8)
        ax.annotate(f"untrained {percent(excess[0])}", (epochs[0], excess[0]), (10, 8), **style)
    ax.plot(epochs[best], excess[best], "o", ms=8, color=NETWORK)
    side = "right" if 2 * epochs[best] > epochs[0] + epochs[-1] else "left"
    ax.annotate(f"{mark} {percent(excess[best])}", (epochs[best], excess[best]), (0, -10), ha=side,
                va="top", **style)  # fmt: skip


@rc_context(STYLE)
def loss_terms(path: str | Path, history: list[dict], footer: str) -> None:
    """Weighted loss terms and, where there are any, the shifts."""
    history = [record for record in history if "train_loss" in record]
    epochs = [record["epoch"] for record in history]
    shifts = as_array([record["shifts"] for record in history])  # [epochs, K]
    task = column(history, "loss_task")  # a logarithm, mostly negative
    heights = [3.4] + [1.7] * (not np.isnan(task).all()) + [1.7] * bool(shifts.size)
    figure = new_figure(10, 1.3 + 1.3 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    ends: dict[Axes, list] = {axes[0]: []}
    for key, (label, colour) in TERMS.items():
        values = column(history, key)
        if key == "loss_reconstruction":
            # 1 is its floor, but where images are so nearly of the rank that they count less
            floor = 1 if values.min() > 1 else 0
            label, values = label + " − 1" * floor, values - floor
        if np.any(values > 0):
            curve(axes[0], epochs, np.where(values > 0, values, np.nan), colour)
            ends[axes[0]].append((values[-1], label, colour))
    axes[0].set_ylabel("weighted loss term (reconstruction:\nsquared error over its optimum)")
    log_scale(axes[0])
    if not np.isnan(task).all():
        curve(axes[1], epochs, task, BLACK)
        axes[1].set_ylabel("task term: weighted\nlog of its error")
    if shifts.size:
        curve(axes[-1], epochs, shifts, BLACK)
        axes[-1].set(ylabel="shift / smallest\nRitz value", ylim=(0, 1))
        ends[axes[-1]] = [(s, f"step {k}", BLACK) for k, s in enumerate(shifts[-1], 1)]
    _epoch_axis(axes[-1], epochs)
    first, last = (f"{history[i]['loss_reconstruction']:#.5g}" for i in (0, -1))
    title = f"Training: squared error over its optimum {first} in epoch {epochs[0]}"
    title += f", {last} in epoch {epochs[-1]}" if len(epochs) > 1 else ""
    save(figure, path, title, footer, ends)


@rc_context(STYLE)
def b_row_norms(
    path: str | Path, b_norms: ArrayLike, singular_values: ArrayLike, footer: str
) -> None:
    """Row norms of B [n, r] beside σ_i [n, ≥ r] of the same images: histogram, and over the index.

    For orthonormal A in Ritz order they coincide; a component that is switched off has norm 0.
    """
    norms = as_array(b_norms)
    sigma = as_array(singular_values)[:, : norms.shape[1]]
    figure = new_figure(12, 5.2)
    left, right = figure.subplots(1, 2)
    positive = np.concatenate([norms[norms > 0], sigma[sigma > 0]])
    if not positive.size:  # every token is constant
        positive = np.ones(1)
        note(left, 0.5, 0.5, "all of them are zero", ha="center")
    bins = np.geomspace(positive.min(), positive.max() * 1.001, 50)
    left.hist(sigma[sigma > 0], bins, color=SVD, alpha=0.35)
    left.hist(norms[norms > 0], bins, color=NETWORK, histtype="step", lw=1.8)
    left.set(xlabel="row norm of B, or σ (units of X)", ylabel="components of all images")
    log_scale(left, "x")
    band(right, sigma, SVD, wide=True)
    band(right, norms, NETWORK)
    right.set(xlabel="component index i", ylabel="norm of row i of B, or $σ_i$ (units of X)")
    log_scale(right)
    note(right, 0.97, 0.93, "rows of the network's B", NETWORK, ha="right")
    note(right, 0.97, 0.86, "singular values of X (SVD)", SVD, ha="right")
    on = norms > 0
    differences = np.abs(norms - sigma)[on] / np.maximum(sigma[on], 1e-12)
    apart = 100 * np.median(differences) if on.any() else np.nan
    title = f"Row norms of B differ from the singular values by {percent(apart)} (median)"
    off = int((~on).all(0).sum())
    save(figure, path, title + (f"; {off} components are off" if off else ""), footer)


@rc_context(STYLE)
def overview(path: str | Path, rows: list[dict], footer: str) -> None:
    """All architectures of a batch side by side: excess, error beside the SVD's, training speed.

    rows: of each architecture {"arch", "factors", "effective_rank", "rank" (compared at),
    "excess_mean", "excess_p90" (per cent, or None where undefined), "rel_error", "optimum"
    (the SVD's rel_error at that rank), "samples_per_s", "epochs", "best_epoch"}; drawn
    from top to bottom.
    """
    figure = new_figure(15, 2.7 + 0.75 * len(rows))
    axes = above, error, speed = figure.subplots(1, 3, sharey=True, width_ratios=[1.2, 1.2, 1])
    places = np.arange(len(rows))[::-1]
    _excess_rows(above, rows, places)
    network, svd = column(rows, "rel_error"), column(rows, "optimum")
    error.hlines(places, svd, network, color=GREY, lw=1)
    error.plot(svd, places, "|", color=SVD, ms=20, mew=2.5)
    error.plot(network, places, "o", color=NETWORK, ms=8)
    error.set(xlim=(0, 1.45 * max(network.max(), svd.max(), 1e-12)),
              xlabel="mean rel_error ‖X − A·B‖ / ‖X‖",
              title="network beside the SVD of the same rank")  # fmt: skip
    error.locator_params(axis="x", nbins=6)
    images = column(rows, "samples_per_s")
    speed.barh(places, images, 0.3, color=GREY)
    speed.set(xlim=(0, 1.25 * images.max()), xlabel="images per second (median epoch)",
              title="speed of training")  # fmt: skip
    for place, x, best, rate in zip(places, network, svd, images, strict=True):
        _value(error, x, place, (9, -4), f"{x:.4g} network", NETWORK)
        _value(error, best, place, (-1, 13), f"{best:.4g} SVD", SVD)
        _value(speed, rate, place, (9, -4), f"{rate:.1f}", BLACK)
    labels = [f"{row['arch']}\n{row['factors']}, rank {row['effective_rank']}, "
              f"best epoch {row['best_epoch']} of {row['epochs']}" for row in rows]  # fmt: skip
    above.set_yticks(places, labels)
    for ax in axes:
        ax.set_ylim(-0.6, len(rows) - 0.25)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    means = [percent(mean) for mean in column(rows, "excess_mean")]
    ranks = [row["rank"] for row in rows]
    if len(set(ranks)) > 1:
        means = [f"{mean} (rank {rank})" for mean, rank in zip(means, ranks, strict=True)]
    found = ", ".join(f"{row['arch']} {mean}" for row, mean in zip(rows, means, strict=True))
    where = "" if len(set(ranks)) > 1 else f" at rank {ranks[0]}"
    save(figure, path, f"Mean error above the SVD's{where}: {found}", footer)


def _excess_rows(ax: Axes, rows: list[dict], places: np.ndarray) -> None:
    """Mean and 90th percentile of the excess of each architecture, one row each."""
    mean = column(rows, "excess_mean")
    low, high = (
        np.maximum(column(rows, key), ROUNDING_PCT) for key in ("excess_mean", "excess_p90")
    )
    ax.set_title("error above the SVD's: mean (full), p90 (open)")
    ax.set_xlabel(f"error above the optimum (%); {ROUNDING} is rounding" if ROUNDING_PCT in low
                  else "error above the optimum (%), log scale")  # fmt: skip
    ax.hlines(places, low, high, color=NETWORK, lw=1.8)
    ax.plot(high, places, "o", color=NETWORK, ms=8, mfc="white", mew=1.8)
    ax.plot(low, places, "o", color=NETWORK, ms=8)
    for place, x, value in zip(places, low, mean, strict=True):
        if np.isnan(value):
            ax.text(0.5, place, "undefined: the optimum is below 1e-6", color=GREY, ha="center",
                    va="center", transform=ax.get_yaxis_transform())  # fmt: skip
        else:
            _value(ax, x, place, (0, 9), percent(value), NETWORK, ha="center")
    if np.isfinite(low).any():
        lowest, highest = np.nanmin(low), np.nanmax([low, high])
        room = max(3, (highest / lowest) ** 0.15)  # for the values at the outermost dots
        ax.set_xlim(lowest / room, highest * room)
        log_scale(ax, "x")
    else:
        ax.set_xticks([])


def _value(ax: Axes, x: float, y: float, points: tuple, text: str, colour: str, **style) -> None:
    """Write a number so many points to the right of its mark and above it."""
    ax.annotate(text, (x, y), points, textcoords="offset points", color=colour, fontsize=10.5,
                **style)  # fmt: skip
