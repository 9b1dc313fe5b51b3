"""Classes inferred, images held out, a class left out: on synthetic features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
import torch

from hgadbook.beyond import (
    Unseen,
    alarm_rates,
    beyond_sentences,
    discovery_table,
    expected_alarms,
    held_out,
    hold_out,
    inference_table,
    leave_out,
    select_features,
    select_train,
    unseen_table,
)
from hgadlib.config import Config, ScoreConfig, config_from_dict
from hgadlib.datasets.records import Dataset, ImageRecord, relabel
from hgadlib.errors import InputError
from hgadlib.evaluation.class_inference import (
    auroc_by_class,
    image_evidence,
    infer_classes,
    score_as,
)
from hgadlib.evaluation.evaluate import Protocol, evaluate, level_values
from hgadlib.evaluation.thresholds import binomial_rate, conformal_threshold
from hgadlib.mixture import class_evidence
from hgadlib.runs.inputs import Inputs
from hgadlib.training import calibrate

SCORE = ScoreConfig(map_size=16, sigma=1.0)


def inputs(n_classes: int = 3, n: int = 45) -> Inputs:
    """Blobs of features: a third of the test images is shifted, thus anomalous."""
    names = tuple("abc"[:n_classes])
    train, class_idx = small.features(n, n_classes=n_classes)
    normal, normal_idx = small.features(2 * n // 3, n_classes=n_classes, seed=1)
    odd, odd_idx = small.features(n // 3, n_classes=n_classes, seed=2, shift=1.2)
    levels = tuple(torch.cat(pair) for pair in zip(normal.levels, odd.levels, strict=True))
    test = small.Features(levels, small.GRIDS, "test", "host", True, 0.0)
    records = [
        ImageRecord(Path(f"train{i}"), names[k], "train", False, "good") for i, k in enumerate(class_idx)
    ]
    records += [
        ImageRecord(Path(f"test{i}"), names[k], "test", False, "good") for i, k in enumerate(normal_idx)
    ]
    records += [ImageRecord(Path(f"odd{i}"), names[k], "test", True, "odd") for i, k in enumerate(odd_idx)]
    dataset = Dataset("folder", Path(), names, tuple(records))
    backbone: Any = None
    return Inputs(dataset, backbone, train, test, torch.device("cpu"))


def config(**more: Any) -> Config:
    values: dict[str, Any] = {
        "dataset": "demo",
        "flow": {"layers": 2, "position_dim": 4},
        "prior": {"n_centers": 2},
        "train": {"epochs": 6, "batch_size": 8, "lr": 5e-3},
        "score": {"map_size": 16, "sigma": 1.0},
    }
    return config_from_dict({**values, **more})


def test_evidence_of_every_class() -> None:
    model = small.model(n_classes=3)
    features, _ = small.features(5, n_classes=3)
    found = torch.from_numpy(image_evidence(model, features))
    assert found.shape == (5, 3)
    by_hand = torch.zeros(5, 3, dtype=torch.float64)
    eps = 0.1
    for (flow, prior), x in zip(model.levels, features.levels, strict=True):
        with torch.no_grad():
            z, _ = flow(x)
            densities = []
            for k in range(3):
                centers = prior.intra_centers()[k]  # type: ignore[union-attr, operator, index, unused-ignore]
                distance = torch.cdist(z.double(), centers.double()).square()
                weights = prior.log_weights_intra[k].double()  # type: ignore[union-attr, operator, index, unused-ignore]
                density = torch.logsumexp(weights - distance / 2, -1) - z.shape[-1] / 2 * np.log(2 * np.pi)
                densities.append(density)
            posterior = torch.softmax(torch.stack(densities, -1), -1)
            by_hand += ((1 - eps) * posterior + eps / 3).log().sum(1)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-3)


def test_a_defect_does_not_decide_the_class() -> None:
    """It is far less unlike a broad class than its own; the positions beside it tell what the image shows."""
    log_probs = torch.tensor([[[-10.0, -20.0]] * 15 + [[-9000.0, -100.0]]])
    assert log_probs.sum(1).argmax() == 1
    assert class_evidence(log_probs).argmax() == 0


def test_one_gaussian_cannot_tell_classes_apart() -> None:
    features, _ = small.features(2)
    with pytest.raises(InputError, match="one Gaussian for all"):
        image_evidence(small.model(kind="single"), features)


@pytest.mark.parametrize("normalisation", ["calibrated", "inductive"])
def test_scores_are_those_of_the_evaluation_and_of_the_image_alone(normalisation: Any) -> None:
    data, score = inputs(), replace(SCORE, normalisation=normalisation)
    model = small.model(n_classes=3)
    calibrate(model, data.train, data.train_classes)
    scores = score_as(model, data.test, data.test_classes, score)
    values = level_values(model, data.test, data.test_classes)
    expected = evaluate(
        model,
        values,
        data.test_classes,
        data.test_labels,
        None,
        score=score,
        protocol=Protocol(normalisation, "likelihood"),
    )
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5, atol=1e-6)
    last = np.arange(len(data.test)) == len(data.test) - 1
    alone = score_as(model, select_features(data.test, last), data.test_classes[last], score)
    np.testing.assert_allclose(alone, scores[last], rtol=1e-5, atol=1e-6)
    # As another class it is another score.
    other = score_as(model, data.test, (data.test_classes + 1) % 3, score)
    assert (np.abs(other - scores) > 1e-3).mean() > 0.8


@pytest.fixture(scope="module")
def part() -> Any:
    return hold_out(config(), inputs(), 0.34)


def test_held_out_images_are_not_trained_on(part: Any) -> None:
    data = inputs()
    out = held_out(data.train_classes, 0.34)
    assert [out[data.train_classes == k].sum() for k in range(3)] == [5, 5, 5]
    assert len(part.inputs.train) == 30 and len(part.features) == 15
    torch.testing.assert_close(part.features.levels[0], data.train.levels[0][torch.from_numpy(out)])
    torch.testing.assert_close(part.inputs.train.levels[1], data.train.levels[1][torch.from_numpy(~out)])
    np.testing.assert_array_equal(part.class_idx, data.train_classes[out])
    np.testing.assert_array_equal(part.inputs.train_classes, data.train_classes[~out])


def test_trained_model_knows_its_classes(part: Any) -> None:
    data = inputs()
    found = infer_classes(part.model, data.test)
    normal = ~data.test_labels  # some of the shifted images lie nearer to another class
    np.testing.assert_array_equal(found[normal], data.test_classes[normal])
    found = data.test_classes
    wrong = (data.test_classes + 1) % 3
    table = inference_table(part.model, data, SCORE, {"likeliest": found, "wrong": wrong})
    assert (table["likeliest", "right"] == 100).all() and (table["wrong", "right"] == 0).all()
    assert table["likeliest", "AUROC"].tolist() == table["class given", "AUROC"].tolist()
    assert table.index[-1] == "mean"


def test_thresholds_by_class(part: Any) -> None:
    limits = part.thresholds(SCORE, 0.2)
    scores = score_as(part.model, part.features, part.class_idx, SCORE)
    # Five images of each class: the largest score; fifteen of all: the 13th.
    assert limits["b"] == scores[part.class_idx == 1].max()
    assert limits["all"] == np.sort(scores)[12]
    with pytest.raises(InputError, match="at least 9 held-out"):
        part.thresholds(SCORE, 0.1)
    assert part.training_thresholds(SCORE, 0.2)["a"] < limits["a"]


def test_expected_range_covers_what_happens() -> None:
    n, tested, rate = 20, 25, 0.1
    low, high = expected_alarms(n, tested, rate)
    rng = np.random.default_rng(2)
    found = []
    for _ in range(2000):
        scores = rng.normal(size=n + tested)
        found.append((scores[n:] > conformal_threshold(scores[:n], rate)).mean())
    inside = np.mean([low <= rate <= high for rate in found])
    assert 0.94 < inside < 1
    with pytest.raises(InputError, match="at least 9"):
        expected_alarms(8, tested, rate)


def test_alarms_are_counted_by_class() -> None:
    scores = np.array([1, 3, 1, 3, 5], dtype=np.float32)
    labels = np.array([False, False, False, True, True])
    classes = np.array([0, 0, 1, 1, 1])
    false, recall = alarm_rates(scores, np.array([2.0, 2, 2, 4, 4]), labels, classes, ["a", "b"])
    assert [(rate.events, rate.trials) for rate in false.values()] == [(1, 2), (0, 1), (1, 3)]
    assert [(rate.events, rate.trials) for rate in recall.values()] == [(0, 0), (1, 2), (1, 2)]


def test_a_class_left_out_is_new() -> None:
    data = inputs()
    found = leave_out(config(), data, "c", 0.34, 0.2)
    assert set(found.taken_for) == {"b"}  # its neighbour
    assert found.alarms.trials == 10 and found.alarms_seen.trials == 20
    assert found.alarms.value == 1 and found.novelty is not None and found.novelty > 0.9
    table = unseen_table([found])
    assert str(table.loc["c", "false alarms (%)"]).startswith("100.0")
    with pytest.raises(InputError, match="a class to leave out of a, b, c"):
        leave_out(config(), data, "d", 0.34, 0.2)


def test_the_four_questions_get_a_sentence_each() -> None:
    columns = pd.MultiIndex.from_tuples(
        [("class given", "AUROC"), ("likeliest class", "right"), ("likeliest class", "AUROC")]
    )
    inferred = pd.DataFrame([[91.0, 97.5, 90.0]], ["mean"], columns)
    discovery = pd.DataFrame({"classes": [6], "found": [5], "adjusted Rand index": [0.875]}, ["train"])
    compared = pd.DataFrame({"difference": [-1.25]}, ["mean"])
    alarms = {"all": binomial_rate([True, False, False])}, {"all": binomial_rate([True, True])}
    of = (binomial_rate([True, False]), binomial_rate([True]))
    unseen = [Unseen(name, ("c",), of[0], of[1], of[0], None, None) for name in "ab"]
    said = beyond_sentences(inferred, discovery, compared, alarms, unseen, rate=0.1)
    assert "right for 97.5 % of the test images; image AUROC is 90.0 % with it and 91.0 % with" in said[0]
    assert "finds 5 classes where there are 6 (adjusted Rand index 0.88)" in said[1]
    assert said[1].endswith("differs by −1.2 points.")
    assert "for 10 % false alarms raise an alarm on 1 of 3 normal test images and find 2 of 2" in said[2]
    assert said[3].endswith("2 of 4 normal images raise an alarm, over 2 classes left out one by one.")


def test_selection() -> None:
    data = inputs()
    rest = select_train(data, data.train_classes != 1)
    assert rest.dataset.classes == ("a", "c")
    assert set(rest.test_classes.tolist()) == {0, 1}
    assert len(rest.test) == len(rest.dataset.test) == 30
    torch.testing.assert_close(
        rest.test.levels[0], data.test.levels[0][torch.from_numpy(data.test_classes != 1)]
    )
    with pytest.raises(InputError, match="some of 45 images, found 0"):
        select_features(data.train, np.zeros(45, bool))
    with pytest.raises(InputError, match="between 0 and 1"):
        held_out(data.train_classes, 1.0)
    with pytest.raises(InputError, match="one training image"):
        held_out(np.array([0, 0, 1]), 0.5)


def test_discovery_is_compared_with_the_folders() -> None:
    data = inputs()
    table = discovery_table(data, data)
    assert (table["adjusted Rand index"] == 1).all()
    assert table.loc["test", "images"] == 45
    names = ["a" if record.class_name == "b" else record.class_name for record in data.dataset.records]
    records = tuple(replace(r, class_name=n) for r, n in zip(data.dataset.records, names, strict=True))
    merged = replace(data, dataset=replace(data.dataset, classes=("a", "c"), records=records))
    worse = discovery_table(data, merged)
    assert (worse["adjusted Rand index"] < 0.7).all() and worse.loc["train", "found"] == 2


def test_auroc_within_the_true_class() -> None:
    scores = np.array([0, 1, 10, 9], dtype=np.float32)
    labels = np.array([False, True, False, True])
    found = auroc_by_class(scores, labels, np.array([0, 0, 1, 1]), ["a", "b", "c"])
    assert found == {"a": 1.0, "b": 0.0}


def test_a_class_called_all_is_refused_where_all_of_them_have_that_name() -> None:
    found = inputs()
    renamed = [
        ["all" if r.class_name == "a" else r.class_name for r in part]
        for part in (found.dataset.train, found.dataset.test)
    ]
    with pytest.raises(InputError, match=r"a class is called 'all'.*rename its folder"):
        hold_out(config(), replace(found, dataset=relabel(found.dataset, *renamed)), 0.34)
