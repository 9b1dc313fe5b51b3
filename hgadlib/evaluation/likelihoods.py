"""How much of two distributions lies in common, for histograms of normal and anomalous log-likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from hgadlib.errors import InputError


def histogram_overlap(a: ArrayLike, b: ArrayLike) -> float | None:
    r"""Area that two histograms over the same bins have in common, each scaled to area 1.

    .. math:: \sum_i \min\Bigl(\frac{a_i}{\sum a}, \frac{b_i}{\sum b}\Bigr)

    Args:
        a: Counts per bin, (K,).
        b: Counts per bin, (K,).

    Returns:
        0 (apart) to 1 (the same), or None where a histogram is empty.

    Raises:
        InputError: Shapes differ, or a count is negative or not finite.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"expected counts (K,) over the same bins, found {a.shape} and {b.shape}")
    both = np.stack([a, b])
    if not np.isfinite(both).all() or (both < 0).any():
        raise InputError("expected counts of 0 or more, found a negative or non-finite one")
    if not a.sum() or not b.sum():
        return None
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


def anomalous_positions(
    class_idx: np.ndarray, labels: np.ndarray, masks: Mapping[int, np.ndarray], grid: Sequence[int]
) -> Tensor:
    """Mark the anomalous positions: those whose cell the mask touches; without masks, all of the image.

    Args:
        class_idx: (N,).
        labels: True where an image is known to be anomalous, (N,) bool.
        masks: By class index, those of the class's images in their order, (n_k, S, S) bool.
        grid: (H, W) of the level.

    Returns:
        (N, H, W) bool.
    """
    touched = torch.from_numpy(labels)[:, None, None].expand(-1, *grid).clone()
    for k, own in masks.items():
        pooled = F.adaptive_max_pool2d(torch.from_numpy(own)[:, None].float(), (grid[0], grid[1]))
        touched[torch.from_numpy(class_idx == k)] &= pooled[:, 0].bool()
    return touched
