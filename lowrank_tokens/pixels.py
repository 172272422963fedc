"""Pixels of an image file as a viewer shows them: upright, 8 bits, RGB, on white.

Boxes of a data set refer to this frame: x runs right and y down from the top left corner of the
image after its EXIF orientation has been applied.
"""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Transpose

# what undoes each EXIF orientation, as in PIL.ImageOps.exif_transpose
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
PNG_WITH_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Return width and height of the upright image, without decoding it.

    image: as `Image.open` gives it; data: the file's bytes.
    """
    if image.format == "TIFF":  # Pillow turns them itself, and gives the size after that
        return image.size
    # of a PNG that may name its orientation after its pixels, Pillow decodes all of it
    if image.format == "PNG" and not any(word in data for word in PNG_WITH_ORIENTATION):
        return image.size
    return image.size[::-1] if orientation_of(image) in SIDEWAYS else image.size


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image decoded, upright, RGB, composited on white where it is transparent.

    Grey of 16 bits is scaled to 8. Raises ValueError for floats and 32-bit integers, whose scale
    the file does not say.
    """
    image.load()  # before the orientation is read: a TIFF is turned by Pillow while it is loaded
    rgb = _rgb(image)
    turn = UPRIGHT.get(orientation_of(image))
    return rgb if turn is None else rgb.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, as stored, where there is none that can be read."""
    # not ImageOps.exif_transpose: it writes the block again, which a broken one does not survive
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken block makes Pillow raise nearly anything; the pixels are whole
        return 1
    return orientation if orientation in UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        wide = np.asarray(image).astype(np.uint32)  # PPM of 16 bits is mode I, 0 to 65535
        grey = ((wide + 128) // 257).astype(np.uint8)
        if (hidden := image.info.get("transparency")) is not None:
            grey[wide == hidden] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("F", "I"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind} of an unknown scale: convert it to 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
