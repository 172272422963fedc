"""Networks that are trained for a task or in its metric, and what every command makes of them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny
import torch

import train_real_data
from common import arguments
from heads import metric as task_metric
from heads.task_error import head_of_norm
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import denormalise
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from svd_baseline import truncated_svd
from training.checkpoint import load_model
from training.state import TrainState
from training.trained_norm import TaskFactorModel


@pytest.fixture(scope="module")
def task_trained(metric_file, tiny_cache, tmp_path_factory):
    results = tmp_path_factory.mktemp("task_trained") / "results"
    argv = ["--cache_dir", tiny_cache, "--results_dir", results, "--log_dir", results.parent]
    argv += ["--task_head", "saliency", "--metric", metric_file, "--epochs", 3, "--rank", 4]
    argv += ["--oversample", 2, "--hidden_dim", 16, "--lr", 5e-5]
    args = arguments.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    assert train_real_data.main(args) == 0
    return results


def test_training_for_a_task_lowers_the_task_error_and_its_checkpoint_needs_no_flag(
    task_trained, tiny_cache, dataset, script, tmp_path
):
    history = json.loads((task_trained / "ResMLP" / "history.json").read_text())
    assert history[-1]["val_task_error"] < history[0]["val_task_error"]
    assert "loss_task" in history[-1]
    model, state = load_model(
        task_trained / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset
    )
    assert isinstance(model, TaskFactorModel) and state["norm"]["head"] == "saliency"
    where = ["--results_dir", task_trained, "--cache_dir", tiny_cache]
    assert script("factorize.py", *where, "--out", tmp_path / "factors").returncode == 0


def test_a_task_trained_network_is_compared_in_both_norms(
    task_trained, metric_file, tiny_cache, dataset, saliency, script, tmp_path
):
    results = shutil.copytree(task_trained, tmp_path / "both")
    where = ["--results_dir", results, "--cache_dir", tiny_cache, "--metric", metric_file]
    done = script("compare_svd_nn.py", *where)
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())
    task = found["task"]["ranks"]["4"]
    assert set(task) == {"svd", "network", "svd_in_metric"} and found["task"]["head"] == "saliency"
    # the plain SVD's, by hand: as compare_svd_nn.py judges it
    errors = []
    with torch.no_grad():
        for batch in create_data_loaders_real(dataset, 4).test:
            full = saliency.outputs(denormalise(batch.x, batch.mean, batch.std), batch.rows)
            x_hat = torch.matmul(*truncated_svd(batch.x, 4))
            outputs = saliency.outputs(denormalise(x_hat, batch.mean, batch.std), batch.rows)
            errors.append(saliency.error(outputs, full))
    errors = torch.cat(errors)
    assert task["svd"]["mean"] == pytest.approx(float(errors.mean()), rel=1e-4)
    gain = 100 * (1 - task["network"]["mean"] / task["svd"]["mean"])
    assert (
        task["network"]["gain_pct"]["mean"] == pytest.approx(gain) and "gain_pct" not in task["svd"]
    )
    plain = found["ranks"]["4"]
    assert plain["network"]["rel_error"]["mean"] > plain["svd"]["rel_error"]["mean"]
    table = done.stdout[done.stdout.index("both norms") :].splitlines()
    assert f"{task['network']['mean']:.5f}" in table[2] and "network below" in table[1]


def test_a_network_whose_head_is_not_at_hand_is_compared_in_the_frobenius_norm_with_a_note(
    dataset, capsys
):
    norm = {"head": "saliency", "head_sha256": "of other weights", "metric_sha256": None}
    assert head_of_norm(norm, dataset, "cpu", None) is None
    assert "other weights than in training" in capsys.readouterr().out
    assert head_of_norm(norm | {"head": "depth"}, dataset, "cpu", None) is None
    assert "no task error: " in capsys.readouterr().out


def test_a_task_run_goes_on_from_its_checkpoint(task_trained, tiny_cache, script):
    results = shutil.copytree(task_trained, task_trained.parent / "resumed")
    done = script(
        "train_real_data.py",
        "--resume",
        "--epochs",
        1,
        "--results_dir",
        results,
        "--cache_dir",
        tiny_cache,
    )
    assert done.returncode == 0, done.stderr
    assert "val_task_error" in json.loads((results / "ResMLP" / "history.json").read_text())[-1]
    assert "going on with the run trained for --task_head saliency: epoch " in done.stdout


def test_a_run_of_the_manual_after_one_for_a_task_keeps_that_one_aside(
    task_trained, tiny_cache, tmp_path
):
    shutil.copytree(task_trained, tmp_path / "results")
    results = trained(tmp_path, tiny_cache)
    history = json.loads((results / "ResMLP" / "history.json").read_text())
    assert "val_task_error" not in history[-1]
    (aside,) = (results / "ResMLP").glob("previous-*")
    assert "val_task_error" in json.loads((aside / "history.json").read_text())[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_head", "saliency", "--factors", "direct"], "--task_head.*projected"),
        (
            ["--task_head", "saliency", "--use_rank_allocator", "--arch", "AdaLoRA"],
            "--task_head keeps every rank: omit --use_rank_allocator",
        ),
        (["--task_head", "depth", "--metric", "FILE"], "depth is unknown"),
        (["--task_head", "saliency", "--metric", "/none"], "--metric /none does not exist"),
        (["--lambda_task", "2"], "does nothing without --task_head"),
        (["--task_head", "saliency", "--metric", "FILE", "--factors", "direct"], "projected"),
    ],
)
def test_flags_of_training_for_a_task_that_do_not_fit_are_refused(
    flags, message, metric_file, tiny_cache, script, tmp_path
):
    flags = [str(metric_file) if flag == "FILE" else flag for flag in flags]
    done = script("train_real_data.py", "--rank", 4, "--cache_dir", tiny_cache, *flags)
    assert done.returncode == 2 and re.search(message, done.stderr)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_every_table_shows_svd_and_network_in_the_metric_beside_the_plain_ones(
    metric_file, tiny_cache, script, tmp_path
):
    where = ["--results_dir", tmp_path, "--cache_dir", tiny_cache]
    small = ["--epochs", 1, "--rank", 4, "--oversample", 2, "--hidden_dim", 16, "--log_dir", "log"]
    assert script("train_real_data.py", *where, *small).returncode == 0
    where += ["--metric", metric_file]
    done = script("compare_svd_nn.py", *where)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "ResMLP" / "svd_nn_comparison.json").read_text())
    four = {"svd", "svd_in_metric", "network", "network_in_metric"}
    assert four <= set(results["ranks"]["4"]) and all(name in done.stdout for name in four)
    error = {name: results["ranks"]["4"][name]["rel_error"]["mean"] for name in four}
    assert error["svd"] < error["svd_in_metric"]  # X itself is nearer to its own SVD
    assert error["network_in_metric"] == pytest.approx(error["svd_in_metric"], rel=0.05)

    assert script("visualize_svd_nn.py", "--image_idx", 0, *where).returncode == 0
    image = json.loads((tmp_path / "ResMLP" / "image_0_comparison_results.json").read_text())
    assert four <= set(image)

    factors = [tmp_path / name for name in ("plain", "metric")]
    assert script("factorize.py", *where[:4], "--out", factors[0]).returncode == 0
    assert script("factorize.py", *where, "--out", factors[1]).returncode == 0
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in factors]
    assert manifests[1]["metric_sha256"] and "metric_sha256" not in manifests[0]
    assert manifests[1]["errors"]["rel_error"]["mean"] > manifests[0]["errors"]["rel_error"]["mean"]


def test_training_with_a_metric_alone_gives_the_network_of_that_metric(
    metric_file, metric, dataset, tiny_cache, test_batch, script, tmp_path
):
    done = script(
        "train_real_data.py",
        "--results_dir",
        tmp_path,
        "--cache_dir",
        tiny_cache,
        "--metric",
        metric_file,
        "--epochs",
        1,
        "--rank",
        4,
        "--hidden_dim",
        16,
        "--lambda_B",
        0,
    )
    assert done.returncode == 0, done.stderr
    model, _ = load_model(tmp_path / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset)
    with torch.no_grad():
        found = torch.matmul(*model(test_batch.x, 4))
    expected = torch.matmul(*task_metric.metric_svd(test_batch.x, 4, metric))
    assert (found - expected).norm() < 1e-2 * expected.norm()


# ------------------------------------------------------------------------- a model knows its norm


@pytest.fixture(scope="module")
def metric_trained(metric_file, tiny_cache, tmp_path_factory):
    """Results of a network that was trained in the metric, without a head."""
    return trained(tmp_path_factory.mktemp("metric_trained"), tiny_cache, "--metric", metric_file)


def trained(folder, cache, *flags):
    argv = ["--cache_dir", cache, "--results_dir", folder / "results", "--log_dir", folder]
    argv += ["--epochs", 1, "--rank", 4, "--oversample", 2, "--hidden_dim", 16, *flags]
    args = arguments.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    assert train_real_data.main(args) == 0
    return folder / "results"


def test_a_run_in_a_metric_is_not_resumed_with_another_in_its_file(tmp_path):
    """It went on with the weights of the old norm, and its checkpoint named the new one."""
    cache, path = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(24)), tmp_path / "metric"
    info = {"head": "saliency", "head_sha256": "0" * 64, "shrinkage": 0.1, "scale": 1.0}
    info |= {"images": 3, "probes": 1, "cache": task_metric.cache_hashes(RealQwenVLDataset(cache))}
    matrix = torch.linspace(0.5, 1.5, 48, dtype=torch.float64).diag()
    task_metric.save_metric(path, task_metric.TaskMetric(matrix, info))
    trained(tmp_path, cache, "--metric", path)
    task_metric.save_metric(path, task_metric.TaskMetric(matrix.flip(0, 1), info))
    with pytest.raises(InputError, match="was trained with metric_sha256"):
        trained(tmp_path, cache, "--resume")


@pytest.mark.slow
def test_a_metric_is_not_applied_again_to_a_network_that_was_trained_in_it(
    metric_trained, metric_file, tiny_cache, script, tmp_path
):
    where = ["--results_dir", metric_trained, "--cache_dir", tiny_cache]
    errors = []
    for name, flags in (("plain", []), ("metric", ["--metric", metric_file])):
        assert script("factorize.py", *where, *flags, "--out", tmp_path / name).returncode == 0
        errors.append(json.loads((tmp_path / name / "manifest.json").read_text())["errors"])
    assert errors[0] == errors[1]

    where += ["--metric", metric_file]
    done = script("compare_svd_nn.py", *where)
    assert done.returncode == 0, done.stderr
    assert "has a norm for this head" in done.stdout
    folder = metric_trained / "ResMLP"
    methods = json.loads((folder / "svd_nn_comparison.json").read_text())["ranks"]["4"]
    assert methods["network_in_metric"] == methods["network"]
    assert script("visualize_svd_nn.py", "--image_idx", 0, *where).returncode == 0
    image = json.loads((folder / "image_0_comparison_results.json").read_text())
    assert image["network_in_metric"] == image["network"]


def test_a_network_of_one_metric_is_refused_in_another(
    metric_trained, metric, tiny_cache, script, tmp_path
):
    other = tmp_path / "other.safetensors"
    matrix = task_metric.shrunk(metric.matrix, 1.0)
    task_metric.save_metric(other, task_metric.TaskMetric(matrix, metric.info))
    where = ["--results_dir", metric_trained, "--cache_dir", tiny_cache, "--metric", other]
    for name in (
        "compare_svd_nn",
        "factorize",
        "visualize_svd_nn",
    ):
        done = script(name, *where)
        assert done.returncode == 2 and "trained in another metric" in done.stderr, name


def test_a_run_in_a_metric_validates_in_it(metric_trained, metric, dataset):
    history = json.loads((metric_trained / "ResMLP" / "history.json").read_text())
    path = metric_trained / "ResMLP" / "best_model.pt"
    model, state = load_model(path, torch.device("cpu"), dataset)
    entry = history[state["progress"]["best_epoch"]]
    losses, optima = [], []
    with torch.no_grad():
        for batch in create_data_loaders_real(dataset, 4).val:
            a, b = model(batch.x)
            for x, x_hat in zip(batch.x, a @ b, strict=True):
                left = ((x - x_hat) @ metric.root).double()
                losses.append(left.square().mean())
                sigma = torch.linalg.svdvals((x @ metric.root).double())
                optima.append(sigma[4:].square().sum() / left.numel())
    assert entry["val_mse"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)
    assert entry["val_optimum_mse"] == pytest.approx(float(torch.stack(optima).mean()), rel=1e-3)
    assert state["progress"]["best"] == entry["val_mse"] - entry["val_optimum_mse"]
    # in the norm that it is trained in it is near the optimum, in the Frobenius norm it is not
    assert entry["val_excess_pct"] < 5 < entry["val_frobenius_excess_pct"]


def test_the_best_epoch_of_a_head_is_the_one_with_the_least_of_what_is_trained():
    entries = [
        {"val_task_error": 0.5, "val_task_loss": 2.0},
        {"val_task_error": 0.6, "val_task_loss": 1.0},
    ]
    run = TrainState(None, None, None, None, None, {}, 1, head=object(), history=entries)
    assert min(entries, key=run.selection_score) is entries[1]


@pytest.mark.slow
def test_training_for_a_head_without_a_metric_starts_at_the_plain_svd(
    metric_file, tiny_cache, dataset, test_batch, script, tmp_path
):
    results = trained(
        tmp_path,
        tiny_cache,
        "--task_head",
        "saliency",
        "--lambda_B",
        0,
        "--epochs",
        3,
        "--oversample",
        12,
        "--lr",
        1e-4,
    )
    history = json.loads((results / "ResMLP" / "history.json").read_text())
    assert history[0]["val_excess_pct"] < 0.01
    assert min(r["val_task_error"] for r in history[1:]) < 0.97 * history[0]["val_task_error"]
    model, state = load_model(results / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset)
    assert state["norm"]["metric_sha256"] is None
    # a norm that was learned for this head is not multiplied by the head's metric either
    done = script(
        "compare_svd_nn.py",
        "--results_dir",
        results,
        "--cache_dir",
        tiny_cache,
        "--metric",
        metric_file,
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())["ranks"]["4"]
    assert table["network_in_metric"] == table["network"]
