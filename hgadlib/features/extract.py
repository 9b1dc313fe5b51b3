"""Features of a list of images, computed once and kept on disk under a key that says it all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from hgadlib.datasets import images as decoding
from hgadlib.datasets import images as images_module
from hgadlib.datasets.images import RESIZE_POLICIES, load_images
from hgadlib.errors import InputError
from hgadlib.fast import convolution as folding
from hgadlib.fast import convolution as fused_convolution
from hgadlib.features import backbone as backbone_module
from hgadlib.features.backbone import Backbone, flatten_maps
from hgadlib.features.cache import (
    EntryWriter,
    Layout,
    check_disk,
    default_cache_dir,
    locked_entry,
    open_entry,
)
from hgadlib.features.store import STORAGES, Features, choose_storage, empty_levels, place_levels, with_index
from hgadlib.progress import progress_bar


@dataclass(frozen=True)
class Extraction:
    """What is to be computed, and how."""

    paths: tuple[Path, ...]
    backbone: Backbone
    image_size: int
    resize: str
    dtype: str
    device: torch.device
    batch_size: int
    num_workers: int | None
    progress: bool

    def layout(self) -> Layout:
        """Find the shapes, by one empty image."""
        grids = tuple(self.backbone.grids(self.image_size))
        return Layout(len(self.paths), grids, tuple(self.backbone.channels), self.dtype)

    def ingredients(self) -> dict[str, Any]:
        """Everything that shapes a feature."""
        return {
            "backbone": self.backbone.identity(),
            "image_size": self.image_size,
            "resize": self.resize,
            "dtype": self.dtype,
            "software": {"code": _code_digest(), "pillow": PIL.__version__},
            "files": file_facts(self.paths),
        }

    def check_unchanged(self, ingredients: dict[str, Any]) -> None:
        """Refuse features of files that were replaced while they were read."""
        for before, after in zip(ingredients["files"], file_facts(self.paths), strict=True):
            if before != after:
                raise InputError(f"{after[0]}: changed while its features were computed; run again")

    def batches(self) -> Iterator[list[Tensor]]:
        """Compute batch after batch, per level (B, H_l * W_l, C_l) in the number type asked for."""
        loaded = load_images(
            self.paths,
            size=self.image_size,
            resize=self.resize,
            mean=self.backbone.mean,
            std=self.backbone.std,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        with progress_bar(len(self.paths), "features", show=self.progress) as bar:
            for indices, images in loaded:
                if self.device.type == "cuda":
                    images = images.pin_memory().to(self.device, non_blocking=True)
                with torch.inference_mode():
                    wide = flatten_maps(self.backbone(images))
                    levels = [level.to(getattr(torch, self.dtype)) for level in wide]
                    for before, level in zip(wide, levels, strict=True):
                        if not torch.isfinite(level).all():
                            raise self._not_finite(indices, before, level)
                yield levels
                bar.update(len(indices))

    def _not_finite(self, indices: Tensor, wide: Tensor, level: Tensor) -> InputError:
        row = int((~torch.isfinite(level)).flatten(1).any(1).nonzero()[0, 0])
        path, largest = self.paths[int(indices[row])], float(wide[row].abs().max())
        if torch.isfinite(wide[row]).all():
            return InputError(
                f"{path}: a feature of size {largest:.3g} is more than float16 holds (65504); "
                "set features.dtype to float32"
            )
        return InputError(
            f"{path}: its features are not finite; the weights or features.autocast are to blame"
        )


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """Hash everything that shapes a feature.

    Args:
        ingredients: Values that JSON can write.

    Returns:
        sha256, hexadecimal.
    """
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_facts(paths: Sequence[Path | str]) -> list[tuple[str, int, int]]:
    """List absolute path, size in bytes and time of change in ns of each file.

    Raises:
        InputError: A file is missing or cannot be seen.
    """
    facts = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: expected an image file, found none ({error.strerror})") from error
        facts.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return facts


def _code_digest() -> str:
    """Hash the code that decodes images and computes features, so that a change of it is never overlooked."""
    digest = hashlib.sha256()
    for module in (backbone_module, decoding, folding, fused_convolution, images_module):
        digest.update(Path(module.__file__ or "").read_bytes())
    return digest.hexdigest()


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
        resize: Policy of `hgadlib.datasets.images.resize_image`.
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
