"""Other methods behind HGAD's face, for comparisons on the same features by the same evaluation."""

from __future__ import annotations

from hgadlib.baselines.neighbours import Neighbours
from hgadlib.model import HGAD

METHODS: dict[str, type[HGAD]] = {"hgad": HGAD, "neighbours": Neighbours}
"""The model of each value that the setting ``method`` may have."""
