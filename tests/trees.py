"""Small trees of real image files, one for each layout; used by the tests of the datasets."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 16)) -> Path:
    """Write a small image of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *str(path).encode()]).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (12, 16), value: int = 255) -> Path:
    """Write a mask with a marked corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, np.uint8)
    pixels[:4, :5] = value
    Image.fromarray(pixels).save(path)
    return path


def mvtec_class(folder: Path, good: str = "good", train: int = 3, suffix: str = ".png") -> Path:
    """Write one class: train, two normal test images, a crack and a hole with masks."""
    for number in range(train):
        picture(folder / "train" / good / f"{number:03d}{suffix}")
    for number in range(2):
        picture(folder / "test" / good / f"{number:03d}{suffix}")
    for kind in ("crack", "hole") if good == "good" else ("ko",):
        picture(folder / "test" / kind / f"000{suffix}")
        mask(folder / "ground_truth" / kind / ("000_mask.png" if good == "good" else "000.png"))
    return folder


def mvtec(root: Path, classes: tuple[str, ...] = ("bottle", "cable")) -> Path:
    """Write the layout of MVTec AD."""
    for name in classes:
        mvtec_class(root / name)
    (root / "license.txt").write_text("words")
    return root


def btad(root: Path) -> Path:
    """Write the layout of BTAD, with the archive's folder between."""
    for name in ("01", "02", "03"):
        mvtec_class(root / "BTech_Dataset_transformed" / name, good="ok", suffix=".bmp")
    mask(root / "BTech_Dataset_transformed" / "03" / "ground_truth" / "ko" / "000.bmp")
    (root / "BTech_Dataset_transformed" / "03" / "ground_truth" / "ko" / "000.png").unlink()
    return root


def mvtec3d(root: Path, classes: tuple[str, ...] = ("bagel", "tire")) -> Path:
    """Write the layout of MVTec 3D-AD."""
    for name in classes:
        for number in range(3):
            picture(root / name / "train" / "good" / "rgb" / f"{number:03d}.png")
        picture(root / name / "validation" / "good" / "rgb" / "000.png")
        for kind in ("good", "cut"):
            picture(root / name / "test" / kind / "rgb" / "000.png")
            mask(root / name / "test" / kind / "gt" / "000.png", value=255 if kind == "cut" else 0)
            (root / name / "test" / kind / "xyz").mkdir()
            (root / name / "test" / kind / "xyz" / "000.tiff").write_bytes(b"points")
    return root


VISA_COLUMNS = ("object", "split", "label", "image", "mask")


def visa(root: Path, classes: tuple[str, ...] = ("capsules", "pcb1")) -> Path:
    """Write the published layout of VisA."""
    rows = []
    for name in classes:
        for number in range(4):
            image = picture(root / name / "Data" / "Images" / "Normal" / f"{number:04d}.JPG")
            side = "train" if number < 3 else "test"
            rows.append((name, side, "normal", image.relative_to(root).as_posix(), ""))
        image = picture(root / name / "Data" / "Images" / "Anomaly" / "000.JPG")
        truth = mask(root / name / "Data" / "Masks" / "Anomaly" / "000.png", value=1)
        rows.append(
            (name, "test", "anomaly", image.relative_to(root).as_posix(), truth.relative_to(root).as_posix())
        )
    visa_table(root, [VISA_COLUMNS, *rows])
    return root


def visa_table(root: Path, rows: list[tuple[str, ...]]) -> Path:
    """Write split_csv/1cls.csv."""
    path = root / "split_csv" / "1cls.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def deep(path: Path, top: int, seed: int = 0) -> Path:
    """Write a 16-bit grey image whose values go from 0 to just `top`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, top, (12, 16)).astype(np.uint16)
    pixels[0, 0], pixels[0, 1] = 0, top
    Image.fromarray(pixels).save(path)
    return path


def deep_class(folder: Path, top: int, test_top: int | None = None) -> Path:
    """Write one class of 16-bit images: nine for training, and of both kinds for the test."""
    for number in range(9):
        deep(folder / "train" / "good" / f"{number}.png", top, number)
    for kind in ("good", "crack"):
        deep(folder / "test" / kind / "0.png", test_top or top)
    return folder
