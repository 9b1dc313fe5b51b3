"""What the methods share that see the image itself: its level, an hourglass of convolutions, SSIM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgadlib.baselines.baseline import Baseline
from hgadlib.config import BaselineConfig
from hgadlib.errors import InputError
from hgadlib.scoring import LevelValues


class PixelMethod(Baseline):
    """A method that takes the image alone, the last level of the features, and gives each pixel a value.

    A subclass gives :meth:`image_losses` and :meth:`image_maps`.

    Args:
        classes: As of :class:`Method`.
        channels: Likewise; the last level has the image's 3.
        grids: Likewise; the last level is square.
        baseline: Settings.
    Raises:
        InputError: The image is not among the levels.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
    ) -> None:
        if not channels or channels[-1] != 3:
            raise InputError(
                f"features.image: expected the image's side, for {type(self).__name__} sees pixels, found "
                f"levels of {list(channels)} channels without the image; set it, such as to 128"
            )
        super().__init__(classes, channels, grids, baseline=baseline, value_grids=grids[-1:])
        self.side = self.grids[-1][0]

    def image_losses(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss terms of normal images, (B, 3, S, S), with their "total"."""
        raise NotImplementedError

    def image_maps(self, images: Tensor) -> Tensor:
        """Compute anomaly maps, (B, S, S), of images, (B, 3, S, S); higher is more anomalous."""
        raise NotImplementedError

    def images(self, features: Sequence[Tensor]) -> Tensor:
        """Take the images out of the features: (B, 3, S, S), without a copy, so channels come last."""
        return self.checked(features)[-1].unflatten(1, self.grids[-1]).movedim(-1, 1)

    def losses(
        self,
        features: Sequence[Tensor],
        class_idx: Tensor,
        *,
        precision: torch.dtype = torch.float32,
        **settings: Any,
    ) -> list[dict[str, Tensor]]:
        """Compute the loss terms, as of :meth:`Method.losses`; of the settings it takes the precision."""
        images = self.images(features)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            return [self.image_losses(images)]

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute the maps' negatives, as of :meth:`Method.level_values`; the class has no part in them."""
        return LevelValues((-self.image_maps(self.images(features)),), ())


def check_halvings(side: int, layers: int) -> None:
    """Refuse images, S pixels a side, of which so many halvings leave less than 2 pixels."""
    if side < 2 ** (layers + 1):
        raise InputError(
            f"features.image: expected at least {2 ** (layers + 1)} pixels beside baseline.layers {layers}, "
            f"found {side}"
        )


def two_convolutions(inputs: int, outputs: int) -> nn.Module:
    """Make two 3x3 convolutions, each with its batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


Block = Callable[[int, int], nn.Module]


def widths(width: int, layers: int) -> list[int]:
    """List the channels of an hourglass's stages: doubled at each halving of the side, up to eightfold."""
    return [width * min(2**i, 8) for i in range(layers + 1)]


class Encoder(nn.Module):
    """Halves the side stage by stage and gives the features of all stages, finest first."""

    def __init__(self, inputs: int, width: int, layers: int, block: Block = two_convolutions) -> None:
        super().__init__()
        sizes = [inputs, *widths(width, layers)]
        self.stages = nn.ModuleList(block(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute (B, C_i, S / 2^i, S / 2^i) of every stage i from (B, inputs, S, S)."""
        found: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
            found.append(x)
        return found


class Decoder(nn.Module):
    """Doubles the side stage by stage, beside the encoder's features (a U-Net) or from the coarsest alone."""

    def __init__(
        self, outputs: int, width: int, layers: int, *, skip: bool, block: Block = two_convolutions
    ) -> None:
        super().__init__()
        self.skip, sizes = skip, widths(width, layers)
        pairs = list(itertools.pairwise(sizes))[::-1]
        self.rises = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarse, fine, 3, padding=1, bias=False), nn.BatchNorm2d(fine), nn.ReLU())
            for fine, coarse in pairs
        )
        self.stages = nn.ModuleList(block(fine * (2 if skip else 1), fine) for fine, _ in pairs)
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute (B, outputs, S, S) from the features of all stages, finest first."""
        x = features[-1]
        for rise, stage, beside in zip(self.rises, self.stages, features[-2::-1], strict=True):
            x = rise(F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=True))
            x = stage(torch.cat([x, beside], 1) if self.skip else x)
        return self.last(x)


def ssim(x: Tensor, y: Tensor, *, span: float = 2.0, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Compute the structural similarity of images by position, (B, C, S, S): 1 where they agree.

    Args:
        x: (B, C, S, S).
        y: Likewise.
        span: Range of the values; the bundled backbones' normalisation gives -1 to 1.
        window: Pixels a side of the Gaussian window, odd.
        sigma: The window's deviation, pixels.
    Source: Wang et al., 2004.
    """
    channels, offsets = x.shape[1], torch.arange(window, device=x.device) - window // 2
    weights = torch.softmax(-offsets.square() / (2 * sigma**2), 0).to(x)
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = rows.transpose(2, 3)

    def mean(values: Tensor) -> Tensor:
        values = F.conv2d(values, rows, padding=(window // 2, 0), groups=channels)
        return F.conv2d(values, columns, padding=(0, window // 2), groups=channels)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return likeness * (2 * covariance + c2) / (var_x + var_y + c2)


def smoothed(maps: Tensor, pixels: float) -> Tensor:
    """Average maps, (B, S, S), over windows of about so many pixels a side (an odd number), zeros beyond."""
    size = 2 * round((pixels - 1) / 2) + 1
    return F.avg_pool2d(maps[:, None], size, stride=1, padding=size // 2)[:, 0]
