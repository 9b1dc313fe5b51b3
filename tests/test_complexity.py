"""Counts of products against counts by hand, parameters against the module's own, the paper's row as data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hgadbook.complexity import (
    PARTS,
    Complexity,
    beside_paper,
    cost_table,
    count_multiply_adds,
    coupling_multiply_adds,
    measure_complexity,
    nearest_choices,
    paper_row,
    stage_choices,
)
from hgadlib.config import FlowConfig, PriorConfig, config_from_dict
from hgadlib.flow import FeatureFlow
from hgadlib.model import HGAD

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
            "features": {"out_indices": [1, 2], "pyramid": None},
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
        prior=PriorConfig(n_centers=3),
    )
    assert measured.flow + measured.prior == sum(p.numel() for p in model.parameters())
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
    from hgadlib.scoring import upsampling_matrix

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
    assert found == {"GFLOP": "2, 3: 9.0, paper 7", "with rotations (M)": "0, 1: 5.0, paper 4"}
    assert nearest_choices(choices, {})["GFLOP"] == "the paper's table is not available"


def test_paper_row(tmp_path: Path) -> None:
    file = tmp_path / "table5.csv"
    assert paper_row("HGAD", file) == {}
    rows = [("HGAD", "flops", "1.5"), ("HGAD", "training_epochs", ""), ("other", "flops", "3")]
    pd.DataFrame(rows, columns=["method", "metric", "value"]).to_csv(file, index=False)
    assert paper_row("HGAD", file) == {"flops": 1.5}
    assert paper_row("none", file) == {}


def test_beside_the_paper(measured: Complexity, tmp_path: Path) -> None:
    table = beside_paper(measured, ["HGAD"], tmp_path / "none.csv")
    assert set(table.loc["paper: HGAD"]) == {"not available"}
    assert table.loc["counted here, FLOPs", "FLOPs (G)"] == f"{2 * measured.total / 1e9:.1f}"
    assert table.loc["counted here, multiply-adds", "epochs"] == "5"
