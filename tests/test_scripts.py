"""The commands as users type them, on the small real cache; and their mistakes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import make_report
from qwenvl_dataloader import RealQwenVLDataset

ROOT = Path(__file__).resolve().parent.parent

SMALL = "--epochs 1 --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16".split()


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    """A results folder with one ResMLP, one direct MLP and one pruned AdaLoRA."""
    import train_real_data
    from common import arguments

    results = tmp_path_factory.mktemp("trained") / "results"
    for more in (
        [],
        ["--arch", "MLP", "--factors", "direct"],
        "--arch AdaLoRA --use_rank_allocator --allocator_init_warmup 1 --allocator_final_warmup 2"
        " --allocator_mask_interval 1 --allocator_keep_ratio 0.5".split(),
    ):
        argv = ["--cache_dir", tiny_cache, "--results_dir", results, "--log_dir", results.parent]
        small = SMALL if "direct" not in more else [*SMALL[:4], *SMALL[8:]]
        args = arguments.parse(
            train_real_data.get_args_parser(), [str(a) for a in argv] + small + more
        )
        assert train_real_data.main(args) == 0
    return results


def files(tiny_cache, results):
    return ["--cache_dir", tiny_cache, "--results_dir", results]


def is_png(path):
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 300


def test_training_writes_its_checkpoints_numbers_and_figures(trained):
    for arch in ("ResMLP", "MLP", "AdaLoRA"):
        names = {path.name for path in (trained / arch).iterdir()}
        figures = {
            "train_val_loss_comparison.png",
            "loss_curves.png",
            "error_heatmap.png",
            "B_row_norm_hist.png",
        }
        others = {"best_model.pt", "last_model.pt", "history.json", "test_results.json"}
        assert names == figures | others
        assert all(is_png(trained / arch / name) for name in figures)


@pytest.mark.parametrize("arch", ["ResMLP", "mlp", "adaptive_adalora"])
def test_compare_holds_network_and_references_against_the_svd(arch, trained, tiny_cache, script):
    done = script("compare_svd_nn.py", "--arch", arch, *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DEMO data")
    name = {"ResMLP": "ResMLP", "mlp": "MLP", "adaptive_adalora": "AdaLoRA"}[arch]
    results = json.loads((trained / name / "svd_nn_comparison.json").read_text())
    rank = 2 if name == "AdaLoRA" else 4
    assert results["rank"] == results["requested_rank"] == rank
    assert results["factors"] == ("direct" if name == "MLP" else "projected")
    assert results["split"] == "test" and results["n_images"] == 6 and results["n_groups"] == 2
    methods = results["ranks"][str(rank)]
    assert {"network", "svd", "randomized_svd", "pca"} <= set(methods)
    best = methods["svd"]["rel_error"]["mean"]
    assert all(m["rel_error"]["mean"] >= best * (1 - 1e-6) for m in methods.values())
    assert abs(methods["svd"]["excess_pct"]["mean"]) < 1e-3
    box = results["box"]
    assert box["n_images"] + box["n_left_out"] == 6 and box["n_images"] and box["rank"] == rank
    parts = [box["svd"][part]["mean"] for part in ("inside", "outside")]
    assert min(parts) <= best * 1.2 and max(parts) >= best * 0.8  # of the same size as the whole
    for figure in ("svd_nn_comparison.png", "rank_sweep.png"):
        assert is_png(trained / name / figure)


def test_a_rank_above_the_pruned_one_is_evaluated_there_with_one_note(trained, tiny_cache, script):
    done = script("compare_svd_nn.py", "--arch=AdaLoRA", "--rank=4", *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("note:") == 1
    results = json.loads((trained / "AdaLoRA" / "svd_nn_comparison.json").read_text())
    assert (results["rank"], results["requested_rank"]) == (2, 4)


def test_one_checkpoint_serves_a_lower_rank(trained, tiny_cache, script):
    done = script("compare_svd_nn.py", "--rank", 2, *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    assert json.loads((trained / "ResMLP" / "svd_nn_comparison.json").read_text())["rank"] == 2


def test_visualize_draws_one_image_and_says_which_part_it_is_in(trained, tiny_cache, script):
    done = script("visualize_svd_nn.py", "--image_idx", 3, *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    stem = trained / "ResMLP" / "image_3"
    results = json.loads((stem.parent / "image_3_comparison_results.json").read_text())
    assert results["split"] in ("train", "val", "test") and results["split"] in done.stdout
    assert results["network"]["rel_error"] >= results["svd"]["rel_error"] * (1 - 1e-6)
    names = ("spatial_channel", "spatial_error", "rank")
    for kind in names:
        assert is_png(stem.parent / f"image_3_{kind}_comparison.png")


def test_the_image_that_is_drawn_by_default_is_a_test_image_its_worst_and_best_channels_too(
    trained, tiny_cache, script
):
    done = script("visualize_svd_nn.py", "--rank", 2, *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    row = int(RealQwenVLDataset(tiny_cache).split.test[0])
    results = json.loads((trained / "ResMLP" / f"image_{row}_comparison_results.json").read_text())
    assert (results["image_idx"], results["split"]) == (row, "test")
    assert results["channels"][:8] == list(range(8)) and 8 <= len(results["channels"]) <= 10


@pytest.fixture(scope="module")
def compared(trained, tiny_cache, tmp_path_factory):
    """A copy of the results of training, each architecture compared at its effective rank."""
    import compare_svd_nn
    from common import arguments

    results = shutil.copytree(trained, tmp_path_factory.mktemp("compared") / "results")
    for arch in ("ResMLP", "MLP", "AdaLoRA"):
        argv = ["--arch", arch, "--cache_dir", str(tiny_cache), "--results_dir", str(results)]
        compare_svd_nn.main(arguments.parse(compare_svd_nn.get_args_parser(), argv))
    return results


@pytest.fixture
def compared_copy(compared, tmp_path):
    return Path(shutil.copytree(compared, tmp_path / "results"))


def test_report_sets_every_architecture_beside_the_svd_in_one_table_and_one_figure(
    compared_copy, script
):
    done = script("experiments.make_report", "--results_dir", compared_copy)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("DEMO data") and lines[0].endswith("6 test images")
    assert done.stdout.count("architecture ") == 1 and "note:" not in done.stdout
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["ResMLP", "projected", "4"],
        ["MLP", "direct", "4"],
        ["AdaLoRA", "projected", "2"],
    ]
    assert is_png(compared_copy / "overview.png")
    overview = json.loads((compared_copy / "overview.json").read_text())
    assert overview["n_images"] == 6 and overview["split"] == "test"
    assert [row["arch"] for row in overview["architectures"]] == ["ResMLP", "MLP", "AdaLoRA"]
    for row, line in zip(overview["architectures"], lines[2:5], strict=True):
        folder = compared_copy / row["arch"]
        # the network's numbers were measured twice, by the training and by the comparison
        test = json.loads((folder / "test_results.json").read_text())
        best = test["ranks"][str(test["effective_rank"])]
        assert row["effective_rank"] == test["effective_rank"]
        assert row["rel_error"] == pytest.approx(best["rel_error"]["mean"], rel=1e-6)
        assert row["excess_mean"] == pytest.approx(best["excess_pct"]["mean"], rel=1e-3)
        assert row["excess_p90"] == pytest.approx(best["excess_pct"]["p90"], rel=1e-3)
        assert row["rel_error"] >= row["optimum"] * (1 - 1e-6) > 0
        epochs = json.loads((folder / "history.json").read_text())[1:]
        speeds = [epoch["samples_per_s"] for epoch in epochs]
        assert row["samples_per_s"] == pytest.approx(np.median(speeds))
        assert (row["best_epoch"], row["epochs"]) == (test["best_epoch"], len(epochs))
        assert f"{row['rel_error']:.5f}" in line and f"{row['excess_mean']:.4f} %" in line


def test_report_leaves_out_with_a_note_what_is_missing_or_does_not_compare(compared_copy, script):
    (compared_copy / "ResMLP" / "history.json").unlink()
    path = compared_copy / "AdaLoRA" / "svd_nn_comparison.json"
    comparison = json.loads(path.read_text())
    del comparison["content_sha256"]  # of other numbers
    for change, note in (({"rank": 1}, "at rank 1"), ({"data": "other images"}, "other images")):
        path.write_text(json.dumps(comparison | change))
        os.utime(path, (0, 0))  # MLP's is the newest
        done = script("experiments.make_report", "--results_dir", compared_copy)
        assert done.returncode == 0, done.stderr
        notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
        assert len(notes) == 2
        assert "ResMLP" in notes[0] and "history.json" in notes[0]
        assert "AdaLoRA" in notes[1] and note in notes[1]
        overview = json.loads((compared_copy / "overview.json").read_text())
        assert [row["arch"] for row in overview["architectures"]] == ["MLP"]


def test_report_without_any_results_or_with_damaged_ones_is_one_line(compared_copy, script):
    done = script("experiments.make_report", "--results_dir", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for words in ("error: ", "nowhere", "train_real_data.py", "compare_svd_nn.py"):
        assert words in done.stderr
    (compared_copy / "MLP" / "test_results.json").write_text("{")
    done = script("experiments.make_report", "--results_dir", compared_copy)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MLP/test_results.json is damaged" in done.stderr
    assert not (compared_copy / "overview.png").exists()


MISTAKES = [
    ("train_real_data.py", "--rank 0", "--rank"),
    ("train_real_data.py", "--rank 17", "--rank 17 is out of range: type 1 to 16"),
    ("train_real_data.py", "--lr nan", "--lr"),
    ("train_real_data.py", "--dropout 1", "--dropout"),
    ("train_real_data.py", "--batch_size 2.5", "--batch_size"),
    ("train_real_data.py", "--arch transformer", "--arch transformer is unknown"),
    ("train_real_data.py", "--rank 4 --factors direct --oversample 2", "--oversample"),
    ("train_real_data.py", "--rank 4 --use_rank_allocator", "needs --arch AdaLoRA"),
    ("train_real_data.py", "--arch AdaLoRA --rank 4 --use_rank_allocator", "--epochs"),
    ("train_real_data.py", "--arch AdaLoRA --allocator_keep_ratio 0.5", "--allocator_keep_ratio"),
    ("train_real_data.py", "--rank 4 --seed 99999999999999999999", "--seed"),
    ("train_real_data.py", "--rank 4 --resume", "best_model.pt does not exist"),
    ("train_real_data.py", "--device tpu", "--device tpu"),
    ("train_real_data.py", "--no_such_flag", "--no_such_flag"),
    ("compare_svd_nn.py", "--arch MLP", "best_model.pt does not exist"),
    ("extract_features.py", "--verify --cache_dir nowhere", "nowhere does not exist"),
    ("extract_features.py", "", "--dataset_dir is missing"),
    ("extract_features.py", "--demo --model some/model", "--demo brings its own encoder"),
    ("extract_features.py", "--demo --dataset_dir nowhere", "nowhere is not a folder"),
]


@pytest.mark.parametrize(("name", "flags", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag_and_changes_nothing(
    name, flags, message, tiny_cache, tmp_path, script
):
    more = [] if name == "extract_features.py" else files(tiny_cache, "results")
    done = script(name, *more, *flags.split())
    assert done.returncode == 2
    line = done.stderr.strip()
    assert line.startswith("error: ") and "\n" not in line and message in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_must_be_is_a_mistake_in_words(tiny_cache, tmp_path, script):
    (tmp_path / "taken").write_text("")
    done = script("train_real_data.py", "--rank=4", "--cache_dir", tiny_cache, "--log_dir=taken")
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument --log_dir: taken is not a folder")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_rank_above_the_trained_one_is_evaluated_there_and_above_the_tokens_refused(
    trained, tiny_cache, script
):
    done = script("visualize_svd_nn.py", "--rank=16", "--image_idx=0", *files(tiny_cache, trained))
    assert done.returncode == 0 and "note:" in done.stdout
    results = json.loads((trained / "ResMLP" / "image_0_comparison_results.json").read_text())
    assert (results["rank"], results["requested_rank"]) == (4, 16)
    assert script("visualize_svd_nn.py", "--rank=17", *files(tiny_cache, trained)).returncode == 2


def test_an_image_that_the_cache_does_not_have_is_refused(trained, tiny_cache, script):
    done = script("visualize_svd_nn.py", "--image_idx=36", *files(tiny_cache, trained))
    assert done.returncode == 2 and "--image_idx 36" in done.stderr


def test_a_checkpoint_of_another_encoder_is_refused(trained, cache_copy, script):
    manifest = json.loads((cache_copy / "manifest.json").read_text())
    manifest["encoder"]["weights_sha256"] = "another"
    (cache_copy / "manifest.json").write_text(json.dumps(manifest))
    done = script("compare_svd_nn.py", *files(cache_copy, trained))
    assert done.returncode == 2
    assert "was trained on a cache with encoder" in done.stderr


def test_the_overview_compares_architectures_at_one_rank():
    def comparison(ranks):
        error = {"mean": 0.1, "p90": 0.2}
        method = {"rel_error": error, "excess_pct": error}
        return {
            "factors": "projected",
            "rank": ranks[-1],
            "ranks": {str(r): {"network": method, "svd": method} for r in ranks},
        }

    two = [comparison([8, 32, 128]), comparison([8, 32])]
    assert make_report.common_rank(two) == 32
    assert make_report.common_rank([comparison([4]), comparison([2])]) is None
    history = [{"epoch": 1, "samples_per_s": 1.0}]
    rows = [make_report.report_row("MLP", history, {"best_epoch": 1}, c, 32) for c in two]
    assert [(row["rank"], row["effective_rank"]) for row in rows] == [(32, 128), (32, 32)]
