"""ELPV: electroluminescence images of solar cells, shipped by the package elpv-dataset.

Source: Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 2019. The images come with a probability of a defect, and without
masks.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import defaultdict
from pathlib import Path

from hgadlib.datasets.images import parallel_map
from hgadlib.datasets.records import GOOD, ImageRecord
from hgadlib.datasets.scan import Findings
from hgadlib.errors import InputError

TRAIN_SHARE = 0.75
_COLUMNS = "IMAGE PROBABILITY {mono|poly}"


def package_root() -> Path:
    """Find the data folder of the installed package, without importing it.

    Raises:
        InputError: The package is not installed.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("dataset 'elpv' comes with a package that is missing: pip install elpv-dataset")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def load(root: Path, findings: Findings, seed: int = 0) -> list[ImageRecord]:
    """Read labels.csv and split the normal images.

    Normal has probability 0, anomalous 1; the doubtful ones between are left out and counted. Which normal
    images are for training is drawn from a hash of their content, so it depends neither on names nor on
    order, and identical images always fall on the same side.

    Args:
        root: Folder with labels.csv and images/.
        findings: Takes up bad files and counts.
        seed: Another seed draws another split.

    Returns:
        Records of the classes mono and poly.

    Raises:
        InputError: labels.csv is missing or malformed, or (under strict) an image is missing.
    """
    table = root / "labels.csv"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{table}: no such file; expected the data folder of elpv-dataset") from error
    except OSError as error:
        raise InputError(f"{table}: cannot be read: {error.strerror}") from error
    wanted: list[tuple[Path, str, bool]] = []
    doubtful = 0
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            name, probability, kind = fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError) as error:
            raise InputError(f"{table}, line {number}: expected {_COLUMNS}, found {line!r}") from error
        if kind not in ("mono", "poly") or not 0.0 <= probability <= 1.0:
            raise InputError(f"{table}, line {number}: expected {_COLUMNS}, found {line!r}")
        if 0.0 < probability < 1.0:
            doubtful += 1
        elif not (root / name).is_file():
            findings.bad(root / name, "listed in labels.csv, but there is no such file")
        else:
            wanted.append((root / name, kind, probability == 1.0))
    digests = parallel_map(lambda item: _digest(item[0]), wanted)
    images = [(*item, digest) for item, digest in zip(wanted, digests, strict=True)]
    # Content that also stands for something else, anomalous or the other type, must not be learnt as normal.
    meanings: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for _, kind, is_anomalous, digest in images:
        meanings[digest].add((kind, is_anomalous))
    doubtful_content = {digest for digest, found in meanings.items() if len(found) > 1}
    by_class: dict[str, list[tuple[Path, bool, str]]] = defaultdict(list)
    for path, kind, is_anomalous, digest in images:
        by_class[kind].append((path, is_anomalous, digest))
    findings.note(f"{doubtful} images with a defect probability between 0 and 1 were left out")
    return [
        record for kind in sorted(by_class) for record in _split(kind, by_class[kind], doubtful_content, seed)
    ]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        # Nobody can read it; the verification that follows says so, or leaves it out.
        return str(path)


def _split(
    kind: str, images: list[tuple[Path, bool, str]], test_only: set[str], seed: int
) -> list[ImageRecord]:
    """Give about three quarters of the normal images to training, whole groups of identical content."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, is_anomalous, digest in images:
        if not is_anomalous and digest not in test_only:
            groups[digest].append(path)
    drawn = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest())
    target = round(TRAIN_SHARE * sum(len(paths) for paths in groups.values()))
    train: set[Path] = set()
    for digest in drawn:
        if len(train) >= target:
            break
        train.update(groups[digest])
    records = [
        ImageRecord(
            path,
            kind,
            "train" if path in train else "test",
            is_anomalous,
            "defective" if is_anomalous else GOOD,
        )
        for path, is_anomalous, _ in images
    ]
    return sorted(
        records, key=lambda record: (record.split != "train", record.defect_type != GOOD, record.path.name)
    )
