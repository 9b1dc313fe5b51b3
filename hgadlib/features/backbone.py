"""A frozen timm network: images (B, 3, H, W) -> feature maps, by stages, joined or not, or a pyramid."""

from __future__ import annotations

import contextlib
import difflib
import logging
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
from hgadlib.fast.memory import in_parts
from hgadlib.features import weights as sources
from hgadlib.features.weights import BUNDLED

# Pixels of the images that go through the network at a time, on a processor.
_PART_PIXELS = 512 * 512


class Backbone(nn.Module):
    """A frozen network that gives one feature map per level, made by `build_backbone`.

    Its weights take no gradient and `train()` leaves it in evaluation mode; a gradient with respect to the
    images still flows.

    Attributes:
        name: timm's name of the network.
        out_indices: Stages taken, counted from 0.
        pyramid: Image sizes of the levels, pixels; None where the levels are stages.
        join: Whether several stages make one level (per image size).
        neighbourhood: Positions a side over which each stage is averaged.
        image: Side of the image itself, the last level; None where it is none.
        channels: C_l per level.
        mean, std: Normalisation that the weights expect, per channel, of values in 0..1.
        weights_digest: sha256 of the tensors.
    """

    def __init__(
        self, network: Any, *, name: str, out_indices: tuple[int, ...], pyramid: tuple[int, ...] | None,
        join: bool, neighbourhood: int, image: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.out_indices, self.pyramid = name, out_indices, pyramid
        self.join, self.neighbourhood, self.image = join, neighbourhood, image
        data = resolve_model_data_config(network)
        self.mean: tuple[float, float, float] = tuple(data["mean"])
        self.std: tuple[float, float, float] = tuple(data["std"])
        stages: list[int] = network.feature_info.channels() if out_indices else []
        self.channels = ([sum(stages)] if join else stages) * (1 if pyramid is None else len(pyramid))
        self.channels += [] if image is None else [3]
        # timm's transformers with windows give (B, H, W, C).
        self._channels_last_maps = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        self.weights_digest = sources.weights_digest(network.state_dict())
        folded = fold_batch_norms(network.eval().requires_grad_(False))
        self.network = folded.to(memory_format=torch.channels_last)
        self.eval()

    def with_folded(self, state: dict[str, Tensor], digest: str) -> Self:
        """Take the weights that another of the same settings has in memory, and the digest of its file's."""
        self.network.load_state_dict(state)
        self.weights_digest = digest
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: batch statistics of a few images would not be ImageNet's."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Return everything about this network that shapes a feature, ready for JSON."""
        return {
            "name": self.name, "weights": self.weights_digest, "out_indices": list(self.out_indices),
            "pyramid": None if self.pyramid is None else list(self.pyramid),
            "mean": list(self.mean), "std": list(self.std), "timm": timm.__version__,
            # Features stored before there were these settings stay valid.
            **({"join": True} if self.join else {}),
            **({"neighbourhood": self.neighbourhood} if self.neighbourhood > 1 else {}),
            **({"image": self.image} if self.image is not None else {}),
        }  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute one map per level, (B, C_l, H_l, W_l) float32, of each image by itself.

        Args:
            images: (B, 3, H, W) float32, normalised with `mean` and `std`.
        Raises:
            InputError: The images' size is not one that the network takes.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        itself = [] if self.image is None else [_resized(images, self.image)]
        if not self.out_indices:
            return itself
        if self.pyramid is None:
            return self._in_parts(images) + itself
        (height, width), largest = images.shape[-2:], max(self.pyramid)
        if not height == width == largest:
            raise InputError(
                f"image_size: a pyramid of {list(self.pyramid)} starts from images of {largest} pixels, "
                f"found {height} x {width}"
            )
        maps = []
        for size in self.pyramid:
            maps += self._in_parts(_resized(images, size))
        return maps + itself

    def _in_parts(self, images: Tensor) -> list[Tensor]:
        """Run few images at a time, to stay in a processor's cache (Lite0 at 512 is half as fast again)."""
        size = max(1, _PART_PIXELS // (images.shape[-2] * images.shape[-1]))
        size = size if images.device.type == "cpu" else len(images)
        parts = in_parts(lambda part: self._stages(images[part]), len(images), size)
        return parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]

    def _stages(self, images: Tensor) -> list[Tensor]:
        try:
            maps = self.network(images)
        except AssertionError as error:  # timm's word for a size that patches or windows do not divide
            size = tuple(images.shape[-2:])
            raise InputError(f"image_size: {self.name} does not take {size}: {error}") from error
        if self._channels_last_maps:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if (n := self.neighbourhood) > 1:
            # Beside the border the mean is of the positions that there are.
            maps = [F.avg_pool2d(m, n, stride=1, padding=n // 2, count_include_pad=False) for m in maps]
        if self.join:
            finest = maps[0].shape[-2:]
            coarse = [F.interpolate(m, finest, mode="bilinear", align_corners=False) for m in maps[1:]]
            maps = [torch.cat([maps[0], *coarse], 1)]
        return list(maps)

    @torch.no_grad()
    def grids(self, image_size: int) -> list[tuple[int, int]]:
        """Find (H_l, W_l) of each level for square images of a side, pixels; an InputError of a wrong one."""
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


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, side, mode="bilinear", antialias=True)


def flatten_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn maps (B, C, H, W) into positions in rows, (B, H*W, C); without a copy for channels_last maps."""
    return [level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps]


def build_backbone(
    name: str = "tf_efficientnet_lite0",
    *,
    out_indices: Sequence[int] = (2, 3),
    pyramid: Sequence[int] | None = None,
    weights: Path | str | None = None,
    join: bool = False,
    neighbourhood: int = 1,
    image: int | None = None,
) -> Backbone:
    """Build a frozen feature network, on the host.

    Args:
        name: A model of timm, with or without a tag, such as "tf_efficientnet_b6.aa_in1k".
        out_indices: Stages to take as levels, counted from 0, rising.
        pyramid: Image sizes in pixels; one stage is then taken at each of them, as the released code does, or
            several joined.
        weights: A weights file (see `hgadlib.features.weights.read_weights`); None for the bundled weights
            (tf_efficientnet_lite0, 1 and 2) or timm's published ones; "random" for none, to count operations
            only.
        join: Join the stages' channels into one level, each enlarged to the first one's grid.
        neighbourhood: Average each stage over this many positions a side first; odd, 1 for none.
        image: Give the image itself too, at this side in pixels, as the last level, or as the only one.
    Raises:
        InputError: The model, its stages or its weights cannot be had; the line says what to do.
    """
    indices = tuple(out_indices)
    if not (indices or image) or any(b <= a for a, b in zip((-1, *indices), indices, strict=False)):
        raise InputError(
            f"features.out_indices: expected rising stages from 0, such as [2, 3], found {list(indices)}"
        )
    join = join and len(indices) > 1  # one stage is itself
    if pyramid is not None and ((len(indices) != 1 and not join) or not pyramid or min(pyramid) < 1):
        raise InputError(
            "features.pyramid: expected image sizes and exactly one stage in features.out_indices (or "
            f"features.join), found sizes {list(pyramid)} and stages {list(indices)}"
        )
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise InputError(f"features.neighbourhood: expected an odd number from 1, found {neighbourhood}")
    # Without stages the network is there for its normalisation alone.
    network = create_feature_network(name, indices or (0,), weights)
    return Backbone(
        network, name=name, out_indices=indices, pyramid=tuple(pyramid) if pyramid else None,
        join=join, neighbourhood=neighbourhood, image=image,
    )  # fmt: skip


def create_feature_network(name: str, out_indices: tuple[int, ...], weights: Path | str | None) -> Any:
    """Create timm's feature network with its weights; arguments and errors as of `build_backbone`."""
    config, trained = _published(name), weights != "random"
    overlay: dict[str, Any] = {}
    if weights is None and name not in BUNDLED:
        overlay = sources.hub_weights(name, config)
    elif trained:
        path = sources.bundled_weights_path(name) if weights is None else Path(weights)
        heads = [config.classifier] if isinstance(config.classifier, str) else config.classifier or ()
        # timm forgives missing tensors of a feature network, so each is checked against the whole model.
        expected, optional = _create(name).state_dict(), tuple(f"{head}." for head in heads)
        state = sources.fit_weights(sources.read_weights(path), expected, optional=optional, source=str(path))
        overlay = {"state_dict": state, "custom_load": False}
    # timm would warn of a classifier that a feature network has no use for.
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return _create(
            name, features_only=True, out_indices=out_indices, pretrained=trained,
            pretrained_cfg_overlay=overlay,
        )  # fmt: skip
    except (IndexError, AssertionError, ValueError) as error:
        stages = _create(name, features_only=True).feature_info.channels()
        raise InputError(
            f"features.out_indices: expected stages from 0 to {len(stages) - 1} of {name} "
            f"(channels {stages}), found {list(out_indices)}"
        ) from error
    except (RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"features.backbone: timm cannot give feature maps of {name}: {reason}") from error
    finally:
        logger.setLevel(level)


def _published(name: str) -> Any:
    """Look up timm's configuration of a model, with its normalisation and the address of its weights."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5) or ["timm.list_models()"]
        raise InputError(f"features.backbone: timm has no model {name!r}; see {', '.join(close)}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(t.partition(".")[2] for t in timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise InputError(f"features.backbone: timm has no weights {name!r}; its tags are {tags}") from error


def _create(name: str, **kwargs: Any) -> Any:
    """Create a timm model that takes images of any size, as far as it can."""
    if _published(name).fixed_input_size:
        # Patch transformers and windowed ones have different words for it; some have none.
        for flexible in ({"dynamic_img_size": True}, {"strict_img_size": False}):
            with contextlib.suppress(TypeError):
                return timm.create_model(name, **{**kwargs, **flexible})
    return timm.create_model(name, **kwargs)
