"""One model a class, raw scores and the image as a level: what the methods compared with stand on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import features, folder_config, image_folder

from hgadlib.baselines.one_for_one import OneForOne
from hgadlib.config import BaselineConfig, Config, load_config
from hgadlib.errors import InputError
from hgadlib.features.backbone import build_backbone
from hgadlib.runs.directory import RunDirectory, read_config, read_history
from hgadlib.runs.experiment import evaluate_model, finish_run, predict_files, train_model
from hgadlib.runs.inputs import Inputs, prepare
from hgadlib.scoring import LevelValues, anomaly_maps, raw


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(root: Path, run_dir: Path, **more: object) -> tuple[Config, Inputs, RunDirectory]:
    config = folder_config(root, run_dir, **more)
    return config, prepare(config, progress=False), RunDirectory.open(config)


def test_each_class_has_the_model_that_it_would_have_alone(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "both")
    config, inputs, directory = run(root, tmp_path / "run", setting="one_for_one")
    model = train_model(config, inputs, directory, progress=False)
    assert isinstance(model, OneForOne) and model.classes == ("disc", "square")
    result = finish_run(config, inputs, model, directory)
    assert result.evaluation.protocol.name == "calibrated/likelihood"
    assert result.inferred == {}
    for k, name in enumerate(model.classes):
        alone = image_folder(tmp_path / name, classes=("disc", "square"))
        for other in {"disc", "square"} - {name}:
            (alone / other).rename(tmp_path / f"{other}_away_{k}")
        own_config, own_inputs, own_directory = run(alone, tmp_path / f"run_{name}")
        own = train_model(own_config, own_inputs, own_directory, progress=False)
        for key, value in own.state_dict().items():
            torch.testing.assert_close(model.models[k].state_dict()[key], value, rtol=0, atol=0)
        own_config = replace(own_config, score=replace(own_config.score, criterion="likelihood"))
        found = evaluate_model(own_config, own_inputs, own, all_protocols=False).evaluation
        assert found.per_class[name] == result.evaluation.per_class[name]
        np.testing.assert_array_equal(found.scores, result.evaluation.scores[inputs.test_classes == k])
    history = read_history(directory.path)
    parts = [read_history(directory.path / "classes" / f"{k:03d}") for k in range(2)]
    np.testing.assert_allclose(history["total"], (parts[0]["total"] + parts[1]["total"]) / 2)
    np.testing.assert_allclose(history["seconds"], parts[0]["seconds"] + parts[1]["seconds"])
    assert read_config(directory.path).setting == "one_for_one"


def test_a_run_of_models_is_read_again_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "images")
    config, inputs, directory = run(root, tmp_path / "run", setting="one_for_one")
    unbroken = train_model(config, inputs, directory, progress=False)
    read = train_model(config, inputs, directory, progress=False)
    for key, value in unbroken.state_dict().items():
        torch.testing.assert_close(read.state_dict()[key], value, rtol=0, atol=0)
    # Broken between two classes, the second alone is trained anew.
    (directory.model).unlink()
    (directory.path / "classes" / "001" / "model.safetensors").unlink()
    (directory.path / "classes" / "001" / "checkpoint.safetensors").unlink()
    trained: list[int] = []
    from hgadlib.runs import experiment

    real = experiment.fit

    def counted(*given: Any, **more: Any) -> Any:
        trained.append(1)
        return real(*given, **more)

    monkeypatch.setattr(experiment, "fit", counted)
    again = train_model(config, inputs, directory, progress=False)
    assert trained == [1]
    for key, value in unbroken.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    maps = [found for _, found in predict_files(config, inputs, again, inputs.dataset.test[:2])]
    assert np.isfinite(np.concatenate(maps)).all()


def test_only_takes_the_images_of_a_class(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    _, inputs, _ = run(root, tmp_path / "run", data={"held_out": 0.5, "threshold": 0.25})
    for k in range(2):
        own = inputs.only(k)
        assert own.dataset.classes == (inputs.dataset.classes[k],)
        for part in ("train", "test", "held_out", "threshold"):
            records = getattr(inputs.dataset, part)
            mine = [i for i, r in enumerate(records) if r.class_name == inputs.dataset.classes[k]]
            assert getattr(own.dataset, part) == tuple(records[i] for i in mine) and mine
            for level, all_levels in zip(
                getattr(own, part).levels, getattr(inputs, part).levels, strict=True
            ):
                torch.testing.assert_close(level, all_levels[mine], rtol=0, atol=0)


def test_take_copies_only_what_is_apart() -> None:
    made, _ = features(6)
    beside = made.take(np.arange(2, 5))
    assert beside.levels[0].data_ptr() == made.levels[0][2].data_ptr() and len(beside) == 3
    torch.testing.assert_close(made.take(np.array([4, 1])).levels[1], made.levels[1][[4, 1]])
    assert len(made.take(np.zeros(0, np.int64))) == 0


def test_raw_maps_are_the_mean_of_the_levels() -> None:
    values = LevelValues((torch.tensor([[[-1.0, -3.0]]]), torch.tensor([[[-5.0, -5.0]]])), ())
    maps = anomaly_maps(values, raw(2), size=2, sigma=0.0, criterion="likelihood")
    torch.testing.assert_close(maps, torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]))


def test_the_image_is_the_last_level() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 1, 64).expand(-1, -1, 64, -1).cumsum(3)
    both = build_backbone("tf_efficientnet_lite0", out_indices=(2,), image=32)
    stage, image = both(images)
    assert both.channels == [stage.shape[1], 3] and both.grids(64) == [tuple(stage.shape[2:]), (32, 32)]
    expected = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(image, expected, atol=0.3, rtol=0)  # of values up to 40
    alone = build_backbone("tf_efficientnet_lite0", out_indices=(), image=64)
    torch.testing.assert_close(alone(images), [images])
    assert alone.channels == [3] and alone.identity()["image"] == 64
    assert "image" not in build_backbone("tf_efficientnet_lite0", out_indices=(2,)).identity()
    with pytest.raises(InputError, match="expected rising stages"):
        build_backbone("tf_efficientnet_lite0", out_indices=())


def test_settings_of_baselines_change_no_record_of_before() -> None:
    config = load_config(dataset="demo")
    assert "baseline" not in config.identity() and "setting" not in config.identity()
    changed = load_config(dataset="demo", overrides={"baseline.width": BaselineConfig().width + 1})
    assert changed.identity()["baseline"] == {"width": BaselineConfig().width + 1}
    with pytest.raises(InputError, match="expected raw beside method padim, found calibrated"):
        load_config(dataset="demo", overrides={"method": "padim"})
    one = load_config(dataset="demo", setting="one_for_one")
    assert one.digest != config.digest and one.criterion == "likelihood"
