"""Encoded bytes to a uint8 image of the training size, refusing what can't be trusted and saying why.

H W pixels of the result.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Decode = Literal["exact", "draft2x", "draft1x"]
CENTRE = (0.5, 0.5)
EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_DRAFT_FACTOR = {"draft2x": 2, "draft1x": 1}  # smallest size that the JPEG decoder may give, in targets


class BadImage(ValueError):
    """An image that can't be used; the message is the cause, in the few words that causes are counted by."""


@dataclass(frozen=True)
class ImageLimits:
    """What an image must keep to. `max_pixels` is checked before anything is decoded."""

    max_pixels: int = 64_000_000
    min_side: int = 1
    max_aspect: float = 20.0

    def check(self, width: int, height: int) -> None:
        """Raises BadImage where an image of `width` x `height` pixels breaks a limit."""
        if width * height > self.max_pixels:
            raise BadImage("too many pixels")
        if min(width, height) < self.min_side:
            raise BadImage("too small")
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadImage("too elongated")


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, from the header alone. Raises BadImage where there is none."""
    image = _open(data)
    width, height = image.size
    # PNG may keep EXIF behind the pixels, and getexif() would decode them all to find it.
    if image.format == "PNG" and "exif" not in image.info:
        return width, height
    return (height, width) if _orientation(image) >= 5 else (width, height)


def decode_image(
    data: bytes, shape: tuple[int, int], decode: Decode, limits: ImageLimits, place: tuple[float, float] = CENTRE
) -> np.ndarray:
    """The largest part of an encoded image with the aspect of `shape` (H, W), scaled to it: uint8 (3, H, W).

    `place` in [0, 1]^2 is where the part lies, from the left and from the top; it matters on the longer side alone.

    `decode` other than "exact" lets the JPEG decoder shrink to no less than 2x or 1x the target, which is faster
    and about 41 dB from the exact result: for training only.

    Raises:
        BadImage: empty, damaged, not an image, or beyond `limits`.
    """
    image = _open(data)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise BadImage("too many pixels")
    if decode in _DRAFT_FACTOR:
        factor = _DRAFT_FACTOR[decode]
        down, across = (shape[1], shape[0]) if _orientation(image) >= 5 else shape  # as stored, before the rotation
        image.draft(None, (factor * across, factor * down))
    try:
        image.load()
        orientation = _orientation(image)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        image = _rgb_on_white(image)
    except _BROKEN as error:
        raise BadImage("damaged image") from error
    limits.check(width, height)
    return np.stack([np.asarray(band) for band in _cropped(image, shape, place).split()])


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty image")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except _BROKEN as error:
        raise BadImage("not an image") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. EXIF that can't be read is common on the web and no reason to refuse an image."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to 255
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _cropped(image: Image.Image, shape: tuple[int, int], place: tuple[float, float]) -> Image.Image:
    height, width = shape
    scale = min(image.width / width, image.height / height)
    across, down = round(width * scale), round(height * scale)
    left = int((image.width - across) * place[0])
    top = int((image.height - down) * place[1])
    if (across, down) != image.size:
        image = image.crop((left, top, left + across, top + down))
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
