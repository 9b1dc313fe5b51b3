"""How well drawn defects choose settings, out of synthetic lines whose ranks are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hgadbook import choice
from hgadbook.choice import (
    NOT_MEASURED,
    PARTS,
    default_setting,
    one_step,
    one_step_table,
    predicted,
    predicted_table,
    read_choice,
    scatter,
    verdicts,
)
from hgadlib.config import load_config

Metrics = dict[str, float | None]
SHRINKAGE = load_config(experiment="baseline_gaussians").prior.shrinkage


def line(
    drawn: float | Metrics, real: float | Metrics, *, dataset: str = "one", draw: int = 0, **setting: Any
) -> dict[str, Any]:
    """A line of benchmarks/choice.py: the library's default, but for what is given."""
    default = {
        "levels": ["512:16+32", "256:16+32"], "shrinkage": SHRINKAGE, "normalisation": "calibrated",
        "kappa": 5.0, "sigma": None, "image": "maximum", "image_share": 0.01,
    }  # fmt: skip
    metrics = {
        name: values if isinstance(values, dict) else {"image_auroc": values}
        for name, values in (("drawn", drawn), ("real", real))
    }
    return {"what": "setting", "dataset": dataset, "draw": draw} | default | metrics | setting


def read(folder: Path, *lines: dict[str, Any]) -> pd.DataFrame:
    file = folder / "choice.jsonl"
    first = {"what": "environment", "dataset": "one"}
    file.write_text("".join(json.dumps(entry) + "\n" for entry in (first, *lines)), encoding="utf-8")
    return read_choice(file)


def sweep(drawn: list[float], real: list[float], **more: Any) -> list[dict[str, Any]]:
    """Settings that differ in the blur: the first is the default's."""
    sigmas = [None, *map(float, range(1, len(drawn)))]
    return [line(d, r, sigma=s, **more) for d, r, s in zip(drawn, real, sigmas, strict=True)]


def test_lines_become_rows_in_percent(tmp_path: Path) -> None:
    measured: Metrics = {"image_auroc": 0.75, "aupro": 0.5, "pixel_auroc": None}
    found = read(tmp_path, line(measured, 0), line(0.6, 0.7, image="top", image_share=0.003))
    row = found.iloc[0]
    assert [row["drawn_image_auroc"], row["drawn_aupro"]] == [75.0, 50.0]
    assert np.isnan(row["drawn_pixel_auroc"]) and np.isnan(row["real_aupro"])
    assert list(found["image"]) == ["maximum", "top 0.3 %"]
    # The row of the default is the library's own.
    assert row[list(PARTS)].to_dict() == default_setting()


def test_of_a_setting_measured_again_the_last_counts(tmp_path: Path) -> None:
    found = read(tmp_path, line(0.5, 0.5), line(0.6, 0.7))
    assert found["real_image_auroc"].tolist() == [70.0]


def test_rank_correlation_and_what_the_choice_is_worth(tmp_path: Path) -> None:
    with_draws = sweep([0.9, 0.8, 0.7, 0.6], [0.95, 0.9, 0.8, 0.7], dataset="right")
    # By the second draw alone the last setting would be chosen, by the mean the first.
    with_draws += sweep([0.7, 0.6, 0.65, 0.71], [0.85, 0.8, 0.6, 0.5], dataset="right", draw=1)
    wrong = sweep([0.9, 0.8, 0.7, 0.6], [0.5, 0.6, 0.7, 0.8], dataset="wrong")
    table = predicted(read(tmp_path, *with_draws, *wrong))
    assert list(table.index) == ["right", "wrong", "mean"]
    assert table["settings"].tolist() == [4, 4, 4] and table["draws"].tolist()[:2] == [2, 1]
    assert table["rank correlation"].tolist()[:2] == pytest.approx([1.0, -1.0])
    # Real, mean over draws: 90, 85, 70, 60; wrong: 50, 60, 70, 80; their means: 70, 72.5, 70, 70.
    wanted = {"right": (90, 90, 77.5, 90), "wrong": (50, 80, 65, 50), "mean": (70, 72.5, 70, 70)}
    for name, values in wanted.items():
        assert list(table[["chosen", "best", "median", "default"]].T[name]) == pytest.approx(values)


def test_a_draw_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    short = sweep([0.1, 0.9], [0.1, 0.9], draw=1)[:1]
    found = read(tmp_path, *sweep([0.9, 0.8], [0.9, 0.8]), *short)
    table = predicted(found)
    assert [table["draws"]["one"], table["chosen"]["one"]] == pytest.approx([1, 90])


def test_the_mean_is_of_settings_that_all_sets_have(tmp_path: Path) -> None:
    more = sweep([0.7, 0.8, 0.9], [0.7, 0.8, 0.9], dataset="more")
    table = predicted(read(tmp_path, *more, *sweep([0.7, 0.8], [0.7, 0.8])))
    assert table["settings"].tolist() == [3, 2, 2] and table["best"]["mean"] == pytest.approx(80)


@pytest.mark.filterwarnings("error")
def test_equal_results_have_no_rank(tmp_path: Path) -> None:
    found = read(tmp_path, *sweep([0.9, 0.9], [0.8, 0.7]))
    assert np.isnan(predicted(found)["rank correlation"]["one"])
    assert "Rank correlation: not defined." in verdicts(found)


def test_one_step_marks_the_default_and_takes_sets_that_have_all(tmp_path: Path) -> None:
    masks: Metrics = {"image_auroc": 0.8, "aupro": 0.6}
    lines = [line(0.7, masks), line(0.8, masks, sigma=0.0), line(0.9, 0.6, sigma=4.0)]
    lines += [line(0.7, 0.6, dataset="two"), line(0.6, 0.7, sigma=0.0, dataset="two")]
    # Two parts at once: no step.
    lines += [line(0.5, 0.5, normalisation="inductive", sigma=8.0)]
    steps = one_step(read(tmp_path, *lines))
    assert set(steps.index.get_level_values("part")) == {PARTS["sigma"]}
    blur = steps.loc[PARTS["sigma"]]
    assert list(blur.index) == ["half the stride", "0", "4"]
    assert blur["default"].tolist() == [True, False, False] and set(blur["others"]) == {""}
    # "two" lacks a value, so the means are of "one".
    assert blur["drawn_image_auroc"].tolist() == pytest.approx([70, 80, 90]) and set(blur["sets"]) == {1}
    assert blur["real_aupro"].iloc[:2].tolist() == pytest.approx([60, 60])
    assert np.isnan(blur["real_aupro"].iloc[2]) and blur["drawn_aupro"].isna().all()


def test_one_step_averages_over_sets(tmp_path: Path) -> None:
    found = read(tmp_path, *sweep([0.9, 0.8], [0.9, 0.8]), *sweep([0.7, 0.7], [0.5, 0.6], dataset="two"))
    steps = one_step(found).loc[PARTS["sigma"]]
    assert steps["real_image_auroc"].tolist() == pytest.approx([70, 70]) and set(steps["sets"]) == {2}
    assert steps["drawn_image_auroc"].tolist() == pytest.approx([80, 75])


def test_a_part_varied_elsewhere_says_what_else_differs(tmp_path: Path) -> None:
    other = SHRINKAGE * 3
    lines = [line(0.9, 0.9), line(0.8, 0.8, shrinkage=other)]
    lines += [line(0.7, 0.7, shrinkage=other, kappa=kappa) for kappa in (2.0, 20.0)]
    # Further from the default, and more values.
    lines += [line(0.6, 0.6, shrinkage=other, sigma=0.0, kappa=kappa) for kappa in (2.0, 5.0, 20.0, 60.0)]
    steps = one_step(read(tmp_path, *lines))
    kappa = steps.loc[PARTS["kappa"]]
    assert list(kappa.index) == ["2", "5", "20"] and set(kappa["others"]) == {f"shrinkage {other:g}"}
    assert kappa["default"].tolist() == [False, True, False]
    assert set(steps.loc[PARTS["shrinkage"]]["others"]) == {""}


def test_the_table_names_the_default(tmp_path: Path) -> None:
    found = read(tmp_path, *sweep([0.9, 0.8], [0.9, 0.8]))
    styler = one_step_table(found)
    assert [value for _, value in styler.data.index] == ["half the stride (default)", "1"]  # type: ignore[attr-defined]
    assert ".row0" in styler.to_html() and "+1.00" in predicted_table(found).to_html()
    assert "0000" not in predicted_table(found).to_html()  # AUROC has one decimal


def test_the_verdict_counts_sets_and_places_the_default(tmp_path: Path) -> None:
    right = sweep([0.7, 0.8, 0.9], [0.7, 0.8, 0.9], dataset="right")
    wrong = sweep([0.7, 0.8, 0.9], [0.9, 0.8, 0.85], dataset="wrong")
    said = verdicts(read(tmp_path, *right, *wrong))
    assert said[0].startswith(
        "The drawn defects' choice is within 1 point of the best setting on 1 of 2 sets, at most 5.0 points "
        "below it (wrong); it is better than the median setting on 1 of 2."
    )
    assert said[1] == "Rank correlation from -0.50 (wrong) to +1.00 (right)."
    # Means: drawn 70, 80, 90; real 80, 80, 87.5.
    assert "is number 3 of 3 settings for the drawn defects and number 2 for the real ones" in said[2]
    gap = "has −20.0 points on drawn defects and −7.5 on real ones."
    assert said[2].endswith(f"their choice has sigma 2. Beside it the default {gap}")
    assert said[3] == f"{PARTS['sigma']}: the drawn defects choose 2; the default, half the stride, {gap}"


def test_the_verdict_where_the_default_is_the_choice(tmp_path: Path) -> None:
    said = verdicts(read(tmp_path, *sweep([0.9, 0.8], [0.7, 0.8])))
    assert said[2].endswith("it is the drawn defects' choice.")
    assert said[3].endswith("the drawn defects choose the default, half the stride; best on real ones is 1.")


def test_the_figure_marks_default_and_choice(tmp_path: Path) -> None:
    found = read(tmp_path, *sweep([0.7, 0.9], [0.6, 0.8]), *sweep([0.9, 0.8], [0.5, 0.6], dataset="$2"))
    figure = scatter(found)
    one, two = figure.axes
    points = np.concatenate([np.column_stack(mark.get_data()) for mark in one.lines[1:]])
    assert points.tolist() == [pytest.approx([70, 60]), pytest.approx([90, 80])]
    assert one.get_title(loc="left") == "one: rank correlation +1.00"
    assert two.get_title(loc="left") == "\\$2: rank correlation -1.00"


def test_nothing_measured(tmp_path: Path) -> None:
    found = read_choice(tmp_path / "missing.jsonl")
    assert found.empty and {"dataset", "draw", *PARTS, "real_aupro"} <= set(found)
    assert predicted(found).empty and one_step(found).empty and verdicts(found) == []
    predicted_table(found).to_html()
    one_step_table(found).to_html()
    [ax] = scatter(found).axes
    assert ax.texts[0].get_text().replace("\n", " ") == NOT_MEASURED


def fit_lines(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {
            "what": "epoch", "dataset": name, "change": change, "epoch": epoch, "drawn_auroc": 0.5,
            "real_auroc": 0.5 + (0.25 if change == "noise" else 0.125) * epoch,
            "trained_log_prob": 0.0, "held_out_log_prob": -1.0 * epoch,
        }
        for name in ("demo", "elpv", "x") for change in ("start", "noise")[: 1 + (name != "x")]
        for epoch in (0, 1)
    ]  # fmt: skip
    lines += [
        {"what": "classes", "dataset": "demo", "change": "default", "together": k, "real_auroc": k / 8}
        for k in (1, 2)
    ]
    parts = {"default": ("demo", "elpv", "x"), "1 centre": ("demo", "elpv")}
    lines += [
        {"what": "prior", "dataset": name, "change": change, "drawn_image_auroc": 0.5}
        | ({"real_aupro": 0.25 + 0.5 * (change == "default")} if name == "demo" else {})
        for change, names in parts.items()
        for name in names
    ]
    file = tmp_path / "fit.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_fit_is_set_out_by_its_last_epoch_over_whole_sets(tmp_path: Path) -> None:
    found = choice.read_fit("epoch", fit_lines(tmp_path))
    table = choice.fit_table(found).data  # type: ignore[attr-defined]
    assert table["real image (%)"].to_dict() == {"untrained": 50.0, "start": 62.5, "noise": 75.0}
    assert table["log-likelihood, held out"].to_dict() == {"untrained": 0.0, "start": -1.0, "noise": -1.0}
    titles = [ax.get_title(loc="left") for ax in choice.fit_curves(found).axes if ax.lines]
    assert titles == ["demo", "elpv", "x"]


def test_models_of_some_classes_stand_side_by_side(tmp_path: Path) -> None:
    table = choice.classes_table(choice.read_fit("classes", fit_lines(tmp_path))).data  # type: ignore[attr-defined]
    assert table.loc[("demo", "default")].tolist() == [12.5, 25.0]


def test_parts_of_the_prior_are_compared_over_sets_that_have_them_all(tmp_path: Path) -> None:
    styler = choice.priors_table(choice.read_fit("prior", fit_lines(tmp_path)))
    table = styler.data  # type: ignore[attr-defined]
    assert table["drawn, image (%)"].to_dict() == {"default": 50.0, "1 centre": 50.0}
    assert table["real, AUPRO (%)"].to_dict() == {"default": 75.0, "1 centre": 25.0}
    assert "Means over demo, elpv" in styler.to_html() and "–" in styler.to_html()


def test_the_verdict_on_the_prior_is_computed() -> None:
    figures = {
        "default": (50.0, 70.0),
        "no flow": (49.0, 71.0),
        "1 centre": (40.0, 40.0),
        "more": (60.0, 80.0),
    }
    found = pd.DataFrame(
        [
            {"dataset": "demo", "change": change, "drawn_image_auroc": drawn, "real_image_auroc": real}
            for change, (drawn, real) in figures.items()
        ],
        columns=["dataset", "change", *choice._PRIOR_METRICS],
    )
    said = choice.priors_verdict(found)
    assert "choose: more." in said and "the 4 priors" in said and "correlation of 0.80" in said
    assert "+1.0 points" in said and "-1.0 on the test set" in said


def test_a_fit_that_was_not_measured_is_said(tmp_path: Path) -> None:
    found = choice.read_fit("epoch", tmp_path / "none.jsonl")
    assert found.empty and choice.read_fit("classes", tmp_path / "none.jsonl").empty
    assert "not measured" in choice.fit_curves(found).axes[0].texts[0].get_text()
