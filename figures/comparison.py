"""Figures of one model against the SVD and the other references, as compare_svd_nn.py draws them.

Arguments are arrays (numpy, or torch on any device), lists and dicts: no model, no cache. n images,
r rank, S = min(T, D). Every function raises OSError where it cannot write, and KeyError for a
method that has no colour in `style.METHODS`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from figures.style import (
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
    curve,
    in_order,
    log_scale,
    new_figure,
    note_undefined,
    percent,
    rank_axis,
    save,
)


@rc_context(STYLE)
def comparison(
    path: str | Path,
    per_image: dict[str, dict[str, ArrayLike]],
    rank: int,
    footer: str,
    task_error: dict[str, ArrayLike] | None = None,
) -> None:
    """Draw the excess of every method, a dot an image; below it the error of the head, if any.

    per_image: method → {"excess_pct": [n]}; task_error: method → [n], the plain SVD's among them.
    """
    excess = {name: as_array(per_image[name]["excess_pct"]) for name in in_order(per_image)}
    excess = {name: values[np.isfinite(values)] for name, values in excess.items()}
    heights = [1 + 0.75 * len(excess)] + ([0.75 * len(task_error)] if task_error else [])
    figure = new_figure(10, 1.7 + sum(heights))
    top, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _excess_strips(top, excess)
    top.set_title("Frobenius norm; a dot is a test image, spread in height")
    if task_error:
        _task_strips(below[0], {name: as_array(v) for name, v in task_error.items()})
    save(figure, path, f"Error against the SVD's, rank {rank}", footer)


def _excess_strips(ax: Axes, excess: dict[str, np.ndarray]) -> None:
    """Draw a row of dots per method over log excess; rounding lies at the left edge."""
    words = {n: f"mean {percent(v.mean())}" if v.size else "undefined" for n, v in excess.items()}
    _strips(ax, {name: np.maximum(values, ROUNDING_PCT) for name, values in excess.items()}, words)
    highest = max([v.max(initial=10 * ROUNDING_PCT) for v in excess.values()])
    ax.set_xlim(ROUNDING_PCT / 2, 2 * highest)
    ax.set_xlabel(f"rel_error above the optimum (%); {ROUNDING} and less is rounding")
    log_scale(ax, "x")


def _task_strips(ax: Axes, errors: dict[str, np.ndarray]) -> None:
    """Draw the task error of each image against the SVD's of the same image, in per cent."""
    svd = errors["svd"]
    others = [name for name in in_order(errors) if name != "svd"]
    kept = svd > 0
    change = {name: 100 * (errors[name][kept] / svd[kept] - 1) for name in others}
    mean = {name: 100 * (errors[name].mean() / max(svd.mean(), 1e-12) - 1) for name in others}
    _strips(ax, change, {name: f"mean {mean[name]:+.0f} %".replace("-", "−") for name in others})
    ax.axvline(0, color=SVD, lw=1.8)
    ax.set_xlabel("task error against the SVD's of the same image (%); line: the SVD")
    ax.set_title("head")


def _strips(ax: Axes, values: dict[str, np.ndarray], words: dict[str, str]) -> None:
    """Draw a row of dots per method, its name and `words` above them."""
    jitter = np.random.default_rng(0)  # the same in every run
    for y, name in enumerate(reversed(values)):
        label, colour = METHODS[name]
        height = y - 0.08 + jitter.uniform(-0.2, 0.2, len(values[name]))
        ax.plot(values[name], height, "o", color=colour, ms=4, alpha=0.5, mec="none")
        place = {"transform": ax.get_yaxis_transform()}
        ax.text(0.01, y + 0.22, f"{label}: {words[name]}", color=colour, **place)
    ax.set(ylim=(-0.5, len(values) - 0.4), yticks=[])
    ax.spines["left"].set_visible(False)


@rc_context(STYLE)
def both_norms(path: str | Path, ranks: dict[str, dict], task: dict, footer: str) -> None:
    """Draw the error over the rank: Frobenius norm above, the head's output below.

    ranks, task: of svd_nn_comparison.json, rank → method → "rel_error" → {"mean", "p90"}, and
    {"head", "output", "ranks": rank → method → {"mean", "interval_95", "gain_pct"}}.
    """
    figure = new_figure(10, 9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.array(sorted(int(r) for r in task["ranks"]))
    ends: dict[Axes, list] = {top: [], bottom: []}
    for name in in_order(task["ranks"][str(x[0])]):
        label, colour = METHODS[name]
        of_task = [task["ranks"][str(r)][name] for r in x]
        panels = [(bottom, of_task)]
        if name in ("svd", "network"):
            panels.append((top, [ranks[str(r)][name]["rel_error"] for r in x]))
        for ax, entries in panels:
            mean = column(entries, "mean")
            line = "--" if name == "svd_in_metric" else "-"  # on it the network's can be seen
            curve(ax, x, mean, colour, wide=name == "svd", ls=line)
            ends[ax].append((mean[-1], label, colour))
        low, high = as_array([e["interval_95"] or (None, None) for e in of_task]).T
        bottom.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    top.set_title("Frobenius norm")
    bottom.set_ylabel(f"task error: relative error\nof the {task['output']}")
    bottom.set_title(f"the head {task['head']}; bands: approximate 95 % intervals")
    for ax in (top, bottom):
        log_scale(ax)
    rank_axis(bottom, x)
    save(figure, path, "Error over the rank: Frobenius norm and head", footer, ends)


@rc_context(STYLE)
def rank_sweep(
    path: str | Path, ranks: dict[str, dict], num_tokens: int, feature_dim: int, footer: str
) -> None:
    """Draw error and excess over the rank: mean, and a band up to the 90th percentile.

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
            curve(ax, x, mean, colour, wide=name == "svd")
            ends[ax].append((mean[-1], label, colour))
    stored = (num_tokens + feature_dim) / (num_tokens * feature_dim)  # of A and B, per rank
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    bottom.set_ylabel(f"error above the optimum (%)\n{ROUNDING} and less is rounding")
    rank_axis(bottom, x)
    for ax in (top, bottom):
        log_scale(ax)
    if x[0] < 1 / stored < x[-1]:  # beyond it the factors take more room than X
        for ax in (top, bottom):
            ax.axvline(1 / stored, color=GREY, ls="--", lw=1)
        style = {"color": GREY, "rotation": 90, "ha": "right", "va": "center"}
        places = (1 / stored, 0.48), (-3, 0), ("data", "axes fraction"), "offset points"
        top.annotate(f"break-even rank {1 / stored:.0f}", *places, **style)
    above = top.secondary_xaxis("top")
    above.set_xticks(x, [f"{100 * r * stored:.3g} %" for r in x])
    above.set_xlabel("numbers stored in A and B, r (T + D), of the T·D in X")
    above.xaxis.set_minor_locator(NullLocator())
    excess = column([ranks[str(r)]["network"]["excess_pct"] for r in x], "mean")
    if np.isnan(excess).all():
        note_undefined(bottom)
    save(figure, path, "Error over the rank", footer, ends)


@rc_context(STYLE)
def rank_per_image(path: str | Path, data: dict, footer: str) -> None:
    """Draw the rank of each image, and the errors beside those of one fixed rank.

    data: "network" and "svd", each {"ranks": [n], "rel_error": [n], "fixed_rank": the one that
    stores as much, "fixed_rel_error": [n], "rank_for_all": the one that meets the target for every
    image, or None}, and "target_error".
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
    left.set(xlabel="rank of an image", ylabel="images")
    left.set_title("ranks per image: network (filled), SVD (outline)")
    left.set_ylim(top=1.25 * left.get_ylim()[1])  # room for the labels above the bars
    left.set_xlim(0, reach * 1.08)
    words = "that stores as much", "that meets the target for all"
    marks = tuple(zip((network["fixed_rank"], network["rank_for_all"]), words, strict=True))
    for (rank, text), height in zip(marks, (0.97, 0.9), strict=True):
        if rank is not None:
            side = ("right", -4) if rank > 0.54 * reach else ("left", 4)
            left.axvline(rank, color=BLACK, lw=1.2, ls="--")
            style = {"color": BLACK, "fontsize": 10.5, "ha": side[0], "va": "top"}
            style["bbox"] = {"fc": "white", "ec": "none", "pad": 1}
            places = (rank, height), (side[1], 0), ("data", "axes fraction"), "offset points"
            left.annotate(f"rank {rank}, the one {text}", *places, **style)
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
        pen = {"lw": 3.5, "alpha": 0.35} if wide else {"lw": 1.5}
        right.plot(place, error, style, color=METHODS[name][1], **pen)
        if not wide:
            ends.append((error[-1], label, NETWORK))
    right.set(xlim=(0, 100), ylim=(0, None), xlabel="images, sorted by their error (%)")
    right.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    right.set_title("error: network (thin) on the SVD (wide, pale)")
    right.axhline(target, color=GREY, lw=1)
    style = {"textcoords": "offset points", "color": GREY, "fontsize": 10.5}
    right.annotate(f"target {target:g}", (1, target), (0, 3), **style)
    save(figure, path, f"Least rank of each image for rel_error {target:g}", footer, {right: ends})
