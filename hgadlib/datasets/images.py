"""Decode, resize and normalise images: files -> (B, 3, H, W); masks -> (N, H, W) bool."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hgadlib.datasets.records import ImageRecord
from hgadlib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RESIZE_POLICIES = ("stretch", "short_side_center_crop", "pad")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Box = tuple[float, float, float, float]

# What Pillow's decoders raise on damaged files; SyntaxError is its word for a broken PNG.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_REASONS = {
    errno.EACCES: "permission denied; make the file readable", errno.ENOENT: "no such file",
    errno.EISDIR: "expected an image file, found a folder",
}  # fmt: skip
_EXIF_ORIENTATION = 0x0112


class ImageHeader(NamedTuple):
    """What a file says of its image before it is decoded: pixels as shown (EXIF applied), mode, format."""

    height: int
    width: int
    mode: str
    format: str
    is_deep: bool
    """Whether a channel has more than 8 bits."""


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong with it becomes one line that names the file and the reason."""
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except _DECODE_ERRORS as error:
        raise InputError(f"{path}: {_reason(Path(path), error)}") from error


def _reason(path: Path, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return _REASONS.get(error.errno, f"cannot be read: {error.strerror}")
    if isinstance(error, Image.DecompressionBombError):
        pixels = int(str(error).partition("(")[2].partition(" ")[0]) / 1e6
        most = f"at most {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million are read"
        return f"an image of {pixels:.0f} million pixels, where {most}; shrink it or cut it into tiles"
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as own:  # a name that no file can have
        return f"cannot be read: {own}"
    if not start:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image; the file starts with {start!r}"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"truncated or damaged image ({text}); copy the file again or leave it out"


def read_header(path: Path | str) -> ImageHeader:
    """Read size and mode, no pixel; an InputError where a file is missing, unreadable, empty or no image."""
    with _opened(path) as image:
        # Of colours with 16 bits Pillow keeps 8; the tiles' raw mode tells, such as "RGB;16B", until
        # the pixels or the EXIF data are loaded.
        tiles = getattr(image, "tile", ())
        is_deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in tiles)
        width, height = image.size
        if image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        return ImageHeader(height, width, image.mode, image.format or "?", is_deep)


def largest_value(path: Path | str) -> int:
    """Find the largest 16-bit value (of colours Pillow reads 8, the lower count as 1) or raise InputError."""
    with _opened(path) as image:
        if image.mode.startswith("I"):
            return int(np.asarray(image).max())
        return 256 * int(np.asarray(image.convert("RGB")).max()) + 255


def _to_rgb(image: Image.Image, path: Path | str, bit_depth: int = 16) -> Image.Image:
    """Bring any mode to 8-bit RGB by a rule that does not look at the image's content."""
    mode = image.mode
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.max() > 65535 or values.min() < 0):
            raise InputError(f"{path}: 32-bit image with values outside 0..65535; save it with 8 or 16 bits")
        # One scale for all images: stretching each to its own range would hide how bright it is.
        top = 2**bit_depth - 1
        image = Image.fromarray(((np.minimum(values, top) * 255 + top // 2) // top).astype(np.uint8))
    elif mode == "F":
        raise InputError(f"{path}: floating-point image of unknown range; save it with 8 or 16 bits")
    elif "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        # The colour under transparent pixels is whatever an editor left there; black is the same every time.
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _open_rgb(path: Path | str, bit_depth: int = 16) -> Image.Image:
    with _opened(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image), path, bit_depth)


def read_image(path: Path | str, bit_depth: int = 16) -> NDArray[np.uint8]:
    """Decode an image of any mode to RGB, (H, W, 3) uint8.

    Grey becomes three equal channels; transparency is laid over black; palette and CMYK are converted; EXIF
    rotation is applied; of several frames the first counts. Of 16-bit files (`ImageRecord.bit_depth`) values
    from 0 to 2^bit_depth - 1 are scaled to 0..255, those above count as 255. A file that cannot be read is an
    InputError, whose line names it and the reason.
    """
    return np.array(_open_rgb(path, bit_depth))


def as_rgb(image: Any, bit_depth: int = 16, name: str = "image") -> NDArray[np.uint8]:
    """Bring an image in memory, or a file's, to RGB, (H, W, 3) uint8, by the rules of :func:`read_image`.

    Args:
        image: A path; a Pillow image; an array (H, W) or (H, W, C); or a tensor (H, W) or (C, H, W), C of 1
            (grey), 3 (RGB) or 4 (RGBA). Numbers are bool, uint8, uint16 (see bit_depth) or floating, 0 to 1.
        bit_depth: Bits in use of uint16, see :func:`read_image`.
        name: What the error calls it.
    Raises:
        InputError: It is none of these, empty, or holds numbers out of range.
    """
    if isinstance(image, str | os.PathLike):
        if os.path.exists(image) and not (os.path.isfile(image) or os.path.isdir(image)):
            raise InputError(f"{image}: expected an image file, found a pipe or a device")
        return read_image(Path(image), bit_depth)
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width, name)
        try:
            return np.array(_to_rgb(ImageOps.exif_transpose(image), name, bit_depth))
        except InputError:
            raise
        except _DECODE_ERRORS as error:  # Pillow decodes when it is asked for pixels
            raise InputError(f"{name}: truncated or damaged image ({error})") from error
    if hasattr(image, "detach") and hasattr(image, "cpu"):  # a tensor, without importing torch
        try:
            # NumPy has neither bfloat16 nor the lazy signs that tensors may have.
            image = (image.float() if image.is_floating_point() else image).numpy(force=True)
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{name}: expected a dense tensor of numbers, found {reason}") from None
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        expected = "a path, a Pillow image, an array (H, W[, C]) or a tensor ([C, ]H, W)"
        raise InputError(f"{name}: expected {expected}, found {type(image).__name__}")
    image = np.asarray(image)  # of subclasses some index in their own way
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise InputError(f"{name}: expected (H, W) or (H, W, C) with C of 1, 3 or 4, found {image.shape}")
    _check_size(pixels.shape[0], pixels.shape[1], name)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            low, high = pixels.min(), pixels.max()
            raise InputError(f"{name}: expected floating-point values from 0 to 1, found {low:g} to {high:g}")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        top = 2**bit_depth - 1
        pixels = ((np.minimum(pixels, top).astype(np.int64) * 255 + top // 2) // top).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise InputError(
            f"{name}: expected bool, uint8, uint16 or floating-point values, found {pixels.dtype}"
        )
    if pixels.shape[2] == 4:
        return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(pixels), "RGBA"), name))
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _check_size(height: int, width: int, name: str) -> None:
    """Refuse an image in memory without a pixel, or with more than Pillow reads of a file."""
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if not 0 < height * width <= most:
        expected = f"expected 1 to {most / 1e6:.0f} million pixels, found {width} x {height}"
        raise InputError(f"{name}: {expected}; shrink it or cut it into tiles")


def read_mask(path: Path | str) -> NDArray[np.bool_]:
    """Decode a mask, (H, W) bool: any non-zero pixel is anomalous; an InputError where it cannot be read.

    A pixel counts where one of its colour channels is not zero after transparency was laid over black; in a
    JPEG, whose compression leaves small values beside every edge, where one is above 127.
    """
    with _opened(path) as image:
        threshold = 127 if image.format == "JPEG" else 0
        upright = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # Rounding 16 bits to 8 would lose small labels.
            return np.abs(np.asarray(upright)) > threshold
        return np.asarray(_to_rgb(upright, path)).max(axis=-1) > threshold


def save(pixels: NDArray[np.uint8] | NDArray[np.bool_], path: Path) -> None:
    """Save an image or a mask; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def check_mask_size(mask_path: Path, mask_shape: tuple[int, ...], image_path: Path) -> None:
    """Refuse, by an InputError, a mask whose size is not its image's."""
    height, width = read_header(image_path)[:2]
    if mask_shape != (height, width):
        other = f"its image {image_path.name} is {width}x{height}; a mask must have its image's size"
        raise InputError(f"{mask_path}: mask is {mask_shape[1]}x{mask_shape[0]} pixels, but {other}")


def _placement(height: int, width: int, size: int, policy: str) -> tuple[_Box, tuple[int, int, int, int]]:
    """Return which part of the source goes where: two boxes (left, top, right, bottom)."""
    if policy == "stretch":
        return (0, 0, width, height), (0, 0, size, size)
    if policy == "short_side_center_crop":
        short = min(height, width)
        new_h, new_w = size * height // short, size * width // short
        top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
        # Resizing only the part that stays equals resizing all and cropping, without a long side's memory.
        scale_h, scale_w = height / new_h, width / new_w
        right, bottom = min((left + size) * scale_w, width), min((top + size) * scale_h, height)
        return (left * scale_w, top * scale_h, right, bottom), (0, 0, size, size)
    if policy == "pad":
        long = max(height, width)
        new_h, new_w = max(1, round(size * height / long)), max(1, round(size * width / long))
        top, left = (size - new_h) // 2, (size - new_w) // 2
        return (0, 0, width, height), (left, top, left + new_w, top + new_h)
    raise InputError(f"resize: expected one of {', '.join(RESIZE_POLICIES)}, found {policy!r}")


def _resize(image: Image.Image, size: int, policy: str, resample: Image.Resampling) -> Image.Image:
    source, (left, top, right, bottom) = _placement(image.height, image.width, size, policy)
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image.resize((right - left, bottom - top), resample, box=source), (left, top))
    return canvas


def resize_image(image: NDArray[np.uint8], size: int, policy: str = "stretch") -> NDArray[np.uint8]:
    """Resize an image, (H, W, 3) uint8, to (size, size, 3), bilinear with antialiasing.

    The policy is "stretch" (whole image, aspect ratio given up), "short_side_center_crop" (as published: what
    lies outside the central square is lost) or "pad" (whole image, aspect ratio kept, black bars).
    """
    return np.array(_resize(Image.fromarray(image), size, policy, Image.Resampling.BILINEAR))


def resize_mask(mask: NDArray[np.bool_], size: int, policy: str = "stretch") -> NDArray[np.bool_]:
    """Resize a mask, (H, W) bool, to (size, size) by the nearest pixel, along with its image.

    A defect thinner than the step between samples could vanish, and an anomalous image would then count as
    having none. So where the nearest pixels hold none of the defect, each output pixel whose source area
    touches it counts instead. A defect that lies outside a centre crop stays lost, as published.
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    small = np.asarray(_resize(image, size, policy, Image.Resampling.NEAREST)) > 0
    if small.any() or not mask.any():
        return small
    source, (left, top, right, bottom) = _placement(mask.shape[0], mask.shape[1], size, policy)
    ys, xs = np.nonzero(mask)
    rows = np.floor((ys + 0.5 - source[1]) * (bottom - top) / (source[3] - source[1])).astype(int) + top
    columns = np.floor((xs + 0.5 - source[0]) * (right - left) / (source[2] - source[0])).astype(int) + left
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    small = np.zeros_like(small)
    small[rows[inside], columns[inside]] = True
    return small


def _threads(num_workers: int | None) -> int:
    """Choose the number of decoding threads: None for one per core this process may use, at most 32."""
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(32, cores)
    if num_workers < 0:
        raise InputError(f"num_workers: expected 0 or more, found {num_workers}")
    return max(1, num_workers)


def parallel_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item],
    *, num_workers: int | None = None, ahead: int = 64,
) -> Iterator[_Result]:  # fmt: skip
    """Map in threads, results in the order of the items, at most `ahead` of them unread.

    Threads suffice for images: Pillow and NumPy let go of the interpreter lock while they compute. The first
    exception ends the iteration; what was not yet started is cancelled.
    """
    pending: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(_threads(num_workers), thread_name_prefix="images")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def normalised(
    image: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Normalise an image by mean and deviation per channel, of values in 0..1: (H, W, 3) to (3, H, W)."""
    scale = (1.0 / (255.0 * np.array(std))).astype(np.float32)[:, None, None]
    offset = (-np.array(mean) / np.array(std)).astype(np.float32)[:, None, None]
    return image.transpose(2, 0, 1) * scale + offset


def load_images(
    paths: Sequence[Path | str], *, size: int, resize: str = "stretch", mean: tuple[float, float, float],
    std: tuple[float, float, float], batch_size: int, num_workers: int | None = None,
    bit_depths: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Decode, resize and normalise images in batches, in parallel, in order.

    Args:
        paths: N image files.
        size: Side of the result, pixels.
        resize: Policy, see `resize_image`.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        batch_size: B; the last batch may be smaller.
        num_workers: Decoding threads; None for one per core.
        bit_depths: Of each file, see `read_image`; None for all 16.
    Yields:
        Indices into paths, (B,) int64, and images, (B, 3, size, size) float32.
    Raises:
        InputError: An image is bad (the line names file and reason) or a parameter is wrong.
    """
    # Torch takes seconds to import, and whoever looks through a folder or fetches a dataset needs none.
    import torch

    if size < 1 or batch_size < 1:
        raise InputError(f"expected size and batch_size of at least 1, found {size} and {batch_size}")

    def load(file: tuple[Path | str, int]) -> Tensor:
        small = _resize(_open_rgb(*file), size, resize, Image.Resampling.BILINEAR)
        return torch.from_numpy(normalised(np.asarray(small), mean, std))

    # Read ahead while the network computes, but never more than about two batches lie in memory.
    ahead = max(batch_size, _threads(num_workers)) + batch_size
    files = zip(paths, bit_depths or [16] * len(paths), strict=True)
    loaded = parallel_map(load, files, num_workers=num_workers, ahead=ahead)
    for start in range(0, len(paths), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(paths)))
        batch = torch.empty(len(indices), 3, size, size)
        for image in batch:
            image.copy_(next(loaded))
        yield indices, batch


def load_masks(
    records: Sequence[ImageRecord], *, size: int, resize: str = "stretch", num_workers: int | None = None
) -> NDArray[np.bool_]:
    """Load the masks of N records, (N, size, size) bool, resized along with their images.

    Those that are normal, or have no mask, get an empty mask. For resize and num_workers see `load_images`.
    A bad mask, or one whose size differs from its image's, is an InputError.
    """

    def load(record: ImageRecord) -> NDArray[np.bool_]:
        if record.mask_path is None or not record.is_anomalous:
            return np.zeros((size, size), dtype=bool)
        mask = read_mask(record.mask_path)
        check_mask_size(record.mask_path, mask.shape, record.path)
        return resize_mask(mask, size, resize)

    masks = np.empty((len(records), size, size), dtype=bool)
    for index, mask in enumerate(parallel_map(load, records, num_workers=num_workers)):
        masks[index] = mask
    return masks
