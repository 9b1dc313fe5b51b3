"""How images are ranked and chosen, and what a comparison of maps draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from matplotlib.colors import AsinhNorm
from small import folder_config, image_folder

from hgadbook.qualitative import (
    EXPERIMENTS,
    Models,
    changed_settings,
    compare_maps,
    map_comparison,
    map_limits,
    normal_rank,
    rank_sentences,
    resolution_sentence,
    run_table,
    telling_images,
)
from hgadlib.config import load_config
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.gallery import gallery
from hgadlib.runs.inputs import Inputs, prepare

ROOT = Path(__file__).resolve().parents[1]

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


def test_the_default_and_the_single_gaussian_differ_in_the_prior_alone() -> None:
    one, other = (load_config(dataset="demo", experiment=name) for name in EXPERIMENTS.values())
    changes = changed_settings(one, other)
    assert changes["prior.kind"] == ("single", "mixture")
    assert all(key.startswith("prior.") for key in changes)
    faster = load_config(dataset="demo", seed=3, overrides={"train.lr": 0.5})
    assert changed_settings(other, faster) == {"seed": (0, 3), "train.lr": (other.train.lr, 0.5)}


@pytest.mark.parametrize("folder", ["ci", "book"])
def test_in_a_build_the_default_is_the_run_of_the_train_chapter(folder: str) -> None:
    train, own = (
        yaml.safe_load((ROOT / "params" / folder / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("train", "qualitative")
    )
    assert set(own) <= {"overrides", "others"}
    found = load_config(dataset="demo", experiment=EXPERIMENTS["HGAD"], overrides=own["overrides"])
    assert found.digest == load_config(train).digest


def test_resolution_by_level() -> None:
    config = load_config(
        dataset="demo", overrides={"features.pyramid": [96, 64], "data.image_size": 96, "score.map_size": 48}
    )
    said = resolution_sentence(config, [(6, 6), (4, 4)], 320)
    assert "6 × 6 positions sees images of 96 pixels" in said and "stands for 8 × 8." in said
    assert "4 × 4 positions sees images of 64 pixels" in said and "stands for 12 × 12." in said
    assert "320 pixels" in said
    flat = load_config(dataset="demo", overrides={"features.pyramid": None, "data.image_size": 96})
    assert resolution_sentence(flat, [(6, 6)], 320).count("sees images of 96 pixels") == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Models]:
    folder = tmp_path_factory.mktemp("qualitative")
    root, models = image_folder(folder / "images"), {}
    for name, kind in (("one", "single"), ("two", "mixture")):
        config = folder_config(
            root, folder / name, prior={"kind": kind}, train={"epochs": 1, "evaluate_every": 0}
        )
        inputs, run = prepare(config, progress=False), RunDirectory.open(config)
        model = train_model(config, inputs, run, progress=False)
        models[name] = (config, finish_run(config, inputs, model, run))
    return inputs, models


def not_calibrated(models: Models) -> Models:
    found = {}
    for name, (config, result) in models.items():
        evaluation = result.by_protocol["inductive/likelihood"]
        found[name] = (config, replace(result, evaluation=evaluation))
    return found


def test_calibrated_maps_share_a_scale(runs: tuple[Inputs, Models]) -> None:
    inputs, models = runs
    maps = {
        name: gallery(config, inputs, result, [0, 4])["maps"] for name, (config, result) in models.items()
    }
    both = np.stack(list(maps.values()))
    assert maps["one"].max() != maps["two"].max()
    assert map_limits(inputs, models, [0, 4]) == dict.fromkeys(models, (both.min(), both.max()))
    # Scored otherwise, even one of them, each has its own.
    other = not_calibrated(models)
    mixed = {"one": models["one"], "two": other["two"]}
    limits = map_limits(inputs, mixed, [0, 4])
    assert limits["one"] == (maps["one"].min(), maps["one"].max()) != limits["two"]


def test_a_bar_names_the_unit_of_a_shared_scale(runs: tuple[Inputs, Models]) -> None:
    inputs, models = runs
    ranks = dict.fromkeys(models, np.ones(len(inputs.dataset.test)))
    for shown, bars in ((models, 1), (not_calibrated(models), 0)):
        limits = map_limits(inputs, shown, [0, 4])
        figure = compare_maps(inputs, shown, [0, 4], ranks, normal=[0, 0], limits=limits)
        panels, rest = np.array(figure.axes[:10]).reshape(2, 5), figure.axes[10:]
        assert [ax.get_ylabel() for ax in rest] == ["anomaly score (standard deviations)"] * bars
        for k, name in enumerate(models, start=3):
            for ax in panels[:, k]:
                assert ax.images[0].get_clim() == limits[name]
                assert isinstance(ax.images[0].norm, AsinhNorm) == bool(bars)
        plt.close(figure)


def test_a_verdict_counts_ranks_of_anomalous_images(runs: tuple[Inputs, Models]) -> None:
    inputs, _ = runs
    anomalous = inputs.test_labels & inputs.test_labelled
    one, other = np.full(len(anomalous), 0.5), np.full(len(anomalous), 0.5)
    other[np.flatnonzero(anomalous)[0]], other[~anomalous] = 1.0, 0.0
    said = rank_sentences(inputs, {"one": one, "other": other})
    n = anomalous.sum()
    share = f"other ranks {100 / n:.0f} % above all normal images of their class and 0 % below the median one"
    assert said[0].startswith(f"Of {n} anomalous images, one ranks 0 % above all") and share in said[0]
    assert said[1] == (
        f"Under other 1 of them rank higher than under one, 0 lower and {n - 1} the same; "
        f"the mean change is +{50 / n:.1f} points."
    )


def test_table_of_runs(runs: tuple[Inputs, Models]) -> None:
    _, models = runs
    table = run_table(models)
    assert table["prior"].to_dict() == {"one": "single", "two": "mixture"}
    assert set(table["scores"]) == {"calibrated/likelihood"} and set(table["epochs"]) == {1}
    for name, (_, result) in models.items():
        assert table["training (s)"][name] == result.metrics["timing"]["train_s"]
        assert table["pixel AUROC"][name] == 100 * result.metrics["mean"]["pixel_auroc"]
