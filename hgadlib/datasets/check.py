"""Look through a folder of images before anybody spends an hour of GPU on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    """What a check found: the good images, and what is worth knowing."""

    dataset: Dataset
    table: pd.DataFrame
    """A row per class: counts, masks, sizes, modes."""
    problems: tuple[str, ...]
    """What is wrong and should be mended, "path: reason" where there is a path."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Lay out the report for a terminal."""
        name, count = self.dataset.name, len(self.dataset.classes)
        parts = [f"{self.dataset.root}: {name} layout, {count} class(es)", self.table.to_string()]
        for title, texts in (("Notes", self.notes), ("Problems", self.problems)):
            if texts:
                parts.append("\n  ".join([f"{title} ({len(texts)}):", *texts]))
        return "\n\n".join(parts if self.problems else [*parts, "No problems."])


def guess_layout(path: Path) -> str:
    """Recognise by its folders which dataset lies there; "folder" where none of the published ones does."""
    inner = [path, *list_folder(path)[0]]
    if any((folder / SPLIT_FILE).is_file() for folder in inner):
        return "visa"
    if (path / "labels.csv").is_file():
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
    by_class: dict[str, list[_Facts]] = defaultdict(list)
    by_content: dict[str, list[ImageRecord]] = defaultdict(list)
    problems = [*dataset.skipped]
    for facts in parallel_map(_look, dataset.records):
        by_class[facts.record.class_name].append(facts)
        by_content[facts.digest].append(facts.record)
        if facts.mask_share == 0.0:
            problems.append(f"{facts.record.mask_path}: the mask of an anomalous image is empty")
    for group in by_content.values():
        names = some([str(record.path) for record in group], 3)
        if len({record.split for record in group}) == 2:
            problems.append(f"the same image is in train and in test: {names}")
        elif len({record.class_name for record in group}) > 1:
            problems.append(f"the same image is in several classes: {names}")
    table = pd.DataFrame.from_dict({name: _row(by_class[name]) for name in sorted(by_class)}, orient="index")
    notes = (note for name in sorted(by_class) for note in _too_alike(name, by_class[name]))
    return Report(dataset, table.rename_axis("class"), tuple(problems), (*dataset.remarks, *notes))


class _Facts(NamedTuple):
    record: ImageRecord
    size: tuple[int, int]
    mode: str
    digest: str
    mask_share: float | None
    is_flat: bool
    sample: NDArray[np.float32]
    """Grey levels of pixels spread evenly over the image, (_SIDE * _SIDE,)."""


def _look(record: ImageRecord) -> _Facts:
    header = read_header(record.path)
    share = None if record.mask_path is None else float(np.mean(read_mask(record.mask_path)))
    size, mode = (header.width, header.height), f"{header.format} {header.mode}"
    image = read_image(record.path, record.bit_depth)
    is_flat = bool((np.ptp(image, axis=(0, 1)) <= 1).all())
    # Single pixels and no averages: noise of the sensor tells two photographs of one thing apart.
    rows, columns = (np.linspace(0, length - 1, _SIDE).astype(int) for length in image.shape[:2])
    sample = image[np.ix_(rows, columns)].mean(axis=2, dtype=np.float32).ravel()
    return _Facts(record, size, mode, sha256_of(record.path), share, is_flat, sample)


def _row(images: Sequence[_Facts]) -> dict[str, object]:
    test = [facts.record for facts in images if facts.record.split == "test"]
    anomalous = [record for record in test if record.is_anomalous]
    widths, heights = (sorted(set(lengths)) for lengths in zip(*(f.size for f in images), strict=True))
    one, many = f"{widths[0]}x{heights[0]}", f"{widths[0]}..{widths[-1]} x {heights[0]}..{heights[-1]}"
    shares = [facts.mask_share for facts in images if facts.mask_share is not None]
    return {
        "train": len(images) - len(test),
        "test normal": sum(record.is_labelled and not record.is_anomalous for record in test),
        "test anomalous": len(anomalous), "unlabelled": sum(not record.is_labelled for record in test),
        "defects": len({record.defect_type for record in anomalous}),
        "masks": sum(record.mask_path is not None for record in anomalous),
        "mask area %": round(100 * float(np.mean(shares)), 2) if shares else None,
        "size": one if len(widths) == len(heights) == 1 else many,
        "modes": some(sorted({facts.mode for facts in images}), 3),
    }  # fmt: skip


def _too_alike(name: str, images: Sequence[_Facts]) -> Iterator[str]:
    """Note training images that teach nothing of how good ones differ: of one colour, or copies."""
    train = [facts for facts in images if facts.record.split == "train"]
    varied = [facts.sample for facts in train if not facts.is_flat]
    if flat := len(train) - len(varied):
        yield f"class {name!r}: {flat} of {len(train)} training images are of one flat colour"
    if len(varied) > 1:
        distances, _ = NearestNeighbors(n_neighbors=1).fit(np.stack(varied)).kneighbors()
        if twins := int((distances < _TWIN * _SIDE).sum()):
            copies = "have a twin, the same picture but for less than a grey level"
            yield f"class {name!r}: {twins} of {len(train)} training images {copies}"
