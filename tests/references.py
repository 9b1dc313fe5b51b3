"""Metrics written a second way: scikit-learn's, and a slow AUPRO from its definition."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score


def regions_of(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Flood fill over eight neighbours, one pixel at a time."""
    left = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    regions = []
    while left:
        queue, region = deque([left.pop()]), []
        while queue:
            i, j = queue.popleft()
            region.append((i, j))
            for neighbour in [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    queue.append(neighbour)
        regions.append(region)
    return regions


def slow_aupro(maps: NDArray, masks: NDArray[np.bool_], limit: float) -> float:
    """Every distinct score is a threshold; the area is summed trapezium by trapezium up to the limit."""
    regions = [(n, region) for n, mask in enumerate(masks) for region in regions_of(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for v in maps.ravel()}, reverse=True):
        above = maps >= threshold
        fpr = above[~masks].mean()
        pro = np.mean([np.mean([above[n, i, j] for i, j in region]) for n, region in regions])
        points.append((float(fpr), float(pro)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def sklearn_metrics(scores: NDArray, labels: NDArray[np.bool_]) -> tuple[float, float, float]:
    """AUROC, AP and F1-max."""
    scores = scores.astype(np.float64)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), float(f1.max())


def pixel_references(maps: NDArray, masks: NDArray[np.bool_], limit: float = 0.3) -> tuple[float, ...]:
    """AUROC, AP, F1-max and AUPRO over all pixels, in the order of PIXEL_METRICS."""
    return *sklearn_metrics(maps.ravel(), masks.ravel()), slow_aupro(maps, masks, limit)
