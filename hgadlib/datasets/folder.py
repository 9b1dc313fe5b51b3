"""The user's own folder: the MVTec layout, or a flat one.

MVTec layout, with any class and defect names; masks are optional and named NAME_mask.EXT or NAME.EXT::

    ROOT/CLASS/train/good/*.png
    ROOT/CLASS/test/{good, DEFECT, ...}/*.png
    ROOT/CLASS/ground_truth/DEFECT/NAME_mask.png

Folders may also be called Train and Test, ok or normal for good, masks or gt for ground_truth. ROOT may
also be one such class. Flat layout, for those who have normal images and images to score::

    ROOT/CLASS/*.png          normal images (or ROOT/*.png: one class, named after ROOT)
    ROOT/score/CLASS/*.png    images to score (or ROOT/score/*.png)
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from pathlib import Path

from hgadlib.datasets.images import read_mask
from hgadlib.datasets.records import GOOD, UNKNOWN_CLASS, UNLABELLED, ImageRecord, Split
from hgadlib.datasets.scan import Findings, distinct, is_image, list_folder, list_images, some, suffixes_found
from hgadlib.errors import InputError

SCORE = "score"
EXPECTED = "expected CLASS/train/good/*.png (MVTec layout) or CLASS/*.png (flat layout)"
_GOOD = (GOOD, "ok", "normal")
_TRUTH = ("ground_truth", "groundtruth", "ground truth", "gt", "masks", "mask")
# How far below the given folder the classes are looked for.
_DEPTH = 4


def read_tree(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read a folder of either layout: records by class, train before test, then by defect type and name.

    Raises:
        InputError: The folder has neither layout, or (under strict) something in it is bad.
    """
    folders, files = list_folder(root, findings)
    if _part(folders, "train", "test") or (_part(folders, *_TRUTH[:1]) and not _part(folders, *_GOOD)):
        return read_class(root, root.resolve().name, findings)
    if any(_part(list_folder(folder)[0], "train", "test") for folder in folders):
        classes = distinct(folders, findings)
        return [record for folder in classes for record in read_class(folder, folder.name, findings)]
    _refuse_other_layouts(root, folders, files)
    return _read_flat(root, folders, files, findings)


def _part(folders: list[Path], *names: str) -> Path | None:
    """Find a folder by the first of these names that one has, in upper or lower case."""
    by_name = {folder.name.casefold(): folder for folder in reversed(folders)}
    return next((by_name[name] for name in names if name in by_name), None)


def class_homes(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Find the folders, this one or below it, that hold classes in a layout that can be read."""
    folders, _ = list_folder(folder)
    listed = [list_folder(inner) for inner in folders]
    if any(_part(inner, "train", "test") or any(map(is_image, files)) for inner, files in listed):
        return [folder]
    return [home for inner in folders if depth for home in class_homes(inner, depth - 1)]


def _refuse_other_layouts(root: Path, folders: list[Path], files: list[Path]) -> None:
    """Refuse a folder that would be misread as a flat one; say what it probably is, and what to do."""
    if root.resolve().name.casefold() in ("train", "test") and _part(folders, *_GOOD):
        parent = root.resolve().parent
        raise InputError(f"{root}: a part of a class, expected the class or all classes; give {parent}")
    for folder in (root, *folders):
        inner = [path for path in list_folder(folder)[0] if path != root / SCORE]
        if (folder / "Data" / "Images").is_dir():
            looks = "looks like VisA, without its table split_csv/1cls.csv; copy that from the archive to"
            advice = "or arrange the images as CLASS/train/good and CLASS/test/DEFECT"
            raise InputError(f"{root}: {looks} {root}, {advice}")
        if (good := _part(inner, *_GOOD)) and len(inner) > 1:
            found = f"{good.name!r} beside {some([i.name for i in inner if i != good])}"
            looks = "looks like one class with its defects, which must lie apart from the training images"
            raise InputError(f"{folder}: {found} {looks}; arrange it by: {_commands(folder, good, inner)}")
    homes = [] if any(map(is_image, files)) else class_homes(root)
    if homes and homes != [root]:
        places = some([str(home) for home in homes], 3)
        raise InputError(f"{root}: expected classes, found them further down; give {places} instead")


def _commands(folder: Path, good: Path, inner: list[Path]) -> str:
    """Compose the shell commands that bring good, defects and masks of one class to the MVTec layout."""
    truth = _part(inner, *_TRUTH)
    kinds = [shlex.quote(path.name) for path in inner if path not in (good, truth)]
    steps = [f"cd {shlex.quote(str(folder))}", "mkdir train test"]
    steps.append(f"mv {shlex.quote(good.name)} train/{GOOD}")
    if kinds:
        steps.append(f"mv -- {' '.join(kinds)} test/")
    if truth is not None and len(kinds) == 1 and not list_folder(truth)[0]:
        name = "masks" if truth.name != "masks" else "ground_truth"
        steps += [f"mkdir {name}", f"mv {shlex.quote(truth.name)} {name}/{kinds[0]}"]
    return " && ".join(steps)


def read_class(
    folder: Path, class_name: str, findings: Findings,
    *, good: str | None = None, photos: str = "", masks: str | None = None,
) -> list[ImageRecord]:  # fmt: skip
    """Read one class of the MVTec layout: records, train before test, test by defect type and name.

    Args:
        folder: The class's folder.
        class_name: Its name in the records.
        findings: Takes up what is bad or worth a note.
        good: Name of the folders of normal images; None for good, ok or normal.
        photos: Folder of the images below that of their kind, where there is one.
        masks: Folder of a kind's masks below the class's; None for ground_truth/{kind} and its like.
    Raises:
        InputError: Under strict, for a class without normal images and for whatever is bad in it.
    """
    parts, loose = list_folder(folder, findings)
    train, test, truth = (_part(parts, *names) for names in (("train",), ("test",), _TRUTH))
    normal = (good,) if good else _GOOD
    place = Path("train", normal[0], photos).as_posix()
    if train is None:
        reason = f"class {class_name!r} has a test folder but no train/{normal[0]} to learn from"
        findings.bad(folder, reason if test else f"not a class: {EXPECTED}; move the folder elsewhere")
        return []
    records: list[ImageRecord] = []
    kinds, files = list_folder(train, findings)
    for kind in kinds:
        if kind.name.casefold() in normal:
            records += _records(_images(kind / photos, findings), class_name, "train", GOOD)
        else:
            findings.bad(kind, f"training images must be normal: expected train/{normal[0]} only")
    if not records:
        count = sum(map(is_image, files))
        hint = f"; {count} image(s) lie in train itself, move them to {place}" if count else ""
        hint += "".join(suffixes_found(kind / photos) for kind in kinds if kind.name.casefold() in normal)
        findings.bad(train, f"class {class_name!r} is empty: expected images in {place}{hint}")
        return []
    if count := sum(map(is_image, files)):
        findings.bad(train, f"{count} image(s) lie in train itself; move them to {place}")
    read = [part for part in (train, test, truth) if part is not None]
    rest = [path.name for path in (*parts, *filter(is_image, loose)) if path not in read]
    if rest and masks is None:
        findings.note(f"class {class_name!r}: not read, neither train, test nor ground_truth: {some(rest)}")
    if test is None:
        return records
    kinds, files = list_folder(test, findings)
    for path in filter(is_image, files):
        expected = "expected test images in folders named after their defect (test/good for normal ones)"
        findings.bad(path, expected)
    unused: list[Path] = []
    for kind in kinds:
        images = _images(kind / photos, findings)
        place_of_masks = folder / masks.format(kind=kind.name) if masks else truth and truth / kind.name
        marks = _images(place_of_masks, findings) if place_of_masks else []
        if kind.name.casefold() in normal:
            if good is None and kind.name != GOOD:
                findings.note(f"class {class_name!r}: test/{kind.name} is read as normal images")
            _refuse_masks_of_normal_images(marks, findings)
            records += _records(images, class_name, "test", GOOD)
        else:
            pairs, left = _match_masks(images, marks, findings)
            records += [ImageRecord(path, class_name, "test", True, kind.name, mask) for path, mask in pairs]
            unused += left
    known = {kind.name for kind in kinds}
    marked, files = list_folder(truth, findings) if truth is not None and masks is None else ([], [])
    unused += filter(is_image, files)
    for path in marked:
        unused += list_images(path, findings) if path.name not in known else []
    if unused:
        names = some([path.relative_to(folder).as_posix() for path in unused])
        findings.note(f"class {class_name!r}: {len(unused)} mask(s) whose image is missing: {names}")
    anomalous = [record for record in records if record.is_anomalous]
    if bare := Counter(record.defect_type for record in anomalous if record.mask_path is None):
        counts = f"{bare.total()} of {len(anomalous)} anomalous images have no mask"
        by_kind = ", ".join(f"{name} {count}" for name, count in sorted(bare.items()))
        findings.note(f"class {class_name!r}: {counts} ({by_kind})")
    return records


def _images(folder: Path, findings: Findings) -> list[Path]:
    return list_images(folder, findings) if folder.is_dir() else []


def _records(paths: list[Path], class_name: str, split: Split, defect_type: str) -> list[ImageRecord]:
    """Make records of images that show no defect as far as anybody knows."""
    return [ImageRecord(path, class_name, split, False, defect_type) for path in paths]


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
        found = by_stem[f"{image.stem}_mask"] + by_stem[image.stem]
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
    reason = "a mask for a normal image marks a defect; move the image, or remove the mask"
    for mask in masks:
        try:
            if read_mask(mask).any():
                findings.bad(mask, reason)
        except InputError as error:
            if findings.strict:
                raise
            findings.skipped.append(str(error))


def _read_flat(root: Path, folders: list[Path], files: list[Path], findings: Findings) -> list[ImageRecord]:
    """Read one folder of normal images per class, and the images to score."""
    classes = distinct([folder for folder in folders if folder.name != SCORE], findings)
    loose = list(filter(is_image, files))
    if not classes and not loose:
        raise InputError(f"{root}: no images found; {EXPECTED}{suffixes_found(root)}")
    if classes and loose:
        findings.bad(loose[0], f"images beside class folders: {EXPECTED}; move them into a class's folder")
    records = [] if classes else _records(loose, root.resolve().name, "train", GOOD)
    for folder in classes:
        images = list_images(folder, findings)
        if not images:
            findings.bad(folder, f"class {folder.name!r} is empty; {EXPECTED}{suffixes_found(folder)}")
        records += _records(images, folder.name, "train", GOOD)
    if root / SCORE in folders:
        names = [folder.name for folder in classes] or [root.resolve().name]
        records += _read_score(root / SCORE, names, findings)
    return records


def _read_score(folder: Path, classes: list[str], findings: Findings) -> list[ImageRecord]:
    """Read images to score: nobody said whether they are normal, and perhaps not what they show."""
    inner, files = list_folder(folder, findings)
    only = classes[0] if len(classes) == 1 else UNKNOWN_CLASS
    loose = list(filter(is_image, files))
    records = _records(loose, only, "test", UNLABELLED)
    if loose and only == UNKNOWN_CLASS:
        findings.note(f"{len(loose)} image(s) to score have no class folder; assign them by their features")
    for kind in inner:
        if kind.name in classes:
            records += _records(list_images(kind, findings), kind.name, "test", UNLABELLED)
        else:
            findings.bad(kind, f"class {kind.name!r} has test images but no training image")
    return records
