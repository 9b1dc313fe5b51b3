"""Demo: six classes that the library makes itself, in the MVTec layout, with exact masks.

Three textures are cut from photographs that scikit-image ships (train and test crops from disjoint parts),
three objects are rendered. Nothing is downloaded, and the same seed gives the same bytes.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hgadlib.datasets.demo import defects
from hgadlib.datasets.demo.defects import contamination, hole, scratch, stain, thread
from hgadlib.datasets.demo.scenes import SCENES, SIDE
from hgadlib.datasets.demo.surface import photograph, shade
from hgadlib.datasets.images import parallel_map, save
from hgadlib.datasets.records import GOOD
from hgadlib.datasets.scan import holds
from hgadlib.errors import InputError
from hgadlib.files import new_folder
from hgadlib.progress import progress_bar

VERSION = 2
"""Goes up when the images change, so that old ones are not taken for new."""
N_TRAIN, N_TEST_GOOD, N_PER_DEFECT = 60, 20, 6
MISSING = "missing_part"
_MARKER = "demo.json"
_PART = {"contamination": contamination, MISSING: None, "scratch": scratch}


def _tinted(*tint: float) -> defects.Defect:
    return functools.partial(defects.color, tint=np.array(tint, dtype=np.float32))


DEFECTS: dict[str, dict[str, defects.Defect | None]] = {
    "brick": {"color": _tinted(0.60, 0.63, 0.66), "hole": hole, "scratch": scratch, "stain": stain},
    "circuit": {"color": _tinted(0.10, 0.07, 0.05), **_PART},
    "gauge": {"color": _tinted(0.78, 0.62, 0.28), **_PART},
    "grass": {"color": _tinted(0.66, 0.56, 0.26), "hole": hole, "stain": stain, "thread": thread},
    "gravel": {"color": _tinted(0.10, 0.09, 0.22), "hole": hole, "stain": stain, "thread": thread},
    "hex_nut": {"color": _tinted(0.36, 0.16, 0.07), **_PART},
}
"""Class -> kind of defect -> what draws it; None where the scene itself lacks a part.
The tints are spilt paint, a burn, yellowing, drought, oil and rust."""


class Shot(NamedTuple):
    """One image to make."""

    class_name: str
    split: str
    kind: str
    number: int


def shots() -> Iterator[Shot]:
    """List all images of the demo, in order."""
    for name in sorted(SCENES):
        yield from (Shot(name, "train", GOOD, index) for index in range(N_TRAIN))
        yield from (Shot(name, "test", GOOD, index) for index in range(N_TEST_GOOD))
        for kind in sorted(DEFECTS[name]):
            yield from (Shot(name, "test", kind, index) for index in range(N_PER_DEFECT))


def _center(class_name: str, rng: np.random.Generator) -> tuple[float, float]:
    """Choose where a defect lies: on the object, away from the rim of a texture."""
    if class_name not in ("hex_nut", "gauge"):
        return rng.uniform(0.16, 0.84), rng.uniform(0.16, 0.84)
    angle = rng.uniform(0, 2 * np.pi)
    radius = rng.uniform(0.22, 0.30) if class_name == "hex_nut" else 0.30 * np.sqrt(rng.uniform())
    return 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)


def render(shot: Shot, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Make one image, (256, 256, 3) uint8, and its mask, (256, 256) bool, or None for a normal image."""
    key = [zlib.crc32(text.encode()) for text in (shot.class_name, shot.split, shot.kind)]
    rng = np.random.default_rng([seed, *key, shot.number])
    surface, mask = SCENES[shot.class_name](shot.split, rng, shot.kind == MISSING)
    defect = None if shot.kind == GOOD else DEFECTS[shot.class_name][shot.kind]
    if defect is not None:
        # Severities spread evenly over a type's images, so that each has subtle and plain ones.
        severity = 0.2 + 0.8 * (shot.number + rng.uniform()) / N_PER_DEFECT
        changed, cover = defect(surface, _center(shot.class_name, rng), severity, rng)
        if shot.class_name == "hex_nut" and shot.kind in ("color", "scratch"):
            # What is on the steel does not go on over the mat or the bore.
            changed, cover = defects.confine(surface, changed, cover, surface.gloss > 0.5)
        surface = changed
        mask = defects.exact_mask(cover, SIDE)
    return photograph(shade(surface, rng), SIDE, rng), mask


def _write(shot: Shot, seed: int, root: Path) -> None:
    image, mask = render(shot, seed)
    home, name = root / shot.class_name, f"{shot.number:03d}"
    save(image, home / shot.split / shot.kind / f"{name}.png")
    if mask is not None:
        save(mask, home / "ground_truth" / shot.kind / f"{name}_mask.png")


def ensure(where: Path, seed: int = 0) -> Path:
    """Make the demo dataset unless it is there; return its folder: `where`, of another seed `where`-seedK.

    Raises:
        InputError: The folder holds something else, or cannot be written.
    """
    where = where if seed == 0 else where.with_name(f"{where.name}-seed{seed}")
    what, expected = "the demo dataset", {"dataset": "hgadlib demo", "version": VERSION, "seed": seed}
    if holds(where, _MARKER, what, expected):
        return where
    plan = list(shots())
    try:
        with new_folder(where) as unfinished, progress_bar(len(plan), f"Making {what}") as bar:
            for _ in parallel_map(lambda shot: _write(shot, seed, unfinished), plan):
                bar.update(1)
            (unfinished / _MARKER).write_text(json.dumps(expected) + "\n", encoding="utf-8")
    except OSError as error:
        # Somebody else may have been faster; theirs has the same bytes.
        if not (where / _MARKER).is_file():
            raise InputError(
                f"{where}: cannot be written: {error.strerror}; set HGAD_DATA or data_root"
            ) from error
    return where
