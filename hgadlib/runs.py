"""A run's directory: written so that a kill at any moment leaves a whole record or one that resumes."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from hgadlib.config import Config, config_from_dict, run_dir
from hgadlib.errors import InputError

SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-learn", "scikit-image", "safetensors")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then move it in place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


class RunDirectory:
    """The files of one run.

    ``config.yaml`` comes first and names the run; ``metrics.json`` comes last and says that it is whole.
    In between ``history.csv`` and ``checkpoint.safetensors`` grow by an epoch at a time.

    Args:
        path: The directory.
        config: The run's configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def open(cls, config: Config) -> RunDirectory:
        """Start a run's directory, or take up one of the same configuration.

        A default directory that holds another configuration's run is moved aside, never overwritten;
        one that was named by run_dir is refused.

        Raises:
            InputError: The directory cannot be written, or holds another run.
        """
        path = run_dir(config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"run_dir {path}: expected a folder that can be written, found: {error.strerror}"
            ) from None
        stored = path / "config.yaml"
        if stored.is_file():
            other = read_config(path)
            if other.digest != config.digest:
                changed = ", ".join(_differences(other.identity(), config.identity()))
                if config.run_dir is not None:
                    raise InputError(
                        f"run_dir {path} holds a run of another configuration (differs in {changed}); "
                        "name another run_dir or move that one away"
                    )
                aside = path.with_name(f"{path.name}.{other.digest[:8]}")
                if aside.exists():
                    raise InputError(f"{path} and {aside.name} both hold earlier runs; move one away")
                os.replace(path, aside)
                print(f"earlier run moved to {aside.name} (differs in {changed})")
                path.mkdir()
        elif any(path.iterdir()):
            raise InputError(
                f"run_dir {path}: expected an empty folder or a run, found other files; name another one"
            )
        write_atomically(stored, yaml.safe_dump(config.to_dict(), sort_keys=False))
        return cls(path, config)

    @property
    def complete(self) -> bool:
        """Whether the record is whole."""
        return (self.path / "metrics.json").is_file()

    @property
    def checkpoint(self) -> Path:
        """Where training resumes from."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """The trained weights and what is needed to load them."""
        return self.path / "model.safetensors"

    def write_history(self, history: pd.DataFrame) -> None:
        """Write history.csv."""
        write_atomically(self.path / "history.csv", history.to_csv(index=False))

    def write_environment(self, device: torch.device) -> None:
        """Write environment.json: versions, hardware, commit."""
        write_atomically(self.path / "environment.json", json.dumps(environment(device), indent=1))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write NAME.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type, unused-ignore]
        write_atomically(self.path / f"{name}.npz", buffer.getvalue())

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json, which makes the record whole, and drop the checkpoint."""
        content = {"schema": SCHEMA, "dataset": self.config.dataset, "experiment": self.config.experiment}
        content |= {"seed": self.config.seed, **metrics}
        write_atomically(self.path / "metrics.json", json.dumps(content, indent=1, allow_nan=False))
        self.checkpoint.unlink(missing_ok=True)


def _differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, with both values."""
    found = []
    for key in one:
        if isinstance(one[key], dict):
            found += _differences(one[key], other[key], f"{prefix}{key}.")
        elif one[key] != other[key]:
            found.append(f"{prefix}{key}: {one[key]}, now {other[key]}")
    return found


def read_config(path: Path) -> Config:
    """Read a run's configuration.

    Raises:
        InputError: No config.yaml there, or one that this version does not understand.
    """
    stored = path / "config.yaml"
    if not stored.is_file():
        raise InputError(f"{path}: expected a run with config.yaml, found none")
    return config_from_dict(yaml.safe_load(stored.read_text()), source=str(stored))


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a whole run's metrics.json.

    Raises:
        InputError: The run is not whole.
    """
    file = path / "metrics.json"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a finished run with metrics.json, found none; run it to its end first"
        )
    return json.loads(file.read_text())


def read_history(path: Path) -> pd.DataFrame:
    """Read a run's history.csv."""
    return pd.read_csv(path / "history.csv")


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a run ran on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """Name a device as a person would."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Give the process's peak memory so far, in MB, of the host and of a CUDA device."""
    # ru_maxrss counts kilobytes on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    on_device = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return {"peak_host_mb": round(peak, 1), "peak_device_mb": on_device}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return result.stdout.strip() or None
