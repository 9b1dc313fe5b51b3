"""What is said and drawn of a course of training and of couplings, and which records are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hgadbook.histograms import overlap_records
from hgadbook.homogeneous_mapping import (
    FLOWS,
    claim_sentence,
    coupling_claims,
    coupling_course,
    coupling_sentences,
    course_records,
    course_sentences,
    course_table,
    drop_sentence,
    overfit_sentences,
    training_course,
)
from hgadlib.config import load_config
from hgadlib.errors import InputError
from hgadlib.runs.grid import load_grid


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


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
    assert "detection declines" in first and "25.0 points below" in first and "went on falling" in first
    assert "normal test positions changed by +1.000" in first
    assert "does not decline in 6 epochs" in second and "1.0 below its best (epoch 4)" in second


def test_overfitting_is_a_likelihood_that_falls_under_a_falling_loss() -> None:
    untrained = pd.DataFrame({"epoch": [0], "test_log_prob_normal": [-1.0]})
    told = {
        "worse": history([0.8, 0.8, 0.8], nll=[3, 2, 1], normal=[-2, -1.5, -1.8]),
        "from the start": pd.concat([untrained, history([0.8, 0.8], nll=[2, 1], normal=[-1.2, -1.3])]),
        "unstable": history([0.8, 0.8], nll=[1, 3], normal=[-1, -3]),
        "better": history([0.8, 0.8], nll=[3, 2], normal=[-3, -2]),
        "about": history([0.8, 0.8], nll=[3, 2], normal=[-2, -2.001]),
        "not looked at": history([0.8, 0.8], nll=[3, 2]),
    }
    said = dict(line.split(": ", 1) for line in overfit_sentences(told))
    assert said["worse"].startswith("overfits") and "(epoch 4)" in said["worse"]
    assert "0.300 nats per dimension below" in said["worse"] and "from 2.000 to 1.000" in said["worse"]
    assert said["from the start"].startswith("overfits") and "(epoch 0)" in said["from the start"]
    assert "from 2.000 to 1.000" in said["from the start"]
    assert said["unstable"].startswith("does not overfit, and yet loses")
    assert said["better"].endswith("ends at -2.000, its highest.")
    assert said["about"].startswith("does not overfit") and "(epoch 2)" in said["about"]
    assert said["not looked at"] == "not measured."


def test_a_verdict_names_the_runs_that_drop() -> None:
    falls, pixels = history([0.8, 0.95, 0.7], nll=[3, 2, 1]), history([0.8, 0.9], nll=[2, 1])
    pixels["test_pixel_auroc"] = [np.nan, 0.9, np.nan, 0.87]
    stays = history([0.8, 0.95, 0.94], nll=[3, 2, 1])
    courses = [course_table({"one": falls, "two": stays}), course_table({"one": stays, "three": pixels})]
    assert drop_sentence(courses, "in the ledger") == (
        "Of 4 runs in the ledger (4 to 6 epochs), image or pixel AUROC ends 2 points or more below its best "
        "in 2: one, three."
    )
    assert drop_sentence([course_table({"two": stays})], "here") == (
        "Of 1 runs here (6 epochs), image or pixel AUROC ends 2 points or more below its best in none."
    )


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


def test_a_verdict_counts_the_flows_of_which_the_claim_holds() -> None:
    tables = {"a": couplings(), "b": couplings(s_mean=-1.8, s_input=0.01, t_input=0.02)}
    assert claim_sentence(tables).endswith(
        "is seen in 1 of 2 flows; the block that comes nearest has a mean scale of 95 % of the limit."
    )


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


def deep_coupling() -> pd.DataFrame:
    rows = [
        {"epoch": epoch, "level": level, "layer": layer, "group": "train", "s_mean": -layer, "s_input": 0.5}
        for epoch in (2, 4)
        for level in (1, 2)
        for layer in (1, 2, 3)
    ]
    return pd.DataFrame(rows)


def test_a_course_has_a_column_a_run_and_only_evaluated_epochs() -> None:
    courses = {
        "one": history([0.6, 0.8, 0.7], nll=[3, 2, 1]),
        "two": history([0.6, 0.8, 0.7], nll=[3, 2, 1], normal=[-3, -2, -1]).assign(test_overlap=0.2),
    }
    figure = training_course(courses)
    axes = np.array(figure.axes).reshape(3, 2)
    assert [ax.get_title(loc="left") for ax in axes[0]] == ["one", "two"]
    (auroc,) = axes[1, 0].lines
    assert list(np.asarray(auroc.get_xdata())) == [2, 4, 6]
    np.testing.assert_allclose(auroc.get_ydata(), [60, 80, 70])
    assert list(np.asarray(axes[0, 0].lines[0].get_ydata())) == [3, 3, 2, 2, 1, 1]
    # What was not recorded is not drawn.
    assert not axes[2, 0].lines and len(axes[2, 1].lines) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["image AUROC", "overlap", "normal", "anomalous"]


def test_a_course_without_evaluated_epochs_is_not_drawn() -> None:
    with pytest.raises(InputError, match=r"one: expected a history with evaluated epochs.*evaluate_every"):
        training_course({"one": history([0.5], nll=[1]).drop(columns="test_image_auroc")})


def test_couplings_have_a_line_a_block_of_the_deepest_level() -> None:
    table = deep_coupling()
    table.loc[table["level"] == 2, "s_mean"] *= 2
    figure = coupling_course({"one": table}, quantities=("s_mean", "s_input"))
    mean, share = figure.axes
    assert [list(np.asarray(line.get_ydata())) for line in mean.lines[:3]] == [[-2, -2], [-4, -4], [-6, -6]]
    assert [list(np.asarray(line.get_ydata())) for line in share.lines] == [[50, 50]] * 3
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["block 1", "block 2", "block 3"]
