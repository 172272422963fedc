"""Data that cannot be used is refused early, and an interrupted or slow extraction says so."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import manifest_of, picture, write_parquet
from PIL import Image
from safetensors.torch import load_file, save_file

import extract_features
from encoders import extraction
from encoders.towers import load_encoder
from lowrank_tokens import cache as feature_cache
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset


def write_photos(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(picture(i))
    return folder


@pytest.fixture
def tiny_encoder(monkeypatch):
    """The demo's encoder is replaced by one that costs no time."""
    encoder = tiny.TinyEncoder()
    monkeypatch.setattr(extract_features, "load_encoder", lambda *_, **__: encoder)
    return encoder


def demo(script, tmp_path, *flags):
    where = ["--dataset_dir", tmp_path / "photos", "--cache_dir", tmp_path / "cache"]
    return script("extract_features.py", "--demo", *where, *flags)


def test_one_image_many_times_is_refused_before_anything_is_encoded(
    tiny_encoder, tmp_path, script, monkeypatch
):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.png").write_bytes(picture(i % 2))
    monkeypatch.setattr(tiny_encoder, "encode", None)  # would raise
    done = demo(script, tmp_path)
    assert done.returncode == 2 and "has 2 different image(s)" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_damage_that_leaves_too_few_images_is_named_and_leaves_no_cache(
    tiny_encoder, tmp_path, script
):
    folder = write_photos(tmp_path / "photos", 2)
    for i in range(4):
        (folder / f"bad{i}.png").write_bytes(b"no image %d" % i)
    done = demo(script, tmp_path)
    assert done.returncode == 2 and "4 skipped, row 2: unreadable image: bad0.png" in done.stderr
    assert not (tmp_path / "cache/manifest.json").exists()


def test_data_without_any_readable_image_names_the_reason_of_the_first(
    tiny_encoder, tmp_path, script
):
    """The line was "the data set has no readable image"."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        (tmp_path / "photos" / f"bad{i}.png").write_bytes(b"no image %d" % i)
    done = demo(script, tmp_path)
    assert done.returncode == 2 and "(row 0: unreadable image: bad0.png" in done.stderr
    assert not (tmp_path / "cache/manifest.json").exists()


def test_an_image_with_features_that_are_not_finite_is_skipped_like_a_damaged_one(
    tiny_encoder, tmp_path, script, monkeypatch
):
    folder = write_photos(tmp_path / "photos", 20)
    shutil.copy(folder / "003.png", folder / "copy.png")  # in another shard than the first
    encode, seen = tiny_encoder.encode, iter(range(100))

    def fails(pixels):
        tokens = encode(pixels)
        for image in tokens:
            if next(seen) == 3:
                image[0, 0] = torch.nan
        return tokens

    monkeypatch.setattr(tiny_encoder, "encode", fails)
    done = demo(script, tmp_path)
    assert done.returncode == 0, done.stderr
    skipped = manifest_of(tmp_path / "cache")["skipped"]
    assert [entry["row_id"] for entry in skipped] == [3, 20]
    assert all("not finite" in entry["reason"] for entry in skipped)
    assert len(RealQwenVLDataset(tmp_path / "cache")) == 19


def test_an_interrupted_extraction_keeps_its_first_images_and_says_how_to_go_on(
    tiny_encoder, tmp_path, script, monkeypatch
):
    write_photos(tmp_path / "photos", 40)
    encode, calls = tiny_encoder.encode, iter(range(100))

    def interrupted(pixels):
        if next(calls) == 18:
            raise KeyboardInterrupt
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_encoder, "encode", interrupted)
        done = demo(script, tmp_path, "--overwrite")
    assert done.returncode == 130
    said = f"32 of 40 images are in {tmp_path}/cache: go on with the same command without --overw"
    assert said in done.stdout
    done = demo(script, tmp_path)
    assert done.returncode == 0 and "going on after 32 images" in done.stdout


def test_all_tokens_are_counted_before_and_time_is_estimated_after_the_first_batch(
    tiny_encoder, tmp_path, script, monkeypatch
):
    write_photos(tmp_path / "photos", 20)
    monkeypatch.setattr(extraction, "LEAST_ESTIMATE", 0)
    done = demo(script, tmp_path)
    assert "16 tokens × 12 an image, 320 tokens in all" in done.stdout
    assert "the first 32 of 320 tokens took " in done.stdout


def test_native_photographs_have_as_many_tokens_as_the_demos_encoder_was_made_for(script, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):  # of 24 megapixels
        file = io.BytesIO()
        Image.new("RGB", (6000, 4000), (9 * i, 0, 0)).save(file, "PNG")
        (tmp_path / "photos" / f"{i}.png").write_bytes(file.getvalue())
    args = extract_features.arguments.parse(
        extract_features.get_args_parser(), ["--demo", "--resize", "native"]
    )
    extract_features.check_flags(args)
    assert args.max_pixels == 1369 * 28**2


# ----------------------------------------------------------------------------------- checkpoints


def test_a_lora_adapter_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="is a LoRA adapter, no whole model: merge it"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_checkpoint_of_pickles_alone_is_named_as_one(qwen, tmp_path):
    folder = Path(shutil.copytree(qwen, tmp_path / "small"))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin, a pickle, and no safetensors"):
        load_encoder(str(folder), device="cpu")


def test_quantised_vision_weights_are_named_and_a_quantised_language_model_is_no_harm(
    qwen, tmp_path
):
    folder = Path(shutil.copytree(qwen, tmp_path / "small"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    load_encoder(str(folder), device="cpu")  # its vision tensors are as they were
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        codes = {k: v for k, v in tensors.items() if "visual.blocks.0.mlp" in k and v.dim() == 2}
        tensors |= {key: value.to(torch.uint8) for key, value in codes.items()}
        save_file(tensors, path)
    with pytest.raises(InputError, match=r"vision weights are quantised \(bitsandbytes\)"):
        load_encoder(str(folder), device="cpu")


# -------------------------------------------------------------------------- folders that are taken


def test_other_images_on_top_of_a_cache_suggest_another_folder_first(encode, tmp_path):
    for name, start in (("a", 0), ("b", 5)):
        images = [picture(start + i) for i in range(4)]
        write_parquet(tmp_path / name / "x.parquet", {"image": images})
    assert encode(tmp_path / "a").returncode == 0
    done = encode(tmp_path / "b")
    assert done.returncode == 2
    assert done.stderr.endswith("name another folder, or overwrite it\n")


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"kind": "else"}'])
def test_a_folder_that_is_no_cache_is_never_overwritten(content, encode, tmp_path):
    write_parquet(tmp_path / "set/x.parquet", {"image": [picture(i) for i in range(4)]})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/manifest.json").write_text(content)
    for flags in ((), ("--overwrite",)):
        done = encode(tmp_path / "set", "cache", *flags)
        assert done.returncode == 2 and "name another folder" in done.stderr
        assert "overwrite" not in done.stderr
    assert (tmp_path / "cache/manifest.json").read_text() == content


def test_a_native_cache_on_a_read_only_mount_gives_its_singular_values(
    ragged_cache, tmp_path, monkeypatch, capsys
):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    for path in cache.glob("spectra*"):
        path.unlink()
    before = sorted(path.name for path in cache.iterdir())
    monkeypatch.setattr(feature_cache.os, "access", lambda path, mode: False)
    values = RealQwenVLDataset(cache).singular_values
    assert torch.equal(values, RealQwenVLDataset(ragged_cache).singular_values)
    assert sorted(path.name for path in cache.iterdir()) == before
    assert "is read-only: singular values are computed and not kept" in capsys.readouterr().out
