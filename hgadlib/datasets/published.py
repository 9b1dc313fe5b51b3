"""The published sets, MVTec AD, BTAD, MVTec 3D-AD, VisA, and the four as one: a loader each.

Each loader reads the class folders and compares what it found with the counts of App. D, class by class, so
that an incomplete copy is not taken for the published set. The paper's totals are 3629 + 1725 images (MVTec
AD), 9621 normal + 1200 anomalous (VisA) and 4147 (MVTec 3D-AD). Its 2830 for BTAD counts the 290 masks too,
and it gives 1000 training images to product 2 and 399 to product 3; on disk it is the other way round.
"""

from __future__ import annotations

import csv
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hgadlib.datasets.folder import class_homes, read_class
from hgadlib.datasets.records import GOOD, ImageRecord, Split
from hgadlib.datasets.scan import Findings, distinct, list_folder, list_images, some
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

SPLIT_FILE = Path("split_csv") / "1cls.csv"
"""VisA's table of images, below its root."""
COLUMNS = ("object", "split", "label", "image", "mask")
ANOMALY = "anomaly"
"""Defect type of all anomalous images of VisA, as its table names it."""


def load_mvtec(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read MVTec AD, whole or in part, from the class folders or the archive's own folder with them.

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, records = _read_classes(root, findings)
    return _compare("mvtec", home, records, MVTEC, ("train", "test normal", "test anomalous"), findings)


def load_btad(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read BTAD, as `load_mvtec`; normal images lie in ok, and all anomalous ones have the type "ko"."""
    home, records = _read_classes(root, findings, good="ok")
    return _compare("btad", home, records, BTAD, ("train", "test normal", "test anomalous"), findings)


def load_mvtec3d(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the photographs of MVTec 3D-AD, as `load_mvtec`; the unused validation images are counted."""
    home, records = _read_classes(root, findings, photos="rgb", masks="test/{kind}/gt")
    validation = [folder for folder in home.glob(f"*/validation/{GOOD}/rgb") if folder.is_dir()]
    count = sum(len(list_images(folder, findings)) for folder in sorted(validation))
    findings.note(f"{count} validation images were left out")
    return _compare("mvtec3d", home, records, MVTEC3D_TRAIN_TEST, ("train", "test"), findings)


def load_visa(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read VisA, as `load_mvtec`, from its table or converted to the layout of MVTec AD."""
    inner = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else [root]
    home = next((path for path in inner if (path / SPLIT_FILE).is_file()), None)
    if home is not None:
        records = _read_table(home, findings)
    else:
        home, records = _read_classes(root, findings)
        records = [replace(r, defect_type=ANOMALY) if r.is_anomalous else r for r in records]
    return _compare("visa", home, records, VISA_NORMAL_ANOMALOUS, ("normal", "anomalous"), findings)


PARTS: Mapping[str, Callable[[Path, Findings], list[ImageRecord]]] = {
    "btad": load_btad, "mvtec": load_mvtec, "mvtec3d": load_mvtec3d, "visa": load_visa,
}  # fmt: skip


def load_union(roots: Mapping[str, Path], findings: Findings) -> list[ImageRecord]:
    """Read the four sets; a class is named PART/CLASS, so that both kinds of capsules keep their own id."""
    pairs = ((part, record) for part in sorted(PARTS) for record in PARTS[part](roots[part], findings))
    return [replace(record, class_name=f"{part}/{record.class_name}") for part, record in pairs]


def _read_classes(root: Path, findings: Findings, **layout: str) -> tuple[Path, list[ImageRecord]]:
    """Read all classes, also where the archive's own folder lies between; return their folder and records."""
    home, folders = root, list_folder(root, findings)[0]
    if len(folders) == 1 and not (folders[0] / "train").is_dir():
        home, folders = folders[0], list_folder(folders[0], findings)[0]
    classes = [folder for folder in folders if (folder / "train").is_dir()]
    if not classes:
        hint = ", perhaps ".join(["the folder of the dataset", *map(str, class_homes(root)[:1])])
        raise InputError(f"{root}: expected folders CLASS/train, found none; give {hint}")
    for folder in (folder for folder in folders if folder not in classes):
        if (folder / "test").is_dir():
            findings.bad(folder, f"class {folder.name!r} is in test but not in train")
        else:
            findings.note(f"{folder}: not a class, it has no folder 'train'")
    classes = distinct(classes, findings)
    return home, [r for folder in classes for r in read_class(folder, folder.name, findings, **layout)]


def _read_table(root: Path, findings: Findings) -> list[ImageRecord]:
    table = root / SPLIT_FILE
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = tuple(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read: {error}") from error
    if missing := [column for column in COLUMNS if column not in header]:
        expected = f"expected {', '.join(COLUMNS)}, found {', '.join(header)}"
        raise InputError(f"{table}: column {missing[0]!r} is missing; {expected}")
    found = (_read_row(root, f"line {number}", row, findings) for number, row in enumerate(rows, start=2))
    records = filter(None, found)
    return sorted(records, key=lambda r: (r.class_name, r.split != "train", r.is_anomalous, r.path))


def _read_row(root: Path, line: str, cells: Mapping[str, str], findings: Findings) -> ImageRecord | None:
    table, row = root / SPLIT_FILE, {key: (cells[key] or "").strip() for key in COLUMNS}
    name, split, label = row["object"], row["split"], row["label"]
    if not name or split not in ("train", "test") or label not in ("normal", ANOMALY):
        expected = f"expected a class, train or test, and normal or {ANOMALY}"
        raise InputError(f"{table}, {line}: {expected}, found {name!r}, {split!r}, {label!r}")
    if split == "train" and label == ANOMALY:
        findings.bad(table, f"{line}: training images must be normal, found {row['image']}")
        return None
    paths: dict[str, Path] = {}
    for key in ("image", "mask") if label == ANOMALY and row["mask"] else ("image",):
        path = Path(row[key])
        if not row[key] or path.is_absolute() or ".." in path.parts:
            reason = f"expected the path of an {key} below {root.name}, found {row[key]!r}"
            findings.bad(table, f"{line}: {reason}")
            return None
        if not (root / path).is_file():
            findings.bad(root / path, f"no such file, but {SPLIT_FILE}, {line} names it as {key}")
            return None
        paths[key] = root / path
    part: Split = "train" if split == "train" else "test"
    kind = ANOMALY if label == ANOMALY else GOOD
    return ImageRecord(paths["image"], name, part, label == ANOMALY, kind, paths.get("mask"))


def _compare(
    name: str, root: Path, records: list[ImageRecord], expected: Mapping[str, tuple[int, ...]],
    parts: Sequence[str], findings: Findings,
) -> list[ImageRecord]:  # fmt: skip
    """Compare counts by part ("train", "test normal", ...) with the published; warn, name what is missing."""
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
        published = zip(parts, expected[class_name], strict=True)
        counts = ((part, found[class_name, part], n) for part, n in published)
        if wrong := ", ".join(f"{part} {count} of {n}" for part, count, n in counts if count != n):
            own = [record for record in records if record.class_name == class_name]
            gaps = _gaps(root, own, expected[class_name][0] if parts[0] == "train" else None)
            named = f"; missing: {some(gaps, 10)}" if gaps else ""
            problems.append(f"{class_name}: {wrong}{named}")
    text = f"{name} is complete: the counts are the published ones"
    if problems:
        text = f"{name} is not the published set: " + "; ".join(problems)
        warnings.warn(text, stacklevel=3)
    findings.note(text)
    return records


def _gaps(root: Path, records: Sequence[ImageRecord], train_count: int | None) -> list[str]:
    """Name the files that are missing from numbered series, such as 003.png between 002.png and 004.png."""
    series: dict[Path, list[ImageRecord]] = defaultdict(list)
    for record in records:
        series[record.path.parent].append(record)
    missing: list[str] = []
    for folder, own in sorted(series.items()):
        stems = [record.path.stem for record in own]
        numbers = {int(stem) for stem in stems if stem.isdecimal()}
        if len(numbers) != len(stems):
            continue
        width, suffix = len(stems[0]), own[0].path.suffix
        is_train = any(record.split == "train" for record in own)
        # The published series start at 0 and have no holes; only of the training series is the length known.
        end = train_count if is_train and train_count is not None else max(numbers) + 1
        absent = (folder / f"{number:0{width}d}{suffix}" for number in range(end) if number not in numbers)
        missing += [str(path.relative_to(root)) for path in absent]
    return missing
