"""Paired comparisons: against double loops, the midranks of DeLong, and each other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from hgadlib.errors import InputError
from hgadlib.evaluation.compare import delong, interval, mean_ranks, paired_bootstrap


def scores(n: int = 120, *, seeds: int = 1, gain: float = 0.0, ties: bool = False) -> tuple[np.ndarray, ...]:
    """Two methods' scores (S, N) of images of two classes, which share what is hard about an image."""
    rng = np.random.default_rng(0)
    labels, class_idx = np.arange(n) % 3 == 0, np.arange(n) % 2
    shared = rng.normal(size=n) + 1.0 * labels
    ours, theirs = (shared + 0.5 * rng.normal(size=(seeds, n)) + more * labels for more in (gain, 0.0))
    if ties:
        ours, theirs = ours.round(), theirs.round()
    return ours, theirs, labels, class_idx


def auroc(values: np.ndarray, labels: np.ndarray, class_idx: np.ndarray) -> float:
    own = [class_idx == k for k in np.unique(class_idx)]
    return float(np.mean([roc_auc_score(labels[m], values[m]) for m in own]))


@pytest.mark.parametrize("ties", [False, True])
def test_delong_is_the_double_loop_and_the_formula_by_midranks(ties: bool) -> None:
    ours, theirs, labels, _ = scores(ties=ties)
    found = delong(ours[0], theirs[0], labels)
    components, midranks = [], []
    for x in (ours[0], theirs[0]):
        wins = [[(a > b) + 0.5 * (a == b) for b in x[~labels]] for a in x[labels]]
        components.append((np.mean(wins, 1), np.mean(wins, 0)))
        ranks, m, n = rankdata(x), labels.sum(), (~labels).sum()
        midranks.append(
            (
                (ranks[labels] - rankdata(x[labels])) / n,
                1 - (ranks[~labels] - rankdata(x[~labels])) / m,
            )
        )
    for parts in (components, midranks):
        variance = sum(
            c[0, 0] / k + c[1, 1] / k - 2 * c[0, 1] / k
            for i, k in ((0, labels.sum()), (1, (~labels).sum()))
            for c in [np.cov(parts[0][i], parts[1][i])]
        )
        assert found.error == pytest.approx(np.sqrt(variance), rel=1e-12)
    expected = roc_auc_score(labels, ours[0]) - roc_auc_score(labels, theirs[0])
    assert found.difference == pytest.approx(expected, abs=1e-12)
    assert found.p == pytest.approx(2 * norm.sf(abs(expected) / found.error))


def test_the_bootstrap_is_that_of_resampled_images() -> None:
    ours, theirs, labels, class_idx = scores(24, seeds=2, ties=True)
    found, draws = paired_bootstrap(ours, theirs, labels, class_idx, resamples=300, seed=3)
    gains = [
        auroc(a, labels, class_idx) - auroc(b, labels, class_idx) for a, b in zip(ours, theirs, strict=True)
    ]
    assert found == pytest.approx(np.mean(gains), abs=1e-12)
    # The same draws, image by image and seed by seed, out of the same generator.
    rng = np.random.default_rng(3)
    counts = np.zeros((300, len(labels)), int)
    for k in (0, 1):
        for state in (True, False):
            members = np.flatnonzero((class_idx == k) & (labels == state))
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), 300)
    chosen = rng.multinomial(2, [0.5, 0.5], 300)
    for r in (0, 7, 299):
        images, seeds = np.repeat(np.arange(len(labels)), counts[r]), np.repeat([0, 1], chosen[r])
        truth = labels[images], class_idx[images]
        own = [auroc(ours[s][images], *truth) - auroc(theirs[s][images], *truth) for s in seeds]
        assert draws[r] == pytest.approx(np.mean(own), abs=1e-12)


def test_bootstrap_and_delong_agree_and_pairing_is_what_narrows_them() -> None:
    ours, theirs, labels, class_idx = scores(400, gain=0.3)
    exact = delong(ours[0], theirs[0], labels, class_idx)
    found, draws = paired_bootstrap(ours, theirs, labels, class_idx, resamples=4000)
    assert found == pytest.approx(exact.difference, abs=1e-12)
    assert draws.std() == pytest.approx(exact.error, rel=0.06)
    low, high = interval(draws)
    assert low == pytest.approx(found - 1.96 * exact.error, abs=0.2 * exact.error)
    assert high == pytest.approx(found + 1.96 * exact.error, abs=0.2 * exact.error)
    mixed = np.random.default_rng(1).permutation(len(labels))
    alone = delong(ours[0], np.where(labels, theirs[0][labels].mean(), theirs[0])[mixed], labels, class_idx)
    assert exact.error < 0.7 * alone.error


def test_the_same_scores_differ_by_nothing() -> None:
    ours, _, labels, class_idx = scores(seeds=3)
    found, draws = paired_bootstrap(ours, 2 * ours + 1, labels, class_idx, resamples=50)
    assert found == 0 and not draws.any()
    assert delong(ours[0], np.exp(ours[0]), labels, class_idx) == (0.0, 0.0, 1.0)


def test_more_seeds_that_scatter_widen_the_interval_of_images_alone() -> None:
    ours, theirs, labels, class_idx = scores(seeds=2)
    ours[1] += 3.0 * labels
    _, draws = paired_bootstrap(ours, theirs, labels, class_idx)
    _, alone = paired_bootstrap(ours[:1], theirs[:1], labels, class_idx)
    assert np.ptp(interval(draws)) > 1.2 * np.ptp(interval(alone))


def test_a_class_of_one_kind_is_left_out() -> None:
    ours, theirs, labels, class_idx = scores()
    whole = labels & (class_idx == 1)
    more = np.where((class_idx == 1) & ~labels, 2, class_idx)
    assert whole.any()
    only = class_idx == 0
    expected = delong(ours[0][only], theirs[0][only], labels[only])
    assert delong(ours[0], theirs[0], labels, more) == pytest.approx(expected)


def test_mean_ranks() -> None:
    assert mean_ranks(np.array([[0.9, 0.8], [0.9, 0.9], [0.1, 0.2]])).tolist() == [1.75, 1.25, 3.0]


def test_what_cannot_be_compared_is_refused() -> None:
    ours, theirs, labels, class_idx = scores(seeds=2)
    with pytest.raises(InputError, match="same test images"):
        paired_bootstrap(ours, theirs[:, 1:], labels, class_idx)
    with pytest.raises(InputError, match="same test images"):
        paired_bootstrap(ours, theirs[:1], labels, class_idx)
    with pytest.raises(InputError, match="normal and anomalous images, found none"):
        delong(ours[0], theirs[0], np.ones_like(labels))
