"""Nearest neighbours behind HGAD's face: distances, banks, a run end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from small import features, folder_config, image_folder
from torch import Tensor

from hgadlib.baselines import neighbours
from hgadlib.baselines.neighbours import Neighbours, nearest
from hgadlib.config import load_config
from hgadlib.errors import InputError
from hgadlib.features.store import Features
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import evaluate_model, finish_run, predict_files, train_model
from hgadlib.runs.inputs import prepare
from hgadlib.runs.ledger import add

NAMES = ["class0", "class1"]


def fitted(data: tuple[Features, np.ndarray] | None = None, *, seed: int = 0) -> Neighbours:
    own, class_idx = data or features(12)
    model = Neighbours.for_features(NAMES, own, class_idx)
    model.fit(own, class_idx, seed=seed)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_scipys_also_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bank = (30 + torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (50, 70))
    expected = cdist(x, bank).min(1) ** 2
    monkeypatch.setattr(neighbours, "_CELLS", 70 * 8)
    found = nearest(x.to(dtype), bank.to(dtype))
    # The difference of squares of float32, each some 14,000, would be wrong in the third digit.
    np.testing.assert_allclose(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-12)
    marks = torch.arange(50) % 5, torch.arange(70) % 5
    masked = np.where(np.equal.outer(*(m.numpy() for m in marks)), np.inf, cdist(x, bank))
    np.testing.assert_allclose(nearest(x, bank, marks), masked.min(1) ** 2, rtol=1e-12)


def test_level_values_are_of_the_own_class_alone_and_alone_as_in_a_batch() -> None:
    train, class_idx = features(12)
    model = fitted((train, class_idx))
    test, _ = features(4, seed=1)
    asked = torch.tensor([0, 1, 1, 0])
    values = model.level_values(test.batch(torch.arange(4)), asked)
    for level, (x, stored) in enumerate(zip(test.levels, train.levels, strict=True)):
        for i, k in enumerate(asked.tolist()):
            bank = stored[torch.from_numpy(class_idx) == k].flatten(0, 1)
            expected = -0.5 * cdist(x[i], bank).min(1) ** 2 / x.shape[-1]
            np.testing.assert_allclose(values.log_prob[level][i].flatten(), expected, rtol=1e-4)
            alone = model.level_values(test.batch(torch.tensor([i])), asked[i : i + 1])
            torch.testing.assert_close(alone.log_prob[level][0], values.log_prob[level][i])
    assert values.neg_entropy == () and not model.has_entropy


def test_constants_are_of_training_images_without_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    train, class_idx = features(12)
    model = fitted((train, class_idx))
    for level, stored in enumerate(train.levels):
        own = stored[torch.from_numpy(class_idx) == 0]
        others = [torch.cat([own[:i], own[i + 1 :]]).flatten(0, 1) for i in range(len(own))]
        values = [-0.5 * cdist(own[i], others[i]).min(1) ** 2 / own.shape[-1] for i in range(len(own))]
        assert model.log_prob_max[0, level].item() == pytest.approx(np.max(values), rel=1e-3)
        mean = model.get_buffer(f"normal_mean_{level}")[0].mean().item()
        assert mean == pytest.approx(np.mean(values), rel=1e-3)
    assert model.is_calibrated


def test_history_says_what_the_training_images_are_worth() -> None:
    train, class_idx = features(12)
    model = Neighbours.for_features(NAMES, train, class_idx)
    (row,) = model.fit(train, class_idx).to_dict("records")
    means = [-model.get_buffer(f"normal_mean_{level}").mean().item() for level in (0, 1)]
    assert row["epoch"] == 1 and row["total"] == pytest.approx(np.mean(means), rel=1e-4)


def test_held_out_images_calibrate() -> None:
    train, class_idx = features(12)
    far = features(6, seed=1, shift=5.0)
    model = Neighbours.for_features(NAMES, train, class_idx)
    model.fit(train, class_idx, far)
    assert model.get_buffer("normal_mean_0").max() < fitted().get_buffer("normal_mean_0").min()
    torch.testing.assert_close(model.log_prob_max, fitted().log_prob_max)


def test_a_bank_is_a_draw_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "N_BANK", 10)

    def bank(seed: int) -> Tensor:
        return fitted(seed=seed).get_buffer("bank_0_1")

    train, class_idx = features(12)
    own = train.levels[0][torch.from_numpy(class_idx) == 1].flatten(0, 1)
    assert bank(0).shape == (10, 6) and torch.equal(bank(0), bank(0)) and not torch.equal(bank(0), bank(1))
    assert all((row == own).all(1).any() for row in bank(0))
    assert len(bank(0).unique(dim=0)) == 10


def test_save_and_load(tmp_path: Path) -> None:
    model, (test, _) = fitted(), features(4, seed=1)
    model.save(tmp_path / "model.safetensors")
    loaded = Neighbours.load(tmp_path / "model.safetensors")
    for x in (model.level_values, loaded.level_values):
        assert isinstance(loaded, Neighbours) and x(
            test.batch(torch.arange(4)), torch.zeros(4, dtype=torch.int64)
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    with pytest.raises(InputError, match="found another"):
        HGAD.load(tmp_path / "model.safetensors")


def test_banks_keep_the_precision_of_the_features() -> None:
    train, class_idx = features(12)
    half = Features(tuple(x.half() for x in train.levels), *list(vars(train).values())[1:])
    assert fitted((half, class_idx)).get_buffer("bank_0_0").dtype == torch.float16


def test_a_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    given = load_config(dataset="demo", experiment="baseline_neighbours")
    assert (given.method, given.criterion) == ("neighbours", "likelihood")
    more = {"method": "neighbours", "prior": {"kind": "single"}}
    config = folder_config(image_folder(tmp_path / "images"), tmp_path / "run", **more)
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    model = train_model(config, inputs, run, progress=False)
    result = finish_run(config, inputs, model, run)
    assert (
        result.metrics["mean"]["image_auroc"] > 0.9
        and result.metrics["protocol"]["criterion"] == "likelihood"
    )
    again = train_model(config, inputs, run, progress=False)
    assert isinstance(again, Neighbours)
    np.testing.assert_array_equal(
        evaluate_model(config, inputs, again).evaluation.scores, result.evaluation.scores
    )
    scores = np.concatenate([s for s, _ in predict_files(config, inputs, again, inputs.dataset.test)])
    np.testing.assert_allclose(scores, result.evaluation.scores, rtol=1e-3, atol=1e-3)
    record = json.loads(add(run.path, tmp_path / "ledger").read_text())
    assert record["config"]["method"] == "neighbours" and record["epochs"] == 1
    found = record["image_scores"]
    assert found["disc"]["labels"].count("1") == 3 and len(found["square"]["scores"].split()) == 6
    kept = np.array(" ".join(found[name]["scores"] for name in inputs.dataset.classes).split(), float)
    np.testing.assert_allclose(kept, result.evaluation.scores, rtol=6e-4)
