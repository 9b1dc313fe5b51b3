"""The circuit board of the demo dataset, drawn flat: colour, height and gloss."""

from __future__ import annotations

import functools

from PIL import Image, ImageDraw, ImageFont

_Fill = int | tuple[int, ...]
_Values = tuple[_Fill, _Fill, _Fill]
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
    layers = tuple(ImageDraw.Draw(image) for image in (albedo, height, gloss))

    def px(value: float) -> float:
        return (value + 1.0) * side / 2

    def box(cx: float, cy: float, w: float, h: float, values: _Values, corner: float = 0.0) -> None:
        shape = (px(cx - w), px(cy - h), px(cx + w), px(cy + h))
        for layer, value in zip(layers, values, strict=True):
            layer.rounded_rectangle(shape, radius=corner * side / 2, fill=value)

    def path(points: list[tuple[float, float]], width: int = 13) -> None:
        line = [(px(x), px(y)) for x, y in points]
        values: _Values = ((38, 122, 76), 25, 48)
        for layer, value in zip(layers, values, strict=True):
            layer.line(line, fill=value, width=width, joint="curve")

    def disc(cx: float, cy: float, r: float, values: _Values) -> None:
        for layer, value in zip(layers, values, strict=True):
            layer.ellipse((px(cx - r), px(cy - r), px(cx + r), px(cy + r)), fill=value)

    gold: _Values = (206, 168, 92), 28, 175
    tin: _Values = (176, 178, 180), 40, 190
    for index in range(8):
        y = -0.40 + index * 0.085
        path([(0.12, y), (-0.10, y), (-0.20 - 0.01 * index, y + 0.06), (-0.34, y + 0.06)])
        path([(0.60, y), (0.74, y), (0.80, y - 0.05), (0.97, y - 0.05)])
    for index in range(5):
        x = -0.62 + index * 0.18
        path([(x, 0.22), (x, 0.10 - 0.02 * index), (x + 0.07, 0.03 - 0.02 * index)], 11)
        path([(x, 0.46), (x, 0.68)])
    path([(-0.95, -0.62), (0.30, -0.62), (0.42, -0.56), (0.95, -0.56)], 26)
    path([(-0.95, -0.75), (0.95, -0.75)], 26)
    for x, y in _VIAS:
        disc(x, y, 0.030, gold)
        disc(x, y, 0.014, ((14, 16, 16), 0, 0))
    for x, y in ((-0.86, -0.88), (0.86, -0.88)):
        disc(x, y, 0.085, gold)
        disc(x, y, 0.055, ((14, 16, 16), 0, 0))
    white = (214, 218, 212)
    draw, font = layers[0], ImageFont.load_default(46)
    for text, x, y in (("U1", 0.36, -0.52), ("R1", -0.60, -0.40), ("R2", -0.60, -0.22), ("C1", -0.60, -0.04),
                       ("D2", 0.62, 0.62), ("J3", -0.86, 0.62), ("REV B", 0.0, -0.88)):  # fmt: skip
        draw.text((px(x), px(y)), text, fill=white, font=font, anchor="mm")
    for index in range(8):
        for x in (0.11, 0.61):
            box(x, -0.40 + index * 0.085, 0.055, 0.022, tin)
    box(0.36, -0.10, 0.20, 0.365, ((34, 34, 37), 62, 30), 0.02)
    disc(0.24, -0.39, 0.028, ((22, 22, 24), 57, 30))
    for row, (text, size) in enumerate((("HG 4021", 56), ("A7 2238", 44))):
        stamp = (px(0.36), px(-0.14 + 0.11 * row))
        draw.text(stamp, text, fill=(128, 128, 128), font=ImageFont.load_default(size), anchor="mm")
    for index, (x, y, w, h, kind) in enumerate(COMPONENTS):
        flat = w > h
        for sign in (-1, 1):
            pad = (x + sign * w, y, 0.045, h * 1.15) if flat else (x, y + sign * h, w * 1.15, 0.045)
            box(*pad, gold if index == missing else tin, 0.012)
        if index == missing:
            continue
        color = {"resistor": (30, 30, 34), "capacitor": (172, 140, 100), "diode": (44, 42, 46)}[kind]
        box(x, y, w, h, (color, 52, 40), 0.008)
        ends = 0.028
        for sign in (-1, 1):
            end = (x + sign * (w - ends), y, ends, h) if flat else (x, y + sign * (h - ends), w, ends)
            box(*end, ((196, 196, 196), 53, 190), 0.008)
        if kind == "resistor":
            label = Image.new("L", (150, 56), 0)
            ImageDraw.Draw(label).text(
                (75, 28), "103", fill=220, font=ImageFont.load_default(44), anchor="mm"
            )
            label = label if flat else label.rotate(90, expand=True)
            albedo.paste(
                (205, 205, 205), (round(px(x) - label.width / 2), round(px(y) - label.height / 2)), label
            )
        if kind == "diode":
            bar = (x + w * 0.35, y, 0.016, h) if flat else (x, y + h * 0.35, w, 0.016)
            box(*bar, ((190, 190, 190), 52, 40))
    box(-0.08, 0.79, 0.66, 0.12, ((36, 36, 40), 92, 35), 0.02)
    for index in range(8):
        box(-0.62 + index * 0.155, 0.79, 0.038, 0.06, ((18, 18, 20), 60, 20))
        box(-0.62 + index * 0.155, 0.79, 0.020, 0.032, ((212, 176, 96), 96, 200))
    return albedo, height, gloss
