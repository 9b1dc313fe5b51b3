"""Classes are found by clustering, and new images are assigned to the nearest reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import load_images
from hgadlib.datasets.records import relabel
from hgadlib.errors import InputError
from hgadlib.features.backbone import build_backbone
from hgadlib.features.discovery import assign_nearest, discover_classes

OPEN_UNION = Path(__file__).parents[1].parent / "shared" / "data" / "open_union"


def clusters(
    n_classes: int, per_class: int = 20, channels: int = 30, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(n_classes), per_class))
    centers = rng.normal(size=(n_classes, channels))
    return centers[labels] + 0.15 * rng.normal(size=(len(labels), channels)), labels


@pytest.mark.parametrize("n_classes", [2, 5, 12])
def test_the_number_of_classes_is_found(n_classes: int) -> None:
    features, labels = clusters(n_classes)
    found = discover_classes(features)
    assert found.dtype == np.int64 and adjusted_rand_score(labels, found) == 1.0
    assert adjusted_rand_score(labels, discover_classes(features, n_classes)) == 1.0


def test_labels_are_numbered_by_first_appearance_and_repeatable() -> None:
    features, _ = clusters(6)
    found = discover_classes(features, seed=3)
    _, first = np.unique(found, return_index=True)
    assert (np.diff(first) > 0).all() and found[0] == 0
    assert np.array_equal(found, discover_classes(features, seed=3))
    assert np.array_equal(found, discover_classes(features, seed=4)), "well separated classes need no luck"


def test_contrast_does_not_matter() -> None:
    features, labels = clusters(4)
    scale = np.random.default_rng(1).uniform(0.1, 10, (len(features), 1))
    assert adjusted_rand_score(labels, discover_classes(features * scale)) == 1.0


def test_few_images() -> None:
    assert discover_classes(np.ones((1, 3))).tolist() == [0]
    assert discover_classes(np.eye(2)).tolist() == [0, 0]
    assert discover_classes(np.eye(2), 2).tolist() == [0, 1]
    assert discover_classes(np.eye(4), 1).tolist() == [0] * 4
    assert discover_classes(np.ones((6, 3))).tolist() == [0] * 6


def test_nearest_reference() -> None:
    features, labels = clusters(7)
    shots = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(7)])
    assert np.array_equal(assign_nearest(features, features[shots], labels[shots]), labels)


def test_wrong_input() -> None:
    with pytest.raises(InputError, match=r"expected 1..4 classes for 4 images, found n_classes=5"):
        discover_classes(np.eye(4), 5)
    with pytest.raises(InputError, match="expected 2 classes, found only 1 images that differ"):
        discover_classes(np.ones((6, 3)), 2)
    with pytest.raises(InputError, match="NaN"):
        discover_classes(np.full((3, 2), np.nan))
    with pytest.raises(InputError, match=r"expected features \(N, C\)"):
        discover_classes(np.ones(3))
    with pytest.raises(InputError, match=r"expected references \(R, 4\)"):
        assign_nearest(np.eye(4), np.eye(3), [0, 1, 2])
    with pytest.raises(InputError, match="R > 0"):
        assign_nearest(np.eye(4), np.ones((0, 4)), [])


@pytest.mark.slow
@pytest.mark.skipif(not OPEN_UNION.is_dir(), reason="the development images are not here")
def test_five_real_classes_are_recovered_from_one_folder(tmp_path: Path) -> None:
    """Paper App. A.2: all images in one folder, no class names."""
    truth: list[str] = []
    hidden = tmp_path / "parts"
    hidden.mkdir()
    named = load_dataset("folder", root=OPEN_UNION)
    for class_name in named.classes:
        chosen = [record for record in named.train if record.class_name == class_name][::6]
        for record in chosen:
            (hidden / f"{len(truth):04d}{record.path.suffix}").symlink_to(record.path)
            truth.append(class_name)
    dataset = load_dataset("folder", root=hidden)
    assert dataset.classes == ("parts",) and len(dataset.train) == len(truth) > 150
    backbone = build_backbone("tf_efficientnet_lite0", out_indices=(2, 3))
    paths = [record.path for record in dataset.train]
    batches = load_images(paths, size=128, mean=backbone.mean, std=backbone.std, batch_size=16)
    with torch.inference_mode():
        features = torch.cat([torch.cat([f.mean((2, 3)) for f in backbone(x)], dim=1) for _, x in batches])
    found = discover_classes(features.numpy())
    assert adjusted_rand_score(truth, found) >= 0.95
    names = [f"class_{label:02d}" for label in found]
    assert len(relabel(dataset, names, []).classes) == 5
