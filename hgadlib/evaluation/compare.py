r"""Is one method better than another on the same test images? Paired intervals, DeLong's test, mean ranks.

All scores are of the same N images: what is hard for both drops out of the difference. The AUROC is the share
of pairs of an anomalous and a normal image that a method puts in order, a tie counting one half:

.. math:: A = \frac1{mn}\sum_{i,j}\psi_{ij},\qquad
          \psi_{ij} = [s_i > s_j] + \tfrac12[s_i = s_j]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from hgadlib.errors import InputError

Floats = NDArray[np.float64]


def interval(draws: Floats) -> tuple[float, float]:
    """Return the 95 % interval of bootstrap draws, (R,), by percentiles."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def paired_bootstrap(
    ours: Floats, theirs: Floats, labels: NDArray[np.bool_], class_idx: NDArray[np.int64], *,
    resamples: int = 2000, seed: int = 0,
) -> tuple[float, Floats]:  # fmt: skip
    """Subtract two methods' image AUROC, averaged over classes and seeds, and resample the difference.

    Each resample draws images within their class and label, the same for both methods and all their seeds,
    and then seeds. Of one seed, the images alone are drawn.

    Args:
        ours: Scores of a method's S seeds, (S, N).
        theirs: Of the other, of the same seeds.
        labels: True where anomalous, (N,).
        class_idx: (N,); a class with images of one kind only has no AUROC and is left out.
        resamples: R.
        seed: Of the draws.
    Returns:
        The difference, and R draws of it: see :func:`interval`.
    Raises:
        InputError: Shapes differ, or no class has both kinds.
    """
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    members = _classes(ours, theirs, labels, class_idx)
    rng, n_seeds = np.random.default_rng(seed), len(ours)
    draws, found = np.zeros((n_seeds, resamples)), np.zeros(n_seeds)
    for anomalous, normal in members:
        m, n = len(anomalous), len(normal)
        weights = [rng.multinomial(size, np.full(size, 1 / size), resamples) / size for size in (m, n)]
        for s in range(n_seeds):
            gain = _wins(ours[s], anomalous, normal) - _wins(theirs[s], anomalous, normal)
            found[s] += gain.mean() / len(members)
            draws[s] += np.einsum("rn,rn->r", weights[0] @ gain, weights[1]) / len(members)
    chosen = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples) / n_seeds
    return float(found.mean()), np.einsum("rs,sr->r", chosen, draws)


class DeLong(NamedTuple):
    """Difference of two AUROCs, its standard error, and the two-sided p-value of no difference."""

    difference: float
    error: float
    p: float


def delong(
    ours: Floats, theirs: Floats, labels: NDArray[np.bool_], class_idx: NDArray[np.int64] | None = None
) -> DeLong:
    r"""Test whether two score vectors of one set of images have the same AUROC.

    .. math:: \operatorname{Var} = \frac{s^2(\bar\psi_{i\cdot})}{m} + \frac{s^2(\bar\psi_{\cdot j})}{n}

    with psi the difference of both methods'; classes are independent, and their variances add up.

    Args:
        ours: (N,).
        theirs: (N,).
        labels: True where anomalous, (N,).
        class_idx: (N,), for the mean AUROC over classes; None for one class.
    Raises:
        InputError: Shapes differ, or no class has both kinds.
    Source: DeLong, DeLong and Clarke-Pearson (1988).
    """
    class_idx = np.zeros(len(labels), np.int64) if class_idx is None else class_idx
    members = _classes(ours, theirs, labels, class_idx)
    difference = variance = 0.0
    for anomalous, normal in members:
        gain = _wins(ours, anomalous, normal) - _wins(theirs, anomalous, normal)
        difference += gain.mean() / len(members)
        parts = [gain.mean(axis) for axis in (0, 1)]
        # Of one image nobody knows the spread; it counts as none.
        variance += sum(x.var(ddof=1) / len(x) for x in parts if len(x) > 1) / len(members) ** 2
    error = float(np.sqrt(variance))
    p = 2 * norm.sf(abs(difference) / error) if error else float(difference == 0)
    return DeLong(float(difference), error, float(p))


def mean_ranks(values: Floats) -> Floats:
    """Rank methods in each class, 1 the best, and average: (methods, classes) to (methods,)."""
    return rankdata(-np.asarray(values), axis=0).mean(1)


def _wins(scores: Floats, anomalous: NDArray[np.int64], normal: NDArray[np.int64]) -> Floats:
    """Compute psi, (m, n)."""
    return 0.5 + 0.5 * np.sign(scores[anomalous][:, None] - scores[normal])


def _classes(
    ours: Floats, theirs: Floats, labels: NDArray[np.bool_], class_idx: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """List the anomalous and the normal images of every class that has both."""
    if not ours.shape == theirs.shape == (*ours.shape[:-1], *labels.shape) or labels.shape != class_idx.shape:
        raise InputError(
            f"expected two methods' scores of {len(labels)} images and the same seeds, "
            f"found {ours.shape} and {theirs.shape}; compare runs on the same test images"
        )
    kinds = [
        (np.flatnonzero(labels & (class_idx == k)), np.flatnonzero(~labels & (class_idx == k)))
        for k in np.unique(class_idx)
    ]
    found = [(anomalous, normal) for anomalous, normal in kinds if len(anomalous) and len(normal)]
    if not found:
        raise InputError(
            "expected a class with normal and anomalous images, found none; test with both kinds"
        )
    return found
