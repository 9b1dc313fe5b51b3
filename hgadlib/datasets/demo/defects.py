"""Drawn defects of the demo dataset: each changes a surface and says exactly where.

A defect changes colour, height and gloss before the light falls on it, so that it is lit and shadowed like
the rest of the scene. Severity, in 0..1, runs from barely visible to plain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hgadlib.datasets.demo.surface import Array, Color, Surface, grid, mix, noise, ramp

Point = tuple[float, float]
Rng = np.random.Generator
Drawn = tuple[Surface, Array]
"""The changed surface, and the defect's coverage of it, (n, n) in 0..1."""
Defect = Callable[[Surface, Point, float, Rng], Drawn]


def _curve(side: int, start: Point, length: float, width: float, bend: float, rng: Rng) -> Array:
    """Draw a smooth curve through a point, antialiased: coverage, (side, side)."""
    steps = 48
    angle = rng.uniform(0, np.pi) + np.cumsum(np.convolve(rng.normal(0, bend, steps), np.ones(9) / 9, "same"))
    x, y = np.cumsum(np.cos(angle)) / steps * length, np.cumsum(np.sin(angle)) / steps * length
    x, y = x - x[steps // 2] + start[0], y - y[steps // 2] + start[1]
    zoom = 4
    scale = side * zoom
    canvas = Image.new("L", (scale, scale))
    line = (np.stack([x, y], axis=1) * scale).ravel().tolist()
    ImageDraw.Draw(canvas).line(line, 255, round(width * scale), "curve")
    return np.asarray(canvas.reduce(zoom), dtype=np.float32) / 255.0


def blob(side: int, center: Point, radius: float, rough: float, soft: float, rng: Rng) -> Array:
    """Draw a patch with an uneven rim: coverage, (side, side)."""
    x, y = grid(side)
    angle, flat = rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
    dx, dy = x - center[0], y - center[1]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), (dy * np.cos(angle) - dx * np.sin(angle)) / flat
    distance = np.sqrt(u * u + v * v) / radius + rough * noise(rng, side, 0.9 / radius, 3)
    return ramp(distance.astype(np.float32), 1.0 + soft / 2, 1.0 - soft / 2)


def scratch(surface: Surface, center: Point, severity: float, rng: Rng) -> Drawn:
    """Score a groove: lighter material laid bare; darker on polished metal, where it mirrors no lamp."""
    side = surface.side
    length, width = rng.uniform(0.20, 0.30 + 0.25 * severity), rng.uniform(0.0055, 0.0065 + 0.005 * severity)
    line = _curve(side, center, length, width, 0.10, rng)
    change = (0.22 + 0.40 * severity) * np.where(surface.gloss[..., None] > 0.5, -1.6 * surface.albedo, 1.0)
    fresh = (surface.albedo + change * np.where(change > 0, 1.0 - surface.albedo, 1.0)).astype(np.float32)
    height = surface.height - (0.0015 + 0.0035 * severity) * line
    gloss = surface.gloss * (1.0 - (0.35 + 0.45 * severity) * line)
    albedo = mix(surface.albedo, fresh, line)
    return Surface(albedo, height.astype(np.float32), gloss.astype(np.float32)), line


def stain(surface: Surface, center: Point, severity: float, rng: Rng) -> Drawn:
    """Soak a patch, darker and browner, with a darker rim where it dried."""
    patch = blob(surface.side, center, rng.uniform(0.08, 0.16), 0.16, 0.35, rng)
    dark = (0.16 + 0.46 * severity) * patch * (0.8 + 0.5 * (patch * (1.0 - patch) * 4.0))
    brown = np.array([0.75, 0.95, 1.2], dtype=np.float32)
    albedo = surface.albedo * np.clip(1.0 - dark[..., None] * brown, 0.05, 1.0)
    return replace(surface, albedo=albedo.astype(np.float32)), patch


def color(surface: Surface, center: Point, severity: float, rng: Rng, *, tint: Color) -> Drawn:
    """Discolour a patch: rust, a burn, yellowing or spilt paint, by the tint."""
    side = surface.side
    patch = blob(side, center, rng.uniform(0.055, 0.12), 0.22, 0.45, rng)
    mottled = patch * np.clip(0.85 + 0.18 * noise(rng, side, 40, 2), 0.3, 1.0) * (0.26 + 0.60 * severity)
    gloss = surface.gloss * (1.0 - 0.75 * patch * (0.4 + 0.6 * severity))
    albedo = mix(surface.albedo, tint, mottled)
    return replace(surface, albedo=albedo, gloss=gloss.astype(np.float32)), patch


def hole(surface: Surface, center: Point, severity: float, rng: Rng) -> Drawn:
    """Press or break a hollow: dark at the bottom, lit on the far wall."""
    pit = blob(surface.side, center, rng.uniform(0.042, 0.060 + 0.045 * severity), 0.18, 0.5, rng)
    height = surface.height - (0.010 + 0.030 * severity) * pit
    albedo = surface.albedo * (1.0 - (0.28 + 0.55 * severity) * pit)[..., None]
    return replace(surface, albedo=albedo.astype(np.float32), height=height.astype(np.float32)), pit


def thread(surface: Surface, center: Point, severity: float, rng: Rng) -> Drawn:
    """Drop a thread, which casts its own shadow; faint ones come near the ground's colour."""
    width = rng.uniform(0.010, 0.012 + 0.006 * severity)
    line = _curve(surface.side, center, rng.uniform(0.22, 0.60), width, 0.32, rng)
    dyes = ((0.82, 0.80, 0.74), (0.20, 0.28, 0.46), (0.58, 0.16, 0.14), (0.10, 0.10, 0.11))
    marked = line > 0.2
    ground = surface.albedo[marked].mean(axis=0) if marked.any() else surface.albedo.mean(axis=(0, 1))
    dyed = np.array(dyes[rng.integers(len(dyes))], dtype=np.float32)
    dye = ground + (0.40 + 0.60 * severity) * (dyed - ground)
    height = (surface.height + 0.016 * line).astype(np.float32)
    return replace(surface, albedo=mix(surface.albedo, dye, 0.92 * line), height=height), line


def contamination(surface: Surface, center: Point, severity: float, rng: Rng) -> Drawn:
    """Scatter crumbs of swarf or dust."""
    side = surface.side
    x, y = grid(side)
    cover = np.zeros((side, side), dtype=np.float32)
    spread = rng.uniform(0.03, 0.07)
    for _ in range(rng.integers(8, 14 + round(20 * severity))):
        cx, cy = rng.normal(center[0], spread), rng.normal(center[1], spread)
        radius = rng.uniform(0.006, 0.009 + 0.008 * severity)
        angle = rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) * rng.uniform(1.0, 2.2)
        distance = np.sqrt(u * u + v * v).astype(np.float32)
        cover = np.maximum(cover, ramp(distance, radius * 1.2, radius * 0.75))
    tone = rng.uniform(0.16, 0.46)
    height = surface.height + 0.014 * cover * (1.0 + 0.3 * noise(rng, side, 90) * cover)
    albedo = mix(surface.albedo, (tone, tone * 0.86, tone * 0.68), cover * (0.55 + 0.40 * severity))
    return Surface(albedo, height.astype(np.float32), surface.gloss * (1.0 - cover)), cover


def confine(before: Surface, after: Surface, cover: Array, where: NDArray[np.bool_]) -> Drawn:
    """Undo a defect, and its coverage, outside a region, (n, n) bool."""
    albedo = np.where(where[..., None], after.albedo, before.albedo)
    height, gloss = np.where(where, (after.height, after.gloss), (before.height, before.gloss))
    return Surface(albedo, height, gloss), cover * where


def exact_mask(cover: Array, side: int) -> NDArray[np.bool_]:
    """Turn coverage, (n, n), into a mask, (side, side): at least a third of a pixel's area or strength."""
    factor = cover.shape[0] // side
    return cover.reshape(side, factor, side, factor).mean(axis=(1, 3)) > 0.33
