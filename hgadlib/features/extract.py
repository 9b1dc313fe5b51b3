"""Features of a list of images, computed once and kept on disk under a key that says it all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from hgadlib.datasets.images import load_images
from hgadlib.datasets.records import ImageRecord
from hgadlib.errors import InputError
from hgadlib.features.backbone import Backbone, flatten_maps
from hgadlib.features.cache import locked, open_entry, write_entry
from hgadlib.features.store import (
    Features,
    Storage,
    choose_storage,
    fill_levels,
    place_levels,
    resolve_device,
)
from hgadlib.files import cache_dir, content_digests
from hgadlib.progress import progress_bar

# Raise this number whenever a change of the code gives other features, by more than the rounding of float32,
# for the same image and settings: decoding, resizing or normalisation (datasets/images.py), the network's
# forward pass (features/backbone.py, fast/convolution.py) or this file. It makes every stored feature stale.
FEATURES_VERSION = 1


def dataset_features(
    records: Sequence[ImageRecord],
    backbone: Backbone,
    *,
    image_size: int,
    resize: str = "stretch",
    dtype: Literal["float16", "float32"] = "float16",
    storage: Storage = "auto",
    device: torch.device | str = "cpu",
    keep: bool = True,
    batch_size: int = 16,
    num_workers: int | None = None,
    progress: bool = True,
) -> Features:
    """Compute images' features, in their order, or find them in the cache (HGAD_CACHE, else ~/.cache/hgad).

    Args:
        records: N images.
        backbone: The network; it is moved to the device.
        image_size: Side of the images, pixels.
        resize: Policy of `hgadlib.datasets.images.resize_image`.
        dtype: Number type that features are kept in: "float16", half the size, or "float32".
        storage: Where features are kept: "device", "host", "file" (memory-mapped, for more than memory
            holds), or "auto" for the first of them that has room. On the CPU device and host are one.
        device: Where the backbone computes and training will.
        keep: Whether to keep them on disk too. If not, they must fit into memory.
        batch_size: Images per forward pass.
        num_workers: Decoding threads; None for one per core.
        progress: Whether to show a bar and to say how large the features will be.
    Raises:
        InputError: A parameter or an image is wrong, a file changed meanwhile, or there is no room.
    """
    start = time.perf_counter()
    if not records:
        raise InputError("features: expected at least one image, found none")
    device = resolve_device(device)
    backbone.to(device)
    paths = [record.path for record in records]
    bit_depths = [record.bit_depth for record in records]
    facts = _file_facts(paths)
    try:
        contents = content_digests(paths)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    ingredients = {
        "version": FEATURES_VERSION, "backbone": backbone.identity(), "image_size": image_size,
        "resize": resize, "dtype": dtype, "pillow": PIL.__version__, "contents": contents,
        **({"bit_depths": bit_depths} if min(bit_depths) < 16 else {}),
    }  # fmt: skip
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), allow_nan=False)
    key = hashlib.sha256(text.encode()).hexdigest()
    entry = cache_dir() / key

    # No lock is needed to read: an entry is complete or absent, and the cache may be read-only.
    found, cached = open_entry(entry) if keep else None, True
    if found is None:
        grids = tuple(backbone.grids(image_size))
        shapes = [(len(paths), h * w, c) for (h, w), c in zip(grids, backbone.channels, strict=True)]
        nbytes = sum(map(math.prod, shapes)) * torch.finfo(getattr(torch, dtype)).bits // 8
        where = choose_storage(nbytes, storage, device)  # refuses before the work, not after
        loaded = load_images(
            paths, size=image_size, resize=resize, mean=backbone.mean, std=backbone.std,
            batch_size=batch_size, num_workers=num_workers, bit_depths=bit_depths,
        )  # fmt: skip
        batches = _compute(backbone, loaded, facts, dtype=dtype, device=device, progress=progress)
        if not keep:
            if where == "file":
                raise InputError(
                    f"features of {len(paths)} images need {nbytes / 1e9:.2f} GB, which memory has no room "
                    "for; keep them on disk, or take fewer images at a time"
                )
            target = device if where == "device" else torch.device("cpu")
            levels = fill_levels(shapes, batches, dtype, target)
            return Features(tuple(levels), grids, key, where, False, time.perf_counter() - start)

        def say(text: str) -> None:
            if progress:
                tqdm.write(f"features of {len(paths)} images: {text}", file=sys.stderr)

        with locked(entry, on_wait=lambda: say("another process computes them; waiting for it")):
            found = open_entry(entry)
            if found is None:
                cached = False
                say(f"{nbytes / 1e9:.2f} GB in {entry.parent}")
                arrays = ([level.cpu().numpy() for level in batch] for batch in batches)
                write_entry(entry, shapes, dtype, arrays, grids=grids, ingredients=ingredients)
                found = open_entry(entry)
        if found is None:
            raise InputError(
                f"features cache: what was just written in {entry.parent} cannot be read back; check the disk"
            )
    grids, stored = found
    where = choose_storage(sum(array.nbytes for array in stored), storage, device)
    levels = place_levels(stored, where, device)
    return Features(tuple(levels), grids, key, where, cached, time.perf_counter() - start)


def _compute(
    backbone: Backbone, loaded: Iterable[tuple[Tensor, Tensor]], facts: list[tuple[str, int, int]], *,
    dtype: str, device: torch.device, progress: bool,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """Compute batch after batch, per level (B, H_l * W_l, C_l) in the number type asked for."""
    paths = [path for path, _, _ in facts]
    with progress_bar(len(paths), "features", show=progress) as bar:
        for indices, images in loaded:
            if device.type == "cuda":
                images = images.pin_memory().to(device, non_blocking=True)
            with torch.inference_mode():
                wide = flatten_maps(backbone(images))
                levels = [level.to(getattr(torch, dtype)) for level in wide]
                for before, level in zip(wide, levels, strict=True):
                    if not torch.isfinite(level).all():
                        row = int((~torch.isfinite(level)).flatten(1).any(1).nonzero()[0, 0])
                        raise _not_finite(paths[int(indices[row])], before[row])
            yield levels
            bar.update(len(indices))
    for then, now in zip(facts, _file_facts(paths), strict=True):
        if then != now:
            raise InputError(f"{then[0]}: changed while its features were computed; run again")


def _not_finite(path: str, features: Tensor) -> InputError:
    if torch.isfinite(features).all():
        largest = float(features.abs().max())
        return InputError(
            f"{path}: a feature of size {largest:.3g} is more than float16 holds (65504); "
            "set features.dtype to float32"
        )
    return InputError(f"{path}: its features are not finite; the backbone's weights are to blame")


def _file_facts(paths: Sequence[Path | str]) -> list[tuple[str, int, int]]:
    """List absolute path, size in bytes and time of change in ns of each file."""
    facts = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: expected an image file, found none ({error.strerror})") from error
        facts.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return facts
