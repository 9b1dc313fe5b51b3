"""The user's own folder: the MVTec layout, or a flat one.

MVTec layout, with any class and defect names; masks are optional and named NAME_mask.EXT or NAME.EXT::

    ROOT/CLASS/train/good/*.png
    ROOT/CLASS/test/{good, DEFECT, ...}/*.png
    ROOT/CLASS/ground_truth/DEFECT/NAME_mask.png

ROOT may also be one such class. Flat layout, for those who have normal images and images to score::

    ROOT/CLASS/*.png          normal images (or ROOT/*.png: one class, named after ROOT)
    ROOT/score/CLASS/*.png    images to score (or ROOT/score/*.png)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from hgadlib.datasets.images import read_mask
from hgadlib.datasets.records import GOOD, UNKNOWN_CLASS, UNLABELLED, ImageRecord
from hgadlib.datasets.scan import Findings, check_unique_names, is_image, list_folder, list_images, some
from hgadlib.errors import InputError

SCORE = "score"
EXPECTED = "expected CLASS/train/good/*.png (MVTec layout) or CLASS/*.png (flat layout)"


def read_tree(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read a folder of either layout.

    Args:
        root: The folder.
        findings: Takes up what is bad or worth a note.

    Returns:
        Records, by class, train before test, then by defect type and name.

    Raises:
        InputError: The folder has neither layout, or (under strict) something in it is bad.
    """
    folders, files = list_folder(root, findings)
    if any(folder.name in ("train", "test", "ground_truth") for folder in folders):
        return read_class(root, root.resolve().name, findings)
    if any((folder / "train").is_dir() or (folder / "test").is_dir() for folder in folders):
        return [
            record
            for folder in check_unique_names(folders, findings)
            for record in read_class(folder, folder.name, findings)
        ]
    return _read_flat(root, folders, files, findings)


def read_class(
    folder: Path, class_name: str, findings: Findings, *, good: tuple[str, ...] = (GOOD,)
) -> list[ImageRecord]:
    """Read one class of the MVTec layout.

    Args:
        folder: The class's folder.
        class_name: Its name in the records.
        findings: Takes up what is bad or worth a note.
        good: Names that the folder of normal images may have.

    Returns:
        Records, train before test, test by defect type and name.

    Raises:
        InputError: Under strict, for a class without normal images and for whatever is bad in it.
    """
    train = folder / "train"
    if not train.is_dir():
        if (folder / "test").is_dir():
            findings.bad(
                folder, f"class {class_name!r} has a test folder but no train/{good[0]} to learn from"
            )
        else:
            findings.bad(folder, f"not a class: {EXPECTED}; move the folder elsewhere")
        return []
    records: list[ImageRecord] = []
    for kind in list_folder(train, findings)[0]:
        if kind.name in good:
            found = list_images(kind, findings)
            records += [ImageRecord(path, class_name, "train", False, GOOD) for path in found]
        else:
            findings.bad(kind, f"training images must be normal: expected train/{good[0]} only")
    if not records:
        loose = sum(is_image(path) for path in list_folder(train, findings)[1])
        hint = f"; {loose} image(s) lie in train itself, move them to train/{good[0]}" if loose else ""
        findings.bad(train, f"class {class_name!r} is empty: expected images in train/{good[0]}{hint}")
        return []
    if (folder / "test").is_dir():
        records += _read_test(folder, class_name, findings, good)
    else:
        findings.note(f"class {class_name!r} has no test images")
    return records


def _read_test(folder: Path, class_name: str, findings: Findings, good: tuple[str, ...]) -> list[ImageRecord]:
    """Read test images with their masks."""
    truth = folder / "ground_truth"
    truth_folders = {path.name: path for path in list_folder(truth, findings)[0]} if truth.is_dir() else {}
    kinds, files = list_folder(folder / "test", findings)
    for path in filter(is_image, files):
        findings.bad(
            path, "expected test images in folders named after their defect (test/good for normal ones)"
        )
    records: list[ImageRecord] = []
    unused: list[Path] = []
    for kind in kinds:
        images = list_images(kind, findings)
        masks = list_images(truth_folders[kind.name], findings) if kind.name in truth_folders else []
        if kind.name in good:
            _refuse_masks_of_normal_images(masks, findings)
            records += [ImageRecord(path, class_name, "test", False, GOOD) for path in images]
            continue
        pairs, left = match_masks(images, masks, findings)
        records += [ImageRecord(path, class_name, "test", True, kind.name, mask) for path, mask in pairs]
        unused += left
    for name in sorted(set(truth_folders) - {kind.name for kind in kinds}):
        unused += list_images(truth_folders[name], findings)
    if unused:
        findings.note(
            f"class {class_name!r}: {len(unused)} mask(s) whose image is missing: "
            + some([f"{path.parent.name}/{path.name}" for path in unused])
        )
    anomalous = [record for record in records if record.is_anomalous]
    bare = Counter(record.defect_type for record in anomalous if record.mask_path is None)
    if bare:
        kinds_text = ", ".join(f"{name} {count}" for name, count in sorted(bare.items()))
        findings.note(
            f"class {class_name!r}: {bare.total()} of {len(anomalous)} anomalous images have no mask "
            f"({kinds_text})"
        )
    return records


def match_masks(
    images: list[Path], masks: list[Path], findings: Findings
) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """Find the mask of each image by name: NAME_mask.EXT or NAME.EXT, any image suffix.

    Args:
        images: Anomalous images of one folder.
        masks: Masks of the matching folder, maybe none.
        findings: Takes up names that could mean two things.

    Returns:
        Pairs of image and mask (or None), and the masks that no image has.

    Raises:
        InputError: Under strict, two images or two masks answer to one name.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        by_stem[mask.stem].append(mask)
    stems = Counter(image.stem for image in images)
    pairs: list[tuple[Path, Path | None]] = []
    used: set[Path] = set()
    for image in images:
        found = by_stem.get(f"{image.stem}_mask", []) + by_stem.get(image.stem, [])
        used.update(found)
        if len(found) > 1:
            findings.bad(image, f"two masks for one image: {found[0].name} and {found[1].name}; keep one")
        elif found and stems[image.stem] > 1:
            findings.bad(image, f"two images named {image.stem} share the mask {found[0].name}; rename one")
        else:
            pairs.append((image, found[0] if found else None))
    return pairs, [mask for mask in masks if mask not in used]


def _refuse_masks_of_normal_images(masks: list[Path], findings: Findings) -> None:
    """Refuse a mask that marks a defect in a normal image; an all-zero one says nothing and may stay."""
    for mask in masks:
        try:
            marked = bool(read_mask(mask).any())
        except InputError as error:
            if findings.strict:
                raise
            findings.skipped.append(str(error))
            continue
        if marked:
            findings.bad(mask, "a mask for a normal image marks a defect; move the image, or remove the mask")


def _read_flat(root: Path, folders: list[Path], files: list[Path], findings: Findings) -> list[ImageRecord]:
    """Read one folder of normal images per class, and the images to score."""
    classes = check_unique_names([folder for folder in folders if folder.name != SCORE], findings)
    loose = [path for path in files if is_image(path)]
    if classes and loose:
        findings.bad(loose[0], f"images beside class folders: {EXPECTED}; move them into a class's folder")
    records: list[ImageRecord] = []
    if not classes:
        if not loose:
            raise InputError(f"{root}: no images found; {EXPECTED}")
        classes = [root.resolve()]
        records = [ImageRecord(path, classes[0].name, "train", False, GOOD) for path in loose]
    else:
        for folder in classes:
            images = list_images(folder, findings)
            if not images:
                findings.bad(folder, f"class {folder.name!r} is empty; {EXPECTED}")
            records += [ImageRecord(path, folder.name, "train", False, GOOD) for path in images]
    if any(folder.name == SCORE for folder in folders):
        records += _read_score(root / SCORE, [folder.name for folder in classes], findings)
    return records


def _read_score(folder: Path, classes: list[str], findings: Findings) -> list[ImageRecord]:
    """Read images to score: nobody said whether they are normal, and perhaps not what they show."""
    inner, files = list_folder(folder, findings)
    only = classes[0] if len(classes) == 1 else UNKNOWN_CLASS
    loose = [path for path in files if is_image(path)]
    records = [ImageRecord(path, only, "test", False, UNLABELLED) for path in loose]
    if loose and only == UNKNOWN_CLASS:
        findings.note(f"{len(loose)} image(s) to score have no class folder; assign them by their features")
    for kind in inner:
        if kind.name not in classes:
            findings.bad(kind, f"class {kind.name!r} has test images but no training image")
            continue
        records += [
            ImageRecord(path, kind.name, "test", False, UNLABELLED) for path in list_images(kind, findings)
        ]
    return records
