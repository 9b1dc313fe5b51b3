"""Look through a folder of images before anybody spends an hour of GPU on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import parallel_map, read_header, read_mask
from hgadlib.datasets.published import SPLIT_FILE
from hgadlib.datasets.records import Dataset, ImageRecord
from hgadlib.datasets.scan import Findings, list_folder, some
from hgadlib.errors import InputError
from hgadlib.files import sha256_of


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
        dataset = self.dataset
        lines = [f"{dataset.root}: {dataset.name} layout, {len(dataset.classes)} class(es)", ""]
        lines.append(self.table.to_string())
        for title, texts in (("Notes", self.notes), ("Problems", self.problems)):
            if texts:
                lines += ["", f"{title} ({len(texts)}):", *(f"  {text}" for text in texts)]
        if not self.problems:
            lines += ["", "No problems."]
        return "\n".join(lines)


def guess_layout(path: Path) -> str:
    """Recognise by its folders which dataset lies there; "folder" where none of the published ones does."""
    folders, files = list_folder(path, Findings(strict=False))
    inner = [path, *folders]
    if any((folder / SPLIT_FILE).is_file() for folder in inner):
        return "visa"
    if any(file.name == "labels.csv" for file in files):
        return "elpv"
    if any((folder / "train" / "good" / "rgb").is_dir() for folder in inner):
        return "mvtec3d"
    if any((folder / "train" / "ok").is_dir() for top in inner for folder in top.glob("*")):
        return "btad"
    return "folder"


def check(path: Path | str, name: str | None = None) -> Report:
    """Decode every image and mask of a folder, and report; name is the dataset whose layout it has.

    Raises:
        InputError: The folder does not exist, or holds no dataset at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder, found {'a file' if path.exists() else 'nothing'}")
    dataset = load_dataset(name or guess_layout(path), root=path, strict=False)
    facts = list(parallel_map(_look, dataset.records))
    by_class: dict[str, list[tuple[ImageRecord, _Facts]]] = defaultdict(list)
    for record, fact in zip(dataset.records, facts, strict=True):
        by_class[record.class_name].append((record, fact))
    table = pd.DataFrame.from_dict({name: _row(by_class[name]) for name in sorted(by_class)}, orient="index")
    table.index.name = "class"
    problems = (*dataset.skipped, *_content_problems(dataset.records, facts))
    return Report(dataset, table, problems, dataset.notes)


class _Facts(NamedTuple):
    height: int
    width: int
    mode: str
    digest: str
    mask_share: float | None


def _look(record: ImageRecord) -> _Facts:
    header = read_header(record.path)
    share = None if record.mask_path is None else float(np.mean(read_mask(record.mask_path)))
    mode = f"{header.format} {header.mode}"
    return _Facts(header.height, header.width, mode, sha256_of(record.path), share)


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
        names = some([str(record.path) for record in group], 3)
        if len({record.split for record in group}) == 2:
            problems.append(f"the same image is in train and in test: {names}")
        elif len({record.class_name for record in group}) > 1:
            problems.append(f"the same image is in several classes: {names}")
    return problems
