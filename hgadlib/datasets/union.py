"""Union: MVTec AD, BTAD, MVTec 3D-AD and VisA as one set of 40 classes (paper Sec. 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hgadlib.datasets import btad, mvtec, mvtec3d, visa
from hgadlib.datasets.records import ImageRecord
from hgadlib.datasets.scan import Findings

PARTS: Mapping[str, Callable[[Path, Findings], list[ImageRecord]]] = {
    "btad": btad.load,
    "mvtec": mvtec.load,
    "mvtec3d": mvtec3d.load,
    "visa": visa.load,
}


def load(roots: Mapping[str, Path], findings: Findings) -> list[ImageRecord]:
    """Read the four sets; a class is named PART/CLASS, so that both kinds of capsules keep their own id.

    Args:
        roots: Where each of `PARTS` lies.
        findings: Takes up what is bad, and which parts are incomplete.

    Returns:
        Records.

    Raises:
        InputError: A part is missing, or (under strict) something is bad.
    """
    return [
        replace(record, class_name=f"{part}/{record.class_name}")
        for part in sorted(PARTS)
        for record in PARTS[part](roots[part], findings)
    ]
