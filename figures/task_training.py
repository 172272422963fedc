"""Training for a task as one curve: where training has something to win."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from figures.style import BLACK, NETWORK, STYLE, SVD, column, curve, log_scale, new_figure, save


@rc_context(STYLE)
def task_curve(
    path: str | Path, history: list[dict], best_epoch: int, start: str, footer: str
) -> None:
    """Validation task error over epochs, with the untrained start as a line; the learning rate.

    history: the entries of history.json, the first of the untrained model; start: what that is, in
    words ("plain SVD", "SVD in the metric"); best_epoch: the epoch of best_model.pt.
    """
    epochs = [record["epoch"] for record in history]
    error = column(history, "val_task_error")
    best = epochs.index(best_epoch)
    figure = new_figure(10, 6.4)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.axhline(error[0], color=SVD, ls="--", lw=1.8)
    curve(top, epochs, error, NETWORK)
    top.plot(epochs[best], error[best], "o", ms=9, color=NETWORK)
    top.annotate(f"best: {error[best]:.4f}", (epochs[best], error[best]), (0, 12), ha="center",
                 textcoords="offset points", color=NETWORK)  # fmt: skip
    top.set_ylabel("validation task error\n(geometric mean over ranks 4 to 32)")
    top.margins(y=0.2)
    log_scale(top)
    curve(below, epochs, column(history, "lr"), BLACK, drawstyle="steps-mid")
    below.set(ylabel="learning\nrate", xlabel="epoch")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    log_scale(below)
    gain = 100 * (1 - error[best] / error[0])
    title = f"Trained through the head: task error {gain:.0f} % below the {start}'s"
    if best == 0:
        title = f"No epoch of {epochs[-1]} lowers the task error below the {start}'s"
    ends = [(error[0], f"{start}\n{error[0]:.4f}", SVD), (error[-1], "network", NETWORK)]
    save(figure, path, title, footer, {top: ends})
