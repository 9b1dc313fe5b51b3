r"""Are today's images still like the normal ones? A two-sample test of scores and of features.

Between two samples X (n) and Y (m) of a class stands the energy distance, zero for one distribution,

.. math:: T = \frac{nm}{n+m}\bigl(2\,E|X-Y| - E|X-X'| - E|Y-Y'|\bigr),

summed over the classes. It is computed twice: of the scores' ranks, where it is the Cramér-von Mises
statistic, and of the features' means over positions, each channel by its deviation. Were the images of a
class exchangeable, all ways to part them in n and m would be as likely; so with B random ones, within each
class,

.. math:: p = \frac{1 + \#\{b: T_b \ge T\}}{B + 1}

is at most alpha on at most a share alpha of the days, whatever the distributions. Of the two p-values the
smaller counts, doubled (Bonferroni).

Today's images must be new: those that were trained on score less, and differ. The test knows no defects. It
asks for *any* difference, so a few anomalous images pass, and a day of many is a drift too. Where classes are
inferred and not given, the promise holds as far as they are inferred rightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from hgadlib.errors import InputError

_PERMUTATIONS = 1999
# Images of a class and a side that are compared; the time goes with the square of their number.
_MOST = 500


@dataclass(frozen=True)
class Sample:
    """Images of one class: scores, (n,), and features averaged over positions, (n, C), rows in any order."""

    scores: NDArray[np.floating]
    features: NDArray[np.floating]


@dataclass(frozen=True)
class Drift:
    """What the test found.

    Attributes:
        p_value: Of both tests together.
        p_scores: Of the scores alone.
        p_features: Of the features alone.
        level: A drift is called where the p-value is below.
        images: Images of today that were compared, by class.
        normals: Normal images that they were compared with, by class.
        left_out: Images of classes of which no normal image was kept aside.
    """

    p_value: float
    p_scores: float
    p_features: float
    level: float
    images: dict[str, int]
    normals: dict[str, int]
    left_out: int

    @property
    def drifted(self) -> bool:
        """Whether the p-value is below the level."""
        return self.p_value < self.level

    def __str__(self) -> str:
        """Say it in a few lines."""
        counts = ", ".join(f"{name} {n} with {self.normals[name]}" for name, n in self.images.items())
        lines = [
            f"{'drift' if self.drifted else 'no drift found'}: p = {self.p_value:.4f} (level {self.level:g})",
            f"  scores    p = {self.p_scores:.4f}",
            f"  features  p = {self.p_features:.4f}",
            f"  images of today, with normal ones: {counts}",
        ]
        if self.left_out:
            lines.append(f"  left out, no normal image of their class was kept aside: {self.left_out}")
        return "\n".join(lines)


def find_drift(
    normals: Mapping[str, Sample], today: Mapping[str, Sample], *,
    level: float = 0.01, seed: int = 0,
) -> Drift:  # fmt: skip
    """Test whether today's images are exchangeable with normal ones, class by class.

    Args:
        normals: By class, images that took no part in making the scores.
        today: By class; those of classes that have no normals are left out, and counted.
        level: A drift is called below it, in (0, 1).
        seed: Of the permutations, and of what is drawn where there are very many images.
    Raises:
        InputError: There are too few images for the level, or a number is not finite.
    """
    if not 0 < level < 1:
        raise InputError(f"expected a level between 0 and 1, found {level}; 0.01, say")
    rng, permutations = np.random.default_rng(seed), max(_PERMUTATIONS, math.ceil(20 / level))
    shared = [name for name in today if name in normals and len(today[name].scores)]
    pairs = [(_drawn(today[name], rng), _drawn(normals[name], rng)) for name in shared]
    # Logarithm of the number of ways to part all images; no p-value is below its inverse.
    ways = sum(
        math.lgamma(len(x.scores) + len(y.scores) + 1)
        - math.lgamma(len(x.scores) + 1)
        - math.lgamma(len(y.scores) + 1)
        for x, y in pairs
    )
    least = 2 * math.exp(-ways)
    if least >= level:
        count, of = sum(len(x.scores) for x, _ in pairs), sum(len(y.scores) for _, y in pairs)
        raise InputError(
            f"{count} images beside {of} normal ones of their classes give no p-value below {least:.2g}, "
            f"expected one below the level {level:g} to be possible; give more images"
        )

    def p_value(distances: Callable[[Sample, Sample], NDArray[np.float64]]) -> float:
        matrices = [distances(x, y) for x, y in pairs]
        observed, permuted = 0.0, np.zeros(permutations)
        for (x, _), matrix in zip(pairs, matrices, strict=True):
            n, total = len(x.scores), len(matrix)
            members = np.zeros((permutations + 1, total))
            members[:, :n] = 1
            members[1:] = rng.permuted(members[1:], axis=1)
            values = _energy(matrix, members)
            observed, permuted = observed + values[0], permuted + values[1:]
        # Sums of the same numbers in another order differ in the last digits; they are ties.
        return float((1 + np.count_nonzero(permuted >= observed - 1e-9 * abs(observed))) / (permutations + 1))

    scores, features = p_value(_of_ranks), p_value(_of_features)
    return Drift(
        min(1.0, 2 * min(scores, features)), scores, features, level,
        {name: len(x.scores) for name, (x, _) in zip(shared, pairs, strict=True)},
        {name: len(y.scores) for name, (_, y) in zip(shared, pairs, strict=True)},
        sum(len(sample.scores) for name, sample in today.items() if name not in normals),
    )  # fmt: skip


def _drawn(sample: Sample, rng: np.random.Generator) -> Sample:
    if not all(np.isfinite(values).all() for values in (sample.scores, sample.features)):
        raise InputError("expected finite scores and features, found NaN or infinity; look for NaN weights")
    scores, features = (
        values[np.sort(rng.choice(len(values), min(_MOST, len(values)), replace=False))]
        for values in (np.asarray(sample.scores), np.asarray(sample.features, dtype=np.float64))
    )
    return Sample(scores, features)


def _of_ranks(x: Sample, y: Sample) -> NDArray[np.float64]:
    ranks = rankdata(np.concatenate([x.scores, y.scores]))[:, None]
    return cdist(ranks, ranks) / len(ranks)


def _of_features(x: Sample, y: Sample) -> NDArray[np.float64]:
    both = np.concatenate([x.features, y.features])
    # Of both together: what is the same for every way to part them leaves the p-value exact.
    scaled = both / np.maximum(both.std(axis=0), 1e-6 * np.abs(both).max(initial=1e-12))
    return cdist(scaled, scaled) / math.sqrt(scaled.shape[1])


def _energy(distances: NDArray[np.float64], members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute T of each way to part N images, (B, N) of ones and zeros, by their distances, (N, N)."""
    others = 1 - members
    n, m = members.sum(1), others.sum(1)
    to_members = members @ distances
    within, between = (to_members * members).sum(1), (to_members * others).sum(1)
    rest = distances.sum() - within - 2 * between
    return n * m / (n + m) * (2 * between / (n * m) - within / n**2 - rest / m**2)
