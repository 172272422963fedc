"""A photograph's pixels are those that a viewer shows, whatever its file's format and mode."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from encoders.image_sources import ImageCell, UnreadableImage, image_size, read_image

ORIENTATION = 0x0112


def file_of(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photograph(width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def turned(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file_of(photograph(), form, exif=exif)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_image_is_upright_and_its_size_is_known_before_it_is_decoded(form):
    for orientation in range(1, 9):
        cell = ImageCell(turned(orientation, form), None)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(cell.data))).convert("RGB")
        assert np.array_equal(read_image(cell), expected), orientation
        assert image_size(cell) == expected.size == ((40, 24) if orientation < 5 else (24, 40))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff", b"?"])
def test_a_broken_exif_block_leaves_the_image_as_it_is_stored(exif):
    data = file_of(photograph(), "JPEG", exif=exif)
    assert read_image(ImageCell(data, None)).size == image_size(ImageCell(data, None)) == (40, 24)


def test_an_exif_block_that_cannot_be_written_again_still_turns_the_image():
    # two entries; the maker's name is said to lie far beyond the block's end
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    block += struct.pack("<HHII", 0x010F, 2, 99, 1 << 30)
    block += struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<I", 0)
    data = file_of(photograph(), "JPEG", exif=block)
    assert read_image(ImageCell(data, None)).size == image_size(ImageCell(data, None)) == (24, 40)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_to_8(form):
    grey = np.linspace(0, 65535, 40 * 24).round().astype(np.uint16).reshape(24, 40)
    read = np.asarray(read_image(ImageCell(file_of(Image.fromarray(grey), form), None)))
    expected = (grey / 257).round()
    assert read.shape == (24, 40, 3) and (read == expected[..., None]).all()


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pixels_without_a_known_scale_are_refused_by_name(dtype, name):
    data = file_of(Image.fromarray(np.full((24, 40), 3, dtype)), "TIFF")
    with pytest.raises(UnreadableImage, match=f"scan.tif: its pixels are {name}"):
        read_image(ImageCell(data, "scan.tif"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a colour left out"])
def test_what_is_transparent_is_shown_on_white(mode):
    image = Image.new("RGBA", (40, 24), (200, 0, 0, 255))
    image.paste((0, 90, 0, 0), (0, 0, 20, 24))
    options = {}
    if mode == "P":
        image = image.quantize(4)
        data = file_of(image, "PNG")
    elif mode.startswith("RGB "):
        image, options = image.convert("RGB"), {"transparency": (0, 90, 0)}
        data = file_of(image, "PNG", **options)
    else:
        data = file_of(image.convert(mode), "PNG")
    read = np.asarray(read_image(ImageCell(data, None)))
    assert (read[:, :20] == 255).all() and (read[:, 20:, 1:] < 100).all()


def test_half_transparent_pixels_are_half_white():
    data = file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert np.asarray(read_image(ImageCell(data, None))).mean() == pytest.approx(127, abs=1)
