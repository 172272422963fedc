"""A checkpoint on another cache of its encoder: test numbers leave out what it has seen."""

import json

import pytest
import torch
from conftest import TRAIN, extract

import train_real_data
from common import arguments
from experiments import make_demo_data
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import load_checkpoint, save_checkpoint

# the tiny cache has crops 0 to 2 of photographs 0 to 11: this one crop 2, and photographs beside
OTHER_ROWS = [8 * photograph + 2 for photograph in range(40)]


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory):
    """A cache of the same encoder with 12 images of the tiny one and 28 others."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "data").mkdir()
    table = make_demo_data.build_table(seed=42, rows=OTHER_ROWS)
    make_demo_data.write_parquet(table, folder / "data" / "train-00000-of-00001.parquet")
    extract(folder, folder, folder / "cache")
    return folder / "cache"


@pytest.fixture(scope="module")
def results(tiny_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "results"
    argv = ["--cache_dir", tiny_cache, "--results_dir", folder, "--log_dir", folder.parent, *TRAIN]
    args = arguments.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    assert train_real_data.main(args) == 0
    return folder


def seen_and_unseen(tiny_cache, other_cache):
    """Test rows of the other cache whose photograph is in the tiny one's training or validation."""
    tiny, other = RealQwenVLDataset(tiny_cache), RealQwenVLDataset(other_cache)
    groups = tiny.rows["group"].to_pylist()
    known = {groups[row] for part in (tiny.split.train, tiny.split.val) for row in part.tolist()}
    names = other.rows["group"].to_pylist()
    test = other.split.test.tolist()
    return [r for r in test if names[r] in known], [r for r in test if names[r] not in known]


def comparison(folder):
    return json.loads((folder / "ResMLP" / "svd_nn_comparison.json").read_text())


@pytest.mark.slow
def test_compare_leaves_out_the_test_images_that_the_network_was_trained_on_and_says_how_many(
    results, tiny_cache, other_cache, script
):
    seen, unseen = seen_and_unseen(tiny_cache, other_cache)
    assert seen and unseen  # else this test says nothing
    done = script("compare_svd_nn.py", "--cache_dir", other_cache, "--results_dir", results)
    assert done.returncode == 0, done.stderr
    assert f"{len(seen)} test images left out that the network has seen" in done.stdout
    found = comparison(results)
    assert (found["n_images"], found["n_seen_left_out"]["network"]) == (len(unseen), len(seen))
    done = script("compare_svd_nn.py", "--cache_dir", tiny_cache, "--results_dir", results)
    assert comparison(results)["n_seen_left_out"]["network"] == 0 and "left out:" not in done.stdout


def test_an_image_with_the_bytes_of_a_training_image_is_seen_under_whatever_group(
    results, tiny_cache, other_cache, script
):
    seen, _ = seen_and_unseen(tiny_cache, other_cache)
    state = load_checkpoint(results / "ResMLP" / "best_model.pt")
    known = RealQwenVLDataset(other_cache).rows["image_sha256"].to_pylist()
    assert {known[row][:16] for row in seen} <= set(state["images"]["image_sha256"])
    path = results / "ResMLP" / "best_model.pt"
    whole = path.read_bytes()
    try:
        save_checkpoint(path, state | {"images": state["images"] | {"group": []}})
        done = script("compare_svd_nn.py", "--cache_dir", other_cache, "--results_dir", results)
        assert done.returncode == 0 and comparison(results)["n_seen_left_out"]["network"] == len(
            seen
        )
    finally:
        path.write_bytes(whole)


def test_visualize_and_factorize_take_any_cache_of_the_encoder(
    results, tiny_cache, other_cache, script, tmp_path
):
    seen, unseen = seen_and_unseen(tiny_cache, other_cache)
    files = ["--cache_dir", other_cache, "--results_dir", results]
    for row, is_seen in ((seen[0], True), (unseen[0], False)):
        done = script("visualize_svd_nn.py", "--image_idx", row, *files)
        assert done.returncode == 0, done.stderr
        path = results / "ResMLP" / f"image_{row}_comparison_results.json"
        assert json.loads(path.read_text())["seen_in_training"] is is_seen
        assert ("the network has seen" in done.stdout) is is_seen
    done = script("factorize.py", *files, "--out", tmp_path / "factors")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "factors" / "manifest.json").read_text())["count"] == 40


def test_a_cache_whose_test_images_were_all_trained_on_is_refused_in_words(
    results, other_cache, script
):
    path = results / "ResMLP" / "best_model.pt"
    whole, state = path.read_bytes(), load_checkpoint(path)
    groups = RealQwenVLDataset(other_cache).rows["group"].to_pylist()
    try:
        save_checkpoint(path, state | {"images": {"image_sha256": [], "group": groups}})
        done = script("compare_svd_nn.py", "--cache_dir", other_cache, "--results_dir", results)
    finally:
        path.write_bytes(whole)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "every test image of this cache" in done.stderr


def test_resume_demands_the_cache_that_the_run_was_begun_with(results, other_cache, script):
    done = script(
        "train_real_data.py", "--resume", "--cache_dir", other_cache, "--results_dir", results
    )
    assert done.returncode == 2 and "was trained on a cache with split_hash = " in done.stderr


def test_tokens_of_another_width_are_refused(results, tmp_path, script):
    from tiny import steep_tokens, write_cache

    cache = write_cache(tmp_path / "cache", steep_tokens(6, 16, 40).to(torch.bfloat16))
    done = script("factorize.py", "--cache_dir", cache, "--results_dir", results)
    assert done.returncode == 2 and "name a cache of the same encoder and size" in done.stderr


@pytest.mark.slow
def test_a_network_factors_compares_and_draws_images_of_another_size(
    results, tiny_data, tmp_path, script
):
    """Trained on 4 × 4 tokens, used on 5 × 5 of the same encoder."""
    extract(tiny_data, tiny_data, tmp_path / "larger", "--image_size", "140")
    where = ("--cache_dir", tmp_path / "larger", "--results_dir", results)
    for name in ("compare_svd_nn.py", "visualize_svd_nn.py", "factorize.py"):
        done = script(name, *where)
        assert done.returncode == 0, done.stderr
    assert comparison(results)["ranks"]["4"]["network"]["excess_pct"]["mean"] < 5


def test_direct_factors_of_another_size_are_refused_in_words(results, tiny_data, tmp_path, script):
    extract(tiny_data, tiny_data, tmp_path / "larger", "--image_size", "140")
    path = results / "ResMLP" / "best_model.pt"
    whole, state = path.read_bytes(), load_checkpoint(path)
    try:
        save_checkpoint(path, state | {"config": state["config"] | {"factors": "direct"}})
        done = script("factorize.py", "--cache_dir", tmp_path / "larger", "--results_dir", results)
    finally:
        path.write_bytes(whole)
    assert done.returncode == 2 and "name a cache of the same encoder and size" in done.stderr
