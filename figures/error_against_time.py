"""Error above the optimum against time: the benchmark with its Pareto front, the ablation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from figures.style import (
    GREY,
    METHODS,
    ROUNDING,
    ROUNDING_PCT,
    SAME_METHOD,
    STYLE,
    as_array,
    log_scale,
    new_figure,
    percent,
    save,
)

# of the ablation: label and colour of each sketch
SKETCHES = {
    "random": ("random: X Ω", "#7F5FA9"),
    "columns": ("random: X$_s$ X$_s^T$ Ω, 256 even features", METHODS["random_sketch"][1]),
    "linear": ("trained linear, 256 chosen features", "#222222"),
    "ResMLP": ("trained ResMLP", METHODS["network"][1]),
    "MLP": ("trained MLP", "#999933"),
}
# where a label may stand, points from its dot: (right, up, horizontal alignment)
PLACES = [(9, 0, "left"), (-9, 0, "right"), (0, 16, "center"), (0, -16, "center")] + [
    (side * 12, up * 16, "left" if side > 0 else "right")
    for up in (1, -1, 2, -2, 3, -3, 4, -4)
    for side in (1, -1)
]
SHARE = {"left": 0, "center": 0.5, "right": 1}  # of a label's width left of where it is placed


@rc_context(STYLE)
def pareto(path: str | Path, records: list[dict], footer: str) -> None:
    """Mean excess over ms per matrix, one panel for each device and batch, at the largest rank.

    records: of benchmark.json, all with "ms_median". The rank is the largest that a network
    reaches, where there is one. An excess that is rounding or undefined sits at the lower edge.
    """
    networks = [record for record in records if record["method"] == "network"]
    rank = max(record["rank"] for record in networks or records)
    panels: dict[tuple, list[dict]] = {}
    for record in records:
        if record["rank"] == rank:
            panels.setdefault((record["device"], record["batch"]), []).append(record)
    figure = new_figure(max(11, 8 * len(panels)), 7)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, ((device, batch), found) in zip(axes, panels.items(), strict=True):
        _points(ax, found)
        threads = found[0]["threads"]
        ax.set_title(f"{device}, batch {batch}, {threads} CPU thread{'s' * (threads > 1)}")
        ax.set_xlabel("ms per matrix, median; bar: interquartile range")
    axes[0].set_ylabel("error above the optimum (%), mean")
    heights = np.concatenate([_excess(found) for found in panels.values()])
    top = 8 * max(heights.max(), 10 * ROUNDING_PCT)
    axes[0].set_ylim(ROUNDING_PCT / 8, top)
    log_scale(axes[0])
    figure.get_layout_engine().execute(figure)  # labels are placed in pixels
    for ax, found in zip(axes, panels.values(), strict=True):
        _labels(ax, found)
    save(figure, path, _finding(rank, list(panels.values())), footer)


def front(records: list[dict]) -> list[int]:
    """Indices, by time, of those that no other record beats in time and error both.

    Errors below rounding are equal: of those, the fastest is on the front. Undefined ones are not.
    """
    excess = _excess(records)
    defined = [i for i, record in enumerate(records) if record["excess_mean"] is not None]
    order = sorted(defined, key=lambda i: (records[i]["ms_median"], excess[i]))
    kept: list[int] = []
    for i in order:
        if not kept or excess[i] < excess[kept[-1]]:
            kept.append(i)
    return kept


def _front_corners(records: list[dict]) -> np.ndarray:
    """The front as steps, [·, 2] of (ms, excess), to 6 times the slowest method; may be empty."""
    on = front(records)
    times, excess = as_array([r["ms_median"] for r in records]), _excess(records)
    right = np.append(times[on], 6 * times.max())[1:]  # a step ends where the next begins
    return np.column_stack([np.column_stack([times[on], right]).ravel(), np.repeat(excess[on], 2)])


def _excess(records: list[dict]) -> np.ndarray:
    """Mean excess, at least that of rounding; undefined ones are there too."""
    values = as_array([record["excess_mean"] for record in records])
    return np.fmax(values, ROUNDING_PCT)  # fmax ignores NaN


def _style(record: dict) -> tuple[str, str]:
    return METHODS[SAME_METHOD.get(record["method"], record["method"])]


def _label(record: dict) -> str:
    label = f"network {record['arch']}" if record["method"] == "network" else _style(record)[0]
    if record["K"] is not None:
        label += f" (K = {record['K']}, p = {record['p']})"
    return label + (", undefined" if record["excess_mean"] is None else "")


def _points(ax: Axes, records: list[dict]) -> None:
    """Dots with their spread, and the front as the steps that can be reached."""
    excess = _excess(records)
    for record, y in zip(records, excess, strict=True):
        colour = _style(record)[1]
        half = record["ms_iqr"] / 2
        low = max(record["ms_median"] - half, record["ms_median"] / 10)  # a log axis
        ax.hlines(y, low, record["ms_median"] + half, color=colour, lw=2)
        ax.plot(record["ms_median"], y, "o", color=colour, ms=8, zorder=3)
    times = as_array([record["ms_median"] for record in records])
    corners = _front_corners(records)
    ax.plot(*corners.T, color=GREY, lw=1.2, zorder=1)
    ax.set_xlim(times.min() / 3, 6 * times.max())
    log_scale(ax, "x")
    ax.axhline(ROUNDING_PCT, color=GREY, lw=0.8, ls=":")
    style = {"color": GREY, "fontsize": 9.5, "transform": ax.get_yaxis_transform()}
    words = f"{ROUNDING} % and less is rounding, or undefined"
    ax.text(0.01, ROUNDING_PCT / 1.3, words, va="top", **style)
    if len(corners):
        ax.text(0.99, corners[-1, 1] * 1.2, "Pareto front", ha="right", **style)


def _labels(ax: Axes, records: list[dict]) -> None:
    """Each label at the first of PLACES where it hides neither a dot nor another label."""
    times, excess = as_array([r["ms_median"] for r in records]), _excess(records)
    dots = ax.transData.transform(np.column_stack([times, excess]))
    point = ax.figure.dpi / 72  # pixels
    taken = [Bbox.from_extents(*(dot - 6 * point), *(dot + 6 * point)) for dot in dots]
    taken += [text.get_window_extent() for text in ax.texts]
    corners = ax.transData.transform(_front_corners(records))
    taken += [Bbox([a, b]).padded(point) for a, b in zip(corners, corners[1:], strict=False)]
    inside = ax.get_window_extent()
    rounding = ax.transData.transform((1, ROUNDING_PCT))[1]
    taken.append(Bbox.from_extents(inside.x0, rounding - 1, inside.x1, rounding + 1))
    for i in np.argsort(times):
        words = ax.text(0, 0, _label(records[i]), fontsize=10.5)
        width, height = words.get_window_extent().size
        words.remove()
        boxes = []
        for right, up, side in PLACES:
            x, y = dots[i] + np.array([right, up]) * point
            left = x - SHARE[side] * width
            boxes.append(Bbox.from_bounds(left, y - height / 2, width, height))
        hidden = [
            box.count_overlaps(taken[:i] + taken[i + 1 :])
            + 9 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1))
            for box in boxes
        ]
        best = int(np.argmin(hidden))  # the first of the best
        right, up, side = PLACES[best]
        colour = _style(records[i])[1]
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4}
        arrow["relpos"] = (SHARE[side], 0.5 - np.sign(up) / 2)
        style = {"ha": side, "va": "center", "color": colour, "fontsize": 10.5}
        style |= {"textcoords": "offset points", "arrowprops": arrow if up else None}
        ax.annotate(_label(records[i]), (times[i], excess[i]), (right, up), **style)
        taken.append(boxes[best])


def _finding(rank: int, panels: list[list[dict]]) -> str:
    """What the first panel says of the networks; without one, of the fastest best method."""
    records = panels[0]
    excess = _excess(records)
    on = front(records)
    if not on:
        return (
            f"At rank {rank} the optimum is below 1e-6 and the excess undefined: only times count"
        )
    networks = [i for i, record in enumerate(records) if record["method"] == "network"]
    if not networks:
        best = on[-1]
        method, ms = _style(records[best])[0], records[best]["ms_median"]
        return f"At rank {rank} {method} comes nearest to the SVD in the least time, {ms:.3g} ms"
    at = min(networks, key=lambda i: (i not in on, records[i]["ms_median"]))
    claim = f"At rank {rank} the network {records[at]['arch']} takes "
    claim += f"{records[at]['ms_median']:.3g} ms, {percent(excess[at])} above the optimum: "
    if at in on:
        return claim + "nothing here is faster and nearer"
    better = next(i for i in on if excess[i] <= excess[at])
    near = "nearer" if excess[better] < excess[at] else "as near"
    return claim + f"{_style(records[better])[0]} is faster and {near}"


@rc_context(STYLE)
def ablation(
    path: str | Path,
    records: list[dict],
    gains: list[dict],
    exact_ms: float,
    rank: int,
    footer: str,
) -> None:
    """Excess over ms of each sketch, a curve over K, one panel for each number of extra columns.

    records: of ablate.summarise_runs; gains: of ablate.gains_at_equal_time, best first.
    """
    panels = sorted({record["oversample"] for record in records})
    figure = new_figure(max(10.5, 5.4 * len(panels)), 5.6)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, extra in zip(axes, panels, strict=True):
        here = [record for record in records if record["oversample"] == extra]
        for sketch, (_, colour) in SKETCHES.items():
            for shifts, line in (("start", ":"), ("learned", "-")):
                # without steps there are no shifts: K = 0 begins both curves
                found = (r for r in here if r["shifts"] == shifts or r["steps"] == 0)
                curve = [r for r in found if r["sketch"] == sketch]
                curve.sort(key=lambda r: r["steps"])
                if not curve:
                    continue
                exact = [r["excess_mean"] <= ROUNDING_PCT for r in curve]
                curve = curve[: exact.index(True) + 1] if True in exact else curve
                ms = as_array([r["ms"] for r in curve])
                ends = [r["excess_interval"] or [r["excess_mean"]] * 2 for r in curve]
                low, high = np.fmax(as_array(ends).T, ROUNDING_PCT)
                mean = np.fmax(as_array([r["excess_mean"] for r in curve]), ROUNDING_PCT)
                ax.plot(ms, mean, line, marker="o", ms=4, color=colour)
                ax.vlines(ms, low, high, color=colour, lw=0.8)
                if sketch == "linear" and shifts == "learned":
                    for r, x, y in zip(curve, ms, mean, strict=True):
                        style = {"textcoords": "offset points", "ha": "right", "va": "top"}
                        ax.annotate(f"K = {r['steps']}", (x, y), (-6, -4), color=colour, **style)
        ax.axvline(exact_ms, color=GREY, lw=0.9, ls="--")
        style = {"color": GREY, "fontsize": 9.5, "rotation": 90, "ha": "right", "va": "center"}
        style["transform"] = ax.get_xaxis_transform()
        ax.text(exact_ms, 0.5, "exact: float64 Gram ", **style)
        ax.set_title(f"{extra} extra columns")
        ax.set_xlabel("ms per matrix, median")
    axes[0].set_ylabel("error above the optimum (%), mean")
    log_scale(axes[0])
    # a name over the beginning of its curve, the leftmost the highest: no leader crosses a name
    low, high = np.log10(axes[0].get_ylim())
    axes[0].set_ylim(top=10 ** (high + 0.4 * (high - low)))
    first = [r for r in records if r["oversample"] == panels[0] and r["steps"] == 0]
    begin = {r["sketch"]: (r["ms"], max(r["excess_mean"], ROUNDING_PCT)) for r in first}
    for i, sketch in enumerate(sorted(begin, key=lambda name: begin[name][0])):
        label, colour = SKETCHES[sketch]
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4, "relpos": (0, 0)}
        place = (begin[sketch][0], 0.94 - 0.065 * i), "data", ("data", "axes fraction")
        style = {"color": colour, "fontsize": 10.5, "arrowprops": leader}
        axes[0].annotate(label, begin[sketch], *place, **style)
    footer += "; K refinement steps, from left to right; dotted: shifts as at the start; bars: "
    footer += f"approximate 95 % intervals over groups; {ROUNDING} % and less is rounding"
    title = f"Rank {rank}: at equal time no trained sketch comes nearer than an untrained one"
    low = (gains[0]["gain_interval"] or [gains[0]["gain_pct"]])[0] if gains else 0
    if low > 0:
        best = gains[0]
        title = f"Rank {rank}: at equal time training saves {best['gain_pct']:.0f} % of the excess "
        title += f"({best['sketch']}, K = {best['steps']}, p = {best['oversample']}; "
        title += "picked on validation images)"
    axes[0].margins(x=0.14)
    save(figure, path, title, footer)
