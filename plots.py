"""Figures as curves and dots: training, one model against the SVD, all models of a batch.

Arguments are arrays (numpy, or torch on any device), lists and dicts: no model, no cache. T tokens,
D features, n images, r rank, S = min(T, D). Every function raises OSError where it cannot write,
and KeyError for a method that has no colour in `figure_style.METHODS`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from figure_style import (
    BLACK,
    GREY,
    METHODS,
    NETWORK,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    column,
    common_limits,
    in_order,
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
    "train_loss": ("sum", "#222222"),
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


def _line(ax: Axes, x: ArrayLike, y: ArrayLike, colour: str, wide: bool = False, **style) -> None:
    """A curve with its points where they are few; a wide pale one leaves another on it visible."""
    marker = "o" if len(x) < 40 and not wide and style.get("ls") != "--" else None
    ax.plot(x, y, color=colour, marker=marker, ms=3.5, lw=6 if wide else 1.8,
            alpha=0.35 if wide else 1, **style)  # fmt: skip


def _band(ax: Axes, values: np.ndarray, colour: str, wide: bool = False) -> None:
    """Median and 10–90 % of positive values [n, k] over the index 1 … k."""
    index = np.flatnonzero((values > 0).any(0))
    if not index.size:
        return
    values = np.where(values > 0, values, np.nan)[:, index]
    low, middle, high = np.nanpercentile(values, (10, 50, 90), axis=0)
    ax.fill_between(index + 1, low, high, color=colour, alpha=0.13, lw=0)
    _line(ax, index + 1, middle, colour, wide)
    ax.set_title("median and 10–90 % of images")


@rc_context(STYLE)
def training_curves(path: str | Path, history: list[dict], best_epoch: int, footer: str) -> None:
    """Training and validation mse with their optima as floors; below, the validation excess.

    history: the entries of history.json; a first one without `train_mse` is the untrained model.
    best_epoch: the epoch of best_model.pt.
    """
    figure = new_figure(10, 7.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in history]
    columns = {key: column(history, key) for key in CURVES}
    for key, (_, colour, dashes) in CURVES.items():
        _line(top, epochs, columns[key], colour, ls=dashes)
    top.set_ylabel("mean squared error\nper entry of X")
    log_scale(top)
    _epoch_axis(bottom, epochs)
    untrained = "train_mse" not in history[0]
    best = epochs.index(best_epoch)
    excess = column(history, "val_excess_pct")
    title = f"Validation error is {percent(excess[best])} above the SVD's at epoch {epochs[best]}"
    if np.isnan(excess[best]):
        title = (
            f"Validation mse {columns['val_mse'][best]:.3g}; the optimum is too small for a ratio"
        )
    elif untrained and history[0]["effective_rank"] == history[best]["effective_rank"]:
        title += f" of {epochs[-1]}; untrained {percent(excess[0])}"
    _excess_panel(bottom, epochs, excess, best, untrained)
    ends = [(columns[key][-1], label, colour) for key, (label, colour, _) in CURVES.items()]
    save(figure, path, title, footer, {top: ends})


def _excess_panel(ax: Axes, epochs: list[int], excess: np.ndarray, best: int, untrained: bool):
    """Validation excess over epochs; the untrained start is an open circle, the best a full one."""
    ax.set_ylabel("validation error\nabove the optimum (%)")
    if np.isnan(excess).all():
        note_undefined(ax)
        return
    _line(ax, epochs, excess, NETWORK)
    ax.margins(y=0.25)
    if np.nanmin(excess) > 0 and np.nanmax(excess) > 20 * np.nanmin(excess):
        log_scale(ax)
    style = {"textcoords": "offset points", "color": NETWORK}
    if untrained:
        ax.plot(epochs[0], excess[0], "o", ms=9, mfc="white", mec=NETWORK, mew=1.8)
        ax.annotate(f"untrained {percent(excess[0])}", (epochs[0], excess[0]), (10, 8), **style)
    ax.plot(epochs[best], excess[best], "o", ms=8, color=NETWORK)
    side = "right" if 2 * epochs[best] > epochs[0] + epochs[-1] else "left"
    ax.annotate(f"best {percent(excess[best])}", (epochs[best], excess[best]), (0, -10), ha=side,
                va="top", **style)  # fmt: skip


@rc_context(STYLE)
def loss_terms(path: str | Path, history: list[dict], footer: str) -> None:
    """Weighted loss terms, learning rate, effective rank and, where there are any, the shifts."""
    history = [record for record in history if "train_loss" in record]
    epochs = [record["epoch"] for record in history]
    shifts = as_array([record["shifts"] for record in history])  # [epochs, K]
    heights = [3, 1.2, 1.2] + [1.7] * bool(shifts.size)
    figure = new_figure(10, 1.3 + 1.3 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    ends: dict[Axes, list] = {axes[0]: []}
    for key, (label, colour) in TERMS.items():
        values = column(history, key)
        if np.any(values > 0):
            _line(
                axes[0], epochs, np.where(values > 0, values, np.nan), colour, key == "train_loss"
            )
            ends[axes[0]].append((values[-1], label, colour))
    axes[0].set_ylabel("weighted loss term (reconstruction:\nsquared error over its optimum)")
    _line(axes[1], epochs, column(history, "lr"), BLACK, drawstyle="steps-mid")
    axes[1].set_ylabel("learning\nrate")
    _line(axes[2], epochs, column(history, "effective_rank"), BLACK, drawstyle="steps-mid")
    axes[2].set_ylabel("effective\nrank")
    axes[2].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    log_scale(axes[0])
    log_scale(axes[1])
    if shifts.size:
        _line(axes[3], epochs, shifts, BLACK)
        axes[3].set(ylabel="shift / smallest\nRitz value", ylim=(0, 1))
        ends[axes[3]] = [(s, f"step {k}", BLACK) for k, s in enumerate(shifts[-1], 1)]
    _epoch_axis(axes[-1], epochs)
    first, last = (f"{history[i]['loss_reconstruction']:.5g}" for i in (0, -1))
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
    _band(right, sigma, SVD, wide=True)
    _band(right, norms, NETWORK)
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
def comparison(
    path: str | Path, per_image: dict[str, dict[str, ArrayLike]], spectra: dict[str, ArrayLike],
    rank: int, footer: str, split: str = "test",
) -> None:  # fmt: skip
    """Error per image against the SVD's, excess of every method, spectra of X and X_hat.

    per_image: method → {"rel_error": [n], "excess_pct": [n]}; spectra: X and X_hat → [n, S].
    """
    figure = new_figure(16, 6)
    scatter, strips, spectrum = figure.subplots(1, 3, width_ratios=[1, 1.3, 1])
    network, svd = (as_array(per_image[name]["rel_error"]) for name in ("network", "svd"))
    low, high = common_limits(network, svd)
    span = (low - 0.06 * (high - low), high + 0.06 * (high - low))
    scatter.plot(span, span, color=SVD, lw=1.4)
    scatter.plot(svd, network, "o", color=NETWORK, ms=5, alpha=0.6, mec="none")
    scatter.set(xlim=span, ylim=span, xlabel="rel_error of the SVD",
                ylabel="rel_error of the network", title=f"each dot one {split} image")  # fmt: skip
    scatter.locator_params(nbins=5)
    note(scatter, 0.97, 0.03, "on the line: as good as the SVD", SVD, ha="right")
    excess = {name: as_array(per_image[name]["excess_pct"]) for name in in_order(per_image)}
    excess = {name: values[np.isfinite(values)] for name, values in excess.items()}
    _excess_strips(strips, excess)
    sigma = as_array(spectra["X"])
    _band(spectrum, sigma, BLACK, wide=True)
    _band(spectrum, as_array(spectra["X_hat"])[:, :rank], NETWORK)
    spectrum.set(xlabel="index i", ylabel="singular value $σ_i$ (units of X)",
                 ylim=np.median(sigma, axis=0).max() * np.array([1e-6, 3]))  # fmt: skip
    spectrum.set_ylim(bottom=max(spectrum.get_ylim()[0], np.median(sigma, axis=0)[-1] / 3))
    log_scale(spectrum)
    note(spectrum, 0.97, 0.93, "X", BLACK, ha="right")
    note(spectrum, 0.97, 0.86, "X_hat = A·B", NETWORK, ha="right")
    spectrum.axvline(rank, color=GREY, lw=1, ls="--")
    spectrum.text(rank, 0.02, f"rank {rank} ", color=GREY, va="bottom", ha="right", rotation=90,
                  transform=spectrum.get_xaxis_transform())  # fmt: skip
    means = {name: percent(values.mean()) for name, values in excess.items() if values.size}
    others = [f"{METHODS[name][0]} {means[name]}" for name in ("random_sketch", "randomized_svd")
              if name in means]  # fmt: skip
    title = f"At rank {rank} the network's error is {means.get('network', 'undefined')} above the "
    title += "SVD's" + (f" ({', '.join(others)})" if others else "")
    save(figure, path, title, footer)


def _excess_strips(ax: Axes, excess: dict[str, np.ndarray]) -> None:
    """A row of dots per method over log excess; rounding, of either sign, sits at the left edge."""
    jitter = np.random.default_rng(0)  # the same in every run
    for y, (name, values) in enumerate(reversed(excess.items())):
        label, colour = METHODS[name]
        height = y - 0.08 + jitter.uniform(-0.2, 0.2, len(values))
        ax.plot(np.maximum(values, ROUNDING_PCT), height, "o", color=colour, ms=3.5, alpha=0.45,
                mec="none")  # fmt: skip
        text = f"{label}: " + (f"mean {percent(values.mean())}" if values.size else "undefined")
        ax.text(0.02, y + 0.24, text, color=colour, transform=ax.get_yaxis_transform())
    highest = max([v.max(initial=10 * ROUNDING_PCT) for v in excess.values()])
    ax.set(xlim=(ROUNDING_PCT / 2, 2 * highest), ylim=(-0.5, len(excess) - 0.4), yticks=[],
           xlabel=f"error above the optimum (%); {ROUNDING} and less is rounding",
           title="excess of every method, each dot one image")  # fmt: skip
    ax.spines["left"].set_visible(False)
    log_scale(ax, "x")


@rc_context(STYLE)
def rank_sweep(
    path: str | Path, ranks: dict[str, dict], num_tokens: int, feature_dim: int, footer: str
) -> None:
    """Error and excess of every method over the rank: mean, and a band up to the 90th percentile.

    ranks: as in svd_nn_comparison.json, rank → method → metric → {"mean", "p90"}.
    """
    figure = new_figure(10, 9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.array(sorted(int(r) for r in ranks))
    ends: dict[Axes, list] = {top: [], bottom: []}
    for name in in_order(set().union(*ranks.values())):
        label, colour = METHODS[name]
        for ax, metric, least in ((top, "rel_error", 0), (bottom, "excess_pct", ROUNDING_PCT)):
            if (name, metric) == ("svd", "excess_pct"):
                continue  # zero by definition
            summaries = [ranks[str(r)][name][metric] for r in x]
            mean, p90 = (np.maximum(column(summaries, key), least) for key in ("mean", "p90"))
            ax.fill_between(x, mean, p90, color=colour, alpha=0.13, lw=0)
            _line(ax, x, mean, colour, wide=name == "svd")
            ends[ax].append((mean[-1], label, colour))
    stored = (num_tokens + feature_dim) / (num_tokens * feature_dim)  # of A and B, per rank
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    bottom.set(xscale="log", xlim=(x[0] / 1.12, x[-1] * 1.12), xlabel="rank r (log scale)",
               ylabel=f"error above the optimum (%)\n{ROUNDING} and less is rounding")  # fmt: skip
    for ax in (top, bottom):
        log_scale(ax)
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
    excess = column([ranks[str(r)]["network"]["excess_pct"] for r in x], "mean")
    if np.isnan(excess).all():
        note_undefined(bottom)
    worst = percent(np.fmax.reduce(excess))  # fmax ignores NaN
    reach = f"Rank {x[0]}" if len(x) == 1 else f"Ranks {x[0]} to {x[-1]}"
    title = f"{reach}: the network's mean error is at most {worst} above the SVD's"
    save(figure, path, title, footer, ends)


@rc_context(STYLE)
def rank_per_image(path: str | Path, data: dict, footer: str) -> None:
    """Ranks that differ between images, and their errors beside those of one fixed rank.

    data: "network" and "svd", each {"ranks": [n], "rel_error": [n], "fixed_rank": the one that
    stores as much, "fixed_rel_error": [n], "rank_for_all": the one that meets the target for every
    image, or None}, and "target_error", or None where a budget was split.
    """
    figure = new_figure(13, 5.6)
    left, right = figure.subplots(1, 2)
    network, target = data["network"], data["target_error"]
    ranks = {name: as_array(data[name]["ranks"]) for name in ("network", "svd")}
    reach = max(r.max() for r in ranks.values())
    bins = np.arange(0, reach + 2, max(1, round(reach / 30))) - 0.5
    bins = np.append(bins, bins[-1] + np.diff(bins[-2:]))
    left.hist(ranks["network"], bins, color=NETWORK, alpha=0.45)
    left.hist(ranks["svd"], bins, histtype="step", color=SVD, lw=1.4)
    left.set(xlabel="rank of an image", ylabel="images", title="ranks per image: network (filled), "
             "SVD (outline)")  # fmt: skip
    left.set_ylim(top=1.25 * left.get_ylim()[1])  # room for the labels above the bars
    left.set_xlim(0, reach * 1.08)
    marks = ((network["fixed_rank"], "that stores as much"),
             (network["rank_for_all"], "that meets the target for all"))  # fmt: skip
    for (rank, text), height in zip(marks, (0.97, 0.9), strict=True):
        if rank is not None:
            side = ("right", -4) if rank > 0.54 * reach else ("left", 4)
            left.axvline(rank, color=BLACK, lw=1.2, ls="--")
            left.annotate(f"rank {rank}, the one {text}", (rank, height), (side[1], 0),
                          ("data", "axes fraction"), "offset points", color=BLACK, fontsize=10.5,
                          ha=side[0], va="top",
                          bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    ends = []
    for name, key, style, label in (
        ("svd", "fixed_rel_error", "--", "SVD"),
        ("svd", "rel_error", "-", "SVD, per image"),
        ("network", "fixed_rel_error", "--", f"rank {network['fixed_rank']} for all"),
        ("network", "rel_error", "-", "ranks per image"),
    ):
        error = np.sort(as_array(data[name][key]))
        place = 100 * (np.arange(len(error)) + 0.5) / len(error)
        wide = name == "svd"  # below the network's, and wider, so that both are seen
        right.plot(place, error, style, color=METHODS[name][1], lw=3.5 if wide else 1.5,
                   alpha=0.35 if wide else 1)  # fmt: skip
        if not wide:
            ends.append((error[-1], label, NETWORK))
    right.set(xlim=(0, 100), ylim=(0, None), xlabel="images, sorted by their error (%)",
              ylabel="rel_error ‖X − A·B‖ / ‖X‖",
              title="error: network (thin) on the SVD (wide, pale)")  # fmt: skip
    if target is not None:
        right.axhline(target, color=GREY, lw=1)
        right.annotate(f"target {target:g}", (1, target), (0, 3), textcoords="offset points",
                       color=GREY, fontsize=10.5)  # fmt: skip
    save(figure, path, _rank_gain(network, target), footer, {right: ends})


def _rank_gain(network: dict, target: float | None) -> str:
    """The finding of `rank_per_image` in words."""
    mean = as_array(network["ranks"]).mean()
    if target is not None:
        return (f"Every image is within {target:g} at {mean:.1f} components on average; one rank "
                f"for all would have to be {network['rank_for_all']}")  # fmt: skip
    pairs = [as_array(network[key]) for key in ("rel_error", "fixed_rel_error")]
    change = {}
    for name, of in (("rms", lambda e: np.sqrt(np.mean(e**2))), ("largest", np.max)):
        own, fixed = map(of, pairs)
        change[name] = f"{100 * (own / fixed - 1) if fixed else 0:+.1f} %"
    return (f"Ranks by need, {mean:.0f} on average, against rank {network['fixed_rank']} for all: "
            f"rms error {change['rms']}, largest error {change['largest']}")  # fmt: skip


@rc_context(STYLE)
def overview(path: str | Path, rows: list[dict], footer: str) -> None:
    """All architectures of a batch side by side: excess, error beside the SVD's, training speed.

    rows: of each architecture {"arch", "factors", "effective_rank", "excess_mean", "excess_p90"
    (per cent, or None where undefined), "rel_error", "optimum" (the SVD's rel_error at that rank),
    "samples_per_s", "epochs"}; drawn from top to bottom.
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
              f"{row['epochs']} epoch{'s' * (row['epochs'] != 1)}" for row in rows]  # fmt: skip
    above.set_yticks(places, labels)
    for ax in axes:
        ax.set_ylim(-0.6, len(rows) - 0.25)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    means = [percent(mean) for mean in column(rows, "excess_mean")]
    ranks = [row["effective_rank"] for row in rows]
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
