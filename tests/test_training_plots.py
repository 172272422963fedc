"""Curves of a training run: what is marked and drawn is what the history says."""

from __future__ import annotations

import numpy as np
import pytest
from drawing import FOOTER, history, texts

from figures import style, task_training, training_curves


def test_the_best_epoch_and_the_untrained_start_are_marked(tmp_path, drawn):
    entries = history(8)
    entries[6]["val_mse"], entries[6]["val_excess_pct"] = 3.00001e-4, 0.0123
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    assert {"untrained 0.06 %", "best 0.0123 %"} <= set(texts(drawn[0]))


def test_where_no_epoch_is_better_than_the_untrained_start_the_mark_is_there(tmp_path, drawn):
    training_curves.training_curves(tmp_path / "t.png", history(8), 0, FOOTER)
    assert "untrained, best 0.06 %" in texts(drawn[0])
    # one panel, with the SVD in it: mse, learning rate and rank would be constants
    (ax,) = drawn[0].axes
    svd = [line for line in ax.lines if line.get_color() == style.SVD]
    assert [set(line.get_ydata()) for line in svd] == [{0}] and ax.get_ylim()[0] < 0


def test_training_for_a_task_is_one_curve_with_the_svd_and_the_closed_form_as_lines(
    tmp_path, drawn
):
    errors = (0.07, 0.05, 0.046, 0.047)
    entries = [{"epoch": i, "val_task_error": e, "lr": 3e-4} for i, e in enumerate(errors)]
    references = {"svd": 0.07, "svd_in_metric": 0.0455}
    task_training.task_curve(tmp_path / "t.png", entries, 2, references, FOOTER)
    (ax,) = drawn[0].axes  # the learning rate is a constant
    assert {"best: 0.0460", "SVD 0.0700", "SVD in the metric 0.0455"} <= set(texts(drawn[0]))
    level = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"}
    assert level == set(references.values())
    entries[3]["lr"] = 1e-4
    task_training.task_curve(tmp_path / "t.png", entries, 2, {"svd": 0.07}, FOOTER)
    assert len(drawn[1].axes) == 2


def test_epochs_of_higher_ranks_are_grey_and_not_compared_with_the_last_ones(tmp_path, drawn):
    entries = history(6)
    for entry in entries[:4]:
        entry |= {"effective_rank": 8, "kept_components": list(range(8))}
    for entry in entries[4:]:
        entry["kept_components"] = [0, 2, 3, 6]
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    excess, _, rank, kept = drawn[0].axes
    coloured = next(line for line in excess.lines if line.get_color() == style.NETWORK)
    assert np.isnan(coloured.get_ydata()).tolist() == [True] * 4 + [False] * 3
    assert not any(text.startswith("untrained") for text in texts(drawn[0]))
    assert [len(c.get_positions()) for c in kept.collections] == [8] * 4 + [4] * 3
    assert list(rank.lines[0].get_ydata()) == [8] * 4 + [4] * 3


@pytest.mark.parametrize("epochs", [1, 500])
@pytest.mark.parametrize("excess", [0.03, 1600.0])
def test_one_epoch_and_five_hundred_are_drawn_at_any_excess(tmp_path, drawn, epochs, excess):
    training_curves.training_curves(tmp_path / "t.png", history(epochs, excess), epochs, FOOTER)
    training_curves.loss_terms(tmp_path / "l.png", history(epochs, excess), FOOTER)
    assert len(drawn[0].axes) == (1 if excess < 1 else 2)  # mse only where it leaves its floor
    for ax in drawn[0].axes:
        for line in ax.lines[:-1]:  # the last one marks the best epoch
            y = np.asarray(line.get_ydata(), float)
            y = y[np.isfinite(y)]
            assert ax.get_ylim()[0] < y.min() <= y.max() < ax.get_ylim()[1]
    ticks = [tick for tick in drawn[0].axes[-1].get_xticks() if 0 <= tick <= epochs]
    assert ticks and all(tick == int(tick) for tick in ticks)


def test_a_falling_excess_over_decades_is_drawn_on_a_log_scale_and_a_flat_one_is_not(
    tmp_path, drawn
):
    training_curves.training_curves(tmp_path / "t.png", history(5), 3, FOOTER)
    falling = history(5)
    for entry in falling:
        entry["val_excess_pct"] = 1000 / 10 ** entry["epoch"]
    training_curves.training_curves(tmp_path / "t.png", falling, 3, FOOTER)
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]


def test_an_undefined_excess_is_said_and_not_drawn_as_zero(tmp_path, drawn):
    entries = [entry | {"val_excess_pct": None, "val_optimum_mse": 0.0} for entry in history(3)]
    training_curves.training_curves(tmp_path / "t.png", entries, 3, FOOTER)
    assert any("undefined" in text for text in texts(drawn[0]))
    assert not drawn[0].axes[0].lines


def test_loss_terms_that_are_zero_throughout_are_left_out(tmp_path, drawn):
    training_curves.loss_terms(tmp_path / "l.png", history(5), FOOTER)
    shown = set(texts(drawn[0]))
    assert {
        "reconstruction − 1",
        "B (ridge)",
        "orthogonality",
        "step 1",
        "step 2",
    } <= shown
    assert not {"LoRA orthogonality", "activations"} & shown
    # every term that is drawn is defined
    for label in ("reconstruction − 1", "B (ridge)", "orthogonality"):
        assert sum(text.startswith(f"{label}: ") for text in shown) == 1


def test_the_loss_of_a_run_for_a_task_begins_with_the_tasks_term(tmp_path, drawn):
    entries = [e | {"loss_task": -e["epoch"] / 2} for e in history(4)]
    training_curves.loss_terms(tmp_path / "l.png", entries, FOOTER)
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == [-0.5, -1, -1.5, -2]


def test_without_shifts_there_is_no_panel_for_them(tmp_path, drawn):
    training_curves.loss_terms(tmp_path / "l.png", [e | {"shifts": []} for e in history(5)], FOOTER)
    assert "step 1" not in texts(drawn[0])


def test_training_curves_show_learning_rate_and_rank_where_they_change(tmp_path, drawn):
    entries = history(6)
    for entry in entries[:4]:
        entry["effective_rank"] = 8
    entries[-1]["lr"] = 5e-5
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    _, _, lr, rank = drawn[0].axes
    np.testing.assert_array_equal(
        lr.lines[0].get_ydata(), [entry.get("lr", np.nan) for entry in entries]
    )
    assert list(rank.lines[0].get_ydata()) == [entry["effective_rank"] for entry in entries]
    assert all(list(ax.lines[-1].get_xdata()) == [6, 6] for ax in drawn[0].axes)
    assert any(text.startswith("best at rank 4: ") for text in texts(drawn[0]))
