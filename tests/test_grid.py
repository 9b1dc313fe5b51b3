"""Grids of runs: what they declare, which runs are the same, and what wrong ones say."""

from __future__ import annotations

from pathlib import Path

import pytest

from hgadlib.baselines import METHODS
from hgadlib.config import ONE_PASS, load_config, training_key
from hgadlib.errors import InputError
from hgadlib.runs.grid import load_grid


def test_rows_that_train_the_same_come_once() -> None:
    grid = load_grid("ablations", seeds=[0], datasets=["demo"])
    names = [config.experiment for config in grid.distinct()]
    assert len(grid.experiments) == 23 and len(names) == 17
    assert "tab3a_full" in names and not {"tab3b_10", "tab3c_both", "tab3d_1_10", "tab3e_two_stage"} & set(
        names
    )


def test_first_seed_of_every_dataset_comes_before_the_second() -> None:
    runs = [(config.seed, config.dataset) for config in load_grid("ablations").distinct()]
    assert runs == sorted(runs) and len(runs) == 17 * 2 * 3


def test_shared_settings_lie_on_top_and_the_notebook_gets_the_same() -> None:
    grid = load_grid("ablations")
    config = grid.config("elpv", "tab3d_1_50", 2)
    assert (config.loss.lambda2, config.seed, config.data.image_size, config.features.pyramid) == (
        50,
        2,
        224,
        None,
    )
    assert load_config(grid.parameters("elpv", "tab3d_1_50", 2)) == config


def test_what_makes_two_runs_the_same() -> None:
    one = load_config(dataset="demo")
    key = training_key(one)
    assert training_key(load_config(dataset="demo", overrides={"score.criterion": "both"})) == key
    assert training_key(load_config(dataset="demo", overrides={"score.sigma": 3})) != key
    assert training_key(load_config(dataset="demo", overrides={"loss.lambda2": 3})) != key
    assert training_key(load_config(dataset="demo", seed=1)) != key
    # What learns in one pass has no epochs, so that a change of theirs makes no stranger of its runs.
    for experiment, same in (
        ("baseline_padim", True),
        ("baseline_neighbours", True),
        ("baseline_uniad", False),
    ):
        base, more = (load_config(dataset="demo", experiment=experiment, epochs=n) for n in (4, 8))
        assert (training_key(base) == training_key(more)) is same
    assert {name for name, method in METHODS.items() if not method.learns} == set(ONE_PASS)
    assert training_key(load_config(dataset="demo", seed=1), seed=False) == training_key(one, seed=False)


def test_folder_of_images_can_be_named() -> None:
    grid = load_grid("ablations", datasets=["folder"], data_root="images", seeds=[0])
    assert grid.config("folder", "tab3a_sgc", 0).data.root == "images"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [demo]\nseeds: [0]\n", "expected a list of experiments, found None"),
        ("datasets: demo\nseeds: [0]\nexperiments: [hgad]\n", "expected a list of datasets, found 'demo'"),
        ("datasets: [demo]\nseeds: [0]\nexperiments: [hgad]\nseed: 1\n", "expected the keys .* found seed"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_grid("mine", tmp_path)


def test_an_unknown_grid_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown grid 'ablation' \(did you mean ablations\?\)"):
        load_grid("ablation")
