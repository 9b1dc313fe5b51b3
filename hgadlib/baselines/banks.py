"""What PaDiM and PatchCore share: normal features kept of all classes together, or of each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hgadlib.baselines.baseline import Baseline
from hgadlib.config import BaselineConfig
from hgadlib.errors import InputError


class Banks(Baseline):
    """A method of one pass that compares an image with one bank of several.

    Args:
        classes: Names of the K classes.
        channels: C of each level.
        grids: (H, W) of each level.
        baseline: bank "all" makes one bank, "class" one of each class's images.
    """

    learns = False

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
    ) -> None:
        super().__init__(classes, channels, grids, baseline=baseline)
        self.n_banks = 1 if baseline.bank == "all" else len(self.classes)

    def bank(self, class_idx: Tensor) -> Tensor:
        """Find the bank of each image, (B,)."""
        return torch.zeros_like(class_idx) if self.baseline.bank == "all" else class_idx

    def images(self, class_idx: np.ndarray) -> list[Tensor]:
        """List the training images of each bank.

        Raises:
            InputError: A bank has none.
        """
        bank = self.bank(torch.as_tensor(class_idx, dtype=torch.int64))
        found = [(bank == k).nonzero()[:, 0] for k in range(self.n_banks)]
        for name, own in zip(self.classes, found, strict=False):
            if not len(own):
                raise InputError(f"class {name!r}: expected training images, found none; add some")
        return found
