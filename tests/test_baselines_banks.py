"""PaDiM and PatchCore: distances against SciPy's, the coreset against a plain one, a bank or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from small import features, image_folder
from torch import Tensor

from hgadlib.baselines import METHODS, padim, patchcore
from hgadlib.baselines.banks import Banks
from hgadlib.baselines.one_for_one import OneForOne
from hgadlib.baselines.padim import PaDiM
from hgadlib.baselines.patchcore import PatchCore, coreset, projected
from hgadlib.config import BaselineConfig, load_config
from hgadlib.errors import InputError
from hgadlib.features.store import Features
from hgadlib.method import Method
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.inputs import prepare

NAMES = ["class0", "class1"]
BOTH = pytest.mark.parametrize("method", ["padim", "patchcore"])


def fitted(
    method: str, n: int = 24, *, bank: Any = "all", seed: int = 0, classes: int = 2, **more: Any
) -> tuple[Method, Features, np.ndarray]:
    """A model, and the features and classes that it was fitted to."""
    train, class_idx = features(n, n_classes=classes)
    baseline = BaselineConfig(bank=bank, **{"channels": 3, "coreset": 0.2, **more})
    model = METHODS[method](NAMES[:classes], train.channels, train.grids, baseline=baseline)  # type: ignore[call-arg]
    history = model.fit(train, class_idx, seed=seed)
    assert history["epoch"].tolist() == [1] and not model.learns and not model.has_constants
    return model, train, class_idx


def values(model: Method, x: Features, class_idx: list[int]) -> tuple[Tensor, ...]:
    found = model.level_values(x.batch(torch.arange(len(class_idx))), torch.tensor(class_idx))
    assert found.neg_entropy == ()
    return found.log_prob


@pytest.mark.parametrize("bank", ["all", "class"])
def test_padim_is_scipys_mahalanobis(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padim, "_CELLS", 150)  # two positions at a time
    model, train, class_idx = fitted("padim", bank=bank)
    test, _ = features(4, seed=1)
    asked, sums = [0, 1, 1, 0], []
    found = values(model, test, asked)
    for level, (x, stored, (_, width)) in enumerate(zip(test.levels, train.levels, train.grids, strict=True)):
        drawn = model.get_buffer(f"drawn_{level}")
        assert len(drawn.unique()) == 3 and drawn.max() < stored.shape[-1]
        for p in range(stored.shape[1]):
            for i, k in enumerate(asked):
                own = stored[:, p][:, drawn].double().numpy()
                own = own[class_idx == k] if bank == "class" else own
                inverse = np.linalg.inv(np.cov(own.T) + 0.01 * np.eye(3))
                expected = mahalanobis(x[i, p, drawn].double().numpy(), own.mean(0), inverse)
                assert -found[level][i, p // width, p % width].item() == pytest.approx(expected, rel=1e-3)
                if k == i:  # each bank once
                    sums += [mahalanobis(row, own.mean(0), inverse) for row in own]
    if bank == "class":
        total = model.fit(train, class_idx)["total"].item()
        assert total == pytest.approx(np.mean(sums), rel=1e-3)


def test_padims_channels_are_a_draw_of_the_seed() -> None:
    def drawn(seed: int) -> list[int]:
        return fitted("padim", seed=seed, channels=2)[0].get_buffer("drawn_0").tolist()

    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) > 1
    assert fitted("padim", channels=100)[0].get_buffer("drawn_0").tolist() == list(range(6))


def plain_coreset(x: np.ndarray, count: int, start: int) -> list[int]:
    chosen, nearest = [start], cdist(x, x[[start]])[:, 0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, cdist(x, x[chosen[-1:]])[:, 0])
    return chosen


@pytest.mark.parametrize("block", [2, 7, 1024])
def test_a_coreset_is_the_plain_greedy_one(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "_BLOCK", block)
    monkeypatch.setattr(patchcore, "_CELLS", 64)
    x = 30 + torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
    chosen, squares = coreset(x, 120, start=3)
    assert chosen.tolist() == plain_coreset(x.numpy(), 120, 3)
    expected = cdist(x.numpy(), x[chosen].numpy()).min(1) ** 2
    np.testing.assert_allclose(squares, expected, atol=1e-9)
    assert coreset(x.float(), 120, start=3)[0].tolist() == chosen.tolist()


def test_a_coreset_takes_what_is_far_away_first_and_no_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[17] += 100
    assert coreset(x, 5, start=2)[0][:2].tolist() == [2, 17]
    # Rows that are equal have nothing farther; still each is chosen once.
    monkeypatch.setattr(patchcore, "_BLOCK", 8)
    same = torch.cat([x, x])
    assert len(coreset(same, 100)[0].unique()) == 100
    assert coreset(x, 1, start=7)[0].tolist() == [7]


def test_a_projection_keeps_distances() -> None:
    x = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0))
    y = projected(x, torch.Generator().manual_seed(0))
    assert y.shape == (20, 128)
    ratio = torch.pdist(y) / torch.pdist(x)
    assert abs(ratio.mean() - 1) < 0.05 and ratio.min() > 0.7 and ratio.max() < 1.3
    assert projected(x[:, :8], torch.Generator()).equal(x[:, :8])


@pytest.mark.parametrize("bank", ["all", "class"])
def test_patchcore_is_the_distance_to_its_bank(bank: str) -> None:
    model, train, class_idx = fitted("patchcore", bank=bank)
    test, _ = features(4, seed=1)
    asked = [0, 1, 1, 0]
    found = values(model, test, asked)
    for level, (x, stored) in enumerate(zip(test.levels, train.levels, strict=True)):
        for i, k in enumerate(asked):
            own = stored[torch.from_numpy(class_idx) == k] if bank == "class" else stored
            rows = own.flatten(0, 1).numpy()
            kept = model.get_buffer(f"bank_{level}_{k if bank == 'class' else 0}").numpy()
            assert len(kept) == round(0.2 * len(rows))
            (start,) = np.flatnonzero((rows == kept[0]).all(1)).tolist()
            np.testing.assert_array_equal(kept, rows[plain_coreset(rows, len(kept), start)])
            expected = cdist(x[i].numpy(), kept).min(1)
            np.testing.assert_allclose(-found[level][i].flatten(), expected, rtol=1e-4)


def test_candidates_cap_a_bank_and_a_whole_share_keeps_them_all() -> None:
    model, train, _ = fitted("patchcore", candidates=40, coreset=1.0)
    kept, rows = model.get_buffer("bank_0_0"), train.levels[0].flatten(0, 1)
    assert len(kept) == len(kept.unique(dim=0)) == 40
    assert all((row == rows).all(1).any() for row in kept)
    assert not kept.equal(fitted("patchcore", candidates=40, coreset=1.0, seed=1)[0].get_buffer("bank_0_0"))
    assert kept.equal(fitted("patchcore", candidates=40, coreset=1.0)[0].get_buffer("bank_0_0"))


@BOTH
def test_one_bank_does_not_ask_for_the_class(method: str) -> None:
    test, _ = features(4, seed=1)
    for bank, same in (("all", True), ("class", False)):
        model = fitted(method, bank=bank)[0]
        first, other = values(model, test, [0, 1, 0, 1]), values(model, test, [1, 0, 1, 0])
        assert torch.equal(first[0], other[0]) is same


@BOTH
@pytest.mark.parametrize("bank", ["all", "class"])
def test_alone_as_in_a_batch_and_after_a_file(method: str, bank: str, tmp_path: Path) -> None:
    model, test = fitted(method, bank=bank)[0], features(4, seed=1)[0]
    together = values(model, test, [0, 1, 1, 0])
    for i, k in enumerate([0, 1, 1, 0]):
        alone = values(model, test.take(np.array([i])), [k])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i])
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert isinstance(loaded, Banks) and loaded.baseline.bank == bank
    for a, b in zip(values(loaded, test, [0, 1, 1, 0]), together, strict=True):
        assert torch.equal(a, b)


@BOTH
def test_a_defect_is_found_where_it_is(method: str) -> None:
    model, test = fitted(method)[0], features(20, seed=1)[0]
    fine = -values(model, test, [0] * 20)[0].flatten(1)
    test.levels[0][:, 5] += 4 * torch.tensor([1.0, -1, 1, -1, 1, -1])
    found = -values(model, test, [0] * 20)[0].flatten(1)
    assert found.amax(1).min() > fine.amax(1).max()
    assert (found.argmax(1) == 5).all()


@BOTH
def test_a_model_of_one_class_is_the_unified_one_of_it(method: str, tmp_path: Path) -> None:
    model, test = fitted(method, classes=1)[0], features(4, n_classes=1, seed=1)[0]
    single = OneForOne([model])
    single.save(tmp_path / "model.safetensors")
    expected = values(model, test, [0] * 4)
    for wrapped in (single, OneForOne.load(tmp_path / "model.safetensors")):
        for a, b in zip(values(wrapped, test, [0] * 4), expected, strict=True):
            assert torch.equal(a, b)


@BOTH
def test_bad_input_is_refused(method: str) -> None:
    model, train, class_idx = fitted(method)
    with pytest.raises(InputError, match="expected features of"):
        model.level_values(
            [x[:, :-1] for x in train.batch(torch.arange(2))], torch.zeros(2, dtype=torch.int64)
        )
    baseline = BaselineConfig(bank="class")
    without = METHODS[method](["a", "b", "c"], train.channels, train.grids, baseline=baseline)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="class 'c': expected training images, found none"):
        without.fit(train, class_idx)


def test_a_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    given = load_config(dataset="demo", experiment="baseline_patchcore")
    data = replace(given.data, root=str(image_folder(tmp_path / "images")), image_size=64)
    own = replace(given.features, backbone="tf_efficientnet_lite0")
    score = replace(given.score, map_size=32)
    config = replace(
        given, dataset="folder", device="cpu", data=data, features=own, score=score,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    result = finish_run(config, inputs, train_model(config, inputs, run, progress=False), run)
    assert result.metrics["mean"]["image_auroc"] > 0.9
    assert result.metrics["protocol"]["normalisation"] == "raw"
    assert isinstance(train_model(config, inputs, run, progress=False), PatchCore)


@pytest.mark.parametrize("name", ["padim", "patchcore", "bank_all"])
def test_experiments_are_of_their_method(name: str) -> None:
    config = load_config(dataset="elpv", experiment=f"baseline_{name}")
    assert METHODS[config.method] is (PaDiM if name == "padim" else PatchCore)
    assert config.features.pyramid is None and config.features.join and config.data.held_out == 0
    assert (config.baseline.coreset == 1) is (name == "bank_all")
