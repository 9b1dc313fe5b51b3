"""What a run works on: its dataset, its backbone and the features of both splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from hgadlib.config import Config
from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import load_masks
from hgadlib.datasets.records import Dataset, ImageRecord, relabel
from hgadlib.datasets.validation import hold_out
from hgadlib.errors import InputError
from hgadlib.features.backbone import Backbone, build_backbone
from hgadlib.features.discovery import assign_nearest, discover_classes
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features, global_features
from hgadlib.files import content_digests
from hgadlib.runs.hardware import select_device


@dataclass(frozen=True)
class Inputs:
    """What a run trains and is tested on: features in the order of the images, a backbone on the device.

    Features held out are of normal images that are not trained on (data.held_out), those of the threshold of
    images kept apart from both (data.threshold); None where there are none.
    """

    dataset: Dataset
    backbone: Backbone
    train: Features
    test: Features
    device: torch.device
    held_out: Features | None = None
    threshold: Features | None = None
    # Of data and features, as they shape these; None where they were not made by prepare.
    settings: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    # By class index, size and resizing: reading them again would cost as much as an epoch.
    _masks: dict[Any, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def train_classes(self) -> np.ndarray:
        """Class of each training image, (N,) int64."""
        return self.dataset.class_idx(self.dataset.train)

    @cached_property
    def calibration(self) -> tuple[Features, np.ndarray] | None:
        """Features held out, and the classes of their images, (N,) int64."""
        own = self.held_out
        return None if own is None else (own, self.dataset.class_idx(self.dataset.held_out))

    @cached_property
    def test_classes(self) -> np.ndarray:
        """Class of each test image, (N,) int64."""
        return self.dataset.class_idx(self.dataset.test)

    @cached_property
    def test_labels(self) -> np.ndarray:
        """True where a test image is anomalous, (N,); see :attr:`test_labelled`."""
        return np.array([record.is_anomalous for record in self.dataset.test], dtype=bool)

    @cached_property
    def test_labelled(self) -> np.ndarray:
        """False where nobody said whether a test image is anomalous, (N,)."""
        return np.array([record.is_labelled for record in self.dataset.test], dtype=bool)

    def masks(self, k: int, config: Config) -> np.ndarray:
        """Masks of a class's test images at the maps' size, in their order, (n, S, S) bool; read once."""
        key = (k, size, resize) = (k, config.score.map_size, config.data.resize)
        if key not in self._masks:
            records = [self.dataset.test[i] for i in np.flatnonzero(self.test_classes == k)]
            workers = config.data.num_workers
            self._masks[key] = load_masks(records, size=size, resize=resize, num_workers=workers)
        return self._masks[key]

    def only(self, k: int) -> Inputs:
        """Take the images of one class alone."""
        data = self.dataset

        def own(part: Features | None, records: tuple[ImageRecord, ...]) -> Features | None:
            return None if part is None else part.take(np.flatnonzero(data.class_idx(records) == k))

        records = tuple(record for record in data.records if record.class_name == data.classes[k])
        return replace(
            self,
            dataset=replace(data, classes=(data.classes[k],), records=records),
            train=self.train.take(np.flatnonzero(self.train_classes == k)),
            test=self.test.take(np.flatnonzero(self.test_classes == k)),
            held_out=own(self.held_out, data.held_out),
            threshold=own(self.threshold, data.threshold),
        )

    def check(self, config: Config) -> None:
        """Refuse a configuration that these were not prepared for: its model would be of other features.

        Raises:
            InputError: Its sections data or features shape other features.
        """
        if self.settings is not None and self.settings != (asked := _shaping(config)):
            keys = [key for key in asked if asked[key] != self.settings.get(key)]
            raise InputError(
                f"expected features prepared for these settings, found others of {', '.join(keys)}; "
                "prepare them from this configuration"
            )

    def identity(self) -> dict[str, Any]:
        """Identify these images, see :func:`identify`."""
        return identify(self.dataset)


def _shaping(config: Config) -> dict[str, Any]:
    """List the settings of data and features that shape what is trained on, by their names."""
    values = config.identity()
    return {
        f"{section}.{key}": value
        for section in ("data", "features")
        for key, value in values[section].items()
    }


def identify(dataset: Dataset) -> dict[str, Any]:
    """Identify a dataset's images, wherever its folder lies.

    The "digest", which records compare, is of the names, labels and sizes; the "content" of the bytes too.
    """
    digest, paths = hashlib.sha256(), []
    for record in dataset.records:
        own = [path for path in (record.path, record.mask_path) if path is not None]
        sizes, name = [path.stat().st_size for path in own], image_name(dataset, record)
        # They are the same images, whichever of them a run holds out.
        split = record.split if record.split == "test" else "train"
        digest.update(repr((name, record.class_name, split, record.defect_type, sizes)).encode())
        paths += own
    content = hashlib.sha256(digest.digest() + "".join(content_digests(paths)).encode())
    return {
        "name": dataset.name, "digest": digest.hexdigest(), "content": content.hexdigest(),
        "classes": list(dataset.classes), "train": len(dataset.records) - len(dataset.test),
        "test": len(dataset.test), "bit_depth": dataset.bit_depth,
    }  # fmt: skip


def prepare(
    config: Config, *, progress: bool = True, tested: bool = True,
    check: Callable[[Dataset], None] | None = None,
) -> Inputs:  # fmt: skip
    """Load the dataset and compute its features, or find them in the cache.

    Without ``tested`` a dataset may have no test images. ``check`` is called with the dataset once its images
    are parted, before any work on them, and may refuse it.
    An InputError on a device, dataset, image or weights file that is not there or not usable.
    """
    device = select_device(config.device)
    data, features = config.data, config.features
    # The split belongs to the dataset: it is the same for every seed of a run.
    dataset = load_dataset(
        config.dataset, root=data.root, download=data.download, strict=data.strict, bit_depth=data.bit_depth
    )
    dataset = hold_out(hold_out(dataset, data.threshold, "threshold"), data.held_out)
    if tested and not dataset.test:
        raise InputError(f"{dataset.root}: expected test images to evaluate on, found none; add some")
    if check is not None:
        check(dataset)
    if data.classes == "folders":
        dataset.class_idx(dataset.test)  # refuses images of no known class before any work
    backbone = build_backbone(
        features.backbone, out_indices=features.out_indices, pyramid=features.pyramid,
        weights=features.weights, join=features.join, neighbourhood=features.neighbourhood,
        image=features.image,
    ).to(device)  # fmt: skip

    def of(records: tuple[ImageRecord, ...]) -> Features:
        return dataset_features(
            records, backbone, image_size=data.image_size, resize=data.resize, dtype=features.dtype,
            storage=features.storage, device=device, batch_size=features.batch_size,
            num_workers=data.num_workers, progress=progress,
        )  # fmt: skip

    train = of(dataset.train)
    none = train.take(np.zeros(0, np.int64))
    test = of(dataset.test) if dataset.test else none
    held_out, threshold = (of(part) if part else None for part in (dataset.held_out, dataset.threshold))
    if data.classes == "discovered":
        dataset = discover(dataset, train, test, held_out, threshold)
    return Inputs(dataset, backbone, train, test, device, held_out, threshold, _shaping(config))


def discover(dataset: Dataset, train: Features, *others: Features | None) -> Dataset:
    """Name classes (class_00, class_01, ...) by clustering the training images, whatever their folders say.

    Each other image, of the test set, held out or for thresholds, joins the class of its nearest training
    image (paper App. A.2).
    """
    references = global_features(train)
    labels = discover_classes(references)
    nearest = [
        np.empty(0, int) if part is None or not len(part)
        else assign_nearest(global_features(part), references, labels)
        for part in others
    ]  # fmt: skip
    names = [[f"class_{label:02d}" for label in part] for part in (labels, *nearest)]
    note = f"{len(set(names[0]))} classes were discovered by clustering the training images."
    return replace(relabel(dataset, *names), notes=(*dataset.notes, note))


def summary(inputs: Inputs) -> pd.DataFrame:
    """Count the images of each class: a row per class, and one for all where there are several."""
    columns = ["train", "held out", "test normal", "test anomalous", "test unlabelled", "with masks"]
    counts: Counter[tuple[str, str]] = Counter()
    for record in inputs.dataset.records:
        state = "anomalous" if record.is_anomalous else "normal" if record.is_labelled else "unlabelled"
        kind = f"test {state}" if record.split == "test" else record.split.replace("_", " ")
        counts[record.class_name, kind] += 1
        counts[record.class_name, "with masks"] += record.mask_path is not None
    rows = [[counts[name, column] for column in columns] for name in inputs.dataset.classes]
    table = pd.DataFrame(rows, index=pd.Index(inputs.dataset.classes, name="class"), columns=columns)
    if inputs.test_labelled.all():
        del table["test unlabelled"]
    if inputs.held_out is None:
        del table["held out"]
    if len(table) > 1:  # a row of its own, also beside a class of that name
        table = pd.concat([table, table.sum().to_frame("all").T]).rename_axis("class")
    return table


def class_masks(config: Config, inputs: Inputs) -> dict[int, np.ndarray]:
    """Collect the masks of every class whose anomalous test images all have one.

    By class index, (n, S, S) bool at the maps' size, in the order of the class's test images.
    """
    drawn: dict[int, list[bool]] = {}
    for k, record in zip(inputs.test_classes.tolist(), inputs.dataset.test, strict=True):
        if record.is_anomalous:
            drawn.setdefault(k, []).append(record.mask_path is not None)
    return {k: inputs.masks(k, config) for k in sorted(drawn) if all(drawn[k])}


def image_name(dataset: Dataset, record: ImageRecord) -> str:
    """Name an image by its path below the dataset's root, the same on every machine."""
    path = record.path
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else path.name
