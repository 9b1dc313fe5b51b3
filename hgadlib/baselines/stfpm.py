"""STFPM: a student that has learnt a frozen network's maps on normal images alone (Wang et al., BMVC 2021).

As published: a student of the teacher's own architecture, without its knowledge at first; maps of strides 4,
8 and 16, each position's features brought to length 1; half their squared distance as loss; the product of
the enlarged distances as map. Not as published: the backbone is this library's (ResNet-18 there), the
optimiser Adam (gradient descent with momentum there), the product is taken on the finest map's grid and
then enlarged, and the last epoch's student is used (there the best one on images held out). Smaller than
published: fewer epochs.

Its kin MKD (Salehi et al., CVPR 2021) stands for both here. There the student is a network smaller than its
teacher, a VGG-16; its loss adds the plain squared distance of the maps to that of their directions, which is
all that counts here; and its map is the loss's gradient with respect to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from hgadlib.baselines.baseline import Baseline
from hgadlib.config import BaselineConfig
from hgadlib.errors import InputError
from hgadlib.features.backbone import create_feature_network
from hgadlib.scoring import LevelValues


class STFPM(Baseline):
    r"""How far the maps of a student are from those of its teacher, which it has learnt on normal images.

    .. math:: s = \prod_l U_l\,\tfrac12\Big\lVert \frac{t_l}{\lVert t_l\rVert} -
              \frac{s_l}{\lVert s_l\rVert}\Big\rVert^2

    The values are -s, on the grid of the finest map. The teacher's maps are the features; the last level is
    the image, which the student sees.

    Args:
        classes: Names of the K classes; it does not use them.
        channels: C of each level of features.
        grids: (H, W) of each level.
        baseline: Nothing of it is used.
        backbone: timm's name of the teacher.
        stages: The teacher's stages that are the levels.
    Raises:
        InputError: The levels are not the teacher's stages and the image.
    Source: STFPM (Wang et al., 2021), Sec. 3.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
        backbone: str,
        stages: Sequence[int],
    ) -> None:
        finest = max(grids[:-1], default=(1, 1))
        super().__init__(classes, channels, grids, baseline=baseline, value_grids=[finest])
        self.backbone, self.stages = backbone, tuple(stages)
        self.student = untrained(backbone, self.stages)
        self.eval()
        with torch.no_grad():
            own = [tuple(x.shape[1:]) for x in self.student(torch.zeros(1, 3, *self.grids[-1]))]
        expected = [*own, (3, *self.grids[-1])]
        found = [(c, *grid) for c, grid in zip(self.channels, self.grids, strict=True)]
        if found != expected:
            raise InputError(
                f"stfpm: expected as levels the stages of a convolutional network and the image, {expected}, "
                f"found {found}; set features.pyramid: null, features.join: false and features.image to "
                "data.image_size"
            )

    def distances(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute half the squared distance of directions, one (B, H, W) a stage."""
        *teacher, image = self.checked(features)
        student = self.student(image.unflatten(1, self.grids[-1]).permute(0, 3, 1, 2))
        found = []
        for own, x, grid in zip(student, teacher, self.grids, strict=False):
            apart = F.normalize(own.float(), dim=1) - F.normalize(x.mT.unflatten(2, grid), dim=1)
            found.append(0.5 * apart.square().sum(1))
        return found

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute minus the product of the distances, as of :meth:`Method.level_values`."""
        maps = torch.cat(
            [
                F.interpolate(x[:, None], self.value_grids[0], mode="bilinear")
                for x in self.distances(features)
            ],
            1,
        )
        return LevelValues((-maps.prod(1),), ())

    def losses(
        self,
        features: Sequence[Tensor],
        class_idx: Tensor,
        *,
        precision: torch.dtype = torch.float32,
        **settings: Any,
    ) -> list[dict[str, Tensor]]:
        """Sum the stages' mean distances.

        Args:
            features: One (B, H*W, C) a level.
            class_idx: (B,), not used.
            precision: bfloat16 runs the student under autocast.
            **settings: Of other methods.
        """
        with torch.autocast(features[0].device.type, torch.bfloat16, precision == torch.bfloat16):
            means = [x.mean() for x in self.distances(features)]
        return [{"total": torch.stack(means).sum()}]

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return super().architecture() | {"backbone": self.backbone, "stages": list(self.stages)}


def untrained(backbone: str, stages: tuple[int, ...]) -> nn.Module:
    """Create a backbone's network up to the last of some stages, its weights drawn anew."""
    network = create_feature_network(backbone, stages, "random")
    if isinstance(network, EfficientNetFeatures):
        # timm cuts other networks by itself; here the blocks behind the last stage would run for nothing.
        network.blocks = network.blocks[: network.feature_info.get_dicts(["stage"])[-1]["stage"]]
    return network
