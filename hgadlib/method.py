"""What every method has that is trained, scored and compared here: classes, levels, constants, a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hgadlib.errors import InputError
from hgadlib.features.store import Features
from hgadlib.files import replacing
from hgadlib.scoring import (
    Calibration,
    Constants,
    LevelValues,
    Normalisation,
    inductive,
    normal_statistics,
    raw,
)


class Method(nn.Module):
    """A way to tell anomalies from features: HGAD, and what it is compared with.

    A subclass gives :meth:`level_values`, and either learns epoch by epoch (:meth:`losses`) or in one pass
    (:meth:`fit`). Its values are surprising where they are low.

    Args:
        classes: Names of the K classes; their order is the class index.
        channels: C of each level of features.
        grids: (H, W) of each level of features.
        value_grids: (h, w) of each level of values; None where they are the features'.
        entropy: Whether its values have negative entropies beside log-likelihoods.
    """

    learns: ClassVar[bool] = True
    """Whether it takes epochs, or one pass."""
    has_constants: bool = False
    """Whether its values are normalised by what is stored of normal images; else its scores are raw."""

    log_prob_max: Tensor
    neg_entropy_max: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        value_grids: Sequence[tuple[int, int]] | None = None,
        entropy: bool = False,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.channels = tuple(channels)
        self.grids = tuple((int(h), int(w)) for h, w in grids)
        self.value_grids = self.grids if value_grids is None else tuple((h, w) for h, w in value_grids)
        self.has_entropy = entropy
        # Largest value of each class and level among the training features: see scoring.inductive.
        maxima = torch.zeros(len(self.classes), len(self.value_grids))
        self.register_buffer("log_prob_max", maxima.clone())
        self.register_buffer("neg_entropy_max", maxima.clone())
        # What normal features' values are like by class and position, log-likelihood first: see
        # scoring.Calibration. Deviations are more than 0 once known.
        for level, grid in enumerate(self.value_grids if self.has_constants else ()):
            for name in ("normal_mean", "normal_std"):
                values = torch.zeros(len(self.classes), 1 + self.has_entropy, *grid)
                self.register_buffer(f"{name}_{level}", values)
        self.eval()  # only the epochs of a fit are training, where values may be dropped

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.log_prob_max.device

    def checked(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Refuse features of another shape than those it was made for."""
        expected = [(h * w, c) for (h, w), c in zip(self.grids, self.channels, strict=True)]
        found = [tuple(x.shape[1:]) for x in features]
        if found != expected:
            raise InputError(
                f"expected features of {expected} positions and channels, level by level, found {found}; "
                "take the backbone, the levels and the image size that the model was trained with"
            )
        return features

    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute what scores are made of.

        Args:
            features: One (B, H*W, C) a level.
            class_idx: Class of each image, (B,).
            entropy: Compute entropies, too, where there are any; scores by likelihood do not need them.
        Returns:
            One (B, h, w) a level; the lower, the more surprising.
        """
        raise NotImplementedError

    def inferred_values(
        self, features: Sequence[Tensor], *, entropy: bool = True
    ) -> tuple[LevelValues, Tensor, Tensor]:
        """Infer each image's class and compute its values under it; see :meth:`hgadlib.model.HGAD`'s.

        Raises:
            InputError: The method cannot tell classes apart.
        """
        raise InputError(
            f"class inference: {type(self).__name__} tells no classes apart; say which class each image is of"
        )

    def losses(
        self, features: Sequence[Tensor], class_idx: Tensor, **settings: Any
    ) -> list[dict[str, Tensor]]:
        """Compute the loss terms of a batch, one dictionary or several, each with its "total".

        Args:
            features: One (B, H*W, C) a level.
            class_idx: (B,).
            **settings: Of HGAD's loss and fit; others take what they need.
        """
        raise NotImplementedError

    def fit(
        self,
        features: Features,
        class_idx: np.ndarray,
        held_out: tuple[Features, np.ndarray] | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Learn in one pass.

        Args:
            features: Of the N training images.
            class_idx: (N,).
            held_out: Features and classes of normal images held out of training.
            seed: Of all that is drawn.
        Returns:
            A history as of :func:`hgadlib.training.fit`, of one pass.
        """
        raise NotImplementedError

    def undecayed(self) -> list[nn.Parameter]:
        """List the parameters that weight decay leaves alone."""
        return []

    def calibrate(
        self,
        batches: Iterable[tuple[LevelValues, Tensor]],
        held_out: Iterable[tuple[LevelValues, Tensor]] = (),
        *,
        only: Sequence[int] | None = None,
    ) -> None:
        """Store each class's constants: what its scores are normalised by.

        The inductive ones are its largest values among the training features; the calibrated ones are
        means and deviations, of the features held out, or of the training features where there are none.

        Args:
            batches: Level values of training images, and their class indices.
            held_out: Likewise, of normal images held out of training.
            only: Indices of the classes to calibrate; the others keep their constants. None for all.
        Raises:
            FloatingPointError: A value is not finite: the weights are not, or a class has no images.
        """
        lowest = torch.full_like(self.log_prob_max, -torch.inf)
        log_prob_max, neg_entropy_max = lowest.clone(), lowest.clone()
        # Images, and sums of values and of their squares, of training (0) and held-out (1) images.
        count = torch.zeros(2, len(self.classes), dtype=torch.float64, device=self.device)
        sums = [count.new_zeros(2, *count.shape, 1 + self.has_entropy, *grid) for grid in self.value_grids]
        for source, part in enumerate((batches, held_out)):
            for values, class_idx in part:
                for k in class_idx.unique().tolist():
                    own = values[class_idx == k]
                    count[source, k] += len(own)
                    kinds = (own.log_prob, own.neg_entropy) if self.has_entropy else (own.log_prob,)
                    for total, *levels in zip(sums, *kinds, strict=True):
                        x = torch.stack(levels, 1).double()
                        total[:, source, k] += torch.stack([x.sum(0), x.square().sum(0)])
                    if source:
                        continue
                    constants = inductive(own)
                    log_prob_max[k] = torch.maximum(log_prob_max[k], constants.log_prob_max)
                    if self.has_entropy:
                        neg_entropy_max[k] = torch.maximum(neg_entropy_max[k], constants.neg_entropy_max)
        if not self.has_entropy:
            neg_entropy_max.zero_()
        chosen = (count[1] > 0).long(), torch.arange(len(self.classes), device=self.device)
        found = [normal_statistics(count[chosen], x[0][chosen], x[1][chosen]) for x in sums]
        own_classes = list(range(len(self.classes)) if only is None else only)
        constants_found = [log_prob_max, neg_entropy_max, *(x for pair in found for x in pair)]
        if not all(x[own_classes].isfinite().all() for x in constants_found):
            raise FloatingPointError(
                "log-likelihoods of the training images are not finite; lower train.lr or set "
                "train.gradient_clip, and see that every class has training images"
            )
        names = [f"normal_{what}_{level}" for level in range(len(found)) for what in ("mean", "std")]
        for name, x in zip(["log_prob_max", "neg_entropy_max", *names], constants_found, strict=True):
            self.get_buffer(name)[own_classes] = x[own_classes].to(self.log_prob_max)

    @property
    def is_calibrated(self) -> bool:
        """Whether it knows the means and deviations of normal values; files of before lack them."""
        return self.has_constants and bool(self.get_buffer("normal_std_0").gt(0).all())

    def class_idx(self, names: Iterable[str]) -> Tensor:
        """Look up classes by name: (B,) int64, on the model's device.

        Raises:
            InputError: A name is none of the model's classes.
        """
        own = list(names)
        if strange := sorted(set(own) - set(self.classes)):
            raise InputError(f"unknown class {strange[0]!r}; this model knows {', '.join(self.classes)}")
        return torch.tensor([self.classes.index(n) for n in own], dtype=torch.int64, device=self.device)

    def normalisation(self, class_idx: Tensor) -> Normalisation:
        """Return the stored maxima, (B, L), for images of these classes."""
        return Normalisation(self.log_prob_max, self.neg_entropy_max)[class_idx]

    def constants(self, class_idx: Tensor, normalisation: str) -> Constants:
        """Return what turns the values of images of these classes, (B,), into maps.

        Args:
            class_idx: The classes.
            normalisation: "calibrated", or "raw" (values as they are), or else the maxima.
        Raises:
            InputError: The model has no means and deviations.
        """
        if normalisation == "raw":
            return raw(len(self.value_grids), entropy=self.has_entropy).to(self.device)
        if normalisation != "calibrated":
            return self.normalisation(class_idx)
        if not self.is_calibrated:
            raise InputError(
                "score.normalisation calibrated: expected a model with statistics of normal features, found "
                "one without; train it anew, or call hgadlib.training.calibrate with its images"
            )

        def stored(name: str) -> LevelValues:
            levels = [self.get_buffer(f"{name}_{level}")[class_idx] for level in range(len(self.value_grids))]
            log_prob, *neg_entropy = zip(*(x.unbind(-3) for x in levels), strict=True)
            return LevelValues(log_prob, *neg_entropy or [()])

        return Calibration(stored("normal_mean"), stored("normal_std"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Files of before lack the statistics of calibrated scores; as zeros they are unknown.
        for name, own in self.named_buffers(recurse=False):
            if name.startswith("normal_"):
                state_dict.setdefault(prefix + name, torch.zeros_like(own))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {
            "classes": list(self.classes),
            "channels": list(self.channels),
            "grids": [list(grid) for grid in self.grids],
        }

    @classmethod
    def restored(cls, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Build the model that :meth:`architecture` describes, with these weights."""
        model = cls(**architecture)
        model.load_state_dict(tensors)
        return model

    def save(self, path: Path) -> None:
        """Write weights and architecture to one safetensors file, atomically."""
        write_tensors(path, dict(self.state_dict()), {"hgad": json.dumps(self.architecture())})

    @classmethod
    def load(cls, path: Path | str, device: str | torch.device = "cpu") -> Self:
        """Read a model that :meth:`save` wrote.

        Raises:
            InputError: The file is missing, truncated, or holds something else.
        """
        tensors, metadata = read_tensors(path)
        if "hgad" not in metadata:
            raise InputError(
                f"{path}: expected a model of this library, found safetensors without its description"
            )
        try:
            model = cls.restored(json.loads(metadata["hgad"]), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: expected a model of this version of the library, found another: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None
        return model.to(device)


def one_pass(total: float, started: float, images: int) -> pd.DataFrame:
    """Compose the history of a method that learns in one pass.

    Args:
        total: What stands for the loss.
        started: When it began, by :func:`time.perf_counter`.
        images: That it learnt from.
    """
    seconds = time.perf_counter() - started
    row = {"epoch": 1, "total": total, "seconds": seconds, "images_per_s": images / seconds}
    return pd.DataFrame([row])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file from tensors on any device, atomically."""
    with replacing(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # its word for a full disk too
            raise OSError(str(error)) from None


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        InputError: The file is missing or is not whole.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: expected a safetensors file, found none")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: expected a whole safetensors file, found: {error}") from None
