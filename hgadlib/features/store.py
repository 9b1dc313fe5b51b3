"""Features of N images in device memory, host memory or a memory-mapped file, and batches out of them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgadlib.errors import InputError

STORAGES = ("auto", "device", "host", "file")
# Shares of what is free that features may take: the model, its gradients and the score maps need the rest.
_DEVICE_SHARE, _HOST_SHARE = 0.5, 0.5
# Batches gathered ahead of the one in use.
_AHEAD = 2
# Images copied at a time into their storage.
_CHUNK = 64


@dataclass(frozen=True)
class Features:
    """The features of N images, to be read only.

    Attributes:
        levels: Per level (N, H_l * W_l, C_l), float16 or float32; rows of the grid one after the other.
        grids: (H_l, W_l) per level.
        key: sha256 of everything that shaped them.
        storage: "device", "host" or "file".
        cached: Whether they were found in the cache.
        seconds: What it took to compute or find them.
    """

    levels: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]
    key: str
    storage: str
    cached: bool
    seconds: float

    def __len__(self) -> int:
        """Count the images, N."""
        return len(self.levels[0])

    @property
    def nbytes(self) -> int:
        """Size of all levels, bytes."""
        return sum(level.numel() * level.element_size() for level in self.levels)

    @property
    def channels(self) -> list[int]:
        """C_l per level."""
        return [level.shape[-1] for level in self.levels]

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> list[Tensor]:
        """Fetch the features of some images.

        Args:
            indices: (B,) int64, on any device.
            device: Where to; None for where the features lie.

        Returns:
            Per level (B, H_l * W_l, C_l) float32.
        """
        target = self._target(device)
        return self._deliver(self._gather(indices, target), target)

    def batches(
        self, batches: Iterable[Tensor], device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Fetch one batch after the other, reading ahead where that saves waiting.

        Args:
            batches: Indices (B,) int64 of each batch.
            device: Where to; None for where the features lie.

        Yields:
            The indices and, per level, (B, H_l * W_l, C_l) float32.
        """
        target = self._target(device)
        if self.levels[0].device == target and self.storage != "file":
            for indices in batches:
                yield indices, self.batch(indices, target)
            return
        pending: deque[tuple[Tensor, Future[list[Tensor]]]] = deque()
        # Gathering lets go of the interpreter lock; two readers keep a disk's queue from running dry.
        pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="features")
        try:
            for indices in batches:
                pending.append((indices, pool.submit(self._gather, indices, target)))
                if len(pending) > _AHEAD:
                    ready, gathered = pending.popleft()
                    yield ready, self._deliver(gathered.result(), target)
            for ready, gathered in pending:
                yield ready, self._deliver(gathered.result(), target)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _target(self, device: torch.device | str | None) -> torch.device:
        return self.levels[0].device if device is None else with_index(device)

    def _gather(self, indices: Tensor, target: torch.device) -> list[Tensor]:
        source = self.levels[0].device
        indices = indices.to(source)
        # From pinned memory the copy to the device runs beside the computation.
        pin = source.type == "cpu" and target.type == "cuda"
        gathered = []
        for level in self.levels:
            shape = (len(indices), *level.shape[1:])
            out = torch.empty(shape, dtype=level.dtype, device=source, pin_memory=pin)
            gathered.append(torch.index_select(level, 0, indices, out=out))
        return gathered

    @staticmethod
    def _deliver(gathered: Sequence[Tensor], target: torch.device) -> list[Tensor]:
        return [level.to(target, non_blocking=True).float() for level in gathered]


def with_index(device: torch.device | str) -> torch.device:
    """Name a CUDA device by its number, so that devices compare equal to those of tensors."""
    named = torch.device(device)
    # The annotation says int, yet a device without a number has None.
    index: int | None = named.index
    if named.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return named


def global_features(features: Features, *, level: int = -1) -> NDArray[np.float32]:
    """Average each image's features over its positions, scaled to length 1, to tell classes apart.

    Args:
        features: The features of N images.
        level: The level to take; the last one says most about what is shown.

    Returns:
        (N, C) float32.
    """
    chosen = features.levels[level]
    pooled = [rows.float().mean(dim=1) for rows in chosen.split(_CHUNK)]
    return torch.nn.functional.normalize(torch.cat(pooled), dim=1).cpu().numpy()


def free_host_bytes() -> int:
    """Find how much memory this process may still take, of the machine's or of its control group's."""
    free = int(psutil.virtual_memory().available)
    root = Path("/sys/fs/cgroup")
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").split("0::", 1)[1].splitlines()[0]
    except (OSError, IndexError):
        return free
    for folder in {root, root / group.strip("/")}:
        try:
            limit = int((folder / "memory.max").read_text(encoding="utf-8"))
            used = int((folder / "memory.current").read_text(encoding="utf-8"))
            facts = dict(
                line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
        except (OSError, ValueError):  # no limit is written as "max"
            continue
        # Pages of files that nobody uses count as used, but are given back on demand.
        free = min(free, limit - used + int(facts.get("inactive_file", 0)))
    return max(0, free)


def choose_storage(nbytes: int, storage: str, device: torch.device) -> str:
    """Decide where features go.

    Args:
        nbytes: Their size, bytes.
        storage: "auto" for the first of device, host and file that has room; or one of them.
        device: Where training will run. On the CPU device and host are one.

    Returns:
        "device", "host" or "file".

    Raises:
        InputError: The storage is unknown or has no room.
    """
    if storage not in STORAGES:
        raise InputError(f"features.storage: expected one of {', '.join(STORAGES)}, found {storage!r}")
    if storage == "file":
        return "file"
    rooms = {"host": free_host_bytes()}
    if device.type == "cuda":
        rooms["device"] = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        storage = "host" if storage == "device" else storage
    else:
        rooms["device"] = rooms["host"]  # shared memory
    if storage == "auto":
        if nbytes <= _DEVICE_SHARE * rooms.get("device", 0):
            return "device"
        return "host" if nbytes <= _HOST_SHARE * rooms["host"] else "file"
    if nbytes > rooms[storage]:
        raise InputError(
            f"features.storage: {storage} has {rooms[storage] / 1e9:.2f} GB free, the features need "
            f"{nbytes / 1e9:.2f} GB; set it to auto or file"
        )
    return storage


def empty_levels(
    shapes: Sequence[tuple[int, int, int]], dtype: str, where: str, device: torch.device
) -> list[Tensor]:
    """Reserve memory for levels of the given shapes on the host or on the device."""
    target = device if where == "device" else torch.device("cpu")
    return [torch.empty(shape, dtype=getattr(torch, dtype), device=target) for shape in shapes]


def place_levels(arrays: Sequence[NDArray[Any]], where: str, device: torch.device) -> list[Tensor]:
    """Bring memory-mapped levels to where they are kept.

    Args:
        arrays: (N, H_l * W_l, C_l) each.
        where: "device", "host" or "file"; the latter leaves them where they are.
        device: The device.
    """
    with warnings.catch_warnings():
        # PyTorch knows no read-only tensors. A private writable map would not do: the system refuses
        # those that are larger than its memory.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        mapped = [torch.from_numpy(array) for array in arrays]
    if where == "file":
        return mapped
    shapes = [(array.shape[0], array.shape[1], array.shape[2]) for array in arrays]
    levels = empty_levels(shapes, str(arrays[0].dtype), where, device)
    for level, source in zip(levels, mapped, strict=True):
        for target, rows in zip(level.split(_CHUNK), source.split(_CHUNK), strict=True):
            target.copy_(rows)
    return levels


def spread_sample(class_idx: np.ndarray, n_classes: int, per_class: int) -> Tensor:
    """Take about per_class images of each class, spread evenly over it: sorted indices, int64."""
    members = [np.flatnonzero(class_idx == k) for k in range(n_classes)]
    return torch.from_numpy(np.sort(np.concatenate([m[:: max(1, len(m) // per_class)] for m in members])))
