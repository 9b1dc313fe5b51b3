"""Normal scenes of the demo dataset: three photographed textures and three rendered objects.

A scene is a function of a split and a generator that returns a `Surface`; `part` asks for a defect of shape
(a chipped nut, a gauge with a broken needle, a missing component), and then the pixels it concerns come
along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hgadlib.datasets.demo_board import COMPONENTS, draw_board
from hgadlib.datasets.demo_surface import Array, Surface, grid, inside, mix, noise, ramp

SIDE = 256
"""Pixels of an image along one side."""
_FINE = 2 * SIDE
"""Objects are rendered at twice the size and reduced."""

Scene = Callable[[str, np.random.Generator, bool], tuple[Surface, NDArray[np.bool_] | None]]

# Photograph -> colours of its darkest and lightest tone; scikit-image ships the three in grey.
_TONES = {
    "brick": ((0.13, 0.07, 0.06), (1.10, 0.83, 0.71)),
    "grass": ((0.05, 0.08, 0.03), (0.72, 0.82, 0.55)),
    "gravel": ((0.07, 0.065, 0.07), (0.90, 0.87, 0.80)),
}
_TRAIN_COLUMNS = 284
"""Train crops come from the columns before it, test crops from those after: nothing is shared."""
_CROP = 200


@functools.cache
def _photograph(name: str) -> NDArray[np.uint8]:
    """Return a photograph that lies in scikit-image's wheel, (512, 512) uint8."""
    from skimage import data

    return np.asarray(getattr(data, name)())


def texture(name: str, split: str, rng: np.random.Generator, part: bool) -> tuple[Surface, None]:
    """Cut a turned, mirrored crop out of that side of a photograph which belongs to the split."""
    photo = _photograph(name)
    photo = photo[:, :_TRAIN_COLUMNS] if split == "train" else photo[:, _TRAIN_COLUMNS:]
    angle = np.deg2rad(rng.uniform(-3.0, 3.0))
    size = _CROP * rng.uniform(0.94, 1.04)
    # Half the bounding box of the turned crop, and a pixel for the interpolation: it never leaves its side.
    reach = 0.5 * size * (abs(np.cos(angle)) + abs(np.sin(angle))) + 2.0
    cx = rng.uniform(reach, photo.shape[1] - reach)
    cy = rng.uniform(reach, photo.shape[0] - reach)
    mirror_x, mirror_y = rng.choice([-1.0, 1.0], 2)
    step = size / SIDE
    a, b = step * np.cos(angle) * mirror_x, -step * np.sin(angle) * mirror_y
    d, e = step * np.sin(angle) * mirror_x, step * np.cos(angle) * mirror_y
    half = SIDE / 2
    affine = (a, b, cx - half * (a + b), d, e, cy - half * (d + e))
    crop = Image.fromarray(photo).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    grey = np.asarray(crop, dtype=np.float32) / 255.0
    low, high = (np.array(tone, dtype=np.float32) for tone in _TONES[name])
    high = high * (1.0 + rng.normal(0.0, 0.008, 3)).astype(np.float32)
    grey = np.clip((grey - 0.5) * rng.uniform(0.92, 1.08) + 0.5, 0.0, 1.0)[..., None]
    flat = np.zeros((SIDE, SIDE), dtype=np.float32)
    return Surface((low + (high - low) * grey).astype(np.float32), flat, flat), None


def _pose(
    rng: np.random.Generator, degrees: float, shift: float, scale: float
) -> tuple[Array, Array, float, tuple[float, ...]]:
    """Draw a pose; return object coordinates (-1..1 across the image), the scale and a map for templates."""
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    zoom = scale * rng.uniform(0.98, 1.02)
    dx, dy = rng.uniform(-shift, shift, 2)
    x, y = grid(_FINE)
    x, y = (x - 0.5 - dx) * 2 / zoom, (y - 0.5 - dy) * 2 / zoom
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x, zoom, (angle, zoom, dx, dy)


def _warp(template: Image.Image, pose: tuple[float, ...]) -> Array:
    """Sample a template, which spans object coordinates -1..1, at the pose; 0..1 float32."""
    angle, zoom, dx, dy = pose
    step = template.width / (_FINE * zoom)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    cx, cy = (0.5 + dx) * _FINE, (0.5 + dy) * _FINE
    middle = template.width / 2
    affine = (cos, sin, middle - cos * cx - sin * cy, -sin, cos, middle + sin * cx - cos * cy)
    warped = template.transform((_FINE, _FINE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(warped, dtype=np.float32) / 255.0


def _reduce(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bring a mask from the fine grid to the image's: at least half of a pixel counts."""
    return mask.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3)) >= 0.5


def hex_nut(split: str, rng: np.random.Generator, part: bool) -> tuple[Surface, NDArray[np.bool_] | None]:
    """Render a steel nut on a rubber mat; as `part`, with a piece broken off its rim."""
    u, v, zoom, _ = _pose(rng, 30.0, 0.03, 1.0)
    weave = noise(rng, _FINE, 130, 2) * 0.5 + noise(rng, _FINE, 7) * 0.35
    albedo = np.empty((_FINE, _FINE, 3), dtype=np.float32)
    albedo[:] = (0.115, 0.125, 0.145)
    albedo *= (1.0 + 0.10 * weave)[..., None]
    height = 0.0009 * weave
    radius = np.sqrt(u * u + v * v)
    flat = 0.66
    angles = np.deg2rad([0.0, 60.0, 120.0])
    hexagon = np.max([np.abs(u * np.cos(a) + v * np.sin(a)) for a in angles], axis=0) - flat
    bore = 0.36 - radius
    body = np.maximum(hexagon, bore)
    broken = None
    if part:
        where = np.deg2rad(rng.integers(6) * 60 + 30 + rng.uniform(-9, 9))
        depth = rng.uniform(0.08, 0.20)
        rough = 0.022 * noise(rng, _FINE, 16, 2)
        cut = (u * np.cos(where) + v * np.sin(where)) - (flat / np.cos(np.deg2rad(30)) - depth) + rough
        broken = _reduce((body < 0) & (cut > 0))
        body = np.maximum(body, cut)
    cover = inside(body * zoom / 2, _FINE)
    # A turned chamfer: the corners slope down outside the inscribed circle, and so does the mouth of the
    # bore.
    top = 0.115 - 0.55 * np.clip(radius - flat * 0.955, 0, None)
    top -= 0.55 * np.clip(0.43 - radius, 0, None)
    edge = np.clip(-body / 0.025, 0.0, 1.0)
    brushed = noise(rng, _FINE, 90, 2)
    ring = noise(rng, 64, 64)[np.clip((radius * 60).astype(int), 0, 63), 0]
    metal_height = top * (0.75 + 0.25 * edge) + 0.00016 * brushed + 0.00018 * ring
    thread = 0.02 * np.sin((radius - 0.3) * 180.0) * ramp(radius, 0.20, 0.36)
    height = height + cover * (metal_height - height) + (1 - cover) * (bore > 0) * (thread * 0.12 - 0.035)
    tone = 0.63 + rng.uniform(-0.02, 0.02)
    steel = np.stack([tone + 0.012 * brushed] * 3, axis=-1) * np.array([1.0, 0.995, 0.97], dtype=np.float32)
    wall = ramp(radius, 0.27, 0.37) * (bore > 0)
    albedo = mix(albedo, (0.16, 0.155, 0.15), 0.8 * wall)
    gloss = 0.92 * cover + 0.25 * wall * (1 - cover)
    surface = Surface(mix(albedo, steel.astype(np.float32), cover), height.astype(np.float32), gloss)
    return surface, broken


@functools.cache
def _dial() -> Image.Image:
    """Draw the printed face of the gauge: ticks, numbers, a red zone; 1024 x 1024 RGB."""
    side = 1024
    image = Image.new("RGB", (side, side), (236, 234, 226))
    draw = ImageDraw.Draw(image)
    middle = side / 2

    def point(degrees: float, radius: float) -> tuple[float, float]:
        angle = np.deg2rad(degrees)
        return middle + radius * middle * np.cos(angle), middle + radius * middle * np.sin(angle)

    def arc(start: float, end: float, color: tuple[int, int, int]) -> None:
        box = (middle * 0.37, middle * 0.37, middle * 1.63, middle * 1.63)
        draw.arc(box, start, end, fill=color, width=22)

    arc(135, 300, (92, 148, 96))
    arc(300, 354, (226, 178, 66))
    arc(354, 405, (196, 52, 46))
    for index in range(51):
        degrees = 135 + index * 5.4
        major = index % 5 == 0
        width, start = (9, 0.625) if major else (4, 0.665)
        draw.line([point(degrees, start), point(degrees, 0.72)], fill=(34, 34, 38), width=width)
        if index % 10 == 0:
            text = ImageFont.load_default(64)
            draw.text(point(degrees, 0.475), str(index // 5), fill=(34, 34, 38), font=text, anchor="mm")
    small = ImageFont.load_default(54)
    draw.text((middle, middle * 1.42), "bar", fill=(34, 34, 38), font=small, anchor="mm")
    draw.text(
        (middle, middle * 1.57), "cl. 1.6", fill=(90, 90, 96), font=ImageFont.load_default(36), anchor="mm"
    )
    return image


def gauge(split: str, rng: np.random.Generator, part: bool) -> tuple[Surface, NDArray[np.bool_] | None]:
    """Render a pressure gauge on a painted panel; as `part`, with the tip of its needle broken off."""
    u, v, zoom, pose = _pose(rng, 5.0, 0.02, 0.98)
    radius = np.sqrt(u * u + v * v)
    grain = noise(rng, _FINE, 160, 2)
    albedo = np.empty((_FINE, _FINE, 3), dtype=np.float32)
    albedo[:] = (0.30, 0.37, 0.45)
    albedo *= (1.0 + 0.025 * grain)[..., None]
    height = 0.0006 * grain
    gloss = np.full((_FINE, _FINE), 0.08, dtype=np.float32)
    bezel = inside((radius - 0.90) * zoom / 2, _FINE)
    profile = 0.055 + 0.035 * np.sqrt(np.clip(1.0 - ((radius - 0.825) / 0.078) ** 2, 0.0, 1.0))
    height = height + bezel * (profile - height)
    albedo = mix(albedo, (0.58, 0.56, 0.53), bezel)
    gloss = gloss + bezel * (0.95 - gloss)
    face = inside((radius - 0.755) * zoom / 2, _FINE)
    albedo = mix(albedo, _warp(_dial(), pose), face)
    height = height + face * (0.035 - height)
    gloss = gloss + face * (0.03 - gloss)
    degrees = 135 + rng.uniform(70, 150)
    length = 0.62
    lost = rng.uniform(0.10, 0.30) if part else 0.0
    cos, sin = np.float32(np.cos(np.deg2rad(degrees))), np.float32(np.sin(np.deg2rad(degrees)))
    along, across = u * cos + v * sin, np.abs(v * cos - u * sin)
    width = 0.030 - 0.024 * np.clip(along / length, 0, 1)

    def needle(tip: float) -> Array:
        return inside(np.maximum(np.maximum(across - width, along - tip), -0.17 - along) * zoom / 2, _FINE)

    lifted = needle(length - lost)
    albedo = mix(albedo, (0.10, 0.10, 0.11), lifted)
    height = height + lifted * (0.052 - height)
    hub = inside((radius - 0.075) * zoom / 2, _FINE)
    dome = 0.055 + 0.03 * np.sqrt(np.clip(1.0 - (radius / 0.078) ** 2, 0.0, 1.0))
    height = height + hub * (dome - height)
    albedo = mix(albedo, (0.45, 0.43, 0.40), hub)
    gloss = gloss + hub * (0.8 - gloss)
    # The pane reflects a window, the same in every picture but for the pose.
    streak = face * ramp(u * 0.8 + v + 0.62, 0.0, 0.03) * ramp(u * 0.8 + v + 0.40, 0.03, 0.0)
    albedo = mix(albedo, (1.0, 1.0, 1.0), 0.10 * streak)
    mask = _reduce((needle(length) > 0.5) & (lifted < 0.5)) if part else None
    return Surface(albedo, height.astype(np.float32), gloss.astype(np.float32)), mask


def circuit(split: str, rng: np.random.Generator, part: bool) -> tuple[Surface, NDArray[np.bool_] | None]:
    """Render a populated circuit board; as `part`, with one component missing."""
    _, _, _, pose = _pose(rng, 2.5, 0.02, 1.06)
    missing = int(rng.integers(len(COMPONENTS))) if part else None
    albedo, height, gloss = (_warp(image, pose) for image in draw_board(missing))
    mask = None
    if missing is not None:
        full = _warp(draw_board(None)[0], pose)
        mask = _reduce(np.abs(full - albedo).max(axis=-1) > 0.03)
    glass = noise(rng, _FINE, 120, 2)
    height = 0.42 * height + 0.0007 * glass
    albedo = albedo * (1.0 + 0.03 * glass + 0.02 * noise(rng, _FINE, 5))[..., None]
    return Surface(albedo.astype(np.float32), height.astype(np.float32), gloss), mask


SCENES: dict[str, Scene] = {
    "brick": functools.partial(texture, "brick"),
    "circuit": circuit,
    "gauge": gauge,
    "grass": functools.partial(texture, "grass"),
    "gravel": functools.partial(texture, "gravel"),
    "hex_nut": hex_nut,
}
