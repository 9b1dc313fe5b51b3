"""How images are ranked and chosen, and what a comparison of maps draws."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hgadbook.qualitative import map_comparison, normal_rank, telling_images

SCORES = np.array([0.1, 0.2, 0.3, 0.25, 0.9, 0.15, 0.5])
CLASSES = np.array([0, 0, 0, 0, 0, 0, 1])
LABELS = np.array([False, False, False, True, True, True, True])
KNOWN = np.ones(7, bool)


def test_ranks_among_the_normal_ones_of_the_class() -> None:
    found = normal_rank(SCORES, CLASSES, LABELS, KNOWN)
    assert found[:6] == pytest.approx([0, 0.5, 1, 2 / 3, 1, 1 / 3])
    assert np.isnan(found[6])
    ties = normal_rank(
        np.array([0.1, 0.1, 0.1]), np.zeros(3, int), np.array([False, False, True]), np.ones(3, bool)
    )
    assert ties.tolist() == [0.5, 0.5, 0.5]


def test_telling_images_follow_their_rules() -> None:
    before = SCORES.copy()
    before[[3, 4]] = 0.05, 0.95  # 3 rises from the bottom, 4 stays above all
    before[5] = 0.25  # 5 falls
    found = telling_images({"one": before, "two": SCORES}, CLASSES, LABELS, KNOWN)
    assert found == {
        "found": {0: 4},
        "missed": {0: 5},
        "false alarm": {0: 2},
        "gained": {0: 3},
        "lost": {0: 5},
    }
    same = telling_images({"one": SCORES, "two": SCORES}, CLASSES, LABELS, KNOWN)
    assert same["gained"] == same["lost"] == {}


def test_of_equal_ranks_the_score_decides() -> None:
    scores = np.array([0.1, 0.5, 0.9, 0.7])
    labels = np.array([False, True, True, True])
    found = telling_images({"a": scores, "b": scores}, np.zeros(4, int), labels, np.ones(4, bool))
    assert (found["found"][0], found["missed"][0]) == (2, 1)


def test_a_comparison_has_a_column_a_model_and_one_scale_each() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 2:4] = True
    maps = {"one": np.zeros((2, 8, 8)), "two": np.ones((2, 8, 8))}
    limits, captions = {"one": (0.0, 2.0), "two": (1.0, 5.0)}, {"one": ["p", "q"], "two": ["r", "s"]}
    figure = map_comparison(
        images, masks, maps, ["a", "b"], normal=images + 1, limits=limits, captions=captions
    )
    axes = np.array(figure.axes).reshape(2, 5)
    assert [ax.get_title() for ax in axes[0]] == ["normal", "image", "mask", "one", "two"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["a", "b"]
    assert [ax.get_xlabel() for ax in axes[1]] == ["", "", "", "q", "s"]
    assert [ax.images[0].get_clim() for ax in axes[:, 4]] == [(1, 5), (1, 5)]
    # The first image's defect is outlined on its maps, and nothing else is.
    assert [[len(ax.collections) for ax in row] for row in axes] == [[0, 0, 0, 2, 2], [0, 0, 0, 0, 0]]
    assert axes[0, 0].images[0].get_array().max() == 1 and not axes[0, 1].images[0].get_array().any()
    plt.close(figure)
