"""The benchmarks run and print what they promise; how fast is not asked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_metrics_benchmark_prints_json_lines() -> None:
    command = [sys.executable, "benchmarks/metrics.py", "--maps", "4", "--size", "32", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {"metrics"}
    assert lines[0]["what"] == "environment" and {"machine", "threads", "versions"} <= lines[0].keys()
    assert all(line["median"] > 0 for line in lines if line["what"] == "speedup")
    memory = {line["task"]: line for line in lines if line["what"] == "memory"}
    assert len(memory) == 4 and all(line["base_mib"] > 10 for line in memory.values())
