"""An extraction that was interrupted or is asked again, and --verify of what it wrote."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import hashes, manifest_of, picture, write_parquet
from safetensors.torch import load_file, save_file

import extract_features
from encoders import checkpoints
from encoders import towers as encoders
from lowrank_tokens import cache_writer
from lowrank_tokens import shards as shard_folder


@pytest.fixture
def mixed(tmp_path):
    """20 rows: repeated images, unreadable ones, questions."""
    cells = [picture(i % 7) for i in range(20)]
    cells[3] = cells[11] = cells[19] = b"unreadable"
    rows = {"image": cells, "question": [str(i) for i in range(20)]}
    write_parquet(tmp_path / "set" / "a.parquet", rows)
    return tmp_path / "set"


def interrupted(encode, data, monkeypatch, after: int) -> None:
    """Run the extraction into cache/ and break it off after some shards."""
    write_shard, seen = cache_writer.FeatureCacheWriter.write_shard, []

    def break_off(writer, *args):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(0)
        write_shard(writer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.FeatureCacheWriter, "write_shard", break_off)
        done = encode(data, "cache", "--batch_size", 3)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_extraction_ends_byte_identical(after, mixed, encode, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 4)
    assert encode(mixed, "whole", "--batch_size", 3).returncode == 0
    interrupted(encode, mixed, monkeypatch, after)
    assert encode(mixed, "cache", "--batch_size", 3).returncode == 0
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole")
    skipped = manifest_of(tmp_path / "cache")["skipped"]
    assert [entry["row_id"] for entry in skipped] == [3, 11, 19]


def other_weights(folder: Path) -> None:
    index = json.loads((folder / checkpoints.SHARD_INDEX).read_text())["weight_map"]
    path = folder / next(file for key, file in index.items() if "visual." in key)
    tensors = load_file(path)
    next(t for key, t in tensors.items() if "visual." in key).view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("state", ["interrupted", "finished"])
@pytest.mark.parametrize("change", ["size", "resize", "model", "weights", "data"])
def test_another_model_size_rule_or_data_set_is_refused_with_both_values(
    change, state, mixed, encode, qwen, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 4)
    if state == "finished":
        assert encode(mixed).returncode == 0
    else:
        interrupted(encode, mixed, monkeypatch, 2)
    before = hashes(tmp_path / "cache")
    folder = Path(shutil.copytree(qwen, tmp_path / "copies" / "small-qwen"))
    flags, expected = [], None
    if change == "size":
        flags, expected = ["--image_size", 140], "image_size = 112, now it is 140"
    elif change == "resize":
        flags, expected = ["--resize", "pad"], "resize = stretch, now it is pad"
    elif change == "model":
        folder = folder.rename(folder.with_name("other"))
        expected = "encoder.id = small-qwen, now it is other"
    elif change == "weights":
        other_weights(folder)
        old = encoders.load_encoder(str(qwen), device="cpu").weights_sha256
        new = encoders.load_encoder(str(folder), device="cpu").weights_sha256
        assert old != new
        expected = f"encoder.weights_sha256 = {old}, now it is {new}"
    else:
        write_parquet(mixed / "b.parquet", {"image": [picture(9)], "question": ["new"]})
        expected = "dataset_sha256 = "
    args = ["--dataset_dir", mixed, "--cache_dir", tmp_path / "cache", "--model", folder]
    args += ["--image_size", 112, "--batch_size", 3, *flags]
    done = script("extract_features.py", *args)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert hashes(tmp_path / "cache") == before
    if state == "finished":
        assert script("extract_features.py", *args, "--overwrite").returncode == 0
        assert hashes(tmp_path / "cache") != before


def test_an_interrupted_extraction_goes_on_only_with_its_device_precision_and_batch_size(
    mixed, encode, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 4)
    interrupted(encode, mixed, monkeypatch, 2)
    before = hashes(tmp_path / "cache")
    done = encode(mixed, "cache", "--batch_size", 4)
    assert done.returncode == 2 and "--batch_size = 3, now it is 4" in done.stderr
    for name, value, words in (
        ("dtype", torch.bfloat16, "dtype = float32, now it is bfloat16"),
        ("device", torch.device("cuda"), "--device = cpu, now it is cuda"),
    ):
        load = extract_features.load_encoder

        def other(*args, name=name, value=value, load=load, **options):
            encoder = load(*args, **options)
            setattr(encoder, name, value)
            return encoder

        with monkeypatch.context() as patch:
            patch.setattr(extract_features, "load_encoder", other)
            done = encode(mixed, "cache", "--batch_size", 3)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert hashes(tmp_path / "cache") == before
    assert encode(mixed, "cache", "--batch_size", 3).returncode == 0


def test_another_revision_of_a_hub_model_is_refused_with_both_values(
    mixed, qwen, tmp_path, monkeypatch, script
):
    revision = "aaa111"

    def opened(name):
        return checkpoints.read_checkpoint(qwen, revision)

    monkeypatch.setattr(encoders, "open_checkpoint", opened)
    args = ["--dataset_dir", mixed, "--cache_dir", tmp_path / "cache", "--model", "Qwen/some"]
    args += ["--image_size", 112]
    assert script("extract_features.py", *args).returncode == 0
    assert manifest_of(tmp_path / "cache")["encoder"]["revision"] == "aaa111"
    revision = "bbb222"
    done = script("extract_features.py", *args)
    assert done.returncode == 2
    assert "encoder.revision = aaa111, now it is bbb222" in done.stderr


def test_a_finished_cache_of_another_encoder_is_refused_before_a_hub_is_asked(
    tiny_data, cache_copy, monkeypatch, script
):
    monkeypatch.setattr(encoders, "open_checkpoint", lambda name: pytest.fail("asked"))
    done = script("extract_features.py", "--dataset_dir", tiny_data, "--cache_dir", cache_copy)
    assert done.returncode == 2 and "holds a finished cache (demo-dinov2" in done.stderr


def test_the_same_command_on_a_finished_cache_says_that_it_is_finished(mixed, encode):
    assert encode(mixed).returncode == 0
    done = encode(mixed)
    assert done.returncode == 2 and "holds a finished cache" in done.stderr


# ------------------------------------------------------------------------------------------ verify


@pytest.fixture
def cache(mixed, encode, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 8)
    assert encode(mixed).returncode == 0
    return tmp_path / "cache"


def test_verify_prints_one_screen_about_the_whole_cache(cache, script):
    done = script("extract_features.py", "--verify", "--cache_dir", cache)
    assert done.returncode == 0
    assert done.stdout.count("\n") < 12 and max(map(len, done.stdout.splitlines())) < 250
    for words in (
        "17, of 7 different images",
        "3 skipped",
        "16 × 64, bfloat16",
        "3 shards",
        "small-qwen",
        "split      by image",
        "rank  8: 0.",
        "cache is whole",
    ):
        assert words in done.stdout, words


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def put(cache: Path, name: str, tensors: dict) -> None:
    """Replace a shard and give the manifest its size and hash, as a wrong writer would."""
    save_file(tensors, cache / name)
    manifest = manifest_of(cache)
    for entry in [*manifest["shards"], manifest["singular_values"]]:
        if entry["file"] == name:
            data = (cache / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (cache / "manifest.json").write_text(json.dumps(manifest))


SHARD = "features-00001.safetensors"
NAN = torch.zeros(7 * 16, 64).index_fill(1, torch.tensor([5]), torch.nan)


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (lambda c: flip_a_bit(c / SHARD), SHARD, "does not match its sha256"),
        (lambda c: flip_a_bit(c / "rows.parquet"), "rows.parquet", "damaged"),
        (
            lambda c: flip_a_bit(c / "singular_values.safetensors"),
            "singular_values.safetensors",
            "its sha256",
        ),
        (lambda c: (c / SHARD).unlink(), SHARD, "is missing"),
        (lambda c: (c / SHARD).write_bytes(b"x"), SHARD, "has 1 bytes"),
        (lambda c: put(c, SHARD, {"features": NAN.bfloat16()}), SHARD, "holds NaN or Inf"),
        (lambda c: put(c, SHARD, {"features": torch.zeros(7 * 16, 64)}), SHARD, "torch.float32"),
        (lambda c: put(c, SHARD, {"features": NAN[:63].bfloat16()}), SHARD, "(63, 64, "),
        (lambda c: put(c, SHARD, {"other": NAN.bfloat16()}), SHARD, "damaged"),
        (
            lambda c: put(
                c,
                "singular_values.safetensors",
                {"singular_values": torch.full((17, 16), torch.nan).double()},
            ),
            "singular_values.safetensors",
            "holds NaN or Inf",
        ),
    ],
)
def test_verify_names_the_damaged_file_in_one_line(damage, name, reason, cache, script):
    damage(cache)
    done = script("extract_features.py", "--verify", "--cache_dir", cache)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert name in done.stderr and reason in done.stderr, done.stderr
