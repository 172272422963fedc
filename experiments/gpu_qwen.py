"""Parts `extraction` and `language` of `experiments.gpu_check`: Qwen2.5-VL-3B with random weights.

Time and memory do not depend on the weights' values. The shapes are those of the published
config.json of Qwen2.5-VL-3B-Instruct; nothing that is computed here is an answer to anything.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

from experiments.gpu_bench import Setting, compared, row, speed, timed
from features.encoders import load_encoder

# config.json and preprocessor_config.json of Qwen/Qwen2.5-VL-3B-Instruct
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, hidden_act="silu")
VISION |= dict(out_hidden_size=2048, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
VISION |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
TINY_VISION = VISION | dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2)
TINY_VISION |= dict(out_hidden_size=64, fullatt_block_indexes=[1])
TEXT = dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, vocab_size=151936)
TEXT |= dict(num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)
ROPE = dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6)
TEXT["rope_parameters"] = ROPE
TINY_TEXT = TEXT | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=96)
TINY_TEXT |= dict(num_attention_heads=4, rope_parameters=ROPE | dict(mrope_section=[2, 3, 3]))
PREPROCESSOR = dict(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2)
PREPROCESSOR |= dict(merge_size=2, image_processor_type="Qwen2VLImageProcessor")
PREPROCESSOR["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
PREPROCESSOR["image_std"] = [0.26862954, 0.26130258, 0.27577711]
PROMPT_TOKENS = 40  # beside the image: template, question
NEW_TOKENS = 32
RANDOM = "random weights"


def config_of(setting: Setting) -> Qwen2_5_VLConfig:
    text, ids = (TINY_TEXT if setting.tiny else TEXT), {}
    if setting.tiny:
        ids = {"image_token_id": 3, "vision_start_token_id": 2, "vision_end_token_id": 4}
    vision = TINY_VISION if setting.tiny else VISION
    tied = {"tie_word_embeddings": True}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids, **tied)


def image_size(setting: Setting) -> int:
    return 112 if setting.tiny else 448


def precision(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.device.type == "cuda" else torch.float32


@torch.no_grad()
def fill(parameters: dict[str, Tensor]) -> None:
    """Small random weights, ones in norms: numbers stay finite through all layers."""
    for tensor in parameters.values():
        if tensor.ndim == 1:
            tensor.fill_(1)
        else:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)


def whole_model(setting: Setting) -> nn.Module:
    """The whole model in the published precision, on the device."""
    with torch.device(setting.device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config_of(setting), dtype=precision(setting), attn_implementation="sdpa"
        )
    model = model.to(setting.device)
    fill(dict(model.named_parameters()))
    return model.eval().requires_grad_(False)


def save_tower(setting: Setting, folder: Path) -> None:
    """A checkpoint with the vision tower alone, as `features.encoders` reads it."""
    config = config_of(setting)
    with torch.device("meta"):
        tower = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config.vision_config
        )
    dtype = precision(setting)
    weights = {
        f"visual.{name}": torch.empty(p.shape, dtype=dtype, device=setting.device)
        for name, p in tower.named_parameters()
    }
    fill(weights)
    save_file({name: t.cpu() for name, t in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def count(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters())


def memory_of_weights(what: str, setting: Setting) -> Iterator[dict]:
    if setting.device.type == "cuda":
        used = torch.cuda.memory_allocated(setting.device) / 2**20
        yield row(f"{what}: memory of its weights", used, "MiB", RANDOM)


def check_tower(setting: Setting) -> Iterator[dict]:
    """features.encoders' own path: what extract_features.py computes for a batch of images."""
    with tempfile.TemporaryDirectory() as folder:
        save_tower(setting, Path(folder))
        encoder = load_encoder(folder, device=setting.device, image_size=image_size(setting))
    yield row("tower: parameters", count(encoder.tower) / 1e6, "million", RANDOM)
    image = Image.linear_gradient("L").convert("RGB").resize((640, 480))
    time = timed(partial(encoder.preprocess, image), setting)
    yield row("preprocessing on one CPU thread", 1 / time.median, "images/s", "640 × 480, in PIL")
    one = encoder.preprocess(image)
    for batch in setting.sizes.encode_batches:
        pixels = one.expand(batch, *one.shape).contiguous()
        if setting.device.type == "cuda":
            pixels = pixels.pin_memory()
        time = timed(partial(encoder.encode, pixels), setting)
        note = f"{RANDOM}; {encoder.dtype}, copy of the pixels included"
        yield from speed(f"tower, batch {batch}", batch, time, note)
    two = one.expand(2, *one.shape).clone()
    two[1] = two[1].flip(0)
    apart = torch.cat([encoder.encode(image[None]) for image in two]).float()
    together = encoder.encode(two).float()
    difference = (together - apart).norm() / apart.norm()
    what = "tower: batch of 2 against one by one, ‖difference‖ / ‖tokens‖"
    yield compared(what, difference, 0.05, f"{encoder.dtype}")


def check_whole_model(setting: Setting) -> Iterator[dict]:
    """What users did before: the whole 3B model loaded, one image at a time through it."""
    model = whole_model(setting)
    side = image_size(setting) // 14
    grid = torch.tensor([[1, side, side]], device=setting.device)
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, device=setting.device)
    pixels = pixels.to(precision(setting))
    yield row("whole model: parameters", count(model) / 1e6, "million", RANDOM)
    yield from memory_of_weights("whole model", setting)
    with torch.inference_mode():
        time = timed(lambda: model.model.get_image_features(pixels, grid), setting)
        note = f"{RANDOM}; transformers' sdpa, a call for each attention window"
        yield from speed("whole model loaded, tower, one image at a time", 1, time, note)
        inputs = {"pixel_values": pixels, **prompt(model, setting, side * side // 4)}
        time = timed(lambda: model(**inputs, image_grid_thw=grid, logits_to_keep=1), setting)
        note = f"{RANDOM}; every layer, {PROMPT_TOKENS} tokens of text"
        yield from speed("whole model, image and prompt, one at a time", 1, time, note)


def prompt(model: nn.Module, setting: Setting, image_tokens: int) -> dict:
    """input_ids [1, L] with the image's places, and what says where they are."""
    config = model.config
    ids = torch.full((1, image_tokens + PROMPT_TOKENS), 7, device=setting.device)
    ids[:, 4] = config.vision_start_token_id
    ids[:, 5 : 5 + image_tokens] = config.image_token_id
    ids[:, 5 + image_tokens] = config.vision_end_token_id
    return {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).int()}


def check_language_model(setting: Setting) -> Iterator[dict]:
    """Forward and generation with given tokens in place of the image, as the head qwen-answer."""
    model = whole_model(setting)
    del model.model.visual
    side = image_size(setting) // 14 // 2
    width = model.config.text_config.hidden_size
    tokens = torch.randn(side * side, width, device=setting.device)
    inputs = prompt(model, setting, side * side)
    inputs["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * side]], device=setting.device)
    outputs = BaseModelOutputWithPooling(pooler_output=(tokens,))
    inputs["mm_encoder_outputs"] = {"image": outputs}
    yield from memory_of_weights("language model", setting)
    with torch.inference_mode():
        time = timed(lambda: model(**inputs, logits_to_keep=8), setting)
        note = f"{RANDOM}; {side * side + PROMPT_TOKENS} tokens, batch 1"
        yield from speed("language model, forward", 1, time, note)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        greedy = GenerationConfig(do_sample=False, eos_token_id=1, pad_token_id=1, **length)
        time = timed(partial(model.generate, **inputs, generation_config=greedy), setting)
        note = f"{RANDOM}; greedy, {NEW_TOKENS} new tokens, batch 1, prompt included"
        yield from speed("language model, generation", NEW_TOKENS, time, note, "tokens/s")


CHECKS = {
    "extraction": {"tower": check_tower, "whole model": check_whole_model},
    "language": {"language model": check_language_model},
}
