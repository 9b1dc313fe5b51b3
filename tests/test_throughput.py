"""Rates: measured in a short run, read from records and from benchmarks' lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from hgadbook.complexity import benchmark_ratios, measure_throughput, product_rate, recorded_rates
from hgadlib.config import project_dir
from hgadlib.runs.ledger import read_records


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


def test_every_record_has_a_row_of_rates() -> None:
    records = read_records()
    table = recorded_rates(records)
    assert sorted(name for names in table["records"] for name in names) == sorted(
        record["record"] for record in records
    )
    assert len(table) < len(records)
    for row in table.to_dict("records"):
        own = [r["timing"]["train_images_per_s"] for r in records if r["record"] in row["records"]]
        assert row["training (images/s)"] == pytest.approx(np.median(own))
    assert recorded_rates([]).empty


def test_benchmark_lines(tmp_path: Path) -> None:
    assert benchmark_ratios(tmp_path).empty
    lines = [
        {"benchmark": "flow", "what": "environment", "machine": "a processor", "device": "cpu", "threads": 2},
        {
            "benchmark": "flow", "what": "speedup", "channels": 40, "grid": [32, 16], "setting": "published",
            "task": "inference", "over": "all_in_one_block", "median": 2.5, "min": 2.0, "max": 3.0,
        },
        {"benchmark": "flow", "what": "memory", "added_mib": 1},
        {"benchmark": "training", "what": "speedup", "of": "the run", "ratio": 4.0},
    ]  # fmt: skip
    (tmp_path / "cpu.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    flow, training = benchmark_ratios(tmp_path).to_dict("records")
    assert flow == {
        "benchmark": "flow", "case": "40 channels on 32 x 16, published setting, inference",
        "times as fast": 2.5, "from": 2.0, "to": 3.0, "device": "a processor", "threads": 2,
        "file": "cpu.jsonl",
    }  # fmt: skip
    assert (training["case"], training["times as fast"]) == ("the run", 4.0)
    assert np.isnan(training["from"])


def test_committed_benchmarks_are_read() -> None:
    """The lines that the benchmarks print are the lines that the chapter looks for."""
    folder = project_dir() / "results" / "benchmarks"
    found = benchmark_ratios()
    for file in folder.glob("*.jsonl"):
        count = sum(json.loads(line)["what"] == "speedup" for line in file.read_text().splitlines())
        assert count == (found["file"] == file.name).sum(), file.name
    assert len(found) and (found["times as fast"] > 0).all() and (found["case"] != "").all()
    assert (found["device"] != "not recorded").all() and (found["threads"] > 0).all()
