"""What every dataset yields: records of images, whatever the layout on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hgadlib.errors import InputError

Split = Literal["train", "test"]

GOOD = "good"
"""Defect type of a normal image."""
UNLABELLED = "unlabelled"
"""Defect type of an image to score of which nobody said whether it is normal."""
UNKNOWN_CLASS = "unknown"
"""Class name of an image to score of which nobody said what it shows."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and what is known about it.

    Attributes:
        path: The image file.
        class_name: Product class, one of `Dataset.classes` or `UNKNOWN_CLASS`.
        split: "train" (normal images only) or "test".
        is_anomalous: True where the image shows a defect. False for unlabelled images too: ask `is_labelled`.
        defect_type: "good" for normal images, "unlabelled" where unknown, else the defect's name.
        mask_path: Mask of the defect, or None where there is none.
    """

    path: Path
    class_name: str
    split: Split
    is_anomalous: bool
    defect_type: str
    mask_path: Path | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether normal or anomalous is known."""
        return self.defect_type != UNLABELLED


@dataclass(frozen=True)
class Dataset:
    """Records of a dataset in an order that depends on names only, never on the file system.

    Attributes:
        name: The dataset's name, such as "mvtec".
        root: The folder it was read from.
        classes: Class names, sorted; the index of a name is the class id.
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
        double = [name for name, count in Counter(self.classes).items() if count > 1]
        if double:
            raise InputError(f"{self.root}: two classes are named {double[0]!r}; class names must be unique")
        if list(self.classes) != sorted(self.classes):
            raise InputError(f"{self.root}: expected sorted class names, found {list(self.classes)}")

    @property
    def train(self) -> tuple[ImageRecord, ...]:
        """Normal images to learn from."""
        return tuple(record for record in self.records if record.split == "train")

    @property
    def test(self) -> tuple[ImageRecord, ...]:
        """Images to score."""
        return tuple(record for record in self.records if record.split == "test")

    def class_idx(self, records: Sequence[ImageRecord]) -> NDArray[np.int64]:
        """Look up class ids.

        Args:
            records: B records of this dataset.

        Returns:
            Class ids, (B,) int64.

        Raises:
            InputError: A record's class is unknown, so that it has no id.
        """
        ids = {name: index for index, name in enumerate(self.classes)}
        for record in records:
            if record.class_name not in ids:
                raise InputError(
                    f"{record.path}: expected one of the classes {', '.join(self.classes)}, found "
                    f"{record.class_name!r}; put the image in a folder named after its class, or set "
                    "classes: discovered"
                )
        return np.array([ids[record.class_name] for record in records], dtype=np.int64)

    def only(self, classes: Iterable[str]) -> Dataset:
        """Keep some classes, with new ids from 0.

        Raises:
            InputError: A class is not in the dataset.
        """
        wanted = set(classes)
        missing = sorted(wanted - set(self.classes))
        if missing:
            raise InputError(f"{self.name} has no class {missing[0]!r}; it has {', '.join(self.classes)}")
        kept = tuple(record for record in self.records if record.class_name in wanted)
        return replace(self, classes=tuple(sorted(wanted)), records=kept)


def relabel(dataset: Dataset, train_classes: Sequence[str], test_classes: Sequence[str]) -> Dataset:
    """Replace the class names of a dataset, for instance by discovered ones.

    Args:
        dataset: The dataset.
        train_classes: A class name for each of `dataset.train`.
        test_classes: A class name for each of `dataset.test`.

    Returns:
        The same images in the same order, so that what was computed of them still fits; new classes.

    Raises:
        InputError: The number of names differs from the number of images, or a class has no training image.
    """
    names = {"train": list(train_classes), "test": list(test_classes)}
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        if len(records) != len(names[split]):
            raise InputError(f"expected {len(records)} {split} class names, found {len(names[split])}")
    each = {split: iter(values) for split, values in names.items()}
    new = tuple(replace(record, class_name=next(each[record.split])) for record in dataset.records)
    orphans = sorted(set(test_classes) - set(train_classes))
    if orphans:
        raise InputError(f"class {orphans[0]!r} has test images but no training image")
    return replace(dataset, classes=tuple(sorted(set(train_classes))), records=new)
