"""The benchmarks run and print what they promise; how fast is not asked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import image_folder

ROOT = Path(__file__).resolve().parents[1]


Line = dict[str, Any]


def lines_of(script: str, *arguments: str, cwd: Path = ROOT) -> list[Line]:
    """Run a benchmark and read what it printed; a benchmark that finds its peer's values different fails."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines: list[Line] = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {Path(script).stem}
    assert lines[0]["what"] == "environment" and {"machine", "threads", "versions"} <= lines[0].keys()
    return lines


def of(lines: list[Line], what: str) -> list[Line]:
    return [line for line in lines if line["what"] == what]


def check_memory(lines: list[Line], count: int) -> None:
    memory = of(lines, "memory")
    assert len(memory) == count and all(line["base_mib"] > 10 for line in memory)


@pytest.mark.slow
def test_metrics_benchmark_prints_json_lines() -> None:
    lines = lines_of("metrics.py", "--maps", "4", "--size", "32", "--repeats", "1")
    assert all(line["median"] > 0 for line in of(lines, "speedup"))
    check_memory(lines, 3)


@pytest.mark.slow
def test_flow_benchmark_prints_json_lines() -> None:
    lines = lines_of("flow.py", "--cases", "6x3", "5x24", "--batch", "3", "--repeats", "1", "--no-memory")
    # Two settings, two cases, two number types; then two tasks each.
    differences = of(lines, "differences")
    assert len(differences) == 8
    assert all(line["z"] < 1e-11 for line in differences if line["dtype"] == "float64")
    assert len(of(lines, "speedup")) == 8 and all(line["min"] > 0 for line in of(lines, "speedup"))
    for line in of(lines, "matrix_products"):
        assert 0 < line["needed_gflop"] < line["peer_gflop"]


@pytest.mark.slow
def test_training_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    lines = lines_of(
        "training.py", *small, "--per-class", "4", "--layers", "2", "--epochs", "2", "--no-memory"
    )
    losses = of(lines, "losses")
    assert [line["setting"] for line in losses] == ["published", "default"]
    assert all(len(line["ours"]) == 2 and line["difference"] < 1e-4 for line in losses)
    assert all(line["ours"][0] != line["ours"][1] for line in losses)  # there were steps
    assert len(of(lines, "images_per_s")) == 2


@pytest.mark.slow
def test_inference_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    more = ["--per-class", "2", "--layers", "2", "--batch", "3", "--repeats", "1", "--no-memory"]
    lines = lines_of("inference.py", *small, *more)
    assert len(of(lines, "differences")) == 2
    assert all(line["maps"] < 1e-3 for line in of(lines, "differences"))
    assert [line["at_a_time"] for line in of(lines, "speedup")] == [3, 1, 3, 1]


@pytest.mark.slow
def test_saturation_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    lines = lines_of("saturation.py", *small, "--per-class", "2", "0", "--epochs", "2", "--every", "1")
    found = of(lines, "auroc")
    assert [(line["train"], line["epoch"]) for line in found] == [(4, 1), (4, 2), (12, 1), (12, 2)]
    assert all(0 <= line[name] <= 1 for line in found for name in ("published_auroc", "ranked_auroc"))


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    lines = lines_of("flow.py", "--cases", "4x2", "--settings", "default", "--batch", "1", "--repeats", "1")
    check_memory(lines, 4)


@pytest.mark.slow
def test_choice_benchmark_prints_json_lines(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for folder in root.glob("*/train/good"):
        for i in range(6, 16):  # so many are needed to hold some out
            pixels = np.random.default_rng([i, len(folder.parts[-3])]).integers(90, 120, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    small = ["--dataset", "folder", "--data-root", str(root), "--name", "small", "--draws", "1"]
    lines = lines_of("choice.py", *small, "--sizes", "96", "64", "32", "--backbone", "tf_efficientnet_lite0")
    found = of(lines, "setting")
    assert [lines[0][key] for key in ("dataset", "backbone")] == ["small", "tf_efficientnet_lite0"]
    # No setting is tried twice, and the sizes are those asked for.
    assert (
        len({json.dumps([v for k, v in line.items() if k not in ("drawn", "real")]) for line in found}) == 40
    )
    assert {level.split(":")[0] for line in found for level in line["levels"]} == {"96", "64", "32"}
    for line in found:
        wanted = {"image_auroc", "pixel_auroc", "aupro"} if line["image"] == "maximum" else {"image_auroc"}
        for part in ("drawn", "real"):
            assert set(line[part]) == wanted and all(0 <= value <= 1 for value in line[part].values())
