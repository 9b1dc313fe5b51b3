r"""Anomaly maps and image scores from log-likelihoods and entropies (paper Sec. 3.4).

A level's value v (log-likelihood per dimension, or negative entropy) becomes a normality
:math:`P = e^{v - v_{max}}`, at most 1; levels are upsampled and summed, and the published map is what is
missing to L levels of full normality:

.. math:: S = \sum_k (1 - P_k) - o = (L - o) - \sum_k P_k

Where :math:`v_{max}` and o come from is the normalisation, an explicit step:

* inductive (default): :math:`v_{max}` is the largest value of the class among the *training* features and
  o = 0, so a map depends on its own image alone;
* transductive (as published): both are taken over all test images of the class.

A third, calibrated, takes no exponential and weighs levels and classes alike: see :class:`Calibration`.

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

ImageScore = Literal["maximum", "top", "quantile"]

# Least share that is told from 0, which has no logarithm.
_LEAST = 1e-290
# Images that a class's figures over all positions count for beside a position's own. benchmarks/choice.py
# chose it, on drawn defects, where half of the training images were held out to calibrate on.
_KAPPA = 5
# Least deviation of a calibrated value, in nats; of entropies also as a share of the largest, log K.
_LEAST_STD, _LEAST_ENTROPY_STD = 1e-3, 0.02


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

    def levels(self, kept: Sequence[int]) -> LevelValues:
        """Take some of the levels."""
        log_prob, neg_entropy = (
            tuple(of[level] for level in kept) if of else () for of in (self.log_prob, self.neg_entropy)
        )
        return LevelValues(log_prob, neg_entropy)

    def to(self, device: torch.device | str) -> LevelValues:
        """Move the values to a device."""
        return LevelValues(
            tuple(v.to(device) for v in self.log_prob), tuple(v.to(device) for v in self.neg_entropy)
        )

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


@dataclass(frozen=True)
class Calibration:
    r"""What normal features' values are like, by class, level and position.

    .. math:: S = \frac1L\sum_k U_k u_k U_k^\top,\qquad u_k = \frac{m_k - v_k}{s_k}

    A map is the mean of standardised surprises u: 0 for what is as likely as normal features are on average,
    1 for a deviation less. So no level, class or position outweighs another for its scale alone, and nothing
    saturates: far from normal S grows as -v does. For both criteria it is the mean of the two maps.

    Attributes:
        mean: m, one (h, w) or, per image, (B, h, w) a level.
        std: s, likewise; see :func:`normal_statistics`.
    """

    mean: LevelValues
    std: LevelValues

    def to(self, device: torch.device | str) -> Calibration:
        """Move the constants to a device."""
        return Calibration(self.mean.to(device), self.std.to(device))


Constants = Normalisation | Calibration


def raw(levels: int, *, entropy: bool = False) -> Calibration:
    """Take values as they are: their map is the mean of -v over the levels."""
    zero, one = ((x,) * levels for x in (torch.zeros(1, 1), torch.ones(1, 1)))
    return Calibration(LevelValues(zero, zero if entropy else ()), LevelValues(one, one if entropy else ()))


def finest_levels(values: LevelValues, calibration: Calibration) -> tuple[LevelValues, Calibration]:
    """Keep the levels of the finest grid: they show where a defect is, the others whether there is one."""
    positions = [v.shape[-2] * v.shape[-1] for v in values.log_prob]
    kept = [level for level, count in enumerate(positions) if count == max(positions)]
    return values.levels(kept), Calibration(calibration.mean.levels(kept), calibration.std.levels(kept))


def normal_statistics(
    count: Tensor, total: Tensor, squares: Tensor, kappa: float = _KAPPA
) -> tuple[Tensor, Tensor]:
    r"""Estimate normal values' mean and deviation by position, shrunk towards all of the class's positions.

    .. math:: m_p = \frac{n\,\bar v_p + \kappa\,\bar v}{n + \kappa},\qquad
              s_p^2 = \frac{n\,\sigma_p^2 + \kappa\,\sigma^2}{n + \kappa}

    Where all normal features agree, s would be 0 and any change infinite: it is at least 0.001 nats, and for
    entropies 2 % of the largest there is, so none is more than 50 deviations off.

    Args:
        count: Images n of each class, (K,).
        total: Sum of the values over the images, (K, 1 or 2, h, w) float64: log-likelihood and, where there
            is one, negative entropy.
        squares: Sum of their squares, likewise.
        kappa: Images that the class's figures over all positions count for beside a position's own.
    Returns:
        Means and deviations, (K, 1 or 2, h, w) float64 each.
    """
    n = count.view(-1, 1, 1, 1)
    mean, square = total / n, squares / n
    mean_all, square_all = (x.mean((2, 3), keepdim=True) for x in (mean, square))
    variance, variance_all = square - mean.square(), square_all - mean_all.square()
    shrunk = (n * variance + kappa * variance_all) / (n + kappa)
    floors = [_LEAST_STD, max(_LEAST_STD, _LEAST_ENTROPY_STD * math.log(len(count)))]
    least = torch.tensor(floors[: mean.shape[1]]).to(mean)[:, None, None]
    # Rounding may leave less than nothing of a variance.
    return (n * mean + kappa * mean_all) / (n + kappa), torch.maximum(shrunk.clamp_min(0).sqrt(), least)


@lru_cache(maxsize=64)
def upsampling_matrix(length: int, size: int, sigma: float | None) -> Tensor:
    """Build the matrix of bilinear upsampling (corners aligned) and then Gaussian blur along one axis.

    Args:
        length: Positions h along the axis.
        size: Pixels along the axis.
        sigma: Standard deviation of the blur in pixels (mirrored at the border, cut at 4 sigma); 0 for none,
            None for half of the positions' stride, size / length.
    Returns:
        (size, length) float64; each row sums to 1.
    """
    matrix = F.interpolate(
        torch.eye(length, dtype=torch.float64)[None], size=size, mode="linear", align_corners=True
    )[0].T
    sigma = 0.5 * size / length if sigma is None else sigma
    if sigma > 0:
        matrix = torch.from_numpy(gaussian_filter1d(matrix.numpy(), sigma, axis=0, mode="reflect"))
    return matrix.contiguous()


def missing_normality(values: Sequence[Tensor], maxima: Tensor, size: int, sigma: float | None) -> Tensor:
    r"""Sum what is missing to full normality over levels: :math:`\sum_k U_k(1-e^{v_k-v_{max,k}})U_k^\top`.

    Args:
        values: One (B, h, w) a level.
        maxima: (L,) or (B, L); values above them count as fully normal.
        size: Side of the map in pixels.
        sigma: Blur in pixels, as of :func:`upsampling_matrix`.
    Returns:
        (B, size, size), between 0 and L, in the values' type.
    """
    deficits = _deficits(values, maxima)
    return torch.stack([_upsample(-torch.expm1(x), size, sigma) for x in deficits]).sum(0)


def log_normality(values: Sequence[Tensor], maxima: Tensor, size: int, sigma: float | None) -> Tensor:
    r"""Compute :math:`\log\sum_k U_k e^{v_k-v_{max,k}} U_k^\top`, the log of summed normality, by logs alone.

    Args:
        values: One (B, h, w) a level.
        maxima: (L,) or (B, L); values above them count as fully normal.
        size: Side of the map in pixels.
        sigma: Blur in pixels, as of :func:`upsampling_matrix`.
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


def _upsample(x: Tensor, size: int, sigma: float | None) -> Tensor:
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
    values: LevelValues,
    constants: Normalisation,
    *,
    size: int,
    sigma: float | None,
    criterion: Criterion = "both",
) -> Tensor:
    r"""Compute the published map :math:`S = S_l \odot S_e`, or one of the two; it saturates.

    Args:
        values: Level values of B images.
        constants: Of the images' class, or per image.
        size: Side of the maps in pixels.
        sigma: Gaussian blur in pixels of the map, as of :func:`upsampling_matrix`.
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
    values: LevelValues,
    constants: Constants,
    *,
    size: int,
    sigma: float | None,
    criterion: Criterion = "both",
) -> Tensor:
    r"""Compute anomaly maps: standardised surprises, or what ranks as the published maps; none saturates.

    Under a :class:`Calibration` they are its S, in deviations. Under a :class:`Normalisation` they are

    .. math:: t = -\log\Big(-\log\frac{S_l}{L - o_l} - \log\frac{S_e}{L - o_e}\Big)

    or with one of the two logs alone.

    Args:
        values: Level values of B images.
        constants: Of the images' class, or per image; their kind decides.
        size: Side of the maps in pixels.
        sigma: Gaussian blur of S in pixels of the map, as of :func:`upsampling_matrix`.
        criterion: As of :func:`published_maps`.
    Returns:
        (B, size, size), in the values' type; higher is more anomalous. Of a Normalisation from about -7 for
        what lacks nothing, upwards without an end, there in nats (per dimension where the values are).
    Source: paper Sec. 3.4, in the log domain.
    """
    if isinstance(constants, Calibration):
        ways = zip(*(_chosen(of, criterion) for of in (values, constants.mean, constants.std)), strict=True)
        surprises = [_upsample((m.double() - v) / s, size, sigma) for v, m, s in ways]
        return torch.stack(surprises).mean(0).to(values.log_prob[0].dtype)
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


def _chosen(values: LevelValues, criterion: Criterion) -> tuple[Tensor, ...]:
    """List the values that a criterion asks for, level by level."""
    if criterion == "likelihood" or not values.neg_entropy:
        return values.log_prob
    return values.neg_entropy if criterion == "entropy" else values.log_prob + values.neg_entropy


def _log_share(
    levels: Sequence[Tensor], maxima: Tensor, offset: float, size: int, sigma: float | None
) -> Tensor:
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


def image_scores(maps: Tensor, how: ImageScore = "maximum", share: float = 0.01) -> Tensor:
    """Score images by their maps, (B, H, W) to (B,).

    Args:
        maps: Anomaly maps.
        how: "maximum"; "top", the mean of the share of highest pixels (of one at least); or "quantile", the
            value that this share of the pixels exceeds.
        share: In (0, 1].

    Example:
        >>> maps = torch.arange(10.0).view(1, 2, 5)
        >>> [image_scores(maps, how, 0.2).item() for how in ("maximum", "top", "quantile")]
        [9.0, 8.5, 7.0]
    """
    pixels = maps.flatten(1)
    if how == "maximum":
        return pixels.amax(-1)
    count, n = round(share * pixels.shape[1]), pixels.shape[1]
    if how == "top":
        return pixels.topk(max(count, 1)).values.mean(-1)
    return pixels.topk(min(count + 1, n)).values[:, -1]
