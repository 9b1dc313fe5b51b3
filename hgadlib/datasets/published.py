"""What the published sets hold: the counts of App. D, class by class, to hold against what lies on disk.

The paper's totals are 3629 + 1725 images (MVTec AD), 9621 normal + 1200 anomalous (VisA) and 4147 (MVTec
3D-AD). Its 2830 for BTAD counts the 290 masks too, and it gives 1000 training images to product 2 and 399
to product 3; on disk it is the other way round.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hgadlib.datasets.records import ImageRecord
from hgadlib.datasets.scan import Findings, some

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
