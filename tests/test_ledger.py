"""The ledger of runs: what a record holds, and what it does not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hgadlib.__main__ import main
from hgadlib.config import config_from_dict, training_key
from hgadlib.errors import InputError
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.ledger import add, curves, group_records, overlaps, read_ledger, read_records


def finished(path: Path, seed: int = 0) -> Path:
    config = config_from_dict(
        {"dataset": "demo", "seed": seed, "run_dir": str(path), "data": {"root": "/somewhere"}}
    )
    run = RunDirectory.open(config)
    run.start({"digest": "d" * 64, "train": 1, "test": 1})
    (path / "history.csv").write_text("epoch,total\n1,0.5\n2,0.4\n")
    (path / "environment.json").write_text(json.dumps({"device": "a processor", "commit": "abc"}))
    run.finish(
        {
            "protocol": {"epoch": "last"},
            "mean": {"image_auroc": 0.9, "pixel_auroc": None},
            "per_class": {},
            "best_epoch": {},
            "timing": {"train_s": 1.0},
            "memory": {},
            "counts": {},
            "other_protocols": {"inductive/both": {"mean": {"image_auroc": 0.8}, "per_class": {"a": 1}}},
        }
    )
    return path


def test_a_record_holds_the_run_and_no_path(tmp_path: Path) -> None:
    file = add(finished(tmp_path / "run"), tmp_path / "ledger")
    record = json.loads(file.read_text())
    assert file.name.startswith("demo-hgad-seed0-") and record["epochs"] == 2
    assert record["config"]["train"]["epochs"] == 24 and record["config_digest"][:8] in file.name
    assert record["other_protocols"] == {"inductive/both": {"image_auroc": 0.8}}
    assert str(tmp_path) not in file.read_text() and "/somewhere" not in file.read_text()


def test_adding_again_is_the_same_file_and_seeds_differ(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    run = finished(tmp_path / "run")
    assert add(run, ledger) == add(run, ledger)
    add(finished(tmp_path / "other", seed=1), ledger)
    table = read_ledger(ledger)
    assert table["seed"].tolist() == [0, 1] and table["image_auroc"].tolist() == [0.9, 0.9]
    assert table["pixel_auroc"].isna().all()


def test_a_run_that_is_not_whole_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"expected a run with metrics\.json"):
        add(tmp_path, tmp_path / "ledger")
    assert main(["runs", "add", str(tmp_path)]) == 2
    assert "run it to its end" in capsys.readouterr().err


def test_committed_records_name_no_path_of_a_machine() -> None:
    for file in (Path(__file__).parents[1] / "results" / "runs").glob("*.json"):
        assert not any(word in file.read_text() for word in ("/home/", "/root/", "/tmp/", "/work/")), (
            file.name
        )


def test_runs_that_trained_the_same_are_one_group(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    for seed in (1, 0):
        add(finished(tmp_path / f"run{seed}", seed=seed), ledger)
    records = read_records(ledger)
    wanted = config_from_dict({"dataset": "demo", "experiment": "another", "score": {"criterion": "both"}})
    groups = group_records(records)
    assert [record["seed"] for record in groups[training_key(wanted, seed=False)]] == [0, 1]
    assert len(groups) == 1
    assert [record["seed"] for record in group_records(records, seed=True)[training_key(wanted)]] == [0]
    # A record that an older version wrote lacks what was added since: the default.
    for record in records:
        del record["config"]["train"]["gradient_clip"]
    assert list(group_records(records)) == list(groups)


def test_committed_records_keep_their_digests_and_training_keys() -> None:
    """Else a change of the configuration's code would make strangers of the runs so far."""
    keys, count = hashlib.sha256(), 0
    for file in sorted((Path(__file__).parents[1] / "results" / "runs").glob("*.json")):
        record = json.loads(file.read_text())
        config = config_from_dict(record["config"])
        assert config.digest == record["config_digest"], file.name
        if record["environment"]["started"] < "2026-11-26":  # later ones are not in the sum below
            keys.update(training_key(config).encode())
            count += 1
    assert count == 123
    assert keys.hexdigest() == "7c704ccee89c175b24f8931e6f8e8877e076514474d57bebcec40d689918964b"


def test_curves_keep_evaluated_epochs_and_thin_the_others() -> None:
    epochs = np.arange(1, 501)
    tested = np.where(epochs % 7 == 0, 0.5, np.nan)
    found = curves(
        pd.DataFrame({"epoch": epochs, "total": epochs / 3, "seconds": 1.0, "test_image_auroc": tested})
    )
    assert set(found) == {"epoch", "total", "test_image_auroc"}
    assert {1, 7, 497, 500} <= set(found["epoch"]) and len(found["epoch"]) < 140
    assert found["test_image_auroc"][0] is None and found["total"][0] == 0.33333


def test_overlap_of_normal_and_anomalous(tmp_path: Path) -> None:
    counts = np.zeros((2, 1, 2, 4), int)
    counts[0, 0, 0], counts[0, 0, 1] = [2, 2, 0, 0], [0, 2, 2, 0]
    np.savez(tmp_path / "scores.npz", log_likelihood_counts=counts, classes=np.array(["a", "b"]))
    assert overlaps(tmp_path / "scores.npz") == {"a": [0.5], "b": [None]}
    assert overlaps(tmp_path / "missing.npz") == {}


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["doctor", "--help"],
        ["predict", "--help"],
        ["runs", "list"],
        ["grid", "list", "ablations"],
    ],
)
def test_light_commands_need_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from hgadlib.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code, *command], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout, run.stderr
