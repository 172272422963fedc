"""Figure of a task: what its head makes of compressed tokens, against stored bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from figures.style import (
    GREY,
    METHODS,
    STYLE,
    SVD,
    as_array,
    column,
    in_order,
    log_scale,
    new_figure,
    note,
    save,
)


@rc_context(STYLE)
def task_sweep(path: str | Path, results: dict, output: str, footer: str) -> None:
    """Task error over bytes above, and below what it is below the plain SVD's.

    results: of task_sweep.json; output: what the error is of, in words.
    """
    figure = new_figure(10.5, 11)
    left, middle = figure.subplots(2, 1)
    methods = results["methods"]
    # the plain network lies on the SVD, the network in the metric on the SVD in the metric
    drawn = [name for name in in_order(methods) if not name.startswith("network_in")]
    ends: dict[Axes, list] = {left: [], middle: []}
    for name in drawn:
        entries = sorted(methods[name].values(), key=lambda entry: entry["bytes"])
        label, colour = METHODS[name]
        size = column(entries, "bytes") / 1e3
        error = column([entry["task_error"] for entry in entries], "mean")
        band = _band([entry["task_error"] for entry in entries])
        style = {"lw": 4.5, "alpha": 0.45} if name == "svd" else {"lw": 1.8}
        style["ls"] = "--" if name.endswith("_refined") else "-"
        left.plot(size, error, marker="o", color=colour, ms=4, **style)
        left.fill_between(size, *band.T, color=colour, alpha=0.1, lw=0)
        ends[left].append((error[-1], label, colour))
        if "gain_pct" in entries[0] and name != "token_dropping":
            gains = [entry["gain_pct"] for entry in entries]
            gain, span = column(gains, "mean"), _band(gains)
            middle.plot(size, gain, marker="o", color=colour, ms=4, lw=1.8, ls=style["ls"])
            middle.fill_between(size, *span.T, color=colour, alpha=0.13, lw=0)
            ends[middle].append((gain[-1], label, colour))
    _bytes_axes(left, middle, methods["svd"])
    left.set_ylabel(f"task error: relative error of the {output}")
    log_scale(left)
    middle.axhline(0, color=SVD, lw=4.5, alpha=0.45)
    middle.set_ylim(bottom=min(-6, middle.get_ylim()[0]))
    note(middle, 0.02, 0.01, "0: the plain SVD at the same rank", SVD)
    middle.set_ylabel("task error below the plain SVD's (%)")
    left.set_title("error of the head's output")
    middle.set_title("gain at the same rank and bytes")
    steps = results["head_steps"]
    if steps:
        footer += f"; {steps} head steps: its gradient steps on the factors of each image"
    footer += "; bands: approximate 95 % intervals over photographs"
    save(figure, path, _finding(methods), footer, ends)


@rc_context(STYLE)
def task_calibration(path: str | Path, found: dict, footer: str) -> None:
    """How well the task error is predicted without the head. found: rank_per_image of the JSON."""
    figure = new_figure(8, 7)
    _calibration(figure.subplots(), found)
    share = found["confidence"]
    title = (
        "The task error of the SVD in the metric, predicted without running the head: calibrated "
    )
    save(figure, path, title + f"to hold for {100 * share:.0f} % of validation images", footer)


def _band(entries: list[dict]) -> np.ndarray:
    """Ends of the intervals [n, 2]; NaN, which draws nothing, where there is none."""
    return as_array([entry["interval_95"] or (None, None) for entry in entries])


def _bytes_axes(left: Axes, middle: Axes, svd: dict[str, dict]) -> None:
    for ax in (left, middle):
        ax.set_xlabel("stored kB an image, bf16 (log scale)")
        log_scale(ax, "x")
        above = ax.secondary_xaxis("top")
        above.set_xticks([svd[r]["bytes"] / 1e3 for r in svd], list(svd))
        above.xaxis.set_minor_locator(NullLocator())
        above.set_xlabel("rank r")


def _calibration(ax: Axes, found: dict) -> None:
    """Measured over predicted task error, one dot an image and rank; the diagonal is perfect."""
    predicted, measured = (as_array(found["calibration"][n]) for n in ("predicted", "measured"))
    colour = METHODS["svd_in_metric"][1]
    ax.plot(predicted.ravel(), measured.ravel(), ".", color=colour, ms=4, alpha=0.5)
    reach = [min(predicted.min(), measured.min()) / 1.3, max(predicted.max(), measured.max()) * 1.3]
    reach[0] = max(reach[0], 1e-6)
    ax.plot(reach, reach, color=GREY, lw=1)
    ax.set(xlim=reach, ylim=reach, ylabel="measured task error")
    ax.set_xlabel("predicted bound, without the head")
    for which in "xy":
        log_scale(ax, which)
    ratio = measured / np.maximum(predicted, 1e-12)
    low, high = np.percentile(ratio, [10, 90])
    wanted = f"{100 * found['confidence']:.0f} % of validation images and ranks"
    within = f"line: calibrated to hold for\n{wanted};\n"
    within += f"here {100 * (ratio <= 1).mean():.0f} % are below it"
    spread = f"measured / predicted:\n{low:.2f} to {high:.2f} in 80 %"
    note(ax, 0.04, 0.97, f"{within}\n{spread}", va="top")


def _finding(methods: dict) -> str:
    """The gains of the closed form, of the best method, and of the head steps alone."""

    def span(name: str) -> str:
        gains = [entry["gain_pct"]["mean"] for entry in methods[name].values()]
        gains = [gain for gain in gains if gain is not None]
        return f"{min(gains):.0f} to {max(gains):.0f} %" if gains else "as much"

    title = f"The SVD in the task's metric has {span('svd_in_metric')} less task error than the SVD"
    names = "network_task_refined", "svd_in_metric_refined", "network_task"
    best = [name for name in names if name in methods]
    if best:
        title += f"; {METHODS[best[0]][0]}: {span(best[0])}"
    if "svd_refined" in methods:
        title += f"; the same head steps on the plain SVD: {span('svd_refined')}"
    return title
