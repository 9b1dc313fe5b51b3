"""Surfaces of the demo dataset: colour, height and gloss of every pixel, lit and photographed.

Lengths are in fractions of the image side, colours are linear in 0..1. Everything random comes from the
generator that is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[np.float32]
Color = Array | tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """What a camera looks at from above, float32."""

    albedo: Array
    """Colour, (n, n, 3) in 0..1."""
    height: Array
    """Towards the camera, (n, n), in fractions of the side."""
    gloss: Array
    """0 for matt, 1 for polished metal, (n, n)."""

    @property
    def side(self) -> int:
        """Pixels along one side."""
        return int(self.height.shape[0])


def grid(side: int) -> tuple[Array, Array]:
    """Return x (to the right) and y (down) of the pixel centres, (side, side) each, in 0..1."""
    centers = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = np.meshgrid(centers, centers)
    return x, y


def ramp(values: NDArray[np.floating], low: float, high: float) -> Array:
    """Rise smoothly from 0 at low to 1 at high (falls where high < low)."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return (t * t * (3.0 - 2.0 * t)).astype(np.float32)


def inside(distance: NDArray[np.floating], side: int, softness: float = 1.0) -> Array:
    """Turn a signed distance (negative inside, fractions of the side) into antialiased coverage."""
    return np.clip(0.5 - distance * side / softness, 0.0, 1.0).astype(np.float32)


def noise(rng: np.random.Generator, side: int, cells: float, octaves: int = 1) -> Array:
    """Draw smooth noise of zero mean and about unit deviation, (side, side).

    The coarsest octave has so many cells along one side; each further one twice as many, half as strong.
    """
    total = np.zeros((side, side), dtype=np.float32)
    weight = 1.0
    for _ in range(octaves):
        count = max(2, min(side, round(cells)))
        coarse = Image.fromarray(rng.standard_normal((count, count), dtype=np.float32))
        total += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        cells, weight = cells * 2, weight / 2
    return ((total - total.mean()) / (total.std() + 1e-6)).astype(np.float32)


def mix(base: Array, top: Color, alpha: Array) -> Array:
    """Lay a colour, (3,) or (n, n, 3), over another with opacity alpha, (n, n)."""
    a = alpha[..., None]
    return (base * (1.0 - a) + np.asarray(top, dtype=np.float32) * a).astype(np.float32)


def shade(surface: Surface, rng: np.random.Generator) -> Array:
    """Light a surface by a large lamp at the upper left, with soft shadows: radiance, (n, n, 3).

    The lamp's direction and strength are drawn within what a production line would allow.
    """
    side = surface.side
    azimuth = np.deg2rad(rng.uniform(220, 240))
    light = np.array([np.cos(azimuth) * 0.62, np.sin(azimuth) * 0.62, 0.78], dtype=np.float32)
    slope_y, slope_x = np.gradient(surface.height * side)
    norm = 1.0 / np.sqrt(slope_x**2 + slope_y**2 + 1.0)
    nx, ny, nz = -slope_x * norm, -slope_y * norm, norm
    diffuse = np.clip(nx * light[0] + ny * light[1] + nz * light[2], 0.0, None)
    # What the mirror direction sees: a bright soft box around the lamp, a dim room elsewhere.
    rx, ry, rz = 2 * nz * nx, 2 * nz * ny, 2 * nz * nz - 1
    towards = rx * light[0] + ry * light[1] + rz * light[2]
    mirror = 0.22 + 0.26 * ramp(towards, -0.4, 0.9) + 0.75 * ramp(towards, 0.86, 1.0)
    radiance = surface.albedo * ((0.36 + 0.82 * diffuse) * (1.0 - 0.55 * surface.gloss))[..., None]
    radiance += (surface.gloss * mirror)[..., None] * (0.35 + 0.65 * surface.albedo)
    x, y = grid(side)
    tilt_x, tilt_y = rng.uniform(-0.06, 0.06, 2)
    lamp = rng.uniform(0.94, 1.06) * (1.0 + tilt_x * (x - 0.5) + tilt_y * (y - 0.5))
    return (radiance * (lamp * _shadow(surface.height, light))[..., None]).astype(np.float32)


def _shadow(height: Array, light: NDArray[np.float32]) -> Array:
    """Darken what lies lower than its blurred surroundings towards the lamp; computed at half resolution."""
    if not np.ptp(height):
        return np.ones_like(height)
    side = height.shape[0]
    half = np.asarray(Image.fromarray(height).resize((side // 2, side // 2), Image.Resampling.BOX))
    reach = 0.030 * side / 2
    blurred = ndimage.gaussian_filter(half, 0.018 * side / 2, mode="nearest")
    moved = ndimage.shift(blurred, (-light[1] * reach, -light[0] * reach), order=1, mode="nearest")
    deep = np.asarray(Image.fromarray(moved).resize((side, side), Image.Resampling.BILINEAR)) - height
    return (1.0 - 0.62 * ramp(deep, 0.0, 0.06)).astype(np.float32)


def photograph(radiance: Array, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Take a picture, (side, side, 3) uint8: reduce to the sensor's pixels, blur, vignette, noise."""
    factor, blur = radiance.shape[0] // side, rng.uniform(0.35, 0.6)
    small = radiance.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
    small = ndimage.gaussian_filter(small, (blur, blur, 0))
    x, y = grid(side)
    small = small * (1.0 - 0.22 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None]
    # Shot noise grows with the root of the light; a little of it is common to the three channels.
    strength = 0.006 + 0.010 * np.sqrt(np.clip(small, 0.0, 1.0))
    grain = rng.standard_normal(small.shape, dtype=np.float32)
    grain += 0.7 * rng.standard_normal((side, side, 1), dtype=np.float32)
    return np.clip((small + strength * grain) * 255.0 + 0.5, 0, 255).astype(np.uint8)
