"""Several processes train as one: shares of a batch, and the losses of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from small import folder_config, image_folder

from hgadlib.__main__ import main
from hgadlib.distributed import Group, process_group
from hgadlib.errors import InputError
from hgadlib.runs.directory import read_history, read_metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_shares_cover_a_batch_once(n: int) -> None:
    batch = torch.arange(100, 100 + n)
    parts = [Group(rank, 3).share(batch) for rank in range(3)]
    counted = torch.cat([part for part, weight in parts if weight])
    assert counted.tolist() == batch.tolist()
    assert sum(weight for _, weight in parts) == pytest.approx(1)
    assert all(len(part) for part, _ in parts)  # a process without images still has gradients, of weight 0


@pytest.mark.parametrize("n", [7, 2])  # more and fewer images than processes
def test_weighted_means_of_the_shares_are_the_mean_of_the_batch(n: int) -> None:
    values, batch = torch.linspace(-1, 2, n, dtype=torch.float64), torch.arange(n)
    parts = [Group(rank, 3).share(batch) for rank in range(3)]
    assert sum(float(values[part].mean()) * weight for part, weight in parts) == pytest.approx(
        float(values.mean())
    )


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as (group, device):
        assert (group.rank, group.size, group.is_main, device) == (0, 1, True, "cpu")


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"expected cuda for 2 processes"), process_group("cuda:0"):
        pass


def parameters(tmp_path: Path, name: str) -> list[str]:
    config = folder_config(
        tmp_path / "images", tmp_path / name, train={"epochs": 3, "batch_size": 5}
    ).to_dict()
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(sections))
    run = ["-p", "run_dir", str(tmp_path / name), "-p", "device", "cpu"]
    return ["-p", "dataset", "folder", "-f", str(file), *run, "--quiet"]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "images")
    # 12 images in batches of 5: shares of 3 and 2, and of 1 and 1 at the end.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*torchrun, "-m", "hgadlib", *parameters(tmp_path, "two")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("image_auroc") == 1  # one process speaks
    assert main(parameters(tmp_path, "one")) == 0
    one, two = read_history(tmp_path / "one"), read_history(tmp_path / "two")
    timing = ["seconds", "images_per_s"]
    pd.testing.assert_frame_equal(one.drop(columns=timing), two.drop(columns=timing), rtol=2e-4)
    means = [read_metrics(tmp_path / name)["mean"]["pixel_auroc"] for name in ("one", "two")]
    assert means[0] == pytest.approx(means[1], abs=2e-3)


def test_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["-p", "epoch", "3"], "unknown parameter 'epoch'"),
        (["-y", "[1"], "expected YAML"),
        (["-y", "3"], "expected names with values, found 3"),
        (["-f", str(tmp_path / "none.yaml")], "expected a parameter file"),
        (["-p", "dataset", "folder", "-p", "data_root", str(tmp_path / "none")], str(tmp_path / "none")),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
