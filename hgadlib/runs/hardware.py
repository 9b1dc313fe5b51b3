"""The machine: which device to compute on, what it is called, how much memory was needed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hgadlib.errors import InputError

_PACKAGES = ("torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-learn", "scikit-image", "safetensors")


def select_device(name: str = "auto") -> torch.device:
    """Choose CUDA, else Apple's GPU, else the processor; an InputError if a name is unknown or not there."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    try:
        device = torch.device(name)
        count = counts[device.type]
    except (RuntimeError, KeyError):
        raise InputError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if (device.index or 0) >= count:
        found = f"{count} {device.type} device(s)"
        raise InputError(f"device {name!r} is not there: found {found}; use -p device auto or cpu")
    return device


def device_name(device: torch.device) -> str:
    """Name a device as a person would."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def cpu_name() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_rate(device: torch.device, *, size: int = 1024, clock: Callable[[], float] | None = None) -> float:
    """Measure the median rate of float32 products of (size, size) matrices, in FLOP/s (two a multiply-add).

    A clock, in seconds, takes the place of the wall's, which waits for a GPU.
    """
    from torch.utils import benchmark  # it looks for compilers, which no run needs

    a = torch.randn(size, size, device=device)
    threads = torch.get_num_threads()
    timer = benchmark.Timer("a @ a", timer=clock or benchmark.timer, globals={"a": a}, num_threads=threads)
    return 2 * size**3 / timer.blocked_autorange().median


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Return the process's peak memory so far, in MB (10^6 bytes), of the host and of a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux and bytes on macOS
    host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
    gpu = round(torch.cuda.max_memory_allocated(device) / 1e6, 1) if device.type == "cuda" else None
    return {"peak_host_mb": host, "peak_device_mb": gpu}


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a run runs on: versions, hardware, commit, time."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda, "device": device_name(device), "cpu": cpu_name(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "commit": _commit(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # An installed copy may lie in somebody else's repository; its commit would say nothing of this code.
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return _git("describe", "--always", "--dirty", "--abbrev=12") if ours else None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
