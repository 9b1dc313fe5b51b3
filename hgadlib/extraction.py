"""Compute the features of a list of images, batch by batch, and name everything that shapes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from hgadlib import backbone as backbone_module
from hgadlib import decoding, folding, fused_convolution
from hgadlib import images as images_module
from hgadlib.backbone import Backbone, flatten_maps
from hgadlib.errors import InputError
from hgadlib.feature_cache import Layout
from hgadlib.images import load_images
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
