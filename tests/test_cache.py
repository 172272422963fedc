import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import edit_manifest, extract
from safetensors.torch import load_file

from encoders.towers import DemoEncoder
from lowrank_tokens import cache_writer
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.cache_writer import FeatureCacheWriter
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import box_in_view
from lowrank_tokens.linalg import denormalise, exact_singular_values, normalise
from qwenvl_dataloader import (
    EpochSampler,
    RealQwenVLDataset,
    create_data_loaders_real,
    split_by_group,
)
from training.checkpoint import cache_identity


def test_normalisation_is_layer_norm_without_affine_and_can_be_undone():
    raw = 100 * torch.randn(2, 5, 30) + 7
    x, mean, std = normalise(raw)
    expected = torch.nn.functional.layer_norm(raw, (30,), eps=1e-6)
    assert torch.allclose(x, expected, atol=1e-5)
    assert torch.allclose(denormalise(x, mean, std), raw, rtol=1e-5, atol=1e-4)
    assert normalise(torch.ones(1, 2, 30))[0].abs().max() == 0  # constant tokens do not blow up


def test_parts_share_no_group_and_cover_every_row():
    groups = [f"photo {i % 41}" for i in range(328)]
    split = split_by_group(groups)
    rows = (split.train, split.val, split.test)
    parts = [{groups[row] for row in part.tolist()} for part in rows]
    assert [len(part) for part in parts] == [25, 8, 8]
    assert set.union(*parts) == set(groups)
    assert sum(map(len, rows)) == 328
    assert split.part_of(int(split.test[0])) == "test"


def test_the_split_is_80_10_10_where_there_are_enough_groups_and_does_not_depend_on_row_order():
    groups = [str(i) for i in range(1000)]
    split = split_by_group(groups)
    assert [len(p) for p in (split.train, split.val, split.test)] == [800, 100, 100]
    backwards = split_by_group(groups[::-1])
    assert {groups[i] for i in split.test} == {groups[::-1][i] for i in backwards.test}
    assert split.hash != backwards.hash


def test_too_few_groups_are_refused():
    with pytest.raises(InputError, match="at least 3"):
        split_by_group(["a", "b", "a"])


def test_the_split_of_a_cache_does_not_depend_on_the_seed(tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    loaders = [create_data_loaders_real(dataset, 4, seed=seed) for seed in (0, 1)]
    for part in range(3):
        rows = [sorted(torch.cat([b.rows for b in ls[part]]).tolist()) for ls in loaders]
        assert rows[0] == rows[1]
    orders = [torch.cat([b.rows for b in ls.train]).tolist() for ls in loaders]
    assert orders[0] != orders[1]


def test_every_user_of_a_cache_gets_the_same_normalised_tokens(tiny_cache):
    lazy, resident = RealQwenVLDataset(tiny_cache), RealQwenVLDataset(tiny_cache)
    assert resident.keep_resident(torch.device("cpu"))
    rows = [5, 0, 31]
    assert torch.equal(lazy[rows], resident[rows])
    shards = [load_file(path)["features"] for path in sorted(tiny_cache.glob("features-*"))]
    tokens = torch.cat(shards).unflatten(0, (-1, lazy.num_tokens))
    assert torch.equal(lazy[rows], tokens[rows])
    for batch in create_data_loaders_real(resident, 4).test:
        assert torch.equal(batch.x, normalise(lazy[batch.rows])[0])
        assert torch.allclose(batch.singular_values, exact_singular_values(batch.x))


def test_an_epoch_s_order_depends_on_seed_and_epoch_alone_and_can_be_entered_anywhere():
    rows = torch.arange(10, 33)
    first, second = EpochSampler(rows, 4, shuffle_seed=1), EpochSampler(rows, 4, shuffle_seed=1)
    second.epoch = 3
    assert list(first) != list(second)
    list(first), torch.randn(5)
    first.epoch = 3
    whole = list(first)
    assert whole == list(second) and sorted(sum(whole, [])) == rows.tolist()
    second.start = 2
    assert list(second) == whole[2:]


def test_loading_draws_nothing_from_the_generator_that_dropout_uses(tiny_cache):
    loader = create_data_loaders_real(RealQwenVLDataset(tiny_cache), 4).train
    before = torch.get_rng_state()
    for _ in loader:
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_rows_keep_question_answer_box_and_what_the_encoder_saw(tiny_cache, tiny_data):
    dataset = RealQwenVLDataset(tiny_cache)
    source = pq.read_table(tiny_data / "data" / "train-00000-of-00001.parquet")
    record = dataset.image_record(7)
    assert record["question"] == source["question"][7].as_py()
    assert record["answers"] == source["answer"][7].as_py()
    assert record["bbox"] == source["bbox"][7].as_py()
    assert record["group"] == source["group"][7].as_py()
    assert dataset.thumbnail(7).size == (224, 224)
    x, y, w, h = box_in_view(record, "stretch")
    assert 0 <= x < x + w <= 1 and 0 <= y < y + h <= 1
    assert dataset.label.startswith("DEMO data")


def test_a_box_moves_with_the_padding():
    record = {"bbox": [10, 0, 20, 50], "width": 100, "height": 50}
    assert box_in_view(record, "stretch") == (0.1, 0, 0.2, 1)
    assert box_in_view(record, "pad") == (0.1, 0.25, 0.2, 0.5)
    assert box_in_view({**record, "bbox": None}, "pad") is None


def header(**changes):
    base = {"kind": "real", "encoder": {"id": "test"}, "num_tokens": 4, "feature_dim": 6}
    return {**base, "grid": [2, 2], "resize": "stretch", "split_by": "image", **changes}


def write(cache, features, shards=None):
    """Write all shards that are missing and the manifest, or only `shards`."""
    writer = FeatureCacheWriter(cache, header(), len(features))
    for shard in writer.shards_to_do() if shards is None else shards:
        rows = []
        for i in writer.rows_of(shard):
            row = dict.fromkeys(cache_writer.ROW_SCHEMA.names)
            rows.append(row | {"row_id": i, "group": str(i), "image_sha256": str(i)})
        part = features[[row["row_id"] for row in rows]]
        writer.write_shard(shard, part, rows, [])
    if shards is None:
        writer.finish()


def test_an_interrupted_cache_goes_on_and_ends_byte_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 3)
    features = torch.randn(11, 4, 6)
    write(tmp_path / "whole", features)
    for shards in ([], [2], [0, 1]):  # as processes that work side by side leave it
        write(tmp_path / "parts", features, shards)
        with pytest.raises(InputError, match="interrupted"):
            RealQwenVLDataset(tmp_path / "parts")
    (tmp_path / "parts" / ".features-00003.safetensors.99.tmp").write_bytes(b"torn")
    write(tmp_path / "parts", features)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in names:
        same = (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
        assert same, name
    assert torch.equal(RealQwenVLDataset(tmp_path / "whole")[[10]], features[10:].bfloat16())


def test_another_encoder_cannot_go_on_with_a_cache_that_was_begun(tmp_path):
    FeatureCacheWriter(tmp_path, header(), 3)
    with pytest.raises(InputError, match="resize = stretch, now it is pad"):
        FeatureCacheWriter(tmp_path, header(resize="pad"), 3)


def test_a_finished_cache_is_only_replaced_when_asked(tmp_path):
    write(tmp_path, torch.randn(3, 4, 6))
    with pytest.raises(InputError, match="name another folder, or overwrite it"):
        FeatureCacheWriter(tmp_path, header(), 3)
    FeatureCacheWriter(tmp_path, header(resize="pad"), 3, overwrite=True)
    assert not (tmp_path / "manifest.json").exists()


def test_non_finite_features_are_refused_with_their_row(tmp_path):
    features = torch.randn(2, 4, 6)
    features[1, 0, 0] = torch.inf
    with pytest.raises(InputError, match="row 1 are not finite"):
        write(tmp_path, features)


def test_extraction_lists_unreadable_images_and_encodes_repeated_ones_once(
    tiny_data, tmp_path, monkeypatch
):
    table = pq.read_table(tiny_data / "data" / "train-00000-of-00001.parquet").slice(0, 9)
    rows = table.to_pylist()
    for row, source in enumerate((0, 0, 3, 3, 6, 3, 6)):
        rows[row]["image"] = dict(table["image"][source].as_py())
    rows[7]["image"]["bytes"], rows[8]["image"] = b"no image", None
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "set" / "a.parquet")
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 3)
    encoded = []
    original = DemoEncoder.encode
    monkeypatch.setattr(
        DemoEncoder, "encode", lambda self, x: encoded.append(len(x)) or original(self, x)
    )
    extract(tmp_path, tmp_path / "set", tmp_path / "cache", "--batch_size", "2")
    assert sum(encoded) == 3
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert [s["row_id"] for s in dataset.manifest["skipped"]] == [7, 8]
    assert dataset.rows["row_id"].to_pylist() == list(range(7))
    x = dataset[list(range(7))]
    for same, different in (((0, 1), 2), ((2, 3), 4), ((2, 5), 6), ((4, 6), 0)):
        assert torch.equal(x[same[0]], x[same[1]])
        assert not torch.equal(x[same[0]], x[different])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c), "does not exist: make it with"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json does not exist"),
        (lambda c: (c / "manifest.json").write_text("{"), "is damaged"),
        (lambda c: edit_manifest(c, count=35), "do not add up"),
        (lambda c: edit_manifest(c, format=9), "format 9"),
        (lambda c: (c / "rows.parquet").unlink(), "rows.parquet is missing"),
        (lambda c: (c / "features-00000.safetensors").write_bytes(b"short"), "has 5 bytes"),
        (lambda c: (c / "singular_values.safetensors").write_bytes(b""), "has 0 bytes"),
        (lambda c: escape(c), "outside its folder"),
    ],
)
def test_a_broken_cache_is_refused_in_words(cache_copy, damage, message):
    damage(cache_copy)
    with pytest.raises(InputError, match=message):
        RealQwenVLDataset(cache_copy)


def escape(cache):
    shards = json.loads((cache / "manifest.json").read_text())["shards"]
    edit_manifest(cache, shards=[{**shards[0], "file": "../secret.safetensors"}])


def test_verify_finds_a_flipped_bit(cache_copy):
    assert RealQwenVLDataset(cache_copy).verify() == {}
    path = cache_copy / "features-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert RealQwenVLDataset(cache_copy).verify() == {
        "features-00000.safetensors": "does not match its sha256"
    }


def test_features_are_known_by_their_encoder_and_not_by_row_number(tiny_cache, cache_copy):
    before = cache_identity(RealQwenVLDataset(tiny_cache))
    edit_manifest(cache_copy, encoder={"id": "other", "weights_sha256": "0"})
    assert cache_identity(RealQwenVLDataset(cache_copy)) != before
