"""ELPV: electroluminescence images of solar cells, shipped by the package elpv-dataset.

The images come with a probability of a defect, and without masks. Source: Deitsch et al., "Automatic
classification of defective photovoltaic module cells in electroluminescence images", Solar Energy 2019.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hgadlib.datasets.images import parallel_map
from hgadlib.datasets.records import GOOD, ImageRecord
from hgadlib.datasets.scan import Findings
from hgadlib.errors import InputError
from hgadlib.files import sha256_of

TRAIN_SHARE = 0.75
_TABLE = "labels.csv"


def package_root() -> Path:
    """Find the data folder of the installed package, without importing it."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("dataset 'elpv' comes with a package that is missing: pip install elpv-dataset")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def load(root: Path, findings: Findings, seed: int = 0) -> list[ImageRecord]:
    """Read labels.csv, which lies beside images/ in root, and split the normal images.

    Normal has probability 0, anomalous 1; the doubtful ones between are left out and counted. Which normal
    images are for training is drawn, by the seed, from a hash of their content, so it depends neither on
    names nor on order, and identical images always fall on the same side.

    Raises:
        InputError: labels.csv is missing or malformed, or (under strict) an image is missing.
    """
    cells: list[ImageRecord] = []
    table, doubtful = root / _TABLE, 0
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{table}: {error.strerror}; expected the data folder of elpv-dataset") from error
    for number, line in enumerate(lines, start=1):
        if not (fields := line.split()):
            continue
        try:
            path, probability, kind = root / fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError):
            kind = ""
        if kind not in ("mono", "poly") or not 0.0 <= probability <= 1.0:
            expected = "expected IMAGE PROBABILITY {mono|poly}"
            raise InputError(f"{table}, line {number}: {expected}, found {line!r}")
        if 0.0 < probability < 1.0:
            doubtful += 1
        elif not path.is_file():
            findings.bad(path, f"listed in {_TABLE}, but there is no such file")
        else:
            defect_type = GOOD if probability == 0.0 else "defective"
            cells.append(ImageRecord(path, kind, "test", probability == 1.0, defect_type))
    findings.note(f"{doubtful} images with a defect probability between 0 and 1 were left out")
    train = _draw(cells, parallel_map(_digest, cells), seed)
    records = [replace(cell, split="train") if cell in train else cell for cell in cells]
    return sorted(records, key=lambda r: (r.class_name, r.split != "train", r.is_anomalous, r.path.name))


def _digest(cell: ImageRecord) -> str:
    try:
        return sha256_of(cell.path)
    except OSError:
        # Nobody can read it; the verification that follows says so, or leaves it out.
        return str(cell.path)


def _draw(cells: list[ImageRecord], digests: Iterable[str], seed: int) -> set[ImageRecord]:
    """Draw about three quarters of each class's normal images, whole groups of identical content."""
    groups: dict[str, list[ImageRecord]] = defaultdict(list)
    for cell, digest in zip(cells, digests, strict=True):
        groups[digest].append(cell)
    drawn = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest())
    train: set[ImageRecord] = set()
    for kind in sorted({cell.class_name for cell in cells}):
        # Content that also stands for something else, anomalous or the other type, must not be learnt.
        alike = (groups[digest] for digest in drawn)
        own = [group for group in alike if all(c.class_name == kind and not c.is_anomalous for c in group)]
        before = [0, *itertools.accumulate(map(len, own))]
        target = round(TRAIN_SHARE * before[-1])
        train.update(*(group for group, count in zip(own, before, strict=False) if count < target))
    return train
