"""The rank that photographs need, and the bytes a pixel of that, against their number of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from figures.style import BLACK, GREY, METHODS, STYLE, curve, log_scale, new_figure, note, save

COLOUR = METHODS["svd"][1]


@rc_context(STYLE)
def rank_against_tokens(path: str | Path, found: dict) -> None:
    """Left the least rank within the target error, right bytes a pixel, over T, logarithmic.

    found: of rank_against_tokens.json. A thin line is a photograph, the thick one their geometric
    mean at sizes that most of them have. Slopes T and √T start where the mean does.
    """
    records, means = found["records"], [m for m in found["means"] if m["common"]]
    figure = new_figure(9.2, 4.9)
    left, right = figure.subplots(1, 2)
    for ax, key in ((left, "rank"), (right, "factors")):
        for name in dict.fromkeys(r["photograph"] for r in records):
            of = sorted((r["tokens"], r[key]) for r in records if r["photograph"] == name)
            ax.plot(*np.transpose(of), color=GREY, lw=0.7, alpha=0.45)
        curve(ax, [m["tokens"] for m in means], [m[key] for m in means], COLOUR)
    first = means[0] if means else records[0]
    end = np.array([first["tokens"], max(r["tokens"] for r in records)])
    for power, label in ((1, "T"), (0.5, "√T")):
        _reference(left, end, first["rank"] * (end / end[0]) ** power, f"as {label}")
    whole = records[0]["whole"]  # of every T
    _reference(right, end, np.array([whole, whole]), "all tokens, bf16")
    note(right, 0.04, 0.05, "factors A and B of that rank, bf16", COLOUR)
    note(left, 0.04, 0.05, "thick: mean of the same photographs", COLOUR)
    left.set_title(f"rank for rel_error {found['target_error']:g}")
    right.set_title("bytes a pixel")
    for ax in (left, right):
        log_scale(ax, "x")
        log_scale(ax)
        ax.set_xlabel("tokens T of a photograph, scaled down")
    growth = found["growth"].get("all")
    title = "The rank that a photograph needs against its tokens"
    if growth:
        title = f"The rank that a photograph needs grows as T^{growth['b']:.2f}, T its tokens"
    count = len({r["photograph"] for r in records})
    footer = (
        f"{count} photographs of training and validation scenes in their own aspect, thin; "
        f"geometric mean of those that have all its sizes, thick; demo encoder, "
        f"D = {found['feature_dim']}; exact singular values of the normalised tokens"
    )
    save(figure, path, title, footer)


def _reference(ax: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    ax.plot(x, y, color=BLACK, ls="--", lw=1.2)
    ax.annotate(label, (x[-1], y[-1]), (-4, 5), textcoords="offset points", ha="right", color=BLACK)
