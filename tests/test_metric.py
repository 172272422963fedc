"""The metric of a task: what it is, how it is estimated, kept and refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from experiments import estimate_metric
from heads import metric as task_metric
from heads import saliency as heads
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import file_entry
from lowrank_tokens.linalg import denormalise, exact_factors
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from svd_baseline import truncated_svd
from training.unseen import unseen_test


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
    for other in (exact_factors(tokens, 5), task_metric.InMetric(truncated_svd, metric)(tokens, 5)):
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


def test_the_estimated_metric_lowers_the_task_error_of_held_out_images(
    saliency, metric, test_batch
):
    full = saliency.outputs(denormalise(*test_batch[1:4]), test_batch.rows)

    def error(factors):
        tokens = denormalise(torch.matmul(*factors), test_batch.mean, test_batch.std)
        return saliency.error(saliency.outputs(tokens, test_batch.rows), full).mean()

    x = test_batch.x
    for rank in (2, 4):
        assert error(task_metric.metric_svd(x, rank, metric)) < 0.95 * error(exact_factors(x, rank))


def test_a_metric_is_stored_whole_and_refused_with_another_cache_or_head(
    metric_file, metric, saliency, dataset, cache_copy, tmp_path
):
    task_metric.check_head(metric, saliency)
    assert metric.matrix.dtype == torch.float64
    assert float(metric.matrix.diagonal().mean()) == pytest.approx(1)
    again = tmp_path / "again.safetensors"
    task_metric.save_metric(again, metric)
    assert torch.equal(task_metric.load_metric(again, dataset).matrix, metric.matrix)
    manifest = json.loads((cache_copy / "manifest.json").read_text())
    # other bits of singular values, as another number of threads gives them, are no other cache
    sigma = cache_copy / "singular_values.safetensors"
    save_file({"singular_values": dataset.singular_values * (1 + 1e-15)}, sigma)
    manifest["singular_values"] = file_entry(sigma)
    (cache_copy / "manifest.json").write_text(json.dumps(manifest))
    task_metric.load_metric(metric_file, RealQwenVLDataset(cache_copy))
    manifest["shards"][0]["sha256"] = "0" * 64
    (cache_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="made from another cache.*content_sha256"):
        task_metric.load_metric(metric_file, RealQwenVLDataset(cache_copy))
    other = LinearHead(torch.eye(2))
    with pytest.raises(InputError, match="that of the head saliency, not of --head linear"):
        task_metric.check_head(metric, other)
    other.name = "saliency"
    with pytest.raises(InputError, match="other weights of the head saliency"):
        task_metric.check_head(metric, other)


@pytest.mark.parametrize("content", [None, b"garbage", b""])
def test_a_missing_or_damaged_metric_is_refused(content, dataset, tmp_path):
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        InputError, match="--metric .*m.safetensors .*make it with experiments.estimate_metric"
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
        (lambda m, info: info.update(content_sha256="0"), "content hash is another"),
        (lambda m, info: info.update(format="3"), "no metric of format 1"),
    ],
)
def test_a_metric_that_was_changed_is_found_by_its_hash(
    change, message, metric_file, dataset, tmp_path
):
    matrix, info = stored(metric_file)
    change(matrix, info)
    save_file({"metric": matrix}, tmp_path / "m.safetensors", info)
    with pytest.raises(InputError, match=message):
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
def test_a_metric_with_the_right_hash_is_still_checked_for_what_it_holds(
    matrix, said, message, metric_file, metric, dataset, tmp_path
):
    own, info = stored(metric_file)
    matrix = own if matrix is None else matrix
    info = {k: v for k, v in (info | said).items() if v is not None}
    info["content_sha256"] = task_metric.content_sha256(matrix, info)
    path = tmp_path / "m.safetensors"
    save_file({"metric": matrix}, path, info)
    if message:
        with pytest.raises(InputError, match=message) as refused:
            task_metric.load_metric(path, dataset)
        assert "make it with experiments.estimate_metric" in str(refused.value)
    else:
        assert torch.equal(task_metric.load_metric(path, dataset).matrix, metric.matrix)


def test_the_metric_does_not_depend_on_how_images_are_batched(saliency, dataset):

    loaders = [create_data_loaders_real(dataset, size).val for size in (2, 3)]
    moments = [metric_moment(saliency, loader, 1, seed=3)[0] for loader in loaders]
    assert (moments[0] - moments[1]).norm() < 1e-5 * moments[0].norm()


class CutOff(Exception):
    """The end of a script in the middle of its work."""


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_estimate_of_few_images_uses_that_many(tiny_cache, dataset, script, tmp_path):
    out = tmp_path / "m.safetensors"
    done = script(
        "experiments.estimate_metric",
        "--cache_dir",
        tiny_cache,
        "--probes",
        1,
        "--images",
        3,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert "1 probes of 3 training images" in done.stdout
    assert task_metric.load_metric(out, dataset).info["images"] == 3


def test_a_metric_knows_its_images_and_judges_leave_them_out(tiny_cache, dataset, script, tmp_path):
    out = tmp_path / "m.safetensors"
    few = ["--probes", 1, "--images", 4, "--shrinkage", 0.01, "--out", out]
    assert script("experiments.estimate_metric", "--cache_dir", tiny_cache, *few).returncode == 0
    seen = task_metric.load_metric(out, dataset).info["seen"]
    loaders = create_data_loaders_real(dataset, 4)
    assert 0 < len(seen["image_sha256"]) <= 8 and len(seen["group"]) <= 8
    assert unseen_test(loaders, {"metric": seen}).left_out == {"metric": 0}
    # a judge whose test images are those that the metric was fitted to
    table = dataset.rows["group"].to_pylist()
    kin = torch.tensor([row for row, group in enumerate(table) if group in seen["group"]])
    other = loaders._replace(test=loaders.test.only(torch.cat([loaders.test.sampler.rows, kin])))
    assert unseen_test(other, {"metric": seen}).left_out == {"metric": len(kin)}
