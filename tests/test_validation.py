"""A validation set comes from training images alone, and its masks are true."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from hgadlib.__main__ import main
from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import read_image, read_mask
from hgadlib.datasets.records import Dataset
from hgadlib.datasets.validation import EDGE, KINDS, draw_defect, hold_out, make_validation
from hgadlib.errors import InputError
from hgadlib.runs.inputs import identify

SHAPES = {"panel": (64, 96), "weave": (80, 56)}
GREY = "weave"
N_TRAIN = 20


def product(number: int, shape: tuple[int, int], grey: bool) -> NDArray[np.uint8]:
    rng = np.random.default_rng([number, *shape])
    noise = ndimage.gaussian_filter(rng.normal(0, 60, (*shape, 3)), (1.0, 1.0, 0))
    pixels = np.clip(120 + noise, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels


def save(path: Path, pixels: NDArray[np.uint8], grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    root = tmp_path / "products"
    for name, shape in SHAPES.items():
        for number in range(N_TRAIN):
            save(
                root / name / "train" / "good" / f"{number:03d}.png",
                product(number, shape, name == GREY),
                name == GREY,
            )
        for number, kind in enumerate(("good", "crack")):
            save(root / name / "test" / kind / "000.png", product(100 + number, shape, False))
        save(
            root / name / "ground_truth" / "crack" / "000_mask.png", np.full((*shape, 3), 255, np.uint8), True
        )
    return load_dataset("folder", root=root)


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def anomalous(made: Dataset) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]]:
    """Yield image before, image after and mask of each synthetic defect."""
    for record in made.test:
        if record.is_anomalous:
            assert record.mask_path is not None
            before = made.root / record.class_name / "test" / "good" / record.path.name
            yield read_image(before), read_image(record.path), read_mask(record.mask_path)


def test_it_loads_as_a_folder_and_splits_are_disjoint(dataset: Dataset, tmp_path: Path) -> None:
    made = load_dataset("folder", root=make_validation(dataset, tmp_path / "out"))
    assert made.classes == dataset.classes and not made.notes
    source = {record.path.read_bytes() for record in dataset.train}
    for name in made.classes:
        train = [record.path.read_bytes() for record in made.train if record.class_name == name]
        test = [record for record in made.test if record.class_name == name]
        good = [record.path.read_bytes() for record in test if not record.is_anomalous]
        assert (len(train), len(good), len(test)) == (12, 8, 8 + 16)
        assert not set(train) & set(good) and set(train) | set(good) <= source
        assert {record.defect_type for record in test} == {"good", *KINDS}


def test_nothing_changes_beyond_the_soft_edge_of_the_mask(dataset: Dataset, tmp_path: Path) -> None:
    made = load_dataset("folder", root=make_validation(dataset, tmp_path / "out"))
    pairs = list(anomalous(made))
    assert len(pairs) == 32
    for before, after, mask in pairs:
        assert before.shape == after.shape and mask.shape == before.shape[:2]
        changed = (before != after).any(axis=2)
        reach = ndimage.distance_transform_edt(~mask)[changed].max()
        assert reach <= max(2.0, EDGE * min(mask.shape)), "a change far from the mask"
        assert changed[mask].mean() > 0.5, "a mask where nothing changed"
        assert 0 < mask.mean() < 0.15
        if (before == before[..., :1]).all():
            assert (after == after[..., :1]).all(), "a grey image must stay grey"


def test_size_of_defects_goes_with_the_image() -> None:
    areas = []
    for side in (128, 512):
        rng = np.random.default_rng(3)
        drawn = draw_defect(product(0, (side, 2 * side), False), "stain", 0.9, rng)
        assert drawn is not None
        areas.append(drawn[1].sum() / side**2)
    assert 0.3 < areas[0] / areas[1] < 3.0


def test_a_blank_image_shows_no_blur_but_a_scratch() -> None:
    blank = np.full((64, 64, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    assert (
        draw_defect(blank, "blur", 1.0, rng) is None and draw_defect(blank, "scratch", 1.0, rng) is not None
    )


def test_seed_decides_and_order_and_names_do_not(dataset: Dataset, tmp_path: Path) -> None:
    first = content(make_validation(dataset, tmp_path / "a"))
    reverse = replace(dataset, records=dataset.records[::-1])
    assert content(make_validation(reverse, tmp_path / "b")) == first
    other = content(make_validation(dataset, tmp_path / "c", seed=1))
    assert {name for name in other if "test/good" in name} != {name for name in first if "test/good" in name}
    for record in dataset.train:
        number = int(record.path.stem)
        record.path.rename(record.path.with_name(f"n{N_TRAIN - number:03d}.png"))
    renamed = content(make_validation(load_dataset("folder", root=dataset.root), tmp_path / "d"))
    assert sorted(renamed.values()) == sorted(first.values())


def test_no_test_image_is_opened(dataset: Dataset, tmp_path: Path) -> None:
    first = content(make_validation(dataset, tmp_path / "before"))
    for record in dataset.test:
        record.path.write_bytes(b"poison")
        if record.mask_path is not None:
            record.mask_path.unlink()
    poisoned = {record.path: record.path.stat().st_mtime_ns for record in dataset.test}
    assert content(make_validation(dataset, tmp_path / "after")) == first
    for path, modified in poisoned.items():
        assert path.read_bytes() == b"poison" and path.stat().st_mtime_ns == modified
        path.unlink()
        os.mkfifo(path)  # opening it would wait for ever
    assert content(make_validation(dataset, tmp_path / "fifo")) == first


def test_the_command_makes_nothing_of_test_images(dataset: Dataset, tmp_path: Path) -> None:
    expected = content(make_validation(dataset, tmp_path / "same", seed=2))
    # The loader sees to it that all files are images; what they show must not matter.
    for record in dataset.test:
        save(record.path, np.zeros((*SHAPES[record.class_name], 3), np.uint8))
    assert main(["data", "validation", str(dataset.root), str(tmp_path / "out"), "--seed", "2"]) == 0
    assert content(tmp_path / "out") == expected


def test_identical_images_stay_together(dataset: Dataset, tmp_path: Path) -> None:
    twins = [record for record in dataset.train if record.class_name == "panel"]
    for record in twins:
        record.path.with_name(f"twin{record.path.name}").write_bytes(record.path.read_bytes())
    made = load_dataset(
        "folder", root=make_validation(load_dataset("folder", root=dataset.root), tmp_path / "o")
    )
    train = {record.path.read_bytes() for record in made.train}
    good = [record.path.read_bytes() for record in made.test if not record.is_anomalous]
    assert len(good) == len(set(good)) and not train & set(good)


def test_class_names_with_a_slash_and_namesakes(dataset: Dataset, tmp_path: Path) -> None:
    def union_name(name: str) -> str:
        return {"panel": "mvtec/capsules", "weave": "visa/capsules"}[name]

    records = [replace(record, class_name=union_name(record.class_name)) for record in dataset.records]
    # The same file name from two folders of one class.
    extra = save(dataset.root / "more" / "000.png", product(999, SHAPES["panel"], False))
    records.append(replace(records[0], path=extra))
    union = replace(dataset, classes=("mvtec/capsules", "visa/capsules"), records=tuple(records))
    made = load_dataset("folder", root=make_validation(union, tmp_path / "out"))
    assert made.classes == ("mvtec_capsules", "visa_capsules")
    normal = [r for r in made.records if r.class_name == "mvtec_capsules" and not r.is_anomalous]
    assert len(normal) == N_TRAIN + 1
    same = {"mvtec/capsules": "a/b", "visa/capsules": "a_b"}
    clash = [replace(record, class_name=same[record.class_name]) for record in records]
    with pytest.raises(InputError, match=r"'a/b' and 'a_b' would share the folder 'a_b'"):
        make_validation(replace(dataset, classes=("a/b", "a_b"), records=tuple(clash)), tmp_path / "clash")


def test_a_second_call_repeats_nothing_and_other_settings_are_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make_validation(dataset, out)
    marker = (out / "validation.json").stat().st_mtime_ns
    assert make_validation(dataset, out) == out and (out / "validation.json").stat().st_mtime_ns == marker
    with pytest.raises(InputError, match="differs in seed; remove it or give another"):
        make_validation(dataset, out, seed=1)
    save(dataset.train[0].path.with_name("new.png"), product(7777, SHAPES["panel"], False))
    with pytest.raises(InputError, match="differs in training_images"):
        make_validation(load_dataset("folder", root=dataset.root), out)


def test_a_failure_leaves_nothing(dataset: Dataset, tmp_path: Path) -> None:
    for record in dataset.train:
        if record.class_name == "weave":
            record.path.write_bytes(record.path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"weave.*truncated or damaged"):
        make_validation(dataset, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["products"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 0.0}, "held_out: expected a share between 0 and 1, found 0.0"),
        ({"held_out": float("nan")}, "held_out: .* found nan"),
        ({"defects_per_image": 6}, "defects_per_image: expected 1 to 5, found 6"),
        ({"seed": -1}, "seed: expected 0 or more, found -1"),
    ],
)
def test_bad_settings(dataset: Dataset, tmp_path: Path, settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_validation(dataset, tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_bad_places_and_images(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lies inside the dataset"):
        make_validation(dataset, dataset.root / "validation")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="expected a validation set, found other files"):
        make_validation(dataset, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    with pytest.raises(InputError, match="expected a folder, found a file"):
        make_validation(dataset, tmp_path / "mine" / "letter.txt")
    few = replace(dataset, records=tuple(r for r in dataset.records if r.path.stem < "015"))
    with pytest.raises(InputError, match=r"'panel': expected at least 16 different .* found 15"):
        make_validation(few, tmp_path / "out")
    for record in dataset.train:
        save(record.path, product(int(record.path.stem), (24, 90), False))
    with pytest.raises(InputError, match="expected at least 32 pixels a side to draw on, found 90x24"):
        make_validation(dataset, tmp_path / "out")


def test_command_line_errors(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "validation", str(tmp_path / "nowhere"), out]) == 2
    assert "expected a folder or one of mvtec," in capsys.readouterr().err
    assert main(["data", "validation", str(dataset.root), out, "--root", out]) == 2
    assert "--root goes with a dataset's name" in capsys.readouterr().err
    assert main(["data", "validation", "folder", out, "--root", str(dataset.root), "--held-out", "0.4"]) == 0
    assert f"-p dataset folder -p data_root {out}" in capsys.readouterr().out


def digests(dataset: Dataset, split: str) -> set[bytes]:
    return {record.path.read_bytes() for record in dataset.records if record.split == split}


def folder_of(root: Path, counts: dict[str, int], *, prefix: str = "") -> Dataset:
    """Classes of tiny images; the content of each is of its class and number."""
    for k, (name, count) in enumerate(counts.items()):
        for number in range(count):
            save(
                root / name / "train" / "good" / f"{prefix}{number:03d}.png",
                product(1000 * k + number, (8, 8), False),
            )
        save(root / name / "test" / "crack" / "000.png", product(-1 - k + 10**6, (8, 8), False))
    return load_dataset("folder", root=root)


def test_held_out_counts(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, {"few": 3, "some": 23, "more": 24, "many": 100})
    for share, counts in {0.0: (0, 0, 0, 0), 0.1: (0, 2, 8, 10), 0.5: (1, 11, 12, 50)}.items():
        out = hold_out(dataset, share)
        found = [sum(r.class_name == n for r in out.held_out) for n in ("few", "some", "more", "many")]
        assert tuple(found) == counts
        assert len(out.train) + len(out.held_out) == 150 and out.test == dataset.test
        assert [r.path for r in out.records] == [r.path for r in dataset.records]
        assert identify(out) == identify(dataset)


def test_what_is_held_out_is_of_the_content(tmp_path: Path) -> None:
    counts = {"a": 30}
    out = hold_out(folder_of(tmp_path / "one", counts), 0.2)
    # Other names, other order, and another root: the same contents.
    renamed = folder_of(tmp_path / "two", counts)
    for record in renamed.train:
        record.path.rename(record.path.with_name(f"{(7 * int(record.path.stem)) % 30:03d}x.png"))
    again = hold_out(load_dataset("folder", root=tmp_path / "two"), 0.2)
    assert digests(out, "held_out") == digests(again, "held_out") and len(out.held_out) == 8
    assert not digests(out, "held_out") & digests(out, "train")


def test_identical_images_are_held_out_together(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, {"a": 30})
    chosen = hold_out(dataset, 0.2).held_out[0]
    shutil.copy(chosen.path, chosen.path.with_name("copy.png"))
    out = hold_out(load_dataset("folder", root=tmp_path), 0.2)
    assert len(out.held_out) == 9 and not digests(out, "held_out") & digests(out, "train")
