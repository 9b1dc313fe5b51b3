"""A frozen timm network: images (B, 3, H, W) -> feature maps, by stages or by an image pyramid."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from hgadlib.errors import InputError
from hgadlib.fast.convolution import fold_batch_norms
from hgadlib.features.weights import (
    BUNDLED,
    bundled_weights_path,
    check_names_and_shapes,
    hub_weights,
    quiet_timm,
    read_weights,
    weights_digest,
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


_AUTOCAST = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16}


# Pixels of the images that a processor runs through the network at a time.
_CACHED_PIXELS = 512 * 512


class Backbone(nn.Module):
    """A frozen network in evaluation mode that gives one feature map per level.

    Made by `build_backbone`. Its weights take no gradient and `train()` leaves it in evaluation mode; a
    gradient with respect to the images still flows.

    Attributes:
        name: timm's name of the network.
        out_indices: Stages taken, counted from 0.
        pyramid: Image sizes of the levels, pixels; None where the levels are stages.
        channels: C_l per level.
        strides: Pixels of the input per position, per level.
        mean: Normalisation that the weights expect, per channel, of values in 0..1.
        std: As mean.
        autocast: Number type of the convolutions; None for float32.
        weights_digest: sha256 of the tensors.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        out_indices: tuple[int, ...],
        pyramid: tuple[int, ...] | None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        autocast: str | None,
    ) -> None:
        super().__init__()
        self.name, self.out_indices, self.pyramid = name, out_indices, pyramid
        self.mean, self.std, self.autocast = mean, std, autocast
        info: Any = network.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = list(info.reduction())
        if pyramid is not None:
            self.channels *= len(pyramid)
            self.strides = [round(self.strides[0] * max(pyramid) / size) for size in pyramid]
        # timm's transformers with windows give (B, H, W, C).
        self._channels_last_maps = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        self.weights_digest = weights_digest(network.state_dict())
        folded = fold_batch_norms(network.eval().requires_grad_(False))
        self.network = folded.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: batch statistics of a few images would not be ImageNet's."""
        return super().train(False)

    @property
    def input_size(self) -> int | None:
        """The image size that a pyramid starts from, pixels; None where any size will do."""
        return None if self.pyramid is None else max(self.pyramid)

    def identity(self) -> dict[str, Any]:
        """Everything about this network that shapes a feature, ready for JSON."""
        return {
            "name": self.name,
            "weights": self.weights_digest,
            "out_indices": list(self.out_indices),
            "pyramid": None if self.pyramid is None else list(self.pyramid),
            "mean": list(self.mean),
            "std": list(self.std),
            "autocast": self.autocast,
            "timm": timm.__version__,
        }

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of some images, each image by itself.

        Args:
            images: (B, 3, H, W) float32, normalised with `mean` and `std`.

        Returns:
            One map per level, (B, C_l, H_l, W_l) float32.

        Raises:
            InputError: The images' size is not one that the network takes.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        if self.pyramid is None:
            return self._in_cache(images)
        height, width = images.shape[-2:]
        if height != self.input_size or width != self.input_size:
            raise InputError(
                f"image_size: a pyramid of {list(self.pyramid)} starts from images of {self.input_size} "
                f"pixels, found {height} x {width}"
            )
        maps = []
        for size in self.pyramid:
            scaled = images
            if size != self.input_size:
                scaled = F.interpolate(
                    images, size=(size, size), mode="bilinear", align_corners=False, antialias=True
                )
            maps += self._in_cache(scaled)
        return maps

    def _in_cache(self, images: Tensor) -> list[Tensor]:
        """Run the network on a processor over few images at a time: then activations stay in its cache.

        Lite0 at 512 pixels is half as fast again for it, and an image's features depend on no other image.
        """
        chunk = max(1, _CACHED_PIXELS // (images.shape[-2] * images.shape[-1]))
        if images.device.type != "cpu" or len(images) <= chunk:
            return self._stages(images)
        parts = [self._stages(part) for part in images.split(chunk)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def _stages(self, images: Tensor) -> list[Tensor]:
        dtype = _AUTOCAST[self.autocast]
        try:
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                maps = self.network(images)
        except AssertionError as error:  # timm's word for a size that patches or windows do not divide
            raise InputError(
                f"image_size: {self.name} does not take {tuple(images.shape[-2:])}: {error}"
            ) from error
        if self._channels_last_maps:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        return [level.float() for level in maps]

    @torch.no_grad()
    def grids(self, image_size: int) -> list[tuple[int, int]]:
        """Find (H_l, W_l) of each level for square images, by one forward pass of an empty one.

        Args:
            image_size: Side of the images, pixels.

        Raises:
            InputError: The network does not take images of that size.
        """
        device = next(self.network.parameters()).device
        try:
            maps = self(torch.zeros(1, 3, image_size, image_size, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # branches of different size, or nothing left after the strides
            raise InputError(
                f"image_size: {self.name} does not take images of {image_size} pixels ({error}); "
                "try a multiple of 32"
            ) from error
        return [(level.shape[2], level.shape[3]) for level in maps]


def flatten_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn maps (B, C, H, W) into positions in rows, (B, H*W, C); without a copy for channels_last maps."""
    return [level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps]


def build_backbone(
    name: str = BUNDLED,
    *,
    out_indices: Sequence[int] = (2, 3),
    pyramid: Sequence[int] | None = None,
    weights: Path | str | None = None,
    autocast: str | None = None,
) -> Backbone:
    """Build a frozen feature network.

    Args:
        name: A model of timm, with or without a tag, such as "tf_efficientnet_b6.aa_in1k".
        out_indices: Stages to take as levels, counted from 0, rising.
        pyramid: Image sizes in pixels; one stage is then taken at each of them, as the released code does.
        weights: A weights file (see `hgadlib.features.weights.read_weights`); None for the bundled weights
            (tf_efficientnet_lite0) or timm's published ones; "random" for none, to count operations only.
        autocast: "bfloat16" or "float16" for faster, coarser convolutions; None for float32.

    Returns:
        The backbone, on the host.

    Raises:
        InputError: The model, its stages or its weights cannot be had; the line says what to do.
    """
    if autocast not in _AUTOCAST:
        raise InputError(f"features.autocast: expected bfloat16, float16 or null, found {autocast!r}")
    indices = tuple(out_indices)
    if not indices or any(b <= a for a, b in zip((-1, *indices), indices, strict=False)):
        raise InputError(
            f"features.out_indices: expected rising stages from 0, such as [2, 3], found {list(indices)}"
        )
    if pyramid is not None and (len(indices) != 1 or not pyramid or min(pyramid) < 1):
        raise InputError(
            "features.pyramid: expected image sizes and exactly one stage in features.out_indices, "
            f"found sizes {list(pyramid)} and stages {list(indices)}"
        )
    network = create_feature_network(name, indices, weights)
    data = resolve_model_data_config(network)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    sizes = None if pyramid is None else tuple(pyramid)
    return Backbone(
        network, name=name, out_indices=indices, pyramid=sizes, mean=mean, std=std, autocast=autocast
    )
