"""A model for each class, behind the face of one: the one-for-one setting (paper Tab. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from hgadlib.baselines import METHODS
from hgadlib.config import Config
from hgadlib.method import Method
from hgadlib.scoring import LevelValues


def model_type(config: Config) -> type[Method]:
    """Find the type of the model that a configuration trains."""
    return OneForOne if config.setting == "one_for_one" else METHODS[config.method]


class OneForOne(Method):
    """Scores each image by the model of its class, which must be known.

    Args:
        models: Of one method, each of one class, on the same features.
    """

    def __init__(self, models: Sequence[Method]) -> None:
        first = models[0]
        self.has_constants = first.has_constants
        names = [name for model in models for name in model.classes]
        super().__init__(names, first.channels, first.grids, value_grids=first.value_grids)
        self.models = nn.ModuleList(models)

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute log-likelihoods, or what stands for them, as of :meth:`Method.level_values`."""
        features = self.checked(features)
        x = features[0]
        out = tuple(x.new_empty(len(x), *grid) for grid in self.value_grids)
        for k in class_idx.unique().tolist():
            own = class_idx == k
            alone = torch.zeros_like(class_idx[own])  # its only class
            found = cast(Method, self.models[k]).level_values(
                [level[own] for level in features], alone, entropy=False
            )
            for values, mine in zip(out, found.log_prob, strict=True):
                values[own] = mine
        return LevelValues(out, ())

    def architecture(self) -> dict[str, Any]:
        """Return the method and the arguments of each model, as plain values."""
        models = [cast(Method, model) for model in self.models]
        (name,) = {name for name, own in METHODS.items() if type(models[0]) is own}
        return {"method": name, "models": [model.architecture() for model in models]}

    @classmethod
    def restored(cls, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Build the models that :meth:`architecture` describes, with these weights."""
        models = []
        for k, own in enumerate(architecture["models"]):
            prefix = f"models.{k}."
            mine = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
            models.append(METHODS[architecture["method"]].restored(own, mine))
        made = cls(models)
        made.load_state_dict(tensors)
        return made
