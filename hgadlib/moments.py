"""Moments of more rows than memory holds."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of rows that arrive batch by batch.

    Args:
        dim: D.

    Example:
        >>> moments = Moments(1)
        >>> for part in ([[1.0], [2.0]], [[6.0]]):
        ...     moments.add(torch.tensor(part))
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([3.0], [[7.0]])
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.sums = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take up rows, (N, D). Products are taken about the first batch's mean, so none is large."""
        if self.shift is None:
            self.shift = rows.mean(0)
        centred = rows - self.shift
        self.count += len(rows)
        # On the host: some devices have no float64.
        self.sums += centred.sum(0).cpu().double()
        self.products += (centred.T @ centred).cpu().double()

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.shift is None:
            raise ValueError("expected at least one batch of training images, found none")
        return self.shift.cpu().double() + self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased."""
        mean = self.sums / self.count
        return (self.products - self.count * torch.outer(mean, mean)) / max(self.count - 1, 1)
