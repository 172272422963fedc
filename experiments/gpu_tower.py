"""The vision tower of Qwen2.5-VL-3B in its real size with random weights, for `gpu_check`.

Time and memory do not depend on the weights' values. Nothing that it computes is of an image.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

# config.json and preprocessor_config.json of Qwen/Qwen2.5-VL-3B-Instruct
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, hidden_act="silu")
VISION |= dict(out_hidden_size=2048, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
VISION |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
TINY_VISION = VISION | dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2)
TINY_VISION |= dict(out_hidden_size=64, fullatt_block_indexes=[1])
PREPROCESSOR = dict(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2)
PREPROCESSOR |= dict(merge_size=2, image_processor_type="Qwen2VLImageProcessor")
PREPROCESSOR["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
PREPROCESSOR["image_std"] = [0.26862954, 0.26130258, 0.27577711]


@torch.no_grad()
def save_tower(folder: Path, device: torch.device) -> None:
    """A checkpoint with the tower alone, as `features.encoders` reads it: bf16, tiny on a CPU."""
    on_cuda = device.type == "cuda"
    config = Qwen2_5_VLConfig(vision_config=VISION if on_cuda else TINY_VISION)
    with torch.device("meta"):
        tower = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config.vision_config
        )
    weights = {}
    for name, of in tower.named_parameters():
        tensor = torch.ones(of.shape, dtype=torch.bfloat16, device=device)
        if of.ndim > 1:  # ones in norms and biases: numbers stay finite through all layers
            tensor.normal_(0, of.shape[-1] ** -0.5)
        weights[f"visual.{name}"] = tensor.cpu()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
