"""What is said of a course of training, of couplings and of overlaps, and how images are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from hgadbook.histograms import (
    class_overlaps,
    overlap_records,
    overlap_sentence,
    overlap_table,
    separation_table,
)
from hgadbook.homogeneous_mapping import (
    FLOWS,
    coupling_claims,
    coupling_sentences,
    course_records,
    course_sentences,
    course_table,
)
from hgadbook.qualitative import normal_rank, telling_images
from hgadlib.config import load_config
from hgadlib.errors import InputError
from hgadlib.runs.grid import load_grid


def history(image: list[float], *, nll: list[float], normal: list[float] | None = None) -> pd.DataFrame:
    """Make a history of twice as many epochs as are evaluated."""
    n = 2 * len(image)
    table = pd.DataFrame({"epoch": np.arange(1, n + 1), "nll": np.repeat(nll, 2)})
    table["test_image_auroc"] = np.nan
    table.loc[1::2, "test_image_auroc"] = image
    if normal is not None:
        table.loc[1::2, "test_log_prob_normal"] = normal
        table.loc[1::2, "test_log_prob_anomalous"] = np.array(normal) - 0.5
    return table


def test_a_drop_under_a_falling_loss_is_seen() -> None:
    course = course_table(
        {
            "one": history([0.8, 0.95, 0.7], nll=[3, 2, 1], normal=[-3, -2, -1]),
            "two": history([0.8, 0.95, 0.94], nll=[3, 2, 1]),
        }
    )
    one = course.loc["one"]
    assert (one["best epoch"], one["epochs"]) == (4, 6)
    assert one["image drop"] == pytest.approx(25) and one["best image AUROC"] == pytest.approx(95)
    assert one["loss at best epoch"] == 2 and one["last loss"] == 1
    assert one["change of normal log-likelihood"] == one["change of anomalous log-likelihood"] == 1
    assert np.isnan(one["last overlap"]) and np.isnan(one["best pixel AUROC"])
    first, second = course_sentences(course)
    assert "the issue shows" in first and "25.0 points below" in first and "went on falling" in first
    assert "normal test positions changed by +1.000" in first
    assert "does not show in 6 epochs" in second and "1.0 below its best (epoch 4)" in second


def test_a_course_needs_evaluated_epochs() -> None:
    with pytest.raises(InputError, match="one: expected a history with evaluated epochs"):
        course_table({"one": pd.DataFrame({"epoch": [1], "nll": [1.0]})})


def couplings(**more: float) -> pd.DataFrame:
    """Make a coupling.csv of two epochs and two blocks."""
    row = {"s_std": 0.1, "s_input": 0.8, "s_class": 0.1, "s_limit": 0.0, "t_mean": 0.3, "t_std": 0.4}
    row |= {"t_input": 0.9, "t_class": 0.1, "log_gain": 0.0, "out_rms": 2.0, "level": 1} | more
    rows = [
        {"epoch": epoch, "layer": layer, "group": group, "s_mean": -0.19 * layer * epoch + extra, **row}
        for epoch in (1, 2)
        for layer in (1, 2)
        for group, extra in (("train", 0.0), ("normal", 0.0), ("anomalous", 0.05))
    ]
    return pd.DataFrame(rows)


def test_claims_are_of_the_last_epoch_and_of_all_blocks() -> None:
    found = coupling_claims({"run": couplings()}).loc["run"]
    assert found["epoch"] == 2
    # Means of s are -0.38 and -0.76, of 1.9.
    assert found["mean s / clamp (%)"] == pytest.approx(-30) and found["lowest block (%)"] == pytest.approx(
        -40
    )
    assert found["t / output (%)"] == pytest.approx(25)
    assert found["s, anomalous - normal (nats)"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (couplings(), "s is not very small, and s and t depend on the input"),
        (couplings(s_input=0.01, t_input=0.02), "hardly depend on the input, but s is not very small"),
        (couplings(s_mean=-1.8), "very small somewhere, but s and t depend"),
        (couplings(s_mean=-1.8, s_input=0.01, t_input=0.02), "as claimed"),
    ],
)
def test_sentences_say_which_part_of_the_claim_holds(table: pd.DataFrame, said: str) -> None:
    assert said in coupling_sentences({"run": table})[0]


def record(experiment: str, **more: Any) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "dataset": "demo",
        "data": {"digest": "d" * 64},
        "config": {"data": {"image_size": 224}},
        "epochs": 24,
        "seed": 0,
        "curves": {"epoch": [1, 2], "test_image_auroc": [None, 0.9]},
        "overlap": {"a": [0.2, 0.4], "b": [None, None]},
    } | more


def test_records_are_brought_together_by_what_they_ran_on() -> None:
    found = course_records(
        [
            record("sec32_hgad"),
            record("sec32_single"),
            record("hgad"),
            record("sec32_fastflow", curves={"epoch": [1], "test_image_auroc": [None]}),
            record("sec32_fastflow", dataset="folder"),
        ]
    )
    assert {title: list(of) for title, of in found.items()} == {
        "demo at 224 pixels, 24 epochs, seed 0": ["single Gaussian", "HGAD"],
        "folder dddddddd at 224 pixels, 24 epochs, seed 0": ["FastFlow type"],
    }
    overlaps = overlap_records([record("sec32_hgad"), record("sec32_single"), record("sec32_hgad", epochs=9)])
    (of,) = overlaps.values()
    assert of == {name: {"a": pytest.approx(0.3), "b": None} for name in ("single Gaussian", "HGAD")}


def test_overlaps_by_class() -> None:
    counts = np.zeros((2, 2, 2, 4), int)
    counts[0, 1, 0], counts[0, 1, 1] = [2, 2, 0, 0], [0, 2, 2, 0]
    found = class_overlaps({"log_likelihood_counts": counts, "classes": np.array(["a", "b"])})
    assert found == {"a": 0.5, "b": None}
    runs = {
        "one": {"a": 0.5, "b": None, "c": 0.30, "d": 0.1},
        "two": {"a": 0.6, "b": None, "c": 0.25, "d": 0.1},
    }
    table = overlap_table(runs)
    assert table.index.tolist() == ["c", "d", "a", "b", "mean"]
    assert table["difference"].tolist()[:3] == pytest.approx([-5, 0, 10])
    said = overlap_sentence(runs)
    assert "Of 3 classes" in said and "less by 2 points or more in 1 (c)" in said
    assert "more by 2 points or more in 1 (a)" in said and "mean difference is +1.7" in said


def test_classes_without_masks_show_their_image_auroc() -> None:
    one = {
        "per_class": {
            "a": {"image_auroc": 0.7, "pixel_auroc": None},
            "b": {"image_auroc": 0.7, "pixel_auroc": 0.9},
        }
    }
    table = separation_table({"one": one, "two": one})
    assert table["one"].tolist() == pytest.approx([70, 90, 80]) and not table["difference"].any()


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


@pytest.mark.parametrize("name", ["homogeneous", "homogeneous_long", "homogeneous_elpv"])
def test_grids_hold_the_flows_that_the_chapter_knows(name: str) -> None:
    configs = {config.experiment: config for config in load_grid(name).configs()}
    assert set(configs) == set(FLOWS)
    assert all(config.train.evaluate_every and config.data.image_size == 224 for config in configs.values())
    normalisers = {config.experiment: config.flow.normalise for config in configs.values()}
    assert normalisers == dict.fromkeys(FLOWS, "none") | {"sec32_single_whiten": "whiten"}


def test_flows_differ_in_prior_flow_and_normaliser_alone() -> None:
    base = load_config(dataset="demo", experiment="sec32_single").identity()
    for name in FLOWS:
        other = load_config(dataset="demo", experiment=name).identity()
        differ = {key for key in base if base[key] != other[key]}
        assert differ <= {"experiment", "flow", "prior", "train"}
        assert {**other["train"], "first_stage": 0} == base["train"]
