r"""Image and pixel AUROC, AP, F1-max and AUPRO: exact, ties included.

A score is higher where something is more anomalous. A metric without meaning (one class only) is None, never
a number. Images are few, and scikit-learn ranks them. Pixels are many, so their maps are float16, which has
65,536 bit patterns: counting these is exact, and nothing but the counts is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from hgadlib.errors import InputError

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
FPR_LIMIT = 0.3

Metrics = dict[str, float | None]

_PATTERNS = 1 << 16  # bit patterns of float16
# +infinity and +NaN are the patterns from the first up to the second, -infinity and -NaN from the third on.
_INFINITY, _NEGATIVE_ZERO, _NEGATIVE_INFINITY = 0x7C00, 0x8000, 0xFC00
# The patterns of the finite values from the largest down; -0 is counted as 0.
_DESCENDING = np.r_[_INFINITY - 1 : -1 : -1, _NEGATIVE_ZERO + 1 : _NEGATIVE_INFINITY]
# Pixels counted at once: bincount makes an int64 copy of them (2 MB), which still fits in a cache.
_CHUNK = 1 << 18

# Diagonal neighbours belong together (8-connectivity): thin oblique scratches stay one region. It is also
# what the evaluation code of MVTec AD's authors does, so our AUPRO is comparable with published ones.
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> Metrics:
    """Return the metrics of IMAGE_METRICS, each in [0, 1], or None for all with one class only.

    Args:
        scores: Image scores, (N,) float.
        labels: True where anomalous, (N,) bool.
    Raises:
        InputError: No scores, another shape, labels that are not bool, or a score that is not finite.

    Example:
        >>> image_metrics([0.1, 0.4, 0.35, 0.8], [False, False, True, True])["image_auroc"]
        0.75
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape or not len(scores):
        found = f"found {scores.shape} and {labels.shape}; pass one of each per image"
        raise InputError(f"expected scores and labels of one shape (N,), N > 0, {found}")
    if labels.dtype != np.bool_:
        raise InputError(f"expected bool labels, found {labels.dtype}; pass labels > 0")
    if scores.dtype.kind not in "fiu":
        raise InputError(f"expected numbers as scores, found {scores.dtype}")
    i = np.isfinite(scores).argmin()  # the first that is not finite, if there is one
    if not np.isfinite(scores[i]):
        raise InputError(f"expected finite scores, found {scores[i]} for image {i}; look for NaN weights")
    if labels.all() or not labels.any():
        return dict.fromkeys(IMAGE_METRICS)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    values = (roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max())
    return {name: float(value) for name, value in zip(IMAGE_METRICS, values, strict=True)}


class PixelMetrics:
    """Pixel AUROC, AP, F1-max and AUPRO of maps that arrive batch by batch, in 1.5 MB however many there are.

    AUPRO averages, over the 8-connected regions of all masks, the share of a region that lies at or above
    a threshold, and integrates that against the false-positive rate over the normal pixels of all images.
    Between two thresholds the curve is straight, and it is cut exactly at the limit.

    Args:
        fpr_limit: False-positive rate, in (0, 1], up to which AUPRO is taken; else an InputError.
    Source: paper Sec. 4.1; AUPRO as defined with MVTec AD (Bergmann et al., 2021).

    Example:
        >>> metrics = PixelMetrics(fpr_limit=0.3)
        >>> mask = np.array([[[True, False], [False, False]]])
        >>> metrics.update(np.where(mask, 2, 1).astype(np.float16), mask)
        >>> metrics.compute()
        {'pixel_auroc': 1.0, 'pixel_ap': 1.0, 'pixel_f1max': 1.0, 'aupro': 1.0}
    """

    def __init__(self, fpr_limit: float = FPR_LIMIT) -> None:
        if not 0 < fpr_limit <= 1:
            raise InputError(f"expected fpr_limit in (0, 1], found {fpr_limit}; AUPRO usually goes up to 0.3")
        self.fpr_limit = float(fpr_limit)
        self._scores, self._anomalous = np.zeros((2, _PATTERNS), np.int64)
        self._regions = np.zeros(_PATTERNS)

    def update(self, maps: ArrayLike, masks: ArrayLike) -> None:
        """Count the scores of some maps; the split into batches changes no bit of the result.

        Args:
            maps: Anomaly maps, (B, H, W) float16; H and W may differ between calls.
            masks: True where anomalous, (B, H, W) bool.
        Raises:
            InputError: Shapes differ, maps are not float16, masks are not bool, or a score is not finite;
                nothing of the batch is then counted.
        """
        maps, masks = np.asarray(maps), np.asarray(masks)
        if maps.ndim != 3 or maps.shape != masks.shape:
            found = f"found {maps.shape} and {masks.shape}; resize the masks to the maps without smoothing"
            raise InputError(f"expected maps and masks of one shape (N, H, W), {found}")
        if masks.dtype != np.bool_:
            raise InputError(f"expected bool masks, found {masks.dtype}; pass masks > 0")
        if maps.dtype != np.float16:
            raise InputError(f"expected float16 maps, found {maps.dtype}; pass maps.astype(np.float16)")
        counts, bits = np.zeros(_PATTERNS, np.int64), _bits(maps)
        for start in range(0, len(bits), _CHUNK):
            counts += np.bincount(bits[start : start + _CHUNK], minlength=_PATTERNS)
        if counts[_INFINITY:_NEGATIVE_ZERO].any() or counts[_NEGATIVE_INFINITY:].any():
            bad = np.flatnonzero(~np.isfinite(maps).all((1, 2)))
            raise InputError(
                f"expected finite scores, found NaN or infinity in {len(bad)} of {len(maps)} maps, first in "
                f"map {bad[0]} of this batch; look for NaN weights, or for scores beyond float16's 65504"
            )
        self._scores += counts
        for anomaly_map, mask in zip(maps, masks, strict=True):
            if mask.any():
                touched = _bits(anomaly_map[mask])
                region = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)[0][mask]
                # One image after another, so that the order of additions is the same in any split.
                np.add.at(self._anomalous, touched, 1)
                np.add.at(self._regions, touched, 1.0 / np.bincount(region)[region])

    def compute(self) -> Metrics:
        """Return the metrics named in PIXEL_METRICS; all None unless both kinds of pixel were seen."""
        scores, anomalous, regions = map(_descend, (self._scores, self._anomalous, self._regions))
        normal, seen = scores - anomalous, anomalous > 0
        up_to = np.cumsum(normal)
        n_normal = int(up_to[-1])
        if not n_normal or not seen.any():
            return dict.fromkeys(PIXEL_METRICS)
        # By distinct anomalous score, from the largest down: anomalous pixels that have it, the sum of
        # 1 / (size of their region) over them, normal pixels that lie above it, and those tied with it.
        anomalous, regions = anomalous[seen], regions[seen]
        above, tied = (up_to - normal)[seen], normal[seen]
        found = np.cumsum(anomalous)
        flagged = found + above + tied
        # Probability that an anomalous score exceeds a normal one; a tie counts one half.
        auroc = anomalous @ ((n_normal - above - 0.5 * tied) / n_normal) / found[-1]
        # Sum of precision times gained recall, without interpolation.
        average_precision = anomalous @ (found / flagged) / found[-1]
        # The largest F1 lies at an anomalous score, since other thresholds only add false alarms.
        f1_max = np.max(2 * found / (flagged + found[-1]))
        # Two corners per score: flat over the normal scores above it, then a slope over those tied with it.
        corners = np.stack([above, above + tied], axis=1).ravel() / n_normal
        aupro = _area(corners, np.cumsum(regions), self.fpr_limit)
        return dict(zip(PIXEL_METRICS, map(float, (auroc, average_precision, f1_max, aupro)), strict=True))


def mean_metrics(per_class: Mapping[str, Mapping[str, float | None]]) -> Metrics:
    """Average each metric over the classes that have it; None where no class does.

    Raises:
        InputError: There is no class, or a metric is not finite.

    Example:
        >>> mean_metrics({"a": {"aupro": 0.5}, "b": {"aupro": 1.0}, "c": {"aupro": None}})
        {'aupro': 0.75}
    """
    if not per_class:
        raise InputError("expected the metrics of at least one class, found none")
    means: Metrics = {}
    for name in dict.fromkeys(name for metrics in per_class.values() for name in metrics):
        values = [v for metrics in per_class.values() if (v := metrics.get(name)) is not None]
        if not np.isfinite(values).all():
            raise InputError(f"expected finite metrics, found {values} for {name}; evaluate these again")
        means[name] = float(np.mean(values)) if values else None
    return means


def _descend(sums: NDArray) -> NDArray:
    """Order sums per bit pattern (65536,) by score, from the largest finite one down."""
    ordered = sums[_DESCENDING]
    ordered[_INFINITY - 1] += sums[_NEGATIVE_ZERO]
    return ordered


def _area(corners: NDArray, overlap: NDArray, fpr_limit: float) -> float:
    """Area under the overlap against the false-positive rate up to the limit, over the limit."""
    # The last sum is the number of regions; dividing by it keeps rounding within [0, 1].
    x, y = np.r_[0.0, corners, 1.0], np.repeat(np.r_[0.0, overlap / overlap[-1]], 2)
    # The first corner at or past the limit: where the curve steps up just there, the step is left out.
    cut = int(np.searchsorted(x, fpr_limit))
    share = (fpr_limit - x[cut - 1]) / (x[cut] - x[cut - 1])
    x = np.append(x[:cut], fpr_limit) / fpr_limit
    y = np.append(y[:cut], y[cut - 1] + share * (y[cut] - y[cut - 1]))
    return min(1.0, float(np.diff(x) @ (y[1:] + y[:-1]) / 2))


def _bits(values: NDArray) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint16)
