"""What is found in a folder and said of it: bit depths, layouts that were meant, copies, missing metrics."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from small import folder_config, image_folder

from hgadlib.__main__ import main
from hgadlib.config import load_config
from hgadlib.datasets import load_dataset
from hgadlib.datasets.check import check, guess_layout
from hgadlib.datasets.images import load_images, read_image
from hgadlib.datasets.records import Dataset
from hgadlib.datasets.scan import IMAGE_SUFFIXES
from hgadlib.errors import InputError
from hgadlib.features.backbone import build_backbone
from hgadlib.features.extract import dataset_features
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, predict_files, train_model
from hgadlib.runs.gallery import gallery
from hgadlib.runs.inputs import identify, prepare


def said(dataset: Dataset, *words: str) -> bool:
    """Whether one remark has all these words."""
    return any(all(word in remark for word in words) for remark in dataset.remarks)


def facts(dataset: Dataset) -> list[tuple[str, str, str, bool]]:
    """What is known of the images, in an order that does not depend on the names of folders."""
    return sorted((r.split, r.defect_type, r.path.name, r.mask_path is None) for r in dataset.records)


# Bit depths


@pytest.mark.parametrize(
    ("top", "bits"), [(200, 8), (256, 10), (1023, 10), (4095, 12), (9000, 14), (16384, 16), (65535, 16)]
)
def test_the_bits_in_use_are_found_over_the_training_images(tmp_path: Path, top: int, bits: int) -> None:
    trees.deep_class(tmp_path / "bolt", top)
    dataset = load_dataset("folder", root=tmp_path)
    assert dataset.bit_depth == bits == identify(dataset)["bit_depth"]
    assert said(dataset, "11 image(s) hold 16 bits", f"training is {top}", f"read as {bits} bits")
    for record in dataset.records:
        with Image.open(record.path) as file:
            values = np.asarray(file).astype(float)
        expected = np.floor(values * 255 / (2**bits - 1) + 0.5)
        assert np.array_equal(read_image(record.path, record.bit_depth)[..., 0], expected)


def test_images_of_eight_bits_have_no_depth_to_find(tmp_path: Path) -> None:
    dataset = load_dataset("folder", root=trees.mvtec(tmp_path))
    assert dataset.bit_depth == 16 and not said(dataset, "bits")


def test_a_setting_overrides_the_depth_and_is_part_of_the_run_s_identity(tmp_path: Path) -> None:
    trees.deep_class(tmp_path / "bolt", 1000)
    assert load_dataset("folder", root=tmp_path, bit_depth=12).bit_depth == 12
    plain = load_config(dataset="folder")
    chosen = load_config(dataset="folder", overrides={"data.bit_depth": 12})
    assert "bit_depth" not in plain.identity()["data"] and chosen.identity()["data"]["bit_depth"] == 12
    assert plain.digest != chosen.digest
    with pytest.raises(InputError, match=r"data.bit_depth.*expected at least 8, found 7"):
        load_config(dataset="folder", overrides={"data.bit_depth": 7})


def test_runs_that_differ_in_a_given_depth_alone_are_told_apart(tmp_path: Path) -> None:
    run = RunDirectory.open(folder_config(tmp_path, tmp_path / "run"))
    run.start({"digest": "x", "train": 1, "test": 1})
    with pytest.raises(InputError, match=r"differs in data.bit_depth: None, now 12"):
        RunDirectory.open(folder_config(tmp_path, tmp_path / "run", data={"bit_depth": 12}))


def test_test_images_are_read_by_the_training_images_depth(tmp_path: Path) -> None:
    trees.deep_class(tmp_path / "bolt", 1000, test_top=4000)
    dataset = load_dataset("folder", root=tmp_path)
    assert {record.bit_depth for record in dataset.test} == {10}
    assert said(dataset, "2 image(s) have values above 1023, read as white")
    assert read_image(dataset.test[0].path, 10)[0, 1].tolist() == [255] * 3


def test_features_of_shallow_files_are_those_of_the_same_picture_in_sixteen_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    backbone = build_backbone("tf_efficientnet_lite0", out_indices=(2,), pyramid=None)
    features = {}
    grey = np.random.default_rng(0).integers(0, 256, (9, 40, 40))
    grey[:, 0, 0] = 255
    for bits in (8, 10, 12, 16):
        folder = tmp_path / str(bits) / "bolt" / "train" / "good"
        folder.mkdir(parents=True)
        for number, pixels in enumerate(grey):
            values = np.round(pixels / 255 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
            Image.fromarray(values).save(folder / f"{number}.png")
        records = load_dataset("folder", root=tmp_path / str(bits)).records
        features[bits] = dataset_features(records, backbone, image_size=64, progress=False)
    assert len({found.key for found in features.values()}) == 4
    for found in features.values():
        assert torch.equal(found.levels[0], features[8].levels[0])
    # Another depth, another key: an entry of one is never taken for the other.
    given = load_dataset("folder", root=tmp_path / "12", bit_depth=16).records
    other = dataset_features(given, backbone, image_size=64, progress=False)
    assert other.key != features[12].key and not other.cached


def test_depths_that_do_not_go_together_are_said(tmp_path: Path) -> None:
    trees.deep_class(tmp_path / "bolt", 4095)
    trees.deep(tmp_path / "bolt" / "train" / "good" / "0.png", 65000)
    dataset = load_dataset("folder", root=tmp_path)
    assert said(dataset, "class 'bolt': 10 of 11 16-bit image(s) use less than a third", "up to 65000")
    trees.picture(tmp_path / "bolt" / "train" / "good" / "x.png")
    assert said(load_dataset("folder", root=tmp_path), "mixes bit depths: 11 file(s) of 16 bits, 1 of 8")
    assert any("mixes bit depths" in note for note in check(tmp_path).notes)


def test_depths_that_differ_between_classes_are_said(tmp_path: Path) -> None:
    trees.deep_class(tmp_path / "bolt", 65000)
    trees.deep_class(tmp_path / "nut", 4095)
    dataset = load_dataset("folder", root=tmp_path)
    assert said(dataset, "class 'nut': 11 of 11") and not said(dataset, "class 'bolt': 1", "third")


def colour_png(path: Path, top: int) -> Path:
    """Write a PNG of 16-bit colours, which Pillow reads but does not write."""
    values = np.full((8, 8, 3), top, ">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_colours_whose_bits_pillow_drops_are_refused(tmp_path: Path) -> None:
    path = colour_png(tmp_path / "bolt" / "0.png", 4095)
    with pytest.raises(
        InputError, match=r"16-bit colours of which 12 bits are in use.*save the images with 8"
    ):
        load_dataset("folder", root=tmp_path)
    colour_png(path, 65535)
    assert load_dataset("folder", root=tmp_path).bit_depth == 16


def test_each_file_is_loaded_by_its_own_depth(tmp_path: Path) -> None:
    paths = [trees.deep(tmp_path / f"{top}.png", top) for top in (1023, 65535)]
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "batch_size": 2}
    _, images = next(load_images(paths, size=64, bit_depths=[10, 16], **options))  # type: ignore[arg-type]
    assert images.amax((1, 2, 3)).min() > 0.9


# What was meant


def test_a_root_too_high_names_the_right_one(tmp_path: Path) -> None:
    home = trees.mvtec(tmp_path / "line1" / "products")
    for root in (tmp_path, tmp_path / "line1"):
        with pytest.raises(InputError, match=f"further down; give {home} instead"):
            load_dataset("folder", root=root)
    assert load_dataset("folder", root=home).classes == ("bottle", "cable")
    trees.picture(tmp_path / "line2" / "flat" / "nut" / "0.png")
    with pytest.raises(InputError, match=f"give {home}, {tmp_path / 'line2' / 'flat'} instead"):
        load_dataset("folder", root=tmp_path)
    with pytest.raises(InputError, match=f"give the folder of the dataset, perhaps {home}"):
        load_dataset("mvtec", root=tmp_path)


def test_a_root_too_low_names_the_right_one(tmp_path: Path) -> None:
    trees.mvtec(tmp_path)
    with pytest.raises(InputError, match=f"a part of a class.*give {tmp_path / 'bottle'}$"):
        load_dataset("folder", root=tmp_path / "bottle" / "train")


@pytest.mark.parametrize(
    "masks", ["mask/crack $5", "mask", "masks", "ground_truth", "ground_truth/crack $5", None]
)
@pytest.mark.parametrize("place", [".", "my class"])
def test_good_beside_defects_gets_the_commands_that_work(
    tmp_path: Path, masks: str | None, place: str
) -> None:
    folder = tmp_path / place
    for number in range(9):
        trees.picture(folder / "good" / f"{number}.png")
    trees.picture(folder / "crack $5" / "0.png")
    if masks:
        trees.mask(folder / masks / "0.png")
    with pytest.raises(InputError, match=r"'good' beside crack .5") as caught:
        check(tmp_path)
    commands = str(caught.value).split("arrange it by: ")[1]
    subprocess.run(["bash", "-c", commands], check=True)
    dataset = load_dataset("folder", root=tmp_path)
    assert len(dataset.train) == 9 and [record.defect_type for record in dataset.test] == ["crack $5"]
    assert (dataset.test[0].mask_path is not None) == (masks is not None)


def test_a_lone_class_may_be_called_good(tmp_path: Path) -> None:
    trees.picture(tmp_path / "good" / "0.png")
    trees.picture(tmp_path / "score" / "0.png")
    assert load_dataset("folder", root=tmp_path).classes == ("good",)


def test_visa_without_its_table_says_so(tmp_path: Path) -> None:
    shutil.rmtree(trees.visa(tmp_path) / "split_csv")
    with pytest.raises(InputError, match=r"looks like VisA, without its table split_csv/1cls.csv"):
        check(tmp_path)


@pytest.mark.parametrize("good", ["ok", "OK", "Good", "normal"])
@pytest.mark.parametrize("truth", ["masks", "Ground_Truth", "gt"])
def test_other_names_for_the_parts_of_a_class(tmp_path: Path, good: str, truth: str) -> None:
    trees.mvtec(tmp_path, ("bottle",))
    bottle = tmp_path / "bottle"
    expected = load_dataset("folder", root=tmp_path)
    (bottle / "test" / "good").rename(bottle / "test" / good)
    (bottle / "train" / "good").rename(bottle / "train" / good)
    (bottle / "ground_truth").rename(bottle / truth)
    (bottle / "test").rename(bottle / "Test")
    (bottle / "train").rename(bottle / "TRAIN")
    assert guess_layout(tmp_path) == "folder"
    dataset = load_dataset("folder", root=tmp_path)
    assert said(dataset, f"test/{good} is read as normal images")
    assert facts(dataset) == facts(expected)


def test_what_a_class_holds_beside_its_parts_is_said(tmp_path: Path) -> None:
    bottle = trees.mvtec(tmp_path) / "bottle"
    trees.picture(bottle / "validation" / "0.png")
    trees.mask(bottle / "ground_truth" / "stray.png")
    dataset = load_dataset("folder", root=tmp_path)
    assert said(dataset, "class 'bottle': not read", "validation")
    assert said(dataset, "1 mask(s) whose image is missing: ground_truth/stray.png")
    trees.picture(bottle / "train" / "0.png")
    with pytest.raises(InputError, match=r"1 image\(s\) lie in train itself; move them to train/good"):
        load_dataset("folder", root=tmp_path)


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", ".Trash"])
def test_litter_of_drives_is_ignored(tmp_path: Path, name: str) -> None:
    before = load_dataset("folder", root=trees.mvtec(tmp_path))
    for place in (tmp_path, tmp_path / "bottle", *(r.path.parent for r in before.records[:1])):
        trees.picture(place / name / "thumb.jpg")
    after = load_dataset("folder", root=tmp_path)
    assert after.records == before.records and after.remarks == before.remarks


# Suffixes


@pytest.mark.parametrize("suffix", ["webp", "gif", "ppm", "tga", "jp2", "jfif", "dib"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((16, 16, 3), (200, 30, 40), np.uint8)
    for part in ("train/good", "test/good"):
        path = tmp_path / "bolt" / part / f"0.{suffix.upper()}"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    dataset = load_dataset("folder", root=tmp_path)
    assert len(dataset.records) == 2
    assert np.abs(read_image(dataset.records[0].path).astype(int) - pixels).max() <= 3


def test_suffixes_that_are_not_read_are_named(tmp_path: Path) -> None:
    trees.mvtec(tmp_path)
    good = tmp_path / "bottle" / "train" / "good"
    for path in good.iterdir():
        path.rename(path.with_suffix(".HEIC"))
    with pytest.raises(
        InputError, match=r"is empty.*found files with suffix \.heic \(3\), read are \.png"
    ) as e:
        load_dataset("folder", root=tmp_path)
    assert IMAGE_SUFFIXES[-1] in str(e.value)
    trees.picture(good / "0.png")
    assert said(load_dataset("folder", root=tmp_path), "3 file(s) that are no images were ignored: 000.HEIC")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.cr2").touch()
    for root in (tmp_path / "raw", tmp_path / "raw" / ".." / "raw"):
        with pytest.raises(InputError, match=r"no images found.*\.cr2 \(1\)"):
            load_dataset("folder", root=root)


# Copies


def test_training_images_that_teach_nothing_are_counted(tmp_path: Path) -> None:
    good = tmp_path / "bolt" / "train" / "good"
    first = trees.picture(good / "0.png")
    for number in range(1, 9):
        trees.picture(good / f"{number}.png")
    assert not any("twin" in note or "flat" in note for note in check(tmp_path).notes)
    pixels = read_image(first)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(good / "nearly.png")
    Image.new("RGB", (16, 12), (10, 20, 30)).save(good / "flat.png")
    notes = check(tmp_path).notes
    assert any("class 'bolt': 2 of 11 training images have a twin" in note for note in notes)
    assert any("class 'bolt': 1 of 11 training images are of one flat colour" in note for note in notes)


def test_noise_alone_makes_no_twin(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(60, 200, (300, 300, 1))
    good = tmp_path / "bolt" / "train" / "good"
    good.mkdir(parents=True)
    for number in range(4):
        noisy = np.clip(base + rng.normal(0, 3, (300, 300, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(good / f"{number}.png")
    assert not any("twin" in note for note in check(tmp_path).notes)


# Metrics without meaning


def test_metrics_without_meaning_are_named_with_their_reason(tmp_path: Path) -> None:
    trees.mvtec(tmp_path, ("a", "b", "c", "d", "e"))
    shutil.rmtree(tmp_path / "a" / "test" / "good")
    for kind in ("crack", "hole"):
        shutil.rmtree(tmp_path / "b" / "test" / kind)
        (tmp_path / "c" / "ground_truth" / kind / "000_mask.png").unlink()
    shutil.rmtree(tmp_path / "b" / "ground_truth")
    (tmp_path / "d" / "ground_truth" / "hole" / "000_mask.png").unlink()
    shutil.rmtree(tmp_path / "e" / "test")
    dataset = load_dataset("folder", root=tmp_path)
    for reason, name in (
        ("image metrics are null: all labelled test images are anomalous", "a"),
        ("image and pixel metrics are null: all labelled test images are normal", "b"),
        ("pixel metrics are null: no masks", "c"),
        ("pixel metrics are null: anomalous images without a mask", "d"),
        ("no metrics: no test images", "e"),
    ):
        assert f"{reason} (class {name})" in dataset.remarks
    assert said(dataset, "fewer than 8 training images", "class a, b, c, d, e")
    assert set(dataset.remarks) <= set(check(tmp_path).notes)


def test_command_line_and_metrics_say_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    root = image_folder(tmp_path / "images", classes=("disc",))
    shutil.rmtree(root / "disc" / "test" / "good")
    bad = root / "disc" / "train" / "good" / "bad.png"
    bad.write_text("no image")
    (bad.parent / "x.heic").touch()
    config = folder_config(root, tmp_path / "run", data={"strict": False})
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()))
    assert main(["-f", str(tmp_path / "config.yaml"), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"left out: {bad}: not an image") for line in lines)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert any("all labelled test images are anomalous" in note for note in metrics["notes"])
    assert any("x.heic" in note for note in metrics["notes"])
    assert [f"note: {note}" for note in metrics["notes"]] == [line for line in lines if line[:5] == "note:"]
    assert len(metrics["counts"]["skipped"]) == 1
    assert shlex.split(lines[-1]) == [str(tmp_path / "run")]


def test_a_run_keeps_the_depth_for_whatever_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    root = image_folder(tmp_path / "images", classes=("disc",), masks=False)
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16).save(path)
    config = folder_config(root, tmp_path / "run")
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    result = finish_run(config, inputs, train_model(config, inputs, run, progress=False), run)
    assert json.loads((run.path / "data.json").read_text())["bit_depth"] == 12
    given = folder_config(root, None, data={"bit_depth": 14})
    assert prepare(given, progress=False).identity()["bit_depth"] == 14
    assert gallery(config, inputs, result)["images"].max() > 90
    model = train_model(config, inputs, run, progress=False)
    scores = np.concatenate([s for s, _ in predict_files(config, inputs, model, inputs.dataset.test)])
    np.testing.assert_allclose(scores, result.evaluation.scores, rtol=1e-2)
