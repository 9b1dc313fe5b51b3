"""What the methods share that take the settings of baselines: they are kept, stored, and built from again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from hgadlib.config import BaselineConfig
from hgadlib.method import Method


class Baseline(Method):
    """A method with settings of its own.

    Args:
        classes: As of :class:`Method`.
        channels: Likewise.
        grids: Likewise.
        baseline: Settings.
        **more: Likewise of :class:`Method`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
        **more: Any,
    ) -> None:
        super().__init__(classes, channels, grids, **more)
        self.baseline = baseline

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return super().architecture() | {"baseline": dataclasses.asdict(self.baseline)}

    @classmethod
    def restored(cls, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Build the model that :meth:`architecture` describes, with these weights."""
        baseline = BaselineConfig(**architecture["baseline"])
        return super().restored(architecture | {"baseline": baseline}, tensors)
