"""How much of two distributions lies in common, for histograms of normal and anomalous log-likelihoods."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

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


def overlap_coefficient(a: ArrayLike, b: ArrayLike, bins: int = 200) -> float | None:
    """Overlap of the distributions of two samples, from histograms over their common range.

    Args:
        a: Values of one group, any shape, for instance log-likelihoods of normal positions in nats.
        b: Values of the other group.
        bins: Number of equal bins between the smallest and the largest value of both.

    Returns:
        0 (apart) to 1 (the same), or None where a group is empty.

    Raises:
        InputError: A value is not finite, or bins is less than 1.

    Source: paper Sec. 3.2, the overlap shown in Fig. 2b and 2d.
    """
    a, b = np.ravel(a), np.ravel(b)
    if bins < 1:
        raise InputError(f"expected bins of 1 or more, found {bins}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("expected finite values, found NaN or infinity; look for NaN weights")
    if not a.size or not b.size:
        return None
    span = (min(a.min(), b.min()), max(a.max(), b.max()))
    return histogram_overlap(np.histogram(a, bins, span)[0], np.histogram(b, bins, span)[0])
