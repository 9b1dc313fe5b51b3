"""AUROC, AP, F1-max and AUPRO from one small table of how anomalous and normal scores interleave.

The metrics need a row per distinct score that anomalous pixels (or images) have, and how many normal
scores lie above it and at it; where the normal ones lie between two such scores changes nothing. Both
ways to that table are exact, ties included: sorting, and counting where scores are float16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

PATTERNS = 1 << 16  # bit patterns of float16
# +infinity and +NaN are the patterns from the first up to the second, -infinity and -NaN from the third on.
_INFINITY, _NEGATIVE_ZERO, _NEGATIVE_INFINITY = 0x7C00, 0x8000, 0xFC00
# The patterns of the finite values from the largest down; -0 is counted as 0.
_DESCENDING = np.concatenate(
    [np.arange(_INFINITY - 1, -1, -1), np.arange(_NEGATIVE_ZERO + 1, _NEGATIVE_INFINITY)]
)

# Diagonal neighbours belong together (8-connectivity): thin oblique scratches stay one region. It is also
# what the evaluation code of MVTec AD's authors does, so our AUPRO is comparable with published ones.
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Ranking(NamedTuple):
    """How anomalous and normal scores interleave; V distinct anomalous scores, from the largest down.

    Attributes:
        anomalous: Anomalous ones that have this score, (V,) int64, at least 1.
        normal_above: Normal ones with a larger score, (V,) int64.
        normal_tied: Normal ones with exactly this score, (V,) int64.
        regions: Sum over the anomalous ones of 1 / (size of their region), (V,) float64.
        n_normal: All normal ones.
    """

    anomalous: NDArray[np.int64]
    normal_above: NDArray[np.int64]
    normal_tied: NDArray[np.int64]
    regions: NDArray[np.float64]
    n_normal: int


def rank_sorted(normal: NDArray, anomalous: NDArray, weights: NDArray | None = None) -> Ranking:
    """Rank scores by sorting; `normal` is sorted in place.

    Args:
        normal: Finite scores of normal ones, (n,) of any real type.
        anomalous: Finite scores of anomalous ones, (m,) of the same type.
        weights: 1 / (size of its region) for each anomalous one, (m,); None for images.
    """
    values, inverse = np.unique(anomalous, return_inverse=True)
    normal.sort()
    below = np.searchsorted(normal, values, side="left")
    up_to = np.searchsorted(normal, values, side="right")
    counts = np.bincount(inverse, minlength=len(values))
    # Without regions each anomalous one stands for itself.
    weights = np.ones(len(anomalous)) if weights is None else weights
    regions = np.bincount(inverse, weights, len(values)).astype(np.float64, copy=False)
    return Ranking(
        counts[::-1], (len(normal) - up_to)[::-1], (up_to - below)[::-1], regions[::-1], len(normal)
    )


def rank_counts(scores: NDArray, anomalous: NDArray, regions: NDArray) -> Ranking:
    """Rank finite float16 scores from sums per bit pattern.

    Args:
        scores: Number of all scores, (65536,) int64.
        anomalous: Number of anomalous scores, (65536,) int64.
        regions: Sum of 1 / (size of its region) over the anomalous ones, (65536,) float64.
    """

    def descend(counts: NDArray) -> NDArray:
        ordered = counts[_DESCENDING]
        ordered[_INFINITY - 1] += counts[_NEGATIVE_ZERO]
        return ordered

    anomalous = descend(anomalous)
    tied = descend(scores) - anomalous
    up_to = np.cumsum(tied)
    seen = anomalous > 0
    return Ranking(anomalous[seen], (up_to - tied)[seen], tied[seen], descend(regions)[seen], int(up_to[-1]))


def region_weights(mask: NDArray) -> NDArray[np.float64]:
    """1 / (size of its region) for each anomalous pixel of a mask (H, W), in row-major order."""
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    region = labels[mask]
    return 1.0 / np.bincount(region)[region]


def any_non_finite(scores: NDArray) -> bool:
    """Tell from counts per bit pattern, (65536,), whether a NaN or an infinity was counted."""
    return bool(scores[_INFINITY:_NEGATIVE_ZERO].any() or scores[_NEGATIVE_INFINITY:].any())


def auroc(r: Ranking) -> float:
    """Probability that an anomalous score exceeds a normal one; a tie counts one half."""
    outranked = (r.n_normal - r.normal_above - 0.5 * r.normal_tied) / r.n_normal
    return float(r.anomalous @ outranked / r.anomalous.sum())


def average_precision(r: Ranking) -> float:
    r"""Sum of precision times gained recall, :math:`\sum_i (R_i - R_{i-1}) P_i`, without interpolation."""
    found = np.cumsum(r.anomalous)
    precision = found / (found + r.normal_above + r.normal_tied)
    return float(r.anomalous @ precision / found[-1])


def f1_max(r: Ranking) -> float:
    """Largest F1 over all thresholds; it lies at an anomalous score, since others only add false alarms."""
    found = np.cumsum(r.anomalous)
    flagged = found + r.normal_above + r.normal_tied
    return float(np.max(2 * found / (flagged + found[-1])))


def aupro(r: Ranking, fpr_limit: float) -> float:
    """Area under the per-region overlap against the false-positive rate up to the limit, over the limit."""
    overlap = np.cumsum(r.regions)
    # The last sum is the number of regions; dividing by it keeps rounding within [0, 1].
    overlap = np.concatenate([[0.0], overlap / overlap[-1]])
    # Two corners per score: flat over the normal scores above it, then a slope over those tied with it.
    corners = np.stack([r.normal_above, r.normal_above + r.normal_tied], axis=1).ravel() / r.n_normal
    x = np.concatenate([[0.0], corners, [1.0]])
    y = np.repeat(overlap, 2)
    # The first corner at or past the limit: where the curve steps up just there, the step is left out.
    cut = int(np.searchsorted(x, fpr_limit))
    share = (fpr_limit - x[cut - 1]) / (x[cut] - x[cut - 1])
    x = np.append(x[:cut], fpr_limit) / fpr_limit
    y = np.append(y[:cut], y[cut - 1] + share * (y[cut] - y[cut - 1]))
    return min(1.0, float(np.diff(x) @ (y[1:] + y[:-1]) / 2))
