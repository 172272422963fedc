"""Figures of a training run over its epochs.

Arguments are lists and dicts: no model, no cache. T tokens, D features, r rank, p extra columns of
the sketch. Every function raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures.style import (
    BLACK,
    GREY,
    NETWORK,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    column,
    curve,
    log_scale,
    new_figure,
    note,
    note_undefined,
    percent,
    rows_of_axes,
    save,
)

CURVES = {  # of the mse panel; paler: the same on training images
    "train_mse": ("training", "#E8935A", "-"),
    "val_mse": ("validation", NETWORK, "-"),
    "train_optimum_mse": ("training floor (SVD)", "#5FA8D3", "--"),
    "val_optimum_mse": ("validation floor (SVD)", SVD, "--"),
}
TERMS = {  # label, colour (no methods, so no method's: Tol's "muted"), what it is
    "loss_reconstruction": (
        "reconstruction",
        "#882255",
        "mean over images of squared error / the least there is at this rank",
    ),
    "loss_B": ("B (ridge)", "#999933", "λ_B · mean square of the entries of B, ‖B‖² / (T D)"),
    "loss_ortho": (
        "orthogonality",
        "#332288",
        "λ_ortho · ‖ŶᵀŶ − I‖² / (r + p)², Ŷ the sketch, its columns of length 1",
    ),
    "loss_lora_ortho": (
        "LoRA orthogonality",
        "#44AA99",
        "λ_ortho · the same of lora_A and lora_B of every SVDLinear",
    ),
    "loss_act": ("activations", "#AA4499", "λ_act · the same of row_net's output"),
}
ON_THE_OPTIMUM = 1.0  # per cent above it: of less, curves of mse and floor are one line


def _epoch_axis(ax: Axes, epochs: list[int]) -> None:
    pad = max(0.02 * (epochs[-1] - epochs[0]), 0.15)
    ax.set(xlim=(epochs[0] - pad, epochs[-1] + pad), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


@rc_context(STYLE)
def training_curves(path: str | Path, history: list[dict], best_epoch: int, footer: str) -> None:
    """Draw the validation excess over epochs; below it only what changes.

    That is the mse where it leaves its floor or the rank falls, the learning rate, the effective
    rank over optimiser steps and, where they are not simply the first ones, the components that
    the allocator keeps.

    history: the entries of history.json; a first one without `train_mse` is the untrained model.
    best_epoch: the epoch of best_model.pt. While the rank falls each epoch has another optimum, so
    that its excess does not compare: those epochs are grey.
    """
    epochs = [record["epoch"] for record in history]
    excess = column(history, "val_excess_pct")
    ranks, rates = column(history, "effective_rank"), column(history, "lr")
    falls = bool(np.ptp(ranks))
    panels = {"excess": 3.2}
    if falls or np.isnan(excess).any() or excess.max() > ON_THE_OPTIMUM:
        panels["mse"] = 3.2
    panels |= {"lr": 1.3} if np.ptp(rates[np.isfinite(rates)] if len(epochs) > 1 else [0]) else {}
    panels |= {"rank": 1.3} if falls else {}
    panels |= {"kept": 2.0} if _is_a_choice(history) else {}
    figure = new_figure(10, 1.9 + sum(panels.values()))
    axes = rows_of_axes(figure, list(panels.values()))
    on = dict(zip(panels, axes, strict=True))
    untrained = "train_mse" not in history[0]
    best = epochs.index(best_epoch)
    mark = f"best at rank {ranks[best]:.0f}:" if falls else "best"
    if untrained and best == 0:
        mark = f"untrained, {mark}"
    _excess_panel(on["excess"], epochs, excess, ranks, best, untrained, mark)
    ends = {}
    if "mse" in on:
        ends[on["mse"]] = _mse_panel(on["mse"], epochs, history)
    if "lr" in on:
        curve(on["lr"], epochs, rates, BLACK, drawstyle="steps-mid")
        on["lr"].set_ylabel("learning\nrate")
        log_scale(on["lr"])
    if "rank" in on:
        curve(on["rank"], epochs, ranks, BLACK, drawstyle="steps-mid")
        on["rank"].set_ylabel("effective\nrank")
        on["rank"].yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _step_axis(axes[0], history[-1])
    if "kept" in on:
        _kept_panel(on["kept"], history)
    _epoch_axis(axes[-1], epochs)
    for ax in axes:
        if ax.lines or ax.collections:
            ax.axvline(best_epoch, color=GREY, lw=1, ls=":", zorder=1)
    save(figure, path, "Validation error over epochs", footer, ends)


def _is_a_choice(history: list[dict]) -> bool:
    """Say whether an allocator keeps other components than the first ones (direct factors)."""
    masks = [record.get("kept_components") or [] for record in history]
    return any(kept != list(range(len(kept))) for kept in masks)


def _step_axis(ax: Axes, last: dict) -> None:
    """Mark optimiser steps above a panel: a rank allocator's flags count them."""
    if "step" in last:
        per_epoch = last["step"] / last["epoch"]
        steps = (lambda epoch: epoch * per_epoch, lambda step: step / per_epoch)
        ax.secondary_xaxis("top", functions=steps).set_xlabel("optimiser step")


def _kept_panel(ax: Axes, history: list[dict]) -> None:
    """Draw the components that the allocator's mask keeps at the end of each epoch."""
    for record in history:
        kept = record.get("kept_components") or []
        ax.eventplot(kept, orientation="vertical", lineoffsets=record["epoch"], colors=[BLACK])
    ax.set_ylabel("components\nthat are kept")


def _mse_panel(ax: Axes, epochs: list[int], history: list[dict]) -> list[tuple[float, str, str]]:
    """Draw training and validation mse and their optima; return the labels of their ends."""
    columns = {key: column(history, key) for key in CURVES}
    for key, (_, colour, dashes) in CURVES.items():
        curve(ax, epochs, columns[key], colour, ls=dashes)
    ax.set_ylabel("mean squared error\nper entry of X")
    log_scale(ax)
    ranks, floor = column(history, "effective_rank"), columns["val_optimum_mse"]
    if np.ptp(ranks):
        ax.axhline(floor[-1], color=SVD, lw=1, ls=":", zorder=1)
        note(ax, 0.01, 0.9, f"dotted: validation floor at rank {ranks[-1]:.0f}", SVD, va="top")
    return [(columns[key][-1], label, colour) for key, (label, colour, _) in CURVES.items()]


def _excess_panel(
    ax: Axes,
    epochs: list[int],
    excess: np.ndarray,
    ranks: np.ndarray,
    best: int,
    untrained: bool,
    mark: str,
) -> None:
    """Draw the excess over epochs; the untrained start is an open circle, the best a full one.

    Epochs of another rank than the last one's are grey. mark: the words before the best's value.
    """
    ax.set_ylabel("validation error\nabove the optimum (%)")
    if np.isnan(excess).all():
        note_undefined(ax)
        return
    final = ranks == ranks[-1]
    drawn = np.maximum(excess, ROUNDING_PCT)  # less is rounding; NaN stays
    if not final.all():
        curve(ax, epochs, drawn, GREY)
        note(ax, 0.01, 0.93, "grey: at higher ranks, whose optimum is another", GREY, va="top")
    curve(ax, epochs, np.where(final, drawn, np.nan), NETWORK)
    ax.margins(y=0.25)
    if np.nanmax(drawn) > 20 * np.nanmin(drawn):
        log_scale(ax)
    elif np.nanmax(excess) <= ON_THE_OPTIMUM:  # how near it is shows against the optimum itself
        ax.set_ylim(-0.12 * np.nanmax(excess), 1.35 * max(np.nanmax(excess), ROUNDING_PCT))
        ax.axhline(0, color=SVD, lw=1.8)
        words = "0: the SVD, which no matrix of this rank is better than"
        note(ax, 0.99, 0.1, words, SVD, ha="right")
    paper = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1}  # readable on a curve
    style = {"textcoords": "offset points", "color": NETWORK, "bbox": paper}
    if untrained and best > 0 and final[0]:
        ax.plot(epochs[0], excess[0], "o", ms=9, mfc="white", mec=NETWORK, mew=1.8)
        ax.annotate(f"untrained {percent(excess[0])}", (epochs[0], excess[0]), (10, 8), **style)
    ax.plot(epochs[best], drawn[best], "o", ms=8, color=NETWORK)
    side = "right" if 2 * epochs[best] > epochs[0] + epochs[-1] else "left"
    words, at = f"{mark} {percent(excess[best])}", (epochs[best], drawn[best])
    ax.annotate(words, at, (0, -10), ha=side, va="top", **style)


@rc_context(STYLE)
def loss_terms(path: str | Path, history: list[dict], footer: str) -> None:
    """Draw the weighted terms of the training loss, what each of them is, and shifts if there are
    any; of a run with a head its term comes first."""
    history = [record for record in history if "train_loss" in record]
    epochs = [record["epoch"] for record in history]
    shifts = as_array([record["shifts"] for record in history])  # [epochs, K]
    task = column(history, "loss_task")  # a logarithm, mostly negative
    terms = {key: column(history, key) for key in TERMS}
    # 1 is its floor, but where images are so nearly of the rank that they count less
    floor = float(terms["loss_reconstruction"].min() > 1)
    terms["loss_reconstruction"] = terms["loss_reconstruction"] - floor
    terms = {key: values for key, values in terms.items() if np.any(values > 0)}
    panels = {"task": 2.4} if not np.isnan(task).all() else {}
    panels |= {"terms": 3.6, "words": 0.28 * len(terms)} | ({"shifts": 1.9} if shifts.size else {})
    figure = new_figure(10, 1.8 + sum(panels.values()))
    axes = figure.subplots(len(panels), 1, height_ratios=list(panels.values()), squeeze=False)
    on = dict(zip(panels, axes[:, 0], strict=True))
    ends: dict[Axes, list] = {on["terms"]: []}
    on["words"].set_axis_off()
    for place, (key, values) in enumerate(terms.items()):
        label, colour, words = TERMS[key]
        label += " − 1" * int(floor) if key == "loss_reconstruction" else ""
        curve(on["terms"], epochs, np.where(values > 0, values, np.nan), colour)
        ends[on["terms"]].append((values[-1], label, colour))
        y = 1 - (place + 0.5) / len(terms)
        note(on["words"], 0, y, f"{label}: {words}", colour, va="center")
    on["terms"].set_ylabel("weighted term of the loss,\nmean over training images")
    log_scale(on["terms"])
    if "task" in on:
        curve(on["task"], epochs, task, BLACK)
        on["task"].set_ylabel("task term: λ_task · mean of\nlog(task error), in training")
    if shifts.size:
        curve(on["shifts"], epochs, shifts, BLACK)
        on["shifts"].set_ylabel("shift of a step, share\nof the least Ritz value")
        on["shifts"].set_ylim(0, 1)
        ends[on["shifts"]] = [(s, f"step {k}", BLACK) for k, s in enumerate(shifts[-1], 1)]
    for name in set(on) - {"words"}:
        _epoch_axis(on[name], epochs)
    save(figure, path, "Terms of the training loss", footer, ends)
