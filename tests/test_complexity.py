"""Products against counts by hand, parameters against the module's own, the paper's row, rates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
import torch
from torch.utils.flop_counter import FlopCounterMode

from hgadbook.complexity import (
    PARTS,
    Complexity,
    benchmark_ratios,
    beside_paper,
    cost_sentences,
    cost_table,
    coupling_multiply_adds,
    measure_complexity,
    measure_throughput,
    nearest_choices,
    paper_row,
    recorded_rates,
    stage_choices,
)
from hgadlib.config import FlowConfig, PriorConfig, config_from_dict, project_dir
from hgadlib.features.backbone import build_backbone
from hgadlib.flow import FeatureFlow
from hgadlib.model import HGAD
from hgadlib.runs.cost import cost, count_multiply_adds
from hgadlib.runs.ledger import read_records
from hgadlib.scoring import upsampling_matrix

LAYERS, CHANNELS, GRID, POSITIONS, HIDDEN = 3, 7, (4, 5), 8, 11


def flow() -> FeatureFlow:
    return FeatureFlow(CHANNELS, GRID, layers=LAYERS, position_dim=POSITIONS, hidden=HIDDEN)


def test_counter_sees_all_products_of_the_fused_coupling() -> None:
    net, x = flow(), torch.randn(1, 20, CHANNELS)
    by_hand = LAYERS * coupling_multiply_adds(CHANNELS, GRID, position_dim=POSITIONS, hidden=HIDDEN)
    assert count_multiply_adds(lambda: net(x)) == by_hand
    # PyTorch's counter alone does not know products that add in place.
    with FlopCounterMode(display=False) as plain:
        net(x)
    assert plain.get_total_flops() // 2 < by_hand


def test_backward_pass_is_counted_too() -> None:
    net, x = flow(), torch.randn(1, 20, CHANNELS)
    kept, moved = CHANNELS - CHANNELS // 2, CHANNELS // 2
    forward = coupling_multiply_adds(CHANNELS, GRID, position_dim=POSITIONS, hidden=HIDDEN)
    # Gradients of both layers' inputs and weights, of the rotation's input, of the position's weights.
    backward = 20 * (2 * kept * HIDDEN + 2 * HIDDEN * 2 * moved + CHANNELS**2)
    backward += sum(GRID) * (POSITIONS // 2) * HIDDEN

    def step() -> None:
        z, log_det = net(x)
        (z.sum() + log_det.sum()).backward()

    # Nobody asks for the gradient of the features themselves.
    assert count_multiply_adds(step) == LAYERS * (forward + backward) - 20 * kept * HIDDEN


def config(**more: object) -> object:
    return config_from_dict(
        {
            "dataset": "demo",
            "data": {"image_size": 64},
            "features": {"backbone": "tf_efficientnet_lite0", "out_indices": [1, 2], "pyramid": None},
            "flow": {"layers": 2, "position_dim": 8, "normalise": "none", "hidden_ratio": 2.0},
            "prior": {"n_centers": 3},
            "train": {"epochs": 5, "batch_size": 4},
            **more,
        }
    )


@pytest.fixture(scope="module")
def measured() -> Complexity:
    return measure_complexity(config(), 4, name="tiny")  # type: ignore[arg-type]


def test_parts_and_parameters(measured: Complexity) -> None:
    assert measured.levels == ((24, 16, 16), (40, 8, 8))
    assert list(measured.multiply_adds) == list(PARTS)
    by_hand = sum(
        2 * coupling_multiply_adds(c, (h, w), position_dim=8, hidden=2 * (c - c // 2 + 8))
        for c, h, w in measured.levels
    )
    assert measured.multiply_adds["flow"] == by_hand
    # Own class's 3 centres, and 4 main ones for the entropy.
    assert measured.multiply_adds["prior"] == sum((3 + 4) * c * h * w for c, h, w in measured.levels)
    size = 256
    assert measured.multiply_adds["maps"] == sum(
        size * h * w + size * w * size for _, h, w in measured.levels
    )
    model = HGAD(
        list("abcd"),
        [24, 40],
        [(16, 16), (8, 8)],
        flow=FlowConfig(layers=2, position_dim=8, normalise="none", hidden_ratio=2.0),
        prior=PriorConfig(covariance="identity", n_centers=3),
    )
    assert measured.flow + measured.prior == sum(p.numel() for p in model.parameters())
    backbone = build_backbone("tf_efficientnet_lite0", out_indices=(1, 2))
    found = cost(backbone, model, 64)
    costs = measured.multiply_adds
    assert found["multiply_adds"] == {"backbone": costs["backbone"], "method": costs["flow"] + costs["prior"]}
    assert found["numbers"]["learnt"] == measured.flow + measured.prior
    assert found["numbers"]["backbone"] == measured.frozen
    assert measured.total == sum(measured.multiply_adds.values())
    # A step is forward and backward: more than twice the forward pass, less than four times.
    forward = measured.multiply_adds["flow"] + measured.multiply_adds["prior"]
    assert 2 * forward < measured.step < 4 * forward


def test_whole_training(measured: Complexity) -> None:
    found = measured.training(10)
    assert found["features, once"] == 10 * measured.multiply_adds["backbone"]
    assert found["features, every epoch"] == 5 * found["features, once"]
    assert found["flow and prior"] == 50 * measured.step
    table = cost_table([measured])["tiny"]
    assert table["all, pixels to map (GFLOP)"] == pytest.approx(2 * measured.total / 1e9)


def test_nothing_fake_stays_behind(measured: Complexity) -> None:
    # The scores' matrices are cached: counting must leave real ones there.
    assert float(upsampling_matrix(16, 256, 4.0).sum()) == pytest.approx(256)


def test_stage_choices_agree_with_the_measured_one(measured: Complexity) -> None:
    table = stage_choices(
        measured.levels,
        backbone=measured.multiply_adds["backbone"],
        layers=2,
        position_dim=8,
        hidden_ratio=2.0,
        counts=(1, 2),
    )
    assert list(table.index) == ["0", "1", "0, 1"]
    row = table.loc["0, 1"]
    assert row["learnable parameters (M)"] == pytest.approx(measured.flow / 1e6)
    products = measured.multiply_adds["backbone"] + measured.multiply_adds["flow"]
    assert row["G multiply-adds"] == pytest.approx(products / 1e9)
    assert row["with rotations (M)"] - row["learnable parameters (M)"] == pytest.approx(
        2 * 2 * (24**2 + 40**2) / 1e6
    )


def test_nearest_choice_of_stages() -> None:
    choices = pd.DataFrame({"GFLOP": [1.0, 9.0], "with rotations (M)": [5.0, 2.0]}, index=["0, 1", "2, 3"])
    found = nearest_choices(choices, {"flops": 7.0, "learnable_parameters": 4.0})
    assert found["GFLOP"].startswith("2, 3: ") and found["with rotations (M)"].startswith("0, 1: ")


def test_the_chapter_in_sentences(measured: Complexity) -> None:
    rates = {"features": 9.0, "training": 100.4, "prediction": 7.25}
    nearest = {"GFLOP": "2, 3: 9.0, paper 7", "with rotations (M)": "2, 3: 2.0, paper 4"}
    said = cost_sentences(measured, nearest, rates, "a processor", 1000)
    share = 100 * measured.multiply_adds["backbone"] / measured.total
    assert f"{measured.total / 1e9:.1f} G multiply-adds in the tiny configuration: {share:.2g} %" in said[0]
    assert said[1] == "Stages 2, 3 come nearest to the paper's row of Tab. 5 in every column."
    assert said[2].endswith("7.2 images/s from file to map, 100 in training from stored features.")
    work = measured.training(1000)
    rest = work["flow and prior"]
    saved = (work["features, every epoch"] + rest) / (work["features, once"] + rest)
    assert saved > 1.5 and said[3].endswith(f"{saved:.1f} times less work.")
    apart = cost_sentences(measured, nearest | {"GFLOP": "0, 1: 3.0, paper 7"}, rates, "a processor", 1)
    assert apart[1].startswith("No one choice") and "0, 1 in GFLOP; 2, 3 in with rotations (M)" in apart[1]


def test_paper_rows_are_those_of_the_committed_table() -> None:
    row = paper_row("HGAD")
    assert (row["flops"], row["learnable_parameters"]) == (32.8, 30.8)
    assert paper_row("none") == {}


def test_beside_the_paper(measured: Complexity) -> None:
    table = beside_paper(measured, ["HGAD", "none"])
    assert set(table.loc["paper: none"]) == {"not available"}
    assert table.loc["paper: HGAD", "FLOPs (G)"] == "32.8"
    assert table.loc["counted here, FLOPs", "FLOPs (G)"] == f"{2 * measured.total / 1e9:.1f}"
    assert table.loc["counted here, multiply-adds", "epochs"] == "5"


def test_without_fake_tensors_the_counts_are_the_same(
    measured: Complexity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(**_: object) -> None:
        raise RuntimeError("a private class of PyTorch has changed")

    monkeypatch.setattr("torch._subclasses.fake_tensor.FakeTensorMode", gone)
    assert measure_complexity(config(), 4, name="tiny") == measured  # type: ignore[arg-type]


def test_short_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small.image_folder(tmp_path / "data")
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    config = small.folder_config(root, tmp_path / "run", features={"out_indices": [2]})
    rates = measure_throughput(config, images=8, epochs=2)
    assert set(rates) == {"features", "training", "prediction"}
    assert all(rate > 0 for rate in rates.values())
    assert not (tmp_path / "run").exists()
    assert not [entry for entry in (tmp_path / "cache").glob("*") if entry.is_dir()]  # no features


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
