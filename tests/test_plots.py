"""Figures: what is written on them is what the data say, and panels that compare share a scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SAVEFIG
from drawing import FOOTER, history, texts, title
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

import svd_baseline
from figures import architectures, comparison, components, style, token_grid, training_curves
from lowrank_tokens import files

INFO = {"title": "Image 3 (test) at rank 4", "footer": f"{FOOTER}; question: is it $5 or $6?"}
GRID = (4, 4)
BOX = (0.25, 0.5, 0.5, 0.25)
CHANNELS = [7, 30, 2]


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


def runs() -> dict[str, dict]:
    """Return three runs: ResMLP, a direct MLP, and AdaLoRA trained for a head."""
    of_task = {"svd": {"mean": 0.1}, "network": {"mean": 0.06}, "svd_in_metric": {"mean": 0.05}}
    task = {"head": "saliency", "ranks": {"2": of_task, "4": of_task}}
    seen = {name: {"box_precision": {"mean": 0.7}} for name in ("svd", "network")}

    def run(arch, factors="projected", trained_for=None):
        own = task if trained_for else None
        return {
            "arch": arch,
            "factors": factors,
            "trained_for": trained_for,
            "ranks": sweep([2, 4]),
            "task": own,
            "readers": {"full": {"box_precision": {"mean": 0.8}}, "ranks": {"2": seen, "4": seen}},
        }

    return {
        "ResMLP": run("ResMLP"),
        "MLP, direct": run("MLP", "direct"),
        "AdaLoRA, for saliency": run("AdaLoRA", trained_for="saliency"),
    }


PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))


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
        architectures.architectures: (runs(), FOOTER),
        token_grid.channel_comparison: (PHOTO, BOX, maps, CHANNELS, GRID, INFO),
        token_grid.spatial_error: (PHOTO, BOX, errors, GRID, INFO),
    }
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda f, *a, **k: (figures.append(f), SAVEFIG(f, *a, **k))
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
            assert 1000 <= image.width <= 2600 and 600 <= image.height <= 2000
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
    # terms, shifts; error and excess of the sweep; four panels of the architectures
    assert labelled == 3 + 2 + 4 + 3 + 5 + 4 + 3 + 4


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
    reach = np.abs(stack[1] - stack[0]).max()
    assert colour_scales(drawn[0], "RdBu_r") == [(-reach, reach)] * 3


def test_each_map_shows_its_own_tokens_in_raster_order_and_says_which_channel(
    tmp_path, maps, drawn
):
    token_grid.channel_comparison(tmp_path / "c.png", PHOTO, None, maps, CHANNELS, GRID, INFO)
    shown = [image.get_array() for ax in drawn[0].axes for image in data_images(ax)]
    shown = [image for image in shown if image.shape == GRID]
    original, network = (np.asarray(maps[name]) for name in ("original", "network"))
    rows = [original, network, network - original]
    expected = [row[:, j].reshape(GRID) for j in range(3) for row in rows]
    np.testing.assert_array_equal(np.stack(shown), np.stack(expected))
    assert "channel 30" in texts(drawn[0])


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


def test_comparison_states_the_mean_excess_and_treats_the_svds_as_rounding(tmp_path, drawn):
    comparison.comparison(tmp_path / "c.png", per_image(), 4, FOOTER)
    assert "network: mean 0.2 %" in texts(drawn[0])
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
    below = {line.get_color(): line.get_xdata() for line in drawn[0].axes[1].lines}
    np.testing.assert_allclose(below[style.NETWORK], -25)
    np.testing.assert_allclose(below[style.METHODS["svd_in_metric"][1]], -50)


def test_both_norms_are_two_panels(tmp_path, drawn):
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
    frobenius, head = drawn[0].axes
    shown = {line.get_color(): list(line.get_ydata()) for line in head.lines}
    assert shown == {style.NETWORK: [0.06] * 2, style.SVD: [0.1] * 2}
    for methods in task["ranks"].values():
        methods["svd_in_metric"] = of_task(0.05, 45.0)
    comparison.both_norms(tmp_path / "b.png", ranks, task, FOOTER)
    closed = style.METHODS["svd_in_metric"][1]
    assert closed in [line.get_color() for line in drawn[1].axes[1].lines]
    assert style.SVD in [line.get_color() for line in frobenius.lines]


def test_components_that_are_switched_off_are_counted(tmp_path, drawn):
    sigma = np.geomspace(100, 1, 8) * np.ones((12, 1))
    both = {"X": sigma, "X_hat": np.where(np.arange(8) < 5, sigma, 0)}
    components.component_energy(tmp_path / "b.png", both, (sigma**2).sum(1), FOOTER)
    assert "3 of 8 switched off" in title(drawn[0])


def test_rank_sweep_states_the_storage_and_the_break_even_rank(tmp_path, drawn):
    comparison.rank_sweep(tmp_path / "r.png", sweep([2, 4, 8, 16]), 16, 40, FOOTER)
    comparison.rank_sweep(tmp_path / "r.png", sweep([2, 4, 8]), 16, 40, FOOTER)
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
    assert any("undefined" in text for text in texts(drawn[0]))


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


def test_every_network_is_drawn_over_the_rank_and_the_head_judges_where_it_did(tmp_path, drawn):
    architectures.architectures(tmp_path / "a.png", runs(), FOOTER)
    error, excess, task, boxes = drawn[0].axes
    assert len(error.lines) == 3 + 2  # SVD and PCA
    assert len(excess.lines) == 3 + 1  # PCA
    assert [line.get_ydata()[0] for line in task.lines] == [0.1, 0.05, 0.06]
    assert len(boxes.lines) == 3 + 2  # SVD and full tokens
    assert {"ResMLP", "MLP, direct", "AdaLoRA, for saliency"} <= set(texts(drawn[0]))
    unread = runs()["ResMLP"] | {"readers": {"full": {}, "ranks": {}}}
    architectures.architectures(tmp_path / "a.png", {"ResMLP": unread}, FOOTER)
    assert len(drawn[1].axes) == 2


def test_a_figure_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch, errors):
    path = tmp_path / "heat.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        token_grid.error_heatmap(path, errors, GRID, FOOTER)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


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
