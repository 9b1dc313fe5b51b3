"""Every layout loads to the same records, whatever order the file system lists them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from hgadlib.__main__ import main
from hgadlib.datasets import DATASETS, load_dataset, published
from hgadlib.datasets.check import check, guess_layout
from hgadlib.datasets.records import UNKNOWN_CLASS, UNLABELLED, Dataset, ImageRecord, relabel
from hgadlib.datasets.scan import Findings
from hgadlib.errors import InputError

OPEN_UNION = Path(__file__).parents[1].parent / "shared" / "data" / "open_union"
PARTIAL = "ignore:.* is not the published set:UserWarning"


def rows(dataset: Dataset) -> list[tuple[str, str, str, str, str | None]]:
    return [
        (
            record.class_name,
            record.split,
            record.defect_type,
            record.path.relative_to(dataset.root).as_posix(),
            record.mask_path.relative_to(dataset.root).as_posix() if record.mask_path else None,
        )
        for record in dataset.records
    ]


# Layouts


def test_mvtec_layout(tmp_path: Path) -> None:
    dataset = load_dataset("folder", root=trees.mvtec(tmp_path))
    assert dataset.classes == ("bottle", "cable") and len(dataset.train) == 6 and len(dataset.test) == 8
    assert rows(dataset)[:7] == [
        ("bottle", "train", "good", "bottle/train/good/000.png", None),
        ("bottle", "train", "good", "bottle/train/good/001.png", None),
        ("bottle", "train", "good", "bottle/train/good/002.png", None),
        ("bottle", "test", "crack", "bottle/test/crack/000.png", "bottle/ground_truth/crack/000_mask.png"),
        ("bottle", "test", "good", "bottle/test/good/000.png", None),
        ("bottle", "test", "good", "bottle/test/good/001.png", None),
        ("bottle", "test", "hole", "bottle/test/hole/000.png", "bottle/ground_truth/hole/000_mask.png"),
    ]
    assert [record.is_anomalous for record in dataset.records[:7]] == [False] * 3 + [True, False, False, True]
    assert dataset.class_idx(dataset.records).tolist() == [0] * 7 + [1] * 7
    assert dataset.class_idx(dataset.test).dtype == np.int64


@pytest.mark.filterwarnings(PARTIAL)
def test_btad(tmp_path: Path) -> None:
    dataset = load_dataset("btad", root=trees.btad(tmp_path))
    assert dataset.classes == ("01", "02", "03")
    home = "BTech_Dataset_transformed/03"
    assert rows(dataset)[-3:] == [
        ("03", "test", "ko", f"{home}/test/ko/000.bmp", f"{home}/ground_truth/ko/000.bmp"),
        ("03", "test", "good", f"{home}/test/ok/000.bmp", None),
        ("03", "test", "good", f"{home}/test/ok/001.bmp", None),
    ]


@pytest.mark.filterwarnings(PARTIAL)
def test_mvtec3d_reads_photographs_only(tmp_path: Path) -> None:
    dataset = load_dataset("mvtec3d", root=trees.mvtec3d(tmp_path))
    assert rows(dataset)[:5] == [
        ("bagel", "train", "good", "bagel/train/good/rgb/000.png", None),
        ("bagel", "train", "good", "bagel/train/good/rgb/001.png", None),
        ("bagel", "train", "good", "bagel/train/good/rgb/002.png", None),
        ("bagel", "test", "cut", "bagel/test/cut/rgb/000.png", "bagel/test/cut/gt/000.png"),
        ("bagel", "test", "good", "bagel/test/good/rgb/000.png", None),
    ]
    assert "2 validation images were left out" in dataset.notes


@pytest.mark.filterwarnings(PARTIAL)
def test_visa_as_published_and_converted(tmp_path: Path) -> None:
    dataset = load_dataset("visa", root=trees.visa(tmp_path / "published"))
    data = "capsules/Data"
    assert rows(dataset)[2:5] == [
        ("capsules", "train", "good", f"{data}/Images/Normal/0002.JPG", None),
        ("capsules", "test", "good", f"{data}/Images/Normal/0003.JPG", None),
        ("capsules", "test", "anomaly", f"{data}/Images/Anomaly/000.JPG", f"{data}/Masks/Anomaly/000.png"),
    ]
    converted = tmp_path / "converted"
    for name in ("capsules", "pcb1"):
        trees.picture(converted / name / "train" / "good" / "0000.JPG")
        trees.picture(converted / name / "test" / "good" / "0001.JPG")
        trees.picture(converted / name / "test" / "bad" / "000.JPG")
        trees.mask(converted / name / "ground_truth" / "bad" / "000.png", value=1)
    dataset = load_dataset("visa", root=converted)
    assert rows(dataset)[1] == (
        "capsules", "test", "anomaly", "capsules/test/bad/000.JPG", "capsules/ground_truth/bad/000.png"
    )  # fmt: skip


@pytest.mark.filterwarnings(PARTIAL)
def test_union_has_names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.mvtec(tmp_path / "mvtec", ("bottle", "capsules"))
    trees.btad(tmp_path / "btad")
    trees.mvtec3d(tmp_path / "mvtec3d")
    trees.visa(tmp_path / "visa")
    expected = (
        "btad/01", "btad/02", "btad/03", "mvtec/bottle", "mvtec/capsules", "mvtec3d/bagel", "mvtec3d/tire",
        "visa/capsules", "visa/pcb1",
    )  # fmt: skip
    dataset = load_dataset("union", root=tmp_path)
    assert dataset.classes == expected
    assert sorted(set(dataset.class_idx(dataset.records).tolist())) == list(range(9))
    monkeypatch.setenv("HGAD_DATA", str(tmp_path))
    assert load_dataset("union").classes == expected
    shutil.rmtree(tmp_path / "visa")
    with pytest.raises(InputError, match=r"visa: dataset 'visa' is not there"):
        load_dataset("union", root=tmp_path)


def test_union_of_the_full_sets_has_forty_classes() -> None:
    names = {f"mvtec/{name}" for name in published.MVTEC} | {f"btad/{name}" for name in published.BTAD}
    names |= {f"mvtec3d/{name}" for name in published.MVTEC3D_TRAIN_TEST}
    names |= {f"visa/{name}" for name in published.VISA_NORMAL_ANOMALOUS}
    assert len(names) == 40


def test_published_counts_are_those_of_the_paper() -> None:
    mvtec = np.array(list(published.MVTEC.values())).sum(axis=0)
    assert (len(published.MVTEC), mvtec[0], mvtec[1] + mvtec[2]) == (15, 3629, 1725)
    btad = np.array(list(published.BTAD.values()))
    assert btad.sum() + btad[:, 2].sum() == 2830 and sorted(btad[:, 0]) == [399, 400, 1000]
    validation = 294
    assert np.array(list(published.MVTEC3D_TRAIN_TEST.values())).sum() + validation == 4147
    assert np.array(list(published.VISA_NORMAL_ANOMALOUS.values())).sum(axis=0).tolist() == [9621, 1200]


def test_suffixes_mask_names_and_missing_masks(tmp_path: Path) -> None:
    for number, suffix in enumerate((".png", ".JPG", ".jpeg", ".bmp", ".tif", ".TIFF")):
        trees.picture(tmp_path / "Meine Teile" / "train" / "good" / f"{number}{suffix}")
        trees.picture(tmp_path / "Meine Teile" / "test" / "Öl fleck" / f"{number}{suffix}")
    truth = tmp_path / "Meine Teile" / "ground_truth" / "Öl fleck"
    trees.mask(truth / "0_mask.bmp")
    trees.mask(truth / "1.tif")
    dataset = load_dataset("folder", root=tmp_path)
    masks = [record.mask_path.name if record.mask_path else None for record in dataset.test]
    assert dataset.classes == ("Meine Teile",) and masks == ["0_mask.bmp", "1.tif", None, None, None, None]
    assert any("4 of 6 anomalous images have no mask (Öl fleck 4)" in note for note in dataset.notes)


def test_a_single_class_folder(tmp_path: Path) -> None:
    dataset = load_dataset("folder", root=trees.mvtec_class(tmp_path / "bottle"))
    assert dataset.classes == ("bottle",) and len(dataset.records) == 7


def test_flat_layout(tmp_path: Path) -> None:
    for name in ("left", "right"):
        for number in range(2):
            trees.picture(tmp_path / name / f"{number}.png")
    trees.picture(tmp_path / "score" / "left" / "new.png")
    trees.picture(tmp_path / "score" / "somewhere.png")
    dataset = load_dataset("folder", root=tmp_path)
    assert dataset.classes == ("left", "right") and len(dataset.train) == 4
    assert [(r.path.name, r.class_name, r.defect_type, r.is_labelled) for r in dataset.test] == [
        ("somewhere.png", UNKNOWN_CLASS, UNLABELLED, False),
        ("new.png", "left", UNLABELLED, False),
    ]
    with pytest.raises(InputError, match=r"somewhere.png: expected one of the classes left, right"):
        dataset.class_idx(dataset.test)
    known = relabel(dataset, [r.class_name for r in dataset.train], ["right", "left"])
    assert known.class_idx(known.test).tolist() == [1, 0]


def test_all_images_in_one_folder(tmp_path: Path) -> None:
    trees.picture(tmp_path / "parts" / "a.png")
    trees.picture(tmp_path / "parts" / "score" / "b.png")
    dataset = load_dataset("folder", root=tmp_path / "parts")
    assert dataset.classes == ("parts",)
    assert [record.class_name for record in dataset.records] == ["parts", "parts"]


def test_relabel(tmp_path: Path) -> None:
    dataset = load_dataset("folder", root=trees.mvtec(tmp_path))
    new = relabel(dataset, ["b", "a"] * 3, ["a"] * 8)
    assert new.classes == ("a", "b") and new.class_idx(new.train).tolist() == [1, 0, 1, 0, 1, 0]
    assert [r.path for r in new.records] == [r.path for r in dataset.records]
    with pytest.raises(InputError, match="'c' has test images but no training image"):
        relabel(dataset, ["a"] * 6, ["c"] * 8)
    with pytest.raises(InputError, match="expected class names of 8 test images, found 7"):
        relabel(dataset, ["a"] * 6, ["a"] * 7)


# Order and places


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.mvtec(tmp_path, ("b", "a", "c"))
    expected = rows(load_dataset("folder", root=tmp_path))
    listing = os.scandir

    class Reversed:
        def __init__(self, path: str | Path) -> None:
            self.entries = sorted(listing(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert rows(load_dataset("folder", root=tmp_path)) == expected


def test_place_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HGAD_DATA", raising=False)
    trees.mvtec(tmp_path / "data" / "folder", ("near",))
    trees.mvtec(tmp_path / "elsewhere" / "folder", ("far",))
    assert load_dataset("folder").classes == ("near",)
    monkeypatch.setenv("HGAD_DATA", str(tmp_path / "elsewhere"))
    assert load_dataset("folder").classes == ("far",)
    assert load_dataset("folder", root="data/folder").classes == ("near",)


@pytest.mark.parametrize("name", ["mvtec", "btad", "mvtec3d", "visa"])
def test_missing_data_says_how_to_come_by_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"data_root.*HGAD_DATA.*hgad data fetch {name}"):
        load_dataset(name, root=tmp_path / "none")


def test_unknown_name_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"unknown dataset 'imagenet'; expected one of {', '.join(DATASETS)}"
    ):
        load_dataset("imagenet")
    with pytest.raises(InputError, match="no such folder; dataset 'folder' needs data_root"):
        load_dataset("folder", root=tmp_path / "none")


# Counts


def test_complete_set_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hgadlib.datasets.published.MVTEC", {"bottle": (3, 2, 2), "cable": (3, 2, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset("mvtec", root=trees.mvtec(tmp_path))
    assert "mvtec is complete: the counts are the published ones" in dataset.notes


def test_partial_set_warns_and_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hgadlib.datasets.published.MVTEC", {name: (3, 2, 2) for name in ("bottle", "cable", "tile")}
    )
    trees.mvtec(tmp_path)
    (tmp_path / "bottle" / "train" / "good" / "002.png").unlink()
    (tmp_path / "bottle" / "test" / "good" / "000.png").unlink()
    (tmp_path / "cable" / "test" / "hole" / "000.png").unlink()
    with pytest.warns(UserWarning, match="mvtec is not the published set") as caught:
        dataset = load_dataset("mvtec", root=tmp_path)
    text = str(caught[0].message)
    assert "1 of 3 classes are missing: tile" in text
    assert "bottle: train 2 of 3, test normal 1 of 2; missing: bottle/test/good/000.png, " in text
    assert "bottle/train/good/002.png; cable: " in text
    assert "cable: test anomalous 1 of 2" in text
    assert any("image is missing: ground_truth/hole/000_mask.png" in note for note in dataset.notes)


# ELPV


@pytest.fixture
def elpv_root(tmp_path: Path) -> Path:
    lines = []
    for number in range(40):
        kind = "mono" if number % 2 else "poly"
        probability = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.3333333333333333, 1.0)[number % 10]
        trees.picture(tmp_path / "images" / f"cell{number:04d}.png")
        lines.append(f"images/cell{number:04d}.png  {probability}  {kind}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_elpv_split(elpv_root: Path) -> None:
    dataset = load_dataset("elpv", root=elpv_root)
    assert dataset.classes == ("mono", "poly") and "4 images" in dataset.notes[0]
    normal = [record for record in dataset.records if not record.is_anomalous]
    assert len(normal) == 28 and len(dataset.train) == round(0.75 * 16) + round(0.75 * 12)
    assert all(record.mask_path is None for record in dataset.records)
    assert sum(record.is_anomalous for record in dataset.test) == 8
    again = load_dataset("elpv", root=elpv_root)
    assert again.records == dataset.records
    assert load_dataset("elpv", root=elpv_root, seed=1).train != dataset.train


def test_elpv_keeps_identical_images_on_one_side(elpv_root: Path) -> None:
    # Four alike in each class, one alike in both classes, one alike normal and anomalous.
    for source, copies in ((0, (10, 20, 30)), (1, (11, 21, 31)), (2, (3,)), (4, (6,)), (5, (15, 25, 35))):
        for number in copies:
            shutil.copy(*(elpv_root / "images" / f"cell{index:04d}.png" for index in (source, number)))
    for seed in range(5):
        dataset = load_dataset("elpv", root=elpv_root, seed=seed)
        train, test = (
            {record.path.read_bytes() for record in side} for side in (dataset.train, dataset.test)
        )
        assert not train & test


def test_elpv_bad_table(elpv_root: Path) -> None:
    table = elpv_root / "labels.csv"
    good = table.read_text()
    table.write_text(good + "images/cell0000.png 0.0 hetero\n")
    with pytest.raises(InputError, match=r"labels.csv, line 41: expected IMAGE PROBABILITY"):
        load_dataset("elpv", root=elpv_root)
    table.write_text(good + "images/cell9999.png 0.0 mono\n")
    with pytest.raises(InputError, match=r"cell9999.png: listed in labels.csv"):
        load_dataset("elpv", root=elpv_root)
    assert len(load_dataset("elpv", root=elpv_root, strict=False).skipped) == 1
    table.unlink()
    with pytest.raises(InputError, match=r"labels.csv: No such file .* expected the data folder"):
        load_dataset("elpv", root=elpv_root)


def test_the_shipped_elpv() -> None:
    dataset = load_dataset("elpv")
    counts = {
        (name, kind): sum(r.class_name == name and (r.split, r.is_anomalous) == kind for r in dataset.records)
        for name in dataset.classes
        for kind in (("train", False), ("test", False), ("test", True))
    }
    assert list(counts.values()) == [441, 147, 313, 690, 230, 402]
    assert dataset.notes == ("401 images with a defect probability between 0 and 1 were left out",)


# Real images


@pytest.mark.skipif(not OPEN_UNION.is_dir(), reason="the development images are not here")
def test_open_union_loads() -> None:
    dataset = load_dataset("folder", root=OPEN_UNION)
    assert dataset.classes == ("bottle", "fabric01", "fabric03", "kolektorsdd", "magnetic_tile")
    assert (len(dataset.train), len(dataset.test)) == (1181, 976)
    assert all((record.mask_path is not None) == record.is_anomalous for record in dataset.records)


# Check


def test_check_reports_what_is_there(tmp_path: Path) -> None:
    trees.mvtec(tmp_path)
    Image.new("L", (30, 20)).save(tmp_path / "cable" / "train" / "good" / "003.png")
    report = check(tmp_path)
    assert report.problems == () and report.table.index.tolist() == ["bottle", "cable"]
    table = report.table.to_dict("index")
    bottle = {
        key: table["bottle"][key] for key in ("train", "test normal", "test anomalous", "masks", "size")
    }
    assert list(bottle.values()) == [3, 2, 2, 2, "16x12"]
    assert table["cable"]["size"] == "16..30 x 12..20" and table["cable"]["modes"] == "PNG L, PNG RGB"
    assert "No problems" in str(report)


def test_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.mvtec(tmp_path)
    good = tmp_path / "bottle" / "train" / "good"
    (good / "001.png").write_bytes((good / "000.png").read_bytes()[:300])
    shutil.copy(good / "000.png", tmp_path / "bottle" / "test" / "good" / "000.png")
    trees.mask(tmp_path / "cable" / "ground_truth" / "hole" / "000_mask.png", value=0)
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "Problems (3)" in out and "truncated" in out
    assert "the same image is in train and in test" in out and "mask of an anomalous image is empty" in out


def test_check_guesses_the_layout(tmp_path: Path, elpv_root: Path) -> None:
    assert guess_layout(elpv_root) == "elpv"
    for name in ("mvtec3d", "visa", "btad"):
        assert guess_layout(getattr(trees, name)(tmp_path / name)) == name
    assert guess_layout(trees.mvtec(tmp_path / "mvtec")) == "folder"


def test_commands(tmp_path: Path) -> None:
    trees.mvtec(tmp_path)
    command = [sys.executable, "-m", "hgadlib", "data", "check"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bottle" in done.stdout, done.stderr
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (
        failed.returncode == 2
        and failed.stderr.startswith("error: ")
        and "expected a folder" in failed.stderr
    )


def test_fetch_of_what_cannot_be_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "elpv"]) == 0
    assert main(["data", "fetch", "folder"]) == 2 and "it is your own" in capsys.readouterr().err


def test_records_are_checked() -> None:
    with pytest.raises(InputError, match=r"expected distinct sorted class names, found \['a', 'a'\]"):
        Dataset("x", Path("."), ("a", "a"), ())
    with pytest.raises(InputError, match="sorted"):
        Dataset("x", Path("."), ("b", "a"), ())
    assert ImageRecord(Path("a"), "c", "train", False, "good").mask_path is None
    assert Findings().strict


def test_a_name_has_one_unicode_form_whatever_the_file_system_wrote(tmp_path: Path) -> None:
    names = unicodedata.normalize("NFD", "D\u00fcse"), "Mutter \u00e9"
    made = load_dataset("folder", root=trees.mvtec(tmp_path, names))
    assert made.classes == ("D\u00fcse", "Mutter \u00e9")
    assert made.class_idx(made.records).tolist() == sorted(made.class_idx(made.records))


def test_the_command_writes_names_that_the_terminal_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trees.mvtec(tmp_path, ("bytes", "螺丝"))
    (root / "bytes").rename(root / "bytes \udcff")
    assert main(["data", "check", str(root)]) == 0
    said = capsys.readouterr().out
    assert r"bytes \udcff" in said and "螺丝" in said
