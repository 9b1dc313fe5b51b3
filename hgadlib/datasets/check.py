"""Look through a folder of images before anybody spends an hour of GPU on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import parallel_map, read_header, read_image, read_mask
from hgadlib.datasets.published import BTAD, SPLIT_FILE
from hgadlib.datasets.records import Dataset, ImageRecord
from hgadlib.datasets.scan import list_folder, some
from hgadlib.errors import InputError
from hgadlib.files import sha256_of

# Pixels a side that images are compared at, and the root mean square difference of twins in grey levels.
_SIDE, _TWIN = 32, 1.0


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
    folders, files = list_folder(path)
    inner = [path, *folders]
    if any((folder / SPLIT_FILE).is_file() for folder in inner):
        return "visa"
    if any(file.name == "labels.csv" for file in files):
        return "elpv"
    if any((folder / "train" / "good" / "rgb").is_dir() for folder in inner):
        return "mvtec3d"
    if any((folder / name / "train" / "ok").is_dir() for folder in inner for name in BTAD):
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
    notes = (*dataset.remarks, *_too_alike(by_class))
    return Report(dataset, table, problems, notes)


class _Facts(NamedTuple):
    height: int
    width: int
    mode: str
    digest: str
    mask_share: float | None
    is_flat: bool
    sample: NDArray[np.float32]
    """Grey levels of pixels spread evenly over the image, (_SIDE * _SIDE,)."""


def _look(record: ImageRecord) -> _Facts:
    header = read_header(record.path)
    share = None if record.mask_path is None else float(np.mean(read_mask(record.mask_path)))
    mode = f"{header.format} {header.mode}"
    image = read_image(record.path, record.bit_depth)
    is_flat = bool((np.ptp(image, axis=(0, 1)) <= 1).all())
    # Single pixels and no averages: noise of the sensor tells two photographs of one thing apart.
    rows, columns = (np.linspace(0, length - 1, _SIDE).astype(int) for length in image.shape[:2])
    sample = image[np.ix_(rows, columns)].mean(axis=2, dtype=np.float32).ravel()
    return _Facts(header.height, header.width, mode, sha256_of(record.path), share, is_flat, sample)


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


def _too_alike(by_class: Mapping[str, Sequence[tuple[ImageRecord, _Facts]]]) -> list[str]:
    """Note training images that teach nothing of how good ones differ: of one colour, or copies."""
    notes = []
    for name in sorted(by_class):
        facts = [fact for record, fact in by_class[name] if record.split == "train"]
        varied = [fact.sample for fact in facts if not fact.is_flat]
        if flat := len(facts) - len(varied):
            notes.append(f"class {name!r}: {flat} of {len(facts)} training images are of one flat colour")
        if len(varied) > 1:
            distances, _ = NearestNeighbors(n_neighbors=1).fit(np.stack(varied)).kneighbors()
            if twins := int((distances < _TWIN * _SIDE).sum()):
                notes.append(
                    f"class {name!r}: {twins} of {len(facts)} training images have a twin, the same picture "
                    "but for less than a grey level"
                )
    return notes


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
