"""The demo dataset: made here, the same bytes for the same seed, nothing shared between train and test."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from hgadlib.datasets import demo, load_dataset
from hgadlib.datasets.demo import DEFECTS, MISSING, Shot, render, scenes, shots
from hgadlib.datasets.images import read_image
from hgadlib.errors import InputError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a few images of two classes only."""
    monkeypatch.setattr(demo, "N_TRAIN", 2)
    monkeypatch.setattr(demo, "N_TEST_GOOD", 1)
    monkeypatch.setattr(demo, "N_PER_DEFECT", 1)
    monkeypatch.setattr(demo, "SCENES", {name: scenes.SCENES[name] for name in ("brick", "hex_nut")})


def test_plan() -> None:
    plan = list(shots())
    assert len(plan) == len(set(plan)) == 6 * (60 + 20 + 24)
    assert all(len(kinds) == 4 for kinds in DEFECTS.values()) and set(DEFECTS) == set(scenes.SCENES)


def test_it_loads_like_any_folder(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the demo must not need a network"))
    monkeypatch.setenv("HGAD_DATA", str(tmp_path))
    dataset = load_dataset("demo")
    assert dataset.root == tmp_path / "demo" and dataset.classes == ("brick", "hex_nut")
    assert (len(dataset.train), len(dataset.test)) == (4, 10)
    assert all((record.mask_path is not None) == record.is_anomalous for record in dataset.records)
    assert read_image(dataset.records[0].path).shape == (256, 256, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, small: None) -> None:
    def content(root: Path) -> dict[str, bytes]:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}

    first, second = (content(demo.ensure(tmp_path / name)) for name in ("a", "b"))
    assert first == second and len(first) == 22
    other = demo.ensure(tmp_path / "a", seed=1)
    assert other == tmp_path / "a-seed1" and content(other).keys() == first.keys() and content(other) != first


def test_what_is_there_is_kept(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = demo.ensure(tmp_path / "demo")
    monkeypatch.setattr(demo, "render", lambda *_: pytest.fail("made twice"))
    assert demo.ensure(tmp_path / "demo") == root
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    with pytest.raises(InputError, match="the demo dataset that differs in version; remove it"):
        demo.ensure(tmp_path / "demo")


def test_killed_while_it_is_made(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Shot] = []

    def killed(shot: Shot, seed: int) -> object:
        made.append(shot)
        if len(made) > 3:
            raise KeyboardInterrupt
        return render(shot, seed)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "render", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.ensure(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
    assert load_dataset("demo", root=tmp_path / "demo").classes == ("brick", "hex_nut")


def test_other_peoples_files_are_not_touched(tmp_path: Path, small: None) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="expected the demo dataset, found other files"):
        demo.ensure(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="expected a folder, found a file"):
        demo.ensure(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        demo.ensure(tmp_path / "file" / "demo")


@pytest.mark.parametrize("name", ["brick", "grass", "gravel"])
def test_train_and_test_crops_come_from_disjoint_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paint the two parts of the photograph black and white: no crop may see the other's colour."""
    border = scenes._TRAIN_COLUMNS
    painted = np.zeros((512, 512), np.uint8)
    painted[:, border:] = 255
    monkeypatch.setattr(scenes, "_photograph", lambda _: painted)
    for seed in range(60):
        tones = {}
        for split in ("train", "test"):
            surface, _ = scenes.texture(name, split, np.random.default_rng(seed), False)
            assert np.ptp(surface.albedo[..., 1]) < 1e-6
            tones[split] = surface.albedo.mean()
        assert tones["train"] < tones["test"]


@pytest.mark.parametrize("name", sorted(DEFECTS))
def test_masks_are_exact(name: str) -> None:
    """Without camera noise a defect changes the scene inside its mask far more than outside."""
    for kind in sorted(DEFECTS[name]):
        defect = DEFECTS[name][kind]
        image, mask = render(Shot(name, "test", kind, 5), 0)
        assert mask is not None and image.dtype == np.uint8
        assert 10 < mask.sum() < 0.2 * mask.size, kind
        if kind == MISSING or defect is None:
            continue
        rng = np.random.default_rng(3)
        surface, _ = scenes.SCENES[name]("test", rng, False)
        changed, cover = defect(surface, (0.5, 0.5), 1.0, rng)
        outside = cover < 0.01
        assert np.abs(changed.albedo - surface.albedo)[outside].max() < 0.03
        assert np.abs(changed.albedo - surface.albedo)[cover > 0.9].mean() > 0.05


def test_severity_runs_from_subtle_to_plain() -> None:
    surface, _ = scenes.SCENES["gauge"]("test", np.random.default_rng(0), False)
    change = []
    for severity in (0.2, 0.6, 1.0):
        stained, cover = demo.defects.stain(surface, (0.5, 0.5), severity, np.random.default_rng(1))
        change.append(float(np.abs(stained.albedo - surface.albedo)[cover > 0.9].mean()))
    assert change[0] < change[1] < change[2]
