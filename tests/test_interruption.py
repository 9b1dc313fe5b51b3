"""Ctrl-C in the real command: what it says, how it exits, and that the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import folder_config, image_folder

from hgadlib.__main__ import main
from hgadlib.runs.directory import read_history, read_metrics


def command(folder: Path) -> list[str]:
    config = folder_config(folder / "images", folder / "run", train={"epochs": 40}).to_dict()
    (folder / "small.yaml").write_text(
        yaml.safe_dump({k: v for k, v in config.items() if isinstance(v, dict)})
    )
    run = ["-p", "run_dir", str(folder / "run"), "-p", "device", "cpu"]
    return ["-p", "dataset", "folder", "-f", str(folder / "small.yaml"), *run]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
@pytest.mark.parametrize("stage", ["features", "training"])
def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "images")
    words, said = command(tmp_path), tmp_path / "stderr"
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "hgadlib", *words],
            cwd=Path(__file__).resolve().parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        end = time.monotonic() + 120

        def begun_already() -> bool:
            # The bar names an epoch before its row is written.
            if stage == "training":
                return (tmp_path / "run" / "history.csv").exists()
            return b"features:" in said.read_bytes()

        while not begun_already():
            assert process.poll() is None and time.monotonic() < end, said.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    text = said.read_text()
    assert process.returncode == 130, text
    assert text.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in text and stdout == b""
    begun = len(read_history(tmp_path / "run")) if stage == "training" else 0
    assert (begun > 0) == (stage == "training") == (tmp_path / "run" / "config.yaml").exists()
    if stage == "training":
        assert main([*words, "--quiet"]) == 0
        assert read_history(tmp_path / "run")["epoch"].tolist() == list(range(41))
        assert read_metrics(tmp_path / "run")["mean"]["image_auroc"] is not None
