"""Normal against anomalous log-likelihoods: histograms of positions, and how much two of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hgadlib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_BINS = 120

Histograms = dict[str, tuple[np.ndarray, np.ndarray]]
"""(edges, counts) by class name."""


def anomalous_positions(
    class_idx: np.ndarray, labels: np.ndarray, masks: Mapping[int, np.ndarray], grid: Sequence[int]
) -> Tensor:
    """Mark the anomalous positions, (N, H, W): where a mask touches the cell; without masks, the whole image.

    Args:
        class_idx: (N,).
        labels: True where an image is known to be anomalous, (N,) bool.
        masks: By class index, those of the class's images in their order, (n_k, S, S) bool.
        grid: (H, W) of the level.
    """
    # Torch takes seconds to import, and the ledger has histograms alone.
    import torch
    import torch.nn.functional as F

    touched = torch.from_numpy(labels)[:, None, None].expand(-1, *grid).clone()
    for k, own in masks.items():
        pooled = F.adaptive_max_pool2d(torch.from_numpy(own)[:, None].float(), (grid[0], grid[1]))
        touched[torch.from_numpy(class_idx == k)] &= pooled[:, 0].bool()
    return touched


class Likelihoods(NamedTuple):
    """The positions' log-likelihoods, normal against anomalous.

    Attributes:
        edges: Of the histograms' bins, (L, bins + 1).
        counts: Normal and anomalous positions, (K, L, 2, bins).
        columns: Means over levels and those classes that have both kinds, for a row of history.csv:
            ``test_overlap``, the share that the two histograms have in common, and ``test_log_prob_normal``
            and ``test_log_prob_anomalous`` as the scores have them (nats, or nats per dimension). Empty where
            no class has both.
    """

    edges: np.ndarray
    counts: np.ndarray
    columns: dict[str, float]


def compare_likelihoods(
    log_prob: Sequence[Tensor], class_idx: np.ndarray, labels: np.ndarray, masks: Mapping[int, np.ndarray], *,
    labelled: np.ndarray, n_classes: int,
) -> Likelihoods:  # fmt: skip
    """Compare normal with anomalous positions of a test set, as in Fig. 2 of the paper.

    Args:
        log_prob: One (N, H, W) a level.
        class_idx: (N,).
        labels: True where an image is anomalous, (N,) bool.
        masks: As :func:`anomalous_positions` takes them.
        labelled: False where nobody said, (N,) bool; no position of such an image counts.
        n_classes: K.
    """
    edges = np.zeros((len(log_prob), _BINS + 1))
    counts = np.zeros((n_classes, len(log_prob), 2, _BINS), np.int64)
    found: list[tuple[float, ...]] = []
    for level, values in enumerate(log_prob):
        # Few positions fall far below the rest; they go into the first bin.
        low = float(np.quantile(values.numpy(), 0.001).astype(np.float32))
        edges[level] = np.linspace(low, max(float(values.max()), low + 1e-6), _BINS + 1)
        touched = anomalous_positions(class_idx, labels & labelled, masks, values.shape[1:])
        for k in range(n_classes):
            members = np.flatnonzero((class_idx == k) & labelled)
            own, where = values[members], touched[members]
            groups = own[~where], own[where]
            counts[k, level] = [np.histogram(g.clamp_min(low).numpy(), edges[level])[0] for g in groups]
            if (overlap := histogram_overlap(*counts[k, level])) is not None:
                found.append((overlap, *(float(g.double().mean()) for g in groups)))
    names = ("test_overlap", "test_log_prob_normal", "test_log_prob_anomalous")
    columns = {name: float(np.mean(of)) for name, of in zip(names, zip(*found, strict=True), strict=False)}
    return Likelihoods(edges, counts, columns)


def histogram_overlap(a: ArrayLike, b: ArrayLike) -> float | None:
    r"""Area that two histograms, counts (K,) over the same bins, have in common, each scaled to area 1.

    .. math:: \sum_i \min\Bigl(\frac{a_i}{\sum a}, \frac{b_i}{\sum b}\Bigr)

    Returns:
        0 (apart) to 1 (the same), or None where a histogram is empty.
    Raises:
        InputError: Shapes differ, or a count is negative or not finite.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"expected counts (K,) over the same bins, found {a.shape} and {b.shape}")
    if not np.isfinite([a, b]).all() or np.min([a, b], initial=0) < 0:
        raise InputError("expected counts of 0 or more, found a negative or non-finite one")
    return float(np.minimum(a / a.sum(), b / b.sum()).sum()) if a.sum() and b.sum() else None


def class_overlaps(scores: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Compute the overlap of each class on every level from the arrays of a run's scores.npz."""
    by_class = zip(scores["classes"], scores["log_likelihood_counts"], strict=True)
    return {str(name): [histogram_overlap(*level) for level in counts] for name, counts in by_class}


def stored_histograms(scores: Mapping[str, np.ndarray], level: int = -1) -> tuple[Histograms, Histograms]:
    """Take one level's histograms, of normal and of anomalous positions, from the arrays of scores.npz."""
    edges, counts = scores["log_likelihood_edges"][level], scores["log_likelihood_counts"][:, level]
    names = [str(name) for name in scores["classes"]]
    normal, anomalous = ({n: (edges, counts[k, s]) for k, n in enumerate(names)} for s in (0, 1))
    return normal, anomalous
