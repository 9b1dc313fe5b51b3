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
from hgadlib.datasets.records import GOOD, UNKNOWN_CLASS, UNLABELLED, ImageRecord, Split
from hgadlib.datasets.scan import Findings, check_unique_names, is_image, list_folder, list_images, some
from hgadlib.errors import InputError

SCORE = "score"
EXPECTED = "expected CLASS/train/good/*.png (MVTec layout) or CLASS/*.png (flat layout)"


def read_tree(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read a folder of either layout; findings take up what is bad or worth a note.

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
    folder: Path,
    class_name: str,
    findings: Findings,
    *,
    good: str = GOOD,
    photos: str = "",
    masks: str = "ground_truth/{kind}",
) -> list[ImageRecord]:
    """Read one class of the MVTec layout.

    Args:
        folder: The class's folder.
        class_name: Its name in the records.
        findings: Takes up what is bad or worth a note.
        good: Name of the folders of normal images.
        photos: Folder of the images below that of their kind, where there is one.
        masks: Folder of a kind's masks below the class's.

    Returns:
        Records, train before test, test by defect type and name.

    Raises:
        InputError: Under strict, for a class without normal images and for whatever is bad in it.
    """
    train, test, truth = folder / "train", folder / "test", folder / "ground_truth"
    place = Path("train", good, photos).as_posix()
    if not train.is_dir():
        if test.is_dir():
            findings.bad(folder, f"class {class_name!r} has a test folder but no train/{good} to learn from")
        else:
            findings.bad(folder, f"not a class: {EXPECTED}; move the folder elsewhere")
        return []
    records: list[ImageRecord] = []
    kinds, files = list_folder(train, findings)
    for kind in kinds:
        if kind.name == good:
            records += _records(_images(kind / photos, findings), class_name, "train", GOOD)
        else:
            findings.bad(kind, f"training images must be normal: expected train/{good} only")
    if not records:
        loose = sum(map(is_image, files))
        hint = f"; {loose} image(s) lie in train itself, move them to {place}" if loose else ""
        findings.bad(train, f"class {class_name!r} is empty: expected images in {place}{hint}")
        return []
    if not test.is_dir():
        findings.note(f"class {class_name!r} has no test images")
        return records
    kinds, files = list_folder(test, findings)
    for path in filter(is_image, files):
        findings.bad(
            path, "expected test images in folders named after their defect (test/good for normal ones)"
        )
    unused: list[Path] = []
    for kind in kinds:
        images = _images(kind / photos, findings)
        marks = _images(folder / masks.format(kind=kind.name), findings)
        if kind.name == good:
            _refuse_masks_of_normal_images(marks, findings)
            records += _records(images, class_name, "test", GOOD)
        else:
            pairs, left = _match_masks(images, marks, findings)
            records += [ImageRecord(path, class_name, "test", True, kind.name, mask) for path, mask in pairs]
            unused += left
    known = {kind.name for kind in kinds}
    for path in list_folder(truth, findings)[0] if truth.is_dir() else []:
        unused += list_images(path, findings) if path.name not in known else []
    _note_masks(folder, class_name, records, unused, findings)
    return records


def _images(folder: Path, findings: Findings) -> list[Path]:
    return list_images(folder, findings) if folder.is_dir() else []


def _records(paths: list[Path], class_name: str, split: Split, defect_type: str) -> list[ImageRecord]:
    """Make records of images that show no defect as far as anybody knows."""
    return [ImageRecord(path, class_name, split, False, defect_type) for path in paths]


def _note_masks(
    folder: Path, class_name: str, records: list[ImageRecord], unused: list[Path], findings: Findings
) -> None:
    """Note masks without an image, and anomalous images without a mask."""
    if unused:
        names = some([path.relative_to(folder).as_posix() for path in unused])
        findings.note(f"class {class_name!r}: {len(unused)} mask(s) whose image is missing: {names}")
    anomalous = [record for record in records if record.is_anomalous]
    bare = Counter(record.defect_type for record in anomalous if record.mask_path is None)
    if bare:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(bare.items()))
        counts = f"{bare.total()} of {len(anomalous)} anomalous images have no mask"
        findings.note(f"class {class_name!r}: {counts} ({kinds})")


def _match_masks(
    images: list[Path], masks: list[Path], findings: Findings
) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """Pair each image with its mask by name, NAME_mask.EXT or NAME.EXT; return also the masks left over."""
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
    for folder in classes:
        images = list_images(folder, findings)
        if not images:
            findings.bad(folder, f"class {folder.name!r} is empty; {EXPECTED}")
        records += _records(images, folder.name, "train", GOOD)
    names = [folder.name for folder in classes]
    if not classes:
        if not loose:
            raise InputError(f"{root}: no images found; {EXPECTED}")
        names = [root.resolve().name]
        records = _records(loose, names[0], "train", GOOD)
    if any(folder.name == SCORE for folder in folders):
        records += _read_score(root / SCORE, names, findings)
    return records


def _read_score(folder: Path, classes: list[str], findings: Findings) -> list[ImageRecord]:
    """Read images to score: nobody said whether they are normal, and perhaps not what they show."""
    inner, files = list_folder(folder, findings)
    only = classes[0] if len(classes) == 1 else UNKNOWN_CLASS
    loose = [path for path in files if is_image(path)]
    records = _records(loose, only, "test", UNLABELLED)
    if loose and only == UNKNOWN_CLASS:
        findings.note(f"{len(loose)} image(s) to score have no class folder; assign them by their features")
    for kind in inner:
        if kind.name in classes:
            records += _records(list_images(kind, findings), kind.name, "test", UNLABELLED)
        else:
            findings.bad(kind, f"class {kind.name!r} has test images but no training image")
    return records
