"""Distances to the nearest training features of an image's class: what the features alone detect."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.config import FlowConfig, PriorConfig
from hgadlib.features.store import Features
from hgadlib.method import one_pass
from hgadlib.model import HGAD
from hgadlib.scoring import LevelValues

N_BANK = 10_000
"""Features of a class and level that are kept at most."""
# Distances held at a time: 64 MB.
_CELLS = 1 << 24


class Neighbours(HGAD):
    r"""Nearest neighbours in a bank of training features for each class and level, searched exactly.

    .. math:: \log p(x|y) = -\tfrac12\min_{b\in B_y}\lVert x - b\rVert^2

    up to a constant: the largest term of a kernel density of unit width, divided by D in scores as HGAD's is.
    It is an HGAD without blocks, a single Gaussian in place of the mixture, whose density is this one.

    Args:
        bank: Features kept, for each level and class.
        dtype: Of the kept features: that of the stored ones, which loses nothing.
        **settings: As of :class:`HGAD`, without flow and prior.
    Source: PatchCore (Roth et al., 2022) without its coreset and neighbourhoods, a bank for each class.
    """

    learns = False

    def __init__(
        self, *shape: Any, bank: Sequence[Sequence[int]], dtype: str = "float16", **settings: Any
    ) -> None:
        fixed = {"flow": FlowConfig(layers=0, normalise="none"), "prior": PriorConfig(kind="single")}
        super().__init__(*shape, **settings | fixed)
        self.bank, self.dtype = [list(sizes) for sizes in bank], dtype
        for level, (sizes, dim) in enumerate(zip(self.bank, self.channels, strict=True)):
            for k, size in enumerate(sizes):
                self.register_buffer(f"bank_{level}_{k}", torch.zeros(size, dim, dtype=getattr(torch, dtype)))

    @classmethod
    def for_features(
        cls, classes: Sequence[str], features: Features, class_idx: np.ndarray, **settings: Any
    ) -> Neighbours:
        """Make one without content for training features of these classes, (N,)."""
        counts = np.bincount(class_idx, minlength=len(classes)).tolist()
        bank = [[min(N_BANK, n * h * w) for n in counts] for h, w in features.grids]
        dtype = str(features.levels[0].dtype).removeprefix("torch.")
        return cls(classes, features.channels, features.grids, bank=bank, dtype=dtype, **settings)

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return super().architecture() | {"bank": self.bank, "dtype": self.dtype}

    @torch.inference_mode()
    def fit(
        self,
        features: Features,
        class_idx: np.ndarray,
        held_out: tuple[Features, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Draw the banks and calibrate the scores.

        A training image is calibrated on without its own features in the bank, since their distance is 0.

        Args:
            features: Of the N training images.
            class_idx: (N,).
            held_out: Features and classes of normal images held out of training.
            seed: Of the draw.
        Returns:
            A history as of :func:`hgadlib.training.fit`, of one pass; "total" is the mean of -log p by D.
        """
        started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
        owners: list[list[Tensor]] = []
        for level, (stored, sizes) in enumerate(zip(features.levels, self.bank, strict=True)):
            owners.append([])
            for k, size in enumerate(sizes):
                images, positions = torch.from_numpy(np.flatnonzero(class_idx == k)), stored.shape[1]
                drawn = torch.randperm(len(images) * positions, generator=generator)[:size].sort().values
                owner, position = images[drawn // max(positions, 1)], drawn % positions
                rows = stored[owner.to(stored.device), position.to(stored.device)]
                self.get_buffer(f"bank_{level}_{k}").copy_(rows)
                owners[-1].append(owner.to(self.device))
        sums: list[Tensor] = []

        def values(
            part: Features, classes: np.ndarray, without: list[list[Tensor]] | None = None
        ) -> Iterator[tuple[LevelValues, Tensor]]:
            labels = torch.as_tensor(classes, dtype=torch.int64, device=self.device)
            for index, x in part.batches(torch.arange(len(labels)).split(32), self.device):
                index = index.to(self.device)
                found = self._densities(x, labels[index], index, without)
                scales = [dim if self.per_dimension else 1 for dim in self.channels]
                levels = zip(found, scales, self.grids, strict=True)
                own = tuple((v / scale).unflatten(1, grid) for (_, v), scale, grid in levels)
                if without:
                    sums.append(sum(v.mean((1, 2)).sum() for v in own))
                yield LevelValues(own, ()), labels[index]

        self.calibrate(values(features, class_idx, owners), values(*held_out) if held_out else ())
        total = -float(torch.stack(sums).sum()) / (len(class_idx) * len(self.grids))
        return one_pass(total, started, len(class_idx))

    def _densities(
        self,
        features: Sequence[Tensor],
        class_idx: Tensor,
        images: Tensor | None = None,
        owners: list[list[Tensor]] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each level's features and log-densities; an image finds none of what it owns in the bank."""
        for level, (_, _, x) in enumerate(self._fitted(features)):
            squares = x.new_zeros(x.shape[:2])
            for k in class_idx.unique().tolist():
                rows, bank = x[class_idx == k], self.get_buffer(f"bank_{level}_{k}").to(x.dtype)
                own = None
                if owners is not None and images is not None and len(owners[level][k].unique()) > 1:
                    mine = images[class_idx == k].repeat_interleave(x.shape[1])
                    own = mine, owners[level][k]
                squares[class_idx == k] = nearest(rows.flatten(0, 1), bank, own).view(rows.shape[:2])
            yield x, -0.5 * squares


def nearest(x: Tensor, bank: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Compute the squared Euclidean distance of each row to the nearest one in a bank.

    The nearest is found by matrix products; its distance is that of the difference, so nothing cancels.

    Args:
        x: (N, C).
        bank: (M, C), M > 0.
        own: Marks of the rows (N,) and of the bank (M,): a row does not find what bears its own mark.
    Returns:
        (N,).
    """
    half, found = -0.5 * bank.square().sum(1), []
    step = max(1, _CELLS // len(bank))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        likeness = torch.addmm(half, part, bank.T)
        if own is not None:
            likeness.masked_fill_(own[0][start : start + step, None] == own[1], -torch.inf)
        found.append((part - bank[likeness.argmax(1)]).square().sum(1))
    return torch.cat(found)
