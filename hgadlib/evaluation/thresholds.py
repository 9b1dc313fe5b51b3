r"""A threshold from normal images alone: so many false alarms, and no more, on average.

Scores of n normal images that the model has not learnt from are as good as those of normal images to come:
among n + 1 exchangeable scores each rank is equally likely. So with the threshold at the k-th smallest,

.. math:: P(s_{n+1} > s_{(k)}) \le 1 - \frac{k}{n+1},\qquad k = \lceil (n+1)(1-\alpha)\rceil ,

whatever the distribution (split conformal prediction). Images that were trained on do not do: their scores
are too low. An image is called anomalous where its score is *above* the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hgadlib.errors import InputError

UNLIKE = 6.0
"""Deviations below its class's usual log-likelihood from which on an anomalous image is of no known class."""


def images_needed(false_alarm_rate: float) -> int:
    """Return the least number of held-out normal images for a rate; an InputError of one outside (0, 1).

    >>> [images_needed(rate) for rate in (0.1, 0.05, 0.01)]
    [9, 19, 99]
    """
    # 1 / 0.1 - 1 is a little more than 9 in binary; that is no tenth image.
    return max(1, math.ceil(round(1 / _check_rate(false_alarm_rate) - 1, 9)))


def conformal_threshold(scores: ArrayLike, false_alarm_rate: float) -> float:
    """Choose the threshold that at most this share of new normal images exceeds, on average over draws.

    Args:
        scores: Of n held-out normal images, (n,).
        false_alarm_rate: In (0, 1).
    Raises:
        InputError: The rate lies outside (0, 1), a score is not finite, or there are too few images for the
            rate (the line says how many it takes).

    >>> conformal_threshold([3, 1, 2, 4, 5, 6, 7, 8, 9], 0.2)
    8.0
    """
    return _threshold(np.sort(_check_scores(scores)), false_alarm_rate)


def _threshold(rising: NDArray[np.float64], false_alarm_rate: float) -> float:
    """Choose it as :func:`conformal_threshold`, of scores that were checked and sorted."""
    # (n + 1)(1 - rate) of 19 and 0.05 is a little more than 19 in binary; it is 19.
    rank = max(1, math.ceil(round((len(rising) + 1) * (1 - _check_rate(false_alarm_rate)), 9)))
    if rank > len(rising):
        raise InputError(
            f"a false alarm rate of {false_alarm_rate:g} takes at least {images_needed(false_alarm_rate)} "
            f"held-out normal images, found {len(rising)}; hold out more, or allow a higher rate"
        )
    return float(rising[rank - 1])


def conformal_p_values(scores: ArrayLike, held_out: ArrayLike) -> NDArray[np.float64]:
    r"""Compute how unusual scores are among held-out normal ones: uniform, or above it, for normal images.

    .. math:: p = \frac{1 + \#\{i: s_i \ge s\}}{n + 1}

    Args:
        scores: Of images to judge, (N,).
        held_out: Of n held-out normal images, (n,).
    Returns:
        (N,), in (0, 1]; an image is called anomalous at rate alpha where p <= alpha, ties included.
    Raises:
        InputError: A score is not finite, or there are none to compare with.

    >>> conformal_p_values([0.0, 2.5, 9.0], [1.0, 2.0, 3.0]).tolist()
    [1.0, 0.5, 0.25]
    """
    return _p_values(_finite(scores), np.sort(_check_scores(held_out)))


def _p_values(new: NDArray[np.float64], rising: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 + len(rising) - np.searchsorted(rising, new, side="left")) / (len(rising) + 1)


@dataclass(frozen=True)
class Normals:
    """What normal images score that took no part in making the scores: of one class, or of several together.

    They are checked and sorted here, once; each image to judge is then a search.

    Attributes:
        scores: Image scores, (n,), in any order; kept rising.
        peaks: Largest value of each image's map, (n,), in any order; kept rising.
    Raises:
        InputError: A value is not finite, or there is none.
    """

    scores: NDArray[np.float64]
    peaks: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check and sort both."""
        for name in ("scores", "peaks"):
            object.__setattr__(self, name, np.sort(_check_scores(getattr(self, name))))

    @staticmethod
    def together(parts: Sequence[Normals]) -> Normals:
        """Pool classes."""
        return Normals(
            np.concatenate([part.scores for part in parts]), np.concatenate([part.peaks for part in parts])
        )

    def threshold(self, false_alarm_rate: float) -> float:
        """Return the image score that at most this share of new normal images exceeds."""
        return _threshold(self.scores, false_alarm_rate)

    def pixel_threshold(self, false_alarm_rate: float) -> float:
        """Return the value that at most this share of new normal images exceeds *anywhere* in its map.

        Pixels of an image depend on each other, so nothing is promised of their number, only of images
        without any.
        """
        return _threshold(self.peaks, false_alarm_rate)

    def p_value(self, score: float) -> float:
        """See :func:`conformal_p_values`."""
        return float(_p_values(_finite(score), self.scores))

    def percentile(self, score: float) -> float:
        """Return the share of these images that score less, in percent."""
        return 100 * float(np.searchsorted(self.scores, score, side="left")) / len(self.scores)


@dataclass(frozen=True)
class Rate:
    """A share that was counted, events of trials, with the interval that the count leaves open."""

    events: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself; NaN of nothing."""
        return self.events / self.trials if self.trials else math.nan

    def __str__(self) -> str:
        """Write it in percent, with its interval.

        >>> print(binomial_rate([True] + [False] * 19))
        5.0 (0.1 to 24.9) of 20
        """
        if not self.trials:
            return "no image"
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f}) of {self.trials}"


def binomial_rate(events: ArrayLike, *, confidence: float = 0.95) -> Rate:
    """Count events, (N,) bool, with the exact (Clopper-Pearson) interval of their probability."""
    count, trials = int(np.count_nonzero(events)), np.size(events)
    if not trials:
        return Rate(0, 0, math.nan, math.nan)
    interval = stats.binomtest(count, trials).proportion_ci(confidence, method="exact")
    return Rate(count, trials, float(interval.low), float(interval.high))


def _check_rate(rate: float) -> float:
    if not 0 < rate < 1:
        raise InputError(f"expected a false alarm rate between 0 and 1, found {rate}; 0.05, say")
    return rate


def _check_scores(scores: ArrayLike) -> NDArray[np.float64]:
    values = _finite(scores)
    if values.ndim != 1 or not len(values):
        raise InputError(f"expected the scores of some normal images, (n,), found shape {values.shape}")
    return values


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("expected finite scores, found NaN or infinity; look for NaN weights")
    return values
