r"""PatchCore: the distance to the nearest of a few training features that stand for all.

.. math:: s(x) = \min_{b\in B}\lVert x - b\rVert,\qquad
          B \leftarrow B\cup\{\operatorname{argmax}_{c}\min_{b\in B}\lVert\psi(c)-\psi(b)\rVert\}

Karsten Roth, Latha Pemula, Joaquin Zepeda, Bernhard Schoelkopf, Thomas Brox and Peter Gehler, "Towards Total
Recall in Industrial Anomaly Detection", CVPR, 2022.

Faithful: two stages, each averaged over 3 x 3 positions, joined on the finer one's grid; a coreset by greedy
k-centre selection on a random projection psi to 128 dimensions (Johnson-Lindenstrauss), each next feature the
farthest from those chosen; the nearest by exact search; the blur of the map.

Not: this library's backbone in place of WideResNet50, whose channels are few enough to need no pooling to
1024; its stages of strides 16 and 32, as of the default, in place of 8 and 16; images of 256 pixels in
place of a crop of 224. The image's score is the maximum of the blurred map; the published one is that of the
distances before the blur, re-weighted by the neighbours of the nearest feature. Selection starts from one
feature drawn.

Smaller than published: a bank is chosen of ``baseline.candidates`` features at most, drawn of all, so that
two CPU cores take minutes; the paper chooses of all.

The paper has a model for each class. ``baseline.bank: all`` makes one bank of all classes' images, ``class``
one of each class's own. With ``coreset: 1`` a bank is all candidates: a plain nearest-neighbour search.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.baselines.banks import Banks
from hgadlib.baselines.neighbours import nearest
from hgadlib.config import BaselineConfig
from hgadlib.features.store import Features
from hgadlib.method import one_pass
from hgadlib.scoring import LevelValues

# Dimensions that a coreset is chosen in.
_PROJECTED = 128
# Rows looked at together while a coreset is chosen, and distances held at a time: 64 MB.
_BLOCK, _CELLS = 1024, 1 << 24


class PatchCore(Banks):
    """Distances to the nearest feature of a bank.

    Args:
        classes: Names of the K classes.
        channels: C of each level.
        grids: (H, W) of each level.
        baseline: Takes bank, candidates and coreset; each level has banks of its own.
    Source: Roth et al., 2022, Sec. 3.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
    ) -> None:
        super().__init__(classes, channels, grids, baseline=baseline)
        for level, dim in enumerate(self.channels):
            for k in range(self.n_banks):
                self.register_buffer(f"bank_{level}_{k}", torch.zeros(0, dim))  # as large as a fit makes it

    @torch.no_grad()
    def fit(
        self,
        features: Features,
        class_idx: np.ndarray,
        held_out: tuple[Features, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Draw the candidates and choose the banks.

        Args:
            features: Of the N training images.
            class_idx: (N,).
            held_out: Not looked at: nothing is calibrated.
            seed: Of the candidates, the projection and the first feature of a bank.
        Returns:
            A history as of :func:`hgadlib.training.fit`, of one pass; "total" is the mean distance of the
            candidates to the nearest one kept, in the dimensions they are chosen in.
        Raises:
            InputError: A class with a bank of its own has no images.
        """
        started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
        own_images, sums, count = self.images(class_idx), 0.0, 0
        for level, stored in enumerate(features.levels):
            positions = stored.shape[1]
            for k, images in enumerate(own_images):
                order = torch.randperm(len(images) * positions, generator=generator)
                drawn = order[: self.baseline.candidates].sort().values
                owner, position = (
                    x.to(stored.device) for x in (images[drawn // positions], drawn % positions)
                )
                rows = stored[owner, position].to(self.device)  # as they are stored, which loses nothing
                size = max(1, round(self.baseline.coreset * len(rows)))
                start = int(torch.randint(len(rows), (1,), generator=generator))
                if size < len(rows):
                    chosen, squares = coreset(projected(rows.float(), generator), size, start)
                    rows, sums = rows[chosen], sums + float(squares.sqrt().sum())
                self.register_buffer(f"bank_{level}_{k}", rows.contiguous())
                count += len(drawn)
        return one_pass(sums / count, started, len(class_idx))

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute minus the distances to the nearest, as of :meth:`Method.level_values`."""
        owner = self.bank(class_idx)
        out = []
        for level, (x, grid) in enumerate(zip(self.checked(features), self.grids, strict=True)):
            distances = x.new_empty(x.shape[:2])
            for k in owner.unique().tolist():
                rows, bank = x[owner == k], self.get_buffer(f"bank_{level}_{k}").to(x.dtype)
                distances[owner == k] = nearest(rows.flatten(0, 1), bank).sqrt().view(rows.shape[:2])
            out.append(-distances.unflatten(1, grid))
        return LevelValues(tuple(out), ())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in list(self._buffers):
            if name.startswith("bank_") and prefix + name in state_dict:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def projected(x: Tensor, generator: torch.Generator, dim: int = _PROJECTED) -> Tensor:
    """Project rows (N, C) to fewer dimensions at random, which about keeps distances; fewer ones stay.

    Args:
        x: (N, C).
        generator: On the host.
        dim: Dimensions D.
    Returns:
        (N, min(C, D)).
    """
    if x.shape[1] <= dim:
        return x
    return x @ (torch.randn(x.shape[1], dim, generator=generator) / dim**0.5).to(x)


def coreset(x: Tensor, count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    r"""Choose rows greedily: each next one is the farthest from those chosen.

    Several are chosen at a time, to the same order. Distances to the chosen only fall. So the rows that are
    farthest now can be told among themselves, for as long as the farthest of them is no nearer than any row
    outside was; then one matrix product brings all rows up to date.

    Args:
        x: (N, C).
        count: Rows to choose, 1 to N.
        start: The first one.
    Returns:
        Indices in the order chosen, (count,) int64, and the squared distance of each row to the nearest one
        chosen, (N,).
    Source: Roth et al., 2022, Algorithm 1 (Sener and Savarese, 2018).

    Example:
        >>> coreset(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), 3)[0].tolist()
        [0, 3, 2]
    """
    x = x - x.mean(0)  # squares of small numbers lose no digits
    squares = x.square().sum(1)
    chosen = torch.full((count,), start, device=x.device)
    distances = _to_nearest(x, squares, chosen[:1], torch.full_like(squares, torch.inf))
    done = 1
    while done < count:
        top, block = distances.topk(min(_BLOCK, len(x)))
        # What lies outside of the block is nearer than this.
        outside = top[-1] if len(block) < len(x) else -torch.inf
        own, half = x[block], squares[block]
        among = (half[:, None] + half - 2 * own @ own.T).clamp_min(0).fill_diagonal_(-1)
        picks: list[int] = []
        while done + len(picks) < count:
            farthest, at = top.max(0)
            if picks and farthest < outside:
                break
            picks.append(int(at))
            top = torch.minimum(top, among[picks[-1]])
        chosen[done : done + len(picks)] = block[picks]
        distances = _to_nearest(x, squares, block[picks], distances)
        done += len(picks)
    return chosen, distances.clamp_min(0)


def _to_nearest(x: Tensor, squares: Tensor, chosen: Tensor, distances: Tensor) -> Tensor:
    """Bring squared distances to the nearest up to date, after more rows are chosen; theirs become -1."""
    bank, step = x[chosen], max(1, _CELLS // len(chosen))
    half, found = -0.5 * squares[chosen], distances.clone()
    for start in range(0, len(x), step):
        at = slice(start, start + step)
        likeness = torch.addmm(half, x[at], bank.T).amax(1)
        # A rounding error below 0 would be taken for a row that is chosen.
        found[at] = torch.minimum(found[at], (squares[at] - 2 * likeness).clamp_min(0))
    found[chosen] = -1
    return found
