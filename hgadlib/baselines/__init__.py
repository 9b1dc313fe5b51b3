"""HGAD and the methods that it is compared with, behind one face: the same features, the same evaluation."""

from __future__ import annotations

from hgadlib.baselines.neighbours import Neighbours
from hgadlib.method import Method
from hgadlib.model import HGAD

METHODS: dict[str, type[Method]] = {"hgad": HGAD, "neighbours": Neighbours}
"""The model of each value that the setting ``method`` may have."""
