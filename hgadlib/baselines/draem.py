"""DRAEM: repair drawn defects, and learn to tell them from the image and its repair.

Source: V. Zavrtanik, M. Kristan, D. Skocaj: DRAEM - A discriminatively trained reconstruction embedding for
surface anomaly detection. ICCV 2021.

Faithful: an autoencoder that repairs (L2 and SSIM), a U-Net on image and repair (focal loss), defects by
Perlin noise with textures of opacity 0.1 to 1 on half of the images, the map averaged over 21 of 256
pixels.

Smaller than published: both networks have ``baseline.width`` channels at the finest stage, where the paper
has 128 and 64, and ``baseline.layers`` halvings in place of 4 and 5; images of ``features.image`` pixels a
side in place of 256; a few epochs in place of 700. So the map, less trained and coarser, misses small and
faint defects.

Of another kind: the textures, see :mod:`hgadlib.baselines.synthesis`; training images are not rotated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from hgadlib.baselines.pixels import Decoder, Encoder, PixelMethod, check_halvings, smoothed, ssim
from hgadlib.baselines.synthesis import draw_defects

WINDOW = 21 / 256
"""Side of the window that the maps are averaged over, as a share of the image's."""


class DRAEM(PixelMethod):
    """An autoencoder that repairs and a U-Net that compares.

    Args:
        *shape: As of :class:`PixelMethod`.
        **settings: Likewise.
    """

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        size = self.baseline.width, self.baseline.layers
        check_halvings(self.side, self.baseline.layers)
        self.encoder, self.decoder = Encoder(3, *size), Decoder(3, *size, skip=False)
        self.compare, self.locate = Encoder(6, *size), Decoder(1, *size, skip=True)
        self.eval()

    def repair(self, images: Tensor) -> Tensor:
        """Reconstruct images, (B, 3, S, S), without their defects."""
        return self.decoder(self.encoder(images))

    def logits(self, images: Tensor, repaired: Tensor) -> Tensor:
        """Compute the log odds that pixels are anomalous, (B, S, S)."""
        return self.locate(self.compare(torch.cat([images, repaired], 1)))[:, 0]

    def image_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Draw defects and compute the loss terms: l2 and ssim of the repair, focal of the map."""
        defective, mask = draw_defects(images)
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
