"""Defects drawn on photographs of normal products, each with its mask: something to select settings on.

All lengths are fractions of the image's short side. Drawing happens in a square window of that side, with
the demo's brushes. Severity, in 0..1, runs from subtle to clear.

Source: the patch follows Li et al., "CutPaste", CVPR 2021, in spirit; here it serves to select settings,
never to train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hgadlib.datasets import demo_defects as defects
from hgadlib.datasets.demo_surface import Array, Surface, mix, noise

MIN_SIDE = 32
"""Shortest side that can show a defect, pixels."""
COVERED = 0.33
"""Coverage from which on a pixel belongs to the mask; what lies below is the defect's soft edge."""
EDGE = 0.03
"""How far the soft edge reaches beyond the mask at most, as a fraction of the short side (or 2 pixels)."""
_PLACES = 8
_SEEN_CHANGE, _SEEN_SHARE = 3.0, 0.5

Draw = Callable[[Array, defects.Point, float, np.random.Generator], tuple[Array, Array]]


def _scratch(
    photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Score a line, lighter or darker than its ground."""
    flat = np.zeros(photo.shape[:2], np.float32)
    # The demo's grooves are lighter on matt ground and darker on gloss.
    surface, line = defects.scratch(Surface(photo, flat, flat + rng.integers(2)), center, severity, rng)
    return surface.albedo, line


def _stain(
    photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Soak a patch, or discolour it."""
    flat = np.zeros(photo.shape[:2], np.float32)
    surface = Surface(photo, flat, flat)
    if rng.uniform() < 0.5:
        surface, patch = defects.stain(surface, center, severity, rng)
    else:
        red, green, blue = (float(value) for value in rng.uniform(0.0, 1.0, 3))
        surface, patch = defects.color(surface, center, 0.6 * severity, rng, tint=(red, green, blue))
    return surface.albedo, patch


def _region(side: int, center: defects.Point, rng: np.random.Generator) -> Array:
    return defects.blob(side, center, rng.uniform(0.05, 0.14), 0.25, 0.2, rng)


def _patch(
    photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Lay a piece from elsewhere in the picture, turned, over a region."""
    side = photo.shape[0]
    cover = _region(side, center, rng)
    turned = np.rot90(photo, int(rng.integers(1, 4)))
    elsewhere = np.roll(turned, tuple(rng.integers(side // 4, side - side // 4, 2).tolist()), (0, 1))
    return mix(photo, elsewhere, cover * (0.45 + 0.55 * severity)), cover


def _blur(
    photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Wipe out the detail of a region."""
    side = photo.shape[0]
    cover = _region(side, center, rng)
    sigma = (0.008 + 0.016 * severity) * side
    return mix(photo, ndimage.gaussian_filter(photo, (sigma, sigma, 0)), cover), cover


def _texture(
    photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Roughen a region."""
    side = photo.shape[0]
    cover = _region(side, center, rng)
    grain = (0.04 + 0.09 * severity) * noise(rng, side, rng.uniform(30, 120), 2)
    return (photo + (grain * cover)[..., None]).astype(np.float32), cover


_DRAW: Mapping[str, Draw] = MappingProxyType(
    {"scratch": _scratch, "stain": _stain, "patch": _patch, "blur": _blur, "texture": _texture}
)
KINDS: tuple[str, ...] = tuple(_DRAW)
"""Kinds of synthetic defects."""


def draw_defect(
    image: NDArray[np.uint8], kind: str, severity: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
    """Draw one defect where it can be seen.

    Args:
        image: A normal image, (H, W, 3) uint8, its short side at least `MIN_SIDE`.
        kind: One of `KINDS`.
        severity: 0 for subtle, 1 for clear.
        rng: Draws place, form and colour.

    Returns:
        The image with the defect, (H, W, 3) uint8, and its mask, (H, W) bool; a grey image stays grey. None
        where the image shows no such defect wherever it is put: a blank sheet cannot be blurred.
    """
    side = min(image.shape[:2])
    is_grey = bool((image == image[..., :1]).all())
    for _ in range(_PLACES):
        top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        window = image[top : top + side, left : left + side]
        center = (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.2, 0.8)))
        changed, cover = _DRAW[kind]((window / np.float32(255)).astype(np.float32), center, severity, rng)
        if is_grey:
            changed = np.repeat(changed.mean(axis=2, keepdims=True), 3, axis=2)
        drawn = np.clip(changed * 255.0 + 0.5, 0, 255).astype(np.uint8)
        inside = cover > COVERED
        reach = ndimage.distance_transform_edt(~inside) if inside.any() else np.full(cover.shape, np.inf)
        # Outside the edge the picture keeps its very bytes: no faint tail of a brush, no rounding.
        touched = (cover > 0) & (reach <= max(2.0, EDGE * side))
        drawn = np.where(touched[..., None], drawn, window)
        if _is_seen(window, drawn, inside):
            result, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
            result[top : top + side, left : left + side] = drawn
            mask[top : top + side, left : left + side] = inside
            return result, mask
    return None


def _is_seen(before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bool:
    """Whether the marked pixels differ, most of them and by some grey levels: else the mask would lie."""
    if not mask.any():
        return False
    change = np.abs(after[mask].astype(np.int16) - before[mask]).max(axis=1)
    return bool(change.mean() >= _SEEN_CHANGE and (change >= 2).mean() >= _SEEN_SHARE)
