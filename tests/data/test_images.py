"""Decoding: every odd image comes out as it should or is refused with its cause."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from fluxflow_train.data.images import BadImage, ImageLimits, decode_image, image_size

LIMITS = ImageLimits()


def save(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """A gradient: what compression and resizing leave nearly alone."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def grey_png_16_bit(values: np.ndarray) -> bytes:
    """Written by hand, so that the test does not lean on the library it tests."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refused(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, (8, 8), "exact", limits)
    return str(caught.value)


def test_same_size_is_untouched():
    image = smooth(16, 16)
    decoded = decode_image(save(image), (16, 16), "exact", LIMITS)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (41, 24)])
def test_central_square(size):
    image = smooth(*size)
    left, top = (size[0] - 24) // 2, (size[1] - 24) // 2
    expected = image.crop((left, top, left + 24, top + 24)).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(save(image), (8, 8), "exact", LIMITS), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(orientation, format):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = save(smooth(32, 20), format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image_size(data) == expected.size
    square = ImageOps.fit(expected, (20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(data, (20, 20), "exact", LIMITS), np.asarray(square).transpose(2, 0, 1))


def test_unreadable_exif_is_no_damage():
    data = save(smooth(16, 16), "JPEG", exif=b"Exif\0\0neither MM nor II, so nothing")
    assert image_size(data) == (16, 16)
    assert decode_image(data, (16, 16), "exact", LIMITS).shape == (3, 16, 16)


def test_cmyk():
    data = save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    decoded = decode_image(data, (8, 8), "exact", LIMITS).astype(int)
    assert np.abs(decoded - np.array([255, 0, 0]).reshape(3, 1, 1)).max() <= 4


def test_16_bit_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).round().astype(np.int64).reshape(8, 8)
    decoded = decode_image(grey_png_16_bit(values), (8, 8), "exact", LIMITS)
    assert np.array_equal(decoded[0], np.rint(values / 257))
    assert np.array_equal(decoded[0], decoded[2])


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 4, 8))
    decoded = decode_image(save(image), (8, 8), "exact", LIMITS)
    assert decoded[:, 0, 7].tolist() == [255, 255, 255]
    assert decoded[:, 0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 4, 8))
    decoded = decode_image(save(image, transparency=0), (8, 8), "exact", LIMITS)
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_other_modes_become_rgb(mode):
    assert decode_image(save(Image.new(mode, (8, 8))), (8, 8), "exact", LIMITS).shape == (3, 8, 8)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animation_shows_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = save(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, (8, 8), "exact", LIMITS)[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated(format, encoded: Callable[..., bytes]):
    data = encoded(0, (64, 64), format)
    assert refused(data[: len(data) // 2]) in ("damaged image", "not an image")
    assert refused(b"") == "empty image"
    assert refused(b"<html>") == "not an image"


def test_damaged_png_data(encoded: Callable[..., bytes]):
    data = bytearray(encoded(0, (64, 64)))
    data[len(data) // 2] ^= 255
    assert refused(bytes(data)) == "damaged image"


def test_other_formats_are_not_opened():
    assert refused(save(Image.new("RGB", (8, 8)), "BMP")) == "not an image"


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [12_000, 20_000])  # 144 MP, and where Pillow itself refuses
def test_bomb_is_refused_before_it_is_decoded(side):
    data = save(Image.new("1", (side, side)))
    assert refused(data) == "too many pixels"


def test_limits():
    data = save(smooth(40, 10))
    assert refused(data, ImageLimits(min_side=11)) == "too small"
    assert refused(data, ImageLimits(max_aspect=3.9)) == "too elongated"
    assert refused(data, ImageLimits(max_pixels=399)) == "too many pixels"
    assert decode_image(data, (8, 8), "exact", ImageLimits(400, 10, 4.0)).shape == (3, 8, 8)


@pytest.mark.parametrize(("decode", "least_db"), [("draft2x", 40), ("draft1x", 30)])
def test_draft_is_close_to_exact(decode, least_db):
    data = save(smooth(512, 400), "JPEG", quality=95)
    exact = decode_image(data, (64, 64), "exact", LIMITS).astype(float)
    draft = decode_image(data, (64, 64), decode, LIMITS).astype(float)
    assert 10 * np.log10(255**2 / np.square(exact - draft).mean()) > least_db


class TestShapes:
    """Cutting to other shapes than the central square."""

    def test_the_largest_part_of_that_aspect(self):
        ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (30, 60, 3))
        wide = decode_image(save(Image.fromarray(ramp)), (10, 40), "exact", LIMITS)
        assert wide.shape == (3, 10, 40)
        assert np.ptp(wide) > 225  # the whole width, and a band of the height
        tall = decode_image(save(Image.fromarray(ramp)), (40, 10), "exact", LIMITS)
        assert tall.shape == (3, 40, 10)
        assert np.ptp(tall) < 40

    @pytest.mark.parametrize(("place", "least"), [((0.0, 0.5), 0), ((0.5, 0.5), 60), ((1.0, 0.5), 120)])
    def test_place_moves_along_the_longer_side(self, place, least):
        ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (30, 60, 3))
        part = decode_image(save(Image.fromarray(ramp)), (30, 30), "exact", LIMITS, place)
        assert part.min() == least

    @pytest.mark.parametrize("orientation", [1, 6])
    def test_draft_keeps_enough_pixels_either_way_up(self, orientation):
        draws = np.random.default_rng(0).integers(0, 255, (16, 4, 3)).astype(np.uint8)
        image = Image.fromarray(draws).resize((128, 512), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[274] = orientation
        data = save(image, "JPEG", quality=95, exif=exif)
        shape = (256, 64) if orientation == 1 else (64, 256)
        exact = decode_image(data, shape, "exact", LIMITS).astype(float)
        draft = decode_image(data, shape, "draft1x", LIMITS).astype(float)
        assert 10 * np.log10(255**2 / np.square(exact - draft).mean()) > 30
