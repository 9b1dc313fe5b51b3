"""What the published sets hold: the counts of App. D, class by class, to hold against what lies on disk.

The paper's totals are 3629 + 1725 images (MVTec AD), 9621 normal + 1200 anomalous (VisA) and 4147 (MVTec
3D-AD). Its 2830 for BTAD counts the 290 masks too, and it gives 1000 training images to product 2 and 399
to product 3; on disk it is the other way round.
"""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hgadlib.datasets.folder import match_masks, read_class
from hgadlib.datasets.records import GOOD, ImageRecord, Split
from hgadlib.datasets.scan import Findings, class_folders, list_folder, list_images, some
from hgadlib.errors import InputError

Counts = Mapping[str, tuple[int, int, int]]
"""Class name -> training images, normal test images, anomalous test images."""

MVTEC: Counts = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip
BTAD: Counts = {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)}
MVTEC3D_TRAIN_TEST: Mapping[str, tuple[int, int]] = {
    "bagel": (244, 110), "cable_gland": (223, 108), "carrot": (286, 159), "cookie": (210, 131),
    "dowel": (288, 130), "foam": (236, 100), "peach": (361, 132), "potato": (300, 114), "rope": (298, 101),
    "tire": (210, 112),
}  # fmt: skip
VISA_NORMAL_ANOMALOUS: Mapping[str, tuple[int, int]] = {
    "candle": (1000, 100), "capsules": (602, 100), "cashew": (500, 100), "chewinggum": (503, 100),
    "fryum": (500, 100), "macaroni1": (1000, 100), "macaroni2": (1000, 100), "pcb1": (1004, 100),
    "pcb2": (1001, 100), "pcb3": (1006, 100), "pcb4": (1005, 100), "pipe_fryum": (500, 100),
}  # fmt: skip


def compare(
    name: str,
    root: Path,
    records: Sequence[ImageRecord],
    expected: Mapping[str, tuple[int, ...]],
    parts: Sequence[str],
    findings: Findings,
) -> None:
    """Hold the counts of a set against the published ones; warn, and name what is missing, where they differ.

    Args:
        name: The dataset's name.
        root: Where it lies.
        records: What was found.
        expected: Published counts, per class and part.
        parts: What the counts count, out of "train", "test", "test normal", "test anomalous", "normal" and
            "anomalous".
        findings: Takes up the outcome as a note.
    """
    found: Counter[tuple[str, str]] = Counter()
    for record in records:
        kind = "anomalous" if record.is_anomalous else "normal"
        found.update((record.class_name, part) for part in (record.split, kind, f"{record.split} {kind}"))
    present = {record.class_name for record in records}
    problems: list[str] = []
    if absent := sorted(set(expected) - present):
        problems.append(f"{len(absent)} of {len(expected)} classes are missing: {some(absent, 15)}")
    if foreign := sorted(present - set(expected)):
        problems.append(f"classes that are not part of it: {some(foreign)}")
    for class_name in sorted(present & set(expected)):
        pairs = zip(parts, expected[class_name], strict=True)
        wrong = [f"{part} {found[class_name, part]} of {count}" for part, count in pairs
                 if found[class_name, part] != count]  # fmt: skip
        if wrong:
            own = [record for record in records if record.class_name == class_name]
            gaps = _gaps(root, own, expected[class_name][0] if parts[0] == "train" else None)
            named = f"; missing: {some(gaps, 10)}" if gaps else ""
            problems.append(f"{class_name}: {', '.join(wrong)}{named}")
    if problems:
        text = f"{name} is not the published set: " + "; ".join(problems)
        warnings.warn(text, stacklevel=3)
        findings.note(text)
    else:
        findings.note(f"{name} is complete: the counts are the published ones")


def _gaps(root: Path, records: Sequence[ImageRecord], train_count: int | None) -> list[str]:
    """Name the files that are missing from numbered series, such as 003.png between 002.png and 004.png."""
    series: dict[Path, list[Path]] = {}
    for record in records:
        series.setdefault(record.path.parent, []).append(record.path)
    missing: list[str] = []
    for folder in sorted(series):
        paths = series[folder]
        numbers = {int(path.stem) for path in paths if path.stem.isdecimal()}
        if len(numbers) != len(paths):
            continue
        width, suffix = len(paths[0].stem), paths[0].suffix
        is_train = any(record.split == "train" and record.path.parent == folder for record in records)
        # The published series start at 0 and have no holes; only of the training series is the length known.
        end = train_count if is_train and train_count is not None else max(numbers) + 1
        missing += [
            str((folder / f"{number:0{width}d}{suffix}").relative_to(root))
            for number in range(end)
            if number not in numbers
        ]
    return missing


def load_mvtec(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set, whole or in part.

    Args:
        root: Folder that holds the class folders.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records.

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, folders = class_folders(root, "train", findings)
    records = [record for folder in folders for record in read_class(folder, folder.name, findings)]
    compare("mvtec", home, records, MVTEC, ("train", "test normal", "test anomalous"), findings)
    return records


def load_btad(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set; the archive's own folder BTech_Dataset_transformed may lie between.

    Args:
        root: Folder that holds 01, 02 and 03.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records; the defect type of all anomalous images is "ko".

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, folders = class_folders(root, "train", findings)
    records = [
        record for folder in folders for record in read_class(folder, folder.name, findings, good=("ok",))
    ]
    compare("btad", home, records, BTAD, ("train", "test normal", "test anomalous"), findings)
    return records


def load_mvtec3d(root: Path, findings: Findings) -> list[ImageRecord]:
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


SPLIT_FILE = Path("split_csv") / "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
ANOMALY = "anomaly"


def load_visa(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set in either layout.

    Args:
        root: Folder that holds split_csv and the class folders, or the converted class folders.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records; the defect type of all anomalous images is "anomaly".

    Raises:
        InputError: Nothing like it lies there, the table is malformed, or (under strict) something is bad.
    """
    inner = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else [root]
    home = next((path for path in inner if (path / SPLIT_FILE).is_file()), None)
    if home is not None:
        records = _read_table(home, findings)
    else:
        home, folders = class_folders(root, "train", findings)
        records = [
            replace(record, defect_type=ANOMALY) if record.is_anomalous else record
            for folder in folders
            for record in read_class(folder, folder.name, findings)
        ]
    compare("visa", home, records, VISA_NORMAL_ANOMALOUS, ("normal", "anomalous"), findings)
    return records


def _read_table(root: Path, findings: Findings) -> list[ImageRecord]:
    table = root / SPLIT_FILE
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = tuple(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read: {error}") from error
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise InputError(
            f"{table}: column {missing[0]!r} is missing; expected {', '.join(COLUMNS)}, "
            f"found {', '.join(header)}"
        )
    records = [
        record
        for number, row in enumerate(rows, start=2)
        if (record := _read_row(root, f"line {number}", {key: row[key] or "" for key in COLUMNS}, findings))
    ]
    order = {"train": 0, "test": 1}
    return sorted(
        records, key=lambda record: (record.class_name, order[record.split], record.is_anomalous, record.path)
    )


def _read_row(root: Path, line: str, row: dict[str, str], findings: Findings) -> ImageRecord | None:
    table = root / SPLIT_FILE
    split, label = row["split"].strip(), row["label"].strip()
    if split not in ("train", "test") or label not in ("normal", ANOMALY) or not row["object"].strip():
        raise InputError(
            f"{table}, {line}: expected a class, train or test, and normal or {ANOMALY}, found "
            f"{row['object']!r}, {split!r}, {label!r}"
        )
    if split == "train" and label == ANOMALY:
        findings.bad(table, f"{line}: training images must be normal, found {row['image']}")
        return None
    paths: list[Path | None] = []
    for key in ("image", "mask"):
        name = row[key].strip()
        if key == "mask" and (not name or label == "normal"):
            paths.append(None)
            continue
        path = root / name
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            findings.bad(table, f"{line}: expected the path of an {key} below {root.name}, found {name!r}")
            return None
        if not path.is_file():
            findings.bad(path, f"no such file, but {SPLIT_FILE}, {line} names it as {key}")
            return None
        paths.append(path)
    image, mask = paths
    assert image is not None
    side: Split = "train" if split == "train" else "test"
    kind = ANOMALY if label == ANOMALY else GOOD
    return ImageRecord(image, row["object"].strip(), side, label == ANOMALY, kind, mask)


PARTS: Mapping[str, Callable[[Path, Findings], list[ImageRecord]]] = {
    "btad": load_btad,
    "mvtec": load_mvtec,
    "mvtec3d": load_mvtec3d,
    "visa": load_visa,
}


def load_union(roots: Mapping[str, Path], findings: Findings) -> list[ImageRecord]:
    """Read the four sets; a class is named PART/CLASS, so that both kinds of capsules keep their own id.

    Args:
        roots: Where each of `PARTS` lies.
        findings: Takes up what is bad, and which parts are incomplete.

    Returns:
        Records.

    Raises:
        InputError: A part is missing, or (under strict) something is bad.
    """
    return [
        replace(record, class_name=f"{part}/{record.class_name}")
        for part in sorted(PARTS)
        for record in PARTS[part](roots[part], findings)
    ]
