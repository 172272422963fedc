"""Images at native resolution: their sizes, their tokens, and the cache that extraction makes."""

import io
import random

import numpy as np
import pytest
import torch
from conftest import extract, hashes, manifest_of, write_parquet
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import extract_features
from encoders.image_sources import UnreadableImage
from encoders.native_size import PixelRange, native_size, size_in
from encoders.towers import load_encoder
from experiments import compare_bytes
from lowrank_tokens import cache_writer
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.grids import box_in_view
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import RealQwenVLDataset

LIMITS = PixelRange(4 * 28**2, 30 * 28**2)
NATIVE = ["--resize", "native", "--max_pixels", str(LIMITS.most)]


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """Return a smooth image of that size, PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_sides_are_those_of_the_library_s_smart_resize_for_a_thousand_sizes():
    draw = random.Random(0)
    changed = 0
    for _ in range(1000):
        width, height = (round(2 ** draw.uniform(2, 13)) for _ in range(2))
        if max(width, height) > 200 * min(width, height):
            continue
        step = draw.choice((16, 28, 32))
        least = draw.randint(1, 400) * step**2
        limits = PixelRange(least, least + draw.randint(0, 16000) * step**2 // 3)
        height_, width_ = smart_resize(height, width, step, *limits)
        assert native_size(width, height, step, limits) == (width_, height_), (width, height)
        changed += width_ * height_ != round(width / step) * round(height / step) * step**2
    assert 200 < changed < 900  # both ways through the function


def test_an_image_of_extreme_shape_is_refused_as_the_library_does():
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(10, 2001)
    with pytest.raises(UnreadableImage, match="2001 × 10 pixels"):
        native_size(2001, 10, 28, LIMITS)
    assert native_size(2000, 10, 28, LIMITS)[1] == 28


@pytest.fixture(scope="module")
def demo():
    return load_encoder("demo", device="cpu", image_size=LIMITS, resize="native")


@torch.no_grad()
def test_the_demo_s_tokens_of_any_grid_are_those_of_positions_fitted_as_dinov2_does(demo):
    image = Image.open(io.BytesIO(photo(150, 90)))
    pixels = demo.preprocess(image)
    assert pixels.shape == (3, 84, 140) and demo.grid_of(pixels) == (3, 5)
    tokens = demo.encode(pixels[None])
    assert tokens.shape == (1, 15, 1536)
    # by hand: the 37 × 37 table to 6 × 10 patches, the class token's apart
    backbone, seen = demo.backbone, pixels[None]
    table = backbone.embeddings.position_embeddings
    grid = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    fitted = torch.nn.functional.interpolate(grid, size=(6, 10), mode="bicubic")
    patches = backbone.embeddings.patch_embeddings(seen) + fitted.flatten(2).mT
    first = backbone.embeddings.cls_token + table[:, :1]
    hidden = torch.cat([first, patches], dim=1)
    for layer in backbone.encoder.layer:
        hidden = layer(hidden)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
    plain = backbone.layernorm(hidden)[:, 1:].unflatten(1, (6, 10))
    merged = plain.unflatten(1, (3, 2)).unflatten(3, (5, 2)).transpose(2, 3)
    assert torch.allclose(tokens, merged.reshape(1, 15, 1536), atol=1e-4)


def test_at_its_own_square_native_gives_the_tokens_of_stretch(demo):
    image = Image.open(io.BytesIO(photo(112, 112)))
    square = load_encoder("demo", device="cpu", image_size=112)
    assert torch.equal(demo.preprocess(image), square.preprocess(image))


@torch.no_grad()
def test_the_qwen_tower_s_tokens_are_the_whole_model_s_with_the_library_s_own_resize(qwen):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    limits = {"min_pixels": LIMITS.least, "max_pixels": LIMITS.most}
    processor = Qwen2VLImageProcessorPil.from_pretrained(qwen, **limits)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen).eval()
    encoder = load_encoder(str(qwen), device="cpu", image_size=LIMITS, resize="native")
    for width, height in ((150, 90), (60, 400), (20, 15), (300, 310)):
        image = Image.open(io.BytesIO(photo(width, height)))
        batch = processor(images=image, return_tensors="pt")
        expected = model.model.get_image_features(**batch).pooler_output[0]
        pixels = encoder.preprocess(image)
        rows, columns = encoder.grid_of(pixels)
        assert batch["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
        assert torch.allclose(encoder.encode(pixels[None])[0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """14 images: four sizes, a copy, one that is no image, one of an extreme shape."""
    sizes = [(150, 90), (90, 150), (300, 200), (20, 20)]
    cells = [photo(*sizes[i % 4], seed=i) for i in range(11)]
    cells += [cells[2], b"no image", photo(2100, 10)]
    folder = tmp_path_factory.mktemp("photographs")
    box = [[10.0, 5.0, 10.0, 10.0]] * len(cells)
    write_parquet(folder / "set" / "a.parquet", {"image": cells, "bbox": box})
    extract_native(folder, "whole")
    return folder


def extract_native(folder, name, *flags, patch=pytest.MonkeyPatch):
    with patch.context() as change:
        change.setattr(shard_folder, "ROWS_PER_SHARD", 6)
        square = ["--demo", "--dataset_dir", str(folder / "set"), *NATIVE]
        args = [*square, "--cache_dir", str(folder / name), *flags]
        from common import arguments

        extract_features.main(arguments.parse(extract_features.get_args_parser(), args))


def test_each_image_has_its_own_grid_and_its_tokens_alone(photographs, demo):
    dataset = RealQwenVLDataset(photographs / "whole")
    expected = [(3, 5), (5, 3), (4, 6), (2, 2)]
    assert dataset.grids == [expected[i % 4] for i in range(11)] + [(4, 6)]
    assert dataset.grid == (4, 6) and dataset.ragged
    manifest = dataset.manifest
    assert manifest["resize"] == "native" and manifest["max_pixels"] == LIMITS.most
    assert manifest["image_size"] is None and manifest["singular_values"] is None
    reasons = {entry["row_id"]: entry["reason"] for entry in manifest["skipped"]}
    assert reasons.keys() == {12, 13} and "2100 × 10 pixels" in reasons[13]
    for row in (0, 6, 3):
        cell = photo(*[(150, 90), (90, 150), (300, 200), (20, 20)][row % 4], seed=row)
        pixels = demo.preprocess(Image.open(io.BytesIO(cell)))
        alone = demo.encode(pixels[None]).bfloat16().float()
        assert torch.allclose(dataset[[row]].float(), alone, atol=0.04, rtol=0.02)
    assert torch.equal(dataset[[11]], dataset[[2]])  # the copy
    x = normalise(dataset[[2]])[0]
    exact = torch.linalg.svdvals(x.double())[0]
    assert torch.allclose(dataset.singular_values[2, :24], exact, rtol=1e-6)


def test_thumbnail_and_box_have_the_aspect_of_what_the_encoder_saw(photographs):
    dataset = RealQwenVLDataset(photographs / "whole")
    sizes = [dataset.thumbnail(row).size for row in range(4)]
    assert sizes == [(224, 134), (134, 224), (224, 149), (224, 224)]
    x, y, w, h = box_in_view(dataset.image_record(0), "native")
    assert (x, y, w, h) == pytest.approx((10 / 150, 5 / 90, 10 / 150, 10 / 90))


def test_pictures_that_rival_codecs_compress_are_what_the_encoder_saw(photographs, demo):
    dataset = RealQwenVLDataset(photographs / "whole")
    pictures = compare_bytes.read_pictures(dataset, [0, 2], photographs / "set", demo)
    assert [pictures[row].size for row in (0, 2)] == [(5 * 28, 3 * 28), (6 * 28, 4 * 28)]
    assert size_in(dataset.manifest) == LIMITS
    again = demo.encode(demo.pixels_of(pictures[2])[None]).bfloat16()
    assert torch.allclose(again.float(), dataset[[2]].float(), atol=0.04, rtol=0.02)


def test_an_interrupted_native_cache_ends_byte_identical(photographs, monkeypatch):
    write_shard = cache_writer.FeatureCacheWriter.write_shard

    def stop_at_last(self, shard, *rest):
        if shard == 2:
            raise KeyboardInterrupt
        write_shard(self, shard, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_writer.FeatureCacheWriter, "write_shard", stop_at_last)
        extract_native(photographs, "cut")
    assert (photographs / "cut" / "part-00001.parquet").exists()
    extract_native(photographs, "cut")
    cut, whole = hashes(photographs / "cut"), hashes(photographs / "whole")
    for files in (cut, whole):
        files.pop("spectra.safetensors", None)
        files.pop(".spectra.lock", None)
    assert cut == whole


def test_tokens_at_once_are_bounded_and_images_at_once_alike(photographs, monkeypatch):
    from encoders.towers import DemoEncoder

    encoded, encode = [], DemoEncoder.encode
    monkeypatch.setattr(
        DemoEncoder, "encode", lambda self, x: encoded.append(tuple(x.shape)) or encode(self, x)
    )
    extract_native(photographs, "bounded", "--batch_tokens", "30")
    tokens = [n * height * width // 28**2 for n, _, height, width in encoded]
    assert sum(n for n, *_ in encoded) == 11
    assert max(tokens) <= 30 and max(n for n, *_ in encoded) > 1


def test_shards_of_large_images_hold_fewer_rows(photographs, monkeypatch):
    monkeypatch.setattr(shard_folder, "TOKENS_PER_SHARD", 50)
    extract_native(photographs, "small shards")
    shards = manifest_of(photographs / "small shards")["shards"]
    assert [shard["rows"] for shard in shards] == [2] * 6
    whole, small = (RealQwenVLDataset(photographs / n) for n in ("whole", "small shards"))
    for row in range(12):
        assert torch.allclose(whole[[row]].float(), small[[row]].float(), atol=0.04, rtol=0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resize native --image_size 448", "--image_size does nothing beside --resize native"),
        ("--resize native --batch_size 4", "--batch_size does nothing beside --resize native"),
        ("--max_pixels 4000", "--max_pixels does nothing without --resize native"),
        ("--resize pad --batch_tokens 64", "--batch_tokens does nothing without --resize native"),
        ("--resize native --min_pixels 9000 --max_pixels 8000", "--min_pixels 9000 is above"),
    ],
)
def test_flags_of_the_other_way_to_resize_are_refused(flags, message, script):
    done = script("extract_features.py", "--demo", *flags.split())
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_other_limits_are_another_cache(photographs, tiny_data, tmp_path, script):
    extract(tmp_path, tiny_data, tmp_path / "fixed")
    flags = ["--demo", "--dataset_dir", photographs / "set", "--cache_dir", photographs / "whole"]
    done = script("extract_features.py", *flags, "--resize", "native", "--max_pixels", 9000)
    assert done.returncode == 2 and "max_pixels = 23520, now it is 9000" in done.stderr
    flags = ["--demo", "--dataset_dir", tiny_data, "--cache_dir", tmp_path / "fixed"]
    done = script("extract_features.py", *flags, *NATIVE)
    assert done.returncode == 2 and "image_size = 112, now it is None" in done.stderr
