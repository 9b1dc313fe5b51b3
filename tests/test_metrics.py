"""Metrics against hand-derived values, scikit-learn, and a slow AUPRO written from its definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from references import pixel_references, sklearn_metrics

from hgadlib.errors import InputError
from hgadlib.evaluation.likelihoods import histogram_overlap
from hgadlib.evaluation.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    PixelMetrics,
    image_metrics,
    mean_metrics,
)


def pixel_metrics(maps: NDArray, masks: NDArray[np.bool_], limit: float = 0.3) -> dict[str, float | None]:
    metrics = PixelMetrics(limit)
    metrics.update(maps.astype(np.float16), masks)
    return metrics.compute()


def blobs(rng: np.random.Generator, n: int = 4, size: int = 14) -> NDArray[np.bool_]:
    """Masks with several regions of different sizes, some touching only at a corner; the first is empty."""
    masks = np.zeros((n, size, size), dtype=bool)
    for mask in masks[1:]:
        for _ in range(3):
            i, j = rng.integers(0, size - 5, 2)
            h, w = rng.integers(1, 6, 2)
            mask[i : i + h, j : j + w] = True
        mask[0, 0] = mask[1, 1] = True
    return masks


def scores_of(kind: str, rng: np.random.Generator, masks: NDArray[np.bool_]) -> NDArray:
    values = rng.normal(size=masks.shape) + 1.2 * masks
    if kind == "tied":
        values = np.round(2 * values) / 2  # also gives -0.0 beside 0.0
        values[values == 0] *= rng.choice([-1.0, 1.0], size=int((values == 0).sum()))
    elif kind == "constant":
        values = np.full(masks.shape, 0.25)
    elif kind == "perfect":
        values = values + 20.0 * masks
    elif kind == "inverted":
        values = values - 20.0 * masks
    elif kind == "tiny":
        values = values * 1e-6  # mostly subnormal in float16
    return values.astype(np.float16)


# Normal: 5, 3, 1, 1, 1, 1; anomalous: 4 and 3 in one region, 2 in another.
HAND_MAP = np.array([[[5, 4, 3], [3, 1, 1], [1, 1, 2]]])
HAND_MASK = np.array([[[0, 1, 1], [0, 0, 0], [0, 0, 1]]], dtype=bool)


def test_pixel_metrics_by_hand() -> None:
    # The anomalous 4, 3, 2 outrank 5, 4.5 and 4 of the six.
    metrics = pixel_metrics(HAND_MAP, HAND_MASK)
    assert metrics["pixel_auroc"] == pytest.approx((5 + 4.5 + 4) / 18)
    assert metrics["pixel_ap"] == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert metrics["pixel_f1max"] == pytest.approx(2 * 3 / (5 + 3))
    # Corners (fpr, pro): (0, 0) (1/6, 0) (1/6, 1/4) (2/6, 2/4) (2/6, 1) (1, 1); the limit cuts the slope
    # at 0.3, where pro = 1/4 + 1/4 * (0.3 - 1/6) * 6 = 0.45.
    assert metrics["aupro"] == pytest.approx((0.3 - 1 / 6) * (0.25 + 0.45) / 2 / 0.3)
    assert pixel_metrics(HAND_MAP, HAND_MASK, limit=1)["aupro"] == pytest.approx(
        1 / 6 * (0.25 + 0.5) / 2 + 4 / 6
    )


def test_aupro_with_a_step_exactly_at_the_limit() -> None:
    # Two normal pixels above the only region, two below: up to an fpr of 1/2 nothing is found.
    maps: NDArray = np.array([[[4, 3], [0, 1]]])
    maps = np.concatenate([maps, np.full((1, 2, 2), 2)])
    masks = np.stack([np.zeros((2, 2), bool), np.ones((2, 2), bool)])
    assert pixel_metrics(maps, masks, limit=0.5)["aupro"] == 0.0
    assert pixel_metrics(maps, masks, limit=1.0)["aupro"] == pytest.approx(0.5)


def test_corners_join_a_region() -> None:
    # One region of two pixels in a chain by corners, beside one of one pixel; half of the first is found.
    mask = np.zeros((1, 4, 6), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 3, 5] = True
    maps = np.where(mask, 1.0, 0.5).astype(np.float16)
    maps[0, 1, 1] = 0.0
    # Before any false alarm: (1/2 + 1) / 2 with eight neighbours; with four it would be 2 / 3.
    assert pixel_metrics(maps, mask, limit=1e-6)["aupro"] == pytest.approx(0.75)


@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "perfect", "inverted", "tiny"])
def test_pixel_metrics_against_references(kind: str, limit: float) -> None:
    rng = np.random.default_rng(1)
    masks = blobs(rng)
    maps = scores_of(kind, rng, masks)
    metrics = pixel_metrics(maps, masks, limit=limit)
    expected = pixel_references(maps, masks, limit)
    assert [metrics[name] for name in PIXEL_METRICS] == pytest.approx(expected, abs=1e-12)
    if kind == "perfect":
        assert set(metrics.values()) == {1.0}


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_streaming_in_any_split_changes_no_bit(kind: str) -> None:
    rng = np.random.default_rng(2)
    masks = blobs(rng, n=9)
    maps = scores_of(kind, rng, masks)
    at_once = pixel_metrics(maps, masks)
    for cuts in ([1, 2, 3, 4, 5, 6, 7, 8], [4], [0, 7], [2, 3, 9]):
        streamed = PixelMetrics()
        for part, mask in zip(np.split(maps, cuts), np.split(masks, cuts), strict=True):
            streamed.update(part, mask)
        assert streamed.compute() == at_once


def test_more_pixels_than_are_counted_at_once() -> None:
    rng = np.random.default_rng(3)
    maps = rng.normal(size=(5, 400, 400)).astype(np.float16)
    masks = np.zeros(maps.shape, bool)
    masks[3, 100:200, 50:90] = True
    metrics = pixel_metrics(maps, masks)
    expected = sklearn_metrics(maps.ravel(), masks.ravel())
    assert [metrics[name] for name in PIXEL_METRICS[:3]] == pytest.approx(expected, abs=1e-12)


def test_maps_in_other_memory_orders() -> None:
    rng = np.random.default_rng(4)
    masks = blobs(rng)
    maps = scores_of("random", rng, masks)
    turned = np.asfortranarray(maps)
    assert pixel_metrics(turned, masks) == pixel_metrics(maps, masks)
    assert pixel_metrics(maps[:, ::-1], masks[:, ::-1]) == pytest.approx(pixel_metrics(maps, masks))


@pytest.mark.parametrize("anomalous", [False, True])
def test_pixel_metrics_of_one_class_are_none(anomalous: bool) -> None:
    maps: NDArray = np.random.default_rng(0).random((2, 3, 3))
    assert pixel_metrics(maps, np.full(maps.shape, anomalous)) == dict.fromkeys(PIXEL_METRICS)
    assert PixelMetrics().compute() == dict.fromkeys(PIXEL_METRICS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_non_finite_maps_are_refused(value: float) -> None:
    maps: NDArray = np.zeros((3, 4, 4), np.float16)
    maps[2, 1, 1] = value
    with pytest.raises(InputError, match="NaN or infinity in 1 of 3 maps, first in map 2"):
        pixel_metrics(maps, np.zeros(maps.shape, bool))


def test_a_refused_batch_is_not_counted() -> None:
    rng = np.random.default_rng(5)
    masks = blobs(rng)
    maps = scores_of("random", rng, masks)
    metrics = PixelMetrics()
    metrics.update(maps, masks)
    before = metrics.compute()
    bad = maps.copy()
    bad[-1, 0, 0] = np.nan
    with pytest.raises(InputError):
        metrics.update(bad, masks)
    assert metrics.compute() == before


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.zeros((2, 3, 3)), np.zeros((2, 3, 4), bool), "one shape"),
        (np.zeros((3, 3)), np.zeros((3, 3), bool), r"\(N, H, W\)"),
        (np.zeros((1, 3, 3)), np.zeros((1, 3, 3), np.uint8), "masks > 0"),
        (np.zeros((1, 3, 3), np.float32), np.zeros((1, 3, 3), bool), "float16 maps, found float32"),
    ],
)
def test_wrong_maps_are_refused(maps: NDArray, masks: NDArray, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        PixelMetrics().update(maps, masks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [0, -0.1, 1.5, float("nan")])
def test_wrong_limits_are_refused(limit: float) -> None:
    with pytest.raises(InputError, match=r"fpr_limit in \(0, 1\]"):
        PixelMetrics(limit)


def test_image_metrics_by_hand() -> None:
    metrics = image_metrics([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    assert metrics["image_auroc"] == pytest.approx((2 + 1.5) / 4)
    assert metrics["image_ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["image_f1max"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("step", [0.0, 0.5, 10.0])
def test_image_metrics_against_scikit_learn(step: float) -> None:
    rng = np.random.default_rng(6)
    labels = rng.random(301) < 0.3
    scores = rng.normal(size=301) + labels
    if step:
        scores = np.round(scores / step) * step  # 10: all tied
    metrics = image_metrics(scores, labels)
    assert [metrics[name] for name in IMAGE_METRICS] == pytest.approx(
        sklearn_metrics(scores, labels), abs=1e-12
    )


def test_image_metrics_of_one_class_are_none() -> None:
    for label in (True, False):
        assert image_metrics([1.0, 2.0], [label, label]) == dict.fromkeys(IMAGE_METRICS)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan], [True, False], "found nan for image 1"),
        ([1.0, 2.0], [True], "one shape"),
        ([], [], "N > 0"),
        ([1.0, 2.0], [0, 1], "labels > 0"),
        (["a", "b"], [True, False], "numbers"),
    ],
)
def test_wrong_image_scores_are_refused(scores: list, labels: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_metrics(scores, labels)


def test_mean_over_classes_that_have_a_metric() -> None:
    per_class = {
        "a": {"image_auroc": 0.5, "aupro": None, "pixel_ap": 0.25},
        "b": {"image_auroc": 1.0, "aupro": None, "pixel_ap": None},
    }
    assert mean_metrics(per_class) == {"image_auroc": 0.75, "aupro": None, "pixel_ap": 0.25}
    with pytest.raises(InputError, match="at least one class"):
        mean_metrics({})
    with pytest.raises(InputError, match="finite"):
        mean_metrics({"a": {"aupro": float("nan")}})


def test_overlap() -> None:
    assert histogram_overlap([1, 1, 0], [0, 2, 2]) == pytest.approx(0.5)
    assert histogram_overlap([3, 1], [6, 2]) == pytest.approx(1.0)
    assert histogram_overlap([3, 1], [0, 0]) is None
    # Two unit normals two apart share 2 Phi(-1) of their area.
    rng = np.random.default_rng(7)
    counts = [np.histogram(rng.normal(mean, 1, 200_000), 100, (-5, 7))[0] for mean in (0, 2)]
    assert histogram_overlap(*counts) == pytest.approx(2 * 0.158655, abs=0.01)


def test_wrong_histograms_are_refused() -> None:
    with pytest.raises(InputError, match="same bins"):
        histogram_overlap([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="0 or more"):
        histogram_overlap([1, -2], [1, 2])
    with pytest.raises(InputError, match="finite"):
        histogram_overlap([1, np.nan], [1, 2])
