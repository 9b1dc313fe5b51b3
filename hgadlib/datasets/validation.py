"""A validation set without test labels: held-out normal images, and synthetic defects drawn on them.

It has the MVTec layout, so that a run on it is a run on any folder::

    FOLDER/CLASS/train/good/*             the normal training images that are left
    FOLDER/CLASS/test/good/*              the held-out ones
    FOLDER/CLASS/test/KIND/*.png          held-out ones with one defect each, KIND one of `KINDS`
    FOLDER/CLASS/ground_truth/KIND/*_mask.png

Only training images are opened here. What is chosen on this set has not seen the test set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hgadlib.datasets.demo import defects
from hgadlib.datasets.demo.surface import Array, Surface, mix, noise
from hgadlib.datasets.images import parallel_map, read_image, save
from hgadlib.datasets.published import PARTS
from hgadlib.datasets.records import GOOD, Dataset, ImageRecord
from hgadlib.datasets.scan import holds
from hgadlib.errors import InputError
from hgadlib.files import content_digests, new_folder, sha256_of, user_path
from hgadlib.progress import progress_bar

KINDS = ("scratch", "stain", "patch", "blur", "texture")
"""Kinds of synthetic defects."""
VERSION = 1
"""Goes up when the images change, so that old ones are not taken for new."""
MIN_HELD_OUT, MAX_HELD_OUT = 8, 60
MIN_SIDE = 32
"""Shortest side that can show a defect, pixels."""
COVERED = 0.33
"""Coverage from which on a pixel belongs to the mask; what lies below is the defect's soft edge."""
EDGE = 0.03
"""How far the soft edge reaches beyond the mask at most, as a fraction of the short side (or 2 pixels)."""
_MARKER = "validation.json"
_RESERVED = ("train", "test", "ground_truth", "score")
_PLACES = 8


def make_validation(
    dataset: Dataset, folder: Path, *, held_out: float = 0.15, defects_per_image: int = 2, seed: int = 0
) -> Path:
    """Write the validation set of a dataset, unless it is there already; return its folder.

    Which images are held out is drawn from a hash of their content, so it depends neither on names nor on
    order, and of identical images all stay in training or all leave it (then the first by name is held out).
    Images are hard-linked where the file system allows it, else copied.

    Args:
        dataset: Any dataset; a class named A/B gets the folder A_B.
        folder: Where to write.
        held_out: Share of each class's distinct normal training images, in 0..1; at least 8 and at most 60
            are taken, and never more than half.
        defects_per_image: Defective copies of each held-out image, each with one defect of another kind.
        seed: Another seed draws other images and other defects.
    Raises:
        InputError: A parameter is out of range, a class has too few or too small images, an image is bad, or
            the folder holds something else or cannot be written.
    """
    if not 0.0 < held_out < 1.0:
        raise InputError(f"held_out: expected a share between 0 and 1, found {held_out}")
    if defects_per_image not in range(1, len(KINDS) + 1):
        raise InputError(f"defects_per_image: expected 1 to {len(KINDS)}, found {defects_per_image}")
    if seed < 0:
        raise InputError(f"seed: expected 0 or more, found {seed}")
    folder = user_path(folder)
    home = folder.resolve()
    for part in PARTS if dataset.name == "union" else ("",):
        # A loader would take it for one more class.
        if home.is_relative_to((dataset.root / part).resolve()):
            raise InputError(f"{folder}: lies inside the dataset {dataset.root}; give a folder outside of it")
    names = _folder_names(dataset)
    records = sorted(dataset.train, key=lambda record: (record.class_name, str(record.path)))
    by_class: dict[str, list[tuple[ImageRecord, str]]] = defaultdict(list)
    for record, digest in zip(records, parallel_map(_digest, records), strict=True):
        by_class[record.class_name].append((record, digest))
    contents = (f"{name}:{sorted(digest for _, digest in pairs)};" for name, pairs in by_class.items())
    expected = {
        "dataset": "hgadlib validation", "version": VERSION, "of": dataset.name, "held_out": held_out,
        "defects_per_image": defects_per_image, "seed": seed,
        "training_images": hashlib.sha256("".join(contents).encode()).hexdigest(),
    }  # fmt: skip
    if holds(folder, _MARKER, "a validation set", expected):
        return folder
    try:
        bar = progress_bar(len(by_class), "Making the validation set", unit="class")
        with bar, new_folder(home) as unfinished:
            for name, pairs in by_class.items():
                _write_class(unfinished / names[name], pairs, held_out, defects_per_image, seed)
                bar.update(1)
            (unfinished / _MARKER).write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}; give another folder") from error
    return folder


def hold_out(dataset: Dataset, share: float, split: Literal["held_out", "threshold"] = "held_out") -> Dataset:
    """Keep a share of each class's training images out of training: they get another split.

    Drawn as :func:`make_validation` draws them, by content. Of a class with 24 different images or more at
    least 8 are taken, and of none more than half. An InputError where an image cannot be read.
    """
    if not share:
        return dataset
    # Those of both splits are drawn apart, so that none says anything of the other.
    seed = 0 if split == "held_out" else 1
    try:
        digests = content_digests([record.path for record in dataset.train])
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    of = {record: (record.class_name, digest) for record, digest in zip(dataset.train, digests, strict=True)}
    drawn: set[tuple[str, str]] = set()
    for name in dataset.classes:
        own = {digest for class_name, digest in of.values() if class_name == name}
        least = MIN_HELD_OUT if len(own) >= 3 * MIN_HELD_OUT else 0
        count = min(max(round(share * len(own)), least), len(own) // 2)
        drawn.update((name, digest) for digest in _draw(own, count, seed=seed))
    records = tuple(replace(r, split=split) if of.get(r) in drawn else r for r in dataset.records)
    return replace(dataset, records=records)


def _draw(digests: Iterable[str], count: int, seed: int) -> list[str]:
    """Draw some of the contents by their hashes, whatever their names and order."""
    return sorted(digests, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())[:count]


def _folder_names(dataset: Dataset) -> dict[str, str]:
    """Return for each class a folder of one level that every loader and file system takes."""
    names = {name: name.replace("/", "_").replace("\\", "_") for name in dataset.classes}
    seen: dict[str, str] = {}
    for name, flat in names.items():
        if flat in _RESERVED or flat.startswith("."):
            raise InputError(f"class {name!r} cannot be a folder of the MVTec layout; rename it")
        if (other := seen.setdefault(unicodedata.normalize("NFC", flat).casefold(), name)) != name:
            raise InputError(f"classes {other!r} and {name!r} would share the folder {flat!r}; rename one")
    return names


def _digest(record: ImageRecord) -> str:
    try:
        return sha256_of(record.path)
    except OSError as error:
        raise InputError(f"{record.path}: cannot be read: {error.strerror}") from error


def _write_class(
    folder: Path, pairs: Sequence[tuple[ImageRecord, str]], held_out: float, copies: int, seed: int
) -> None:
    # Of one content, the first by name stands for all.
    first = {digest: record for record, digest in reversed(pairs)}
    if len(first) < 2 * MIN_HELD_OUT:
        least = f"at least {2 * MIN_HELD_OUT} different normal training images, half of them to hold out"
        found = f"found {len(first)}; add images or leave it out"
        raise InputError(f"class {pairs[0][0].class_name!r}: expected {least}, {found}")
    count = min(max(round(held_out * len(first)), MIN_HELD_OUT), MAX_HELD_OUT, len(first) // 2)
    drawn = _draw(first, count, seed)
    stems = _unique_stems([record for record, _ in pairs])
    for record, digest in pairs:
        if digest not in drawn or first[digest] is record:
            part = "test" if digest in drawn else "train"
            _place(record.path, folder / part / GOOD / f"{stems[record]}{record.path.suffix}")

    def write(rank: int) -> None:
        digest, record = drawn[rank], first[drawn[rank]]
        image = read_image(record.path, record.bit_depth)
        if min(image.shape[:2]) < MIN_SIDE:
            found = f"found {image.shape[1]}x{image.shape[0]}"
            raise InputError(f"{record.path}: expected at least {MIN_SIDE} pixels a side to draw on, {found}")
        # Kinds in turn, severities spread evenly over the images of a kind.
        left = [KINDS[(rank * copies + number) % len(KINDS)] for number in range(len(KINDS))]
        for number in range(copies):
            rng = np.random.default_rng([seed, number, *bytes.fromhex(digest)])
            level = (rank * copies + number) // len(KINDS) + rng.uniform()
            severity = level / (copies * count / len(KINDS) + 1)
            for kind in left:
                if (drawing := draw_defect(image, kind, severity, rng)) is not None:
                    break
            else:
                reason = "no defect can be seen on this image; leave it out of training"
                raise InputError(f"{record.path}: {reason}")
            left.remove(kind)
            save(drawing[0], folder / "test" / kind / f"{stems[record]}.png")
            save(drawing[1], folder / "ground_truth" / kind / f"{stems[record]}_mask.png")

    list(parallel_map(write, range(count), ahead=8))


def _unique_stems(records: Sequence[ImageRecord]) -> dict[ImageRecord, str]:
    """Name each image after its file; namesakes, from other folders or of other suffixes, get a number."""
    stems: dict[ImageRecord, str] = {}
    taken: set[str] = set()
    for record in records:
        own = record.path.stem
        names = itertools.chain([own], (f"{own}-{number}" for number in itertools.count(2)))
        stems[record] = next(name for name in names if name.casefold() not in taken)
        taken.add(stems[record].casefold())
    return stems


def _place(source: Path, target: Path) -> None:
    """Link or copy a file; a link's own target, for a relative link would lead nowhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def draw_defect(
    image: NDArray[np.uint8], kind: str, severity: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
    """Draw one defect of a kind in `KINDS`, its severity from 0 (subtle) to 1 (clear), where it is seen.

    Returns the image with the defect, (H, W, 3) uint8, and its mask, (H, W) bool, for a normal image whose
    short side is at least `MIN_SIDE`; a grey one stays grey. None where the image shows no such defect
    wherever it is put: a blank sheet cannot be blurred.
    """
    side = min(image.shape[:2])
    is_grey = bool((image == image[..., :1]).all())
    for _ in range(_PLACES):
        top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        window = image[top : top + side, left : left + side]
        center = (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.2, 0.8)))
        changed, cover = _change(kind, (window / np.float32(255)).astype(np.float32), center, severity, rng)
        if is_grey:
            changed = np.repeat(changed.mean(axis=2, keepdims=True), 3, axis=2)
        drawn = np.clip(changed * 255.0 + 0.5, 0, 255).astype(np.uint8)
        inside = cover > COVERED
        reach = ndimage.distance_transform_edt(~inside) if inside.any() else np.full(cover.shape, np.inf)
        # Outside the edge the picture keeps its very bytes: no faint tail of a brush, no rounding.
        touched = (cover > 0) & (reach <= max(2.0, EDGE * side))
        drawn = np.where(touched[..., None], drawn, window)
        if _is_seen(window, drawn, inside):
            result, mask = image.copy(), np.zeros(image.shape[:2], dtype=bool)
            result[top : top + side, left : left + side] = drawn
            mask[top : top + side, left : left + side] = inside
            return result, mask
    return None


def _is_seen(before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bool:
    """Check that the marked pixels differ, most of them and by some grey levels: else the mask would lie."""
    if not mask.any():
        return False
    change = np.abs(after[mask].astype(np.int16) - before[mask]).max(axis=1)
    return bool(change.mean() >= 3.0 and (change >= 2).mean() >= 0.5)


def _change(
    kind: str, photo: Array, center: defects.Point, severity: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return a picture, (n, n, 3) in 0..1, with a defect around a point, and its coverage, (n, n)."""
    side = photo.shape[0]
    flat = np.zeros((side, side), np.float32)
    if kind == "scratch":
        # The demo's grooves are lighter on matt ground and darker on gloss.
        surface, line = defects.scratch(Surface(photo, flat, flat + rng.integers(2)), center, severity, rng)
        return surface.albedo, line
    if kind == "stain":
        surface = Surface(photo, flat, flat)
        if rng.uniform() < 0.5:
            surface, patch = defects.stain(surface, center, severity, rng)
        else:
            tint = rng.uniform(0.0, 1.0, 3).astype(np.float32)
            surface, patch = defects.color(surface, center, 0.6 * severity, rng, tint=tint)
        return surface.albedo, patch
    cover = defects.blob(side, center, rng.uniform(0.05, 0.14), 0.25, 0.2, rng)
    if kind == "patch":
        # A piece from elsewhere in the picture, turned.
        turned = np.rot90(photo, int(rng.integers(1, 4)))
        elsewhere = np.roll(turned, tuple(rng.integers(side // 4, side - side // 4, 2).tolist()), (0, 1))
        return mix(photo, elsewhere, cover * (0.45 + 0.55 * severity)), cover
    if kind == "blur":
        sigma = (0.008 + 0.016 * severity) * side
        return mix(photo, ndimage.gaussian_filter(photo, (sigma, sigma, 0)), cover), cover
    grain = (0.04 + 0.09 * severity) * noise(rng, side, rng.uniform(30, 120), 2)
    return (photo + (grain * cover)[..., None]).astype(np.float32), cover
