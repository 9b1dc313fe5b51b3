"""Discover classes where images come without class folders, and assign new images to the nearest class.

Both work on one global feature per image, such as the spatial means of a stage. Source: paper App. A.2.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_argmin, silhouette_score

from hgadlib.errors import InputError

MAX_CLASSES = 60
"""Largest count that is tried where none is given; the paper's Union has 40 classes."""


def discover_classes(features: ArrayLike, n_classes: int | None = None, seed: int = 0) -> NDArray[np.int64]:
    """Cluster images into classes 0..n_classes-1, (N,), by k-means on their leading principal components.

    Features are scaled to length 1 first, so that distances compare directions and not contrast. Where the
    count is not given, the one with the largest mean silhouette of 2..MAX_CLASSES is taken; that all images
    are one class cannot be seen so: say n_classes=1 where it is. Classes are numbered by first appearance.

    Args:
        features: Global features, (N, C).
        n_classes: How many classes there are; None to find out.
        seed: Of k-means' starts.
    Raises:
        InputError: Fewer images than classes, or features that are no finite matrix.
    """
    x = _finite_matrix(features)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)  # zero rows stay zero
    count = len(x)
    if n_classes is not None and not 1 <= n_classes <= count:
        raise InputError(f"expected 1..{count} classes for {count} images, found n_classes={n_classes}")
    one_class = np.zeros(count, dtype=np.int64)
    if n_classes == 1 or (n_classes is None and count < 3):
        return one_class
    if count < 3:
        return np.arange(count, dtype=np.int64)
    distinct = len(np.unique(x.round(9), axis=0))
    if distinct < (n_classes or 2):
        if n_classes is None:
            return one_class
        raise InputError(f"expected {n_classes} classes, found only {distinct} images that differ")
    # Clusters of K classes lie in K - 1 dimensions; the rest is noise that only blurs distances.
    x = PCA(min(64, *x.shape), random_state=seed).fit_transform(x)
    if n_classes is not None:
        return _cluster(x, n_classes, seed)
    found = [_cluster(x, k, seed) for k in range(2, min(MAX_CLASSES, count - 1, distinct) + 1)]
    return max(found, key=lambda c: silhouette_score(x, c, sample_size=min(count, 3000), random_state=seed))


def assign_nearest(
    features: ArrayLike, reference_features: ArrayLike, reference_labels: ArrayLike
) -> NDArray[np.int64]:
    """Find the class of the nearest reference image, (N,), by the angle between features.

    Features are (N, C), those of the references (R, C), a few per class, and their class ids (R,); an
    InputError where shapes do not fit, or there is no reference.
    """
    x, reference = _finite_matrix(features), _finite_matrix(reference_features)
    labels = np.asarray(reference_labels, dtype=np.int64)
    if len(reference) == 0 or labels.shape != (len(reference),) or x.shape[1] != reference.shape[1]:
        expected = f"expected references (R, {x.shape[1]}) and R labels with R > 0"
        raise InputError(f"{expected}, found {reference.shape} and {labels.shape}")
    return labels[pairwise_distances_argmin(x, reference, metric="cosine")]


def _finite_matrix(features: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(f"expected features (N, C), found shape {x.shape}")
    if not np.isfinite(x).all():
        raise InputError("expected finite features, found NaN or infinity")
    return x


def _cluster(x: NDArray[np.float64], k: int, seed: int) -> NDArray[np.int64]:
    return pd.factorize(KMeans(k, n_init=10, random_state=seed).fit_predict(x))[0].astype(np.int64)
