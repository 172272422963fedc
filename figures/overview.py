"""Figure of all runs: every architecture over the rank, beside the SVD and an untrained sketch.

Arguments are lists and dicts: no model, no cache. Raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from figures.style import (
    BLACK,
    METHODS,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    column,
    curve,
    log_scale,
    new_figure,
    note,
    percent,
    rank_axis,
    rows_of_axes,
    save,
)

COLOURS = (METHODS["network"][1], "#332288", "#117744", "#882255")  # of the architectures, in order


@rc_context(STYLE)
def overview(path: str | Path, rows: list[dict], footer: str) -> None:
    """Excess over the rank, a curve an architecture; below, task error against the SVD's of those
    that were trained for a head. Ranks that differ are each at their own place.

    rows: of each architecture {"arch", "factors", "effective_rank", "rank" (that all were compared
    at), "excess_mean" (there, per cent, or None where undefined), "ranks": rank → {"excess_mean",
    "random_sketch_mean", "task_gain_pct"}, the latter two None where there is none}.
    """
    gains = ([e["task_gain_pct"] for e in row["ranks"].values()] for row in rows)
    tasks = [row for row, own in zip(rows, gains, strict=True) if any(g is not None for g in own)]
    heights = [4.2] + [3.4] * bool(tasks)
    figure = new_figure(10, 1.9 + sum(heights))
    top, *below = rows_of_axes(figure, heights)
    ends: dict[Axes, list] = {ax: [] for ax in (top, *below)}
    for row, colour in zip(rows, COLOURS, strict=False):
        x, excess = _over_ranks(row, "excess_mean")
        curve(top, x, np.maximum(excess, ROUNDING_PCT), colour)
        if len(excess):
            ends[top].append((max(excess[-1], ROUNDING_PCT), row["arch"], colour))
        if row in tasks:
            x, gain = _over_ranks(row, "task_gain_pct")
            curve(below[0], x, -gain, colour)
            ends[below[0]].append((-gain[-1], row["arch"], colour))
    label, colour = METHODS["random_sketch"]
    x, excess = _over_ranks(max(rows, key=lambda row: len(row["ranks"])), "random_sketch_mean")
    if len(excess):
        curve(top, x, np.maximum(excess, ROUNDING_PCT), colour, ls="--")
        ends[top].append((max(excess[-1], ROUNDING_PCT), label, colour))
    top.set_ylabel(f"rel_error above the SVD's\n(%; {ROUNDING} and less is rounding)")
    top.set_title("Frobenius norm")
    log_scale(top)
    for ax in below:
        ax.axhline(0, color=SVD, lw=1.8)
        note(ax, 0.01, 0.93, "line: the SVD", SVD, va="top")
        ax.set_title("for the head that it was trained for")
        ax.set_ylabel("task error against\nthe SVD's (%)")
    ranks = {int(rank) for row in rows for rank in row["ranks"]}
    rank_axis(below[-1] if below else top, ranks)
    if not top.lines:
        note(top, 0.5, 0.5, "undefined: the optimum is below 1e-6", BLACK, ha="center")
    save(figure, path, _finding(rows), footer, ends)


def _over_ranks(row: dict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The ranks at which a value is known, and the values."""
    ranks = sorted(row["ranks"], key=int)
    values = column([row["ranks"][rank] for rank in ranks], key)
    known = ~np.isnan(values)
    return as_array([int(rank) for rank in ranks])[known], values[known]


def _finding(rows: list[dict]) -> str:
    """The excess of each architecture, at one rank where they have one in common."""
    means = [percent(mean) for mean in column(rows, "excess_mean")]
    ranks = [row["rank"] for row in rows]
    if len(set(ranks)) > 1:
        means = [f"{mean} (rank {rank})" for mean, rank in zip(means, ranks, strict=True)]
    gains = [row["ranks"].get(str(row["rank"]), {}).get("task_gain_pct") for row in rows]
    for i, gain in enumerate(gains):
        means[i] += "" if gain is None else f" (for its head {gain:.0f} % below)"
    found = ", ".join(f"{row['arch']} {mean}" for row, mean in zip(rows, means, strict=True))
    where = "" if len(set(ranks)) > 1 else f" at rank {ranks[0]}"
    return f"Mean error above the SVD's{where}: {found}"
