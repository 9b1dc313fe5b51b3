r"""What the scale s and the shift t of every coupling block do over a training (paper Eq. 4 and Sec. 3.2).

The paper argues that one Gaussian for all classes lets a flow predict constants: every s very negative, every
t close to zero, whatever the input. Here both are measured on fixed samples of features as a run trains. No
random number is drawn and no gradient kept, so a run trains the same with the record and without.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.evaluation.likelihoods import anomalous_positions
from hgadlib.features.store import Features, spread_sample
from hgadlib.files import write_atomically
from hgadlib.flow import ConvolutionalCoupling, FeatureFlow, PositionalCoupling
from hgadlib.model import HGAD
from hgadlib.runs.inputs import Inputs

GROUPS = ("train", "normal", "anomalous")
"""Where features come from: training images, and normal and anomalous positions of test images."""

# Images of each class that a sample holds, and images held at a time.
_PER_CLASS, _BATCH = 8, 32
# Share of the clamp from which on a scale counts as at its limit.
_LIMIT = 0.95


@dataclass(frozen=True)
class BlockOutput:
    """One coupling block on some features.

    Attributes:
        s: Log-scale after the clamp, (B, N, C // 2), nats.
        t: Shift, (B, N, C // 2), in units of the features that enter the block.
        out: What leaves the block, (B, N, C).
        clamp: The largest size that s can have.
        log_gain: Mean log of the block's global scaling, which no input changes; nats per channel.
    """

    s: Tensor
    t: Tensor
    out: Tensor
    clamp: float
    log_gain: float


def block_outputs(flow: FeatureFlow, features: Tensor) -> Iterator[BlockOutput]:
    """Send features through a flow, a block at a time.

    Args:
        flow: Of the features' level.
        features: (B, N, C).

    Yields:
        Scale, shift and output of each coupling block, from the features' side.
    """
    x, positions = features, flow.positions
    conditions = [] if positions is None else [positions]
    for block in flow.inn:
        if isinstance(block, PositionalCoupling | ConvolutionalCoupling):
            passive = x[..., : block.splits[0]]
            s, t = block.scale_and_shift(passive, positions)
            ((x,), _) = block((x,), conditions)
            yield BlockOutput(s, t, x, block.clamp, float(block.gain.detach().log().mean()))
        else:
            ((x,), _) = block((x,))


class _Spread:
    """Moments of one quantity over positions, by class and channel, added up a batch at a time."""

    def __init__(self, n_classes: int, channels: int) -> None:
        self.counts = torch.zeros(n_classes, dtype=torch.float64)
        self.sums = torch.zeros(n_classes, channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, values: Tensor, class_idx: Tensor) -> None:
        """Add values (n, C) of positions of these classes (n,)."""
        found = values.cpu().double()
        self.sums.index_add_(0, class_idx, found)
        self.counts += torch.bincount(class_idx, minlength=len(self.counts))
        self.squares += found.square().sum(0)

    def summary(self, name: str) -> dict[str, float]:
        """Give mean and deviation, and which shares of the variance the input and its class make.

        The variance is taken over positions and channels. A network that predicts constants has one value per
        channel: then all variance lies between channels, and the share of the input is 0.
        """
        n, square = self.counts.sum(), float(self.squares.mean() / self.counts.sum())
        mean = self.sums.sum(0) / n
        total = square - float(mean.mean()) ** 2
        of_input = square - float(mean.square().mean())
        own = self.sums / self.counts.clamp_min(1)[:, None]
        of_class = float((self.counts[:, None] * (own - mean).square()).sum(0).mean() / n)
        # A difference of nearly equal numbers says nothing below their rounding.
        varies = total > 1e-12 * square
        return {
            f"{name}_mean": float(mean.mean()),
            f"{name}_std": max(total, 0.0) ** 0.5,
            f"{name}_input": max(of_input, 0.0) / total if varies else float("nan"),
            f"{name}_class": of_class / total if varies else float("nan"),
        }


class _Block:
    """Everything that is added up of one block and one group."""

    def __init__(self, n_classes: int, output: BlockOutput) -> None:
        self.s = _Spread(n_classes, output.s.shape[-1])
        self.t = _Spread(n_classes, output.t.shape[-1])
        self.at_limit, self.values, self.out_squares, self.out_values = 0, 0, 0.0, 0
        self.log_gain = output.log_gain

    def add(self, output: BlockOutput, chosen: Tensor, class_idx: Tensor) -> None:
        s, out = output.s[chosen], output.out[chosen]
        self.s.add(s, class_idx)
        self.t.add(output.t[chosen], class_idx)
        self.at_limit += int((s.abs() > _LIMIT * output.clamp).sum())
        self.values += s.numel()
        self.out_squares += float(out.double().square().sum())
        self.out_values += out.numel()

    def summary(self) -> dict[str, float]:
        return {
            **self.s.summary("s"),
            "s_limit": self.at_limit / self.values,
            **self.t.summary("t"),
            "log_gain": self.log_gain,
            "out_rms": (self.out_squares / self.out_values) ** 0.5,
        }


@torch.inference_mode()
def coupling_table(
    model: HGAD,
    features: Features,
    images: Tensor,
    class_idx: np.ndarray,
    groups: Mapping[str, Sequence[Tensor]],
) -> list[dict[str, Any]]:
    """Measure s and t of every block on some images.

    Args:
        model: Its flows are looked at; nothing in it changes.
        features: Of a split.
        images: Which of them, (n,) sorted.
        class_idx: Class of each image of the split, (N,).
        groups: By name, the positions that belong to it: for each level, of these images, (n, h, w) bool.

    Returns:
        A row per group, level and block (counted from 1, from the features' side): mean, standard deviation
        and shares of s and t, the share of s at the clamp's limit, the block's mean log gain and the root
        mean square of what leaves it. A group with no position in it gives no row.
    """
    n_classes = len(model.classes)
    found: dict[tuple[str, int, int], _Block] = {}
    start = 0
    for index, batch in features.batches(images.split(_BATCH), model.device):
        rows = slice(start, start + len(index))
        start = rows.stop
        labels = torch.as_tensor(class_idx)[index]
        for level, ((flow, _), x) in enumerate(zip(model.levels, batch, strict=True)):
            for layer, output in enumerate(block_outputs(flow, x)):
                for name, positions in groups.items():
                    chosen = positions[level][rows].flatten(1)
                    if chosen.any():
                        block = found.setdefault((name, level, layer), _Block(n_classes, output))
                        own = labels[:, None].expand_as(chosen)[chosen]
                        block.add(output, chosen.to(x.device), own)
    return [
        {"level": level + 1, "layer": layer + 1, "group": name, **block.summary()}
        for (name, level, layer), block in sorted(
            found.items(), key=lambda item: (item[0][1:], GROUPS.index(item[0][0]))
        )
    ]


class CouplingRecord:
    """Follows s and t through a run's training, in its coupling.csv.

    The file never holds an epoch that history.csv does not: rows wait until the history has theirs, and what
    an interrupted run had measured beyond its checkpoint is dropped as those epochs come again.

    Args:
        path: The file; an earlier part of the same run is taken up.
        inputs: Of the run.
        masks: By class index, as :func:`hgadlib.runs.inputs.class_masks` gives them.
    """

    def __init__(self, path: Path, inputs: Inputs, masks: dict[int, np.ndarray]) -> None:
        self.path, self.inputs = path, inputs
        self.rows: list[dict[Any, Any]] = pd.read_csv(path).to_dict("records") if path.is_file() else []
        n_classes, grids = len(inputs.dataset.classes), inputs.train.grids
        self.train = spread_sample(inputs.train_classes, n_classes, _PER_CLASS)
        everywhere = [torch.ones(len(self.train), *grid, dtype=torch.bool) for grid in grids]
        self.train_groups = {"train": everywhere}
        chosen = [
            np.flatnonzero((inputs.test_classes == k) & (inputs.test_labels == state) & inputs.test_labelled)
            for k in range(n_classes)
            for state in (False, True)
        ]
        spread = [members[:: max(1, len(members) // _PER_CLASS)] for members in chosen]
        self.test = torch.from_numpy(np.sort(np.concatenate(spread)))
        known = inputs.test_labels & inputs.test_labelled
        touched = [anomalous_positions(inputs.test_classes, known, masks, grid)[self.test] for grid in grids]
        self.test_groups = {"normal": [~positions for positions in touched], "anomalous": touched}

    def measure(self, epoch: int, model: HGAD) -> None:
        """Note what the model's blocks do after an epoch."""
        inputs = self.inputs
        rows = coupling_table(model, inputs.train, self.train, inputs.train_classes, self.train_groups)
        if len(self.test):
            rows += coupling_table(model, inputs.test, self.test, inputs.test_classes, self.test_groups)
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows += [{"epoch": epoch, **row} for row in rows]

    def write(self, last_epoch: int) -> None:
        """Write the rows up to an epoch that history.csv holds."""
        self.rows = [row for row in self.rows if row["epoch"] <= last_epoch]
        content = io.StringIO()
        pd.DataFrame(self.rows).to_csv(content, index=False, float_format="%.7g")
        if self.rows:
            write_atomically(self.path, content.getvalue())
