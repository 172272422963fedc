"""What factorisations keep of a head's output: refinement by the head, and the evaluation."""

from __future__ import annotations

import json

import pytest
import torch

from common import arguments
from experiments import evaluate_task
from experiments.partial_results import PartialResults
from experiments.task_measures import (
    Measured,
    judge_factors,
    measure,
    spread_over_groups,
    summarise_methods,
)
from figures import task_sweep
from heads import metric as task_metric
from heads.refinement import refine_factors
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import denormalise, exact_factors
from qwenvl_dataloader import create_data_loaders_real
from svd_baseline import gain_text

# -------------------------------------------------------------------------- refinement by the head


def test_refinement_by_the_head_lowers_every_images_task_error_and_keeps_the_rank(
    saliency, metric, test_batch
):
    full = saliency.outputs(denormalise(*test_batch[1:4]), test_batch.rows)

    def error(a, b):
        tokens = denormalise(a @ b, test_batch.mean, test_batch.std)
        return saliency.error(saliency.outputs(tokens, test_batch.rows), full)

    start = task_metric.metric_svd(test_batch.x, 2, metric)
    found = refine_factors(saliency, test_batch, *start, metric, steps=4)
    assert [f.shape for f in found] == [s.shape for s in start]
    assert torch.linalg.matrix_rank((found[0] @ found[1]).double(), rtol=1e-5).max() <= 2
    assert (error(*found) < error(*start)).all()
    assert error(*found).mean() < 0.85 * error(*start).mean()


def test_no_steps_change_nothing(saliency, metric, test_batch):
    start = task_metric.metric_svd(test_batch.x, 2, metric)
    found = refine_factors(saliency, test_batch, *start, metric, steps=0)
    assert torch.allclose(found[0] @ found[1], start[0] @ start[1], atol=1e-3)


# ------------------------------------------------------------------------------------ the commands


def test_evaluate_task_writes_every_method_with_intervals_and_a_figure(
    metric_file, tiny_cache, script, tmp_path
):
    done = script(
        "experiments.evaluate_task",
        "--cache_dir",
        tiny_cache,
        "--metric",
        metric_file,
        "--ranks",
        2,
        4,
        8,
        "--head_steps",
        1,
        "--bound",
        0.3,
        "--results_dir",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("note: no trained network")
    results = json.loads((tmp_path / "ResMLP" / "task_sweep.json").read_text())
    assert set(results["methods"]) == {
        "svd",
        "svd_in_metric",
        "svd_refined",
        "svd_in_metric_refined",
        "token_dropping",
        "token_averaging",
    }
    svd, found = results["methods"]["svd"], results["methods"]["svd_in_metric"]
    assert results["split"] == "test" and results["n_groups"] == 2
    for rank in ("2", "4", "8"):
        assert found[rank]["gain_pct"]["interval_95"] is None  # of two groups there is none
        means = (m[rank]["task_error"]["mean"] for m in (svd, found))
        plain, ours = means
        assert found[rank]["gain_pct"]["mean"] == pytest.approx(100 * (1 - ours / plain))
        assert svd[rank]["rel_error"]["mean"] <= found[rank]["rel_error"]["mean"] * (1 + 1e-6)
        assert found[rank]["bytes"] == 2 * int(rank) * (16 + 1536)
        control = results["methods"]["svd_refined"][rank]["task_error"]["mean"]
        assert control < plain
        gain = results["methods"]["svd_in_metric_refined"][rank]["gain_over_svd_refined_pct"]
        both = results["methods"]["svd_in_metric_refined"][rank]["task_error"]["mean"]
        assert gain["mean"] == pytest.approx(100 * (1 - both / control))
    assert "svd_refined" in done.stdout
    dropped = results["methods"]["token_dropping"]["4"]
    assert dropped["bytes"] <= found["4"]["bytes"]
    assert results["rank_per_image"]["bounds"]["0.3"]["rank"]["mean"] >= 1
    assert (tmp_path / "ResMLP" / "task_sweep.png").stat().st_size > 20_000


def test_a_method_that_reaches_no_rank_is_left_out_of_table_and_figure(tmp_path):
    plain = Measured(10, {"task_error": torch.tensor([0.5, 0.25, 0.5, 0.25])})
    better = Measured(10, {"task_error": torch.tensor([0.25, 0.2, 0.3, 0.1])})
    methods = {"svd": {4: plain}, "svd_in_metric": {4: better}, "token_dropping": {}}
    for groups in ("abcd", "abcc"):  # of three groups there is no interval
        table = summarise_methods(methods, list(groups))
        assert set(table) == {"svd", "svd_in_metric"}
        assert (table["svd"]["4"]["task_error"]["interval_95"] is None) == (groups == "abcc")
        gain = table["svd_in_metric"]["4"]["gain_pct"]
        assert gain["mean"] == pytest.approx(100 * (1 - 0.85 / 1.5))
        assert (gain["interval_95"] is None) == (groups == "abcc")
        found = {"calibration": {"predicted": [[0.5]], "measured": [[0.4]]}, "confidence": 0.9}
        results = {"methods": table, "rank_per_image": found, "head_steps": 0}
        task_sweep.task_sweep(tmp_path / "t.png", results, "logits", "footer")
    assert (tmp_path / "t.png").exists()


def test_the_steps_of_a_control_do_not_use_the_metric(saliency, metric, test_batch):
    start = exact_factors(test_batch.x, 4)
    methods = evaluate_task.factor_methods({}, metric, saliency, steps=2)
    full = saliency.outputs(denormalise(*test_batch[1:4]), test_batch.rows)
    control = methods["svd_refined"].factorise(test_batch, 4, full)
    # M = I given as a metric takes the same steps
    identity = task_metric.TaskMetric(torch.eye(1536, dtype=torch.float64), {})
    same = refine_factors(saliency, test_batch, *start, identity, 2, full)
    assert torch.allclose(torch.matmul(*control), torch.matmul(*same), atol=1e-4)
    other = refine_factors(saliency, test_batch, *start, metric, 2, full)
    assert not torch.allclose(torch.matmul(*control), torch.matmul(*other), atol=1e-2)


@pytest.fixture
def evaluate(metric_file, tiny_cache):
    """Run experiments.evaluate_task in this process into a folder; its task_sweep.json."""

    def run(folder, *flags):
        argv = [
            "--cache_dir",
            tiny_cache,
            "--metric",
            metric_file,
            "--ranks",
            2,
            4,
            "--bound",
            0.3,
            "--results_dir",
            folder,
            *flags,
        ]
        argv = [str(a) for a in argv]
        evaluate_task.main(arguments.parse(evaluate_task.get_args_parser(), argv))
        found = json.loads((folder / "ResMLP" / "task_sweep.json").read_text())
        return {key: value for key, value in found.items() if key != "seconds"}

    return run


def test_an_evaluation_that_was_cut_off_goes_on_with_what_is_missing(
    evaluate, tmp_path, monkeypatch
):
    whole = evaluate(tmp_path / "whole", "--batch_size", 2)
    measured = evaluate_task.judge_fewer_tokens
    batches = []

    def cut_off(head, dataset, batch, ranks):
        if len(batches) == 1:
            raise KeyboardInterrupt
        batches.append(batch.rows.tolist())
        return measured(head, dataset, batch, ranks)

    monkeypatch.setattr(evaluate_task, "judge_fewer_tokens", cut_off)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut", "--batch_size", 2)
    partial = tmp_path / "cut" / "ResMLP" / "task_sweep.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 2
    partial.write_text(partial.read_text() + '{"stage": "test", "row"')  # a line of a cut
    with pytest.raises(InputError, match="begun with ranks = .2, 4., now it is .2.: type the same"):
        evaluate(tmp_path / "cut", "--ranks", 2)
    counted = []
    monkeypatch.setattr(
        evaluate_task,
        "judge_fewer_tokens",
        lambda head, dataset, batch, ranks: (
            counted.extend(batch.rows.tolist()) or measured(head, dataset, batch, ranks)
        ),
    )
    assert evaluate(tmp_path / "cut", "--batch_size", 2) == whole
    assert len(counted) == whole["n_images"] - 2 and not set(counted) & set(batches[0])
    assert not partial.exists()


def test_what_is_kept_is_what_was_measured_to_the_last_bit(metric, dataset, saliency, tmp_path):
    loader = create_data_loaders_real(dataset, 4).test
    methods = {"svd": evaluate_task.factor_methods({}, metric, saliency, 0)["svd"]}

    def judge(batch):
        return judge_factors(methods, saliency, dataset, batch, [3], {})

    path = tmp_path / "partial.jsonl"
    measure(PartialResults(path, {}), "test", loader, judge)
    kept = measure(PartialResults(path, {}), "test", loader, lambda batch: None)["svd"][3]
    direct = [judge(batch)["svd"][3] for batch in loader]
    assert kept.stored == 3 * (16 + 1536)
    for name, values in kept.measures.items():
        expected = torch.cat([found[name] for found in direct]).double()
        assert torch.equal(values.nan_to_num(), expected.nan_to_num()), name


def test_what_was_kept_of_other_things_is_refused_or_begun_anew(tmp_path):
    path = tmp_path / "folder" / "partial.jsonl"
    PartialResults(path, {"images": 3}).add("test", {0: {"error": 1.0}})
    with pytest.raises(InputError, match="begun with images = 3, now it is 4"):
        PartialResults(path, {"images": 4})
    assert PartialResults(path, {"images": 3}, anew=True).records == {("test", 0): {"error": 1.0}}
    for _ in range(2):
        assert PartialResults(path, {"images": 4}, anew=True).records == {}


def test_a_damaged_partial_file_is_refused_in_one_line(evaluate, tmp_path):
    path = tmp_path / "ResMLP" / "task_sweep.partial.jsonl"
    path.parent.mkdir()
    for damage in ("[]\n", "{\n", '{"head": 1}\n3\n'):
        path.write_text(damage)
        with pytest.raises(InputError, match="damaged: remove it and start again"):
            evaluate(tmp_path)


def test_so_many_images_are_taken_from_all_groups_in_turn(evaluate, dataset, tmp_path):
    assert evaluate(tmp_path, "--images", 3)["n_images"] == 3
    groups = dataset.rows["group"].to_pylist()
    for count in (2, 5):
        rows = spread_over_groups(dataset, dataset.split.train, count).tolist()
        assert len(rows) == count and rows == sorted(rows)
        taken = [groups[row] for row in rows]
        everyone = {groups[row] for row in dataset.split.train.tolist()}
        assert len(set(taken)) == min(count, len(everyone))
    assert torch.equal(spread_over_groups(dataset, dataset.split.test, None), dataset.split.test)


def test_columns_do_not_collide(capsys):
    wide = "-112.3 [-1234.5, 99.9]"
    evaluate_task.print_columns([["", "rank 2", "rank 4"], ["svd", wide, wide], ["b", "1", "2"]])
    lines = capsys.readouterr().out.splitlines()
    found = {"mean": -0.01, "interval_95": [-1234.56, 9.99]}
    assert gain_text(found) == "0.0 [-1234.6, 10.0]"
    assert gain_text({"mean": 5, "interval_95": None}) == "5.0"
    assert f"{wide}  {wide}" in lines[1] and len({len(line) for line in lines}) == 1


def test_answers_of_a_head_that_gives_none_are_refused(metric_file, tiny_cache, script):
    done = script(
        "experiments.evaluate_task", "--cache_dir", tiny_cache, "--metric", metric_file, "--answers"
    )
    assert done.returncode == 2 and "--answers: --head saliency generates none" in done.stderr
