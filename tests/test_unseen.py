"""No judge of test images counts one that network, metric or codec was fitted to."""

from types import SimpleNamespace

import pytest
import tiny
import torch

import compare_svd_nn
from experiments import benchmark, fit_codec
from heads.metric import TaskMetric, cache_hashes, save_metric
from lowrank_tokens.cache_writer import write_cache
from lowrank_tokens.codec import Codec
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real, split_by_group
from training.unseen import fitted_images, images_of, unseen_test


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


def test_of_tokens_without_images_overlap_is_unknown_unless_groups_have_names_in_common(tmp_path):
    """Without hashes and with other names of groups it was said to be none."""
    datasets = []
    for name, group in (("own", "a"), ("kin", "a"), ("other", "b")):
        tokens = [{"tokens": one, "grid": (4, 4)} for one in tiny.steep_tokens(12)]
        groups = [f"{group}{i}" for i in range(12)]
        write_cache(tmp_path / name, tokens, encoder_id="my-vit", groups=groups)
        datasets.append(RealQwenVLDataset(tmp_path / name))
    seen = fitted_images(datasets[0])
    judged = [unseen_test(create_data_loaders_real(d, 4), {"network": seen}) for d in datasets]
    assert [one.left_out["network"] for one in judged] == [0, 0, None]


def test_where_everything_was_seen_there_is_nothing_to_judge(loaders):
    seen = images_of(loaders.test.dataset, loaders.test.sampler.rows)
    with pytest.raises(InputError, match="the codec was fitted to every test image"):
        unseen_test(loaders, {"network": None, "codec": seen})


@pytest.mark.parametrize("known", [True, False])
def test_a_codec_in_a_metric_has_seen_what_the_metric_has(known, tmp_path, script):
    """Its own images alone were stored: an image that only the metric has seen was judged."""
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(40))
    dataset = RealQwenVLDataset(cache)
    info = {"head": "saliency", "head_sha256": "0" * 64, "cache": cache_hashes(dataset)}
    info |= {"shrinkage": 0.1, "scale": 1.0, "images": 3, "probes": 1}
    of_metric = images_of(dataset, dataset.split.val[:3])
    metric = TaskMetric(torch.eye(48).double(), info | ({"seen": of_metric} if known else {}))
    save_metric(tmp_path / "metric.safetensors", metric)
    done = script(
        *("experiments.fit_codec", "--cache_dir", cache, "--images", 20, "--device", "cpu"),
        *("--metric", tmp_path / "metric.safetensors", "--out", tmp_path / "codec.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    seen = Codec.load(tmp_path / "codec.safetensors").seen
    loaders = create_data_loaders_real(dataset, 4)
    if not known:
        assert seen is None
        assert "images of the codec unknown" in unseen_test(loaders, {"codec": seen}).words
        return
    own = images_of(dataset, fit_codec.spread(dataset.split.train, 20))
    assert seen == {name: sorted(own[name] + of_metric[name]) for name in own}
    # as if the images of the metric were another cache's test images
    loaders = loaders._replace(test=loaders.test.only(dataset.split.val))
    judged = unseen_test(loaders, {"codec": seen})
    assert judged.left_out == {"codec": 3}


def test_a_training_file_under_a_second_group_is_judged_by_nobody(tmp_path):
    """PCA and the readers' probe were judged on it where the network was another cache's."""
    tokens, folder = tiny.steep_tokens(40), tmp_path / "cache"
    split = split_by_group([f"group {i}" for i in range(40)])
    twice = int(split.test[2])
    rows = [tiny.row(i) for i in range(40)]
    rows[twice]["image_sha256"] = rows[int(split.train[0])]["image_sha256"]
    writer = tiny.begin_cache(folder, tokens)
    for shard in writer.shards_to_do():
        own = slice(writer.rows_of(shard).start, writer.rows_of(shard).stop)
        writer.write_shard(shard, tokens[own], rows[own], [])
    writer.finish()
    dataset = RealQwenVLDataset(folder)
    of_another_cache = {"images": {"image_sha256": ["0" * 16], "group": ["elsewhere"]}}
    trained = SimpleNamespace(dataset=dataset, device="cpu", state=of_another_cache)
    judged = compare_svd_nn.unseen_images(SimpleNamespace(batch_size=4), trained, None)
    assert judged.left_out == {"network": 0, "references": 1}
    loaders = create_data_loaders_real(dataset, 4)
    _, timed = benchmark.network_methods(tmp_path / "none", loaders, [2])
    for found in (judged.loaders, timed):
        assert set(found.test.sampler.rows.tolist()) == set(split.test.tolist()) - {twice}
