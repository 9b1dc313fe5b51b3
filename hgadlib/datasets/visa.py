"""VisA: 12 classes, as published (split_csv/1cls.csv names every image) or converted to the MVTec layout.

Source: Zou et al., "SPot-the-Difference self-supervised pre-training for anomaly detection and segmentation",
ECCV 2022.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from hgadlib.datasets.folder import read_class
from hgadlib.datasets.published import VISA_NORMAL_ANOMALOUS, compare
from hgadlib.datasets.records import GOOD, ImageRecord, Split
from hgadlib.datasets.scan import Findings, class_folders
from hgadlib.errors import InputError

SPLIT_FILE = Path("split_csv") / "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
ANOMALY = "anomaly"


def load(root: Path, findings: Findings) -> list[ImageRecord]:
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
