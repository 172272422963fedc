"""Features of an older cache (--import_pt): what is taken, what is refused, what becomes of it."""

import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, hashes, manifest_of

from encoders import pt_import
from lowrank_tokens import cache_writer
from lowrank_tokens import shards as shard_folder
from qwenvl_dataloader import RealQwenVLDataset


@pytest.fixture
def old_cache(tmp_path):
    """12 files of 6 x 10 in every float type and both shapes; number 8 repeats number 2."""
    folder = tmp_path / "old"
    folder.mkdir()
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        x = torch.randn(6, 10, generator=generator).to(types[i % 4])
        if i == 8:
            x = torch.load(folder / "features_2.pt").float()
        torch.save(x[None] if i % 3 == 0 else x, folder / f"features_{i}.pt")
    return folder


def do_import(script, tmp_path, folder, *flags):
    args = ["--import_pt", folder, "--cache_dir", tmp_path / "cache", *flags]
    return script("extract_features.py", *args)


def test_imported_features_are_the_files_values_in_bfloat16(old_cache, tmp_path, script):
    done = do_import(script, tmp_path, old_cache)
    assert done.returncode == 0, done.stderr
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert dataset[range(12)].shape == (12, 6, 10)
    for i in range(12):
        expected = torch.load(old_cache / f"features_{i}.pt").reshape(6, 10).bfloat16()
        assert torch.equal(dataset[[i]][0], expected)
    manifest = dataset.manifest
    assert manifest["kind"] == "imported" and manifest["split_by"] == "row"
    assert manifest["imported_dtypes"] == dict.fromkeys(
        ("bfloat16", "float16", "float32", "float64"), 3
    )
    assert manifest["skipped"] == [] and "no image hashes" in manifest["split_note"]
    assert "split      by row" in done.stdout and not dataset.label.startswith("DEMO")
    assert dataset.thumbnail(0) is None


def test_rows_with_equal_features_stay_in_one_part_of_the_split(old_cache, tmp_path, script):
    do_import(script, tmp_path, old_cache)
    dataset = RealQwenVLDataset(tmp_path / "cache")
    groups = dataset.rows["group"].to_pylist()
    assert groups[2] == groups[8] and len(set(groups)) == 11
    assert dataset.split.part_of(2) == dataset.split.part_of(8)


def test_gaps_and_files_that_cannot_be_used_are_listed_and_the_others_imported(
    old_cache, tmp_path, script
):
    save = {
        1: torch.randn(5, 10),
        3: {"features": torch.randn(6, 10)},
        4: torch.full((6, 10), torch.inf),
        5: torch.ones(6, 10, dtype=torch.int64),
        6: torch.randn(2, 6, 10),
    }
    for i, value in save.items():
        torch.save(value, old_cache / f"features_{i}.pt")
    (old_cache / "features_7.pt").write_bytes(b"garbage")
    data = (old_cache / "features_10.pt").read_bytes()
    (old_cache / "features_10.pt").write_bytes(data[: len(data) // 2])
    (old_cache / "features_0.pt").unlink()
    torch.save(torch.randn(6, 10), old_cache / "features_20.pt")
    torch.save(torch.randn(6, 10), old_cache / "other.pt")
    done = do_import(script, tmp_path, old_cache)
    assert done.returncode == 0, done.stderr
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert dataset.rows["row_id"].to_pylist() == [2, 8, 9, 11, 20]
    reasons = [(entry["row_id"], entry["reason"]) for entry in dataset.manifest["skipped"]]
    for (row, reason), (expected_row, words) in zip(
        reasons,
        [
            (1, "shape (5, 10), 5 files are of (6, 10)"),
            (3, "holds a dict"),
            (4, "holds NaN or Inf"),
            (5, "holds torch.int64"),
            (6, "of shape (2, 6, 10)"),
            (7, "is damaged"),
            (10, "is damaged"),
            (12, "features_12.pt to features_19.pt missing"),
        ],
        strict=True,
    ):
        assert row == expected_row and words in reason, (row, reason)
    assert done.stdout.count("skipped row") == 5 and "and 3 more" in done.stdout
    assert "15 skipped" in done.stdout  # 7 files and a gap of 8


def test_numbers_start_at_0_or_at_1_and_what_is_missing_from_there_is_a_gap():
    assert pt_import._gaps([1, 2, 3]) == []
    first = {"row_id": 0, "count": 2, "reason": "features_0.pt to features_1.pt missing"}
    assert pt_import._gaps([2, 3]) == [first]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "torch.save before 1.6"])
def test_a_pickle_with_a_payload_runs_no_code(how, old_cache, tmp_path, script):
    path, planted = old_cache / "features_5.pt", tmp_path / "planted"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(planted), protocol=2))
    else:
        torch.save(Payload(planted), path, _use_new_zipfile_serialization=how == "torch.save")
    done = do_import(script, tmp_path, old_cache)
    assert done.returncode == 0 and "features_5.pt is damaged, or holds objects" in done.stdout
    assert not planted.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert planted.exists()  # it would have run


def test_files_are_read_one_at_a_time(tmp_path, script, monkeypatch):
    (tmp_path / "old").mkdir()
    for i in range(30):
        torch.save(torch.randn(6, 10), tmp_path / "old" / f"features_{i}.pt")
    read, alive, most = pt_import.read_pt, weakref.WeakSet(), []

    def watched(path):
        tokens = read(path)
        alive.add(tokens)
        most.append(len(alive))
        return tokens

    monkeypatch.setattr(pt_import, "read_pt", watched)
    assert do_import(script, tmp_path, tmp_path / "old").returncode == 0
    assert len(most) == 60 and max(most) <= 2  # the one at hand, and the one before it


def test_an_interrupted_import_ends_byte_identical(old_cache, tmp_path, script, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 3)
    (old_cache / "features_4.pt").unlink()
    assert do_import(script, tmp_path, old_cache).returncode == 0
    (tmp_path / "cache").rename(tmp_path / "whole")
    write_shard = cache_writer.FeatureCacheWriter.write_shard

    def break_off(writer, shard, *args):
        if shard == 2:
            raise KeyboardInterrupt
        write_shard(writer, shard, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.FeatureCacheWriter, "write_shard", break_off)
        assert do_import(script, tmp_path, old_cache).returncode == 130
    assert do_import(script, tmp_path, old_cache).returncode == 0
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole")


def test_other_features_cannot_go_on_with_an_import_or_pass_for_it(old_cache, tmp_path, script):
    assert do_import(script, tmp_path, old_cache).returncode == 0
    torch.save(torch.randn(6, 10), old_cache / "features_0.pt")
    done = do_import(script, tmp_path, old_cache)
    assert done.returncode == 2 and "encoder.features_sha256 = " in done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no features_<i>.pt"),
        (["features_1.pt", "features_01.pt"], "are both number 1"),
        (["features_1.pt"], "none of 1 files can be read, the first: features_1.pt is damaged"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused(files, message, tmp_path, script):
    (tmp_path / "old").mkdir()
    for name in files:
        (tmp_path / "old" / name).write_bytes(b"garbage")
    done = do_import(script, tmp_path, tmp_path / "old")
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error:")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--import_pt old --dataset_dir x", "--dataset_dir"),
        ("--import_pt old --model x --demo", "--demo, --model"),
        ("--import_pt old --image_size 448", "--image_size"),
        ("--import_pt old --batch_size 16", "--batch_size"),
        ("--import_pt old --verify", "--import_pt"),
        ("--verify --dataset_dir x", "--dataset_dir"),
        ("--verify --overwrite", "--overwrite"),
        ("--demo --model x", "--model"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(flags, named, tmp_path, script):
    done = script("extract_features.py", *flags.split())
    assert done.returncode == 2 and named in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("tokens", "grid"), [(15, [1, 15]), (16, [4, 4])])
def test_an_imported_cache_can_be_trained_on_compared_drawn_and_factorised(
    tokens, grid, tmp_path, script
):
    (tmp_path / "old").mkdir()
    for i in range(12):
        torch.save(torch.randn(1, tokens, 40), tmp_path / "old" / f"features_{i}.pt")
    assert do_import(script, tmp_path, tmp_path / "old").returncode == 0
    assert manifest_of(tmp_path / "cache")["grid"] == grid
    where = ["--cache_dir", tmp_path / "cache", "--results_dir", tmp_path / "results"]
    for name, *flags in (
        ("train_real_data.py", *TRAIN, "--log_dir", tmp_path / "log"),
        ("compare_svd_nn.py",),
        ("visualize_svd_nn.py",),
        ("factorize.py", "--rank", 3, "--out", tmp_path / "factors"),
    ):
        done = script(name, *where, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("imported features")
    first = int(RealQwenVLDataset(tmp_path / "cache").split.test[0])
    names = {path.name for path in (tmp_path / "results/ResMLP").glob("*.png")}
    assert {f"image_{first}_spatial_error_comparison.png", "error_heatmap.png"} < names
