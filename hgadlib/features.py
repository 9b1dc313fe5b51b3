"""Features of a list of images, computed once and kept on disk under a key that says it all."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from hgadlib.backbone import Backbone
from hgadlib.errors import InputError
from hgadlib.extraction import Extraction, cache_key
from hgadlib.feature_cache import (
    EntryWriter,
    check_disk,
    default_cache_dir,
    locked_entry,
    open_entry,
)
from hgadlib.feature_store import (
    STORAGES,
    Features,
    choose_storage,
    empty_levels,
    global_features,
    place_levels,
    with_index,
)
from hgadlib.images import RESIZE_POLICIES

__all__ = ["DTYPES", "STORAGES", "Features", "dataset_features", "global_features"]

DTYPES = ("float16", "float32")


class _HasPath(Protocol):
    """What features need of a record."""

    @property
    def path(self) -> Path: ...


def dataset_features(
    records: Sequence[_HasPath],
    backbone: Backbone,
    *,
    image_size: int,
    resize: str = "stretch",
    dtype: str = "float16",
    storage: str = "auto",
    device: torch.device | str = "cpu",
    cache_dir: Path | str | None = None,
    keep: bool = True,
    batch_size: int = 16,
    num_workers: int | None = None,
    progress: bool = True,
) -> Features:
    """Compute the features of some images, or find them in the cache.

    Args:
        records: N records, each with a `path`.
        backbone: The network; it is moved to the device.
        image_size: Side of the images, pixels.
        resize: Policy of `hgadlib.images.resize_image`.
        dtype: Number type that features are kept in: "float16", half the size, or "float32".
        storage: Where features are kept: "device", "host", "file" (memory-mapped, for more than memory
            holds), or "auto" for the first of them that has room. On the CPU device and host are one.
        device: Where the backbone computes and training will.
        cache_dir: The cache's folder; None for HGAD_CACHE, else ~/.cache/hgad.
        keep: Whether to keep them on disk too. If not, they must fit into memory.
        batch_size: Images per forward pass.
        num_workers: Decoding threads; None for one per core.
        progress: Whether to show a bar and to say how large the features will be.

    Returns:
        The features, in the order of the records.

    Raises:
        InputError: A parameter or an image is wrong, a file changed meanwhile, or there is no room.
    """
    start = time.perf_counter()
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("storage", storage, STORAGES if keep else STORAGES[:-1]),
        ("resize", resize, RESIZE_POLICIES),
    ):
        if value not in known:
            raise InputError(f"features.{name}: expected one of {', '.join(known)}, found {value!r}")
    if not records:
        raise InputError("features: expected at least one image, found none")
    if backbone.input_size not in (None, image_size):
        raise InputError(
            f"image_size: expected {backbone.input_size}, where the pyramid starts, found {image_size}"
        )
    extraction = Extraction(
        tuple(Path(record.path) for record in records),
        backbone.to(with_index(device)),
        image_size=image_size,
        resize=resize,
        dtype=dtype,
        device=with_index(device),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    if not keep:
        return _in_memory(extraction, storage, start)
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    return _through_cache(extraction, storage, folder, start)


def _in_memory(extraction: Extraction, storage: str, start: float) -> Features:
    """Compute features that are not to be kept on disk."""
    ingredients, layout = extraction.ingredients(), extraction.layout()
    where = choose_storage(layout.nbytes, storage, extraction.device)
    if where == "file":
        raise InputError(
            f"features of {layout.images} images need {layout.nbytes / 1e9:.2f} GB, which memory has no room "
            "for; keep them on disk, or take fewer images at a time"
        )
    levels = empty_levels(layout.shapes, layout.dtype, where, extraction.device)
    row = 0
    for batch in extraction.batches():
        for level, part in zip(levels, batch, strict=True):
            level[row : row + len(part)] = part
        row += len(batch[0])
    extraction.check_unchanged(ingredients)
    seconds = time.perf_counter() - start
    return Features(tuple(levels), layout.grids, cache_key(ingredients), where, False, seconds)


def _through_cache(extraction: Extraction, storage: str, folder: Path, start: float) -> Features:
    """Find features in the cache, or compute them into it."""

    def say(text: str) -> None:
        if extraction.progress:
            tqdm.write(text, file=sys.stderr)

    ingredients = extraction.ingredients()
    key = cache_key(ingredients)
    what = f"features of {len(extraction.paths)} images"
    with locked_entry(
        folder, key, on_wait=lambda: say(f"{what}: another process computes them; waiting for it")
    ) as entry:
        found = open_entry(entry, key)
        cached = found is not None
        if found is None:
            layout = extraction.layout()
            choose_storage(layout.nbytes, storage, extraction.device)  # refuses before the work, not after
            shutil.rmtree(entry, ignore_errors=True)
            check_disk(folder, layout.nbytes, what=what)
            say(f"{what}: {layout.nbytes / 1e9:.2f} GB in {folder}")
            with EntryWriter(entry, layout) as writer:
                for batch in extraction.batches():
                    writer.append([level.cpu().numpy() for level in batch])
                extraction.check_unchanged(ingredients)
                writer.commit(key, ingredients, seconds=round(time.perf_counter() - start, 3))
            found = open_entry(entry, key)
    if found is None:
        raise InputError(
            f"features cache: what was just written in {folder} cannot be read back; check the disk"
        )
    layout, arrays = found
    where = choose_storage(layout.nbytes, storage, extraction.device)
    levels = place_levels(arrays, where, extraction.device)
    return Features(tuple(levels), layout.grids, key, where, cached, time.perf_counter() - start)
