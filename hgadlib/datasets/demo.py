"""Demo: made on first use (being written)."""

from __future__ import annotations

from pathlib import Path

from hgadlib.errors import InputError


def ensure(where: Path, seed: int) -> Path:
    """Return the folder of the demo."""
    raise InputError("dataset 'demo' is not there yet")
