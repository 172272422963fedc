"""Every family of encoders gives the tokens of the library's own whole model, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from small_checkpoints import roughened, save_checkpoint, with_preprocessor
from test_encoders import photograph, random_image

from encoders import checkpoints
from encoders import towers as encoders
from encoders.checkpoints import FAMILIES
from lowrank_tokens.exceptions import InputError

WHOLE = {
    "qwen2_vl": tf.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": tf.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": tf.Qwen3VLForConditionalGeneration,
    "siglip": tf.SiglipModel,
    "dinov2": tf.Dinov2Model,
    "dinov2_with_registers": tf.Dinov2WithRegistersModel,
}
PROCESSORS = {
    "siglip": tf.SiglipImageProcessorPil,
    "dinov2": tf.BitImageProcessorPil,
    "dinov2_with_registers": tf.BitImageProcessorPil,
}
EVERY = pytest.mark.parametrize("family", FAMILIES)
# of each family at 448 pixels with the published patches, by hand: rows = columns
AT_448 = {"qwen2_vl": 16, "qwen2_5_vl": 16, "qwen3_vl": 14, "siglip": 28}
AT_448 |= {"dinov2": 32, "dinov2_with_registers": 32}

# the vision parts of published config.json files: those before transformers 5 name sub-configs
# after the whole, leave out what is a default, and stand beside the text's entries
PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "hidden_size": 1536,
            "in_chans": 3,
            "model_type": "qwen2_vl",
            "spatial_patch_size": 14,
        },
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "in_chans": 3,
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
        },
    },
    "Qwen/Qwen3-VL-2B-Instruct": {
        "model_type": "qwen3_vl",
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "model_type": "qwen3_vl",
            "out_hidden_size": 2048,
            "patch_size": 16,
        },
    },
    "google/siglip2-base-patch16-224": {
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "facebook/dinov2-base": {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 768,
        "image_size": 518,
        "out_features": ["stage12"],
        "out_indices": [12],
        "patch_size": 14,
        "torch_dtype": "float32",
    },
    "facebook/dinov2-with-registers-base": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 768,
        "image_size": 518,
        "num_register_tokens": 4,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """model_type → folder of a small checkpoint of the whole model. Do not change it."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_checkpoint(tmp_path_factory.mktemp(family) / "small", family)
        return made[family]

    return folder


def load(folder: Path, **options) -> encoders.CheckpointEncoder:
    return encoders.load_encoder(str(folder), device="cpu", **options)


@torch.no_grad()
def library_tokens(family: str, folder: Path, images: list[Image.Image], dtype: torch.dtype):
    """[n, T, D] as a user of transformers has them: its processor without resizing, its model."""
    model = WHOLE[family].from_pretrained(folder, dtype=dtype).eval()
    processor = PROCESSORS.get(family, tf.Qwen2VLImageProcessorPil).from_pretrained(folder)
    batch = processor(images=images, do_resize=False, do_center_crop=False, return_tensors="pt")
    if family.startswith("qwen"):
        return torch.stack(model.get_image_features(**batch).pooler_output)
    pixels = batch["pixel_values"].to(dtype)
    if family == "siglip":
        return model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    registers = 4 if family == "dinov2_with_registers" else 0
    return model(pixel_values=pixels).last_hidden_state[:, 1 + registers :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_tokens_of_any_size_equal_the_librarys_whole_model_bit_for_bit(saved, family, dtype):
    folder = saved(family)
    encoder = load(folder, dtype=dtype, image_size=224)
    step = encoder.step
    for rows, columns in ((6, 6), (4, 7)):  # 6 x 6 patches: SigLIP's and DINOv2's own positions
        images = [random_image(columns * step, rows * step, seed) for seed in (0, 1)]
        pixels = torch.stack([encoder.pixels_of(image) for image in images])
        tokens = encoder.encode(pixels)
        assert encoder.grid_of(pixels) == encoder.grid_of(pixels[0]) == (rows, columns)
        assert tokens.shape == (2, rows * columns, encoder.feature_dim)
        assert tokens.dtype == dtype and not tokens.requires_grad
        assert torch.equal(tokens, library_tokens(family, folder, images, dtype))


@EVERY
def test_448_pixels_give_the_grid_that_the_docs_state(saved, family):
    encoder = load(saved(family))
    pixels = encoder.preprocess(photograph())[None]
    side = AT_448[family]
    assert encoder.grid == encoder.grid_of(pixels) == (side, side)
    assert encoder.feature_dim == (48 if family.startswith("qwen") else 32)
    assert encoder.encode(pixels).shape == (1, side**2, encoder.feature_dim)
    assert encoder.id == "small" and encoder.folder == str(saved(family).resolve())


@pytest.mark.parametrize("example", PUBLISHED)
def test_published_configs_give_the_sizes_that_the_docs_state(example, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[example]))
    checkpoint = checkpoints.read_checkpoint(tmp_path)
    assert checkpoint.family.example == example
    vision, merges = checkpoint.vision, checkpoint.family.kind.merges
    side = 448 // vision.patch_size // (vision.spatial_merge_size if merges else 1)
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    row = next(line for line in page.splitlines() if f"| `{example}` |" in line)
    assert [cell.strip() for cell in row.split("|")][3:5] == [f"{side**2}", f"{checkpoint.width}"]
    with torch.device("meta"):
        tower = checkpoint.family.tower._from_config(vision)
    blocks = next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList))
    depths = {"Qwen2-VL": 32, "Qwen2.5-VL": 32, "Qwen3-VL": 24}  # of the others 12
    assert len(blocks) == depths.get(checkpoint.family.name, 12)


@EVERY
def test_tokens_stand_in_raster_order(saved, family):
    # of one changed pixel a tower without attention can only change one token
    encoder = load(saved(family), image_size=6 * 32 if family == "qwen3_vl" else 224)
    rows, columns = encoder.grid
    image = random_image(encoder.image_size, encoder.image_size)
    before = encoder.pixels_of(image)
    image.putpixel((4 * encoder.step + 1, 2 * encoder.step + 1), (255, 0, 255))
    changed = encoder.pixels_of(image) != before
    if family.startswith("qwen"):
        where = changed.flatten(2).any(-1)  # [rows, columns]
    else:
        step = encoder.step
        where = changed.reshape(3, rows, step, columns, step).any(4).any(2).any(0)
    assert where.nonzero().tolist() == [[2, 4]]
    blocks = next(part for part in encoder.tower.modules() if isinstance(part, torch.nn.ModuleList))
    assert len(blocks) in (2, 3)
    del blocks[:]  # so that a token depends on its own patches only
    one, other = encoder.encode(torch.stack([before, encoder.pixels_of(image)]))
    assert (one != other).any(-1).nonzero().flatten().tolist() == [2 * columns + 4]


@EVERY
def test_preprocessing_is_the_familys_own_on_the_resized_image(saved, family):
    encoder = load(saved(family), image_size=224)
    kind = PROCESSORS.get(family, tf.Qwen2VLImageProcessorPil)
    filters = {"siglip": Image.Resampling.BILINEAR}  # SigLIP 2's file says so
    stretched = photograph().resize((224, 224), filters.get(family, Image.Resampling.BICUBIC))
    processor = kind.from_pretrained(saved(family))
    expected = processor(images=stretched, do_resize=False, do_center_crop=False)
    found = encoder.preprocess(photograph())
    expected = torch.from_numpy(np.asarray(expected["pixel_values"])).reshape(found.shape)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert f"mean {tuple(processor.image_mean)}" in encoder.preprocessor
    assert encoder.preprocessor.startswith("PIL bi" + ("linear" if family == "siglip" else "cubic"))


def test_stretching_is_what_siglips_own_processor_does_to_any_photograph(saved):
    processor = tf.SiglipImageProcessorPil.from_pretrained(saved("siglip"))
    own = processor(images=photograph(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load(saved("siglip"), image_size=224).preprocess(photograph()), own)


@pytest.mark.parametrize("kind", ["classifier", "swiglu"])
def test_dinov2_as_a_classifier_and_with_giants_layers_equals_the_librarys(kind, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.Dinov2Config(**shape, image_size=84, use_swiglu_ffn=kind == "swiglu")
    torch.manual_seed(1)
    whole = {"classifier": tf.Dinov2ForImageClassification, "swiglu": tf.Dinov2Model}[kind]
    roughened(whole(config)).save_pretrained(tmp_path)
    encoder = load(with_preprocessor(tmp_path, "dinov2"), image_size=112)
    model = whole.from_pretrained(tmp_path).eval()
    pixels = encoder.preprocess(photograph())[None]
    with torch.no_grad():
        expected = getattr(model, "dinov2", model)(pixels).last_hidden_state[:, 1:]
    assert torch.equal(encoder.encode(pixels), expected)


def test_qwen3s_deepstack_is_left_out_and_its_other_tokens_are_whole(saved):
    model = tf.Qwen3VLForConditionalGeneration.from_pretrained(saved("qwen3_vl")).eval()
    encoder = load(saved("qwen3_vl"), image_size=128)
    pixels = encoder.preprocess(photograph())
    with torch.no_grad():
        output = model.get_image_features(pixels.flatten(0, 2), torch.tensor([[1, 8, 8]]))
    assert [len(layer) for layer in output.deepstack_features] == [1, 1]  # two more layers' tokens
    assert torch.equal(encoder.encode(pixels[None])[0], output.pooler_output[0])


@EVERY
def test_a_vision_tensor_that_is_missing_or_changed_is_noticed(saved, family, tmp_path):
    encoder = load(saved(family), image_size=224)
    folder = Path(shutil.copytree(saved(family), tmp_path / "other"))
    index = json.loads((folder / checkpoints.SHARD_INDEX).read_text())
    files = checkpoints._vision_files(checkpoints.read_checkpoint(folder))
    name = min(files)
    key, file = files[name]
    tensors = load_file(folder / file)
    tensors[key].view(-1)[0] += 1
    save_file(tensors, folder / file)
    assert load(folder, image_size=224).weights_sha256 != encoder.weights_sha256
    del index["weight_map"][key]
    (folder / checkpoints.SHARD_INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="Missing key.*type the folder of a downloaded checkpoint"):
        load(folder, image_size=224)


def test_the_demos_tokens_of_an_oblong_image_are_merged_in_its_own_grid():
    demo = encoders.load_encoder("demo", device="cpu", image_size=112)
    pixels = torch.stack([demo.pixels_of(random_image(84, 56, seed)) for seed in (0, 1)])
    assert demo.grid_of(pixels) == demo.grid_of(pixels[0]) == (2, 3)
    tokens, patches = demo.encode(pixels), demo.patch_tokens(pixels)  # [2, 6, 1536], [2, 24, 384]
    patches = patches.reshape(2, 4, 6, 384)
    assert tokens.shape == (2, 6, 1536)
    assert torch.equal(tokens[1, 5], patches[1, 2:4, 4:6].reshape(-1))


@pytest.mark.parametrize("model_type", ["siglip2", "clip", "qwen3_vl_moe", None])
def test_another_family_is_one_line_with_all_that_are_supported(
    saved, model_type, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=f"model_type {model_type!r} is not supported") as refused:
        load(tmp_path)
    for key, family in FAMILIES.items():
        assert f"{key!r} (such as {family.example})" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "dinov2", "hidden_size": "many"},
        {"model_type": "dinov2", "patch_size": [14, 16]},
        {"model_type": "siglip", "vision_config": 5},
        {"model_type": ["siglip"]},
        ["siglip"],
    ],
)
def test_a_config_that_makes_no_tower_is_named_in_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json: |model_type .* is not supp") as refused:
        load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_an_id_that_cannot_be_reached_is_one_line_with_all_families(monkeypatch):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    with pytest.raises(InputError, match="^--model openai/clip: no such folder") as refused:
        load("openai/clip")
    assert "offline" in str(refused.value) and "\n" not in str(refused.value)
    assert all(family.name in str(refused.value) for family in FAMILIES.values())
