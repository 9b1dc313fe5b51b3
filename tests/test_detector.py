"""The engineer's door: what goes in, what comes out, what is promised, and what a damaged thing says."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from small import CHANNELS, FLOW, GRIDS, PRIOR, features, image_folder
from torch import Tensor

from hgadlib.config import FlowConfig, PriorConfig, load_config
from hgadlib.datasets import load_dataset
from hgadlib.datasets.validation import hold_out
from hgadlib.detector import UNLIKE, Detector, Prediction, _digest
from hgadlib.errors import InputError
from hgadlib.evaluation.thresholds import Normals, images_needed
from hgadlib.method import read_tensors, write_tensors
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_metrics
from hgadlib.runs.experiment import train_model
from hgadlib.runs.inputs import prepare

Pixels = NDArray[np.uint8]
TINY = {
    "data.image_size": 64, "features.pyramid": None, "features.backbone": "tf_efficientnet_lite0",
    "score.map_size": 32,
}  # fmt: skip
RATE = 0.1


def picture(kind: int, number: int, *, fresh: bool = False) -> Pixels:
    """A noisy ground with a coloured square, 48 x 48: its colour is the class."""
    rng = np.random.default_rng([kind, number, fresh])
    pixels = rng.integers(90, 120, (48, 48, 3)).astype(np.uint8)
    pixels[12:36, 12:36, kind] = 200 + rng.integers(0, 20)
    return pixels


def pictures(kind: int, count: int, *, fresh: bool = False) -> list[Pixels]:
    return [picture(kind, number, fresh=fresh) for number in range(count)]


def checkerboard() -> Pixels:
    rows = np.indices((48, 48)).sum(0) // 3 % 2
    return np.repeat(rows.astype(np.uint8)[..., None] * 255, 3, 2)


def tiny(run_dir: Path, **more: Any) -> Detector:
    settings = {"false_alarm_rate": RATE, "epochs": 1, "device": "cpu", "overrides": TINY, **more}
    return Detector(run_dir=run_dir, **settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all that is written here, with a feature cache of its own."""
    folder = tmp_path_factory.mktemp("detector")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGAD_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def detector(home: Path) -> Detector:
    classes = {"red": pictures(0, 45), "green": pictures(1, 45)}
    return tiny(home / "run").fit(classes, progress=False)


@pytest.fixture(scope="module")
def saved(detector: Detector, home: Path) -> Path:
    return detector.save(home / "detector.safetensors")


def weights(detector: Detector) -> dict[str, Tensor]:
    return dict(detector.model_.state_dict())


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def only(predictions: Iterator[Prediction]) -> Prediction:
    (found,) = predictions
    return found


# Fit


def test_fit_on_a_folder_is_the_run_that_papermill_makes(home: Path) -> None:
    root = image_folder(home / "mvtec")
    found = tiny(home / "by_fit", false_alarm_rate=0.4).fit(root, progress=False)
    assert found.classes_ == ("disc", "square")
    assert found.metrics_ == read_metrics(home / "by_fit")
    assert found.metrics_["mean"]["image_auroc"] is not None
    overrides = {**TINY, "data.threshold": 0.2, "train.evaluate_every": 0}
    for run_dir in (home / "by_hand", home / "by_fit"):  # trained here, and read from there
        config = load_config(
            dataset="folder", data_root=str(root), device="cpu", epochs=1, run_dir=str(run_dir),
            overrides=overrides,
        )  # fmt: skip
        assert config.digest == found.config_.digest
        inputs = prepare(config, progress=False)
        model = train_model(config, inputs, RunDirectory.open(config), progress=False)
        assert_same_weights(weights(found), dict(model.state_dict()))
    # Images kept aside take no part in the training.
    splits = (inputs.dataset.train, inputs.dataset.held_out, inputs.dataset.threshold)
    assert [len(part) for part in splits] == [10, 0, 2]
    rates = found.evaluate(root, progress=False)
    assert rates["metrics"]["mean"] == found.metrics_["mean"]
    assert rates["false_alarms"]["all"].endswith("of 6") and rates["found"]["disc"].endswith("of 3")


@pytest.mark.parametrize("kind", ["flat folder", "paths and pillow", "tensors and folder"])
def test_fit_takes_images_in_any_form(kind: str, home: Path) -> None:
    stack = {"green": pictures(1, 6), "red": pictures(0, 6)}
    root = home / "flat"
    for name, own in stack.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(own):
            Image.fromarray(pixels).save(root / name / f"{i:06d}.png")
    files = sorted((root / "red").iterdir())
    given: dict[str, Any] = {
        "flat folder": root,
        "paths and pillow": {"red": files, "green": map(Image.fromarray, stack["green"])},
        "tensors and folder": {
            "red": str(root / "red"), "green": torch.from_numpy(np.stack(stack["green"])).movedim(3, 1),
        },
    }  # fmt: skip
    found = tiny(home / f"run {kind}", false_alarm_rate=0.4).fit(given[kind], progress=False)
    expected = tiny(home / "run arrays", false_alarm_rate=0.4).fit(stack, progress=False)
    assert found.classes_ == expected.classes_ == ("green", "red") and found.metrics_ == {}
    # The flow sees the same images in another order of the same hashes: the same split, the same weights.
    assert_same_weights(weights(found), weights(expected))


def test_fit_on_images_of_one_class(home: Path) -> None:
    found = tiny(home / "one", false_alarm_rate=0.3).fit(pictures(0, 15), progress=False)
    prediction = only(found.predict(picture(0, 0, fresh=True)))
    assert (prediction.class_name, prediction.class_confidence) == ("object", 1.0)
    assert found.trained_on_["threshold"] == {"object": 3}


def test_fit_takes_no_test_image_of_a_class_folder(home: Path) -> None:
    root = image_folder(home / "with_tests", classes=("disc",))
    found = tiny(home / "no_tests", false_alarm_rate=0.5).fit({"part": root / "disc"}, progress=False)
    assert found.trained_on_["images"] == {"part": {"train": 5, "held_out": 0, "threshold": 1, "test": 0}}
    two = image_folder(home / "two_classes")
    with pytest.raises(InputError, match="expected images of class 'part' alone, found disc, square"):
        tiny(home / "two").fit({"part": two}, progress=False)


def test_fit_finds_the_depth_of_16_bit_arrays(home: Path) -> None:
    deep = [pixels[..., 0].astype(np.uint16) * 16 for pixels in pictures(0, 6)]
    found = tiny(home / "deep", false_alarm_rate=0.5).fit(deep, progress=False)
    assert found.bit_depth_ == 12
    # Read as 16 bits its brightest pixel would be a 13.
    assert only(found.predict(deep[0])).image.max() > 190


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({}, "at least one class, found none"),
        ({"a/b": [np.zeros((8, 8), np.uint8)]}, "class 'a/b': expected a name that a folder can have"),
        ({"..": [np.zeros((8, 8), np.uint8)]}, "class '..': expected a name"),
        ({"x" * 300: [np.zeros((8, 8), np.uint8)]}, "expected a name that a folder can have"),
        ({"part": ["no/such.png"]}, "such.png: expected an image file, found none"),
        ({"part": [np.zeros((8, 8)), np.full((8, 8), np.nan)]}, "part, image 1: expected floating-point"),
        ({"part": [np.full((8, 8), i, np.uint8) for i in range(8)]}, "takes at least 9 normal images kept"),
        ([np.zeros((8, 8), np.uint8)] * 90, "takes at least 9 normal images kept aside, found 0"),
        ("no/such/folder", "no such folder"),
        (5, "expected images, a path or an iterable of them, found int"),
    ],
)  # fmt: skip
def test_fit_refuses_in_one_line(images: Any, expected: str, home: Path) -> None:
    with pytest.raises(InputError) as error:
        tiny(home / "refused").fit(images, progress=False)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_too_few_images_say_how_many_before_any_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(home / "cache of few"))
    detector = tiny(home / "few", false_alarm_rate=0.01)
    with pytest.raises(
        InputError, match=r"0\.01 takes at least 99 .* found 3 \(threshold_share 0\.2 of 15\)"
    ):
        detector.fit(pictures(0, 15), progress=False)
    assert not (home / "few").exists() and not hasattr(detector, "model_")
    assert not list((home / "cache of few").glob("*/manifest.json")), "features were computed"
    with pytest.raises(InputError, match=r"between 0 and 1, found 1\.5"):
        Detector(false_alarm_rate=1.5).fit(pictures(0, 15))


# Manners


def test_manners_of_scikit_learn(detector: Detector) -> None:
    fresh = clone(detector)
    assert fresh.get_params() == detector.get_params() and fresh is not detector
    assert fresh.set_params(false_alarm_rate=0.3).false_alarm_rate == 0.3
    assert detector.false_alarm_rate == RATE
    assert repr(Detector(epochs=3)) == "Detector(epochs=3)"
    with pytest.raises(ValueError, match="epoch"):
        fresh.set_params(epoch=3)
    for act in (
        lambda: fresh.predict([]), lambda: fresh.evaluate("x"), lambda: fresh.save("x"), lambda: fresh.card(),
        lambda: fresh.normals_for("red"), lambda: fresh.drift([]), lambda: fresh.add_class("x", []),
    ):  # fmt: skip
        with pytest.raises(NotFittedError, match=r"call fit, or Detector\.load"):
            act()


def test_another_rate_takes_effect_without_another_fit(detector: Detector) -> None:
    kept = detector.normals_["red"]
    assert detector.normals_for("red") == (kept, "class")
    other = clone(detector)
    vars(other).update({k: v for k, v in vars(detector).items() if k.endswith("_")})
    other.set_params(false_alarm_rate=0.5)
    found, before = (only(d.predict(picture(0, 1, fresh=True), class_name="red")) for d in (other, detector))
    assert found.threshold == kept.threshold(0.5) < before.threshold == kept.threshold(RATE)


# Predict


def same(pixels: Pixels) -> dict[str, Any]:
    """One picture in every form that it may come in."""
    chw = torch.from_numpy(pixels).movedim(2, 0)
    return {
        "uint8": pixels, "pillow": Image.fromarray(pixels), "float64": pixels / 255,
        "float32": (pixels / 255).astype(np.float32), "uint16": pixels.astype(np.uint16) * 257,
        "big endian": (pixels.astype(np.uint16) * 257).astype(">u2"),
        "rgba": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
        "fortran": np.asfortranarray(pixels), "negative strides": pixels[::-1, ::-1].copy()[::-1, ::-1],
        "tensor": chw, "tensor float": chw / 255, "tensor of the network's": (chw / 255).requires_grad_(),
        "masked": np.ma.masked_array(pixels),
    }  # fmt: skip


def test_forms_of_a_picture_agree(detector: Detector, home: Path) -> None:
    pixels = picture(1, 3, fresh=True)
    forms = same(pixels)
    Image.fromarray(pixels).save(home / "picture.png")
    forms["path"], forms["text"] = home / "picture.png", str(home / "picture.png")
    found = dict(zip(forms, detector.predict(list(forms.values())), strict=True))
    for name, prediction in found.items():
        assert prediction.score == pytest.approx(found["uint8"].score, abs=1e-4), name
        np.testing.assert_array_equal(prediction.image, found["uint8"].image)
    assert (found["path"].name, found["uint8"].name) == (str(home / "picture.png"), "image 0")


def test_grey_forms_agree_and_bool_is_black_and_white(detector: Detector) -> None:
    grey = picture(0, 2)[..., 0]
    forms = [
        grey, grey[..., None], np.repeat(grey[..., None], 3, 2), Image.fromarray(grey),
        torch.from_numpy(grey), torch.from_numpy(grey)[None], grey.astype(np.uint16) * 257, grey / 255,
    ]  # fmt: skip
    scores = [prediction.score for prediction in detector.predict(forms)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    marks = grey > 100
    one, other = detector.predict([marks, marks.astype(np.uint8) * 255])
    assert one.score == pytest.approx(other.score, rel=1e-5)
    half = torch.from_numpy(marks).to(torch.bfloat16)
    assert only(detector.predict(half)).score == pytest.approx(one.score, rel=1e-5)


@pytest.mark.parametrize("policy", ["stretch", "short_side_center_crop", "pad"])
def test_any_size(policy: Any, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(detector.config_, data=replace(detector.config_.data, resize=policy))
    monkeypatch.setattr(detector, "config_", config)
    sizes = [(1, 1), (1, 300), (300, 7), (2, 3), (700, 500)]
    images = [np.full((*size, 3), 100, np.uint8) for size in sizes]
    for prediction in detector.predict(images):
        assert prediction.anomaly_map.shape == prediction.mask.shape == (32, 32)
        assert prediction.image.shape == prediction.overlay().shape == (32, 32, 3)
        assert np.isfinite(prediction.anomaly_map).all() and math.isfinite(prediction.score)


def test_alone_is_as_in_a_batch_and_in_any_order(detector: Detector) -> None:
    images = [*pictures(0, 5, fresh=True), *pictures(1, 5, fresh=True), checkerboard()]
    alone = [only(detector.predict(image)) for image in images]
    batches = [list(detector.predict(np.stack(images), batch_size=size)) for size in (1, 3, 11)]
    backwards = list(detector.predict(iter(images[::-1])))[::-1]
    for other in (*batches, backwards):
        for one, two in zip(alone, other, strict=True):
            assert two.score == pytest.approx(one.score, rel=1e-4, abs=1e-4)
            np.testing.assert_allclose(two.anomaly_map, one.anomaly_map, rtol=1e-4, atol=1e-4)
            assert (one.class_name, one.is_unknown) == (two.class_name, two.is_unknown)


def test_a_stream_is_judged_image_by_image_in_constant_memory(detector: Detector) -> None:
    alive: list[weakref.ref[Any]] = []

    def camera() -> Iterator[Pixels]:
        number = 0
        while True:
            pixels = picture(0, number % 3)
            alive.append(weakref.ref(pixels))
            yield pixels
            number += 1

    most = 0
    for judged, _ in enumerate(detector.predict(camera()), start=1):
        assert len(alive) == judged  # the next image was not asked for
        most = max(most, sum(ref() is not None for ref in alive))
        if judged == 25:
            break
    assert most <= 2


def test_threads_share_a_detector(detector: Detector) -> None:
    images = [*pictures(0, 4, fresh=True), *pictures(1, 4, fresh=True)]
    expected = [(p.score, p.image.mean()) for p in detector.predict(images, batch_size=1)]
    start = threading.Barrier(8)

    def judge(turn: int) -> list[tuple[float, float]]:
        start.wait()
        return [
            (p.score, p.image.mean()) for p in detector.predict(images[turn:] + images[:turn], batch_size=1)
        ]

    with ThreadPoolExecutor(8) as pool:
        for turn, found in enumerate(pool.map(judge, range(8))):
            assert found == expected[turn:] + expected[:turn]


def test_class_given_or_inferred(detector: Detector) -> None:
    images = pictures(1, 4, fresh=True)
    inferred, given, wrong = (
        list(detector.predict(images, class_name=name)) for name in (None, "green", "red")
    )
    for one, two, three in zip(inferred, given, wrong, strict=True):
        assert (one.class_name, two.class_name, three.class_name) == ("green", "green", "red")
        assert one.score == pytest.approx(two.score, abs=1e-4) and three.score > 3 * three.threshold
        assert 0.5 < one.class_confidence <= 1 and math.isnan(two.class_confidence)
        assert two.to_dict()["class_confidence"] is None
        json.dumps(one.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="expected one of the classes green, red, found 'blue'"):
        detector.predict(images, class_name="blue")
    with pytest.raises(InputError, match="batch_size of at least 1, found 0"):
        detector.predict(images, batch_size=0)


def test_a_picture_of_no_known_class_is_told(detector: Detector) -> None:
    strange = [checkerboard(), np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)]
    for prediction in detector.predict(strange):
        assert prediction.is_unknown and prediction.is_anomalous
    normal = list(detector.predict([*pictures(0, 30, fresh=True), *pictures(1, 30, fresh=True)]))
    # Of any distribution at most one in 37 lies so far below its mean (Cantelli's inequality).
    assert stats.binom(60, 1 / 37).sf(sum(p.is_unknown for p in normal) - 1) > 1e-3
    # A small defect is no other kind of thing. (A larger one reaches most of a grid of 4 x 4.)
    defect = picture(0, 9, fresh=True)
    defect[:1, :1] = 0
    prediction = only(detector.predict(defect))
    assert prediction.is_anomalous and not prediction.is_unknown
    assert prediction.mask.any() and prediction.p_value == pytest.approx(0.1)


def test_unlike_never_costs_a_false_alarm(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "typical_", detector.typical_ + np.array([100 * UNLIKE, 0]))
    for prediction in detector.predict(pictures(0, 8, fresh=True)):
        assert prediction.is_anomalous == prediction.is_unknown == (prediction.score > prediction.threshold)


def bad_images(folder: Path) -> dict[str, Any]:
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 0)).save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:400])
    grey = np.zeros((8, 8))
    return {
        "nan": grey + np.nan, "infinite": grey + np.inf, "negative": grey - 1, "above 1": grey + 2,
        "no rows": np.zeros((0, 8, 3), np.uint8), "no columns": np.zeros((8, 0), np.uint8),
        "int64": grey.astype(np.int64), "complex": grey.astype(complex), "objects": grey.astype(object),
        "text in an array": np.full((8, 8), "a"), "records": np.zeros((8, 8), [("a", int)]),
        "two channels": np.zeros((8, 8, 2)), "five channels": np.zeros((5, 8, 8)), "one axis": np.zeros(8),
        "no axis": np.zeros(()), "batch in a batch": np.zeros((1, 8, 8, 3)), "none": None, "number": 5,
        "list": [1, 2], "missing": folder / "missing.png", "text": folder / "text.png", "folder": folder,
        "empty": folder / "empty.png", "truncated": folder / "truncated.png", "zero byte": "a\0.png",
        "pillow float": Image.fromarray(grey.astype(np.float32)), "pillow none": Image.new("RGB", (0, 4)),
        "sparse": torch.zeros(8, 8).to_sparse(), "meta": torch.zeros(8, 8, device="meta"),
        "billions": np.broadcast_to(np.uint8(0), (10**6, 10**6)),
    }  # fmt: skip


def test_bad_images_are_one_line_each_and_can_be_passed_over(detector: Detector, home: Path) -> None:
    folder = home / "bad"
    folder.mkdir()
    bad = bad_images(folder)
    for name, image in bad.items():
        with pytest.raises(InputError) as error:
            list(detector.predict([image]))
        assert "\n" not in str(error.value), name
    good, told = picture(0, 0, fresh=True), []
    mixed = [item for image in bad.values() for item in (image, good)]
    found = list(detector.predict(mixed, on_error=lambda name, error: told.append((name, str(error)))))
    assert len(found) == len(told) == len(bad)
    assert told[0][0] == "image 0" and told[0][1].startswith("image 0: expected floating-point values from 0")
    assert [p.name for p in found[:3]] == ["image 1", "image 3", "image 5"]
    with pytest.raises(InputError, match="found int"):
        detector.predict(5)


def test_a_folder_is_read_with_all_below_but_no_litter(detector: Detector, home: Path) -> None:
    folder = home / "shots"
    for name in ("b.png", "a/c.jpg", "a/.hidden.png", "@eaDir/b.png", "a/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(0, 0)).save(folder / name, "PNG")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "a" / "loop").symlink_to(folder)
    told: list[str] = []
    found = detector.predict(folder, on_error=lambda name, error: told.append(f"{name} {error}"))
    assert [Path(p.name).relative_to(folder).as_posix() for p in found] == ["a/c.jpg", "b.png"]
    assert len(told) == 1 and "gone.png: no such file" in told[0]
    (home / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing"):
        detector.predict(home / "nothing")


# Thresholds


def test_false_alarms_over_200_splits_are_as_promised() -> None:
    rng, n, new, splits = np.random.default_rng(0), 39, 400, 200
    scores, peaks = rng.gamma(2, size=(2, splits, n + new)) * np.array([1, 3])[:, None, None]
    kept = [Normals(scores[i, :n], peaks[i, :n]) for i in range(splits)]
    for rate in (0.05, 0.1, 0.25):
        # The k-th smallest of n is exceeded with a probability that is Beta distributed.
        k = math.ceil(round((n + 1) * (1 - rate), 9))
        share = stats.beta(n + 1 - k, k)
        variance = share.var() + (share.mean() - share.moment(2)) / new
        error = 4 * math.sqrt(variance / splits)
        alarms = [(scores[i, n:] > kept[i].threshold(rate)).mean() for i in range(splits)]
        marked = [(peaks[i, n:] > kept[i].pixel_threshold(rate)).mean() for i in range(splits)]
        for found in (alarms, marked):
            assert abs(np.mean(found) - share.mean()) < error and share.mean() <= rate


def test_a_real_detectors_false_alarms_are_as_promised(detector: Detector) -> None:
    found = list(detector.predict(pictures(0, 70, fresh=True), class_name="red"))
    scores, maps = np.array([p.score for p in found]), np.stack([p.anomaly_map for p in found])
    rng, n, alarms, marked = np.random.default_rng(0), 29, [], []
    for _ in range(200):
        order = rng.permutation(len(found))
        kept = Normals(scores[order[:n]], maps[order[:n]].max((1, 2)))
        alarms.append((scores[order[n:]] > kept.threshold(RATE)).mean())
        threshold = kept.pixel_threshold(RATE)
        marked.append((maps[order[n:]] > threshold).any((1, 2)).mean())
    for shares in (alarms, marked):
        # The images are given, the splits independent: the rank of a new one among them is uniform.
        assert np.mean(shares) < RATE + 4 * np.std(shares) / math.sqrt(200)
        assert np.mean(shares) > RATE - 1 / (n + 1) - 4 * np.std(shares) / math.sqrt(200)
    # What predict says is what these say: of its own thresholds and masks.
    for prediction in found[:10]:
        own = detector.normals_["red"]
        assert prediction.is_anomalous == (prediction.score > own.threshold(RATE))
        assert prediction.is_anomalous == (prediction.p_value <= RATE)
        assert prediction.mask.any() == (prediction.anomaly_map.max() > own.pixel_threshold(RATE))
    # Where the class is inferred, the same holds: it is inferred rightly.
    inferred = list(detector.predict(pictures(0, 70, fresh=True)))
    np.testing.assert_allclose([p.score for p in inferred], scores, atol=1e-3)


def test_thresholds_of_inferred_classes_are_of_images_judged_without_their_class(home: Path) -> None:
    # Two classes that nobody can tell apart, and one that everybody can.
    root = home / "alike"
    for name, kind, first in (("one", 0, 0), ("other", 0, 45), ("green", 1, 0)):
        (root / name).mkdir(parents=True)
        for i in range(first, first + 45):
            Image.fromarray(picture(kind, i)).save(root / name / f"{i:03d}.png")
    found = tiny(home / "alike run").fit(root, progress=False)
    kept = hold_out(load_dataset("folder", root=root), 0.2, "threshold").threshold
    judged = list(found.predict([record.path for record in kept]))
    by_class: dict[str, list[Prediction]] = {}
    for prediction in judged:
        by_class.setdefault(prediction.class_name, []).append(prediction)
    assert any(p.class_name != Path(p.name).parent.name for p in judged)
    assert {n: len(own.scores) for n, own in found.normals_.items()} == {n: 9 for n in found.classes_}
    for name, own in by_class.items():
        normals = found.inferred_normals_[name]
        np.testing.assert_allclose(normals.scores, sorted(p.score for p in own), atol=1e-2)
        np.testing.assert_allclose(normals.peaks, sorted(p.anomaly_map.max() for p in own), atol=1e-2)
        expected, promise = found.normals_for(name, inferred=True)
        assert {(p.threshold, p.promise) for p in own} == {(expected.threshold(RATE), promise)}
    assert sum(len(own.scores) for own in found.inferred_normals_.values()) == len(kept)
    given = only(found.predict(kept[0].path, class_name="one"))
    assert given.threshold == found.normals_["one"].threshold(RATE)
    read = Detector.load(found.save(home / "alike.safetensors"))
    again = list(read.predict([record.path for record in kept]))
    assert [p.threshold for p in again] == [p.threshold for p in judged]


def test_a_class_of_few_images_has_the_threshold_of_all(home: Path) -> None:
    classes = {"red": pictures(0, 45), "green": pictures(1, 8), "blue": pictures(2, 2)}
    found = tiny(home / "few of one").fit(classes, progress=False)
    assert found.trained_on_["threshold"] == {"blue": 0, "green": 2, "red": 9}
    one, other = found.predict([picture(1, 0, fresh=True), picture(0, 0, fresh=True)])
    assert (one.class_name, one.promise) == ("green", "all classes")
    assert (other.class_name, other.promise) == ("red", "class")
    together = Normals.together(list(found.normals_.values()))
    assert one.threshold == together.threshold(RATE) and len(together.scores) == 11
    assert one.pixel_threshold == together.pixel_threshold(RATE)
    assert (one.p_value, one.percentile) == (together.p_value(one.score), together.percentile(one.score))
    sorts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "sort", lambda *given, **more: sorts.append(given))
        assert list(found.predict(pictures(1, 3, fresh=True))) and not sorts, "once, not for each image"
    assert "| green | 2 |" in found.card() and "| all classes |" in found.card()
    assert "judged without their class too" in found.card()
    # One image has no deviation, so any other of its class would be unlike it.
    assert found.typical_[0, 1] > 0.5 * found.typical_[2, 1]
    assert images_needed(RATE) == 9


# Save and load


def test_a_saved_detector_says_the_same_without_unpickling(
    detector: Detector, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    images = [*pictures(0, 3, fresh=True), *pictures(1, 3, fresh=True), checkerboard()]
    found = Detector.load(saved, device="cpu")
    assert found.get_params() == {**detector.get_params(), "run_dir": None}
    for one, other in zip(detector.predict(images), found.predict(images), strict=True):
        assert replace(one, seconds=0.0).to_dict() == replace(other, seconds=0.0).to_dict()
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    assert found.card() == detector.card() == saved.with_suffix(".md").read_text()
    again = found.save(saved.with_name("again.safetensors"))
    assert read_tensors(again)[1]["digest"] == read_tensors(saved)[1]["digest"]


MOVED = """
import json, sys
import numpy as np
from hgadlib import Detector
found = Detector.load("moved.safetensors").predict(np.load("images.npy"))
print(json.dumps([[p.score, p.threshold, p.class_name, p.is_unknown] for p in found]))
"""


def test_a_moved_detector_needs_nothing_else(detector: Detector, saved: Path, tmp_path: Path) -> None:
    images = np.stack([picture(0, 0, fresh=True), picture(1, 0, fresh=True), checkerboard()])
    shutil.copy(saved, tmp_path / "moved.safetensors")
    np.save(tmp_path / "images.npy", images)
    nowhere = {name: str(tmp_path / "nowhere" / name) for name in ("HGAD_CACHE", "HGAD_DATA", "HOME")}
    done = subprocess.run(
        [sys.executable, "-c", MOVED], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | nowhere | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for found, one in zip(json.loads(done.stdout), detector.predict(images), strict=True):
        assert found == [pytest.approx(one.score, abs=1e-4), one.threshold, one.class_name, one.is_unknown]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "moved.safetensors"]


def resealed(saved: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """Write a saved detector with another content, and a digest that fits it."""
    tensors, metadata = read_tensors(saved)
    spec = json.loads(metadata["hgad_detector"])
    change(spec, tensors)
    text = json.dumps(spec)
    write_tensors(target, tensors, {"hgad_detector": text, "digest": _digest(tensors, text)})
    return target


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no params": lambda spec, _: spec.pop("params"),
    "strange params": lambda spec, _: spec["params"].update(colour="blue"),
    "rate as text": lambda spec, _: spec["params"].update(false_alarm_rate="low"),
    "rate too low": lambda spec, _: spec["params"].update(false_alarm_rate=0.001),
    "format as text": lambda spec, _: spec.update(format="one"),
    "config as list": lambda spec, _: spec.update(config=[1]),
    "strange setting": lambda spec, _: spec["config"]["flow"].update(colour="blue"),
    "another backbone": lambda spec, _: spec["config"]["features"].update(backbone="resnet18"),
    "backbone as text": lambda spec, _: spec.update(backbone="lite0"),
    "architecture none": lambda spec, _: spec.update(architecture=None),
    "another grid": lambda spec, _: spec["architecture"].update(grids=[[1, 1]]),
    "classes missing": lambda spec, _: spec["architecture"].update(classes=["red"]),
    "classes as number": lambda spec, _: spec["architecture"].update(classes=5),
    "no model": lambda _, tensors: [tensors.pop(k) for k in list(tensors) if k.startswith("model.")],
    "no backbone": lambda _, tensors: [tensors.pop(k) for k in list(tensors) if k.startswith("backbone.")],
    "no scores": lambda _, tensors: [tensors.pop(k) for k in list(tensors) if k.startswith("normals.")],
    "no peaks": lambda _, tensors: tensors.pop("normals.0.peaks"),
    "no typical values": lambda _, tensors: tensors.pop("typical"),
    "typical values of one": lambda _, tensors: tensors.update(typical=tensors["typical"][:1].clone()),
    "no reference": lambda _, tensors: tensors.pop("reference.0"),
    "scores not finite": lambda _, tensors: tensors["normals.0.scores"].fill_(torch.nan),
    "scores of another type": lambda _, t: t.update({"normals.0.scores": t["normals.0.scores"].bfloat16()}),
    "trained on a number": lambda spec, _: spec.update(trained_on=5),
    "metrics as number": lambda spec, _: spec.update(metrics=5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_description_is_one_line(name: str, saved: Path, tmp_path: Path) -> None:
    file = resealed(saved, tmp_path / "x.safetensors", CHANGES[name])
    with pytest.raises(InputError) as error:
        Detector.load(file, device="cpu")
    assert "\n" not in str(error.value)


def test_another_file_says_what_it_is(detector: Detector, saved: Path, tmp_path: Path) -> None:
    def refused(expected: str, file: Path) -> None:
        with pytest.raises(InputError, match=expected):
            Detector.load(file, device="cpu")

    file = tmp_path / "x.safetensors"
    newer = resealed(saved, file, lambda spec, _: spec.update(format=99))
    refused("written by a newer version of hgadlib .format 99, this one reads up to 1.; update", newer)
    tensors, metadata = read_tensors(saved)
    write_tensors(file, tensors, {**metadata, "hgad_detector": "{" * 10**5})
    refused("expected a detector of this version", file)
    write_tensors(file, tensors, {**metadata, "hgad_detector": "[" * 10**5})
    refused("expected a detector of this version", file)
    save_file({"x": torch.zeros(1)}, file)
    refused("another safetensors file", file)
    detector.model_.save(file)
    refused("expected a detector, found a model alone", file)
    refused("expected a safetensors file, found none", tmp_path / "none.safetensors")
    refused("expected a safetensors file, found none", tmp_path)
    file.write_bytes(saved.read_bytes()[:-100])
    refused("expected a whole safetensors file", file)
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1  # a weight
    file.write_bytes(content)
    refused("was changed after it was written", file)
    file.write_bytes(saved.read_bytes().replace(b"red", b"rod", 1))
    refused("was changed after it was written", file)


def test_saving_is_refused_before_anything_is_written(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model card takes this name"):
        detector.save(tmp_path / "detector.md")
    strict = Detector.load(detector.save(tmp_path / "a.safetensors")).set_params(false_alarm_rate=0.001)
    with pytest.raises(InputError, match="at least 999"):
        strict.save(tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "a.safetensors"]


# A class more


def grown_model(covariance: Any, n_centers: int) -> tuple[HGAD, HGAD, HGAD, Callable[..., Any]]:
    """Models of two and of three classes with the same flow, and the first with a class more, in float64."""
    data, class_idx = features(12, n_classes=3)
    levels, labels = [x.double() for x in data.levels], torch.from_numpy(class_idx)
    prior = replace(PRIOR, covariance=covariance, init="class_means", n_centers=n_centers)
    flow = replace(FLOW, normalise="none")

    def batches(*classes: int) -> Callable[[], Iterator[tuple[list[Tensor], Tensor]]]:
        def of() -> Iterator[tuple[list[Tensor], Tensor]]:
            own = torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]
            for index in own.split(3):
                yield (
                    [x[index] for x in levels],
                    labels[index].clamp_max(1) if classes == (0, 2) else labels[index],
                )

        return of

    def made(names: list[str]) -> HGAD:
        torch.manual_seed(0)
        return HGAD(names, CHANNELS, GRIDS, flow=flow, prior=prior).double()

    whole, part = made(["a", "b", "c"]), made(["a", "c"])
    part.flows.load_state_dict(whole.flows.state_dict())
    whole.initialise(batches(0, 1, 2))
    part.initialise(batches(0, 2))
    return part, whole, part.with_class("b", batches(1)), batches


@pytest.mark.parametrize(("covariance", "n_centers"), [("class", 3), ("learnt", 1), ("identity", 3)])
def test_a_class_more_is_what_a_new_model_starts_with(covariance: Any, n_centers: int) -> None:
    part, whole, grown, batches = grown_model(covariance, n_centers)
    assert grown.classes == whole.classes == ("a", "b", "c") and part.classes == ("a", "c")

    def priors(model: HGAD) -> list[HierarchicalGaussianMixture]:
        return [cast(HierarchicalGaussianMixture, prior) for prior in model.priors]

    for one, other, before in zip(priors(grown), priors(whole), priors(part), strict=True):
        torch.testing.assert_close(one.centers, other.centers, rtol=0, atol=1e-12)
        if covariance != "identity":
            torch.testing.assert_close(one.factor[1], other.factor[1], rtol=1e-9, atol=1e-9)
            assert not torch.equal(one.factor[1], torch.eye(len(one.factor[1])).double())
        assert one.deltas[1].any().item() == (n_centers > 1)
        for name, value in before.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name][[0, 2]], value, rtol=0, atol=0)
    x, _ = next(batches(0, 1, 2)())
    for old, new in ((0, 0), (1, 2)):
        index = torch.full((3,), old), torch.full((3,), new)
        pairs = zip(part.log_prob(x, index[0]), grown.log_prob(x, index[1]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if covariance == "class":
        own = torch.full((3,), 1)
        z = [flow(level)[0] for (flow, _), level in zip(grown.levels, x, strict=True)]
        for prior, latent in zip(priors(grown), z, strict=True):
            spread = torch.linalg.inv(prior.factor[1].T @ prior.factor[1])
            normals = torch.distributions.MultivariateNormal(prior.intra_centers()[1], spread)
            shares = torch.distributions.Categorical(logits=prior.psi_intra[1])
            mixture = torch.distributions.MixtureSameFamily(shares, normals)
            torch.testing.assert_close(
                prior.log_prob(latent, own), mixture.log_prob(latent), rtol=1e-7, atol=1e-6
            )
    with pytest.raises(InputError, match="that the model does not know, found 'a'"):
        part.with_class("a", batches(1))


def test_a_class_more_under_one_gaussian_for_all() -> None:
    torch.manual_seed(0)
    made = HGAD(["a", "c"], CHANNELS, GRIDS, flow=FlowConfig(layers=1), prior=PriorConfig(kind="single"))
    grown = made.with_class("b", lambda: iter(()))
    assert grown.log_prob_max.shape == (3, 2) and made.log_prob_max.shape == (2, 2)


def blue_tests(root: Path) -> Path:
    """Write test images of three classes, normal ones and such with a dark spot."""
    for kind, name in enumerate(("red", "green", "blue")):
        for split, defect, count in (("train", "good", 1), ("test", "good", 6), ("test", "spot", 6)):
            folder = root / name / split / defect
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = picture(kind, 100 + i, fresh=True)
                if defect == "spot":
                    pixels[14 + 2 * i : 20 + 2 * i, 20:28] = 0
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_add_class_leaves_the_others_and_says_what_it_costs(detector: Detector, home: Path) -> None:
    blue, root = pictures(2, 45), blue_tests(home / "blue tests")
    images, before = [*pictures(0, 4, fresh=True), *pictures(1, 4, fresh=True)], weights(detector)
    before = {name: value.clone() for name, value in before.items()}
    scores = [p.score for p in detector.predict(images)]
    strange = list(detector.predict(pictures(2, 4, fresh=True)))
    assert all(p.is_anomalous for p in strange)
    retrained = tiny(home / "three").fit(
        {"red": pictures(0, 45), "green": pictures(1, 45), "blue": blue}, progress=False
    )
    grown, report = detector.add_class("blue", blue, test=root, retrained=retrained, progress=False)
    assert grown.classes_ == ("blue", "green", "red") and detector.classes_ == ("green", "red")
    assert_same_weights(weights(detector), before)
    # Parted as fit parts them: the same images for the same purpose, so the same for the retrained one.
    assert report.images == {"train": 36, "held_out": 0, "threshold": 9} and report.promise == "class"
    assert grown.trained_on_["threshold"] == retrained.trained_on_["threshold"]
    for one, other in zip(images, grown.predict(images), strict=True):
        assert other.score == pytest.approx(scores.pop(0), abs=1e-4), one.shape
    for name in ("red", "green"):
        assert grown.normals_[name] is detector.normals_[name]
    found = list(grown.predict(pictures(2, 20, fresh=True)))
    assert {p.class_name for p in found} == {"blue"} and not any(p.is_unknown for p in found)
    alarms = sum(p.is_anomalous for p in found)
    # Over draws of the 9 images kept aside as well: 9 images and one more, ten ranks.
    assert stats.betabinom(20, 1, 9).sf(alarms - 1) > 1e-3
    # Its cost, by the same test images.
    assert report.others_before == report.others_after and report.score_change == 0
    assert report.taken is not None and report.missed is not None
    assert (report.taken.trials, report.missed.trials) == (24, 12)
    took = [p for p in grown.predict(root / "red" / "test") if p.class_name == "blue"]
    assert report.taken.events == len(took) < 4
    # A spot on the square, which alone tells the classes apart, may be seen from all of a grid of 4 x 4.
    assert report.missed.events <= 6 and all(p.class_name == "blue" for p in found)
    assert (
        report.own["image_auroc"]
        == grown.evaluate(root, progress=False)["metrics"]["per_class"]["blue"]["image_auroc"]
    )
    again = retrained.evaluate(root, progress=False)["metrics"]["per_class"]["blue"]
    assert report.retrained == again
    assert report.behind()["image_auroc"] == pytest.approx(again["image_auroc"] - report.own["image_auroc"])
    json.dumps(report.to_dict(), allow_nan=False)
    # It is a detector as any: its file, its card, its drift, a class more.
    copy = Detector.load(grown.save(home / "grown.safetensors"), device="cpu")
    left, right = only(copy.predict(blue[0])), only(grown.predict(blue[0]))
    assert replace(left, seconds=0.0).to_dict() == replace(right, seconds=0.0).to_dict()
    assert "Added since, without training: blue." in copy.card()
    assert set(copy.drift(found).normals) >= {"blue"}
    with pytest.raises(InputError, match="does not know, found 'blue'"):
        copy.add_class("blue", blue, progress=False)


def test_add_class_of_few_images_and_to_a_baseline(
    detector: Detector, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown, report = detector.add_class("blue", pictures(2, 6), progress=False)
    assert report.promise == "all classes" and report.taken is None and report.behind() == {}
    assert only(grown.predict(picture(2, 0, fresh=True), class_name="blue")).promise == "all classes"
    monkeypatch.setattr(detector, "config_", replace(detector.config_, method="neighbours"))
    with pytest.raises(InputError, match="expected a detector of method hgad, found neighbours"):
        detector.add_class("blue", pictures(2, 6), progress=False)
    one_for_one = replace(detector.config_, method="hgad", setting="one_for_one")
    monkeypatch.setattr(detector, "config_", one_for_one)
    with pytest.raises(InputError, match="method hgad, found a model for each class; fit it anew"):
        detector.add_class("blue", pictures(2, 6), progress=False)


# Malformed and adversarial


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(rng: np.random.Generator) -> bytes:
    """A whole image file of some format."""
    kind = str(rng.choice(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000"]))
    size = rng.integers(1, 40, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def damaged_file(rng: np.random.Generator, path: Path) -> Path:
    """Write a file that is whole, cut, flipped in some bits, of random bytes, or a lie in its header."""
    content, way = bytearray(encoded(rng)), int(rng.integers(6))
    if way == 0:
        content = content[: rng.integers(len(content))]
    elif way in (1, 2):
        for _ in range(int(rng.integers(1, 12))):
            reach = len(content) if way == 1 else min(64, len(content))
            content[rng.integers(reach)] ^= 1 << int(rng.integers(8))
    elif way == 3:
        content = bytearray(rng.bytes(int(rng.integers(2000))))
    elif way == 4:
        sides = [int(2 ** rng.uniform(0, 31)) for _ in range(2)]
        content = bytearray(
            png(sides[0], sides[1], zlib.compress(bytes(10000)), depth=int(rng.choice([8, 16])))
        )
        if math.prod(sides) < 1e8 and math.prod(sides) > 1e6:
            content = bytearray(png(60000, 60000, b""))
    else:
        start = int(rng.integers(len(content)))
        content[start : start + 20] = rng.bytes(20)
    path = path.with_suffix(str(rng.choice([".png", ".jpg", ".tif", ".gif", ""])))
    path.write_bytes(content)
    return path


def strange_array(rng: np.random.Generator) -> Any:
    """An array or a tensor of a random type, shape and layout, now and then a good one."""
    shape = tuple(int(n) for n in rng.integers(0, 7, rng.integers(0, 6)))
    if rng.random() < 0.6:
        shape = (*(int(n) for n in rng.integers(1, 60, 2)), *([3], [4], [1], [])[int(rng.integers(4))])
    types = "?bBhHiIlLefdgFDSUOMmV"
    values = rng.integers(-300, 70000, shape) if rng.random() < 0.3 else rng.random(shape)
    with np.errstate(all="ignore"):
        array = np.asarray(values).astype(np.dtype(str(rng.choice(list(types)))), casting="unsafe", copy=True)
    if array.dtype.kind in "fc" and array.size and rng.random() < 0.3:
        array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf, -1e-9, 1 + 1e-9])
    if rng.random() < 0.3:
        array = array[tuple(slice(None, None, int(rng.choice([-1, 2, -2]))) for _ in array.shape)]
    if rng.random() < 0.2:
        array = array.astype(array.dtype.newbyteorder(), copy=False)
    array = np.asarray(array)
    if rng.random() < 0.2:
        array = array.T
    if (
        rng.random() < 0.2
        and array.dtype.kind in "bfi"
        and array.dtype.isnative
        and array.dtype.itemsize <= 8
    ):
        dtype = (torch.bfloat16, torch.float16, torch.int32)[int(rng.integers(3))]
        return torch.from_numpy(array.copy()).to(dtype)
    if rng.random() < 0.1 and array.dtype == np.uint8 and array.ndim == 2 and array.size:
        return Image.fromarray(array).convert(str(rng.choice(["1", "P", "LA", "CMYK", "YCbCr", "I", "F"])))
    return array


@pytest.mark.filterwarnings("ignore::Warning")
def test_500_malformed_images_are_judged_or_refused(detector: Detector, tmp_path: Path) -> None:
    rng, judged, refused = np.random.default_rng(0), 0, 0
    for number in range(500):
        image = strange_array(rng) if number % 2 else damaged_file(rng, tmp_path / str(number))
        what = image if isinstance(image, Path) else f"{type(image).__name__} {getattr(image, 'dtype', '')}"
        try:
            found = list(detector.predict(image))
        except InputError as error:
            assert "\n" not in str(error), what
            refused += 1
        except Exception as error:
            raise AssertionError(f"image {number}, {what}") from error
        else:
            judged += 1
            for prediction in found:
                assert math.isfinite(prediction.score) and np.isfinite(prediction.anomaly_map).all(), what
    assert min(judged, refused) > 100


def test_bits_flipped_anywhere_in_a_detector_are_noticed(saved: Path, tmp_path: Path) -> None:
    whole, rng = saved.read_bytes(), np.random.default_rng(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "flipped.safetensors"
    file.write_bytes(whole)
    for number in range(60):
        place = int(rng.integers([8, header, len(whole)][number % 3] if number % 20 else len(whole)))
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([whole[place] ^ 1 << int(rng.integers(8))]))
        with pytest.raises(InputError) as error:
            Detector.load(file, device="cpu")
        assert "\n" not in str(error.value), place
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(whole[place : place + 1])
    for length in (0, 3, 8, 100, header, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            Detector.load(file, device="cpu")
    Detector.load(saved, device="cpu")


# Killed

KILLED = """
import contextlib, functools, io, json, os, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)  # nothing runs beside, so a fork is safe
import numpy as np
import hgadlib.detector
from hgadlib.__main__ import main
from hgadlib.figures.maps import anomaly_map_grid
from hgadlib.runs import experiment
from hgadlib.runs.directory import read_metrics
from safetensors import safe_open

# As often as 15 s apart in a long training.
experiment.fit = functools.partial(experiment.fit, checkpoint_s=0)
# What is once for a process, fonts say, is done here.
one = np.zeros((1, 8, 8), np.uint8)
anomaly_map_grid(one[..., None].repeat(3, 3), one, None, ["x"]).savefig(io.BytesIO(), format="png")
home, images, n_fits, n_predictions = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree",
    "fcntl.flock", "sqlite3.connect",
}
SETTINGS = {
    "data.image_size": 64, "features.pyramid": "null", "features.backbone": "tf_efficientnet_lite0",
    "score.map_size": 32, "flow.layers": 2, "prior.n_centers": 2,
}
FIT = ["fit", images, "--out", "parts.safetensors", "--run-dir", "run", "--false-alarm-rate", "0.4"]
FIT += ["--epochs", "3", "--device", "cpu", "--quiet"]
for name, value in SETTINGS.items():
    FIT += ["--set", name, str(value)]
PREDICT = ["predict", str(home / "whole" / "parts.safetensors"), images]
PREDICT += ["--overlays", "maps", "--device", "cpu", "--quiet"]


def forked(words, folder, out, at=0):
    # The command in its folder, killed before the at-th change of a file.
    if pid := os.fork():
        return pid
    status, seen = 70, 0

    def look(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.chdir(folder)
        os.environ["HGAD_CACHE"] = str(folder / "cache")  # so that features are killed too
        with open(out, "w") as stream, contextlib.redirect_stdout(stream):
            sys.addaudithook(look)
            status = main(words)
        Path("changes").write_text(str(seen))
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fitted(folder):
    with safe_open(folder / "parts.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        spec = json.loads(file.metadata()["hgad_detector"])
    assert spec["metrics"] == read_metrics(folder / "run")
    for name in ("timing", "memory"):
        del spec["metrics"][name]
    commit = str(spec["trained_on"].pop("environment")["commit"])  # another one while this runs is no fault
    card = (folder / "parts.md").read_text().replace(commit, "")
    return tensors, spec, card, (folder / "out").read_text()


def predicted(folder, out):
    rows = [json.loads(line) for line in (folder / out).read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def maps(folder):
    return {path.name: path.read_bytes() for path in (folder / "maps").iterdir()}


def same(one, other):
    for left, right in zip(one[1:], other[1:]):
        assert left == right, f"{left}\\n{right}"
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


def killed(words, folder, number, share, took, changes):
    # Every other one at a moment, the others between two changes of files.
    while True:
        folder.mkdir()
        at = 1 + int(share * changes) if number % 2 else 0
        pid = forked(words, folder, "killed", at)
        if not at:
            time.sleep(share * took)
            os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        state = sorted(path.name for path in folder.rglob("*") if path.is_file())
        if status == -signal.SIGKILL:
            print(f"{words[0]} {share:.2f}", "of the changes:" if at else "of the time:", *state, flush=True)
            return
        assert status in (0, 1), status
        folder.rename(folder.with_name(f"{folder.name} {share}"))  # too late: the machine is faster now
        share *= 0.8


whole = home / "whole"
whole.mkdir()
for words, n in ((FIT, n_fits), (PREDICT, n_predictions)):
    begun = time.monotonic()
    expected = ended(forked(words, whole, "out"))
    took, changes = time.monotonic() - begun, int((whole / "changes").read_text())
    assert expected == (words is PREDICT)
    result = fitted(whole) if words is FIT else (predicted(whole, "out"), maps(whole))
    model = (whole / "parts.safetensors").read_bytes()
    own = sys.argv[5 : 5 + n] if words is FIT else sys.argv[5 + n_fits :]
    for number, share in enumerate(own):
        folder = home / f"{words[0]}{number}"
        killed(words, folder, number, float(share), took, changes)
        if words is PREDICT:  # what was said before stands
            before = predicted(folder, "killed")
            assert before == result[0][: len(before)]
        assert ended(forked(words, folder, "out")) == expected
        if words is FIT:
            same(fitted(folder), result)
        else:
            assert (predicted(folder, "out"), maps(folder)) == result
        assert (whole / "parts.safetensors").read_bytes() == model
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_kill_loses_nothing_and_the_same_command_ends_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n_fits, n_predictions = 13, 7
    shares = [f"{share:.3f}" for share in rng.uniform(size=n_fits + n_predictions)]
    images = image_folder(tmp_path / "images", masks=False)
    shutil.rmtree(images / "square" / "test")  # a map to draw takes longest
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(images), str(n_fits), str(n_predictions), *shares],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 20, done.stdout


# Memory


def test_a_device_out_of_memory_gets_fewer_images_at_a_time(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(0, 5, fresh=True)
    expected = [p.score for p in detector.predict(images, class_name="red")]
    tried: list[int] = []
    real = HGAD.level_values

    def short(model: HGAD, features: list[Tensor], class_idx: Tensor, **how: Any) -> Any:
        tried.append(len(class_idx))
        if len(class_idx) > 1:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return real(model, features, class_idx, **how)

    monkeypatch.setattr(HGAD, "level_values", short)
    found = [p.score for p in detector.predict(images, class_name="red")]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert tried == [5, 2, 1, 1, 1, 1, 1]

    def none(model: HGAD, features: list[Tensor], class_idx: Tensor, **how: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(HGAD, "level_values", none)
    with pytest.raises(InputError, match=r"does not hold the work on one image \(tried to allocate 2 GiB\)"):
        list(detector.predict(images, class_name="red"))


def test_features_and_values_of_a_test_set_too(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, images = detector.backbone_, torch.rand(5, 3, 64, 64)
    with torch.inference_mode():
        expected = backbone(images)
        real = type(backbone)._stages
        tried: list[int] = []

        def short(own: Any, part: Tensor) -> Any:
            tried.append(len(part))
            if len(part) > 2:
                raise torch.OutOfMemoryError
            return real(own, part)

        monkeypatch.setattr(type(backbone), "_stages", short)
        for one, other in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert max(tried) > 2 and sum(n for n in tried if n <= 2) == 5 * len(backbone.pyramid or (1,))
