"""Small checkpoints of every family of encoders, as transformers saves the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as tf
from conftest import QWEN_PREPROCESSOR

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 48}
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
TEXT = {"hidden_size": 48, **MLP, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": ROPE}
TOWER = {"depth": 3, "num_heads": 2}
WINDOWS = {"fullatt_block_indexes": [1], "window_size": 112}
DEEPSTACK = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
WORDS = {"bos_token_id": 1, "eos_token_id": 2}

# as published: SigLIP's, SigLIP 2's and DINOv2's preprocessor_config.json
HALF = [0.5, 0.5, 0.5]
SIGLIP_PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": HALF,
    "image_processor_type": "SiglipImageProcessor",
    "image_std": HALF,
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
DINO_PREPROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
QWEN3_PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": HALF,
    "image_std": HALF,
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def whole_model(model_type: str) -> tf.PreTrainedModel:
    """Build a small model of the family with the published kinds of layers and patches."""
    torch.manual_seed(0)
    dino = {**SMALL, "patch_size": 14, "image_size": 84}
    if model_type == "qwen2_vl":
        vision = {**TOWER, "embed_dim": 32, "hidden_size": 48}
        config = tf.Qwen2VLConfig(vision_config=vision, text_config=TEXT)
        model = tf.Qwen2VLForConditionalGeneration(config)
    elif model_type == "qwen2_5_vl":
        vision = {**TOWER, **MLP, **WINDOWS, "hidden_size": 32, "out_hidden_size": 48}
        config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT)
        model = tf.Qwen2_5_VLForConditionalGeneration(config)
    elif model_type == "qwen3_vl":
        vision = {**TOWER, **MLP, **DEEPSTACK, "hidden_size": 32, "out_hidden_size": 48}
        config = tf.Qwen3VLConfig(vision_config=vision, text_config=TEXT)
        model = tf.Qwen3VLForConditionalGeneration(config)
    elif model_type == "siglip":
        vision, text = {**SMALL, **MLP, "image_size": 96}, {**SMALL, **MLP, **WORDS}
        text["vocab_size"] = 64
        model = tf.SiglipModel(tf.SiglipConfig(vision_config=vision, text_config=text))
    elif model_type == "dinov2":
        model = tf.Dinov2Model(tf.Dinov2Config(**dino))
    elif model_type == "dinov2_with_registers":
        model = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**dino))
    return roughened(model)


def roughened(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Noise on every weight: fresh norms are 1, biases 0 and class tokens 0, which is too easy."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_checkpoint(folder: Path, model_type: str) -> Path:
    """Save the model in shards, with the image processor's settings as they are published."""
    whole_model(model_type).save_pretrained(folder, max_shard_size="50KB")
    return with_preprocessor(folder, model_type)


def with_preprocessor(folder: Path, model_type: str) -> Path:
    settings = {"siglip": SIGLIP_PREPROCESSOR, "qwen3_vl": QWEN3_PREPROCESSOR}
    settings |= {"qwen2_vl": QWEN_PREPROCESSOR, "qwen2_5_vl": QWEN_PREPROCESSOR}
    settings = settings.get(model_type, DINO_PREPROCESSOR)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
