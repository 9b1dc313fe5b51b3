r"""PaDiM: a Gaussian of the normal features at each position, and how far from its mean a feature lies.

.. math:: M(x_p) = \sqrt{(x_p-\mu_p)^\top\Sigma_p^{-1}(x_p-\mu_p)},\qquad
          \Sigma_p = \frac{1}{N-1}\sum_n (x_{np}-\mu_p)(x_{np}-\mu_p)^\top + 0.01\,I

Thomas Defard, Aleksandr Setkov, Angelique Loesch and Romaric Audigier, "PaDiM: A Patch Distribution Modeling
Framework for Anomaly Detection and Localization", ICPR International Workshops, 2021.

Faithful: three stages joined on the finest one's grid, channels drawn at random once for all positions, the
0.01 on the diagonal, the blur of the map, its maximum as the image's score.

Not: this library's backbone in place of ResNet18 or WideResNet50, images of 256 pixels in place of a crop of
224. The paper has a model for each class; ``baseline.bank: all`` makes one Gaussian of all classes' images at
a position, ``class`` one of each class's own.

Memory: what a Gaussian is measured by is stored, a (C, C) matrix for each position. With 64 x 64 positions
and 100 channels these are 164 MB, with ``bank: class`` as many again for each class. A fit holds 64 MB of
features at a time beside them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.baselines.banks import Banks
from hgadlib.config import BaselineConfig
from hgadlib.features.store import Features
from hgadlib.method import one_pass
from hgadlib.scoring import LevelValues

# The variance that the paper adds to each channel.
_ADDED = 0.01
# Numbers of features held at a time, and of matrices: 64 MB each.
_CELLS = 1 << 24


class PaDiM(Banks):
    """Mahalanobis distances to the Gaussian of each position.

    Args:
        classes: Names of the K classes.
        channels: C of each level.
        grids: (H, W) of each level.
        baseline: Takes bank and channels: how many are drawn of each level, all where it has fewer.
    Source: Defard et al., 2021, Sec. III.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
    ) -> None:
        super().__init__(classes, channels, grids, baseline=baseline)
        for level, (dim, (height, width)) in enumerate(zip(self.channels, self.grids, strict=True)):
            kept, positions = min(baseline.channels, dim), height * width
            self.register_buffer(f"drawn_{level}", torch.arange(kept))
            self.register_buffer(f"mean_{level}", torch.zeros(self.n_banks, positions, kept))
            # W with W^T W the inverse covariance: the distance is the length of W (x - mu).
            self.register_buffer(f"factor_{level}", torch.zeros(self.n_banks, positions, kept, kept))

    @torch.no_grad()
    def fit(
        self,
        features: Features,
        class_idx: np.ndarray,
        held_out: tuple[Features, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Draw the channels and estimate the Gaussians, some positions at a time.

        Args:
            features: Of the N training images.
            class_idx: (N,).
            held_out: Not looked at: nothing is calibrated.
            seed: Of the channels drawn.
        Returns:
            A history as of :func:`hgadlib.training.fit`, of one pass; "total" is the mean distance of the
            training features.
        Raises:
            InputError: A class with a Gaussian of its own has no images.
        """
        started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
        own_images, sums, count = self.images(class_idx), torch.zeros((), device=self.device), 0
        for level, stored in enumerate(features.levels):
            drawn, mean, factor = (self.get_buffer(f"{x}_{level}") for x in ("drawn", "mean", "factor"))
            channels = torch.randperm(stored.shape[-1], generator=generator)[: len(drawn)]
            drawn.copy_(channels.sort().values)
            for k, images in enumerate(own_images):
                step = max(1, _CELLS // (len(drawn) * max(len(images), len(drawn))))
                for start in range(0, stored.shape[1], step):
                    at = slice(start, start + step)
                    rows = stored[:, at][images.to(stored.device)].to(self.device)
                    x = rows[..., drawn].float().transpose(0, 1)  # (positions, images, channels)
                    mean[k, at] = x.mean(1)
                    x = x - mean[k, at, None]
                    covariance = x.mT @ x / max(len(images) - 1, 1)
                    identity = torch.eye(len(drawn), device=self.device)
                    root = torch.linalg.cholesky(covariance + _ADDED * identity)
                    factor[k, at] = torch.linalg.solve_triangular(root, identity, upper=False)
                    sums += (x @ factor[k, at].mT).norm(dim=-1).sum()
                count += len(images) * stored.shape[1]
        return one_pass(float(sums) / count, started, len(class_idx))

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute minus the Mahalanobis distances, as of :meth:`Method.level_values`."""
        bank = self.bank(class_idx)
        out = []
        for level, (x, grid) in enumerate(zip(self.checked(features), self.grids, strict=True)):
            drawn, mean, factor = (self.get_buffer(f"{x}_{level}") for x in ("drawn", "mean", "factor"))
            distances = x.new_empty(x.shape[:2])
            for k in bank.unique().tolist():
                own = bank == k
                centred = (x[own][..., drawn] - mean[k]).transpose(0, 1)  # (positions, images, channels)
                distances[own] = (centred @ factor[k].mT).norm(dim=-1).T
            out.append(-distances.unflatten(1, grid))
        return LevelValues(tuple(out), ())
