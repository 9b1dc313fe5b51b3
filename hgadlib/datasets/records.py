"""What every dataset yields: records of images, whatever the layout on disk."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hgadlib.errors import InputError

Split = Literal["train", "held_out", "threshold", "test"]

GOOD = "good"
"""Defect type of a normal image."""
UNLABELLED = "unlabelled"
"""Defect type of an image to score of which nobody said whether it is normal."""
FEW = 8
"""Training images of a class from which on nothing is said of their number."""
UNKNOWN_CLASS = "unknown"
"""Class name of an image to score of which nobody said what it shows."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and what is known about it.

    Attributes:
        path: The image file.
        class_name: Product class, one of `Dataset.classes` or `UNKNOWN_CLASS`.
        split: "train" (normal images only), "held_out" (normal images to calibrate scores on), "threshold"
            (normal images to choose thresholds on) or "test".
        is_anomalous: True where the image shows a defect. False for unlabelled images too: ask `is_labelled`.
        defect_type: "good" for normal images, "unlabelled" where unknown, else the defect's name.
        mask_path: Mask of the defect, or None where there is none.
        bit_depth: Bits in use where the file holds 16 a channel; other files say theirs.
    """

    path: Path
    class_name: str
    split: Split
    is_anomalous: bool
    defect_type: str
    mask_path: Path | None = None
    bit_depth: int = 16

    def __post_init__(self) -> None:
        """Bring the names to one Unicode form: macOS writes accents apart from their letters."""
        for name in ("class_name", "defect_type"):
            object.__setattr__(self, name, unicodedata.normalize("NFC", getattr(self, name)))

    @property
    def is_labelled(self) -> bool:
        """Whether normal or anomalous is known."""
        return self.defect_type != UNLABELLED


@dataclass(frozen=True)
class Dataset:
    """Records of a dataset in an order that depends on names only, never on the file system.

    Attributes:
        name: Such as "mvtec".
        root: The folder it was read from.
        classes: Their names, sorted; the index of a name is the class id.
        records: All images, by class, then train before test, then as the loader sorts them.
        skipped: Bad images left out under `strict=False`, as "path: reason".
        notes: What a reader should know, one sentence each (counts left out, missing masks, ...).
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would make class ids ambiguous."""
        if list(self.classes) != sorted(set(self.classes)):
            raise InputError(f"{self.root}: expected distinct sorted class names, found {list(self.classes)}")

    @property
    def train(self) -> tuple[ImageRecord, ...]:
        """Normal images to learn from."""
        return tuple(record for record in self.records if record.split == "train")

    @property
    def held_out(self) -> tuple[ImageRecord, ...]:
        """Normal images kept out of training."""
        return tuple(record for record in self.records if record.split == "held_out")

    @property
    def threshold(self) -> tuple[ImageRecord, ...]:
        """Normal images kept out of all that makes a score, to choose thresholds on."""
        return tuple(record for record in self.records if record.split == "threshold")

    @property
    def test(self) -> tuple[ImageRecord, ...]:
        """Images to score."""
        return tuple(record for record in self.records if record.split == "test")

    @property
    def bit_depth(self) -> int:
        """Bits in use of its 16-bit files, by which images that come later are read too."""
        return min((record.bit_depth for record in self.records), default=16)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, classes of few training images, and which metrics have no meaning here, and why."""
        reasons: dict[str, list[str]] = defaultdict(list)
        trained = Counter(record.class_name for record in self.train)
        for name in dict.fromkeys([*self.classes, *(record.class_name for record in self.test)]):
            if name in self.classes and trained[name] < FEW:
                reasons[f"fewer than {FEW} training images, scores will tell little"].append(name)
            test = [record for record in self.test if record.class_name == name]
            labelled = [record for record in test if record.is_labelled]
            anomalous = [record for record in labelled if record.is_anomalous]
            bare = sum(record.mask_path is None for record in anomalous)
            if not test:
                reasons["no metrics: no test images"].append(name)
            elif not labelled:
                reasons["no metrics: nobody said which test images are normal"].append(name)
            elif not anomalous:
                reasons["image and pixel metrics are null: all labelled test images are normal"].append(name)
            elif len(anomalous) == len(labelled):
                reasons["image metrics are null: all labelled test images are anomalous"].append(name)
            if bare:
                why = "no masks" if bare == len(anomalous) else "anomalous images without a mask"
                reasons[f"pixel metrics are null: {why}"].append(name)
        return (*self.notes, *(f"{reason} (class {', '.join(names)})" for reason, names in reasons.items()))

    def class_idx(self, records: Sequence[ImageRecord]) -> NDArray[np.int64]:
        """Look up the class ids of B records, (B,) int64; an InputError where a class is unknown here."""
        ids = {name: index for index, name in enumerate(self.classes)}
        if unknown := next((record for record in records if record.class_name not in ids), None):
            expected = f"expected one of the classes {', '.join(ids)}, found {unknown.class_name!r}"
            advice = "put the image in a folder named after its class, or set classes: discovered"
            raise InputError(f"{unknown.path}: {expected}; {advice}")
        return np.array([ids[record.class_name] for record in records], dtype=np.int64)


def relabel(
    dataset: Dataset, train_classes: Sequence[str], test_classes: Sequence[str],
    held_out_classes: Sequence[str] = (), threshold_classes: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Replace the class names of a dataset's images, by split, say by discovered ones.

    The images stay, in their order, so that what was computed of them still fits.

    Raises:
        InputError: The number of names differs from the number of images, or a class has no training image.
    """
    given = {
        "train": train_classes, "test": test_classes, "held_out": held_out_classes,
        "threshold": threshold_classes,
    }  # fmt: skip
    for split, own in given.items():
        count = sum(record.split == split for record in dataset.records)
        if len(own) != count:
            raise InputError(f"expected class names of {count} {split} images, found {len(own)}")
        if orphans := sorted(set(own) - set(train_classes)):
            raise InputError(f"class {orphans[0]!r} has {split} images but no training image")
    names = {split: iter(own) for split, own in given.items()}
    records = tuple(replace(record, class_name=next(names[record.split])) for record in dataset.records)
    return replace(dataset, classes=tuple(sorted(set(train_classes))), records=records)
