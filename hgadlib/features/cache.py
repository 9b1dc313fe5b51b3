"""A cache of features on disk that is complete or absent: one folder per key, one .npy file per level."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hgadlib.errors import InputError

MANIFEST = "manifest.json"
# Left free on the disk, so that a run can still write its records.
_DISK_MARGIN = 256 * 2**20


@dataclass(frozen=True)
class Layout:
    """What the features of a list of images look like.

    Attributes:
        images: N.
        grids: (H_l, W_l) per level.
        channels: C_l per level.
        dtype: "float16" or "float32".
    """

    images: int
    grids: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    dtype: str

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(N, H_l * W_l, C_l) per level."""
        return [(self.images, h * w, c) for (h, w), c in zip(self.grids, self.channels, strict=True)]

    @property
    def nbytes(self) -> int:
        """Size of all levels, bytes."""
        values = sum(n * positions * channels for n, positions, channels in self.shapes)
        return values * np.dtype(self.dtype).itemsize


def default_cache_dir() -> Path:
    """Name the cache's folder: the environment variable HGAD_CACHE, else ~/.cache/hgad."""
    return Path(os.environ.get("HGAD_CACHE") or Path.home() / ".cache" / "hgad").expanduser()


def open_entry(folder: Path, key: str) -> tuple[Layout, list[NDArray[Any]]] | None:
    """Open the features in a folder as memory-mapped arrays, if they are whole.

    Args:
        folder: The key's folder.
        key: What the features must have been computed for.

    Returns:
        The layout and read-only (N, H_l * W_l, C_l) arrays, or None
        where anything is missing, cut short or of another key.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != key:
            return None
        grids = tuple((int(h), int(w)) for h, w in manifest["grids"])
        layout = Layout(manifest["images"], grids, tuple(manifest["channels"]), manifest["dtype"])
        arrays = []
        for level, (shape, size) in enumerate(zip(layout.shapes, manifest["bytes"], strict=True)):
            path = folder / f"level{level}.npy"
            if path.stat().st_size != size:
                return None
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.shape != shape or array.dtype != layout.dtype:
                return None
            arrays.append(array)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return layout, arrays


def check_disk(folder: Path, nbytes: int, *, what: str) -> None:
    """Refuse what does not fit on a disk.

    Args:
        folder: An existing folder on the disk.
        nbytes: Size of what is to be written.
        what: What the error calls it.

    Raises:
        InputError: Too little is free.
    """
    free = shutil.disk_usage(folder).free
    if nbytes + _DISK_MARGIN > free:
        raise InputError(
            f"{what} need {nbytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; free some "
            "space, name another disk by HGAD_CACHE, or take fewer levels, smaller images or float16"
        )


@contextlib.contextmanager
def locked_entry(cache_dir: Path, key: str, *, on_wait: Callable[[], None]) -> Iterator[Path]:
    """Hold the right to write one key, and clear away what writers that are gone left behind.

    The lock is the operating system's and dies with its process, so an unfinished folder whose lock is free
    has no writer any more. On a file system without locks two writers may both compute; each writes a
    folder of its own, and renaming makes one of them the entry.

    Args:
        cache_dir: The cache's folder, made where it is missing.
        key: The entry.
        on_wait: Called once if another process holds the lock.

    Yields:
        The entry's folder, which may not exist yet.

    Raises:
        InputError: The cache's folder cannot be written.
    """
    locks = cache_dir / "locks"
    has_locks = True
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire(poll_interval=0.2)
        except NotImplementedError:
            has_locks = False
    except OSError as error:
        raise InputError(
            f"features cache: cannot write in {cache_dir} ({error.strerror or error}); "
            "name a writable folder by HGAD_CACHE"
        ) from error
    try:
        if has_locks:
            _remove_abandoned(cache_dir, locks, held=key)
        yield cache_dir / key
    finally:
        if has_locks:
            lock.release()


def _remove_abandoned(cache_dir: Path, locks: Path, *, held: str) -> None:
    for part in cache_dir.glob("*.part"):
        key = part.name.split(".")[0]
        if key == held:
            shutil.rmtree(part, ignore_errors=True)
            continue
        with (
            contextlib.suppress(Timeout, OSError, NotImplementedError),
            FileLock(locks / f"{key}.lock", timeout=0),
        ):
            shutil.rmtree(part, ignore_errors=True)


class EntryWriter:
    """Write an entry batch by batch into a temporary folder; `commit` makes it the entry, all at once.

    Used as a context manager: whatever is not committed is removed.

    Args:
        folder: The entry's folder.
        layout: What will be written.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        """Make the temporary folder and write the files' heads."""
        with _disk_errors(self.folder):
            self.part.mkdir()
            for level, shape in enumerate(self.layout.shapes):
                file = (self.part / f"level{level}.npy").open("wb")
                self._files.append(file)
                descr = np.lib.format.dtype_to_descr(np.dtype(self.layout.dtype))
                np.lib.format.write_array_header_1_0(
                    file, {"descr": descr, "fortran_order": False, "shape": shape}
                )
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not committed."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self.part, ignore_errors=True)

    def append(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Add the next images, one (B, H_l * W_l, C_l) array per level."""
        # Plain writes, not a memory map: a full disk is then an error that can be told, not a crash.
        with _disk_errors(self.folder):
            for file, array in zip(self._files, arrays, strict=True):
                file.write(np.ascontiguousarray(array, dtype=self.layout.dtype).data)

    def commit(self, key: str, ingredients: Mapping[str, Any], **facts: Any) -> None:
        """Make the written folder the entry.

        Args:
            key: The entry's key.
            ingredients: What the key was made of, kept for the reader.
            facts: More to keep in the manifest.
        """
        with _disk_errors(self.folder):
            sizes = []
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                sizes.append(file.tell())
                file.close()
            manifest = {
                "key": key, "images": self.layout.images, "grids": self.layout.grids,
                "channels": self.layout.channels, "dtype": self.layout.dtype, "bytes": sizes,
                **facts, "ingredients": ingredients,
            }  # fmt: skip
            # Last of all: a folder without it is never trusted.
            with (self.part / MANIFEST).open("w", encoding="utf-8") as text:
                json.dump(manifest, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            if open_entry(self.folder, key) is None:
                # What lies there is damaged: nobody trusts it, and a folder cannot be renamed onto it.
                shutil.rmtree(self.folder, ignore_errors=True)
                os.rename(self.part, self.folder)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise InputError(
            f"features cache: cannot write in {folder.parent} ({reason}); name another folder by HGAD_CACHE"
        ) from error
