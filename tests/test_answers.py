"""Heads and factors: refinement by the head, answers of a language model, work that is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import steep_tokens

from experiments import answers
from experiments.partial_results import PartialResults
from heads import metric as task_metric
from heads.refinement import refine_factors
from lowrank_tokens.codec import Codec
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import denormalise
from qwenvl_dataloader import create_data_loaders_real


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


def test_what_was_kept_of_other_things_is_refused_or_begun_anew(tmp_path):
    path = tmp_path / "folder" / "partial.jsonl"
    PartialResults(path, {"images": 3}).add("test", {0: {"error": 1.0}})
    with pytest.raises(InputError, match="begun with images = 3, now it is 4"):
        PartialResults(path, {"images": 4})
    assert PartialResults(path, {"images": 3}, anew=True).records == {("test", 0): {"error": 1.0}}
    for _ in range(2):
        assert PartialResults(path, {"images": 4}, anew=True).records == {}


def test_a_damaged_partial_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "partial.jsonl"
    for damage in ("[]\n", "{\n", '{"head": 1}\n3\n'):
        path.write_text(damage)
        with pytest.raises(InputError, match="damaged: remove it and start again"):
            PartialResults(path, {"head": 1})


def test_so_many_images_are_taken_from_all_groups_in_turn(dataset):
    groups = dataset.rows["group"].to_pylist()
    for count in (2, 5):
        rows = answers.spread_over_groups(dataset, dataset.split.train, count).tolist()
        assert len(rows) == count and rows == sorted(rows)
        taken = [groups[row] for row in rows]
        everyone = {groups[row] for row in dataset.split.train.tolist()}
        assert len(set(taken)) == min(count, len(everyone))


def test_each_image_is_asked_about_its_own_tokens_of_every_method_and_rank(dataset):
    batch = next(iter(create_data_loaders_real(dataset, 3).test))

    def brightness(tokens, rows):
        assert rows.tolist() == batch.rows.tolist()
        return tokens.double().mean((1, 2))

    def nothing(of, rank):
        return torch.zeros(len(of.rows), 16, rank), torch.zeros(len(of.rows), rank, 1536)

    found = answers.answer(batch, {"svd": nothing}, [1, 2], {"score": brightness}, {})
    raw = dataset[batch.rows.tolist()].double().mean((1, 2))
    for i, row in enumerate(batch.rows.tolist()):
        assert set(found[row]) == {"full_tokens", "svd, rank 1", "svd, rank 2"}
        assert found[row]["full_tokens"]["score"] == pytest.approx(float(raw[i]), abs=1e-4)
        mean = float(batch.mean[i].double().mean())
        assert found[row]["svd, rank 2"]["score"] == pytest.approx(mean, abs=1e-4)


def test_a_head_that_generates_nothing_is_refused_with_what_to_type_instead(saliency):
    with pytest.raises(InputError, match="generates no answers.*compare_svd_nn.py"):
        answers.wanted_scores(saliency, boxes=False)


def test_what_each_of_several_codecs_has_seen_is_known(tmp_path):
    """Only the last folder's codec was asked before."""
    coded = {}
    for i in range(3):
        hashes = [f"{i}" * 64] if i < 2 else ()
        codec = Codec.fit([(steep_tokens(8, 24, 48, seed=i), (4, 6))], image_hashes=hashes)
        codec.save(tmp_path / f"{i}.safetensors")
        coded[f"folder {i}"] = SimpleNamespace(codec=codec)
    seen = list(answers.seen_by_codecs(coded | {"finer": coded["folder 0"]}).values())
    assert [one and one["image_sha256"] for one in seen] == [["0" * 16], ["1" * 16], None]
