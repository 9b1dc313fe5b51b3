"""Defects drawn on normal images while a model trains: shapes out of Perlin noise, no texture downloaded.

DRAEM takes its textures out of the Describable Textures Dataset. Here a texture is another image of the
batch, turned and shifted, or bands of noise in colours of the batch. All is drawn by torch's global
generators. The defects of :mod:`hgadlib.datasets.validation` are for looking at: too slow to be drawn anew
for every batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Gradients a side of a noise's table, which repeats beyond: more than the diagonal of the finest noise.
_TABLE = 64
# Pixels of the finest noise's cells.
_CELL = 8
# What Perlin noise exceeds where a defect is (DRAEM's).
_THRESHOLD = 0.5
# Lower, where panels too keep defects small.
_PANEL_THRESHOLD = 0.25


def perlin(cells: Tensor, side: int) -> Tensor:
    """Draw Perlin noise of any direction, about -1 to 1.

    Args:
        cells: Cells along each axis of each image, (B, 2) float, at most 44.
        side: Pixels.
    Returns:
        (B, side, side).
    """
    n, device = len(cells), cells.device
    centers = (torch.arange(side, device=device) + 0.5) / side - 0.5
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    angle = (torch.rand(n, 1, 1, device=device) - 0.5) * math.pi
    places = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 1)
    places = places * cells[:, :, None, None] + _TABLE * torch.rand(n, 2, 1, 1, device=device)
    corner, (u, v) = places.floor().long(), (places - places.floor()).unbind(1)
    directions = 2 * math.pi * torch.rand(n, _TABLE, _TABLE, device=device)
    image = torch.arange(n, device=device)[:, None, None]

    def slope(right: int, down: int) -> Tensor:
        own = directions[image, (corner[:, 1] + down) % _TABLE, (corner[:, 0] + right) % _TABLE]
        return own.cos() * (u - right) + own.sin() * (v - down)

    a, b = (t**3 * (t * (6 * t - 15) + 10) for t in (u, v))
    rows = [torch.lerp(slope(0, down), slope(1, down), a) for down in (0, 1)]
    return math.sqrt(2) * torch.lerp(rows[0], rows[1], b)


def drawn_cells(n: int, side: int, device: torch.device) -> Tensor:
    """Draw the cells of noises, (n, 2): powers of two from 1, each axis by itself, of 8 pixels at least."""
    finest = max(1, int(math.log2(max(side / _CELL, 1))) + 1)
    return 2.0 ** torch.randint(finest, (n, 2), device=device)


def textures(images: Tensor) -> Tensor:
    """Draw a texture for each image, (B, C, S, S): another image of the batch, or coloured bands."""
    n, channels, side, _ = images.shape
    device = images.device
    shift = torch.randint(1, max(n, 2), (n,), device=device)
    others = images[(torch.arange(n, device=device) + shift) % n]
    quarters = torch.randint(1, 4, (n,)).tolist()
    turned = torch.stack([x.rot90(k, (1, 2)) for x, k in zip(others, quarters, strict=True)])
    rolls = torch.randint(side, (n, 2)).tolist()
    turned = torch.stack([x.roll(own, (1, 2)) for x, own in zip(turned, rolls, strict=True)])
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    colours = low + (high - low) * torch.rand(2, n, 1, 1, channels, device=device)
    bands = torch.sin(
        perlin(drawn_cells(n, side, device), side) * (1 + 15 * torch.rand(n, 1, 1, device=device))
    )
    mixed = torch.lerp(colours[0], colours[1], 0.5 + 0.5 * bands[..., None]).movedim(-1, 1)
    own = torch.rand(n, 1, 1, 1, device=device) < 0.5
    return torch.where(own, turned, mixed)


def paste(images: Tensor, mask: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    r"""Lay drawn textures over images where a mask is, :math:`(1-\beta)I + \beta A`.

    Args:
        images: (B, C, S, S).
        mask: (B, S, S) bool.
        opacity: beta, to be broadcast to (B, 1, S, S).
    Returns:
        The images, elsewhere what they were to the bit, and the mask of the pixels that have changed.
    """
    mixed = torch.lerp(images, textures(images), opacity.expand(-1, 1, *images.shape[-2:]))
    mask = mask & (mixed != images).any(1)
    return torch.where(mask[:, None], mixed, images), mask


def draw_defects(images: Tensor, *, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draw a defect on a share of the images, by chance.

    Args:
        images: (B, C, S, S), normal.
        share: Of the images that get one; where the noise stays low an image gets none either.
    Returns:
        The images and the defects' masks, (B, S, S) bool.
    Source: DRAEM, Sec. 3.3: Perlin noise above a threshold, opacity 0.1 to 1.
    """
    n, side, device = len(images), images.shape[-1], images.device
    noise = perlin(drawn_cells(n, side, device), side)
    chosen = torch.rand(n, 1, 1, device=device) < share
    opacity = 0.1 + 0.9 * torch.rand(n, 1, 1, 1, device=device)
    return paste(images, (noise > _THRESHOLD) & chosen, opacity)


def draw_panel_defects(images: Tensor, panels: int, *, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Draw defects panel by panel: a grid decides where there may be some, and how clear they are.

    Args:
        images: (B, C, S, S), normal.
        panels: Panels along a side.
        share: Of the images that get defects; how many of an image's panels do is drawn for each.
    Returns:
        The images, the defects' masks, (B, S, S) bool, and what they lie in: the panels' level, (B, S, S),
        0 for a panel without, else 1 (clear), 2 or 3 (faint).
    """
    n, side, device = len(images), images.shape[-1], images.device
    noise = perlin(drawn_cells(n, side, device), side)
    wanted = torch.rand(n, 1, 1, device=device) * (torch.rand(n, 1, 1, device=device) < share)
    grid = torch.randint(1, 4, (n, panels, panels), device=device)
    grid = grid * (torch.rand(n, panels, panels, device=device) < wanted)
    place = torch.arange(side, device=device) * panels // side
    levels = grid[:, place][:, :, place]
    # Each level's opacities are a third of 0.1 to 1, drawn for each image.
    opacity = 0.1 + 0.3 * (3 - levels.clamp_min(1) + torch.rand(n, 1, 1, device=device))
    pasted, mask = paste(images, (noise > _PANEL_THRESHOLD) & (levels > 0), opacity[:, None])
    return pasted, mask, levels
