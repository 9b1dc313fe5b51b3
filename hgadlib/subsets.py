"""Train on a part of a dataset: with images held out, or without a class. What the chapter `beyond` asks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.experiment import build_model
from hgadlib.features import Features
from hgadlib.inputs import Inputs
from hgadlib.model import HGAD
from hgadlib.training import fit


def select_features(features: Features, chosen: ArrayLike) -> Features:
    """Copy the features of some images.

    Args:
        features: Of N images.
        chosen: True for those to keep, (N,) bool.

    Raises:
        InputError: No image is kept, or the mask is of another length.
    """
    keep = np.asarray(chosen, dtype=bool)
    if keep.shape != (len(features),) or not keep.any():
        raise InputError(
            f"expected a choice of some of {len(features)} images, found {keep.sum()} of {keep.shape}"
        )
    rows = torch.from_numpy(np.flatnonzero(keep))
    levels = tuple(level.index_select(0, rows.to(level.device)) for level in features.levels)
    storage = "host" if features.storage == "file" else features.storage
    return replace(features, levels=levels, storage=storage, key=f"part of {features.key}")


def select_train(inputs: Inputs, chosen: ArrayLike) -> Inputs:
    """Keep some of the training images; classes that have none left are no longer classes.

    The test images are those of the remaining classes.

    Args:
        inputs: Of a dataset.
        chosen: True for the training images to keep, (N,) bool.

    Raises:
        InputError: As :func:`select_features`.
    """
    keep = np.asarray(chosen, dtype=bool)
    train = select_features(inputs.train, keep)
    dataset = inputs.dataset
    classes = tuple(sorted({r.class_name for r, k in zip(dataset.train, keep, strict=True) if k}))
    tested = np.array([record.class_name in classes for record in dataset.test], dtype=bool)
    wanted = {"train": iter(keep), "test": iter(tested)}
    records = tuple(record for record in dataset.records if next(wanted[record.split]))
    test = inputs.test if tested.all() else select_features(inputs.test, tested)
    return replace(inputs, dataset=replace(dataset, classes=classes, records=records), train=train, test=test)


def held_out(class_idx: NDArray[np.int64], share: float, *, seed: int = 0) -> NDArray[np.bool_]:
    """Draw the images to hold out, the same share of every class, at least one and never all.

    Args:
        class_idx: (N,).
        share: In (0, 1).
        seed: Of the draw.

    Returns:
        True where held out, (N,).

    Raises:
        InputError: The share lies outside (0, 1), or a class has a single image.
    """
    if not 0 < share < 1:
        raise InputError(f"expected a share to hold out between 0 and 1, found {share}")
    rng = np.random.default_rng(seed)
    out = np.zeros(len(class_idx), dtype=bool)
    for k in np.unique(class_idx):
        members = np.flatnonzero(class_idx == k)
        if len(members) < 2:
            raise InputError(f"class {k} has one training image; expected two at least to hold one out")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        out[rng.permutation(members)[:count]] = True
    return out


def train_in_memory(config: Config, inputs: Inputs, *, progress: bool = False) -> HGAD:
    """Train and calibrate a model on these inputs; no run directory is written.

    Args:
        config: Of the model and its training.
        inputs: For instance a part of a dataset.
        progress: Show a bar.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    model = build_model(config, inputs)
    fit(
        model,
        inputs.train,
        inputs.train_classes,
        train=config.train,
        loss=config.loss,
        seed=config.seed,
        progress=progress,
    )
    return model
