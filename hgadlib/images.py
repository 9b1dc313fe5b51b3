"""Decode, resize and normalise images: files -> (B, 3, H, W); masks -> (N, H, W) bool."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hgadlib.decoding import check_mask_size, open_rgb, read_header, read_image, read_mask
from hgadlib.errors import InputError

__all__ = [
    "RESIZE_POLICIES", "ResizePolicy", "load_images", "load_masks", "parallel_map", "read_header",
    "read_image", "read_mask", "resize_image", "resize_mask", "worker_count",
]  # fmt: skip

ResizePolicy = Literal["stretch", "short_side_center_crop", "pad"]
RESIZE_POLICIES: tuple[str, ...] = ("stretch", "short_side_center_crop", "pad")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _HasMask(Protocol):
    """What `load_masks` needs of a record."""

    @property
    def path(self) -> Path: ...
    @property
    def is_anomalous(self) -> bool: ...
    @property
    def mask_path(self) -> Path | None: ...


def _placement(
    height: int, width: int, size: int, policy: str
) -> tuple[tuple[float, float, float, float], tuple[int, int, int, int]]:
    """Say which part of the source goes where: source box and target box, both (left, top, right, bottom)."""
    if policy == "stretch":
        return (0.0, 0.0, float(width), float(height)), (0, 0, size, size)
    if policy == "short_side_center_crop":
        short = min(height, width)
        new_h, new_w = size * height // short, size * width // short
        top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
        # Resizing only the part that stays equals resizing all and cropping, without a long side's memory.
        scale_h, scale_w = height / new_h, width / new_w
        box = (left * scale_w, top * scale_h, (left + size) * scale_w, (top + size) * scale_h)
        return (box[0], box[1], min(box[2], width), min(box[3], height)), (0, 0, size, size)
    if policy == "pad":
        long = max(height, width)
        new_h, new_w = max(1, round(size * height / long)), max(1, round(size * width / long))
        top, left = (size - new_h) // 2, (size - new_w) // 2
        return (0.0, 0.0, float(width), float(height)), (left, top, left + new_w, top + new_h)
    raise InputError(f"resize: expected one of {', '.join(RESIZE_POLICIES)}, found {policy!r}")


def _resize(image: Image.Image, size: int, policy: str, resample: Image.Resampling) -> Image.Image:
    source, (left, top, right, bottom) = _placement(image.height, image.width, size, policy)
    resized = image.resize((right - left, bottom - top), resample, box=source)
    if resized.size == (size, size):
        return resized
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(resized, (left, top))
    return canvas


def resize_image(image: NDArray[np.uint8], size: int, policy: str = "stretch") -> NDArray[np.uint8]:
    """Resize an image to a square, bilinear with antialiasing.

    Args:
        image: (H, W, 3) uint8.
        size: Side of the result, pixels.
        policy: "stretch" (whole image, aspect ratio given up), "short_side_center_crop" (as published: what
            lies outside the central square is lost) or "pad" (whole image, aspect ratio kept, black bars).

    Returns:
        (size, size, 3) uint8.

    Raises:
        InputError: The policy is unknown.
    """
    return np.array(_resize(Image.fromarray(image), size, policy, Image.Resampling.BILINEAR))


def resize_mask(mask: NDArray[np.bool_], size: int, policy: str = "stretch") -> NDArray[np.bool_]:
    """Resize a mask by the nearest pixel, along with its image.

    A defect thinner than the step between samples could vanish, and an anomalous image would then count as
    having none. So where the nearest pixels hold none of the defect, each output pixel whose source area
    touches it counts instead. A defect that lies outside a centre crop stays lost, as published.

    Args:
        mask: (H, W) bool.
        size: Side of the result, pixels.
        policy: As in `resize_image`.

    Returns:
        (size, size) bool.

    Raises:
        InputError: The policy is unknown.
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
    small = np.zeros((size, size), dtype=bool)
    small[rows[inside], columns[inside]] = True
    return small


def worker_count(num_workers: int | None) -> int:
    """Choose the number of decoding threads: None for one per core this process may use, at most 32.

    Raises:
        InputError: num_workers is negative.
    """
    if num_workers is not None:
        if num_workers < 0:
            raise InputError(f"num_workers: expected 0 or more, found {num_workers}")
        return max(1, num_workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cores)


def parallel_map(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    num_workers: int | None = None,
    ahead: int = 64,
) -> Iterator[_Result]:
    """Map in threads, results in the order of the items, at most `ahead` of them unread.

    Threads suffice for images: Pillow and NumPy let go of the interpreter lock while they compute.
    The first exception ends the iteration; what was not yet started is cancelled.
    """
    pending: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(worker_count(num_workers), thread_name_prefix="images")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load_images(
    paths: Sequence[Path | str],
    *,
    size: int,
    resize: str = "stretch",
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    num_workers: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode, resize and normalise images in batches, in parallel, in order.

    Args:
        paths: N image files.
        size: Side of the result, pixels.
        resize: Policy, see `resize_image`.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        batch_size: B; the last batch may be smaller.
        num_workers: Decoding threads; None for one per core.

    Yields:
        Indices into paths, (B,) int64, and images, (B, 3, size, size) float32.

    Raises:
        InputError: An image is bad (the line names file and reason) or a parameter is wrong.
    """
    if resize not in RESIZE_POLICIES:
        raise InputError(f"resize: expected one of {', '.join(RESIZE_POLICIES)}, found {resize!r}")
    if size < 1 or batch_size < 1:
        raise InputError(f"expected size and batch_size of at least 1, found {size} and {batch_size}")
    scale = (1.0 / (255.0 * np.array(std))).astype(np.float32)[:, None, None]
    offset = (-np.array(mean) / np.array(std)).astype(np.float32)[:, None, None]

    def load(path: Path | str) -> torch.Tensor:
        small = _resize(open_rgb(path), size, resize, Image.Resampling.BILINEAR)
        values = np.asarray(small).transpose(2, 0, 1) * scale
        values += offset
        return torch.from_numpy(values)

    # Read ahead while the network computes, but never more than about two batches lie in memory.
    ahead = max(batch_size, worker_count(num_workers)) + batch_size
    loaded = parallel_map(load, paths, num_workers=num_workers, ahead=ahead)
    for start in range(0, len(paths), batch_size):
        stop = min(start + batch_size, len(paths))
        batch = torch.empty(stop - start, 3, size, size)
        for index in range(stop - start):
            batch[index] = next(loaded)
        yield torch.arange(start, stop), batch


def load_masks(
    records: Sequence[_HasMask], *, size: int, resize: str = "stretch", num_workers: int | None = None
) -> NDArray[np.bool_]:
    """Load the masks of some records, resized along with their images.

    Args:
        records: N records; those that are normal, or have no mask, get an empty mask.
        size: Side of the result, pixels.
        resize: Policy, see `resize_image`.
        num_workers: Decoding threads; None for one per core.

    Returns:
        Masks, (N, size, size) bool.

    Raises:
        InputError: A mask is bad or its size differs from its image's.
    """
    masks = np.zeros((len(records), size, size), dtype=bool)

    def load(index: int) -> None:
        mask_path = records[index].mask_path
        if mask_path is None or not records[index].is_anomalous:
            return
        mask = read_mask(mask_path)
        check_mask_size(mask_path, mask.shape, records[index].path)
        masks[index] = resize_mask(mask, size, resize)

    for _ in parallel_map(load, range(len(records)), num_workers=num_workers):
        pass
    return masks
