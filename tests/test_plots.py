"""Figures: what is written on them is what the data say, and panels that compare share a scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

import svd_baseline
from common import files
from figures import (
    comparison,
    components,
    overview,
    style,
    task_training,
    token_grid,
    training_curves,
)

FOOTER = "DEMO data, some-encoder, 36 images, T=16, D=40; rank 4, seed 42"
INFO = {"title": "Image 3 (test) at rank 4", "footer": f"{FOOTER}; question: is it $5 or $6?"}
GRID = (4, 4)
BOX = (0.25, 0.5, 0.5, 0.25)
CHANNELS = {7: "error 0.1", 30: "largest error 0.2", 2: "smallest error 0.01"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order; laid out for a size, not painted, to save time."""
    figures: list[Figure] = []

    def record(figure, path, **kwargs):
        figures.append(figure)
        Path(path).write_bytes(b"not painted")

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def history(epochs: int, excess: float = 0.03) -> list[dict]:
    """Entry 0 untrained with twice the excess, entry e with excess · (1 + 1/(1 + e))."""
    entries = []
    for epoch in range(epochs + 1):
        pct = excess * (1 + 1 / (1 + epoch))
        entry = {
            "epoch": epoch,
            "val_mse": 3e-4 * (1 + pct / 100) ** 2,
            "val_optimum_mse": 3e-4,
            "val_rel_error": 0.02,
            "val_excess_pct": pct,
            "effective_rank": 4,
        }
        if epoch:
            entry |= {
                "train_loss": 1.002,
                "train_mse": 4e-4 * (1 + pct / 100) ** 2,
                "train_optimum_mse": 4e-4,
                "loss_reconstruction": 1.001,
                "loss_B": 1e-4,
                "loss_ortho": 1e-3,
                "loss_lora_ortho": 0.0,
                "loss_act": 0.0,
                "shifts": [0.3, 0.7],
                "lr": 1e-4,
                "seconds": 1.0,
                "samples_per_s": 30.0,
            }
        entries.append(entry)
    return entries


def per_image(scale: float = 1.0) -> dict[str, dict[str, np.ndarray]]:
    """12 images; the SVD's excess is rounding of both signs, the network's mean is 0.2 · scale."""
    rng = np.random.default_rng(0)
    best = rng.uniform(0.01, 0.05, 12)
    means = {"network": 0.2, "random_sketch": 0.3, "randomized_svd": 1.5, "pca": 900.0}
    excess = {name: scale * mean * np.linspace(0.5, 1.5, 12) for name, mean in means.items()}
    excess["svd"] = 1e-7 * np.array([1, -1] * 6)
    return {n: {"rel_error": best * (1 + e / 100), "excess_pct": e} for n, e in excess.items()}


def sweep(ranks: list[int]) -> dict[str, dict]:
    """As in svd_nn_comparison.json; the network's excess is rank / 100 per cent."""
    means = {"network": 0.01, "svd": -1e-9, "randomized_svd": 0.1, "pca": 10.0}
    return {
        str(r): {
            name: {
                "rel_error": {"mean": (1 + mean * r / 100) / r, "p90": 1.4 / r},
                "excess_pct": {"mean": mean * r, "p90": 1.5 * mean * r},
            }
            for name, mean in means.items()
        }
        for r in ranks
    }


@pytest.fixture(scope="module")
def errors():
    """Relative error per token [16] of network and SVD; in the box twice that outside."""
    inside = np.zeros(GRID)
    inside[2, 1:3] = 1
    svd = 0.1 * (1 + inside.ravel())
    return {"network": torch.from_numpy(svd + np.linspace(0, 0.003, 16)), "svd": svd}


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(1)
    original = rng.normal(size=(16, 3)) * [1, 10, 100]
    noise = rng.normal(size=(2, 16, 3))
    return {
        "original": torch.from_numpy(original),
        "network": original + 0.3 * noise[0],
        "svd": original + 0.1 * noise[1],
    }


def batch() -> list[dict]:
    """Rows of an overview: ResMLP near the SVD, MLP far from it, AdaLoRA's excess undefined."""

    def entry(excess, sketch=None, gain=None):
        return {"excess_mean": excess, "random_sketch_mean": sketch, "task_gain_pct": gain}

    values = [("ResMLP", 0.03), ("MLP", 1800.0), ("AdaLoRA", None)]
    return [
        {
            "arch": arch,
            "effective_rank": 4,
            "rank": 4,
            "excess_mean": mean,
            "ranks": {"2": entry(mean and mean / 10, 0.01), "4": entry(mean, 0.05)},
        }
        for arch, mean in values
    ]


PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def data_images(ax: Axes) -> list:
    """Maps of an axes, without photographs."""
    return [image for image in ax.get_images() if image.get_array().ndim == 2]


def colour_scales(figure: Figure, cmap: str) -> list[tuple[float, float]]:
    images = [image for ax in figure.axes for image in data_images(ax)]
    return [image.get_clim() for image in images if image.get_cmap().name == cmap]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, errors, maps):
    """Each public function's PNG, painted: list of (path, figure)."""
    folder = tmp_path_factory.mktemp("figures")
    norms = np.geomspace(100, 1, 4) * np.ones((12, 1))
    both = {"X": norms, "X_hat": 0.99 * norms}
    calls = {
        training_curves.training_curves: (history(5), 3, FOOTER),
        training_curves.loss_terms: (history(5), FOOTER),
        token_grid.error_heatmap: (errors, GRID, FOOTER),
        components.component_energy: (both, (norms**2).sum(1), FOOTER),
        comparison.comparison: (per_image(), 4, FOOTER),
        comparison.rank_sweep: (sweep([2, 4, 8, 16]), 16, 40, FOOTER),
        overview.overview: (batch(), FOOTER),
        token_grid.channel_comparison: (PHOTO, BOX, maps, CHANNELS, GRID, INFO),
        token_grid.spatial_error: (PHOTO, BOX, errors, GRID, INFO),
    }
    figures, savefig = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda f, *a, **k: (figures.append(f), savefig(f, *a, **k))
        )
        for function, arguments in calls.items():
            function(str(folder / f"{function.__name__}.png"), *arguments)
    paths = [folder / f"{function.__name__}.png" for function in calls]
    assert sorted(folder.iterdir()) == sorted(paths)  # no temporary file is left
    return list(zip(paths, figures, strict=True))


def test_every_figure_is_a_readable_png_with_a_title_that_says_demo_data(gallery):
    assert len(gallery) == 9
    for path, figure in gallery:
        assert path.read_bytes().startswith(b"\x89PNG")
        with Image.open(path) as image:
            assert 1000 <= image.width <= 2600 and 600 <= image.height <= 1700
            pixels = np.asarray(image.convert("L"))
        assert pixels[-1, -1] == 255  # white background
        assert pixels.std() > 10  # something is drawn
        assert any(text.startswith(FOOTER) for text in texts(figure)) and title(figure)


def test_no_text_leaves_the_picture_and_labels_at_the_ends_of_curves_do_not_overlap(gallery):
    labelled = 0
    for _, figure in gallery:
        renderer = FigureCanvasAgg(figure).get_renderer()
        drawn = figure.get_tightbbox(renderer)  # inches
        assert (drawn.min >= 0).all() and (drawn.max <= figure.get_size_inches()).all(), figure
        for ax in figure.axes:
            ends = [t for t in ax.texts if isinstance(t, Annotation) and t.arrow_patch is not None]
            boxes = [Text.get_window_extent(t, renderer) for t in ends]
            labelled += len(boxes)
            overlaps = [ends[i] for i, b in enumerate(boxes) if any(map(b.overlaps, boxes[:i]))]
            assert not overlaps
    assert labelled == 3 + 2 + 4 + 3 + 3  # terms, shifts; error and excess of the sweep; overview


def test_network_and_svd_error_maps_share_one_scale_that_spans_both(tmp_path, errors, drawn):
    token_grid.error_heatmap(tmp_path / "heat.png", errors, GRID, FOOTER)
    token_grid.spatial_error(tmp_path / "spatial.png", PHOTO, BOX, errors, GRID, INFO)
    low, high = errors["svd"].min(), float(errors["network"].max())
    apart = float((errors["network"] - torch.from_numpy(errors["svd"])).abs().max())
    for figure, count in zip(drawn, (2, 3), strict=True):  # once more, over the photograph
        assert colour_scales(figure, "viridis") == [(low, high)] * count
        assert colour_scales(figure, "RdBu_r") == [(-apart, apart)]


def test_a_channel_has_one_scale_for_x_and_network_and_all_differences_share_one(
    tmp_path, maps, drawn
):
    token_grid.channel_comparison(tmp_path / "c.png", PHOTO, None, maps, CHANNELS, GRID, INFO)
    scales = sorted(set(colour_scales(drawn[0], "viridis")), key=lambda scale: scale[1])
    stack = np.stack([np.asarray(values) for values in maps.values()])
    assert scales == [(stack[:2, :, j].min(), stack[:2, :, j].max()) for j in range(3)]
    assert len(colour_scales(drawn[0], "viridis")) == 6
    reach = np.abs(stack[1:] - stack[0]).max()
    assert colour_scales(drawn[0], "RdBu_r") == [(-reach, reach)] * 6


def test_each_map_shows_its_own_tokens_in_raster_order_and_says_which_channel(
    tmp_path, maps, drawn
):
    token_grid.channel_comparison(tmp_path / "c.png", PHOTO, None, maps, CHANNELS, GRID, INFO)
    shown = [image.get_array() for ax in drawn[0].axes for image in data_images(ax)]
    shown = [image for image in shown if image.shape == GRID]
    original, network, svd = (np.asarray(maps[name]) for name in ("original", "network", "svd"))
    rows = [original, network, network - original, svd - original]
    expected = [row[:, j].reshape(GRID) for j in range(3) for row in rows]
    np.testing.assert_array_equal(np.stack(shown), np.stack(expected))
    assert "channel 30\nlargest error 0.2" in texts(drawn[0])


def test_the_box_lies_on_photograph_and_maps_where_the_text_is(tmp_path, errors, drawn):
    token_grid.spatial_error(tmp_path / "s.png", PHOTO, BOX, errors, GRID, INFO)
    boxes = [
        patch.get_bbox().bounds
        for ax in drawn[0].axes
        for patch in ax.patches
        if patch.get_path_effects()
    ]
    assert boxes == [(1.0, 2.0, 2.0, 1.0)] * 5  # all in the grid's units
    labels = [t.get_text() for t in drawn[0].axes[3].get_xticklabels()]
    assert labels == ["in the box\n(2 tokens)", "outside\n(14 tokens)"]
    means = [line.get_ydata()[0] for line in drawn[0].axes[3].lines if len(line.get_ydata()) == 1]
    assert means[1::2] == pytest.approx([0.2, 0.1])  # the SVD's, in the box and outside


def test_an_image_without_a_box_has_none_drawn(tmp_path, errors, drawn):
    token_grid.spatial_error(tmp_path / "s.png", PHOTO, None, errors, GRID, INFO)
    assert not any(p.get_path_effects() for ax in drawn[0].axes for p in ax.patches)
    assert [t.get_text() for t in drawn[0].axes[3].get_xticklabels()] == ["all\n(16 tokens)"]


def test_a_question_with_dollar_signs_is_written_as_it_is(tmp_path, errors, drawn):
    token_grid.spatial_error(tmp_path / "s.png", PHOTO, BOX, errors, GRID, INFO)
    footer = next(text for text in drawn[0].texts if "DEMO" in text.get_text())
    assert "$5 or $6" in footer.get_text() and not footer.get_parse_math()


def test_training_title_names_the_best_epoch_and_the_untrained_start(tmp_path, drawn):
    entries = history(8)
    entries[6]["val_mse"], entries[6]["val_excess_pct"] = 3.00001e-4, 0.0123
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    assert title(drawn[0]) == (
        "Validation error is 0.0123 % above the SVD's at epoch 6 of 8; untrained 0.06 %"
    )
    assert {"untrained 0.06 %", "best 0.0123 %"} <= set(texts(drawn[0]))


def test_where_no_epoch_is_better_than_the_untrained_start_the_title_says_so(tmp_path, drawn):
    training_curves.training_curves(tmp_path / "t.png", history(8), 0, FOOTER)
    assert title(drawn[0]) == (
        "The network sits on the optimum, 0.06 % above the SVD's error untrained: training cannot "
        "lower it (no epoch of 8 did)"
    )
    assert "untrained, best 0.06 %" in texts(drawn[0])
    # one panel, with the SVD in it: mse, learning rate and rank would be constants
    (ax,) = drawn[0].axes
    svd = [line for line in ax.lines if line.get_color() == style.SVD]
    assert [set(line.get_ydata()) for line in svd] == [{0}] and ax.get_ylim()[0] < 0
    far = history(8, 1600.0)
    training_curves.training_curves(tmp_path / "t.png", far, 0, FOOTER)
    assert title(drawn[1]).startswith("No epoch of 8 is better than the untrained network, 3,200 %")


def test_training_for_a_task_is_one_curve_with_the_svd_and_the_closed_form_as_lines(
    tmp_path, drawn
):
    errors = (0.07, 0.05, 0.046, 0.047)
    entries = [{"epoch": i, "val_task_error": e, "lr": 3e-4} for i, e in enumerate(errors)]
    references = {"svd": 0.07, "svd_in_metric": 0.0455}
    task_training.task_curve(tmp_path / "t.png", entries, 2, references, FOOTER)
    assert title(drawn[0]) == (
        "Trained through the head: task error 34 % below the SVD's (closed form, the SVD in the "
        "task's metric: 35 % below)"
    )
    (ax,) = drawn[0].axes  # the learning rate is a constant
    assert {"best: 0.0460", "SVD 0.0700", "SVD in the metric 0.0455"} <= set(texts(drawn[0]))
    level = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"}
    assert level == set(references.values())
    entries[3]["lr"] = 1e-4
    task_training.task_curve(tmp_path / "t.png", entries, 2, {"svd": 0.07}, FOOTER)
    assert len(drawn[1].axes) == 2 and "closed form" not in title(drawn[1])
    # from the closed form on: 35 % below is where it began
    entries = [entry | {"val_task_error": 0.0455} for entry in entries]
    task_training.task_curve(tmp_path / "t.png", entries, 0, references, FOOTER)
    assert title(drawn[2]) == (
        "No epoch of 3 lowers the task error of the start, 35 % below the SVD's"
    )


def test_an_untrained_start_at_another_rank_is_not_compared(tmp_path, drawn):
    entries = history(6)
    for entry in entries[:4]:
        entry |= {"effective_rank": 8, "val_mse": 1e-9, "val_optimum_mse": 1e-9}
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    assert "at epoch 6" in title(drawn[0]) and "untrained" not in title(drawn[0])


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
    assert not drawn[0].axes[0].lines and "%" not in title(drawn[0])


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
    assert title(drawn[0]) == (
        "Training: log of the task error -0.500 in epoch 1, -2.000 in epoch 4"
    )
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == [-0.5, -1, -1.5, -2]


def test_without_shifts_there_is_no_panel_for_them(tmp_path, drawn):
    training_curves.loss_terms(tmp_path / "l.png", [e | {"shifts": []} for e in history(5)], FOOTER)
    assert "step 1" not in texts(drawn[0])


def test_comparison_states_the_mean_excess_and_treats_the_svds_as_rounding(tmp_path, drawn):
    comparison.comparison(tmp_path / "c.png", per_image(), 4, FOOTER)
    assert title(drawn[0]) == (
        "At rank 4 the network's error is 0.2 % above the SVD's (random sketch 0.3 %, "
        "randomised SVD 1.5 %)"
    )
    (strips,) = drawn[0].axes
    assert "SVD: mean under 0.00001 %" in texts(drawn[0])
    dots = {line.get_color(): np.asarray(line.get_xdata()) for line in strips.lines}
    assert (dots[style.SVD] == style.ROUNDING_PCT).all()
    np.testing.assert_array_equal(dots[style.NETWORK], per_image()["network"]["excess_pct"])
    low, high = strips.get_xlim()
    assert all(low < x.min() and x.max() < high for x in dots.values())


def test_a_task_trained_network_is_shown_in_both_norms_each_image_against_its_own_svd(
    tmp_path, drawn
):
    svd = np.linspace(0.1, 0.2, 12)
    task = {"svd": svd, "network": 0.75 * svd, "svd_in_metric": 0.5 * svd}
    comparison.comparison(tmp_path / "c.png", per_image(), 4, FOOTER, task)
    assert title(drawn[0]) == (
        "At rank 4 the network's error is 0.2 % above the SVD's in the Frobenius norm, and 25 % "
        "below it for the head that it was trained for"
    )
    below = {line.get_color(): line.get_xdata() for line in drawn[0].axes[1].lines}
    np.testing.assert_allclose(below[style.NETWORK], -25)
    np.testing.assert_allclose(below[style.METHODS["svd_in_metric"][1]], -50)


def test_both_norms_are_two_panels_with_the_gain_of_each_in_the_title(tmp_path, drawn):
    def of_task(mean, gain=None):
        entry = {"mean": mean, "interval_95": [0.9 * mean, 1.1 * mean]}
        return entry | ({"gain_pct": {"mean": gain}} if gain else {})

    ranks = sweep([2, 4])
    for methods in ranks.values():
        for key in ("mean", "p90"):
            svd = methods["svd"]["rel_error"][key]
            methods["network"]["rel_error"][key] = 1.05 * svd
    task = {
        "head": "saliency",
        "output": "saliency logits",
        "ranks": {
            r: {"svd": of_task(0.1), "network": of_task(0.06, 40.0 + int(r))} for r in ("2", "4")
        },
    }
    comparison.both_norms(tmp_path / "b.png", ranks, task, FOOTER)
    assert title(drawn[0]) == (
        "Ranks 2 to 4: the network's error is 5 % above the SVD's in the Frobenius norm, and 42 to "
        "44 % below it for the head that it was trained for"
    )
    frobenius, head = drawn[0].axes
    shown = {line.get_color(): list(line.get_ydata()) for line in head.lines}
    assert shown == {style.NETWORK: [0.06] * 2, style.SVD: [0.1] * 2}
    assert style.SVD in [line.get_color() for line in frobenius.lines]


def test_components_that_hold_less_than_the_svds_are_named_and_pruned_ones_counted(tmp_path, drawn):
    sigma = np.geomspace(100, 1, 8) * np.ones((12, 1))
    energy = (sigma**2).sum(1)

    def draw(found):
        both = {"X": sigma, "X_hat": found}
        components.component_energy(tmp_path / "b.png", both, energy, FOOTER)
        return title(drawn[-1])

    assert draw(torch.from_numpy(sigma)) == (
        "All 8 components hold the SVD's energy to within under 0.00001 % (median)"
    )
    lacking = sigma * np.where(np.arange(8) < 6, 1, [1] * 7 + [0.9])
    lacking[:, 6] *= 0.99
    assert draw(lacking) == (
        "Components 1 to 6 hold the SVD's energy to within 1 %; component 8 holds 19 % less "
        "(median)"
    )
    assert draw(np.where(np.arange(8) < 5, sigma, 0)).endswith("; 3 components are off")


def test_rank_sweep_states_the_worst_rank_the_storage_and_the_break_even_rank(tmp_path, drawn):
    comparison.rank_sweep(tmp_path / "r.png", sweep([2, 4, 8, 16]), 16, 40, FOOTER)
    comparison.rank_sweep(tmp_path / "r.png", sweep([2, 4, 8]), 16, 40, FOOTER)
    assert title(drawn[0]) == (
        "Ranks 2 to 16: the network's mean error is at most 0.16 % above the SVD's"
    )
    # 16 tokens of 40 features: a rank stores 56 numbers of 640
    assert {"17.5 %", "140 %", "break-even rank 11"} <= set(texts(drawn[0]))
    assert not any("break-even" in text for text in texts(drawn[1]))
    top, bottom = drawn[0].axes
    assert style.SVD in [line.get_color() for line in top.lines]
    assert style.SVD not in [line.get_color() for line in bottom.lines]


def test_a_sweep_of_one_rank_without_a_defined_excess_is_drawn(tmp_path, drawn):
    ranks = sweep([16])
    for method in ranks["16"].values():
        method["excess_pct"] = {"mean": None, "p90": None}
    comparison.rank_sweep(tmp_path / "r.png", ranks, 16, 40, FOOTER)
    assert title(drawn[0]).startswith("Rank 16: ") and "undefined" in title(drawn[0])


@pytest.mark.parametrize("rank", ["2", "4"])
def test_a_method_without_a_colour_is_an_error_and_never_left_out_of_a_figure(tmp_path, rank):
    ranks = sweep([2, 4])
    ranks[rank]["new_method"] = ranks[rank]["pca"]
    with pytest.raises(KeyError, match="new_method"):
        comparison.rank_sweep(tmp_path / "r.png", ranks, 16, 40, FOOTER)
    images = per_image() | {"new_method": per_image()["pca"]}
    with pytest.raises(KeyError, match="new_method"):
        comparison.comparison(tmp_path / "c.png", images, 4, FOOTER)
    assert list(tmp_path.iterdir()) == []


def test_overview_shows_each_architecture_at_every_rank_and_states_every_excess(tmp_path, drawn):
    overview.overview(tmp_path / "o.png", batch(), FOOTER)
    assert title(drawn[0]) == (
        "Mean error above the SVD's at rank 4: ResMLP 0.03 %, MLP 1,800 %, AdaLoRA undefined"
    )
    (ax,) = drawn[0].axes
    shown = [list(line.get_ydata()) for line in ax.lines]
    assert shown == [pytest.approx([0.003, 0.03]), [180, 1800], [], [0.01, 0.05]]
    assert {"ResMLP", "MLP", "random sketch"} <= set(texts(drawn[0]))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "4"]


def test_an_overview_of_one_run_for_a_task_shows_both_norms(tmp_path, drawn):
    row = batch()[0]
    for rank, entry in row["ranks"].items():
        entry["task_gain_pct"] = 10.0 * int(rank)
    overview.overview(tmp_path / "o.png", [row], FOOTER)
    below = drawn[0].axes[1]
    assert [list(line.get_ydata()) for line in below.lines] == [[-20, -40], [0, 0]]


def test_an_overview_of_different_ranks_says_so_and_one_row_of_rounding_is_drawn(tmp_path, drawn):
    rows = batch()[:2]
    rows[1]["rank"] = 2
    overview.overview(tmp_path / "o.png", rows, FOOTER)
    assert title(drawn[0]) == (
        "Mean error above the SVD's: ResMLP 0.03 % (rank 4), MLP 1,800 % (rank 2)"
    )
    row = rows[0] | {"excess_mean": -1e-7}
    row["ranks"] = {"4": row["ranks"]["4"] | {"excess_mean": -1e-7}}
    overview.overview(tmp_path / "o.png", [row], FOOTER)
    assert title(drawn[1]) == "Mean error above the SVD's at rank 4: ResMLP under 0.00001 %"
    assert list(drawn[1].axes[0].lines[0].get_ydata()) == [style.ROUNDING_PCT]


def test_a_figure_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch, errors):
    path = tmp_path / "heat.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        token_grid.error_heatmap(path, errors, GRID, FOOTER)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_training_curves_show_learning_rate_and_rank_where_they_change(tmp_path, drawn):
    entries = history(6)
    for entry in entries[:4]:
        entry["effective_rank"] = 8
    entries[-1]["lr"] = 5e-5
    training_curves.training_curves(tmp_path / "t.png", entries, 6, FOOTER)
    _, lr, rank = drawn[0].axes
    np.testing.assert_array_equal(
        lr.lines[0].get_ydata(), [entry.get("lr", np.nan) for entry in entries]
    )
    assert list(rank.lines[0].get_ydata()) == [entry["effective_rank"] for entry in entries]
    assert all(list(ax.lines[-1].get_xdata()) == [6, 6] for ax in drawn[0].axes)
    assert any(text.startswith("best at rank 4: ") for text in texts(drawn[0]))


def test_rank_comparison_scales_all_maps_of_a_block_by_x_and_shows_what_is_lost_as_flat(
    tmp_path, drawn
):
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    hats = [x.mean(0) + left[:, :r] * sigma[:r] @ right[:r] for r in (3, 6)]
    original, *others = svd_baseline.principal_coordinates(x, hats, 6)
    torch.testing.assert_close(original, left[:, :6] * sigma[:6], check_dtype=False)
    maps = {"original": [original], "network": others}
    errors = {"network": [0.5, 0.2], "svd": [0.4, 0.1]}
    blocks = [range(3), range(3, 6)]
    token_grid.rank_comparison(
        tmp_path / "r.png", PHOTO, BOX, maps, errors, [3, 6], blocks, GRID, INFO
    )
    images = [np.asarray(ax.images[0].get_array()) for ax in drawn[0].axes[1:]]
    first, second = images[:3], images[3:]  # X, network at both ranks
    for shown in first[1:]:
        np.testing.assert_allclose(shown, first[0], atol=1e-9)
    np.testing.assert_allclose(second[2], second[0], atol=1e-9)
    assert np.ptp(second[1].reshape(16, 3), axis=0).max() < 1e-9 < second[0].std()
    assert {"rel_error 0.5\nSVD 0.4", "rel_error 0.2\nSVD 0.1", "components 4–6"} <= set(
        texts(drawn[0])
    )
