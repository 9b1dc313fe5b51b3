"""The paper's table beside ours: which runs count for a row, means, intervals, verdicts, rows to train."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
from small import folder_config, image_folder

from hgadbook.ablations import (
    Criterion,
    claim_sentences,
    compare,
    comparison_table,
    half_width,
    load_ablation,
    runs_to_train,
    show_departures,
    show_points,
    show_switches,
    train,
    verdict,
)
from hgadbook.results import all_claims, claims_table, leads, mean_over_seeds, method_runs
from hgadlib.errors import InputError
from hgadlib.runs.ledger import image_title, problems

HIERARCHY = load_ablation("table3a")


def record(
    experiment: str, seed: int, image: float, *, dataset: str = "demo", note: str = ""
) -> dict[str, Any]:
    """Make a record of the grid's settings; pixel AUROC is there but for elpv, the likelihood 0.1 better."""
    config = HIERARCHY.grid.config(dataset, experiment, seed)
    single = config.prior.kind == "single"

    def metrics(value: float) -> dict[str, float | None]:
        return {"image_auroc": value, "pixel_auroc": None if dataset == "elpv" else value + 0.05}

    scores = {"inductive/likelihood": metrics(image if single else image + 0.1)}
    scores |= {} if single else {"inductive/both": metrics(image), "inductive/entropy": metrics(image - 0.1)}
    digest = hashlib.sha256(f"{dataset}{note}".encode()).hexdigest()
    return {
        "dataset": dataset,
        "experiment": experiment,
        "seed": seed,
        "protocol": {"criterion": "likelihood" if single else "both"},
        "note": note,
        "mean": metrics(image),
        "per_class": {"a": metrics(image)},
        "other_protocols": scores,
        "counts": {"train": 3, "test_normal": 2, "test_anomalous": 1},
        "config": config.identity(),
        "config_digest": config.digest,
        "data": {"digest": digest, "classes": ["a"]},
        "record": f"{dataset}-{experiment}-seed{seed}-{config.digest[:8]}-{digest[:8]}",
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    made = [record("tab3a_sgc", s, v) for s, v in ((0, 0.70), (1, 0.72), (2, 0.74))]
    made += [record("tab3a_full", s, v) for s, v in ((0, 0.75), (1, 0.77), (2, 0.80))]
    made += [record("tab3a_full", 0, 0.6, dataset="elpv")]
    return [*made, record("tab3a_full", 0, 0.65, dataset="folder", note="boards: own split")]


def test_rows_are_the_papers_in_its_order_and_own_points_are_named_by_their_weights() -> None:
    assert next(iter(HIERARCHY.labels.values())) == "SGC" and HIERARCHY.reference == "tab3a_full"
    lambdas = load_ablation("table3d")
    assert list(lambdas.labels.values())[:3] == ["(1, 1)", "(1, 5)", "(1, 10)"]
    assert (lambdas.reference, load_ablation("table3c").reference) == ("tab3d_1_10", "tab3c_both")
    switches: Any = show_switches(load_ablation("table3b"))
    assert switches.data.loc["M = 3", ""] == "prior.n_centers = 3"
    departures: Any = show_departures(HIERARCHY)
    assert "features.backbone" in departures.data.index


def test_table_says_paper_ours_difference_and_names_the_runs(records: list[dict[str, Any]]) -> None:
    comparison = compare(HIERARCHY, records)
    table: Any = comparison.tables["demo"].set_index(["experiment", "metric"])
    row = table.loc["tab3a_sgc", "image_auroc"]
    assert row["paper"] == 89.0 and row["ours"] == pytest.approx(72.0) and row["seeds"] == 3
    assert row["difference"] == pytest.approx(-17.0)
    # t(0.975, 2) = 4.3027, s = 2.
    assert row["half_width"] == pytest.approx(4.3027 * 2 / math.sqrt(3), rel=1e-4)
    assert row["records"] == [found["record"] for found in records[:3]]
    assert table.loc["tab3a_fmc", "image_auroc"]["seeds"] == 0
    styler: Any = comparison_table(comparison, "demo")
    shown = styler.data
    assert shown.loc["FMC", ("image AUROC (%)", "ours")] == "not measured"
    assert shown.loc["FMC + Intra", ("image AUROC (%)", "paper")] == "unreadable"
    assert records[1]["record"] in shown.loc["SGC", ("", "runs")]


def test_sets_of_images_stay_apart_and_without_masks_there_is_no_pixel_column(
    records: list[dict[str, Any]],
) -> None:
    comparison = compare(HIERARCHY, records)
    assert list(comparison.tables) == list(comparison.claims) == ["demo", "elpv", "boards"]
    assert set(comparison.claims["elpv"]["metric"]) == {"image_auroc"}
    styler: Any = comparison_table(comparison, "elpv")
    assert {head for head, _ in styler.data.columns} == {"image AUROC (%)", ""}
    # Other images under the same name are another set.
    other = copy.deepcopy(records[0])
    other["data"]["digest"] = "0" * 64
    both = compare(HIERARCHY, [*records, other]).tables
    assert "demo (00000000)" in both and "demo" not in both
    assert list(compare(HIERARCHY, []).tables) == ["demo", "elpv"]


def test_criteria_come_out_of_the_same_record(records: list[dict[str, Any]]) -> None:
    def ours(table: str, experiment: str, criterion: Criterion = "own") -> float:
        found: Any = compare(load_ablation(table), records, criterion=criterion).tables["demo"]
        return float(found.set_index(["experiment", "metric"]).loc[(experiment, "image_auroc"), "ours"])

    assert ours("table3a", "tab3a_full") == pytest.approx(77.333, abs=1e-3)
    assert ours("table3a", "tab3a_full", "likelihood") == pytest.approx(87.333, abs=1e-3)
    assert ours("table3a", "tab3a_sgc", "likelihood") == pytest.approx(72.0)
    # Rows of another table that train the same: one run, three scores.
    assert ours("table3c", "tab3c_entropy") == pytest.approx(67.333, abs=1e-3)
    assert ours("table3b", "tab3b_10") == pytest.approx(77.333, abs=1e-3)


def test_orderings_are_judged_seed_by_seed(records: list[dict[str, Any]]) -> None:
    # A seed that one row alone has says nothing of their difference.
    comparison = compare(HIERARCHY, [*records, record("tab3a_full", 3, 0.1)])
    claims: Any = comparison.claims["demo"].set_index(["claim", "metric"])
    row = claims.loc["ICG + MIM + Intra over SGC", "image_auroc"]
    assert (row["verdict"], row["agree"], row["seeds"]) == ("seen", 3, 3)
    assert row["paper"] == pytest.approx(8.7) and row["ours"] == pytest.approx(16 / 3)
    assert row["half_width"] == pytest.approx(half_width([5, 5, 6]))
    assert claims.loc["FMC over SGC", "image_auroc"]["verdict"] == "not measured"
    # The table's row cannot be read: what the sentence states.
    assert claims.loc["FMC + Intra over FMC", "image_auroc"]["paper"] == 1.6
    said = claim_sentences(comparison)
    assert said == [
        "Of the paper's orderings of image AUROC, scored as in the paper, seen on some set and opposite on "
        "none: ICG + MIM + Intra over SGC.",
        "Of image and pixel AUROC, scored as in the paper: on demo 2 seen, 0 opposite, 0 undecided.",
        "MVTec AD, the images of the paper's table, was not measured here.",
    ]


def test_a_chapters_verdict_names_what_is_opposite_and_lets_one_run_decide_nothing() -> None:
    made = [record("tab3a_sgc", s, v) for s, v in ((0, 0.9), (1, 0.91))]
    made += [record("tab3a_full", s, v) for s, v in ((0, 0.6), (1, 0.61))]
    alone = [record(name, 0, 0.7, dataset="mvtec") for name in ("tab3a_sgc", "tab3a_full")]
    own, plain = (compare(HIERARCHY, [*made, *alone], criterion=by) for by in ("own", "likelihood"))
    said = claim_sentences(own, plain, words={"SGC": "one Gaussian"})
    assert said[0].endswith("opposite on some set and seen on none: ICG + MIM + Intra over one Gaussian.")
    assert "scored as in the paper: on demo 0 seen, 2 opposite, 0 undecided; on mvtec" in said[1]
    assert said[1].endswith("on mvtec 0 seen, 0 opposite, 2 undecided (2 by one run).")
    assert len(said) == 3  # MVTec AD was measured
    nothing = claim_sentences(compare(HIERARCHY, []))
    assert nothing[0].endswith("none was measured.") and nothing[1].endswith("none measured.")


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-1.0, -1.1, -0.9], "opposite"),
        ([3.0, -1.0, 1.0], "undecided"),
        ([0.0, 0.0], "undecided"),
        ([0.4], "same sign, one run"),
        ([0.0], "no difference, one run"),
    ],
)
def test_verdicts(differences: list[float], expected: str) -> None:
    assert verdict(differences) == expected
    assert math.isnan(half_width(differences[:1]))


def test_figure_has_every_run_and_the_papers_number(records: list[dict[str, Any]]) -> None:
    comparison = compare(HIERARCHY, records)
    demo = show_points(comparison).axes[0]
    assert demo.get_xlabel() == "AUROC (%)" and len(demo.figure.axes) == 3
    points: list[Any] = [line.get_xdata() for line in demo.lines if line.get_marker() == "o"]
    drawn = sorted(float(x) for some in points for x in some)
    assert drawn == pytest.approx(sorted(comparison.runs.query("images == 'demo'")["value"]))
    plt.close("all")


def test_rows_to_train_are_those_that_lack_and_wrong_ones_are_refused(records: list[dict[str, Any]]) -> None:
    def chosen(rows: Any, table: str = "table3a", seed: int = 0) -> list[str]:
        configs = runs_to_train(load_ablation(table), records, rows, dataset="demo", seed=seed)
        return [config.experiment for config in configs]

    assert chosen([]) == []
    assert chosen("missing") == ["tab3a_fmc", "tab3a_icg", "tab3a_icg_mim", "tab3a_fmc_intra"]
    assert len(chosen("missing", seed=5)) == 6
    # A shared row lies where the grid's run lies.
    assert chosen(["tab3c_both", "tab3c_entropy"], "table3c") == ["tab3a_full"]
    with pytest.raises(InputError, match=r"expected some of tab3a_sgc.* found tab3b_3"):
        chosen(["tab3b_3"])
    with pytest.raises(InputError, match="or missing, found 'all'"):
        chosen("all")


def test_a_run_made_here_has_a_record_named_by_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "folder" / "tab3a_full" / "seed0"
    config = folder_config(image_folder(tmp_path / "images"), run, data={"image_size": 32})
    made = train(config)
    assert made["record"] == "run here: folder/tab3a_full/seed0" and problems(made)[1:] == []
    assert made["config_digest"] == config.digest and made["epochs"] == 2
    # A second time it is loaded.
    assert train(config)["timing"] == made["timing"]


def test_hgad_and_the_single_gaussian_under_equal_settings(records: list[dict[str, Any]]) -> None:
    runs = method_runs(records)
    found = leads(runs).to_dict("records")
    assert [line["images"] for line in found] == ["demo"]
    assert found[0]["differences"] == pytest.approx([5, 5, 6]) and found[0]["method"] == "HGAD, lambda2 = 10"
    means = mean_over_seeds(runs[runs["class"] == "mean"]).set_index(["images", "method"])
    assert means.loc[("demo", "single Gaussian"), "image_auroc"] == "72.0\xa0±\xa05.0"
    assert means.loc[("elpv", "HGAD, lambda2 = 10"), "pixel_auroc"] == "–"
    longer = copy.deepcopy(records[0])
    longer["config"]["train"]["epochs"] = 99
    assert method_runs([*records, longer])["settings"].nunique() == 2
    # A class called "mean" is no mean.
    longer["per_class"] = {"mean": {"image_auroc": 0.1, "pixel_auroc": None}}
    named = method_runs([longer])
    assert named["class"].tolist() == ["class mean", "mean"]
    assert named["image_auroc"].tolist() == pytest.approx([10, 100 * longer["mean"]["image_auroc"]])


def test_every_claim_of_all_tables_is_held_against_the_ledger(records: list[dict[str, Any]]) -> None:
    found = all_claims(records)
    assert set(found["table"]) == {"3a", "3b", "3c", "3d", "3e"}
    whole: Any = found[found["claim"] == "ICG + MIM + Intra over SGC"].set_index(["images", "metric"])
    line = whole.loc[("demo", "image_auroc")]
    assert (line["verdict"], line["seeds"], line["ours"]) == ("seen", 3, pytest.approx(16 / 3))
    assert whole.loc[("elpv", "image_auroc"), "verdict"] == "not measured"
    plain = all_claims(records, criterion="likelihood")
    assert set(plain["table"]) == {"3a", "3b", "3d", "3e"}
    # Ten points more of HGAD's, none of the single Gaussian's.
    lead = plain[(plain["claim"] == "ICG + MIM + Intra over SGC") & (plain["images"] == "demo")]
    assert list(lead["ours"]) == pytest.approx([46 / 3] * 2)
    styler: Any = claims_table(found, caption="", name="f")
    shown = styler.data
    assert shown.loc["3a: ICG + MIM + Intra over SGC", "demo"] == "+5.3\xa0±\xa01.4, seen"
    assert shown.loc["3a: FMC over SGC", "demo"] == "not measured"
    assert len(shown) == len(found[found["metric"] == "image_auroc"][["table", "claim"]].drop_duplicates())


def test_a_record_is_checked_against_itself(records: list[dict[str, Any]]) -> None:
    good = records[0]
    assert problems(good) == [] and image_title(records[-1]) == "boards"
    for change, message in (
        ({"mean": {**good["mean"], "image_auroc": 0.1}}, "image_auroc: the mean is not"),
        ({"config": {**good["config"], "seed": 9}}, "not that of its digest"),
        ({"record": "demo-x"}, "not named by its digests"),
        ({"config": {**good["config"], "surplus": 1}}, "does not resolve"),
        ({"per_class": {"a": {"image_auroc": 1.2, "pixel_auroc": None}}}, "not a share"),
    ):
        assert any(message in said for said in problems({**good, **change})), message


def test_committed_records_hold_together() -> None:
    for file in (Path(__file__).parents[1] / "results" / "runs").glob("*.json"):
        assert problems(json.loads(file.read_text()) | {"record": file.stem}) == [], file.name


def test_unknown_tables_and_grids_are_one_line() -> None:
    with pytest.raises(InputError, match="one of table1"):
        load_ablation("table9")
    with pytest.raises(InputError, match="expected experiments named tab1_"):
        load_ablation("table1")
