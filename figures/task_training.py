"""Training for a task as one curve: where training has something to win."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from figures.style import (
    BLACK,
    METHODS,
    NETWORK,
    STYLE,
    column,
    curve,
    log_scale,
    new_figure,
    rows_of_axes,
    save,
)


@rc_context(STYLE)
def task_curve(
    path: str | Path,
    history: list[dict],
    best_epoch: int,
    references: dict[str, float],
    footer: str,
) -> None:
    """Draw the validation task error over epochs; references without training are lines.

    history: the entries of history.json, the first of the untrained model; references: method
    ("svd", "svd_in_metric") → the same mean of its task error; best_epoch: that of best_model.pt.
    The learning rate has a panel where it changes.
    """
    epochs = [record["epoch"] for record in history]
    error, rates = column(history, "val_task_error"), column(history[1:], "lr")
    best = epochs.index(best_epoch)
    changes = len(set(rates)) > 1
    figure = new_figure(10, 5.8 + 1.2 * changes)
    heights = [4, 1] if changes else [1]
    top, *below = rows_of_axes(figure, heights)
    ends = []
    for name, value in references.items():
        label, colour = METHODS[name]
        top.axhline(value, color=colour, ls="--", lw=1.8)
        ends.append((value, f"{label} {value:.4f}", colour))
    curve(top, epochs, error, NETWORK)
    ends.append((error[-1], "network", NETWORK))
    top.plot(epochs[best], error[best], "o", ms=9, color=NETWORK)
    style = {"textcoords": "offset points", "ha": "center", "color": NETWORK}
    top.annotate(f"best: {error[best]:.4f}", (epochs[best], error[best]), (0, 12), **style)
    top.set_ylabel("validation task error\n(geometric mean over ranks 4 to 32)")
    top.margins(x=0.06, y=0.2)
    log_scale(top)
    for ax in below:
        curve(ax, epochs[1:], rates, BLACK, drawstyle="steps-mid")
        ax.set_ylabel("learning\nrate")
        log_scale(ax)
    last = below[-1] if below else top
    last.set_xlabel("epoch (0: untrained)")
    last.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    save(figure, path, "Validation task error over epochs", footer, {top: ends})
