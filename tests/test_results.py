"""The comparison of priors out of synthetic records: which runs count, leads with intervals, verdicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hgadbook.results import (
    candidate_gains,
    lead_sentence,
    prior_lead,
    prior_runs,
    prior_table,
    verdict_table,
)
from hgadlib.runs.grid import load_grid

GRID = load_grid("prior")


def record(experiment: str, seed: int, gain: float, *, dataset: str = "demo", **more: Any) -> dict[str, Any]:
    """A record of two classes, 40 images each, whose last one nobody has labelled; gain parts the kinds."""
    config = GRID.config(dataset, experiment, seed)
    rng, scores, aurocs = np.random.default_rng(5), {}, []
    for name in ("b", "a"):
        labels, hard = np.arange(40) % 2 == 0, rng.normal(size=40)
        own = hard + 0.2 * np.random.default_rng([seed, len(experiment)]).normal(size=40) + gain * labels
        text = "".join("10"[not x] for x in labels[:-1]) + "?"
        scores[name] = {"labels": text, "scores": " ".join(f"{x:.4g}" for x in own)}
        aurocs.append(roc_auc_score(labels[:-1], own[:-1]))
    mean = {"image_auroc": float(np.mean(aurocs)), "pixel_auroc": None}
    return {
        "dataset": dataset, "experiment": experiment, "seed": seed, "mean": mean,
        "protocol": {"normalisation": config.score.normalisation, "criterion": config.criterion},
        "config": config.identity(), "data": {"digest": dataset}, "image_scores": scores,
        "record": f"{dataset}-{experiment}-{seed}", **more,
    }  # fmt: skip


def records(*, dataset: str = "demo") -> list[dict[str, Any]]:
    gains = {"prior_covariance_affine": 1.5, "prior_single_affine": 0.5, "baseline_neighbours": 1.5}
    inferred = {"accuracy": 1.0, "mean": {"image_auroc": 0.625, "pixel_auroc": None}}
    made = [record(name, seed, gain, dataset=dataset) for name, gain in gains.items() for seed in (0, 1)]
    return [r | ({"inferred": inferred} if "covariance" in r["experiment"] else {}) for r in made]


def test_runs_count_by_what_they_train_under_the_settings_of_today() -> None:
    own = record("prior_identity_affine", 0, 1.0)
    # The default experiment trains the same; a run of before has no scores of images.
    same = own | {"config": own["config"] | {"experiment": "hgad"}, "image_scores": {}, "record": "old"}
    other = own | {
        "config": own["config"] | {"flow": own["config"]["flow"] | {"layers": 3}},
        "record": "other",
    }
    product = own | {"protocol": {"normalisation": "inductive", "criterion": "both"}, "record": "product"}
    for found in ([same, own, other, product], [own, same, other, product]):
        assert prior_runs(found) == {"demo": {"prior_identity_affine": {0: own}}}
    assert prior_runs([same])["demo"]["prior_identity_affine"][0]["record"] == "old"
    assert prior_runs([]) == {}


def test_a_lead_is_the_difference_of_the_aurocs_of_labelled_images() -> None:
    runs = prior_runs(records())["demo"]
    lead = prior_lead(runs, "prior_covariance_affine", "prior_single_affine")
    means = [
        [runs[f"prior_{p}_affine"][s]["mean"]["image_auroc"] for s in (0, 1)]
        for p in ("covariance", "single")
    ]
    assert lead is not None and lead[0] == pytest.approx(
        100 * (np.mean(means[0]) - np.mean(means[1])), abs=0.2
    )
    assert lead[1].mean() == pytest.approx(lead[0], abs=1.0) and lead[1].std() > 0.5
    assert prior_lead(runs, "prior_covariance_affine", "prior_single_none") is None


def test_the_table_has_every_row_and_says_what_is_not_measured() -> None:
    table = prior_table("demo", prior_runs(records())["demo"]).data  # type: ignore[attr-defined]
    assert len(table) == len(GRID.experiments) == 11
    row = table.loc["mixture, Sigma_y; affine"]
    assert row["image, inferred"] == "62.5\xa0±\xa00.0" and ">2<" in row["runs"]
    assert "pixel" not in table  # no run has it
    assert row["image, to single"].startswith("+") and row["image, to neighbours"].endswith("]")
    assert table.loc["mixture, I; affine", "image, to single"] == "not measured"
    assert table.loc["single Gaussian; affine", "image, to single"] == "–"


def test_verdicts_follow_from_the_intervals_also_over_sets() -> None:
    shown = verdict_table(prior_runs(records() + records(dataset="elpv")))
    table = shown.data  # type: ignore[attr-defined]
    assert list(table) == ["demo", "elpv", "mean", "verdict"]
    mixture = "mixture, Sigma_y; affine, over"
    assert table["verdict"].to_dict() == {  # nothing of what was not run
        f"{mixture} single Gaussian; affine": "better", f"{mixture} nearest neighbours": "not told apart",
    }  # fmt: skip
    # What is told apart is bold, in the sets as in their mean.
    styles = shown.to_html().split("</style>")[0].split("font-weight: bold")[0].split("}")[-1]
    assert {f"row0_col{i}" in styles for i in range(3)} == {True} and "row1_col" not in styles

    worse = [record("prior_identity_affine", 0, 0.1), record("baseline_neighbours", 0, 2.0)]
    assert list(verdict_table(prior_runs(worse)).data["verdict"]) == ["worse"]  # type: ignore[attr-defined]
    assert verdict_table({}).data.empty  # type: ignore[attr-defined]


def test_a_sentence_sums_the_leads_over_all_sets_up() -> None:
    made = records() + [r for r in records(dataset="elpv") if "single" not in r["experiment"]]
    found = prior_runs(made)
    said = lead_sentence(found, "prior_covariance_affine", "the mixture")
    start = (
        "By image AUROC on 2 sets of images, the mixture detects better than one Gaussian for all classes (+"
    )
    assert said.startswith(start) and ", on demo only); not measurably better or worse than nearest" in said
    mean = verdict_table(found).data["mean"].iloc[-1]  # type: ignore[attr-defined]
    assert mean.replace(" [", " points [") in said

    worse = [record("prior_identity_affine", 0, 0.1), record("baseline_neighbours", 0, 2.0)]
    said = lead_sentence(prior_runs(worse), "prior_identity_affine", "it")
    assert said.startswith(
        "By image AUROC on one set of images (demo), it detects worse than nearest neighbours (−"
    )
    assert lead_sentence({}, "hgad", "it") == "Not measured yet: it."


def test_other_ways_to_evaluate_are_set_beside_the_headline() -> None:
    mean = {"image_auroc": 0.5, "pixel_auroc": None}
    whole: dict[str, Any] = {
        "mean": mean, "best_epoch": {"image_auroc": {"epoch": 2, "value": 0.625}},
        "other_protocols": {"transductive/likelihood": {"image_auroc": 0.25}},
        "inferred": {"accuracy": 0.9, "mean": {"image_auroc": 0.4375}},
    }  # fmt: skip
    made = [
        record("prior_covariance_affine", 0, 1.0, **whole),
        record("prior_single_affine", 0, 1.0, mean=mean, best_epoch={}, other_protocols={}),
    ]
    table = candidate_gains(prior_runs(made))
    assert table["demo"].to_dict() == {
        ("scores normalised over the test set", "mixture, Sigma_y; affine"): -25.0,
        ("the class inferred, not known", "mixture, Sigma_y; affine"): -6.25,
        ("the epoch best on the test set", "mixture, Sigma_y; affine"): 12.5,
    }
    assert candidate_gains({}).empty


def test_the_default_has_a_grid_of_its_own() -> None:
    own = load_grid("default").config("demo", "hgad", 0)
    made = record("hgad", 0, 1.0) | {"config": own.identity()}
    found = prior_runs([made], "default")
    assert found == {"demo": {"hgad": {0: made}}} and prior_runs([made]) == {}
    rows = prior_table("demo", found["demo"], "default").data  # type: ignore[attr-defined]
    assert rows.index[0] == "HGAD, the default" and len(rows) == 4
    assert verdict_table(found).data.empty  # type: ignore[attr-defined]
