"""A cache of features on disk that is complete or absent: one folder per key, one .npy file per level."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hgadlib.errors import InputError
from hgadlib.files import new_folder, write_atomically

_MANIFEST = "manifest.json"
# Left free on the disk, so that a run can still write its records.
_DISK_MARGIN = 256 * 2**20


def open_entry(entry: Path) -> tuple[tuple[tuple[int, int], ...], list[NDArray[Any]]] | None:
    """Open an entry: (H_l, W_l) per level and (N, H_l * W_l, C_l) arrays, memory-mapped and read-only.

    It is None where anything is missing, cut short or of another key than the folder's name.
    """
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != entry.name:
            return None
        grids, arrays = tuple((int(h), int(w)) for h, w in manifest["grids"]), []
        for level, (h, w) in enumerate(grids):
            path = entry / f"level{level}.npy"
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.shape[1] != h * w or path.stat().st_size != array.offset + array.nbytes:
                return None
            arrays.append(array)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return grids, arrays


@contextlib.contextmanager
def locked(entry: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock an entry for writing, and clear away what writers that are gone left behind.

    The lock dies with its process, so an unfinished folder whose lock is free has no writer any more. On a
    file system without locks two writers may both compute; the first one that is done makes the entry.
    The cache's folder is made where it is missing, an InputError where that cannot be written; `on_wait` is
    called once if another process holds the lock.
    """
    locks = entry.parent / "locks"
    lock = FileLock(locks / f"{entry.name}.lock")
    with _disk_errors(entry), contextlib.suppress(NotImplementedError):
        locks.mkdir(parents=True, exist_ok=True)
        for part in entry.parent.glob(".*-unfinished-*"):
            other = FileLock(locks / f"{part.name[1:].partition('-')[0]}.lock")
            with contextlib.suppress(Timeout, OSError), other.acquire(timeout=0):
                shutil.rmtree(part, ignore_errors=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_entry(
    entry: Path, shapes: Sequence[tuple[int, ...]], dtype: str, batches: Iterable[Sequence[NDArray[Any]]],
    **facts: Any,
) -> None:  # fmt: skip
    """Write an entry batch by batch into a temporary folder, which becomes the entry all at once.

    Args:
        entry: The entry's folder, named by its key.
        shapes: (N, H_l * W_l, C_l) per level.
        dtype: Of the levels.
        batches: The images in order, one (B, H_l * W_l, C_l) array per level.
        facts: What the manifest keeps beside the key: the grids, and what the key was made of.
    Raises:
        InputError: The disk has or gets no room, or cannot be written.
    """
    nbytes = sum(map(math.prod, shapes)) * np.dtype(dtype).itemsize
    with _disk_errors(entry):
        # What lies there is damaged: nobody trusts it, and a folder cannot be renamed onto it.
        shutil.rmtree(entry, ignore_errors=True)
        free = shutil.disk_usage(entry.parent).free
        if nbytes + _DISK_MARGIN > free:
            raise InputError(
                f"features of {shapes[0][0]} images need {nbytes / 1e9:.2f} GB in {entry.parent}, where "
                f"{free / 1e9:.2f} GB are free; free some space, name another disk by HGAD_CACHE, or take "
                "fewer levels, smaller images or float16"
            )
        try:
            with new_folder(entry) as part, contextlib.ExitStack() as stack:
                files = [stack.enter_context((part / f"level{k}.npy").open("wb")) for k in range(len(shapes))]
                for file, shape in zip(files, shapes, strict=True):
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                # Plain writes, not a memory map: a full disk is then an error that can be told, not a crash.
                for arrays in batches:
                    for file, array in zip(files, arrays, strict=True):
                        file.write(np.ascontiguousarray(array, dtype=dtype).data)
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
                # Last of all: a folder without it is never trusted.
                write_atomically(part / _MANIFEST, json.dumps({"key": entry.name, **facts}, indent=1))
        except OSError:
            if open_entry(entry) is None:  # else another writer was first, where there are no locks
                raise


@contextlib.contextmanager
def _disk_errors(entry: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise InputError(
            f"features cache: cannot write in {entry.parent} ({why}); name a writable folder by HGAD_CACHE"
        ) from error
