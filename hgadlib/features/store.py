"""Features of N images in device memory, host memory or a memory-mapped file, and batches out of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgadlib.datasets.images import parallel_map
from hgadlib.errors import InputError

Storage = Literal["auto", "device", "host", "file"]
# Share of what is free that features may take: the model, its gradients and the score maps need the rest.
_SHARE = 0.5
_AHEAD = 2  # batches gathered ahead of the one in use
_CHUNK = 64  # images copied at a time into their storage

_Items = TypeVar("_Items", NDArray[Any], "list[Any]", "tuple[Any, ...]")


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
        return sum(level.nbytes for level in self.levels)

    @property
    def channels(self) -> list[int]:
        """C_l per level."""
        return [level.shape[-1] for level in self.levels]

    def take(self, indices: NDArray[np.int64]) -> Features:
        """Take some of the images, without a copy where they lie side by side."""
        first, count = (int(indices[0]) if len(indices) else 0), len(indices)
        if np.array_equal(indices, np.arange(first, first + count)):
            levels = tuple(level[first : first + count] for level in self.levels)
        else:
            levels = tuple(level[torch.from_numpy(indices).to(level.device)] for level in self.levels)
        return replace(self, levels=levels)

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> list[Tensor]:
        """Fetch images (B,) as (B, H_l * W_l, C_l) float32 per level, to a device or where they lie."""
        target = self._target(device)
        return self._deliver(self._gather(indices, target), target)

    def batches(
        self, batches: Iterable[Tensor], device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield indices and what `batch` gives for them in turn, reading ahead where that saves waiting."""
        target = self._target(device)
        if self.levels[0].device == target and self.storage != "file":
            yield from ((indices, self.batch(indices, target)) for indices in batches)
            return

        def gather(indices: Tensor) -> tuple[Tensor, list[Tensor]]:
            return indices, self._gather(indices, target)

        # Gathering lets go of the interpreter lock; two readers keep a disk's queue from running dry.
        for indices, gathered in parallel_map(gather, batches, num_workers=_AHEAD, ahead=_AHEAD + 1):
            yield indices, self._deliver(gathered, target)

    def _target(self, device: torch.device | str | None) -> torch.device:
        return self.levels[0].device if device is None else resolve_device(device)

    def _gather(self, indices: Tensor, target: torch.device) -> list[Tensor]:
        indices = indices.to(self.levels[0].device)
        # From pinned memory the copy to the device runs beside the computation.
        pin = indices.device.type == "cpu" and target.type == "cuda"
        outs = [level.new_empty((len(indices), *level.shape[1:]), pin_memory=pin) for level in self.levels]
        return [torch.index_select(x, 0, indices, out=out) for x, out in zip(self.levels, outs, strict=True)]

    @staticmethod
    def _deliver(gathered: Sequence[Tensor], target: torch.device) -> list[Tensor]:
        return [level.to(target, non_blocking=True).float() for level in gathered]


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device, a CUDA device with its number: only so it compares equal to those of tensors."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def global_features(features: Features, *, level: int = -1) -> NDArray[np.float32]:
    """Average a level (the last tells classes apart best) over positions, scaled to length 1: (N, C)."""
    pooled = [rows.float().mean(dim=1) for rows in features.levels[level].split(_CHUNK)]
    return torch.nn.functional.normalize(torch.cat(pooled), dim=1).cpu().numpy()


def spread(items: _Items, count: int) -> _Items:
    """Take every n-th item, so that about `count` of them are spread evenly over all.

    >>> spread(list(range(10)), 5)
    [0, 2, 4, 6, 8]
    """
    return items[:: max(1, len(items) // count)]


def spread_sample(class_idx: NDArray[Any], n_classes: int, per_class: int) -> Tensor:
    """Take about per_class images of each class, spread evenly over it: sorted indices, int64."""
    members = [spread(np.flatnonzero(class_idx == k), per_class) for k in range(n_classes)]
    return torch.from_numpy(np.sort(np.concatenate(members)))


def free_host_bytes() -> int:
    """Find how much memory this process may still take, of the machine's or of its control group's."""
    free = int(psutil.virtual_memory().available)
    # psutil knows nothing of control groups, within which containers and cluster jobs run.
    root = Path("/sys/fs/cgroup")
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").split("0::", 1)[1].splitlines()[0]
    except (OSError, IndexError):
        return free
    for folder in {root, root / group.strip("/")}:
        try:
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit is written as "max"
            continue
        # Pages of files that nobody uses count as used, but are given back on demand.
        free = min(free, limit - used + int(facts.get("inactive_file", 0)))
    return max(0, free)


def choose_storage(nbytes: int, storage: Storage, device: torch.device) -> Literal["device", "host", "file"]:
    """Decide where features of so many bytes go, for training on a device; an InputError where no room is.

    "auto" takes the first of device, host and file that has room. On the CPU device and host are one.
    """
    if storage == "file":
        return storage
    rooms = {"host": free_host_bytes()}
    if device.type == "cuda":
        rooms["device"] = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        storage = "host" if storage == "device" else storage
    else:
        rooms["device"] = rooms["host"]  # shared memory
    if storage == "auto":
        if nbytes <= _SHARE * rooms.get("device", 0):
            return "device"
        return "host" if nbytes <= _SHARE * rooms["host"] else "file"
    if nbytes > rooms[storage]:
        raise InputError(
            f"features.storage: {storage} has {rooms[storage] / 1e9:.2f} GB free, the features need "
            f"{nbytes / 1e9:.2f} GB; set it to auto or file"
        )
    return storage


def fill_levels(
    shapes: Sequence[tuple[int, ...]], batches: Iterable[Sequence[Tensor]], dtype: str, device: torch.device
) -> list[Tensor]:
    """Gather batches of (B, H_l * W_l, C_l) per level into whole levels of the given shapes."""
    levels = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape in shapes]
    row = 0
    for batch in batches:
        for level, part in zip(levels, batch, strict=True):
            level[row : row + len(part)] = part
        row += len(batch[0])
    return levels


def place_levels(arrays: Sequence[NDArray[Any]], where: str, device: torch.device) -> list[Tensor]:
    """Copy memory-mapped levels to the "host" or the "device", or leave them in their "file".

    Raises:
        InputError: A level holds NaN or infinite values, which are never stored.
    """
    with warnings.catch_warnings():
        # PyTorch has no read-only tensors; the system refuses private writable maps larger than its memory.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        mapped = [torch.from_numpy(array) for array in arrays]
    for level, array in zip(mapped, arrays, strict=True):
        # The extremes of a NaN are NaN; they are found ten times as fast as isfinite would.
        if not all(torch.stack(chunk.aminmax()).isfinite().all() for chunk in level.split(_CHUNK)):
            file = Path(getattr(array, "filename", ""))
            raise InputError(
                f"{file}: these features hold NaN or infinite values, so the file has changed since it was "
                f"written; delete the folder {file.parent}, and the same call computes them again"
            )
    if where == "file":
        return mapped
    chunks = zip(*(level.split(_CHUNK) for level in mapped), strict=True)
    shapes, dtype = [array.shape for array in arrays], str(arrays[0].dtype)
    return fill_levels(shapes, chunks, dtype, device if where == "device" else torch.device("cpu"))
