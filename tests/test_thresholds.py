"""Thresholds from normal images: by hand, and what they promise, by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from hgadlib.errors import InputError
from hgadlib.evaluation.thresholds import (
    Normals,
    binomial_rate,
    conformal_p_values,
    conformal_threshold,
    images_needed,
)


def test_by_hand() -> None:
    # 9 images and 10 %: only the largest will do; 19 and 10 %: the 18th of 19.
    assert conformal_threshold(np.arange(9)[::-1], 0.1) == 8
    assert conformal_threshold(np.arange(19), 0.1) == 17
    assert conformal_threshold(np.arange(19), 0.05) == 18


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.1, 1 / 3, 0.5])
def test_a_threshold_exists_from_the_number_of_images_on_that_is_said(rate: float) -> None:
    least = images_needed(rate)
    conformal_threshold(np.arange(least), rate)
    if least > 1:
        with pytest.raises(
            InputError, match=f"takes at least {least} held-out normal images, found {least - 1}"
        ):
            conformal_threshold(np.arange(least - 1), rate)


@pytest.mark.parametrize(("n", "rate"), [(20, 0.1), (50, 0.05), (33, 0.2)])
def test_rate_is_kept_on_average_and_not_wasted(n: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.gamma(2.0, size=(4000, n + 1))
    alarms = [draw[-1] > conformal_threshold(draw[:-1], rate) for draw in draws]
    # Between rate - 1 / (n + 1) and rate, four standard errors aside.
    error = 4 * np.sqrt(rate / len(draws))
    assert rate - 1 / (n + 1) - error < np.mean(alarms) < rate + error


def test_p_values_say_the_same_as_the_threshold() -> None:
    rng = np.random.default_rng(1)
    held_out, new = rng.normal(size=40), rng.normal(0.5, 2, size=500)
    for rate in (0.05, 0.1, 0.3):
        p = conformal_p_values(new, held_out)
        np.testing.assert_array_equal(p <= rate, new > conformal_threshold(held_out, rate))
    assert conformal_p_values([5.0], np.full(3, 5.0)).tolist() == [1.0]


def test_normal_images_say_what_their_scores_say_in_any_order() -> None:
    rng = np.random.default_rng(2)
    scores, new = rng.normal(size=40).round(1), rng.normal(0.5, 2, size=50).round(1)  # with ties
    peaks = rng.gamma(2, size=40)
    normals = Normals(scores, peaks)
    for rate in (0.05, 0.1, 0.3):
        assert normals.threshold(rate) == conformal_threshold(scores, rate)
        assert normals.pixel_threshold(rate) == conformal_threshold(peaks, rate)
    assert [normals.p_value(score) for score in new] == conformal_p_values(new, scores).tolist()
    below = [100 * (scores < score).mean() for score in new]
    assert [normals.percentile(score) for score in new] == pytest.approx(below)
    together = Normals.together([normals, Normals(new, new)])
    assert together.threshold(0.1) == conformal_threshold([*scores, *new], 0.1)
    assert together.pixel_threshold(0.1) == conformal_threshold([*peaks, *new], 0.1)


def test_counts_have_exact_intervals() -> None:
    none = binomial_rate(np.zeros(20, bool))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert str(binomial_rate([])) == "no image"
    assert np.isnan(binomial_rate([]).value)


def test_bad_input() -> None:
    for rate in (0.0, 1.0, -0.1, 5.0):
        with pytest.raises(InputError, match="between 0 and 1"):
            conformal_threshold([1.0, 2.0], rate)
    with pytest.raises(InputError, match="finite"):
        conformal_threshold([1.0, np.nan], 0.5)
    with pytest.raises(InputError, match="finite"):
        conformal_p_values([np.inf], [1.0])
    with pytest.raises(InputError, match=r"found shape \(0,\)"):
        conformal_threshold([], 0.5)
    good = np.arange(3.0)
    for bad in (np.array([1.0, np.nan]), np.zeros(0), np.zeros((2, 2))):
        for given in ((bad, good), (good, bad)):
            with pytest.raises(InputError, match="expected"):
                Normals(*given)
    with pytest.raises(InputError, match="finite"):
        Normals(good, good).p_value(np.nan)
    with pytest.raises(InputError, match="at least 4 held-out normal images, found 3"):
        Normals(good, good).threshold(0.2)
