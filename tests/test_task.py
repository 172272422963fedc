"""The metric of a task, and what factorisations keep of a head's output."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train_real_data
from common import cli
from common.errors import UserError
from common.partial_results import PartialResults
from experiments import estimate_metric, evaluate_task
from experiments.task_measures import (
    Measured,
    judge_factors,
    measure,
    spread_over_groups,
    summarise_methods,
)
from figures import task_sweep
from model import get_model_by_name
from qwenvl_dataloader import Batch, RealQwenVLDataset, create_data_loaders_real, denormalise
from svd_baseline import gain_text, gram_eigh, truncated_svd
from task import heads
from task import metric as task_metric
from task.load_head import load_head
from task.refinement import refine_factors
from task.task_error import head_of_norm
from task.trained_norm import TaskFactorModel, leading_projector
from training.checkpoint import load_model
from training.state import TrainState


@pytest.fixture(scope="module")
def dataset(tiny_cache) -> RealQwenVLDataset:
    return RealQwenVLDataset(tiny_cache)


@pytest.fixture(scope="module")
def saliency(dataset) -> heads.TaskHead:
    return load_head("saliency", dataset, device="cpu")


# ------------------------------------------------------------------------------------------ metric


@pytest.fixture(scope="module")
def metric_file(tiny_cache, tmp_path_factory):
    """The saliency head's metric of the small cache, made by experiments.estimate_metric itself."""
    path = tmp_path_factory.mktemp("metric") / "saliency.safetensors"
    argv = ["--cache_dir", str(tiny_cache), "--probes", "2", "--out", str(path)]
    estimate_metric.main(cli.parse(estimate_metric.get_args_parser(), argv))
    return path


@pytest.fixture(scope="module")
def metric(metric_file, dataset) -> task_metric.TaskMetric:
    return task_metric.load_metric(metric_file, dataset)


@pytest.fixture(scope="module")
def test_batch(dataset) -> Batch:
    return next(iter(create_data_loaders_real(dataset, 6).test))


def random_metric(d: int, seed: int = 0) -> task_metric.TaskMetric:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return task_metric.TaskMetric(task_metric.shrunk(root @ root.mT, 1e-2), {"scale": 1.0})


class LinearHead(heads.TaskHead):
    """y = X L for every token: a head whose metric is known, M ∝ L Lᵀ."""

    name, sha256, output = "linear", "0", "outputs"

    def __init__(self, weight):
        self.weight = weight

    def outputs(self, tokens, rows):
        return tokens @ self.weight

    def loss(self, outputs, full):
        return heads.squared_error(outputs, full)

    def agreement(self, outputs, full):
        return torch.ones(len(full))


def test_no_matrix_of_its_rank_is_nearer_in_the_metric_than_the_metrics_svd(tokens):
    metric = random_metric(40)

    def distance(x_hat):
        e = (tokens - x_hat).double()
        return ((e @ metric.matrix) * e).sum((-2, -1))

    a, b = task_metric.metric_svd(tokens, 5, metric)
    assert torch.linalg.matrix_rank(a @ b).tolist() == [5, 5, 5]
    # what Eckart and Young say of X M^½
    values, vectors = torch.linalg.eigh(metric.matrix)
    sigma = torch.linalg.svdvals(tokens.double() @ (vectors * values.sqrt()) @ vectors.mT)
    assert torch.allclose(distance(a @ b), sigma[:, 5:].square().sum(-1), rtol=1e-4)
    for other in (gram_eigh(tokens, 5), task_metric.InMetric(truncated_svd, metric)(tokens, 5)):
        assert (distance(torch.matmul(*other)) >= distance(a @ b) * (1 - 1e-4)).all()


def test_any_factorisation_in_the_metric_is_mapped_back_to_token_space(tokens):
    metric = random_metric(40)
    a, b = task_metric.InMetric(truncated_svd, metric)(tokens, 24)
    assert torch.allclose(a @ b, tokens, atol=1e-3)  # full rank: nothing is lost
    a, b = task_metric.InMetric(truncated_svd, metric)(tokens, 6)
    best = torch.matmul(*task_metric.metric_svd(tokens, 6, metric))
    assert torch.allclose(a @ b, best, atol=2e-3)


def metric_moment(head, batches, probes, seed):
    found = task_metric.MomentSum()
    for batch in batches:
        found.add(head, batch, probes, seed)
    return found.mean(head), found.images


def test_the_metric_of_a_linear_head_is_that_heads_own_matrix(dataset, test_batch):
    weight = torch.randn(dataset.feature_dim, 6, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 5
    batch = test_batch._replace(std=torch.ones_like(test_batch.std))
    batches = [batch._replace(rows=batch.rows + 100 * i) for i in range(60)]
    moment, images = metric_moment(LinearHead(weight), batches, 4, seed=1)
    expected = (weight @ weight.mT).double()
    assert images == 360
    difference = moment / moment.trace() - expected / expected.trace()
    assert difference.norm() < 0.05 * (expected / expected.trace()).norm()


def test_in_its_own_metric_a_linear_heads_error_is_predicted_without_running_it(tokens):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 40, generator=generator) * torch.logspace(0, -1, 40)
    head, rows = LinearHead(weight), torch.arange(3)
    full = head.outputs(tokens, rows)
    moment = (weight @ weight.mT).double()
    info = {"scale": float(moment.diagonal().mean())}
    metric = task_metric.TaskMetric(task_metric.shrunk(moment, 1e-9), info)
    predicted = task_metric.predicted_error(tokens, metric)[:, 3]
    measured = head.error(torch.matmul(*task_metric.metric_svd(tokens, 3, metric)) @ weight, full)
    # predicted for gradients relative to ‖y‖, which this moment has not been divided by
    assert torch.allclose(predicted / full.flatten(1).norm(dim=-1), measured, rtol=1e-3)


def test_the_estimated_metric_lowers_the_task_error_of_held_out_images(
    saliency, metric, test_batch
):
    full = saliency.outputs(denormalise(*test_batch[1:4]), test_batch.rows)

    def error(factors):
        tokens = denormalise(torch.matmul(*factors), test_batch.mean, test_batch.std)
        return saliency.error(saliency.outputs(tokens, test_batch.rows), full).mean()

    x = test_batch.x
    for rank in (2, 4):
        assert error(task_metric.metric_svd(x, rank, metric)) < 0.95 * error(gram_eigh(x, rank))


def test_a_metric_is_stored_whole_and_refused_with_another_cache_or_head(
    metric_file, metric, saliency, dataset, cache_copy, tmp_path
):
    task_metric.check_head(metric, saliency)
    assert metric.matrix.dtype == torch.float64
    assert float(metric.matrix.diagonal().mean()) == pytest.approx(1)
    again = tmp_path / "again.safetensors"
    task_metric.save_metric(again, metric)
    assert torch.equal(task_metric.load_metric(again, dataset).matrix, metric.matrix)
    manifest = cache_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"stretch"', '"pad"'))
    with pytest.raises(UserError, match="made from another cache.*manifest_sha256"):
        task_metric.load_metric(metric_file, RealQwenVLDataset(cache_copy))
    other = LinearHead(torch.eye(2))
    with pytest.raises(UserError, match="that of the head saliency, not of --head linear"):
        task_metric.check_head(metric, other)
    other.name = "saliency"
    with pytest.raises(UserError, match="other weights of the head saliency"):
        task_metric.check_head(metric, other)


@pytest.mark.parametrize("content", [None, b"garbage", b""])
def test_a_missing_or_damaged_metric_is_refused(content, dataset, tmp_path):
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match="--metric .*m.safetensors .*make it with experiments.estimate_metric"
    ):
        task_metric.load_metric(path, dataset)


def stored(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("metric"), file.metadata()


def flip(tensor):
    tensor.view(torch.uint8).flatten()[12345] ^= 1


NOT_SYMMETRIC = torch.eye(1536, dtype=torch.float64)
NOT_SYMMETRIC[0, 5] = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, info: flip(m), "content hash is another"),
        (lambda m, info: info.update(scale="2.0"), "content hash is another"),
        (lambda m, info: info.pop("content_sha256"), "content hash is another"),
        (lambda m, info: info.update(format="1", content_sha256="0"), "content hash is another"),
        (lambda m, info: info.update(format="3"), "no metric of format 2"),
    ],
)
def test_a_metric_that_was_changed_is_found_by_its_hash(
    change, message, metric_file, dataset, tmp_path
):
    matrix, info = stored(metric_file)
    change(matrix, info)
    save_file({"metric": matrix}, tmp_path / "m.safetensors", info)
    with pytest.raises(UserError, match=message):
        task_metric.load_metric(tmp_path / "m.safetensors", dataset)


@pytest.mark.parametrize(
    ("matrix", "said", "message"),
    [
        (NOT_SYMMETRIC, {}, "not symmetric"),
        (-torch.eye(1536, dtype=torch.float64), {}, "not positive definite"),
        (torch.zeros(1536, 1536, dtype=torch.float64), {}, "not positive definite"),
        (torch.eye(1536), {}, "matrix of float64"),
        (torch.eye(1535, dtype=torch.float64), {}, "1536 × 1536"),
        (torch.full((1536, 1536), torch.nan, dtype=torch.float64), {}, "does not hold a finite"),
        (None, {"scale": None}, "lacks scale"),
        (None, {"scale": "NaN"}, "scale is nan"),
        (None, {"cache": "[]"}, "cache is"),
        (None, {"cache": "{}"}, "another cache"),
        (None, {"images": "{"}, "is damaged"),
        (None, {}, None),
    ],
)
def test_a_metric_of_an_older_version_is_read_after_every_other_check(
    matrix, said, message, metric_file, metric, dataset, tmp_path
):
    own, info = stored(metric_file)
    info.pop("content_sha256")
    info = {k: v for k, v in (info | {"format": "1"} | said).items() if v is not None}
    path = tmp_path / "m.safetensors"
    save_file({"metric": own if matrix is None else matrix}, path, info)
    if message:
        with pytest.raises(UserError, match=message) as refused:
            task_metric.load_metric(path, dataset)
        assert "make it with experiments.estimate_metric" in str(refused.value)
    else:
        assert torch.equal(task_metric.load_metric(path, dataset).matrix, metric.matrix)


def test_the_metric_does_not_depend_on_how_images_are_batched(saliency, dataset):

    loaders = [create_data_loaders_real(dataset, size).val for size in (2, 3)]
    moments = [metric_moment(saliency, loader, 1, seed=3)[0] for loader in loaders]
    assert (moments[0] - moments[1]).norm() < 1e-5 * moments[0].norm()


class CutOff(Exception):
    """What ends a script in the middle of its work."""


def test_an_estimate_that_was_cut_off_goes_on_and_ends_in_the_same_bits(
    metric_file, tiny_cache, script, tmp_path, monkeypatch
):
    monkeypatch.setattr(estimate_metric, "SAVE_EVERY", 0)
    out, partial = tmp_path / "m.safetensors", tmp_path / "m.safetensors.partial"
    flags = ["--cache_dir", tiny_cache, "--probes", 2, "--out", out]
    done_before, seen = task_metric.MomentSum.add, []

    def add(total, head, batch, *rest):
        if total.images and len(seen) == 1:
            raise CutOff
        seen.append(total.images)
        done_before(total, head, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(task_metric.MomentSum, "add", add)
        with pytest.raises(CutOff):
            script("experiments.estimate_metric", *flags)
    assert partial.exists() and not out.exists()
    other = script("experiments.estimate_metric", *flags, "--seed", 1)
    assert other.returncode == 2 and "was begun with seed = 42, now it is 1" in other.stderr

    with monkeypatch.context() as patch:  # cut off again, after the first shrinkage was judged
        patch.setattr(estimate_metric, "validation_errors", judged := Judged(2))
        with pytest.raises(CutOff):
            script("experiments.estimate_metric", *flags)
    assert judged.labels == ["shrinkage 0.001", "shrinkage 0.01"]
    with monkeypatch.context() as patch:
        patch.setattr(estimate_metric, "validation_errors", judged := Judged(9))
        done = script("experiments.estimate_metric", *flags)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout and judged.labels[0] == "shrinkage 0.01"
    found, expected = stored(out), stored(metric_file)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    assert not partial.exists()


class Judged:
    """`validation_errors` that notes what it judges, and is cut off at the last of `at_most`."""

    def __init__(self, at_most):
        self.labels, self.at_most, self.judge = [], at_most, estimate_metric.validation_errors

    def __call__(self, head, loader, metric, label):
        self.labels.append(label)
        if len(self.labels) == self.at_most:
            raise CutOff
        return self.judge(head, loader, metric, label)


def test_a_damaged_partial_estimate_is_refused_in_words(tiny_cache, script, tmp_path):
    partial = tmp_path / "m.safetensors.partial"
    partial.write_bytes(b"garbage")
    flags = ["--cache_dir", tiny_cache, "--out", tmp_path / "m.safetensors"]
    done = script("experiments.estimate_metric", *flags)
    assert done.returncode == 2 and f"remove {partial} to begin anew" in done.stderr


def test_an_estimate_of_few_images_uses_that_many(tiny_cache, dataset, script, tmp_path):
    out = tmp_path / "m.safetensors"
    done = script("experiments.estimate_metric", "--cache_dir", tiny_cache, "--probes", 1,
                  "--images", 3, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 probes of 3 training images" in done.stdout
    assert task_metric.load_metric(out, dataset).info["images"] == 3


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
        "experiments.evaluate_task", "--cache_dir", tiny_cache, "--metric", metric_file,
        "--ranks", 2, 4, 8, "--head_steps", 1, "--bound", 0.3, "--results_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("note: no trained network")
    results = json.loads((tmp_path / "ResMLP" / "task_sweep.json").read_text())
    assert set(results["methods"]) == {
        "svd", "svd_in_metric", "svd_refined", "svd_in_metric_refined", "token_dropping",
        "token_averaging",
    }  # fmt: skip
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
    start = gram_eigh(test_batch.x, 4)
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
        argv = ["--cache_dir", tiny_cache, "--metric", metric_file, "--ranks", 2, 4,
                "--bound", 0.3, "--results_dir", folder, *flags]  # fmt: skip
        argv = [str(a) for a in argv]
        evaluate_task.main(cli.parse(evaluate_task.get_args_parser(), argv))
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
    with pytest.raises(UserError, match="begun with ranks = .2, 4., now it is .2.: type the same"):
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


def test_a_damaged_partial_file_is_refused_in_one_line(evaluate, tmp_path):
    path = tmp_path / "ResMLP" / "task_sweep.partial.jsonl"
    path.parent.mkdir()
    for damage in ("[]\n", "{\n", '{"head": 1}\n3\n'):
        path.write_text(damage)
        with pytest.raises(UserError, match="damaged: remove it and start again"):
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
    done = script("experiments.evaluate_task", "--cache_dir", tiny_cache, "--metric", metric_file,
                  "--answers")  # fmt: skip
    assert done.returncode == 2 and "--answers: --head saliency generates none" in done.stderr


# ---------------------------------------------------------------------------- training for the task


def test_the_leading_projectors_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)

    def projector(y):
        return leading_projector(y @ y.mT, 3)

    assert torch.autograd.gradcheck(projector, root.requires_grad_())
    # equal eigenvalues on one side of the cut have no say
    equal = torch.diag(torch.tensor([3.0, 3, 3, 1, 1, 1], dtype=torch.float64)).requires_grad_()
    leading_projector(equal, 3).square().sum().backward()
    assert equal.grad.isfinite().all()
    zero = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    leading_projector(zero, 2)[0].sum().backward()
    assert zero.grad.isfinite().all()


def test_an_untrained_task_network_is_the_svd_in_its_metric(metric, test_batch):
    core = get_model_by_name("ResMLP", input_dim=1536, num_tokens=16, rank=6, lambda_B=0.0,
                             oversample=10)  # fmt: skip
    model = TaskFactorModel(core, {"head": "saliency"})
    model.weighting.start_from(metric)
    with torch.no_grad():
        for rank in (6, 3):
            expected = torch.matmul(*task_metric.metric_svd(test_batch.x, rank, metric))
            found = torch.matmul(*model(test_batch.x, rank))
            norm = expected.norm()
            assert (found - expected).norm() < 1e-4 * norm
            assert (model.exact_product(test_batch.x, rank) - expected).norm() < 1e-4 * norm


def test_a_task_networks_product_has_its_rank_whatever_the_weights(metric, test_batch):
    core = get_model_by_name("MLP", input_dim=1536, num_tokens=16, rank=5, oversample=11)
    model = TaskFactorModel(core, {"head": "saliency"})
    model.weighting.start_from(metric)
    with torch.no_grad():
        for parameter in model.weighting.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        product = torch.matmul(*model(test_batch.x, 4)).double()
    assert torch.linalg.matrix_rank(product, rtol=1e-5).tolist() == [4] * 6


@pytest.fixture(scope="module")
def task_trained(metric_file, tiny_cache, tmp_path_factory):
    results = tmp_path_factory.mktemp("task_trained") / "results"
    argv = ["--cache_dir", tiny_cache, "--results_dir", results, "--log_dir", results.parent]
    argv += ["--task_head", "saliency", "--metric", metric_file, "--epochs", 3, "--rank", 4]
    argv += ["--oversample", 2, "--hidden_dim", 16, "--lr", 5e-5]
    args = cli.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
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
    assert isinstance(model, TaskFactorModel) and state["config"]["task"]["head"] == "saliency"
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
    # the plain SVD's, by hand: as evaluate_task judges it
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
    done = script("train_real_data.py", "--resume", "--epochs", 1, "--results_dir", results,
                  "--cache_dir", tiny_cache)  # fmt: skip
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


def test_the_task_trained_network_is_judged_beside_the_others(
    task_trained, metric_file, tiny_cache, script, tmp_path
):
    done = script(
        "experiments.evaluate_task", "--cache_dir", tiny_cache, "--metric", metric_file,
        "--ranks", 2, 4, "--results_dir", tmp_path, "--task_results_dir", task_trained,
        "--head_steps", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    methods = json.loads((tmp_path / "ResMLP" / "task_sweep.json").read_text())["methods"]
    assert {"network_task", "network_task_refined"} <= set(methods)


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
    assert script("experiments.benchmark", *where, "--quality", "--ranks", 4).returncode == 0
    records = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    assert four <= {record["method"] for record in records}

    factors = [tmp_path / name for name in ("plain", "metric")]
    assert script("factorize.py", *where[:4], "--out", factors[0]).returncode == 0
    assert script("factorize.py", *where, "--out", factors[1]).returncode == 0
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in factors]
    assert manifests[1]["metric_sha256"] and "metric_sha256" not in manifests[0]
    assert manifests[1]["errors"]["rel_error"]["mean"] > manifests[0]["errors"]["rel_error"]["mean"]


def test_training_with_a_metric_alone_gives_the_network_of_that_metric(
    metric_file, metric, dataset, tiny_cache, test_batch, script, tmp_path
):
    done = script("train_real_data.py", "--results_dir", tmp_path, "--cache_dir", tiny_cache,
                  "--metric", metric_file, "--epochs", 1, "--rank", 4, "--hidden_dim", 16,
                  "--lambda_B", 0)  # fmt: skip
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
    args = cli.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    assert train_real_data.main(args) == 0
    return folder / "results"


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
    assert "trained in this metric" in done.stdout
    folder = metric_trained / "ResMLP"
    methods = json.loads((folder / "svd_nn_comparison.json").read_text())["ranks"]["4"]
    assert methods["network_in_metric"] == methods["network"]
    assert script("visualize_svd_nn.py", "--image_idx", 0, *where).returncode == 0
    image = json.loads((folder / "image_0_comparison_results.json").read_text())
    assert image["network_in_metric"] == image["network"]
    assert script("experiments.benchmark", *where, "--quality", "--ranks", 4).returncode == 0
    records = json.loads((metric_trained / "benchmark.json").read_text())["records"]
    excess = {record["method"]: record["excess_mean"] for record in records}
    assert excess["network_in_metric"] == excess["network"] > excess["svd"] + 1
    done = script("experiments.evaluate_task", *where, "--ranks", 4)
    assert done.returncode == 0, done.stderr
    methods = json.loads((folder / "task_sweep.json").read_text())["methods"]
    assert methods["network_in_metric"] == methods["network"]


def test_a_network_of_one_metric_is_refused_in_another(
    metric_trained, metric, tiny_cache, script, tmp_path
):
    other = tmp_path / "other.safetensors"
    matrix = task_metric.shrunk(metric.matrix, 1.0)
    task_metric.save_metric(other, task_metric.TaskMetric(matrix, metric.info))
    where = ["--results_dir", metric_trained, "--cache_dir", tiny_cache, "--metric", other]
    for name in ("compare_svd_nn", "factorize", "visualize_svd_nn", "experiments.benchmark",
                 "experiments.evaluate_task"):  # fmt: skip
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
    entries = [{"val_task_error": 0.5, "val_task_loss": 2.0},
               {"val_task_error": 0.6, "val_task_loss": 1.0}]  # fmt: skip
    run = TrainState(None, None, None, None, None, {}, 1, head=object(), history=entries)
    assert min(entries, key=run.distance) is entries[1]
    del entries[0]["val_task_loss"]  # a run of an older version goes on by what it was begun with
    assert min(entries, key=run.distance) is entries[0]


def test_training_for_a_head_without_a_metric_starts_at_the_plain_svd(
    metric_file, tiny_cache, dataset, test_batch, script, tmp_path
):
    results = trained(tmp_path, tiny_cache, "--task_head", "saliency", "--lambda_B", 0,
                      "--epochs", 3, "--oversample", 12, "--lr", 1e-4)  # fmt: skip
    history = json.loads((results / "ResMLP" / "history.json").read_text())
    assert history[0]["val_excess_pct"] < 0.01
    assert min(r["val_task_error"] for r in history[1:]) < 0.97 * history[0]["val_task_error"]
    model, state = load_model(results / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset)
    assert state["config"]["task"]["metric_sha256"] is None
    # a norm that was learned for this head is not multiplied by the head's metric either
    done = script("compare_svd_nn.py", "--results_dir", results, "--cache_dir", tiny_cache,
                  "--metric", metric_file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())["ranks"]["4"]
    assert table["network_in_metric"] == table["network"]
