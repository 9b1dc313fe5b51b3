"""Demo: six classes that the library makes itself, in the MVTec layout, with exact masks.

Three textures are cut from photographs that scikit-image ships (crops for training and for test come from
disjoint parts of each), three objects are rendered. Nothing is downloaded, and the same seed gives the same
bytes.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hgadlib.datasets.demo import defects
from hgadlib.datasets.demo.scenes import SCENES, SIDE
from hgadlib.datasets.demo.surface import photograph, shade
from hgadlib.datasets.images import parallel_map
from hgadlib.datasets.records import GOOD
from hgadlib.errors import InputError
from hgadlib.progress import progress_bar

VERSION = 2
"""Goes up when the images change, so that old ones are not taken for new."""
N_TRAIN, N_TEST_GOOD, N_PER_DEFECT = 60, 20, 6
MISSING = "missing_part"
_MARKER = "demo.json"

_RUST, _BURN, _YELLOW = (0.36, 0.16, 0.07), (0.10, 0.07, 0.05), (0.78, 0.62, 0.28)
_PAINT, _DRY, _OIL = (0.60, 0.63, 0.66), (0.66, 0.56, 0.26), (0.10, 0.09, 0.22)
DEFECTS: dict[str, dict[str, defects.Defect | None]] = {
    "brick": {
        "color": functools.partial(defects.color, tint=_PAINT),
        "hole": defects.hole,
        "scratch": defects.scratch,
        "stain": defects.stain,
    },
    "circuit": {
        "color": functools.partial(defects.color, tint=_BURN),
        "contamination": defects.contamination,
        MISSING: None,
        "scratch": defects.scratch,
    },
    "gauge": {
        "color": functools.partial(defects.color, tint=_YELLOW),
        "contamination": defects.contamination,
        MISSING: None,
        "scratch": defects.scratch,
    },
    "grass": {
        "color": functools.partial(defects.color, tint=_DRY),
        "hole": defects.hole,
        "stain": defects.stain,
        "thread": defects.thread,
    },
    "gravel": {
        "color": functools.partial(defects.color, tint=_OIL),
        "hole": defects.hole,
        "stain": defects.stain,
        "thread": defects.thread,
    },
    "hex_nut": {
        "color": functools.partial(defects.color, tint=_RUST),
        "contamination": defects.contamination,
        MISSING: None,
        "scratch": defects.scratch,
    },
}  # fmt: skip


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
    if class_name == "hex_nut":
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.22, 0.30)
        return 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
    if class_name == "gauge":
        angle, radius = rng.uniform(0, 2 * np.pi), 0.30 * np.sqrt(rng.uniform())
        return 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
    return rng.uniform(0.16, 0.84), rng.uniform(0.16, 0.84)


def render(shot: Shot, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Make one image and its mask.

    Args:
        shot: Which.
        seed: The demo's seed.

    Returns:
        Image, (256, 256, 3) uint8, and mask, (256, 256) bool, or None for a normal image.
    """
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
    folder = root / shot.class_name / shot.split / shot.kind
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{shot.number:03d}.png")
    if mask is not None:
        folder = root / shot.class_name / "ground_truth" / shot.kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / f"{shot.number:03d}_mask.png")


def ensure(where: Path, seed: int = 0) -> Path:
    """Make the demo dataset unless it is there.

    It is made beside its place and moved there when it is complete: a killed run leaves nothing that is
    trusted.

    Args:
        where: Folder of the dataset; another seed than 0 has its own beside it, `where`-seedK.
        seed: Draws all images.

    Returns:
        The folder that holds the dataset.

    Raises:
        InputError: The folder holds something else, or cannot be written.
    """
    where = where if seed == 0 else where.with_name(f"{where.name}-seed{seed}")
    expected = {"dataset": "hgadlib demo", "version": VERSION, "seed": seed}
    if where.exists() and any(where.iterdir()):
        try:
            found = json.loads((where / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{where}: expected the demo dataset, found other files; give another root"
            ) from error
        if found != expected:
            raise InputError(
                f"{where}: holds another version of the demo ({found}); remove it to make it anew"
            )
        return where
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{where.name}-unfinished-", dir=where.parent))
    except OSError as error:
        raise InputError(
            f"{where}: cannot be written: {error.strerror}; set HGAD_DATA or data_root"
        ) from error
    try:
        plan = list(shots())
        made = parallel_map(lambda shot: _write(shot, seed, unfinished), plan)
        with progress_bar(len(plan), "Making the demo dataset") as bar:
            for _ in made:
                bar.update(1)
        (unfinished / _MARKER).write_text(json.dumps(expected) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        try:
            os.replace(unfinished, where)
        except OSError:
            # Somebody else was faster; theirs has the same bytes.
            if not (where / _MARKER).is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return where
