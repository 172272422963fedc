"""The commands as users type them, on the small real cache; and their mistakes."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

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
        figures = {  # painted ones: test_manual.py
            "train_val_loss_comparison.png",
            "loss_curves.png",
            "error_heatmap.png",
            "B_row_norm_hist.png",
        }
        others = {"best_model.pt", "last_model.pt", "history.json", "test_results.json"}
        assert names == figures | others


@pytest.mark.painted
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
    seen = results["readers"]["ranks"][str(rank)]
    assert set(seen) == {"svd", "network"} and "retrieval" in seen["svd"]
    assert set(seen["svd"]) <= set(results["readers"]["full"])
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


@pytest.mark.painted
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


def test_the_image_that_is_drawn_by_default_is_a_test_image(trained, tiny_cache, script):
    done = script("visualize_svd_nn.py", "--rank", 2, *files(tiny_cache, trained))
    assert done.returncode == 0, done.stderr
    row = int(RealQwenVLDataset(tiny_cache).split.test[0])
    results = json.loads((trained / "ResMLP" / f"image_{row}_comparison_results.json").read_text())
    assert (results["image_idx"], results["split"]) == (row, "test")
    assert results["channels"] == list(range(8))


def test_a_head_judges_a_network_of_the_frobenius_norm_where_it_is_named(
    trained, tiny_cache, metric_file, script, tmp_path
):
    results = shutil.copytree(trained, tmp_path / "results")
    where = files(tiny_cache, results)
    done = script("compare_svd_nn.py", "--head", "saliency", "--metric", metric_file, *where)
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())
    assert found["trained_for"] is None
    assert found["n_seen_left_out"] == {"network": 0, "references": 0, "metric": 0}
    task = found["task"]["ranks"]["4"]
    assert task["svd_in_metric"]["mean"] < task["svd"]["mean"]
    assert task["network"]["mean"] >= 0 and "saliency" in done.stdout


def test_numbers_and_figures_of_another_cache_are_moved_aside(
    trained, tiny_cache, cache_copy, script, tmp_path
):
    results = shutil.copytree(trained, tmp_path / "results")
    folder = results / "ResMLP"
    assert script("compare_svd_nn.py", *files(tiny_cache, results)).returncode == 0
    first = (folder / "svd_nn_comparison.json").read_text()
    damage_rows(cache_copy)
    done = script("compare_svd_nn.py", *files(cache_copy, results))
    assert done.returncode == 0 and "made from another cache" in done.stdout, done.stderr
    (previous,) = folder.glob("previous-*")
    assert (previous / "svd_nn_comparison.json").read_text() == first
    assert (previous / "rank_sweep.png").exists() and (folder / "rank_sweep.png").exists()


def damage_rows(cache):
    """Give the cache another table of rows, whose content hash is another's."""
    path = cache / "rows.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "row_id", pa.array(range(100, 136))), path)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["rows"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["rows"] |= {"bytes": path.stat().st_size} if "bytes" in manifest["rows"] else {}
    (cache / "manifest.json").write_text(json.dumps(manifest))


def test_the_report_sets_every_architecture_beside_the_svd(trained, tiny_cache, script, tmp_path):
    results = shutil.copytree(trained, tmp_path / "results")
    for arch in ("ResMLP", "MLP", "AdaLoRA"):
        done = script("compare_svd_nn.py", "--arch", arch, *files(tiny_cache, results))
        assert done.returncode == 0, done.stderr
    done = script("experiments.report", "--results_dir", results)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DEMO data") and "found:" in done.stdout
    for name in ("ResMLP", "MLP, direct", "AdaLoRA"):
        assert f"\n{name} " in done.stdout
    assert (results / "architectures.png").exists() and (results / "report.html").exists()


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
    ("extract_features.py", "--demo --model some/model", "--demo, which brings its own encoder"),
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


@pytest.mark.slow
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
