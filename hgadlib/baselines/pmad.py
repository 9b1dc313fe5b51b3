"""PMAD: predict masked patches of an image from its other patches; what is predicted badly is anomalous.

Source: X. Yao, C. Zhang, R. Li, J. Sun, Z. Liu: One-for-All - Proposal masked cross-class anomaly
detection. AAAI 2023.

Faithful: patches, not images, are predicted, by a transformer that sees a learnt token where a patch is
masked; masks in training combine single patches and blocks; a patch is scored by its surprise, given
patches that do not show it.

Smaller than published: a transformer of ``baseline.width`` and ``baseline.layers``, trained from scratch,
in place of a ViT's encoder and decoder; patches of 8 pixels of an image of ``features.image`` pixels a
side. A few epochs of it know the shapes of objects badly.

Of another kind: the prediction is a Gaussian of the patch's pixels, where the paper has a distribution over
a codebook of visual tokens (cross entropy); the surprise is a negative log-likelihood in both. And there
are no prototypes that propose what to mask at test: blocks are masked in two turns, like the fields of a
chequer board, so that every patch is masked exactly once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgadlib.baselines.pixels import PixelMethod
from hgadlib.errors import InputError

PATCH = 8
"""Pixels a side of a patch."""
BLOCK = 2
"""Patches a side of what is masked together."""
_HEADS = 4
# Log-variances of the prediction lie within this: no flat patch is infinitely surprising.
_LEAST, _MOST = -6.0, 2.0


class PMAD(PixelMethod):
    """A transformer over the patches of an image, some of them masked.

    Args:
        *shape: As of :class:`PixelMethod`.
        **settings: Likewise.
    Raises:
        InputError: The image's side is no multiple of a patch, or the width none of the heads.
    """

    def __init__(self, *shape: Any, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        width, layers = self.baseline.width, self.baseline.layers
        if self.side % PATCH:
            raise InputError(f"features.image: expected a multiple of {PATCH} pixels, found {self.side}")
        if width % _HEADS:
            raise InputError(f"baseline.width: expected a multiple of {_HEADS}, found {width}")
        self.count, pixels = self.side // PATCH, 3 * PATCH * PATCH
        self.embed = nn.Linear(pixels, width)
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.places = nn.Parameter(0.02 * torch.randn(self.count**2, width))
        layer = nn.TransformerEncoderLayer(
            width, _HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.mean, self.log_variance = nn.Linear(width, pixels), nn.Linear(width, pixels)
        self.eval()

    def patches(self, images: Tensor) -> Tensor:
        """Cut images, (B, 3, S, S), into patches, (B, N, 3 * PATCH * PATCH)."""
        return F.unfold(images, PATCH, stride=PATCH).mT

    def predict(self, patches: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Predict patches where they are masked, from the others.

        Args:
            patches: (B, N, P).
            masked: (B, N) bool.
        Returns:
            Mean and log-variance of every pixel, (B, N, P) each; where not masked they mean nothing.
        """
        x = torch.where(masked[..., None], self.token, self.embed(patches)) + self.places
        x = self.body(x)
        return self.mean(x).float(), self.log_variance(x).float().clamp(_LEAST, _MOST)

    def drawn_masks(self, n: int) -> Tensor:
        """Draw masks of about half of the patches, single ones and blocks combined, (n, N) bool."""
        device = self.device
        single = torch.rand(n, self.count, self.count, device=device) < 0.15
        blocks = -(-self.count // BLOCK) + 1
        coarse = (torch.rand(n, blocks, blocks, device=device) < 0.4).repeat_interleave(BLOCK, 1)
        down, right = torch.randint(BLOCK, (2,)).tolist()
        ends = down + self.count, right + self.count
        return (coarse.repeat_interleave(BLOCK, 2)[:, down : ends[0], right : ends[1]] | single).flatten(1)

    def chequer(self) -> Tensor:
        """Return the masks of a test, (2, N) bool: each patch is in exactly one of them."""
        place = torch.arange(self.count, device=self.device) // BLOCK
        black = (place[:, None] + place) % 2 == 0
        return torch.stack([black, ~black]).flatten(1)

    def surprise(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Compute the negative log-likelihood of every pixel, in nats without the constant, (B, N, P)."""
        mean, log_variance = self.predict(patches, masked)
        return 0.5 * ((patches - mean).square() * (-log_variance).exp() + log_variance)

    def image_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Mask patches by chance and compute the loss: the mean surprise of those masked."""
        masked = self.drawn_masks(len(images))
        total = self.surprise(self.patches(images), masked)[masked].mean()
        return {"nll": total, "total": total}

    def image_maps(self, images: Tensor) -> Tensor:
        """Compute every pixel's surprise while its patch was masked, (B, S, S)."""
        patches = self.patches(images)
        found = torch.zeros_like(patches)
        for masked in self.chequer():
            own = self.surprise(patches, masked.expand(len(patches), -1))
            found = torch.where(masked[:, None], own, found)
        size = (self.side, self.side)
        return F.fold(found.mT, size, PATCH, stride=PATCH).mean(1)
