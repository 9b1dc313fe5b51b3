"""A run's directory: written so that a kill at any moment leaves a whole record or one that resumes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock, Timeout

from hgadlib.config import Config, config_from_dict, read_params, run_dir
from hgadlib.errors import InputError
from hgadlib.files import sha256_of, write_atomically

if TYPE_CHECKING:
    import torch


def read_config(path: Path) -> Config:
    """Read a run's configuration; an InputError if there is none, or none that this version understands."""
    file = _existing(path, "config.yaml", "name the folder of a run")
    return config_from_dict(read_params("config", path), source=str(file))


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a run's metrics.json; an InputError if the run is not finished."""
    file = _existing(path, "metrics.json", "run it to its end first")
    return read_json(file, "delete it, and the same call evaluates the trained model again")


def read_history(path: Path) -> pd.DataFrame:
    """Read a run's history.csv, a row per epoch; an InputError if there is none."""
    return _read_table(path, "history.csv", "train first")


def read_coupling(path: Path) -> pd.DataFrame:
    """Read a run's coupling.csv, a row per evaluated epoch, level, block and group of positions."""
    remedy = "train with train.evaluate_every above 0 and a record of the blocks"
    return _read_table(path, "coupling.csv", remedy)


def _existing(path: Path, name: str, remedy: str) -> Path:
    if not (path / name).is_file():
        raise InputError(f"{path}: expected a run with {name}, found none; {remedy}")
    return path / name


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a record; an InputError that ends with the remedy if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content:
            return content
        raise ValueError(f"it holds {content!r:.40}")
    except (OSError, ValueError) as error:
        why = f"expected a whole JSON record, found a damaged one ({error}); {remedy}"
        raise InputError(f"{file}: {why}") from None


def _read_table(path: Path, name: str, remedy: str) -> pd.DataFrame:
    file = _existing(path, name, remedy)
    try:
        return pd.read_csv(file)
    except (OSError, ValueError) as error:
        why = f"expected a table, found a damaged file ({' '.join(str(error).split())})"
        raise InputError(f"{file}: {why}; move the run away and train again") from None


class RunDirectory:
    """The files of one run.

    ``config.yaml`` and ``data.json`` come first and say which run it is; ``metrics.json`` comes last and says
    that it is finished. In between ``history.csv`` and ``checkpoint.safetensors`` grow with the epochs.
    Nothing but a lock is written before :meth:`start`, so wrong input leaves no run behind.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.checkpoint = path / "checkpoint.safetensors"  # where training resumes from
        self.model = path / "model.safetensors"  # the trained weights and what is needed to load them
        self._started = False
        # One per path within a process, so a cell that runs again holds it; the system frees it at any end.
        self._lock = FileLock(path / ".lock", is_singleton=True)

    @classmethod
    def open(cls, config: Config) -> RunDirectory:
        """Take hold of a run's directory, new or of the same configuration.

        A default one of another configuration is moved aside by :meth:`start`, never overwritten. An
        InputError if one named by run_dir holds another run; if it cannot be written, is in use, or holds
        other files.
        """
        run = cls(run_dir(config), config)
        if run.complete:
            return run
        if config.run_dir is not None and (why := run.another()):
            raise run._refusal(why)
        if run._stored_config() is None and any(run.path.glob("[!.]*")):
            raise InputError(
                f"run_dir {run.path}: expected an empty folder or a run, found other files; name another one"
            )
        run._acquire()
        return run

    @property
    def complete(self) -> bool:
        """Whether the record is whole."""
        return self._stored_config() == self.config.digest and (self.path / "metrics.json").is_file()

    def another(self, data: Mapping[str, Any] | None = None) -> str:
        """Describe how the run that lies here differs from this one; empty if it is this one, or none.

        Without data, which identifies this run's images, only the configurations are compared.
        """
        stored, seen = self._stored_config(), self._stored_data()
        if stored is None:
            return ""
        if stored != self.config.digest:
            try:
                other = read_config(self.path)
            except InputError as error:
                return f"this version cannot read it: {error}"
            return "it differs in " + ", ".join(_differences(other.identity(), self.config.identity()))
        # It has seen none if it was killed between the first two files.
        if data is None or seen in (None, _images(data), data["digest"]):
            return ""
        return f"its images differ, now {data['train']} train, {data['test']} test"

    def start(self, data: Mapping[str, Any]) -> None:
        """Begin to write, or go on with what this configuration has written on these images.

        The data identify the images, "digest" and "content" among them, see `Inputs.identity`. An InputError
        if a directory named by run_dir holds another run.
        """
        if self._started:
            return
        why = self.another(data)
        if self.complete and not why and self._stored_data() is not None:
            return
        if why and self.config.run_dir is not None:
            raise self._refusal(why)
        self._acquire()
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if why:
            aside = self._beside(self._stored_config(), self._stored_data())
            if aside.exists():
                raise InputError(f"{self.path} and {aside.name} both hold earlier runs; move one away")
            self._rename(self.path, aside)
            print(f"moved the earlier run to {aside.name}: {why}")
        earlier = self._beside(self.config.digest, _images(data))
        if self.config.run_dir is None and self._stored_config() is None and earlier.is_dir():
            self._rename(earlier, self.path)
            print(f"moved the run in {earlier.name} back: it is of this configuration")
        if self._stored_config() is None:
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            write_atomically(self.path / "config.yaml", text)
        if self._stored_data() is None:
            write_atomically(self.path / "data.json", _json(data))
        if self.complete:
            self._release()
        self._started = True

    def write_history(self, history: pd.DataFrame) -> None:
        """Write history.csv."""
        write_atomically(self.path / "history.csv", history.to_csv(index=False))

    def write_environment(self, device: torch.device, *, processes: int = 1) -> None:
        """Write environment.json: versions, hardware, commit, and how many processes train together."""
        from hgadlib.runs.hardware import environment  # torch takes seconds to import; readers need none

        content = _json({**environment(device), "processes": processes})
        write_atomically(self.path / "environment.json", content)

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write NAME.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type, unused-ignore]
        write_atomically(self.path / f"{name}.npz", buffer.getvalue())

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, which makes the record whole; delete what only a resumption needs."""
        names = {name: getattr(self.config, name) for name in ("dataset", "experiment", "seed")}
        content = {"schema": 1, **names, **metrics}
        write_atomically(self.path / "metrics.json", _json(content))
        self.checkpoint.unlink(missing_ok=True)
        self._release()
        return content

    def _refusal(self, why: str) -> InputError:
        return InputError(
            f"run_dir {self.path} holds another run ({why}); name another run_dir or move that one away"
        )

    def _stored_config(self) -> str | None:
        """Digest of the configuration that the directory holds, if any."""
        file = self.path / "config.yaml"
        try:
            return read_config(self.path).digest if file.is_file() else None
        except InputError:  # of another version of this library
            return sha256_of(file)

    def _stored_data(self) -> str | None:
        file = self.path / "data.json"
        remedy = "delete it if the run's images are still the same, else move the run away"
        return _images(read_json(file, remedy)) if file.is_file() else None

    def _beside(self, config: str | None, data: str | None) -> Path:
        """Return where a run of the same name is kept while another has its place."""
        identity = hashlib.sha256(f"{config} {data}".encode()).hexdigest()
        return self.path.with_name(f"{self.path.name}.{identity[:8]}")

    def _rename(self, source: Path, target: Path) -> None:
        self._release()  # the lock would move along with the directory; the new one needs its own
        os.replace(source, target)
        self._acquire()

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except NotImplementedError:  # a file system without locks
            pass
        except OSError as error:
            why = f"expected a folder that can be written, found: {error.strerror}"
            if isinstance(error, Timeout):
                why = "in use by another process; wait, stop it, or name another run_dir"
            raise InputError(f"run_dir {self.path}: {why}") from None

    def _release(self) -> None:
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.release(force=True)


def _images(data: Mapping[str, Any]) -> str:
    """Identify images by their content; runs of before have names and sizes alone."""
    return str(data.get("content", data.get("digest")))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, with both values."""
    found = []
    for key in {**one, **other}:  # a setting that is left to the data is not there
        before, now = one.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key}: {before}, now {now}")
    return found


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"  # a NaN is an error of ours, and no JSON
