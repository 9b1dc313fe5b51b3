"""Rates: measured in a short run, read from records and from benchmarks' lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch

from hgadlib.ledger import read_records
from hgadlib.throughput import benchmark_ratios, measure_throughput, product_rate, recorded_rates


def test_short_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small.image_folder(tmp_path / "data")
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    config = small.folder_config(root, tmp_path / "run", features={"out_indices": [2]})
    rates = measure_throughput(config, images=8, epochs=2)
    assert set(rates) == {"features", "training", "prediction"}
    assert all(rate > 0 for rate in rates.values())
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_product_rate_counts_multiply_adds() -> None:
    # Between a pocket calculator and a supercomputer.
    assert 0.01 < product_rate(torch.device("cpu"), size=128, repeats=3) < 1e6


def test_records_have_their_rates() -> None:
    records = read_records()
    table = recorded_rates(records)
    assert list(table["run"]) == [record["record"] for record in records]
    assert (table["training (images/s)"] > 0).all()


def test_benchmark_lines(tmp_path: Path) -> None:
    assert benchmark_ratios(tmp_path).empty
    lines = [
        {"benchmark": "flow", "what": "environment", "machine": "a processor", "device": "cpu"},
        {"benchmark": "flow", "what": "train", "speedup": {"median": 2.5, "min": 2.0, "max": 3.0}},
        {"benchmark": "flow", "what": "memory", "ours": {"base_mib": 1}},
    ]
    (tmp_path / "cpu.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    table = benchmark_ratios(tmp_path)
    assert table.to_dict("records") == [
        {
            "file": "cpu.jsonl",
            "benchmark": "flow",
            "what": "train",
            "times as fast": 2.5,
            "device": "a processor",
        }
    ]
