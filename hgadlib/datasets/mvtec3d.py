"""MVTec 3D-AD without its scans: CLASS/{train,validation,test}/TYPE/{rgb,gt}/NNN.png.

Source: Bergmann et al., "The MVTec 3D-AD dataset for unsupervised 3D anomaly detection and localization",
    2021.
"""

from __future__ import annotations

from pathlib import Path

from hgadlib.datasets.folder import match_masks
from hgadlib.datasets.published import MVTEC3D_TRAIN_TEST, compare
from hgadlib.datasets.records import GOOD, ImageRecord
from hgadlib.datasets.scan import Findings, class_folders, list_folder, list_images, some


def load(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set. Its validation images are left out and counted: the paper's protocol has no use for them.

    Args:
        root: Folder that holds the class folders.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records.

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, folders = class_folders(root, "train", findings)
    records: list[ImageRecord] = []
    validation = 0
    for folder in folders:
        train = _images(folder / "train" / GOOD, findings)
        if not train:
            findings.bad(
                folder / "train", f"class {folder.name!r} is empty: expected images in train/good/rgb"
            )
            continue
        records += [ImageRecord(path, folder.name, "train", False, GOOD) for path in train]
        if (folder / "validation" / GOOD).is_dir():
            validation += len(_images(folder / "validation" / GOOD, findings))
        if (folder / "test").is_dir():
            records += _read_test(folder, findings)
    findings.note(f"{validation} validation images were left out")
    compare("mvtec3d", home, records, MVTEC3D_TRAIN_TEST, ("train", "test"), findings)
    return records


def _images(kind: Path, findings: Findings) -> list[Path]:
    return list_images(kind / "rgb", findings) if (kind / "rgb").is_dir() else []


def _read_test(folder: Path, findings: Findings) -> list[ImageRecord]:
    """Read test images and masks; gt of normal images is all zero and not looked at."""
    records: list[ImageRecord] = []
    for kind in list_folder(folder / "test", findings)[0]:
        images = _images(kind, findings)
        if kind.name == GOOD:
            records += [ImageRecord(path, folder.name, "test", False, GOOD) for path in images]
            continue
        masks = list_images(kind / "gt", findings) if (kind / "gt").is_dir() else []
        pairs, unused = match_masks(images, masks, findings)
        records += [ImageRecord(path, folder.name, "test", True, kind.name, mask) for path, mask in pairs]
        if unused:
            names = some([path.name for path in unused])
            findings.note(f"{folder.name}/{kind.name}: {len(unused)} mask(s) whose image is missing: {names}")
        bare = [image.name for image, mask in pairs if mask is None]
        if bare:
            findings.note(f"{folder.name}/{kind.name}: {len(bare)} image(s) have no mask: {some(bare)}")
    return records
