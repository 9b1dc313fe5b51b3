"""Decode image files of any mode to 8-bit RGB, and masks to bool; say clearly what is wrong with bad ones."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hgadlib.errors import InputError

# What Pillow's decoders raise on damaged files; SyntaxError is its word for a broken PNG.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about its image before it is decoded: pixels as shown (EXIF applied), mode, format."""

    height: int
    width: int
    mode: str
    format: str


def describe_failure(path: Path | str, error: BaseException) -> InputError:
    """Turn a failure to read an image into one line that names file and reason."""
    path = Path(path)
    if isinstance(error, InputError):
        return error
    if isinstance(error, PermissionError):
        return InputError(f"{path}: permission denied; make the file readable")
    if isinstance(error, FileNotFoundError):
        target = "is a link to a file that does not exist" if path.is_symlink() else "no such file"
        return InputError(f"{path}: {target}")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path}: expected an image file, found a folder")
    if isinstance(error, Image.DecompressionBombError):
        return InputError(f"{path}: image too large: {error}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as reason:
        return InputError(f"{path}: cannot be read: {reason.strerror or reason}")
    if size == 0:
        return InputError(f"{path}: the file is empty (0 bytes)")
    if isinstance(error, UnidentifiedImageError):
        return InputError(f"{path}: not an image; the file starts with {start!r}")
    text = " ".join(str(error).split()) or type(error).__name__
    signs = ("truncated", "unrecognized data stream", "not enough")
    if isinstance(error, EOFError) or any(sign in text.lower() for sign in signs):
        return InputError(f"{path}: truncated or damaged image ({text}); copy the file again or leave it out")
    return InputError(f"{path}: cannot decode the image ({text})")


def read_header(path: Path | str) -> ImageHeader:
    """Read size and mode without decoding a pixel.

    Args:
        path: Image file.

    Returns:
        The header, with height and width as after EXIF rotation.

    Raises:
        InputError: The file is missing, unreadable, empty or not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            return ImageHeader(height, width, image.mode, image.format or "?")
    except _DECODE_ERRORS as error:
        raise describe_failure(path, error) from error


def _to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    """Bring any mode to 8-bit RGB by a rule that does not look at the image's content."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.max() > 65535 or values.min() < 0):
            raise InputError(f"{path}: 32-bit image with values outside 0..65535; save it with 8 or 16 bits")
        # One scale for all images: stretching each to its own range would hide how bright it is.
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif mode == "F":
        raise InputError(f"{path}: floating-point image of unknown range; save it with 8 or 16 bits")
    elif "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        # The colour under transparent pixels is whatever an editor left there; black is the same every time.
        canvas = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def open_rgb(path: Path | str) -> Image.Image:
    """Decode an image to 8-bit RGB, EXIF rotation applied.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except _DECODE_ERRORS as error:
        raise describe_failure(path, error) from error


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Decode an image of any mode to 8-bit RGB.

    Grey becomes three equal channels; 16-bit is scaled by 255/65535; transparency is laid over black; palette
    and CMYK are converted; EXIF rotation is applied; of several frames the first counts.

    Args:
        path: Image file.

    Returns:
        RGB image, (H, W, 3) uint8.

    Raises:
        InputError: The file cannot be read; the line names it and the reason.
    """
    return np.array(open_rgb(path))


def read_mask(path: Path | str) -> NDArray[np.bool_]:
    """Decode a mask: any non-zero pixel is anomalous.

    A pixel counts where one of its colour channels is not zero after transparency was laid over black. JPEG
    is the exception, since its compression leaves small non-zero values beside every edge: there values
    above 127 count.

    Args:
        path: Mask file.

    Returns:
        Mask, (H, W) bool.

    Raises:
        InputError: The file cannot be read.
    """
    image, kind = _open_rgb_mask(path)
    return image.max(axis=-1) > (127 if kind == "JPEG" else 0)


def _open_rgb_mask(path: Path | str) -> tuple[NDArray[np.uint8 | np.int32 | np.float32], str]:
    """Decode a mask without the rounding of 16 bits to 8, which would lose small labels."""
    try:
        with Image.open(path) as image:
            image.load()
            kind = image.format or "?"
            if image.mode.startswith("I") or image.mode == "F":
                return np.abs(np.asarray(ImageOps.exif_transpose(image)))[..., None], kind
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image), path)), kind
    except _DECODE_ERRORS as error:
        raise describe_failure(path, error) from error


def check_mask_size(mask_path: Path, mask_shape: tuple[int, ...], image_path: Path) -> None:
    """Refuse a mask whose size is not its image's.

    Raises:
        InputError: The sizes differ.
    """
    header = read_header(image_path)
    if mask_shape != (header.height, header.width):
        raise InputError(
            f"{mask_path}: mask is {mask_shape[1]}x{mask_shape[0]} pixels, but its image {image_path.name} "
            f"is {header.width}x{header.height}; a mask must have its image's size"
        )
