"""OmniAL: repair defects drawn panel by panel with attention, and locate them by differences.

Source: Y. Zhao: OmniAL - A unified CNN framework for unsupervised anomaly localization. CVPR 2023. There is
no published code; this follows the parts that the paper names, and their inside is this library's reading
of it.

Faithful: training on panel-guided synthetic defects of three levels of clarity; a reconstruction of blocks
with dilated channel and spatial attention (DCSA); a neck of differences at several scales between the
reconstruction and the localisation (DiffNeck).

Smaller than published: ``baseline.width`` channels at the finest stage, ``baseline.layers`` halvings,
images of ``features.image`` pixels a side, a few epochs.

Left out: the maps of just noticeable distortion, by which the paper weighs the drawn defects (here a
panel's level decides its opacity) and which it reconstructs beside the image; masks refined by SSIM, one
for each level (here one mask). The textures are those of :mod:`hgadlib.baselines.synthesis`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from hgadlib.baselines.draem import WINDOW
from hgadlib.baselines.pixels import (
    Decoder,
    Encoder,
    PixelMethod,
    check_halvings,
    smoothed,
    ssim,
    two_convolutions,
    widths,
)
from hgadlib.baselines.synthesis import draw_panel_defects

PANELS = 4
"""Panels along a side."""
_DILATIONS = (1, 2, 4)


class DilatedAttention(nn.Module):
    """Two convolutions, then attention over channels and positions by dilated convolutions (DCSA).

    Args:
        inputs: Channels.
        outputs: Channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = two_convolutions(inputs, outputs)
        self.dilated = nn.ModuleList(
            nn.Conv2d(outputs, outputs, 3, padding=d, dilation=d, groups=outputs, bias=False)
            for d in _DILATIONS
        )
        hidden = max(outputs // 4, 4)
        self.channel = nn.Sequential(nn.Linear(outputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self.spatial = nn.Conv2d(2 * len(_DILATIONS), 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, outputs, H, W) from (B, inputs, H, W)."""
        x = self.body(x)
        views = [own(x) for own in self.dilated]
        pooled = torch.stack([v.mean((2, 3)) for v in views]).sum(0)
        maps = torch.cat([m for v in views for m in (v.mean(1, keepdim=True), v.amax(1, keepdim=True))], 1)
        return x * self.channel(pooled)[:, :, None, None].sigmoid() * self.spatial(maps).sigmoid() + x


class DiffNeck(nn.Module):
    """Joins an image's and its repair's features, and how they differ, at every stage."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.joins = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3 * size, size, 1, bias=False), nn.BatchNorm2d(size), nn.ReLU())
            for size in widths(width, layers)
        )

    def forward(self, images: list[Tensor], repaired: list[Tensor]) -> list[Tensor]:
        """Compute a map a stage, of the same shapes."""
        pairs = zip(self.joins, images, repaired, strict=True)
        return [join(torch.cat([a, b, (a - b).abs()], 1)) for join, a, b in pairs]


class OmniAL(PixelMethod):
    """A reconstruction with attention, and a localisation by differences.

    Args:
        *shape: As of :class:`PixelMethod`.
        **settings: Likewise.
    """

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        size = self.baseline.width, self.baseline.layers
        check_halvings(self.side, self.baseline.layers)
        self.encoder = Encoder(3, *size, block=DilatedAttention)
        self.decoder = Decoder(3, *size, skip=False, block=DilatedAttention)
        self.compare, self.neck, self.locate = (
            Encoder(3, *size),
            DiffNeck(*size),
            Decoder(1, *size, skip=True),
        )
        self.eval()

    def repair(self, images: Tensor) -> Tensor:
        """Reconstruct images, (B, 3, S, S), without their defects."""
        return self.decoder(self.encoder(images))

    def logits(self, images: Tensor, repaired: Tensor) -> Tensor:
        """Compute the log odds that pixels are anomalous, (B, S, S)."""
        return self.locate(self.neck(self.compare(images), self.compare(repaired)))[:, 0]

    def image_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Draw defects and compute the loss terms: l2 and ssim of the repair, focal of the map."""
        defective, mask, _ = draw_panel_defects(images, PANELS)
        repaired = self.repair(defective)
        logits = self.logits(defective, repaired).float()
        terms = {
            "l2": F.mse_loss(repaired.float(), images),
            "ssim": 1 - ssim(repaired.float(), images).mean(),
            "focal": sigmoid_focal_loss(logits, mask.float(), alpha=-1, gamma=2, reduction="mean"),
        }
        return terms | {"total": torch.stack(list(terms.values())).sum()}

    def image_maps(self, images: Tensor) -> Tensor:
        """Compute the probability that pixels are anomalous, averaged over a window: (B, S, S)."""
        return smoothed(self.logits(images, self.repair(images)).sigmoid(), WINDOW * self.side)
