"""What a reader moves: every place has its picture, counts are right, and nothing is fetched."""

from __future__ import annotations

import html
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

pytest.importorskip("IPython", reason="needs the extra: book")

from hgadbook.sliders import blend_slider, picture_of, picture_slider, threshold_slider


def test_one_picture_is_shown_and_every_place_has_one() -> None:
    frames = {(i, j): (b"x", f"{i}, {j}") for i in range(2) for j in range(3)}
    page = picture_slider(frames, {"a": ["1", "2"], "b": ["p", "q", "<r>"]})
    assert re.findall(r'data-at="(\d-\d)"[^>]*"( hidden)?>', page).count(("1-2", "")) == 1
    assert page.count(" hidden>") == 5 and "<output>&lt;r&gt;</output>" in page
    assert [int(n) for n in re.findall(r'max="(\d)"', page)] == [1, 2]
    del frames[0, 1]
    with pytest.raises(ValueError, match=r"found none for \(0, 1\)"):
        picture_slider(frames, {"a": ["1", "2"], "b": ["p", "q", "r"]})


def test_counts_at_a_threshold_are_those_of_the_scores() -> None:
    scores = np.array([1.0, 2.0, 3.0, 2.5, 4.0])
    labels, classes = np.array([0, 0, 1, 1, 0], bool), ["ring", "ring", "ring", "disc", "disc"]
    page = threshold_slider(scores, labels, classes, steps=9)
    counts = json.loads(html.unescape(re.search(r'data-counts="([^"]*)"', page)[1]))  # type: ignore[index]
    places = [float(p) for p in json.loads(html.unescape(re.search(r'data-said="([^"]*)"', page)[1]))]  # type: ignore[index]
    assert np.all(np.diff(places) > 0) and len(places) == len(counts[0][0])
    for at, place in enumerate(places):
        above = scores > place
        assert counts[-1][0][at] == (above & ~labels).sum() and counts[-1][1][at] == (~above & labels).sum()
        assert counts[0][0][at] == (above & ~labels)[:3].sum()
    best = min(a + m for a, m in zip(*counts[-1], strict=True))
    shown = [
        int(n) for n in re.findall(r"<th scope=\"row\">all</th><td>(\d+)</td><td>3</td><td>(\d+)", page)[0]
    ]
    assert sum(shown) == best
    with pytest.raises(ValueError, match="at least one image"):
        threshold_slider([], [], [])


def test_pictures_lie_in_the_page() -> None:
    image, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)
    page = blend_slider({"<ring>": (image, image, mask)}, size=16)
    assert page.count("data:image/webp;base64,") == 3 and "&lt;ring&gt;: mask" in page and "http" not in page
    figure, _ = plt.subplots()
    assert picture_of(figure)[8:12] == b"WEBP"
    plt.close(figure)
