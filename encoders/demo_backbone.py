"""The demo's DINOv2 ViT-S/14: its weights are initialisers of an ONNX graph in a package."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights

from encoders.checkpoints import dinov2_weights


def load_demo_backbone(path: Path) -> Dinov2Model:
    """Load the DINOv2 backbone whose weights are initialisers of the ONNX graph at `path`.

    The mask token, which only pretraining needs and the file lacks, is not built.
    """
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    patches = {"image_size": 518, "patch_size": 14, "use_mask_token": False}
    with no_init_weights():
        backbone = Dinov2Model(Dinov2Config(**shape, **patches, attn_implementation="sdpa"))
    backbone.load_state_dict(_onnx_weights(onnx.load(path).graph), strict=True)
    return backbone.eval().requires_grad_(False)


def _onnx_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    # The exporter kept the names of norms, biases, convolution and layer scales. A linear layer's
    # weight is an anonymous [in, out] operand of a MatMul whose node is named after the layer, and
    # the position table is two anonymous 3-d constants: the class token's and the patches'.
    arrays = {i.name: onnx.numpy_helper.to_array(i).copy() for i in graph.initializer}
    arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
    weights = {name: t for name, t in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.lstrip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T
    tables = [t for name, t in arrays.items() if t.dim() == 3 and name.startswith("onnx::")]
    tables.sort(key=lambda table: table.shape[1])  # [1, 1, 384], [1, 37 * 37, 384]
    weights["backbone.embeddings.position_embeddings"] = torch.cat(tables, dim=1)
    return dinov2_weights({name.removeprefix("backbone."): t for name, t in weights.items()})
