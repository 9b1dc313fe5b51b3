"""A run's directory: written so that a kill at any moment leaves a whole record or one that resumes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from hgadlib.config import Config, config_from_dict, run_dir
from hgadlib.errors import InputError
from hgadlib.files import write_atomically
from hgadlib.runs.hardware import environment


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, with both values."""
    found = []
    for key in one:
        if isinstance(one[key], dict):
            found += differences(one[key], other[key], f"{prefix}{key}.")
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
    try:
        values = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{stored}: expected YAML, found: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{stored}: expected keys with values, found {type(values).__name__}")
    return config_from_dict(values, source=str(stored))


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
    return json.loads(file.read_text(encoding="utf-8"))


def read_history(path: Path) -> pd.DataFrame:
    """Read a run's history.csv, a row per epoch.

    Raises:
        InputError: There is none.
    """
    file = path / "history.csv"
    if not file.is_file():
        raise InputError(f"{path}: expected a run with history.csv, found none; train first")
    return pd.read_csv(file)


def read_coupling(path: Path) -> pd.DataFrame:
    """Read a run's coupling.csv, a row per evaluated epoch, level, block and group of positions.

    Raises:
        InputError: There is none.
    """
    file = path / "coupling.csv"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a run with coupling.csv, found none; train with train.evaluate_every above 0"
        )
    return pd.read_csv(file)


SCHEMA = 1


class RunDirectory:
    """The files of one run.

    ``config.yaml`` and ``data.json`` come first and say which run it is; ``metrics.json`` comes last and says
    that it is whole. In between ``history.csv`` and ``checkpoint.safetensors`` grow with the epochs.
    Nothing but a lock is written before :meth:`start`, so wrong input leaves no run behind.

    Args:
        path: The directory.
        config: The run's configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._started = False
        self._release: Callable[[], object] = lambda: None

    @classmethod
    def open(cls, config: Config) -> RunDirectory:
        """Take hold of a run's directory, new or of the same configuration.

        A default directory that holds another configuration's run is moved aside by :meth:`start`, never
        overwritten; one that was named by run_dir is refused.

        Raises:
            InputError: The directory cannot be written, is in use, or holds another run or other files.
        """
        run = cls(run_dir(config), config)
        if run.complete:
            return run
        run._check_writable()
        stored = run._stored_config()
        if stored != config.digest and stored is not None and config.run_dir is not None:
            raise run._refusal(run._config_changes())
        if stored is None and any(not path.name.startswith(".") for path in run.path.iterdir()):
            raise InputError(
                f"run_dir {run.path}: expected an empty folder or a run, found other files; name another one"
            )
        run._acquire()
        return run

    @property
    def complete(self) -> bool:
        """Whether the record is whole."""
        return self._stored_config() == self.config.digest and (self.path / "metrics.json").is_file()

    @property
    def checkpoint(self) -> Path:
        """Where training resumes from."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """The trained weights and what is needed to load them."""
        return self.path / "model.safetensors"

    def start(self, data: Mapping[str, Any]) -> None:
        """Begin to write, or take up what this configuration has written on these images.

        Args:
            data: What identifies the images, "digest" among it; see `Inputs.identity`.

        Raises:
            InputError: A directory named by run_dir holds a run on other images.
        """
        if self._started:
            return
        if not self.complete and not getattr(self._release, "alive", False):
            self._check_writable()
            self._acquire()  # given up by abandon
        stored, seen = self._stored_config(), self._stored_data()
        if stored is not None and (stored, seen) != (self.config.digest, data["digest"]):
            if seen is None and stored == self.config.digest:
                pass  # killed between the first two files
            elif self.config.run_dir is not None:
                raise self._refusal(f"its images differ, now {data['train']} train, {data['test']} test")
            else:
                self._move_aside(_identity(stored, seen))
        earlier = self.path.with_name(f"{self.path.name}.{_identity(self.config.digest, data['digest'])}")
        if self.config.run_dir is None and self._stored_config() is None and earlier.is_dir():
            self._release()
            os.replace(earlier, self.path)
            print(f"took up the run in {earlier.name} again: it is of this configuration")
            if not self.complete:
                self._acquire()
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if self._stored_config() is None:
            write_atomically(
                self.path / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            )
        if self._stored_data() is None:
            write_atomically(self.path / "data.json", _json(data))
        self._started = True

    def abandon(self) -> None:
        """Give up a directory in which nothing was started: nothing of it stays, until :meth:`start`."""
        if not self._started:
            self._release()

    def write_history(self, history: pd.DataFrame) -> None:
        """Write history.csv."""
        write_atomically(self.path / "history.csv", history.to_csv(index=False))

    def write_environment(self, device: torch.device, *, processes: int = 1) -> None:
        """Write environment.json: versions, hardware, commit, and how many processes train together."""
        write_atomically(
            self.path / "environment.json", _json(environment(device) | {"processes": processes})
        )

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write NAME.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type, unused-ignore]
        write_atomically(self.path / f"{name}.npz", buffer.getvalue())

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, which makes the record whole, and drop what only a resumption needs.

        Returns:
            What was written.
        """
        content = {
            "schema": SCHEMA,
            "dataset": self.config.dataset,
            "experiment": self.config.experiment,
            "seed": self.config.seed,
            **metrics,
        }
        write_atomically(self.path / "metrics.json", _json(content))
        self.checkpoint.unlink(missing_ok=True)
        self._release()
        return content

    def _check_writable(self) -> None:
        probe = self.path / f".probe-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"run_dir {self.path}: expected a folder that can be written, found: {error.strerror}"
            ) from None

    def _stored_config(self) -> str | None:
        """Digest of the configuration that the directory holds, if any."""
        file = self.path / "config.yaml"
        try:
            content = file.read_bytes()
        except OSError:
            return None
        try:
            return read_config(self.path).digest
        except InputError:  # of another version of this library
            return hashlib.sha256(content).hexdigest()

    def _stored_data(self) -> str | None:
        file = self.path / "data.json"
        return json.loads(file.read_text(encoding="utf-8"))["digest"] if file.is_file() else None

    def _config_changes(self) -> str:
        try:
            other = read_config(self.path)
        except InputError as error:
            return f"this version cannot read it: {error}"
        return "it differs in " + ", ".join(differences(other.identity(), self.config.identity()))

    def _refusal(self, why: str) -> InputError:
        return InputError(
            f"run_dir {self.path} holds another run ({why}); name another run_dir or move that one away"
        )

    def _move_aside(self, identity: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.{identity}")
        why = self._config_changes() if self._stored_config() != self.config.digest else "its images differ"
        if aside.exists():
            raise InputError(f"{self.path} and {aside.name} both hold earlier runs; move one away")
        # The lock moves along with the directory; the new one needs its own.
        self._release()
        os.replace(self.path, aside)
        self.path.mkdir()
        self._acquire()
        print(f"moved the earlier run to {aside.name}: {why}")

    def _acquire(self) -> None:
        """Lock the directory for this process; the operating system frees it however the process ends."""
        # One lock per path within a process: a notebook's cell that opens the run again holds it already.
        lock = FileLock(self.path / ".lock", is_singleton=True)
        owner = self.path / ".owner"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
            raise InputError(
                f"run_dir {self.path}: in use by {found}; wait for it, stop it, or name another run_dir"
            ) from None
        except NotImplementedError:
            return  # a file system without locks
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        self._release = weakref.finalize(self, _free, lock, self.path)


def _free(lock: FileLock, path: Path) -> None:
    """Give back a lock and tidy up; of a directory in which no run was started nothing stays."""
    if lock.lock_counter == 1:
        (path / ".owner").unlink(missing_ok=True)
        (path / ".lock").unlink(missing_ok=True)
    lock.release()
    if not lock.is_locked:
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()


def _identity(config: str, data: str | None) -> str:
    return hashlib.sha256(f"{config} {data}".encode()).hexdigest()[:8]


def _json(content: Mapping[str, Any]) -> str:
    # A NaN is an error of ours, and no JSON.
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
