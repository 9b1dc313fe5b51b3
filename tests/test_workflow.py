"""Grids of runs: what is done, what is stale, and what the workflow does about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import yaml
from grids import TINY, assert_resumed, crash_once, grid_project, planned, snakemake

from hgadlib.__main__ import main
from hgadlib.config import Config
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.grid import Grid, load_grid, run_states, summary
from hgadlib.runs.ledger import add, read_records


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """The tiny grid of a project with a ledger; tab3a_full and tab3b_10 train the same."""
    experiments = ["tab3a_full", "tab3b_10", "tab3a_sgc"]
    monkeypatch.chdir(grid_project(tmp_path, experiments=experiments, seeds=[0, 1]))
    return load_grid("tiny", data_root="images")


def digest_of_images(grid: Grid) -> str:
    from hgadlib.datasets import load_dataset
    from hgadlib.runs.inputs import identify

    return identify(load_dataset("folder", root=grid.data_root))["digest"]


def finish(config: Config, images: str, *, auroc: float = 0.9, train_s: float = 1.0) -> Path:
    """Write a run's files without the training."""
    run = RunDirectory.open(config)
    run.start({"digest": images, "train": 1, "test": 1})
    (run.path / "history.csv").write_text("epoch,total\n1,0.5\n")
    (run.path / "environment.json").write_text(json.dumps({"device": "a processor", "commit": "abc"}))
    mean = {"image_auroc": auroc, "pixel_auroc": None, "aupro": None}
    run.finish(
        {
            "protocol": {"normalisation": "inductive", "criterion": "both"},
            "mean": mean,
            "other_protocols": {
                "inductive/both": {"mean": mean},
                "inductive/likelihood": {"mean": {**mean, "image_auroc": auroc - 0.2}},
            },
            "timing": {"train_s": train_s},
            **{name: {} for name in ("per_class", "best_epoch", "memory", "counts")},
        }
    )
    return run.path


def states(grid: Grid, **options: Any) -> dict[str, str]:
    found = run_states(grid, read_records(), **options)
    return {f"{config.experiment} {config.seed}": state for config, state in found}


def test_rows_that_train_the_same_are_one_run_and_nothing_is_done_at_first(grid: Grid) -> None:
    assert states(grid) == dict.fromkeys(
        ["tab3a_full 0", "tab3a_sgc 0", "tab3a_full 1", "tab3a_sgc 1"], "missing"
    )


def test_a_run_is_begun_then_whole_then_recorded(grid: Grid) -> None:
    images, config = digest_of_images(grid), grid.config("folder", "tab3a_full", 0)
    path = finish(config, images)
    assert states(grid)["tab3a_full 0"] == "whole"
    add(path, Path("results/runs"))
    assert states(grid)["tab3a_full 0"] == "recorded"
    (path / "metrics.json").unlink()
    assert states(grid, fresh=True)["tab3a_full 0"] == "unfinished"
    assert list(states(grid).values()).count("missing") == 3


def test_a_record_counts_under_another_name_but_not_of_another_seed(grid: Grid) -> None:
    images = digest_of_images(grid)
    add(finish(grid.config("folder", "tab3b_10", 1), images), Path("results/runs"))
    assert states(grid)["tab3a_full 1"] == "recorded" and states(grid)["tab3a_full 0"] == "missing"
    assert states(grid, fresh=True)["tab3a_full 1"] == "missing"


def test_a_record_of_other_images_of_the_same_name_does_not_count(grid: Grid) -> None:
    path = finish(grid.config("folder", "tab3a_full", 0), "another")
    add(path, Path("results/runs"))
    assert states(grid)["tab3a_full 0"] == "stale"
    assert summary(grid, read_records())["seeds"].tolist() == ["none"] * 3


def test_fresh_wants_the_record_of_the_run_that_lies_here(grid: Grid) -> None:
    images, config = digest_of_images(grid), grid.config("folder", "tab3a_sgc", 0)
    path = finish(config, images, train_s=1.0)
    add(path, Path("results/runs"))
    assert states(grid, fresh=True)["tab3a_sgc 0"] == "recorded"
    metrics = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps(metrics | {"timing": {"train_s": 2.0}}))
    assert states(grid, fresh=True)["tab3a_sgc 0"] == "whole"
    assert states(grid)["tab3a_sgc 0"] == "recorded"


def test_a_changed_setting_makes_only_its_runs_stale(grid: Grid) -> None:
    images = digest_of_images(grid)
    for config in grid.distinct():
        finish(config, images)
    assert set(states(grid).values()) == {"whole"}
    file = Path("params/experiments/tab3a_sgc.yaml")
    file.write_text(file.read_text() + "\ntrain:\n  lr: 0.0005\n")
    assert states(grid) == {
        "tab3a_full 0": "whole", "tab3a_sgc 0": "stale", "tab3a_full 1": "whole", "tab3a_sgc 1": "stale",
    }  # fmt: skip
    changed = replace(grid, overrides=TINY | {"train.epochs": 3})
    assert set(states(changed).values()) == {"stale"}


def test_summary_averages_seeds_under_each_rows_own_scoring(
    grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digest_of_images(grid)
    for seed, auroc in ((0, 0.8), (1, 0.9)):
        config = grid.config("folder", "tab3a_full", seed)
        add(finish(config, images, auroc=auroc), Path("results/runs"))
    more = replace(grid, experiments=(*grid.experiments, "tab3c_likelihood"))
    table = summary(more, read_records()).set_index("experiment")
    assert table["seeds"].to_dict() == {
        "tab3a_full": "0 1", "tab3b_10": "0 1", "tab3a_sgc": "none", "tab3c_likelihood": "0 1",
    }  # fmt: skip
    assert table.loc["tab3b_10", "image_auroc"] == pytest.approx(0.85)
    assert table.loc["tab3b_10", "image_auroc_std"] == pytest.approx(0.1 / 2**0.5)
    assert table.loc["tab3c_likelihood", "image_auroc"] == pytest.approx(0.65)
    assert table["image_auroc"].isna().tolist() == [False, False, True, False]
    assert table["pixel_auroc"].isna().all()
    assert main(["grid", "table", "tiny", "--data-root", "images"]) == 0
    assert "runs/tables/tiny.csv" in capsys.readouterr().out
    written = pd.read_csv("runs/tables/tiny.csv").set_index("experiment")
    assert len(str(written.loc["tab3a_full", "records"]).split()) == 2
    assert main(["grid", "list", "tiny", "--data-root", "images", "--seeds", "1"]) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["tab3a_full", "1", "recorded"], ["tab3a_sgc", "1", "missing"],
    ]  # fmt: skip
    assert main(["grid", "list", "tinny"]) == 2


@pytest.mark.slow
def test_workflow_runs_what_is_missing_and_takes_up_what_failed(tmp_path: Path) -> None:
    experiments = ["tab3a_full", "tab3b_10", "tab3a_sgc"]
    project = grid_project(tmp_path, experiments=experiments, seeds=[0])
    full, sgc = (Path("runs/folder") / name / "seed0" for name in ("tab3a_full", "tab3a_sgc"))
    assert planned(project) == {
        "features": 1, "train": 2, str(full): 1, str(sgc): 1, "record": 2, "table": 1,
    }  # fmt: skip

    # A kernel dies: the other run is finished and recorded, of this one nothing claims to be whole.
    crashed = crash_once(project, "tab3a_sgc", 0)
    result = snakemake(project, "--retries", "0")
    assert result.returncode == 1 and "DeadKernelError" in result.stdout, result.stdout
    assert (project / full / "metrics.json").is_file()
    assert not list((project / sgc).glob("*.ipynb")) and not (project / sgc / "metrics.json").exists()
    records = list((project / "results" / "runs").glob("*.json"))
    assert len(records) == 1 and records[0].name.startswith("folder-tab3a_full-seed0-")
    table = pd.read_csv(project / "runs" / "tables" / "tiny.csv").set_index("experiment")
    assert table["seeds"].to_dict() == {"tab3a_full": "0", "tab3b_10": "0", "tab3a_sgc": "none"}

    # The next call takes up that run alone, from its checkpoint.
    result = snakemake(project)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("rule train:") == 1 and str(sgc) in result.stdout
    assert_resumed(project / sgc, crashed)
    assert len(list((project / "results" / "runs").glob("*.json"))) == 2
    (executed,) = (project / sgc).glob("train-*.ipynb")
    assert any(cell.get("outputs") for cell in nbformat.read(executed, as_version=4).cells)
    environment = json.loads((project / sgc / "environment.json").read_text())
    assert environment["threads"] == 1

    # Then all is done, until a setting changes: then its run alone is.
    assert planned(project) == {"table": 1}
    file = project / "params" / "experiments" / "tab3a_sgc.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | {"overrides": {"train.lr": 5e-4}}))
    assert planned(project) == {"features": 1, "train": 1, str(sgc): 1, "record": 1, "table": 1}
    assert planned(project, "fresh=1", "experiments=[tab3a_full]") == {"table": 1}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sedes=0", "expected some of the settings below, found sedes"),
        ("seeds=[a]", "expected numbers such as"),
        ("experiments=[tab3a_sgcc]", "did you mean tab3a_sgc?"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, setting: str, message: str) -> None:
    project = grid_project(tmp_path, experiments=["hgad"], seeds=[0])
    result = snakemake(project, "--dry-run", settings=(setting,))
    assert result.returncode == 1 and message in result.stdout and "Traceback" not in result.stdout
