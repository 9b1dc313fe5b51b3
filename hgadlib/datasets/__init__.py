"""Datasets: one loader per layout, the same records from all.

`load_dataset(name)` finds the data (the given root, else $HGAD_DATA/NAME, else data/NAME), fetches or makes
it where that is asked for, and looks at every image before hours are spent on it.
"""

from __future__ import annotations

import os
from pathlib import Path

from hgadlib.datasets import demo, elpv, folder
from hgadlib.datasets.download import fetch
from hgadlib.datasets.published import PARTS, load_union
from hgadlib.datasets.records import Dataset
from hgadlib.datasets.scan import Findings, keep_trainable, verify
from hgadlib.errors import InputError
from hgadlib.files import user_path

DATASETS = ("mvtec", "btad", "mvtec3d", "visa", "union", "elpv", "demo", "folder")


def default_root(name: str) -> Path:
    """Return where a dataset lies unless somebody says otherwise: $HGAD_DATA/NAME, else data/NAME."""
    return Path(os.environ.get("HGAD_DATA") or "data") / name


def load_dataset(
    name: str, *, root: Path | str | None = None, download: bool = False, strict: bool = True,
    bit_depth: int | None = None, seed: int = 0,
) -> Dataset:  # fmt: skip
    """Load the records of a dataset, in an order that depends on names only.

    Args:
        name: One of `DATASETS`.
        root: Where the data lies; None for `default_root` (elpv: for its package). Union's root holds its
            four parts, each in a folder of its name.
        download: Fetch the data if it is missing.
        strict: Raise on the first bad image; False leaves bad images out and lists them in `Dataset.skipped`.
        bit_depth: Bits in use of 16-bit files, 8 to 16; None finds them over the training images.
        seed: Draws the demo's images and elpv's split. It is not the seed of a training run: runs that are to
            be compared must see the same data.
    Raises:
        InputError: The name is unknown, the data is missing or (under strict) bad.
    """
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}")
    findings = Findings(strict=strict)
    where = user_path(root) if root is not None else default_root(name)
    if name == "demo":
        where = demo.ensure(where, seed)
        records = folder.read_tree(where, findings)
    elif name == "elpv":
        where = where if root is not None else elpv.package_root()
        records = elpv.load(where, findings, seed)
    elif name == "union":
        where = where if root is not None else where.parent
        roots = {part: where / part for part in PARTS}
        for part, place in roots.items():
            _require(part, place, download)
        records = load_union(roots, findings)
    else:
        _require(name, where, download)
        records = {"folder": folder.read_tree, **PARTS}[name](where, findings)
    records = keep_trainable(verify(records, findings, bit_depth), where, findings)
    classes = tuple(sorted({record.class_name for record in records if record.split == "train"}))
    return Dataset(name, where, classes, tuple(records), tuple(findings.skipped), tuple(findings.notes))


def _require(name: str, where: Path, download: bool) -> None:
    """Fetch a dataset that is missing, or say how to come by it."""
    if where.exists():
        return
    if name == "folder":
        advice = "no such folder; dataset 'folder' needs data_root, a folder of your images"
        raise InputError(f"{where}: {advice}")
    if not download:
        advice = f"set HGAD_DATA, or fetch it: -p download true, or hgad data fetch {name}"
        raise InputError(f"{where}: dataset {name!r} is not there; give data_root, {advice}")
    fetch(name, root=where)
