"""Pixel metrics against scikit-learn plus an AUPRO that labels the masks anew at each threshold.

Run it as ``python benchmarks/metrics.py``; it prints JSON lines. The maps are float16, and the peer is given
the same values as float32, so both must come to the same AUROC, AP and F1-max, which is checked before a
ratio is printed. The peer's AUPRO uses 200 evenly spaced thresholds, as is customary; ours uses every score.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from harness import emit, environment, interleave, peak_memory, speedup
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from hgadlib.evaluation.metrics import PixelMetrics

NAME = "metrics"
THRESHOLDS = 200
FPR_LIMIT = 0.3
BATCH = 8


def make_maps(n: int, size: int) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Smooth random maps; every second one has a mask of two discs with raised scores, blurred."""
    rng = np.random.default_rng(0)
    maps = np.empty((n, size, size), np.float16)
    masks = np.zeros(maps.shape, bool)
    y, x = np.mgrid[:size, :size]
    for i in range(n):
        for _ in range(2 * (i % 2)):
            (cy, cx), radius = rng.integers(0, size, 2), rng.uniform(0.02, 0.1) * size
            masks[i] |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        noise = gaussian_filter(rng.normal(size=(size, size)), 4) * 15
        maps[i] = np.exp(0.5 * noise + 2 * gaussian_filter(masks[i].astype(float), 4))
    return maps, masks


def streamed(maps: NDArray[np.float16], masks: NDArray[np.bool_]) -> dict[str, float | None]:
    """Ours, in batches of float16 maps."""
    metrics = PixelMetrics(FPR_LIMIT)
    for start in range(0, len(maps), BATCH):
        metrics.update(maps[start : start + BATCH], masks[start : start + BATCH])
    return metrics.compute()


def scikit_learn(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The peer's AUROC, AP and F1-max over all pixels."""
    scores, labels = maps.ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), float(f1.max())


def label_per_threshold(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> float:
    """The peer's AUPRO: at each threshold each mask is labelled and each region's overlap counted."""
    fprs, pros = [], []
    for threshold in np.linspace(maps.max(), maps.min(), THRESHOLDS):
        above = maps >= threshold
        overlaps = [
            above_map[tuple(region.coords.T)].mean()
            for above_map, mask in zip(above, masks, strict=True)
            for region in regionprops(label(mask))
        ]
        fprs.append((above & ~masks).sum() / (~masks).sum())
        pros.append(np.mean(overlaps))
    fpr, pro = np.array(fprs), np.array(pros)
    grid = np.append(fpr[fpr < FPR_LIMIT], FPR_LIMIT)
    values = np.interp(grid, fpr, pro)
    return float(np.diff(grid) @ (values[1:] + values[:-1]) / 2 / FPR_LIMIT)


def prepare(task: Callable[..., object], n: int, size: int, dtype: str) -> Callable[[], object]:
    """Make the inputs of a memory measurement and warm up the imports with a small call."""
    small_maps, small_masks = make_maps(4, 32)
    task(small_maps.astype(dtype), small_masks)
    maps, masks = make_maps(n, size)
    maps = maps.astype(dtype)
    return lambda: task(maps, masks)


def main() -> None:
    """Time, then measure memory, then print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", type=int, default=200)
    parser.add_argument("--size", type=int, default=256, help="height and width of a map in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    emit(NAME, "environment", **environment(), maps=args.maps, size=args.size, repeats=args.repeats)

    half, masks = make_maps(args.maps, args.size)
    single = half.astype(np.float32)
    ours, peer = streamed(half, masks), scikit_learn(single, masks)
    found = np.array(list(ours.values()), dtype=float)
    if not np.allclose(found[:3], np.array(peer), rtol=0, atol=1e-9):
        raise SystemExit(f"expected scikit-learn's AUROC, AP and F1-max {peer}, found {ours}")
    emit(NAME, "values", ours=ours, peer_aupro=label_per_threshold(single, masks))

    times = interleave(
        {
            "ours_float16_streamed": lambda: streamed(half, masks),
            "scikit_learn": lambda: scikit_learn(single, masks),
            "label_per_threshold": lambda: label_per_threshold(single, masks),
        },
        repeats=args.repeats,
        warmup=0,  # the comparison of values above was the first call of each
    )
    for name, timing in times.items():
        emit(NAME, "seconds", task=name, **timing.summary())
    peers = times["scikit_learn"], times["label_per_threshold"]
    name = "ours_float16_streamed"
    emit(
        NAME, "speedup", task=name, over="scikit_learn + label_per_threshold", **speedup(times[name], *peers)
    )
    emit(NAME, "speedup", task=name, over="scikit_learn alone", **speedup(times[name], peers[0]))

    tasks: dict[str, tuple[Callable[..., object], str]] = {
        "ours_float16_streamed": (streamed, "float16"),
        "scikit_learn": (scikit_learn, "float32"),
        "label_per_threshold": (label_per_threshold, "float32"),
    }
    memory = {name: peak_memory(prepare, task, args.maps, args.size, d) for name, (task, d) in tasks.items()}
    for measured, peak in memory.items():
        emit(NAME, "memory", task=measured, **peak.summary())
    largest = max(memory["scikit_learn"].added, memory["label_per_threshold"].added)
    emit(NAME, "memory_share", task=name, of="the peer's added peak", share=memory[name].added / largest)


if __name__ == "__main__":
    main()
