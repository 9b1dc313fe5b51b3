r"""Anomaly maps and image scores from log-likelihoods and entropies (paper Sec. 3.4).

A level's value v (log-likelihood per dimension, or negative entropy) becomes a normality
:math:`P = e^{v - v_{max}}`, at most 1; levels are upsampled and summed, and the published map is what is
missing to L levels of full normality:

.. math:: S = \sum_k (1 - P_k) - o = (L - o) - \sum_k P_k

Where :math:`v_{max}` and o come from is the normalisation, an explicit step:

* inductive (default): :math:`v_{max}` is the largest value of the class among the *training* features and
  o = 0, so a map depends on its own image alone;
* transductive (as published): both are taken over all test images of the class.

S saturates. Some 17 nats below the maximum 1 - P is 1 in float32: all that lies further off scores the same,
and the order among the clearly anomalous is gone. So maps and scores are an increasing function of S that has
no upper end, and is computed from the P where S is close to its own:

.. math:: t = -\log\left(-\log\frac{S}{L - o}\right)
          \;\to\; \log(L - o) - \log\sum_k P_k \quad\text{far from normal: nats, and } v \text{ itself}

It ranks pixels and images as exact arithmetic would rank S. :func:`published_maps` returns S.

Upsampling and blur are linear, so together they are one small matrix per level:
:math:`\sum_k U_k P_k U_k^\top`. :math:`1-P` is formed as -expm1, so that the smallest deviations keep their
digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

Criterion = Literal["likelihood", "entropy", "both"]

# Least share that is told from 0, which has no logarithm.
_LEAST = 1e-290


@dataclass(frozen=True)
class LevelValues:
    """What the flows say of B images: one entry a level, each (B, h, w) float32 in nats.

    Attributes:
        log_prob: Intra-class log-likelihoods (per dimension where so configured).
        neg_entropy: Negative inter-class entropies; empty where the prior has one centre for all.
    """

    log_prob: tuple[Tensor, ...]
    neg_entropy: tuple[Tensor, ...]

    def __getitem__(self, index: Tensor | slice) -> LevelValues:
        """Take some of the images."""
        return LevelValues(tuple(v[index] for v in self.log_prob), tuple(v[index] for v in self.neg_entropy))

    def __len__(self) -> int:
        """B."""
        return self.log_prob[0].shape[0]

    @staticmethod
    def cat(parts: Sequence[LevelValues]) -> LevelValues:
        """Join batches."""
        return LevelValues(
            tuple(torch.cat(v) for v in zip(*(p.log_prob for p in parts), strict=True)),
            tuple(torch.cat(v) for v in zip(*(p.neg_entropy for p in parts), strict=True)),
        )


@dataclass(frozen=True)
class Normalisation:
    """The constants that turn level values into maps.

    Attributes:
        log_prob_max: Largest log-likelihood per level, (L,) or per image (B, L).
        neg_entropy_max: Likewise, of the negative entropy.
        likelihood_offset: Taken off the likelihood map.
        entropy_offset: Taken off the entropy map.
    """

    log_prob_max: Tensor
    neg_entropy_max: Tensor
    likelihood_offset: float = 0.0
    entropy_offset: float = 0.0

    def __getitem__(self, index: Tensor | slice | int) -> Normalisation:
        """Take the constants of some of the images or classes."""
        return replace(
            self, log_prob_max=self.log_prob_max[index], neg_entropy_max=self.neg_entropy_max[index]
        )

    def to(self, device: torch.device | str) -> Normalisation:
        """Move the constants to a device."""
        return replace(
            self, log_prob_max=self.log_prob_max.to(device), neg_entropy_max=self.neg_entropy_max.to(device)
        )


@lru_cache(maxsize=64)
def upsampling_matrix(length: int, size: int, sigma: float) -> Tensor:
    """Build the matrix of bilinear upsampling (corners aligned) and then Gaussian blur along one axis.

    Args:
        length: Positions h along the axis.
        size: Pixels along the axis.
        sigma: Standard deviation of the blur in pixels (mirrored at the border, cut at 4 sigma); 0 for none.
    Returns:
        (size, length) float64; each row sums to 1.
    """
    matrix = F.interpolate(
        torch.eye(length, dtype=torch.float64)[None], size=size, mode="linear", align_corners=True
    )[0].T
    if sigma > 0:
        matrix = torch.from_numpy(gaussian_filter1d(matrix.numpy(), sigma, axis=0, mode="reflect"))
    return matrix.contiguous()


def missing_normality(values: Sequence[Tensor], maxima: Tensor, size: int, sigma: float) -> Tensor:
    r"""Sum what is missing to full normality over levels: :math:`\sum_k U_k(1-e^{v_k-v_{max,k}})U_k^\top`.

    Args:
        values: One (B, h, w) a level.
        maxima: (L,) or (B, L); values above them count as fully normal.
        size: Side of the map in pixels.
        sigma: Blur in pixels; 0 for none.
    Returns:
        (B, size, size), between 0 and L, in the values' type.
    """
    deficits = _deficits(values, maxima)
    return torch.stack([_upsample(-torch.expm1(x), size, sigma) for x in deficits]).sum(0)


def log_normality(values: Sequence[Tensor], maxima: Tensor, size: int, sigma: float) -> Tensor:
    r"""Compute :math:`\log\sum_k U_k e^{v_k-v_{max,k}} U_k^\top`, the log of summed normality, by logs alone.

    Args:
        values: One (B, h, w) a level.
        maxima: (L,) or (B, L); values above them count as fully normal.
        size: Side of the map in pixels.
        sigma: Blur in pixels; 0 for none.
    Returns:
        (B, size, size), finite however far a value lies below its maximum.
    """
    parts = []
    for x in _deficits(values, maxima):
        rows, columns = (upsampling_matrix(length, size, sigma).to(x).log() for length in x.shape[1:])
        along = torch.logsumexp(rows[:, :, None] + x[:, None], 2)
        parts.append(torch.logsumexp(along[:, :, None] + columns, 3))
    return torch.stack(parts).logsumexp(0)


def _deficits(values: Sequence[Tensor], maxima: Tensor) -> list[Tensor]:
    """Compute how far each level's values lie below their maximum: at most 0."""
    if not values:
        raise ValueError("expected the values of at least one level, found none")
    return [(v - maxima[..., k].view(-1, 1, 1).to(v)).clamp_max(0) for k, v in enumerate(values)]


def _upsample(x: Tensor, size: int, sigma: float) -> Tensor:
    rows, columns = (upsampling_matrix(length, size, sigma).to(x) for length in x.shape[-2:])
    return rows @ x @ columns.T


def level_maxima(values: Sequence[Tensor]) -> Tensor:
    """Largest value of each level over images and positions: L of (B, h, w) to (L,)."""
    return torch.stack([v.amax() for v in values]) if values else torch.zeros(0)


def inductive(values: LevelValues) -> Normalisation:
    """Take the constants from a class's training images."""
    return Normalisation(level_maxima(values.log_prob), level_maxima(values.neg_entropy))


def transductive(values: LevelValues, size: int) -> Normalisation:
    """Take the constants from all test images of one class, as published.

    The offset is such that the most normal pixel of the set scores 0 before the blur.
    """

    def offset(levels: Sequence[Tensor], maxima: Tensor) -> float:
        if not levels:
            return 0.0
        # An image at a time: the set's maps need not exist at once.
        least = [
            missing_normality([v[i : i + 1] for v in levels], maxima, size, 0.0).amin()
            for i in range(len(values))
        ]
        return float(torch.stack(least).amin())

    log_prob_max, neg_entropy_max = level_maxima(values.log_prob), level_maxima(values.neg_entropy)
    return Normalisation(
        log_prob_max,
        neg_entropy_max,
        offset(values.log_prob, log_prob_max),
        offset(values.neg_entropy, neg_entropy_max),
    )


def published_maps(
    values: LevelValues, constants: Normalisation, *, size: int, sigma: float, criterion: Criterion = "both"
) -> Tensor:
    r"""Compute the published map :math:`S = S_l \odot S_e`, or one of the two; it saturates.

    Args:
        values: Level values of B images.
        constants: Of the images' class, or per image.
        size: Side of the maps in pixels.
        sigma: Gaussian blur in pixels of the map.
        criterion: "likelihood" for S_l, "entropy" for S_e, "both" for their product. A prior without
            classes has no entropy: then it is S_l throughout.
    Returns:
        (B, size, size), at most :math:`L - o`, or its square; higher is more anomalous.
    Source: paper Sec. 3.4.
    """
    parts = [
        missing_normality(levels, maxima, size, sigma) - offset
        for levels, maxima, offset in _criteria(values, constants, criterion)
    ]
    return torch.stack(parts).prod(0)


def anomaly_maps(
    values: LevelValues, constants: Normalisation, *, size: int, sigma: float, criterion: Criterion = "both"
) -> Tensor:
    r"""Compute anomaly maps that rank as the published ones and never saturate.

    .. math:: t = -\log\Big(-\log\frac{S_l}{L - o_l} - \log\frac{S_e}{L - o_e}\Big)

    or with one of the two logs alone.

    Args:
        values: Level values of B images.
        constants: Of the images' class, or per image.
        size: Side of the maps in pixels.
        sigma: Gaussian blur of S in pixels of the map.
        criterion: As of :func:`published_maps`.
    Returns:
        (B, size, size), in the values' type: from about -7 for what lacks nothing, upwards without an end,
        there in nats (per dimension where the values are); higher is more anomalous.
    Source: paper Sec. 3.4, in the log domain.
    """
    criteria = _criteria(values, constants, criterion)
    total = torch.stack([_log_share(*one, size, sigma) for one in criteria]).sum(0)
    maps = -(-total).log()
    # Some 700 nats down, beyond what float64 holds as a number, the logs themselves are added.
    lost = total > -_LEAST
    if (images := lost.flatten(1).any(1)).any():
        own = constants[images] if constants.log_prob_max.ndim == 2 else constants
        logs = [
            log_normality([v.double() for v in levels], maxima, size, sigma) - math.log(len(levels) - offset)
            for levels, maxima, offset in _criteria(values[images], own, criterion)
        ]
        maps[images] = torch.where(lost[images], -torch.stack(logs).logsumexp(0), maps[images])
    return maps.to(values.log_prob[0].dtype)


def _log_share(levels: Sequence[Tensor], maxima: Tensor, offset: float, size: int, sigma: float) -> Tensor:
    """Compute log(S / (L - o)) in float64, near 0 from the normality and elsewhere from what is missing."""
    levels, top = [v.double() for v in levels], len(levels) - offset
    present = torch.stack([_upsample(x.exp(), size, sigma) for x in _deficits(levels, maxima)]).sum(0) / top
    missing = (missing_normality(levels, maxima, size, sigma) - offset) / top
    return torch.where(present < 0.5, torch.log1p(-present), missing.clamp(_LEAST, 1).log())


def _criteria(
    values: LevelValues, constants: Normalisation, criterion: Criterion
) -> list[tuple[tuple[Tensor, ...], Tensor, float]]:
    """List values, maxima and offset of each map that the criterion asks for."""
    likelihood = (values.log_prob, constants.log_prob_max, constants.likelihood_offset)
    entropy = (values.neg_entropy, constants.neg_entropy_max, constants.entropy_offset)
    if criterion == "likelihood" or not values.neg_entropy:
        return [likelihood]
    return [entropy] if criterion == "entropy" else [likelihood, entropy]


def image_scores(maps: Tensor) -> Tensor:
    """Score images by the maximum of their maps: (B, H, W) to (B,)."""
    return maps.flatten(1).amax(-1)
