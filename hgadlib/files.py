"""Files and folders that are whole or not there: written under a temporary name, then moved in place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_TICK_NS = 2 * 10**9


class FileError(OSError):
    """A file that cannot be written or found, told in one line that says what to do."""

    def __str__(self) -> str:
        """Name the file, then what is wrong with it."""
        return f"{self.filename}: {self.strerror}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; what lies there afterwards takes the file's place at once.

    An exception leaves the file as it was and nothing beside it; a FileError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        # Without this a power cut can leave the new name with the old disk's content: nothing.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            why = f"cannot be written: {error.strerror or error}; make room or mend that; the call goes on"
            raise FileError(error.errno, why, str(path)) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes; a FileError where that fails."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes the target at once when the block ends.

    An exception leaves nothing behind. The target may be an empty folder; where it is full, or filled
    meanwhile, or the place cannot be written, that is an OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def user_path(path: Path | str) -> Path:
    """Put the home directory in the place of ``~``; a FileError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        reason = "expected a home directory for the ~, found none; write it out"
        raise FileError(errno.ENOENT, reason, str(path)) from None


def cache_dir() -> Path:
    """Return the cache's folder: $HGAD_CACHE, ~/.cache/hgad, or a temporary one where there is no home."""
    if named := os.environ.get("HGAD_CACHE"):
        return user_path(named)
    try:
        return Path.home() / ".cache" / "hgad"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "hgad"


def content_digests(paths: Sequence[Path | str]) -> list[str]:
    """Compute the sha256 of each file's content, reading only those that changed since the last time.

    What is known lies in ``cache_dir()/contents.sqlite``, by path, size, times of change and inode;
    an OSError where a file cannot be read.
    """
    found = []
    select = "select sha256 from contents where path=? and size=? and mtime=? and ctime=? and inode=?"
    with contextlib.closing(_known_contents()) as known:
        for path in map(os.path.abspath, paths):
            stat = os.stat(path)
            facts = (os.fsencode(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            row = known.execute(select, facts).fetchone()
            digest = row[0] if row else sha256_of(Path(path))
            # Two changes within one tick of the clock have one time: too young to be known by it.
            if row is None and time.time_ns() - stat.st_ctime_ns > _TICK_NS:
                with contextlib.suppress(sqlite3.Error):  # the cache may be read-only
                    known.execute("replace into contents values (?, ?, ?, ?, ?, ?)", (*facts, digest))
            found.append(digest)
        with contextlib.suppress(sqlite3.Error):
            known.commit()
    return found


def _known_contents() -> sqlite3.Connection:
    table = "create table if not exists contents (path primary key, size, mtime, ctime, inode, sha256)"
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        known = sqlite3.connect(cache_dir() / "contents.sqlite")
        known.execute(table)
    except (OSError, sqlite3.Error):  # no place to remember anything: then all is read
        known = sqlite3.connect(":memory:")
        known.execute(table)
    return known


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
