"""Feature networks of timm with their weights loaded, or one line that says why they cannot be had."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm

from hgadlib.errors import InputError
from hgadlib.pretrained import (
    BUNDLED,
    bundled_weights_path,
    check_names_and_shapes,
    hub_weights,
    quiet_timm,
    read_weights,
)


def create_feature_network(name: str, out_indices: tuple[int, ...], weights: Path | str | None) -> Any:
    """Let timm build a network that gives feature maps, with its weights.

    Args:
        name: A model of timm, with or without a tag.
        out_indices: Stages to give, counted from 0, rising.
        weights: A weights file; None for the bundled or published ones; "random" for none.

    Returns:
        timm's feature network.

    Raises:
        InputError: The model, its stages or its weights cannot be had.
    """
    overlay, pretrained = _locate_weights(name, weights, _published(name))
    try:
        with quiet_timm():
            return _create(
                name,
                features_only=True,
                out_indices=out_indices,
                pretrained=pretrained,
                pretrained_cfg_overlay=overlay,
            )
    except (IndexError, AssertionError, ValueError) as error:
        stages = _create(name, features_only=True).feature_info.channels()
        raise InputError(
            f"features.out_indices: expected stages from 0 to {len(stages) - 1} of {name} "
            f"(channels {stages}), found {list(out_indices)}"
        ) from error
    except (RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"features.backbone: timm cannot give the feature maps of {name}: {reason}"
        ) from error


def _published(name: str) -> Any:
    """Look up timm's configuration of a model, with its normalisation and the address of its weights."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5) or ["timm.list_models()"]
        raise InputError(f"features.backbone: timm has no model {name!r}; see {', '.join(close)}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise InputError(
            f"features.backbone: timm has no weights {name!r}; its tags are {', '.join(tags)}"
        ) from error


def _locate_weights(name: str, weights: Path | str | None, config: Any) -> tuple[dict[str, Any], bool]:
    """Say what to lay over timm's configuration of a model, and whether timm is to load weights at all."""
    if weights == "random":
        return {}, False
    if weights is None and name != BUNDLED:
        return hub_weights(name, config), True
    path = bundled_weights_path() if weights is None else Path(weights)
    # timm forgives missing tensors of a feature network; so each is checked against the whole model first.
    state = read_weights(path)
    heads = (config.classifier,) if isinstance(config.classifier, str) else tuple(config.classifier or ())
    optional = tuple(f"{head}." for head in heads)
    expected = _create(name).state_dict()
    state = check_names_and_shapes(state, expected, optional=optional, source=str(path))
    return {"state_dict": state, "custom_load": False}, True


def _create(name: str, **kwargs: Any) -> Any:
    """Let timm build a model that takes images of any size, as far as it can."""
    flexible: list[dict[str, Any]] = [{}]
    if _published(name).fixed_input_size:
        # Patch transformers and windowed ones have different words for it; some have none.
        flexible = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
    for option in flexible[:-1]:
        try:
            return timm.create_model(name, **kwargs, **option)
        except TypeError:
            continue
    return timm.create_model(name, **kwargs, **flexible[-1])
