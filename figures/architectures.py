"""Figure of all networks: every architecture and way of training over the rank, beside the SVD.

Arguments are lists and dicts: no model, no cache. Raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from figures.style import (
    GREY,
    METHODS,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    as_array,
    curve,
    log_scale,
    new_figure,
    note_undefined,
    rank_axis,
    rows_of_axes,
    save,
)

COLOURS = {"ResMLP": METHODS["network"][1], "MLP": "#332288", "AdaLoRA": "#117744"}
REFERENCES = {"random_sketch": "untrained sketch", "pca": METHODS["pca"][0]}


@rc_context(STYLE)
def architectures(path: str | Path, runs: dict[str, dict], footer: str) -> None:
    """Draw error and excess over the rank; below them the task error and what boxes are found.

    The last two are there where a head, or readers with labels, judged.

    runs: name → svd_nn_comparison.json. A network with direct factors is dotted, one that was
    trained for a head dashed. Untrained sketch and PCA are of the first run that has them, the
    closed form of the one with the most ranks: they do not depend on the network but for the
    sketch's number of columns.
    """
    tasks = {name: run["task"] for name, run in runs.items() if run["task"]}
    boxes = {name: run["readers"] for name, run in runs.items() if _finds_boxes(run)}
    heights = [3.0] * (2 + bool(tasks) + bool(boxes))
    figure = new_figure(10, 1.2 + sum(heights))
    error, excess, *judged = axes = rows_of_axes(figure, heights)
    ends: dict[Axes, list] = {ax: [] for ax in axes}
    styles = {
        name: {"ls": ":" if run["factors"] == "direct" else "--" if run["trained_for"] else "-"}
        for name, run in runs.items()
    }

    def draw(ax: Axes, ranks: dict[str, float | None], label: str, colour: str, **style) -> None:
        known = {int(rank): value for rank, value in ranks.items() if value is not None}
        x = sorted(known)
        if x:
            curve(ax, x, [known[r] for r in x], colour, **style)
            ends[ax].append((known[x[-1]], label, colour))

    def means(run: dict, method: str, metric: str) -> dict[str, float | None]:
        return {r: m.get(method, {}).get(metric, {}).get("mean") for r, m in run["ranks"].items()}

    longest = max(runs.values(), key=lambda run: len(run["ranks"]))
    label, colour = METHODS["svd"]
    draw(error, means(longest, "svd", "rel_error"), label, colour, wide=True)
    for name, label in REFERENCES.items():
        colour = METHODS[name][1]
        having = next(
            (run for run in runs.values() if name in next(iter(run["ranks"].values()))), {}
        )
        if having:
            if name == "pca":
                draw(error, means(having, name, "rel_error"), label, colour, ls="--")
            draw(
                excess,
                _at_least_rounding(means(having, name, "excess_pct")),
                label,
                colour,
                ls="--",
            )
    for name, run in runs.items():
        colour, style = COLOURS[run["arch"]], styles[name]
        draw(error, means(run, "network", "rel_error"), name, colour, **style)
        draw(excess, _at_least_rounding(means(run, "network", "excess_pct")), name, colour, **style)
    if tasks:
        ax = judged[0]
        first = next(iter(tasks.values()))
        closed = max(tasks.values(), key=lambda task: len(_of_method(task, "svd_in_metric")))
        for method, task, style in (
            ("svd", first, {"wide": True}),
            ("svd_in_metric", closed, {"ls": "-."}),
        ):
            label, colour = METHODS[method]
            draw(ax, _of_method(task, method), label, colour, **style)
        for name, of_head in tasks.items():
            colour = COLOURS[runs[name]["arch"]]
            draw(ax, _of_method(of_head, "network"), name, colour, **styles[name])
        ax.set_ylabel(f"task error of the\nhead {first['head']}")
        log_scale(ax)
    if boxes:
        ax = judged[-1]
        first = next(iter(boxes.values()))
        label, colour = METHODS["svd"]
        draw(ax, _of_method(first, "svd", "box_precision"), label, colour, wide=True)
        for name, readers in boxes.items():
            colour = COLOURS[runs[name]["arch"]]
            draw(ax, _of_method(readers, "network", "box_precision"), name, colour, **styles[name])
        ax.axhline(first["full"]["box_precision"]["mean"], color=GREY, ls=":")
        ax.set_ylabel("box precision of a linear\nprobe (dotted: full tokens)")
    error.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    excess.set_ylabel(f"rel_error above the SVD's\n(%; {ROUNDING} and less is rounding)")
    for ax in (error, excess):
        log_scale(ax)
    if not excess.lines:
        note_undefined(excess)
    rank_axis(axes[-1], {int(rank) for run in runs.values() for rank in run["ranks"]})
    save(figure, path, "Networks and the SVD over the rank", footer, ends)


def _at_least_rounding(values: dict[str, float | None]) -> dict[str, float | None]:
    """Lift what is rounding, of either sign, to the lower edge of a logarithmic axis."""
    return {r: None if v is None else float(np.fmax(v, ROUNDING_PCT)) for r, v in values.items()}


def _finds_boxes(run: dict) -> bool:
    """Say whether readers judged this network by boxes."""
    return "box_precision" in run["readers"]["full"]


def _of_method(judged: dict, method: str, measure: str | None = None) -> dict[str, float]:
    """Return rank → mean of a method, of its `measure` where there are several."""
    found = {r: of[method] for r, of in judged["ranks"].items() if method in of}
    found = {r: of[measure] if measure else of for r, of in found.items()}
    return {r: as_array(of["mean"]).item() for r, of in found.items()}
