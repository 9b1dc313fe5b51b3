"""Normal scenes of the demo dataset: three photographed textures and three rendered objects.

A scene draws a `Surface` for a split; `part` asks for a defect of shape (a chipped nut, a broken needle, a
missing component), and then the pixels it concerns come along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hgadlib.datasets.demo.surface import Array, Color, Surface, grid, inside, mix, noise, ramp

SIDE = 256
"""Pixels of an image along one side."""
_FINE = 2 * SIDE
"""Objects are rendered at twice the size and reduced."""

Scene = tuple[Surface, NDArray[np.bool_] | None]
# Photograph -> colours of its darkest and lightest tone; scikit-image ships the three in grey.
_TONES = {
    "brick": ((0.13, 0.07, 0.06), (1.10, 0.83, 0.71)),
    "grass": ((0.05, 0.08, 0.03), (0.72, 0.82, 0.55)),
    "gravel": ((0.07, 0.065, 0.07), (0.90, 0.87, 0.80)),
}
_TRAIN_COLUMNS = 284
"""Train crops come from the columns before it, test crops from those after: nothing is shared."""
_CROP = 200

_Values = tuple[tuple[int, int, int], int, int]
"""Colour, height and gloss of what is drawn."""

# Components of the board: centre, half width, half height in object coordinates, and what they are.
COMPONENTS = (
    (-0.42, -0.40, 0.10, 0.05, "resistor"), (-0.42, -0.22, 0.10, 0.05, "resistor"),
    (-0.42, -0.04, 0.10, 0.05, "capacitor"), (-0.62, 0.34, 0.05, 0.10, "resistor"),
    (-0.44, 0.34, 0.05, 0.10, "capacitor"), (-0.26, 0.34, 0.05, 0.10, "capacitor"),
    (0.62, 0.30, 0.11, 0.06, "resistor"), (0.62, 0.50, 0.11, 0.06, "diode"),
    (-0.72, -0.30, 0.06, 0.12, "diode"),
)  # fmt: skip
_VIAS = ((-0.90, -0.10), (-0.90, 0.10), (0.86, -0.20), (0.86, 0.05), (0.30, 0.40), (0.16, 0.52), (0.40, 0.56))


@functools.cache
def draw_board(missing: int | None) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Draw the board: albedo (RGB), height and gloss (L), 1280 x 1280, without one component if asked."""
    side = 1280
    albedo = Image.new("RGB", (side, side), (24, 92, 58))
    height, gloss = Image.new("L", (side, side), 20), Image.new("L", (side, side), 38)
    layers = [ImageDraw.Draw(image) for image in (albedo, height, gloss)]

    def px(*values: float) -> list[float]:
        return [(value + 1.0) * side / 2 for value in values]

    def fill(shape: str, place: list[float], values: _Values, **style: Any) -> None:
        for layer, value in zip(layers, values, strict=True):
            getattr(layer, shape)(place, fill=value, **style)

    def box(cx: float, cy: float, w: float, h: float, values: _Values, corner: float = 0.0) -> None:
        fill("rounded_rectangle", px(cx - w, cy - h, cx + w, cy + h), values, radius=corner * side / 2)

    def path(*points: float, width: int = 13) -> None:
        fill("line", px(*points), ((38, 122, 76), 25, 48), width=width, joint="curve")

    def disc(cx: float, cy: float, r: float, values: _Values) -> None:
        fill("ellipse", px(cx - r, cy - r, cx + r, cy + r), values)

    gold, tin = ((206, 168, 92), 28, 175), ((176, 178, 180), 40, 190)
    for index in range(8):
        y = -0.40 + index * 0.085
        path(0.12, y, -0.10, y, -0.20 - 0.01 * index, y + 0.06, -0.34, y + 0.06)
        path(0.60, y, 0.74, y, 0.80, y - 0.05, 0.97, y - 0.05)
    for index in range(5):
        x = -0.62 + index * 0.18
        path(x, 0.22, x, 0.10 - 0.02 * index, x + 0.07, 0.03 - 0.02 * index, width=11)
        path(x, 0.46, x, 0.68)
    path(-0.95, -0.62, 0.30, -0.62, 0.42, -0.56, 0.95, -0.56, width=26)
    path(-0.95, -0.75, 0.95, -0.75, width=26)
    holes = [(x, y, 0.030, 0.014) for x, y in _VIAS] + [(x, -0.88, 0.085, 0.055) for x in (-0.86, 0.86)]
    for x, y, rim, bore in holes:
        disc(x, y, rim, gold)
        disc(x, y, bore, ((14, 16, 16), 0, 0))

    def write(x: float, y: float, text: str, tone: tuple[int, int, int], size: int) -> None:
        left, top = px(x, y)
        layers[0].text((left, top), text, fill=tone, font=ImageFont.load_default(size), anchor="mm")

    for text, x, y in (("U1", 0.36, -0.52), ("R1", -0.60, -0.40), ("R2", -0.60, -0.22), ("C1", -0.60, -0.04),
                       ("D2", 0.62, 0.62), ("J3", -0.86, 0.62), ("REV B", 0.0, -0.88)):  # fmt: skip
        write(x, y, text, (214, 218, 212), 46)
    for index in range(8):
        for x in (0.11, 0.61):
            box(x, -0.40 + index * 0.085, 0.055, 0.022, tin)
    box(0.36, -0.10, 0.20, 0.365, ((34, 34, 37), 62, 30), 0.02)
    disc(0.24, -0.39, 0.028, ((22, 22, 24), 57, 30))
    write(0.36, -0.14, "HG 4021", (128, 128, 128), 56)
    write(0.36, -0.14 + 0.11, "A7 2238", (128, 128, 128), 44)
    for index, (x, y, w, h, kind) in enumerate(COMPONENTS):
        flat = w > h
        for sign in (-1, 1):
            pad = (x + sign * w, y, 0.045, h * 1.15) if flat else (x, y + sign * h, w * 1.15, 0.045)
            box(*pad, gold if index == missing else tin, 0.012)
        if index == missing:
            continue
        color = {"resistor": (30, 30, 34), "capacitor": (172, 140, 100), "diode": (44, 42, 46)}[kind]
        box(x, y, w, h, (color, 52, 40), 0.008)
        for sign in (-1, 1):
            end = (x + sign * (w - 0.028), y, 0.028, h) if flat else (x, y + sign * (h - 0.028), w, 0.028)
            box(*end, ((196, 196, 196), 53, 190), 0.008)
        if kind == "resistor":
            label, small = Image.new("L", (150, 56), 0), ImageFont.load_default(44)
            ImageDraw.Draw(label).text((75, 28), "103", fill=220, font=small, anchor="mm")
            label = label if flat else label.rotate(90, expand=True)
            left, top = px(x, y)
            corner = (round(left - label.width / 2), round(top - label.height / 2))
            albedo.paste((205, 205, 205), corner, label)
        if kind == "diode":
            bar = (x + w * 0.35, y, 0.016, h) if flat else (x, y + h * 0.35, w, 0.016)
            box(*bar, ((190, 190, 190), 52, 40))
    box(-0.08, 0.79, 0.66, 0.12, ((36, 36, 40), 92, 35), 0.02)
    for index in range(8):
        box(-0.62 + index * 0.155, 0.79, 0.038, 0.06, ((18, 18, 20), 60, 20))
        box(-0.62 + index * 0.155, 0.79, 0.020, 0.032, ((212, 176, 96), 96, 200))
    return albedo, height, gloss


@functools.cache
def _photograph(name: str) -> NDArray[np.uint8]:
    """Return a photograph that lies in scikit-image's wheel, (512, 512) uint8."""
    from skimage import data

    return np.asarray(getattr(data, name)())


def texture(name: str, split: str, rng: np.random.Generator, part: bool) -> Scene:
    """Cut a turned, mirrored crop out of that side of a photograph which belongs to the split."""
    photo = _photograph(name)
    photo = photo[:, :_TRAIN_COLUMNS] if split == "train" else photo[:, _TRAIN_COLUMNS:]
    angle = np.deg2rad(rng.uniform(-3.0, 3.0))
    size = _CROP * rng.uniform(0.94, 1.04)
    # Half the bounding box of the turned crop, and a pixel for the interpolation: it never leaves its side.
    reach = 0.5 * size * (abs(np.cos(angle)) + abs(np.sin(angle))) + 2.0
    cx, cy = (rng.uniform(reach, length - reach) for length in reversed(photo.shape))
    mirror_x, mirror_y = rng.choice([-1.0, 1.0], 2)
    step, half = size / SIDE, SIDE / 2
    a, b = step * np.cos(angle) * mirror_x, -step * np.sin(angle) * mirror_y
    d, e = step * np.sin(angle) * mirror_x, step * np.cos(angle) * mirror_y
    affine = (a, b, cx - half * (a + b), d, e, cy - half * (d + e))
    turned = (Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    grey = np.asarray(Image.fromarray(photo).transform((SIDE, SIDE), *turned), dtype=np.float32) / 255.0
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


def _lay(surface: Surface, cover: Array, color: Color, height: Any, gloss: float | None = None) -> Surface:
    """Lay material, its height a number or (n, n), over a surface; without a gloss it takes the ground's."""
    return Surface(
        mix(surface.albedo, color, cover),
        surface.height + cover * (height - surface.height),
        surface.gloss if gloss is None else surface.gloss + cover * (gloss - surface.gloss),
    )


def _reduce(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bring a mask from the fine grid to the image's: at least half of a pixel counts."""
    return mask.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3)) >= 0.5


def hex_nut(split: str, rng: np.random.Generator, part: bool) -> Scene:
    """Render a steel nut on a rubber mat; as `part`, with a piece broken off its rim."""
    u, v, zoom, _ = _pose(rng, 30.0, 0.03, 1.0)
    weave = noise(rng, _FINE, 130, 2) * 0.5 + noise(rng, _FINE, 7) * 0.35
    albedo = np.full((_FINE, _FINE, 3), (0.115, 0.125, 0.145), dtype=np.float32)
    albedo *= (1.0 + 0.10 * weave)[..., None]
    height = 0.0009 * weave
    radius = np.sqrt(u * u + v * v)
    flat, bore, broken = 0.66, 0.36 - radius, None
    angles = np.deg2rad([0.0, 60.0, 120.0])
    hexagon = np.max([np.abs(u * np.cos(a) + v * np.sin(a)) for a in angles], axis=0) - flat
    body = np.maximum(hexagon, bore)
    if part:
        where = np.deg2rad(rng.integers(6) * 60 + 30 + rng.uniform(-9, 9))
        depth = rng.uniform(0.08, 0.20)
        rough = 0.022 * noise(rng, _FINE, 16, 2)
        cut = (u * np.cos(where) + v * np.sin(where)) - (flat / np.cos(np.deg2rad(30)) - depth) + rough
        broken = _reduce((body < 0) & (cut > 0))
        body = np.maximum(body, cut)
    cover = inside(body * zoom / 2, _FINE)
    # A turned chamfer: the corners slope down outside the inscribed circle, as the mouth of the bore does.
    top = 0.115 - 0.55 * np.clip(radius - flat * 0.955, 0, None) - 0.55 * np.clip(0.43 - radius, 0, None)
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
    return Surface(mix(albedo, steel.astype(np.float32), cover), height.astype(np.float32), gloss), broken


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

    box = (middle * 0.37, middle * 0.37, middle * 1.63, middle * 1.63)
    arcs = ((135, 300, (92, 148, 96)), (300, 354, (226, 178, 66)), (354, 405, (196, 52, 46)))
    for start, end, tone in arcs:
        draw.arc(box, start, end, fill=tone, width=22)
    for index in range(51):
        degrees = 135 + index * 5.4
        width, inner = (4, 0.665) if index % 5 else (9, 0.625)
        draw.line([point(degrees, inner), point(degrees, 0.72)], fill=(34, 34, 38), width=width)
        if index % 10 == 0:
            text = ImageFont.load_default(64)
            draw.text(point(degrees, 0.475), str(index // 5), fill=(34, 34, 38), font=text, anchor="mm")
    for words, y, fill, size in (("bar", 1.42, (34, 34, 38), 54), ("cl. 1.6", 1.57, (90, 90, 96), 36)):
        font = ImageFont.load_default(size)
        draw.text((middle, middle * y), words, fill=fill, font=font, anchor="mm")
    return image


def gauge(split: str, rng: np.random.Generator, part: bool) -> Scene:
    """Render a pressure gauge on a painted panel; as `part`, with the tip of its needle broken off."""
    u, v, zoom, pose = _pose(rng, 5.0, 0.02, 0.98)
    radius = np.sqrt(u * u + v * v)
    grain = noise(rng, _FINE, 160, 2)
    panel = np.array((0.30, 0.37, 0.45), dtype=np.float32) * (1.0 + 0.025 * grain)[..., None]
    surface = Surface(panel, 0.0006 * grain, np.full((_FINE, _FINE), 0.08, dtype=np.float32))
    bezel = inside((radius - 0.90) * zoom / 2, _FINE)
    profile = 0.055 + 0.035 * np.sqrt(np.clip(1.0 - ((radius - 0.825) / 0.078) ** 2, 0.0, 1.0))
    surface = _lay(surface, bezel, (0.58, 0.56, 0.53), profile, 0.95)
    face = inside((radius - 0.755) * zoom / 2, _FINE)
    surface = _lay(surface, face, _warp(_dial(), pose), 0.035, 0.03)
    angle, length = np.deg2rad(135 + rng.uniform(70, 150)), 0.62
    lost = rng.uniform(0.10, 0.30) if part else 0.0
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = u * cos + v * sin, np.abs(v * cos - u * sin)
    width = 0.030 - 0.024 * np.clip(along / length, 0, 1)

    def needle(tip: float) -> Array:
        return inside(np.maximum(np.maximum(across - width, along - tip), -0.17 - along) * zoom / 2, _FINE)

    lifted = needle(length - lost)
    surface = _lay(surface, lifted, (0.10, 0.10, 0.11), 0.052)
    hub = inside((radius - 0.075) * zoom / 2, _FINE)
    dome = 0.055 + 0.03 * np.sqrt(np.clip(1.0 - (radius / 0.078) ** 2, 0.0, 1.0))
    surface = _lay(surface, hub, (0.45, 0.43, 0.40), dome, 0.8)
    # The pane reflects a window, the same in every picture but for the pose.
    streak = face * ramp(u * 0.8 + v + 0.62, 0.0, 0.03) * ramp(u * 0.8 + v + 0.40, 0.03, 0.0)
    mask = _reduce((needle(length) > 0.5) & (lifted < 0.5)) if part else None
    albedo = mix(surface.albedo, (1.0, 1.0, 1.0), 0.10 * streak)
    return Surface(albedo, surface.height.astype(np.float32), surface.gloss), mask


def circuit(split: str, rng: np.random.Generator, part: bool) -> Scene:
    """Render a populated circuit board; as `part`, with one component missing."""
    _, _, _, pose = _pose(rng, 2.5, 0.02, 1.06)
    missing = int(rng.integers(len(COMPONENTS))) if part else None
    albedo, height, gloss = (_warp(image, pose) for image in draw_board(missing))
    full = _warp(draw_board(None)[0], pose) if part else albedo
    mask = _reduce(np.abs(full - albedo).max(axis=-1) > 0.03) if part else None
    glass = noise(rng, _FINE, 120, 2)
    height = 0.42 * height + 0.0007 * glass
    albedo = albedo * (1.0 + 0.03 * glass + 0.02 * noise(rng, _FINE, 5))[..., None]
    return Surface(albedo.astype(np.float32), height.astype(np.float32), gloss), mask


SCENES: dict[str, Callable[[str, np.random.Generator, bool], Scene]] = {
    **{name: functools.partial(texture, name) for name in _TONES},
    "circuit": circuit, "gauge": gauge, "hex_nut": hex_nut,
}  # fmt: skip
