"""No judge of test images counts one that network, metric or codec was fitted to."""

import pytest
import torch

from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from training.unseen import images_of, unseen_test


@pytest.fixture
def loaders(tiny_cache):
    return create_data_loaders_real(RealQwenVLDataset(tiny_cache), 4)


def test_images_are_left_out_by_hash_or_by_group_and_counted_for_each_that_has_seen_them(loaders):
    dataset, rows = loaders.test.dataset, loaders.test.sampler.rows
    by_hash = images_of(dataset, rows[:1]) | {"group": []}
    by_group = images_of(dataset, rows[1:2]) | {"image_sha256": []}
    group = dataset.rows["group"].take(rows.tolist()).to_pylist()
    kin = [row for row, name in zip(rows.tolist(), group, strict=True) if name == group[1]]
    judged = unseen_test(loaders, {"network": by_hash, "metric": by_group, "codec": None})
    assert judged.left_out == {"network": 1, "metric": len(kin), "codec": None}
    left = set(judged.loaders.test.sampler.rows.tolist())
    assert left == set(rows.tolist()) - {int(rows[0]), *kin}
    assert "1 test images left out that the network has seen" in judged.words
    assert "overlap with the images of the codec unknown" in judged.words


def test_the_split_of_the_same_cache_has_nothing_in_common(loaders):
    dataset = loaders.test.dataset
    seen = images_of(dataset, torch.cat([dataset.split.train, dataset.split.val]))
    judged = unseen_test(loaders, {"network": seen})
    assert judged.left_out == {"network": 0} and judged.words == ""
    assert judged.loaders.test is loaders.test


def test_where_everything_was_seen_there_is_nothing_to_judge(loaders):
    seen = images_of(loaders.test.dataset, loaders.test.sampler.rows)
    with pytest.raises(InputError, match="the codec was fitted to every test image"):
        unseen_test(loaders, {"network": None, "codec": seen})
