"""The benchmarks run and print what they promise; how fast is not asked here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import image_folder

from hgadlib.features.backbone import build_backbone

ROOT = Path(__file__).resolve().parents[1]


Line = dict[str, Any]


def lines_of(script: str, *arguments: str, cwd: Path = ROOT) -> list[Line]:
    """Run a benchmark and read what it printed; a benchmark that finds its peer's values different fails."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines: list[Line] = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {Path(script).stem}
    assert lines[0]["what"] == "environment" and {"machine", "threads", "versions"} <= lines[0].keys()
    return lines


def of(lines: list[Line], what: str) -> list[Line]:
    return [line for line in lines if line["what"] == what]


def check_memory(lines: list[Line], count: int) -> None:
    memory = of(lines, "memory")
    assert len(memory) == count and all(line["base_mib"] > 10 for line in memory)


@pytest.mark.slow
def test_metrics_benchmark_prints_json_lines() -> None:
    lines = lines_of("metrics.py", "--maps", "4", "--size", "32", "--repeats", "1")
    assert all(line["median"] > 0 for line in of(lines, "speedup"))
    check_memory(lines, 3)


@pytest.mark.slow
def test_flow_benchmark_prints_json_lines() -> None:
    lines = lines_of("flow.py", "--cases", "6x3", "5x24", "--batch", "3", "--repeats", "1", "--no-memory")
    # Two settings, two cases, two number types; then two tasks each.
    differences = of(lines, "differences")
    assert len(differences) == 8
    assert all(line["z"] < 1e-11 for line in differences if line["dtype"] == "float64")
    assert len(of(lines, "speedup")) == 8 and all(line["min"] > 0 for line in of(lines, "speedup"))
    for line in of(lines, "matrix_products"):
        assert 0 < line["needed_gflop"] < line["peer_gflop"]


@pytest.mark.slow
def test_training_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    lines = lines_of(
        "training.py", *small, "--per-class", "4", "--layers", "2", "--epochs", "2", "--no-memory"
    )
    losses = of(lines, "losses")
    assert [line["setting"] for line in losses] == ["published", "default"]
    assert all(len(line["ours"]) == 2 and line["difference"] < 1e-4 for line in losses)
    assert all(line["ours"][0] != line["ours"][1] for line in losses)  # there were steps
    assert len(of(lines, "images_per_s")) == 2


@pytest.mark.slow
def test_inference_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    more = ["--per-class", "2", "--layers", "2", "--batch", "3", "--repeats", "1", "--no-memory"]
    lines = lines_of("inference.py", *small, *more)
    assert len(of(lines, "differences")) == 2
    assert all(line["maps"] < 1e-3 for line in of(lines, "differences"))
    assert [line["at_a_time"] for line in of(lines, "speedup")] == [3, 1, 3, 1]


@pytest.mark.slow
def test_saturation_benchmark_prints_json_lines(tmp_path: Path) -> None:
    small = ["--dataset", "folder", "--data-root", str(image_folder(tmp_path)), "--image-size", "64"]
    lines = lines_of("saturation.py", *small, "--per-class", "2", "0", "--epochs", "2", "--every", "1")
    found = of(lines, "auroc")
    assert [(line["train"], line["epoch"]) for line in found] == [(4, 1), (4, 2), (12, 1), (12, 2)]
    assert all(0 <= line[name] <= 1 for line in found for name in ("published_auroc", "ranked_auroc"))


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    lines = lines_of("flow.py", "--cases", "4x2", "--settings", "default", "--batch", "1", "--repeats", "1")
    check_memory(lines, 4)


@pytest.mark.slow
def test_choice_benchmark_prints_json_lines(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for folder in root.glob("*/train/good"):
        for i in range(6, 16):  # so many are needed to hold some out
            pixels = np.random.default_rng([i, len(folder.parts[-3])]).integers(90, 120, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    small = ["--dataset", "folder", "--data-root", str(root), "--name", "small", "--draws", "1"]
    lines = lines_of("choice.py", *small, "--sizes", "96", "64", "32", "--backbone", "tf_efficientnet_lite0")
    found = of(lines, "setting")
    assert [lines[0][key] for key in ("dataset", "backbone")] == ["small", "tf_efficientnet_lite0"]
    # No setting is tried twice, and the sizes are those asked for.
    assert (
        len({json.dumps([v for k, v in line.items() if k not in ("drawn", "real")]) for line in found}) == 40
    )
    assert {level.split(":")[0] for line in found for level in line["levels"]} == {"96", "64", "32"}
    for line in found:
        wanted = {"image_auroc", "pixel_auroc", "aupro"} if line["image"] == "maximum" else {"image_auroc"}
        for part in ("drawn", "real"):
            assert set(line[part]) == wanted and all(0 <= value <= 1 for value in line[part].values())


def folder_to_fit(root: Path) -> Path:
    """Write a folder of images, enough to keep some aside for thresholds."""
    folder = image_folder(root)
    for kind in folder.glob("*/train/good"):
        for i in range(6, 24):
            pixels = np.random.default_rng([i, len(kind.parts[-3])]).integers(90, 120, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(kind / f"{i:03d}.png")
    return folder


@pytest.mark.slow
def test_serving_benchmark_prints_json_lines(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small = ["--dataset", "folder", "--data-root", str(folder_to_fit(tmp_path)), "--presets", "fast"]
    lines = lines_of("serving.py", *small, "--epochs", "1", "--images", "2", "--repeats", "1", "--peers")
    [fitted] = of(lines, "fit")
    assert (fitted["preset"], fitted["images"], fitted["classes"]) == ("fast", 48, 2)
    assert all(fitted[key] > 0 for key in ("seconds", "load_s", "detector_mb", "onnx_mb"))
    names = ["fast, alone", "fast, batches", "fast, ONNX"]
    assert [line["task"] for line in of(lines, "serve")] == names
    assert [line["task"] for line in of(lines, "memory")] == names
    # onnxruntime's process holds no PyTorch.
    torch, _, onnx = (line["base_mib"] for line in of(lines, "memory"))
    assert onnx < 0.7 * torch
    assert not of(lines, "ratios")


@pytest.mark.slow
def test_serving_benchmark_refuses_peers_that_are_not_there() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--peers", "padim"]
    if importlib.util.find_spec("anomalib") is not None:
        pytest.skip("anomalib is installed")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr.startswith("--peers: anomalib is not installed; run: pip")


@pytest.mark.slow
def test_serving_benchmark_sets_peers_beside_a_preset(tmp_path: Path) -> None:
    pytest.importorskip("anomalib")
    small = ["--dataset", "folder", "--data-root", str(folder_to_fit(tmp_path)), "--presets", "fast"]
    few = ["--epochs", "1", "--images", "2", "--repeats", "1", "--per-class", "23", "--no-memory"]
    lines = lines_of("serving.py", *small, *few, "--peers", "padim", "patchcore")
    ours, *peers = of(lines, "fit")
    assert [line["peer"] for line in peers] == ["padim", "patchcore"]
    assert {line["images"] for line in (ours, *peers)} == {46} and ours["base_mib"] > 10
    assert all(line["image_size"] == 256 and line["layers"] == [3, 4] for line in peers)
    for peer, line in zip(peers, of(lines, "ratios"), strict=True):
        assert (line["peer"], line["preset"]) == (peer["peer"], "fast")
        assert line["fit"] == pytest.approx(peer["seconds"] / ours["seconds"], rel=2e-3)
        assert line["onnx_size"] == pytest.approx(peer["onnx_mb"] / ours["onnx_mb"], rel=2e-3)
        assert all(line[f"{way}_seconds"]["median"] > 0 for way in ("alone", "batches", "ONNX"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["padim", "patchcore", "cflow"])
def test_models_of_anomalib_have_our_weights_and_learn(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("anomalib")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    anomalib_models = importlib.import_module("anomalib_models")
    settings: dict[str, Any] = {
        "backbone": "tf_efficientnet_lite0", "layers": [2, 3], "image_size": 64,
    }  # fmt: skip
    root = image_folder(tmp_path / "images", classes=("disc",)) / "disc"
    files = sorted(root.glob("train/good/*"))
    model = anomalib_models.fit(method, files, **settings, epochs=2, batch_size=6)
    assert capfd.readouterr() == ("", "")

    # The features are those of our backbone, which folds the norms into the weights.
    images = torch.rand(2, 3, 64, 64)
    backbone = build_backbone(settings["backbone"], out_indices=settings["layers"])
    network = model.model.encoder if method == "cflow" else model.model.feature_extractor
    for own, theirs in zip(backbone(images), network(images).values(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-4 * float(own.abs().max()))

    # Other images are more anomalous than those it was fitted to; one that trains takes longer to see it.
    noise = [tmp_path / f"{i}.png" for i in range(2)]
    for i, file in enumerate(noise):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    asked = [*files[:2], *noise]
    [(scores, maps)] = anomalib_models.predict(model, asked)
    assert scores.shape == (4,) and maps.shape == (4, 64, 64)
    if method in anomalib_models.TRAINED:
        once = anomalib_models.fit(method, files, **settings, epochs=1, batch_size=6)
        pairs = zip(once.model.decoders.parameters(), model.model.decoders.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
    else:
        assert scores[2:].min() > scores[:2].max()
    again = anomalib_models.load(anomalib_models.save(model, tmp_path / "saved"))
    [(same, _)] = anomalib_models.predict(again, asked)
    assert np.allclose(same, scores, rtol=1e-3)

    # Its ONNX file takes images of any size and gives the same score and map.
    session = onnxruntime.InferenceSession(anomalib_models.export(model, tmp_path / "exported"))
    picture = np.asarray(Image.open(noise[0]).resize((96, 96)), dtype=np.float32)[None] / 255
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(
        None, {"input": picture.transpose(0, 3, 1, 2)}), strict=True,
    ))  # fmt: skip
    [score], [own_map] = anomalib_models.scores_and_maps(
        model, torch.from_numpy(picture.transpose(0, 3, 1, 2).copy())
    )
    assert outputs["pred_score"].item() == pytest.approx(float(score), rel=1e-2)
    assert np.allclose(outputs["anomaly_map"].squeeze(), own_map, atol=1e-2 * own_map.max())
