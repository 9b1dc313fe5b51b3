"""What is recorded of every coupling's s and t, and that recording changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from small import FLOW, GRIDS, features, folder_config, image_folder, model
from torch import nn

from hgadbook.homogeneous_mapping import block_outputs, coupling_table, train_flow
from hgadlib import training
from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.evaluation.likelihoods import anomalous_positions
from hgadlib.flow import FeatureFlow, PositionalCoupling
from hgadlib.model import HGAD
from hgadlib.runs import experiment
from hgadlib.runs.directory import RunDirectory, read_coupling, read_history
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.inputs import Inputs, prepare
from hgadlib.runs.ledger import coupling


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
def test_blocks_one_by_one_are_the_flow(kind: str) -> None:
    torch.manual_seed(0)
    flow = FeatureFlow(6, (3, 4), kind=kind, layers=3, position_dim=4, normalise=True)
    x = torch.randn(5, 12, 6)
    z, log_det = flow(x)
    outputs = list(block_outputs(flow, x))
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1].out, z)
    # The normaliser is the identity here, so blocks alone change the volume.
    total = torch.stack([o.s.sum(-1) + 6 * o.log_gain for o in outputs]).sum(0)
    torch.testing.assert_close(total, log_det)


def rows(own: HGAD, n: int = 10) -> dict[tuple[int, int], dict[str, Any]]:
    found, class_idx = features(n)
    everywhere = [torch.ones(n, *grid, dtype=torch.bool) for grid in GRIDS]
    table = coupling_table(own, found, torch.arange(n), class_idx, {"train": everywhere})
    return {(row["level"], row["layer"]): row for row in table}


def test_constants_are_seen_as_constants() -> None:
    own = model(flow=replace(FLOW, clamp=2.0, normalise="none"))
    last = cast(nn.Linear, cast(PositionalCoupling, own.levels[0][0].inn[1]).subnet[2])
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([-5.0, -10.0, -1000.0, 0.0, 1.0, 2.0]))
    found = rows(own)[1, 2]
    s = 2.0 * np.tanh([-0.5, -1.0, -100.0])
    assert found["s_mean"] == pytest.approx(s.mean()) and found["s_std"] == pytest.approx(s.std())
    assert found["t_mean"] == pytest.approx(0.1)
    assert found["s_input"] == pytest.approx(0, abs=1e-6) and found["t_class"] == pytest.approx(0, abs=1e-6)
    assert found["s_limit"] == pytest.approx(1 / 3)
    with torch.no_grad():
        last.bias.zero_()
    found = rows(own)[1, 2]
    # Nothing varies: no share of it is anything.
    assert found["s_std"] == 0 and np.isnan(found["s_input"]) and np.isnan(found["s_class"])


def test_shares_are_those_of_the_variance() -> None:
    own = model(flow=replace(FLOW, normalise="none"))
    found = rows(own)[1, 1]
    x, class_idx = features(10)
    with torch.no_grad():
        outputs = next(block_outputs(own.levels[0][0], x.levels[0].float()))
    t = outputs.t.numpy().astype(float)  # (10, 12, 3)
    means = t.mean((0, 1))
    by_class = np.stack([t[class_idx == k].mean((0, 1)) for k in (0, 1)])
    assert found["t_std"] == pytest.approx(t.std())
    assert found["t_input"] == pytest.approx(((t - means) ** 2).mean() / t.var())
    assert found["t_class"] == pytest.approx(((by_class - means) ** 2).mean() / t.var())
    assert 0 < found["t_class"] < found["t_input"] < 1
    assert found["out_rms"] == pytest.approx(outputs.out.square().mean().sqrt().item())


def test_a_group_is_its_positions() -> None:
    own, n = model(), 6
    found, class_idx = features(n)
    first = [torch.zeros(n, *grid, dtype=torch.bool) for grid in GRIDS]
    for mask in first:
        mask[2, 0, 1] = True
    none = [torch.zeros_like(mask) for mask in first]
    table = coupling_table(own, found, torch.arange(n), class_idx, {"anomalous": first, "normal": none})
    assert {row["group"] for row in table} == {"anomalous"} and len(table) == 4
    s = next(block_outputs(own.levels[0][0], found.levels[0].float())).s[2, 1]
    assert table[0]["s_mean"] == pytest.approx(s.mean().item())


@dataclass(frozen=True)
class Done:
    """A run that was recorded, and what it ran on."""

    root: Path
    config: Config
    inputs: Inputs
    model: HGAD
    run: RunDirectory


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("recorded")
        root = image_folder(folder / "images")
        config = folder_config(root, folder / "run", train={"evaluate_every": 2, "epochs": 5})
        run, inputs = RunDirectory.open(config), prepare(config, progress=False)
        trained = train_flow(config, inputs, run, progress=False)
        finish_run(config, inputs, trained, run)  # evaluates the last epoch
        yield Done(root, config, inputs, trained, run)


def test_every_evaluated_epoch_is_recorded(done: Done) -> None:
    found, history = read_coupling(done.run.path), read_history(done.run.path)
    evaluated = history["epoch"][history["test_image_auroc"].notna()].tolist()
    assert evaluated[1:] == sorted(found["epoch"].unique()) == [2, 4, 5]
    assert evaluated[0] == 0  # the untrained model, by its figures alone
    assert len(found) == 3 * 2 * 2 * 3
    assert set(found["group"]) == {"train", "normal", "anomalous"}
    assert (
        found["s_mean"].abs().max() < 1.9 and np.isfinite(found.drop(columns="group").to_numpy(float)).all()
    )


def test_normal_and_anomalous_log_likelihoods_are_in_the_history(done: Done) -> None:
    found = read_history(done.run.path).dropna()
    assert found["test_overlap"].between(0, 1).all()
    # The drawn spots are black where every training image is grey or bright.
    last = found.iloc[-1]
    assert last["test_log_prob_normal"] > last["test_log_prob_anomalous"]


def test_a_run_that_takes_another_s_place_is_recorded(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params" / "experiments").mkdir(parents=True)
    (tmp_path / "params" / "demo.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):
        train = {"evaluate_every": 1, "epochs": epochs}
        config = replace(folder_config(done.root, tmp_path / "unused", train=train), run_dir=None)
        run = RunDirectory.open(config)
        train_flow(config, done.inputs, run, progress=False)
        assert read_coupling(run.path)["epoch"].max() == epochs


def test_recording_changes_no_bit_of_the_training(done: Done, tmp_path: Path) -> None:
    config = folder_config(done.root, tmp_path / "run", train={"evaluate_every": 0, "epochs": 5})
    run = RunDirectory.open(config)
    plain = train_model(config, done.inputs, run, progress=False)
    assert not (run.path / "coupling.csv").exists()
    for (name, expected), found in zip(
        plain.state_dict().items(), done.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    with pytest.raises(InputError, match=r"expected a run with coupling\.csv"):
        read_coupling(run.path)


def test_a_killed_run_s_record_is_that_of_one_that_went_through(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder_config(done.root, tmp_path / "run", train={"evaluate_every": 2, "epochs": 5})
    fit, defaults = training.fit, training.fit.__kwdefaults__ or {}
    # Only the first epoch is saved: the second one comes again, and with it the rows of epoch 2.
    monkeypatch.setattr(fit, "__kwdefaults__", {**defaults, "checkpoint_s": 0.0})
    saved = training.save_checkpoint

    def first_only(path: Path, own: HGAD, optimiser: Any, rows: list[Any], *more: Any) -> None:
        if rows[-1]["epoch"] == 1:
            saved(path, own, optimiser, rows, *more)

    original, calls = experiment.evaluate_model, []

    def kill(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # of the untrained model, in epoch 2, and in epoch 4, once its rows were measured
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", first_only)
        patch.setattr(experiment, "evaluate_model", kill)
        train_flow(config, done.inputs, RunDirectory.open(config), progress=False)
    assert set(read_coupling(tmp_path / "run")["epoch"]) == {2}

    seen: list[tuple[int, int]] = []

    def look(self: RunDirectory, history: pd.DataFrame) -> None:
        seen.append((int(history["epoch"].iloc[-1]), int(read_coupling(self.path)["epoch"].max())))
        write(self, history)

    write = RunDirectory.write_history
    monkeypatch.setattr(RunDirectory, "write_history", look)
    train_flow(config, done.inputs, RunDirectory.open(config), progress=False)
    assert [epoch for epoch, _ in seen] == [2, 3, 4, 5]
    assert all(recorded <= epoch for epoch, recorded in seen)
    pd.testing.assert_frame_equal(
        read_coupling(tmp_path / "run"), read_coupling(done.run.path), check_exact=True
    )


def test_anomalous_positions_are_where_the_mask_touches(done: Done) -> None:
    masks = {0: np.zeros((6, 32, 32), bool)}
    masks[0][4, 15, 16] = True
    inputs = done.inputs
    found = anomalous_positions(inputs.test_classes, inputs.test_labels, masks, (2, 4))
    assert found[:6].nonzero().tolist() == [[4, 0, 2]]
    # The other class has no masks: all of its anomalous images.
    assert found[6:].flatten(1).all(1).tolist() == [False] * 3 + [True] * 3


def test_the_ledger_keeps_a_few_epochs() -> None:
    epochs = np.arange(2, 102, 2).repeat(2)
    whole = pd.DataFrame({"epoch": epochs, "level": 1, "layer": 1, "group": "train", "s_mean": epochs / 7})
    whole["s_input"] = np.nan
    found = coupling(whole)
    assert len(found["epoch"]) == 16 and {2, 100} < set(found["epoch"])
    assert found["s_mean"][0] == 0.2857 and found["s_input"][0] is None and found["group"][0] == "train"
