from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hgadlib import Detector, InputError
from hgadlib import export as exporting
from hgadlib.datasets.images import RESIZE_POLICIES, resize_image
from hgadlib.evaluation.thresholds import Normals

onnx, _, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))

ROOT = Path(__file__).parents[1]
SMALL = {
    "data.image_size": 64, "features.backbone": "tf_efficientnet_lite0", "features.out_indices": [1, 2],
    "features.pyramid": None, "features.join": False, "score.map_size": 32,
    "flow.layers": 2, "flow.position_dim": 8, "prior.n_centers": 2,
}  # fmt: skip
# Each setting that the graph has a form of its own for is in one of them.
KINDS: dict[str, dict[str, Any]] = {
    "pyramid": {
        "features.pyramid": [64, 32], "features.join": True, "data.resize": "pad",
        "score.normalisation": "inductive", "score.criterion": "both", "prior.covariance": "identity",
    },
    "single": {
        "prior.kind": "single", "flow.kind": "convolutional", "data.resize": "short_side_center_crop",
        "score.image": "top",
    },
}  # fmt: skip


def picture(k: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> NDArray[np.uint8]:
    """A bright square of the class's colour before noise."""
    rng = np.random.default_rng([k, seed, *size])
    pixels = rng.integers(90, 120, (*size, 3)).astype(np.uint8)
    pixels[size[0] // 4 : 3 * size[0] // 4, size[1] // 4 : 3 * size[1] // 4, k] = 220
    return pixels


def images() -> list[Any]:
    """Of both classes, and neither; of other sizes than the network's; grey."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 61, 3)).astype(np.uint8)
    spot = picture(1, 7, (100, 130))
    spot[40:60, 50:70] = 0
    grey = Image.fromarray(picture(0, 8)[..., 0])
    return [picture(0, 5), picture(1, 6, (48, 57)), spot, grey, noise]


def fitted(folder: Path, seed: int = 0, **overrides: Any) -> Detector:
    detector = Detector(
        false_alarm_rate=0.2, epochs=1, seed=seed, device="cpu", run_dir=folder / f"run{seed}",
        overrides={**SMALL, **overrides},
    )  # fmt: skip
    normal = {name: [picture(k, i) for i in range(20)] for k, name in enumerate(("disc", "square"))}
    return detector.fit(normal, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def said() -> list[subprocess.CompletedProcess[str]]:
    """What the export of the calibrated one, and its loading, said."""
    return []


@pytest.fixture(scope="module")
def calibrated(folder: Path, said: list[subprocess.CompletedProcess[str]]) -> tuple[Detector, Path]:
    detector, path = fitted(folder / "calibrated"), folder / "calibrated.onnx"
    # Where the class is inferred, other images are compared with.
    other = {
        name: Normals(own.scores + 0.25, own.peaks + 0.5) for name, own in detector.inferred_normals_.items()
    }
    detector._set_normals(detector.normals_, other)
    saved = detector.save(folder / "saved.safetensors")
    code = (
        "import sys; from hgadlib import Detector; Detector.load(sys.argv[1]).export(sys.argv[2]);"
        "import onnxruntime; onnxruntime.InferenceSession(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(saved), str(path)]
    said.append(subprocess.run(command, capture_output=True, text=True, cwd=folder))
    return Detector.load(saved), path


@pytest.fixture(scope="module", params=["calibrated", *KINDS])
def exported(request: pytest.FixtureRequest, folder: Path) -> tuple[Detector, Path]:
    kind = str(request.param)
    if kind == "calibrated":
        found: tuple[Detector, Path] = request.getfixturevalue("calibrated")
        return found
    detector = fitted(folder / kind, **KINDS[kind])
    return detector, detector.export(folder / f"{kind}.onnx")


def run(path: Path, images: NDArray[np.uint8], class_id: list[int]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == list(exporting.OUTPUTS)
    return dict(
        zip(names, session.run(None, {"images": images, "class_id": np.array(class_id)}), strict=True)
    )


@pytest.mark.slow
class TestFile:
    def test_says_what_predict_says(self, exported: tuple[Detector, Path]) -> None:
        detector, path = exported
        infers = detector.model_.has_entropy
        unknown = 0
        for image in images():
            pixels = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image
            for given in (None, "disc", "square") if infers else ("disc", "square"):
                own = -1 if given is None else detector.classes_.index(given)
                found = {name: x[0] for name, x in run(path, pixels[None], [own]).items()}
                (one,) = detector.predict(image, class_name=given)
                assert found["score"] == pytest.approx(one.score, rel=1e-4, abs=1e-4)
                assert found["p_value"] == pytest.approx(one.p_value, abs=1e-6)
                assert bool(found["is_anomalous"]) is one.is_anomalous
                assert bool(found["unknown"]) is one.is_unknown
                assert detector.classes_[found["class"]] == one.class_name
                maps = found["map"], one.anomaly_map
                if detector.config_.score.normalisation != "calibrated":
                    # Of a share S of what is missing they are -log(-log S): of none, all depends on rounding.
                    maps = np.exp(-np.exp(-maps[0])), np.exp(-np.exp(-maps[1]))
                np.testing.assert_allclose(maps[0], maps[1], rtol=1e-4, atol=1e-4)
                assert found["pixel_threshold"] == pytest.approx(one.pixel_threshold, rel=1e-6)
                unknown += one.is_unknown
        assert unknown or detector.config_.score.normalisation != "calibrated"

    def test_a_batch_says_what_its_images_say(self, exported: tuple[Detector, Path]) -> None:
        detector, path = exported
        classes = [-1, 1, 0] if detector.model_.has_entropy else [0, 1, 0]
        batch = np.stack([picture(k, seed, (70, 90)) for k, seed in ((0, 1), (1, 2), (1, 3))])
        together = run(path, batch, classes)
        for i, own in enumerate(classes):
            for name, alone in run(path, batch[i : i + 1], [own]).items():
                pair = [np.asarray(x, dtype=np.float64) for x in (together[name][i], alone[0])]
                if name == "map" and detector.config_.score.normalisation != "calibrated":
                    pair = [np.exp(-np.exp(-x)) for x in pair]
                np.testing.assert_allclose(pair[0], pair[1], rtol=1e-4, atol=1e-4, err_msg=name)

    def test_a_class_that_cannot_be_inferred_is_refused(self, exported: tuple[Detector, Path]) -> None:
        detector, path = exported
        if detector.model_.has_entropy:
            assert run(path, picture(0)[None], [-1])["class"][0] == 0
        else:
            with pytest.raises(Exception, match="index"):
                run(path, picture(0)[None], [-1])

    def test_describes_itself_and_is_one_file(self, calibrated: tuple[Detector, Path]) -> None:
        detector, path = calibrated
        described = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert described["classes"] == '["disc", "square"]'
        assert float(described["false_alarm_rate"]) == detector.false_alarm_rate
        assert set(described) >= {"version", "format"}
        assert path.with_suffix(".md").read_text() == detector.card()
        beside = {file.name for file in path.parent.iterdir() if file.name.startswith(path.stem + ".")}
        assert beside == {path.name, path.with_suffix(".md").name}

    def test_export_and_loading_say_nothing(
        self, calibrated: tuple[Detector, Path], said: list[subprocess.CompletedProcess[str]]
    ) -> None:
        (done,) = said
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
class TestValidate:
    def test_finds_nothing_in_the_detectors_own_file(self, exported: tuple[Detector, Path]) -> None:
        report = exporting.validate(*exported, images())
        assert report.ok and report.images == 5 and not report.changed
        assert 0 < report.score < exporting.TOLERANCE
        assert "5 images: the same" in str(report)
        assert max(map(len, str(report).splitlines())) <= 80

    def test_finds_the_file_of_another(self, calibrated: tuple[Detector, Path], folder: Path) -> None:
        report = exporting.validate(fitted(folder / "other", seed=1), calibrated[1], images())
        assert not report.ok and report.score > exporting.TOLERANCE
        assert "NOT the same" in str(report)

    def test_finds_a_changed_decision(self, calibrated: tuple[Detector, Path]) -> None:
        detector, path = calibrated
        strict = Detector.load(detector.save(path.with_suffix(".safetensors")))
        strict.set_params(false_alarm_rate=0.999)
        report = exporting.validate(strict, path, [picture(0, i) for i in range(20, 26)])
        assert report.score <= exporting.TOLERANCE
        assert report.changed and not report.ok and report.changed[0] in str(report)

    def test_refuses_what_is_no_detectors_file(
        self, calibrated: tuple[Detector, Path], tmp_path: Path
    ) -> None:
        detector, path = calibrated
        (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:1000])
        for name, message in (("cut.onnx", "found another"), ("none.onnx", "found no file")):
            with pytest.raises(InputError, match=message):
                exporting.validate(detector, tmp_path / name, images())
        with pytest.raises(InputError, match="at least one image"):
            exporting.validate(detector, path, [])


@pytest.mark.slow
@pytest.mark.parametrize("policy", RESIZE_POLICIES)
def test_resizes_as_pillow_does(policy: str, tmp_path: Path) -> None:
    size, rng, sides = 48, np.random.default_rng(0), torch.export.Dim.DYNAMIC
    resize, example = exporting.Resize(size, policy).eval(), torch.zeros(2, 37, 53, 3, dtype=torch.uint8)
    torch.onnx.export(
        resize, (example,), tmp_path / "x.onnx", dynamo=True, verbose=False, input_names=["images"],
        dynamic_shapes=({0: sides, 1: sides, 2: sides},),
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", options)
    # Down and up, narrow and tall, equal; then any.
    sizes = [(48, 48), (37, 53), (200, 91), (513, 300), (3, 170), (1, 1), (170, 4), (91, 30), (49, 50)]
    sizes += [(int(h), int(w)) for h, w in rng.integers(2, 260, (200, 2))]
    for shape in sizes:
        images = rng.integers(0, 256, (2, *shape, 3)).astype(np.uint8)
        for found, image in zip(session.run(None, {"images": images})[0], images, strict=True):
            np.testing.assert_array_equal(found, resize_image(image, size, policy), err_msg=f"{shape}")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = fitted(folder / "missing")
    found = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    with pytest.raises(InputError, match=rf"{package}.*pip install hgadlib\[export\]") as error:
        if package == "onnxruntime":
            exporting.validate(detector, folder / "x.onnx", images())
        else:
            detector.export(folder / "x.onnx")
    assert "\n" not in str(error.value)
    assert not (folder / "x.onnx").exists()


PADIM = {"method": "padim", "score.normalisation": "raw", "score.map_levels": "all"}


@pytest.mark.parametrize("other", [{"method": "neighbours"}, PADIM, {"setting": "one_for_one"}])
def test_another_method_is_saved_but_not_exported(other: dict[str, str], folder: Path) -> None:
    name = next(iter(other.values()))
    detector = fitted(folder / name, 0, **other)
    with pytest.raises(InputError, match=f"method hgad, unified, found .*{name}"):
        detector.export(folder / f"{name}.onnx")
    read = Detector.load(detector.save(folder / f"{name}.safetensors"))
    image = np.full((40, 40, 3), 90, np.uint8)
    one, other_one = (next(of.predict(image, class_name=of.classes_[0])) for of in (detector, read))
    assert one.score == pytest.approx(other_one.score, rel=1e-6)
    with pytest.raises(InputError, match=r"class inference: .* say which class each image is"):
        next(read.predict(image))


def example() -> str:
    """The README's example of a file without this library."""
    (found,) = re.findall(r"```python\n(import [^`]*onnxruntime[^`]*)```", (ROOT / "README.md").read_text())
    return str(found)


def test_the_example_is_short() -> None:
    assert len(example().splitlines()) <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", example(), re.M)) <= {
        "json", "sys", "numpy", "onnxruntime", "PIL"
    }  # fmt: skip


@pytest.mark.slow
def test_the_example_runs_without_torch(calibrated: tuple[Detector, Path], tmp_path: Path) -> None:
    detector, path = calibrated
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "hgadlib.py").write_text("raise ImportError('no hgadlib here')")
    (tmp_path / "judge.py").write_text(example())
    for number, image in enumerate(images()):
        file = tmp_path / f"{number}.png"
        Image.fromarray(image).save(file) if isinstance(image, np.ndarray) else image.save(file)
        said = subprocess.run(
            [sys.executable, "judge.py", str(path), file.name], cwd=tmp_path, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        (one,) = detector.predict(file)
        parts = re.fullmatch(r"(\w+): (\w+), score (\S+), p \S+\n", said.stdout)
        assert parts, said.stdout
        verdict, name, score = parts.groups()
        assert (verdict == "anomalous", name) == (one.is_anomalous, one.class_name)
        assert float(score) == pytest.approx(one.score, rel=1e-4, abs=2e-3)
        marked = np.array(
            Image.open(tmp_path / "marked.png").resize(one.mask.shape, Image.Resampling.NEAREST)
        )
        assert (marked == (255, 0, 0)).all(-1).any() == one.mask.any()


def test_500_malformed_inputs_of_the_file_are_judged_or_refused(calibrated: tuple[Detector, Path]) -> None:
    detector, path = calibrated
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng, judged, refused, n_classes = np.random.default_rng(0), 0, 0, len(detector.classes_)
    dtypes = [np.uint8] * 6 + [np.int8, np.uint16, np.int64, np.float32, np.float64, np.bool_]
    for number in range(500):
        sides = [int(n) for n in rng.integers(0, 90, 2) if rng.random() < 0.95]
        shape = (int(rng.integers(0, 3)), *sides, int(rng.choice([3, 3, 3, 3, 1, 4])))
        images = rng.integers(0, 2, shape).astype(dtypes[rng.integers(len(dtypes))])
        images = images * 255 if images.dtype == np.uint8 else images
        count = shape[0] if rng.random() < 0.9 else int(rng.integers(0, 4))
        class_id = rng.integers(-2, n_classes + 2, count) if number % 2 else np.full(count, -1)
        try:
            found = session.run(None, {"images": images, "class_id": class_id})
        except Exception as error:  # the runtime's own, in words
            assert str(error), number
            refused += 1
        else:
            judged += 1
            for values in found:
                assert np.isfinite(values).all(), number
            # One class id may stand for all images; of none there is nothing to refuse.
            if shape[0]:
                assert (class_id < n_classes).all(), number
                assert len(class_id) in (1, shape[0]) or shape[0] == 1, number
    assert min(judged, refused) > 50
