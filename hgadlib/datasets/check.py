"""Look through a folder of images before anybody spends an hour of GPU on it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import parallel_map, read_header, read_mask
from hgadlib.datasets.published import SPLIT_FILE
from hgadlib.datasets.records import Dataset, ImageRecord
from hgadlib.datasets.scan import Findings, list_folder, some
from hgadlib.errors import InputError


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        dataset: The good images.
        table: A row per class: counts, masks, sizes, modes.
        problems: What is wrong and should be mended, "path: reason" where there is a path.
        notes: What is worth knowing.
    """

    dataset: Dataset
    table: pd.DataFrame
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Lay out the report for a terminal."""
        lines = [
            f"{self.dataset.root}: {self.dataset.name} layout, {len(self.dataset.classes)} class(es)",
            "",
        ]
        lines.append(self.table.to_string())
        for title, texts in (("Notes", self.notes), ("Problems", self.problems)):
            if texts:
                lines += ["", f"{title} ({len(texts)}):", *(f"  {text}" for text in texts)]
        if not self.problems:
            lines += ["", "No problems."]
        return "\n".join(lines)


def guess_layout(path: Path) -> str:
    """Tell by its folders which dataset lies there; "folder" where none of the published ones does.

    Raises:
        InputError: There is no such folder.
    """
    folders, files = list_folder(path, Findings(strict=False))
    inner = [path, *folders]
    if any((folder / SPLIT_FILE).is_file() for folder in inner):
        return "visa"
    if any(file.name == "labels.csv" for file in files):
        return "elpv"
    if any((folder / "train" / "good" / "rgb").is_dir() for folder in inner):
        return "mvtec3d"
    classes = [folder for top in inner for folder in top.glob("*") if (folder / "train" / "ok").is_dir()]
    if classes:
        return "btad"
    return "folder"


def check(path: Path | str, name: str | None = None) -> Report:
    """Decode every image and mask of a folder, and report.

    Args:
        path: The folder.
        name: Dataset whose layout it has; None to guess.

    Returns:
        The report.

    Raises:
        InputError: The folder does not exist, or holds no dataset at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder, found {'a file' if path.exists() else 'nothing'}")
    dataset = load_dataset(name or guess_layout(path), root=path, strict=False)
    facts = list(parallel_map(_look, dataset.records))
    rows = {
        class_name: _row(
            [pair for pair in zip(dataset.records, facts, strict=True) if pair[0].class_name == class_name]
        )
        for class_name in sorted({record.class_name for record in dataset.records})
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "class"
    problems = (*dataset.skipped, *_content_problems(dataset.records, facts))
    return Report(dataset, table, tuple(problems), dataset.notes)


@dataclass(frozen=True)
class _Facts:
    height: int
    width: int
    mode: str
    digest: str
    mask_share: float | None


def _look(record: ImageRecord) -> _Facts:
    header = read_header(record.path)
    digest = hashlib.sha256(record.path.read_bytes()).hexdigest()
    share = None if record.mask_path is None else float(np.mean(read_mask(record.mask_path)))
    return _Facts(header.height, header.width, f"{header.format} {header.mode}", digest, share)


def _row(pairs: Sequence[tuple[ImageRecord, _Facts]]) -> dict[str, object]:
    test = [record for record, _ in pairs if record.split == "test"]
    anomalous = [record for record in test if record.is_anomalous]
    sizes = Counter((facts.width, facts.height) for _, facts in pairs)
    (w, h), _ = sizes.most_common(1)[0]
    size = f"{w}x{h}"
    if len(sizes) > 1:
        widths, heights = zip(*sizes, strict=True)
        size = f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"
    shares = [facts.mask_share for _, facts in pairs if facts.mask_share is not None]
    return {
        "train": len(pairs) - len(test),
        "test normal": sum(record.is_labelled and not record.is_anomalous for record in test),
        "test anomalous": len(anomalous),
        "unlabelled": sum(not record.is_labelled for record in test),
        "defects": len({record.defect_type for record in anomalous}),
        "masks": sum(record.mask_path is not None for record in anomalous),
        "mask area %": round(100 * float(np.mean(shares)), 2) if shares else None,
        "size": size,
        "modes": some(sorted({facts.mode for _, facts in pairs}), 3),
    }


def _content_problems(records: Sequence[ImageRecord], facts: Sequence[_Facts]) -> list[str]:
    """Find what is well formed and wrong all the same: leaks from train to test, empty masks."""
    problems = [
        f"{record.mask_path}: the mask of an anomalous image is empty"
        for record, fact in zip(records, facts, strict=True)
        if fact.mask_share == 0.0
    ]
    by_content: dict[str, list[ImageRecord]] = defaultdict(list)
    for record, fact in zip(records, facts, strict=True):
        by_content[fact.digest].append(record)
    for group in by_content.values():
        splits = {record.split for record in group}
        if len(splits) == 2:
            names = some([str(record.path) for record in group], 3)
            problems.append(f"the same image is in train and in test: {names}")
        elif len({record.class_name for record in group}) > 1:
            names = some([str(record.path) for record in group], 3)
            problems.append(f"the same image is in several classes: {names}")
    return problems
