"""A run end to end on small images with the bundled backbone: what it writes, and how wrong input ends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small import folder_config, image_folder

from hgadlib import training
from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.evaluation.likelihoods import stored_histograms
from hgadlib.evaluation.metrics import IMAGE_METRICS, PIXEL_METRICS
from hgadlib.figures import auroc_table, log_likelihood_histograms
from hgadlib.method import Method
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_config, read_history, read_metrics
from hgadlib.runs.experiment import build_model, evaluate_model, finish_run, predict_files, train_model
from hgadlib.runs.gallery import gallery, typical_images
from hgadlib.runs.hardware import select_device
from hgadlib.runs.inputs import Inputs, class_masks, prepare, summary
from hgadlib.runs.ledger import record_of
from hgadlib.runs.record import Result, best_epochs

METRICS = {*IMAGE_METRICS, *PIXEL_METRICS}
TIMED = ["seconds", "images_per_s"]


@dataclass(frozen=True)
class Done:
    """A run that went through, and what it went through."""

    root: Path
    config: Config
    inputs: Inputs
    model: Method
    run: RunDirectory
    result: Result


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("whole")
    root = image_folder(folder / "images")
    # One class has no masks.
    shutil.rmtree(root / "square" / "ground_truth")
    config = folder_config(root, folder / "run", train={"evaluate_every": 1})
    run = RunDirectory.open(config)
    inputs = prepare(config, progress=False)
    model = train_model(config, inputs, run, progress=False)
    return Done(root, config, inputs, model, run, finish_run(config, inputs, model, run))


def test_the_run_directory_is_complete(done: Done) -> None:
    names = sorted(p.relative_to(done.run.path).as_posix() for p in done.run.path.rglob("*") if p.is_file())
    maps = [f"maps/{n}.png" for n in ("00_disc_spot", "01_disc_good", "02_square_spot", "03_square_good")]
    files = ["config.yaml", "data.json", "environment.json", "history.csv"]
    assert names == [*files, *maps, "metrics.json", "model.safetensors", "scores.npz"]
    for name in maps:
        with Image.open(done.run.path / name) as picture:
            assert picture.width > 200


def test_metrics_json_is_the_contract(done: Done) -> None:
    text = (done.run.path / "metrics.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    assert found == done.result.metrics == read_metrics(done.run.path)
    assert (found["schema"], found["dataset"], found["experiment"], found["seed"]) == (1, "folder", "hgad", 0)
    assert found["protocol"]["epoch"] == "last"
    assert found["protocol"]["normalisation"] == done.config.score.normalisation
    assert set(found["mean"]) == METRICS
    assert set(found["per_class"]) == {"disc", "square"}
    assert all(set(metrics) == METRICS for metrics in found["per_class"].values())
    assert set(found["timing"]) >= {
        "features_s", "train_s", "evaluate_s", "train_images_per_s", "predict_images_per_s",
    }  # fmt: skip
    assert set(found["memory"]) == {"peak_host_mb", "peak_device_mb"}
    assert found["memory"]["peak_host_mb"] > 50
    assert found["memory"]["peak_device_mb"] is None
    assert found["counts"]["train"] == 12
    assert found["cost"]["numbers"]["learnt"] == sum(p.numel() for p in done.model.parameters())
    assert found["cost"]["multiply_adds"]["backbone"] > found["cost"]["multiply_adds"]["method"] > 1e5
    assert len(found["other_protocols"]) == 9
    assert set(found["inferred"]) == {"accuracy", "mean", "per_class"}
    assert 0 <= found["inferred"]["accuracy"] <= 1 and set(found["inferred"]["mean"]) == METRICS
    assert "held_out" not in found["counts"]
    name = f"{done.config.score.normalisation}/{done.config.score.criterion}"
    assert found["other_protocols"][name]["mean"] == found["mean"]


def test_metrics_without_meaning_are_null(done: Done) -> None:
    per_class = done.result.metrics["per_class"]
    assert all(per_class["square"][name] is None for name in PIXEL_METRICS)
    assert all(0 <= per_class["square"][name] <= 1 for name in IMAGE_METRICS)
    assert all(0 <= per_class["disc"][name] <= 1 for name in METRICS)
    assert done.result.metrics["mean"]["aupro"] == per_class["disc"]["aupro"]


def test_scores_npz_has_a_row_an_image_and_histograms(done: Done) -> None:
    with np.load(done.run.path / "scores.npz") as scores:
        assert scores["score"].shape == scores["label"].shape == scores["class_idx"].shape == (12,)
        assert scores["label"].sum() == 6
        assert scores["classes"].tolist() == ["disc", "square"]
        assert scores["image"][0] == "disc/test/good/000.png"
        counts = scores["log_likelihood_counts"]
        assert counts.shape[:3] == (2, 2, 2)
        assert scores["log_likelihood_edges"].shape == (2, counts.shape[-1] + 1)
        # Every position of every test image is in one bin: 6 images a class.
        positions = [h * w for h, w in done.inputs.test.grids]
        np.testing.assert_array_equal(counts.sum((2, 3)), [[6 * n for n in positions]] * 2)
        # In the class without masks every position of an anomalous image counts as anomalous.
        np.testing.assert_array_equal(counts[1].sum(-1), [[3 * n, 3 * n] for n in positions])
        assert (counts[0, :, 1].sum(-1) < counts[1, :, 1].sum(-1)).all()
        normal, anomalous = stored_histograms(scores, 0)
        np.testing.assert_array_equal(normal["square"][0], scores["log_likelihood_edges"][0])
        np.testing.assert_array_equal(normal["square"][1], counts[1, 0, 0])
        np.testing.assert_array_equal(anomalous["disc"][1], counts[0, 0, 1])


def test_history_has_test_metrics_and_best_epochs_say_where(done: Done) -> None:
    history = read_history(done.run.path)
    # Before the first epoch the untrained model is looked at.
    assert history["epoch"].tolist() == [0, 1, 2]
    assert history["total"].isna().tolist() == [True, False, False]
    last = history.iloc[-1]
    mean = done.result.metrics["mean"]
    assert last["test_image_auroc"] == pytest.approx(mean["image_auroc"])
    assert last["test_pixel_auroc"] == pytest.approx(mean["pixel_auroc"])
    best = done.result.metrics["best_epoch"]["image_auroc"]
    assert best["value"] == pytest.approx(history["test_image_auroc"].max())
    assert history["test_image_auroc"][best["epoch"]] == pytest.approx(best["value"])


def test_best_epochs_by_hand() -> None:
    history = pd.DataFrame(
        {"epoch": [1, 2, 3, 4], "test_image_auroc": [np.nan, 0.7, 0.9, 0.9], "test_pixel_auroc": [np.nan] * 4}
    )
    assert best_epochs(history) == {"image_auroc": {"epoch": 3, "value": 0.9}}
    assert best_epochs(pd.DataFrame({"epoch": [1]})) == {}


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


class Observer:
    """Notes when it is called, and stops the training in one epoch."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.measured, self.written = stop, list[int](), list[int]()

    def measure(self, epoch: int, model: HGAD) -> None:
        if epoch == self.stop:
            raise KeyboardInterrupt
        self.measured.append(epoch)

    def write(self, last_epoch: int) -> None:
        self.written.append(last_epoch)


def test_a_second_call_trains_nothing_and_writes_nothing(done: Done) -> None:
    before = files(done.run.path)
    run, observer = RunDirectory.open(done.config), Observer()
    model = train_model(done.config, done.inputs, run, progress=False, observer=observer)
    assert observer.measured == observer.written == []
    again = finish_run(done.config, done.inputs, model, run)
    assert files(done.run.path) == before
    assert again.metrics == done.result.metrics
    np.testing.assert_array_equal(again.evaluation.scores, done.result.evaluation.scores)


def test_an_image_scored_from_its_file_has_the_evaluation_s_score(done: Done) -> None:
    records = done.inputs.dataset.test
    order = [7, 0, 3]
    [(scores, maps)] = predict_files(done.config, done.inputs, done.model, [records[i] for i in order])
    assert maps.shape == (3, 32, 32)
    np.testing.assert_allclose(scores, done.result.evaluation.scores[order], rtol=2e-3)
    [(alone, _)] = predict_files(done.config, done.inputs, done.model, [records[0]])
    np.testing.assert_allclose(alone, scores[1:2], rtol=1e-3)
    assert not list(predict_files(done.config, done.inputs, done.model, []))


def test_classes_are_looked_up_by_name(done: Done, tmp_path: Path) -> None:
    """Of one of the model's classes alone: by its place in the folder it would be scored as the other."""
    root = tmp_path / "images"
    shutil.copytree(done.root / "square", root / "square")
    config = folder_config(root, tmp_path / "run")
    inputs = prepare(config, progress=False)
    assert inputs.test_classes.tolist() == [0] * 6 and done.model.classes == ("disc", "square")
    squares = done.inputs.test_classes == 1
    expected = done.result.evaluation.scores[squares]
    [(scores, _)] = predict_files(config, inputs, done.model, inputs.dataset.test)
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-3)
    found = evaluate_model(config, inputs, done.model)
    np.testing.assert_allclose(found.evaluation.scores, expected, rtol=1e-5, atol=1e-5)
    assert found.evaluation.per_class == {"square": done.result.evaluation.per_class["square"]}
    (root / "square").rename(root / "triangle")
    other = prepare(config, progress=False)
    line = "unknown class 'triangle'; this model knows disc, square"
    with pytest.raises(InputError, match=line):
        list(predict_files(config, other, done.model, other.dataset.test))
    with pytest.raises(InputError, match=line):
        evaluate_model(config, other, done.model)


def test_a_run_killed_after_training_goes_on_to_the_same_metrics(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.run.path, tmp_path / "run")
    for name in ("metrics.json", "scores.npz", "maps/00_disc_spot.png"):
        (tmp_path / "run" / name).unlink()
    config = folder_config(done.root, tmp_path / "run", train={"evaluate_every": 1})
    run = RunDirectory.open(config)
    assert not run.complete
    model = train_model(config, done.inputs, run, progress=False)
    result = finish_run(config, done.inputs, model, run)
    for key in ("mean", "per_class", "best_epoch", "counts"):
        assert result.metrics[key] == done.result.metrics[key]
    assert set(files(run.path)) == set(files(done.run.path))


@pytest.mark.parametrize("killed_in", [1, 2])
def test_a_run_killed_in_an_epoch_goes_on_to_the_same_bits(
    done: Done, tmp_path: Path, killed_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder_config(done.root, tmp_path / "run", train={"evaluate_every": 1})
    monkeypatch.setattr(
        training.fit, "__kwdefaults__", {**(training.fit.__kwdefaults__ or {}), "checkpoint_s": 0.0}
    )

    with pytest.raises(KeyboardInterrupt):
        train_model(
            config, done.inputs, RunDirectory.open(config), progress=False, observer=Observer(killed_in)
        )
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run = RunDirectory.open(config)
    assert run.checkpoint.exists() == (killed_in == 2)
    model = train_model(config, done.inputs, run, progress=False)
    for (name, expected), found in zip(
        done.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    # Training looks at the test set before the last epoch, the evaluation after it.
    assert read_history(run.path)["test_image_auroc"].isna().tolist() == [False, False, True]
    finish_run(config, done.inputs, model, run)
    pd.testing.assert_frame_equal(
        read_history(run.path).drop(columns=TIMED),
        read_history(done.run.path).drop(columns=TIMED),
        check_exact=True,
    )


def test_an_observer_sees_the_evaluated_epochs_and_the_last(done: Done, tmp_path: Path) -> None:
    config = folder_config(done.root, tmp_path / "run", train={"evaluate_every": 2, "epochs": 5})
    observer = Observer()
    train_model(config, done.inputs, RunDirectory.open(config), progress=False, observer=observer)
    assert observer.measured == [2, 4, 5]
    assert observer.written == [1, 2, 3, 4, 5]


def test_the_seed_makes_the_model(done: Done) -> None:
    one, same = (build_model(done.config, done.inputs).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    other = build_model(folder_config(done.root, None, seed=1), done.inputs).state_dict()
    assert not torch.equal(one["priors.0.deltas"], other["priors.0.deltas"])


def test_other_images_of_the_same_layout_are_another_run(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `-p data_root` of another product would be answered by the first one's model."""
    (tmp_path / "params" / "experiments").mkdir(parents=True)
    (tmp_path / "params" / "demo.yaml").write_text("dataset: demo\n")
    monkeypatch.chdir(tmp_path)
    elsewhere = shutil.copytree(done.root, tmp_path / "images")

    def run(root: Path) -> Path:
        config = folder_config(root, None, epochs=1)
        opened = RunDirectory.open(config)
        train_model(config, prepare(config, progress=False), opened, progress=False)
        return opened.path

    # The same images elsewhere are the same run.
    path = run(done.root)
    assert run(elsewhere) == path
    assert list(path.parent.iterdir()) == [path]
    (elsewhere / "disc" / "test" / "good" / "000.png").unlink()
    run(elsewhere)
    assert len(list(path.parent.iterdir())) == 2


def test_summary_counts_images_by_class(done: Done) -> None:
    table = summary(done.inputs)
    assert table.columns.tolist() == ["train", "test normal", "test anomalous", "with masks"]
    assert list(table.loc["disc"]) == [6, 3, 3, 3]
    assert list(table.loc["square"]) == [6, 3, 3, 0]
    assert list(table.loc["all"]) == [12, 6, 6, 3]


def test_masks_are_those_of_classes_that_have_them_all(done: Done) -> None:
    masks = class_masks(done.config, done.inputs)
    assert list(masks) == [0]
    assert masks[0].shape == (6, 32, 32)
    assert masks[0].any((1, 2)).tolist() == [False] * 3 + [True] * 3
    assert class_masks(done.config, done.inputs)[0] is masks[0]  # read once
    smaller = folder_config(done.root, None, score={"map_size": 16})
    assert class_masks(smaller, done.inputs)[0].shape == (6, 16, 16)


def test_the_gallery_shows_the_image_of_median_score() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.2, 0.8, 0.7, 0.3])
    classes = np.array([0, 0, 0, 0, 0, 1, 1])
    labels = np.array([False, True, True, False, True, False, False])
    known = np.ones(7, bool)
    # Class 0, anomalous: 0.5, 0.8, 0.9; normal: 0.1, 0.2. Class 1, normal: 0.3, 0.7.
    assert typical_images(scores, classes, labels, known) == [4, 3, 5]
    known[4] = False
    assert typical_images(scores, classes, labels, known) == [1, 3, 5]


def test_the_gallery_s_maps_are_those_that_were_evaluated(done: Done) -> None:
    shown = gallery(done.config, done.inputs, done.result)
    assert shown["images"].shape == (4, 32, 32, 3)
    assert shown["images"].dtype == np.uint8
    assert shown["masks"] is not None
    assert shown["masks"].any((1, 2)).tolist() == [True, False, False, False]
    assert [title.partition("\n")[0] for title in shown["titles"]] == [
        "disc, spot", "disc, good", "square, spot", "square, good",
    ]  # fmt: skip
    scores = done.result.evaluation.scores
    medians = [np.sort(scores[i : i + 3])[1] for i in (3, 0, 9, 6)]
    np.testing.assert_allclose(shown["maps"].max((1, 2)), medians, rtol=1e-5)


@pytest.mark.parametrize("name", ["cudaa", "", "cpu:x", "meta", "cuda:-1"])
def test_a_device_that_is_none_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="expected auto, cpu, cuda, cuda:N or mps") as caught:
        select_device(name)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(InputError, match=r"is not there: found 0 .* use -p device auto or cpu"):
            select_device(name)
    with pytest.raises(InputError, match="found 1 cpu"):
        select_device("cpu:1")
    assert select_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device().type == "cuda"
    assert select_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"'cuda:2' is not there: found 2 cuda"):
        select_device("cuda:2")


def wrong_device(root: Path) -> tuple[dict[str, Any], str]:
    return {"device": "cudaa"}, "expected auto, cpu, cuda, cuda:N or mps"


def no_such_root(root: Path) -> tuple[dict[str, Any], str]:
    return {"data_root": str(root / "nowhere")}, "no such folder"


def class_without_training_images(root: Path) -> tuple[dict[str, Any], str]:
    shutil.rmtree(root / "disc" / "train" / "good")
    return {}, "disc"


def truncated_image(root: Path) -> tuple[dict[str, Any], str]:
    path = root / "disc" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:-200])
    return {}, r"001\.png"


def no_test_images(root: Path) -> tuple[dict[str, Any], str]:
    for name in ("disc", "square"):
        shutil.rmtree(root / name / "test")
        shutil.rmtree(root / name / "ground_truth")
    return {}, "expected test images"


def no_weights(root: Path) -> tuple[dict[str, Any], str]:
    return {"features": {"weights": str(root / "weights.safetensors")}}, r"weights\.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [wrong_device, no_such_root, class_without_training_images, truncated_image, no_test_images, no_weights],
)
def test_wrong_input_is_one_line_and_leaves_no_run(tmp_path: Path, spoil: Any) -> None:
    root = image_folder(tmp_path / "images")
    parameters, said = spoil(root)
    config = folder_config(root, tmp_path / "run", **parameters)
    run = RunDirectory.open(config)
    with pytest.raises(InputError, match=said) as caught:
        inputs = prepare(config, progress=False)
        train_model(config, inputs, run, progress=False)
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "run").rglob("*") if not p.name.startswith(".")]


def test_a_damaged_checkpoint_in_a_run_says_what_to_delete(done: Done, tmp_path: Path) -> None:
    config = folder_config(done.root, tmp_path / "run")
    run = RunDirectory.open(config)
    run.start(done.inputs.identity())
    run.checkpoint.write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"checkpoint\.safetensors.*delete it to train from the start"):
        train_model(config, done.inputs, run, progress=False)


@pytest.mark.filterwarnings("error:.*[Gg]lyph:UserWarning")
def test_classes_of_any_name_go_through(tmp_path: Path) -> None:
    # Read as a formula, as the row of the sum, and bytes that are no UTF-8.
    names = ("$x_{1}$", "all", "n" * 200 + "\udcff")
    root = image_folder(tmp_path / "images", classes=names)
    config = folder_config(root, tmp_path / "run", epochs=1)
    run = RunDirectory.open(config)
    inputs = prepare(config, progress=False)
    result = finish_run(config, inputs, train_model(config, inputs, run, progress=False), run)
    assert tuple(read_metrics(run.path)["per_class"]) == names
    assert HGAD.load(str(run.model)).classes == names
    assert [path.name[:2] for path in sorted((run.path / "maps").iterdir())] == [f"{i:02d}" for i in range(6)]
    table = summary(inputs)
    assert table.index.tolist() == [*names, "all"]
    assert table["train"].tolist() == [6, 6, 6, 18]
    with np.load(run.path / "scores.npz") as scores:
        figure = log_likelihood_histograms(*stored_histograms(scores, level=1))
    figure.draw_without_rendering()
    assert auroc_table(result.metrics).to_html()
    # The record speaks for itself when the images are gone.
    shutil.rmtree(root)
    assert read_config(run.path).digest == config.digest
    assert read_history(run.path)["epoch"].max() == config.train.epochs


def test_unlabelled_images_are_scored_and_counted_apart(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    source = image_folder(tmp_path / "images")
    for name in ("disc", "square"):
        shutil.copytree(source / name / "train" / "good", root / name)
        shutil.copytree(source / name / "test" / "spot", root / "score" / name)
    config = folder_config(root, tmp_path / "run", epochs=1)
    run = RunDirectory.open(config)
    inputs = prepare(config, progress=False)
    assert list(summary(inputs).loc["all"]) == [12, 0, 0, 6, 0]
    result = finish_run(config, inputs, train_model(config, inputs, run, progress=False), run)
    assert all(value is None for value in result.metrics["mean"].values())
    assert result.metrics["counts"]["test_unlabelled"] == 6
    with np.load(run.path / "scores.npz") as scores:
        assert np.isfinite(scores["score"]).all()
        assert not scores["labelled"].any()
        assert scores["log_likelihood_counts"].sum() == 0
    assert gallery(config, inputs, result)["titles"] == []


def test_classes_are_discovered_where_no_folder_names_them(tmp_path: Path) -> None:
    named = image_folder(tmp_path / "named")
    hidden = tmp_path / "hidden" / "parts"
    for split in ("train/good", "test/good"):
        (hidden / split).mkdir(parents=True)
        for number, path in enumerate(sorted(named.glob(f"*/{split}/*.png"))):
            shutil.copy(path, hidden / split / f"{number:02d}.png")
    config = folder_config(hidden.parent, tmp_path / "run", data={"classes": "discovered"})
    inputs = prepare(config, progress=False)
    assert inputs.dataset.classes == ("class_00", "class_01")
    # Files are in the order of their true classes, six to train on and three to test on of each.
    for records, of_each in ((inputs.dataset.train, 6), (inputs.dataset.test, 3)):
        names = [record.class_name for record in records]
        assert names in (
            ["class_00"] * of_each + ["class_01"] * of_each,
            ["class_01"] * of_each + ["class_00"] * of_each,
        )
    model = train_model(config, inputs, RunDirectory.open(config), progress=False)
    assert model.classes == inputs.dataset.classes


def test_a_run_calibrated_on_images_held_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", classes=("disc", "square", "third"))
    score = {"normalisation": "calibrated", "image": "top", "image_share": 0.02, "sigma": None}
    data = {"root": str(root), "image_size": 64, "held_out": 0.34}
    config = folder_config(root, tmp_path / "run", data=data, score=score, train={"evaluate_every": 1})
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    assert len(inputs.train) == 12 and inputs.held_out is not None and len(inputs.held_out) == 6
    assert inputs.calibration is not None and inputs.calibration[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert summary(inputs)["held out"].tolist() == [2, 2, 2, 6]
    assert inputs.identity() == prepare(folder_config(root, None), progress=False).identity()
    model = train_model(config, inputs, run, progress=False)
    result = finish_run(config, inputs, model, run)
    assert result.metrics["counts"]["train"] == 12 and result.metrics["counts"]["held_out"] == 6
    assert result.metrics["protocol"]["normalisation"] == "calibrated"
    assert result.metrics["other_protocols"]["calibrated/likelihood"]["mean"] == result.metrics["mean"]
    mean = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("normal_")}
    training.calibrate(model, inputs.train, inputs.train_classes, inputs.calibration)
    assert all(model.state_dict()[key].equal(value) for key, value in mean.items())
    # From files, as what the evaluation has.
    [(scores, _)] = predict_files(config, inputs, model, inputs.dataset.test[:3])
    np.testing.assert_allclose(scores, result.evaluation.scores[:3], rtol=2e-2, atol=2e-2)
    assert "inferred" in record_of(run.path)


def test_discovered_classes_of_images_held_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    data = {"root": str(root), "image_size": 64, "held_out": 0.34, "classes": "discovered"}
    inputs = prepare(folder_config(root, None, data=data), progress=False)
    assert inputs.calibration is not None and len(inputs.calibration[1]) == 4
    assert set(inputs.calibration[1]) <= set(inputs.train_classes) and len(inputs.train) == 8


def test_features_of_other_settings_are_refused(done: Done, tmp_path: Path) -> None:
    config = replace(done.config, run_dir=str(tmp_path / "other"))
    inputs = prepare(config, progress=False)
    other = replace(config, features=replace(config.features, join=not config.features.join))
    with pytest.raises(InputError, match=r"^expected features prepared .* found others of features\.join;"):
        train_model(other, inputs, RunDirectory.open(other), progress=False)
    inputs.check(replace(config, seed=7, train=replace(config.train, epochs=1)))
