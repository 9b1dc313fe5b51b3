"""The comparison of all methods out of synthetic records: rows, leads, ranks, the paper's ordering, costs."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hgadbook import rivals
from hgadlib.config import run_name
from hgadlib.runs.grid import load_grid

# How far a method parts normal from anomalous images; HGAD is better than all but one.
GAINS = {"hgad": 1.5, "baseline_gaussians": 0.4, "baseline_neighbours": 2.5, "baseline_cflow": 0.5}


def record(name: str, seed: int, *, grid: str = "baselines", dataset: str = "demo") -> dict[str, Any]:
    """A record of two classes of 60 images; without unified training all is a little better."""
    config = load_grid(grid).config(dataset, name, seed)
    gain = GAINS[name] + (0.3 if grid != "baselines" else 0.0)
    rng, scores = np.random.default_rng(7), {}
    per_class: dict[str, dict[str, float | None]] = {}
    for k in ("b", "a"):
        labels, hard = np.arange(60) % 2, rng.normal(size=60)
        own = hard + 0.2 * np.random.default_rng([seed, len(name)]).normal(size=60) + gain * labels
        scores[k] = {"labels": "".join(map(str, labels)), "scores": " ".join(f"{x:.4g}" for x in own)}
        auroc = float(roc_auc_score(labels, own))
        per_class[k] = {"image_auroc": auroc, "pixel_auroc": None, "aupro": None}
    mean = sum(own["image_auroc"] or 0.0 for own in per_class.values()) / 2
    return {
        "dataset": dataset, "experiment": name, "seed": seed, "per_class": per_class,
        "mean": {"image_auroc": mean, "pixel_auroc": None, "aupro": None},
        "protocol": {"normalisation": config.score.normalisation, "criterion": config.criterion},
        "config": config.identity(), "data": {"digest": dataset}, "image_scores": scores, "epochs": 3,
        "record": f"{dataset}-{name}-{seed}", "timing": {"train_s": 61.2, "predict_images_per_s": 4.5},
        "environment": {"device": "a processor"}, "note": "beside other work: its times are no measure",
        "cost": {
            "multiply_adds": {"backbone": 2 * 10**9, "method": 10**9},
            "numbers": {"backbone": 5, "learnt": 3 * 10**6, "stored": 0},
        },
    }  # fmt: skip


def found(datasets: tuple[str, ...] = ("demo", "elpv")) -> list[dict[str, Any]]:
    made = [record(name, seed, dataset=d) for d in datasets for name in GAINS for seed in (0, 1)]
    return [*made, record("hgad", 0, grid="baselines_one_for_one")]


def test_runs_of_both_settings_are_told_apart() -> None:
    together, apart = (rivals.rival_runs(found(), setting) for setting in ("unified", "one_for_one"))
    assert list(together) == ["demo", "elpv"]
    assert all(set(runs) == set(GAINS) for runs in together.values())
    assert {images: list(runs) for images, runs in apart.items()} == {"demo": ["hgad"]}
    config = load_grid("baselines_one_for_one").config("demo", "hgad", 0)
    assert run_name(config) == "demo/hgad-one_for_one/seed0"


def test_every_method_of_a_grid_has_a_title() -> None:
    for name in ("baselines", "baselines_one_for_one"):
        assert set(load_grid(name).experiments) <= set(rivals.TITLES)


def test_the_table_is_sorted_and_sets_models_of_one_class_beside() -> None:
    together, apart = (rivals.rival_runs(found(), setting) for setting in ("unified", "one_for_one"))
    table = rivals.accuracy_table("demo", together["demo"], apart["demo"]).data  # type: ignore[attr-defined]
    assert list(table.index) == [
        "neighbours, a bank per class", "HGAD", "CFLOW", "a Gaussian per class",
    ]  # fmt: skip
    assert table.loc["HGAD", "HGAD's lead, image"] == "–"
    assert table.loc["CFLOW", "HGAD's lead, image"].startswith("+")
    assert table.loc["neighbours, a bank per class", "HGAD's lead, image"].startswith("−")
    one, other = apart["demo"]["hgad"][0]["mean"], together["demo"]["hgad"][0]["mean"]
    gain = 100 * (one["image_auroc"] - other["image_auroc"])
    assert table.loc["HGAD", "gain apart"] == f"{gain:+.1f}" and gain > 1
    assert table.loc["CFLOW", "apart"] == table.loc["CFLOW", "gain apart"] == "–"
    assert "pixel" not in table  # no run has it
    # A method without runs is named, so that none vanishes from the comparison.
    shown = rivals.accuracy_table("demo", together["demo"], {})
    assert "apart" not in shown.data  # type: ignore[attr-defined]
    assert "not measured: HGAD at 256 pixels, FastFlow, PaDiM, PatchCore" in shown.to_html()


def test_the_papers_ordering_gets_a_verdict_each() -> None:
    table = rivals.ordering_table(rivals.rival_runs(found())).data  # type: ignore[attr-defined]
    assert table.loc["CFLOW", "paper"] == "+9.4" and table.loc["CFLOW", "verdict"] == "seen"
    assert table.loc["neighbours, a bank per class", "verdict"] == "HGAD behind"
    assert table.loc["a Gaussian per class", "verdict"] == "HGAD ahead"
    assert table.loc["neighbours, a bank per class", "paper"] == "–"
    GAINS["baseline_cflow"] = 2.5
    try:
        table = rivals.ordering_table(rivals.rival_runs(found())).data  # type: ignore[attr-defined]
    finally:
        GAINS["baseline_cflow"] = 0.5
    assert table.loc["CFLOW", "verdict"] == "opposite"
    assert rivals.ordering_table({}).data.empty  # type: ignore[attr-defined]


def test_the_ordering_in_a_sentence() -> None:
    both = [r for r in found() if (r["dataset"], r["experiment"]) != ("elpv", "baseline_cflow")]
    assert rivals.ordering_sentence(rivals.rival_runs(both)) == (
        "Of 3 other ways to detect, HGAD's default is ahead of 2: CFLOW (demo), a Gaussian per class; "
        "behind 1: neighbours, a bank per class."
    )
    table = rivals.ordering_table(rivals.rival_runs(both)).data  # type: ignore[attr-defined]
    assert list(table) == ["paper", "demo", "elpv", "mean", "verdict"]
    assert table.loc["CFLOW", "elpv"] == "not measured"
    assert rivals.ordering_sentence({}) == "Other methods: not measured yet."


def test_ranks_are_of_the_classes_that_all_have() -> None:
    values = rivals.class_ranks(rivals.rival_runs(found()))
    assert values.shape == (4, 4) and list(values.index[:2]) == ["HGAD", "CFLOW"]
    partly = [r for r in found() if (r["dataset"], r["experiment"]) != ("elpv", "baseline_cflow")]
    assert "CFLOW" not in rivals.class_ranks(rivals.rival_runs(partly)).index
    assert rivals.class_ranks({}).empty
    ax = rivals.rank_diagram(values)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[:2] == ["neighbours, a bank per class", "HGAD"]
    # Four methods over four classes: ranks 1 and 4 are further apart than 2.35, neighbours in rank are not.
    assert rivals.critical_difference(4, 4) == pytest.approx(2.345, abs=1e-3)
    drawn = [np.asarray(line.get_data()) for line in ax.lines]
    bars = [list(y) for x, y in drawn if len(set(x)) == 1]
    assert bars == [[0, 2], [1, 3]]
    plt.close("all")


def test_costs_are_of_the_same_runs_and_busy_machines_are_named() -> None:
    partly = [r for r in found() if (r["dataset"], r["experiment"]) != ("elpv", "baseline_cflow")]
    runs = rivals.rival_runs(partly)
    table = rivals.cost_table(runs)
    row = table.data.loc["HGAD"]  # type: ignore[attr-defined]
    assert row["G multiply-adds"] == "2.0\xa0+\xa01.00" and row["learnt (M)"] == "3.0"
    assert row["needs"] == "classes" and row["fit, demo (min)"] == row["fit, elpv (min)"] == "1.0*"
    assert table.data.loc["CFLOW", "fit, elpv (min)"] == "–"  # type: ignore[attr-defined]
    assert table.caption == "On a processor; * beside other work: no measure"  # type: ignore[attr-defined]
    del runs["demo"]["hgad"][0]["cost"]  # a record of before
    assert rivals.cost_table(runs).data.loc["HGAD", "learnt (M)"] == "–"  # type: ignore[attr-defined]
    assert rivals.cost_table({}).data.empty  # type: ignore[attr-defined]
