"""Unpack archives that one need not trust: regular files and folders below the target, and nothing else."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from hgadlib.errors import InputError
from hgadlib.progress import progress_bar

_DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError,
    NotImplementedError,
)  # fmt: skip


def _safe_name(archive: Path, name: str) -> PurePosixPath:
    r"""Check a member's name.

    >>> str(_safe_name(Path("a.zip"), "bottle/train/000.png"))
    'bottle/train/000.png'
    >>> _safe_name(Path("a.zip"), "../evil.png")
    Traceback (most recent call last):
        ...
    hgadlib.errors.InputError: a.zip: refused: it wants to write '../evil.png', outside of its folder
    """
    path = PurePosixPath(name)
    has_drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or has_drive:
        raise InputError(f"{archive}: refused: it wants to write {name!r}, outside of its folder")
    return path


def _tar_members(archive: Path, raw: IO[bytes]) -> Iterator[tuple[PurePosixPath, IO[bytes] | None]]:
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            path = _safe_name(archive, member.name)
            if member.isdir():
                yield path, None
            elif member.isreg():
                yield path, tar.extractfile(member)
            else:
                raise _refusal(archive, member.name, is_link=member.issym() or member.islnk())


def _zip_members(archive: Path, raw: IO[bytes]) -> Iterator[tuple[PurePosixPath, IO[bytes] | None]]:
    with zipfile.ZipFile(raw) as packed:
        for member in packed.infolist():
            path = _safe_name(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                yield path, None
            elif kind in (0, stat.S_IFREG):
                with packed.open(member) as content:
                    yield path, content
            else:
                raise _refusal(archive, member.filename, is_link=kind == stat.S_IFLNK)


def _refusal(archive: Path, name: str, *, is_link: bool) -> InputError:
    kind = "a link" if is_link else "a special file"
    return InputError(f"{archive}: refused: {name!r} is {kind}; expected files and folders only")


def byte_bar(total: int, description: str) -> Any:
    """Open a progress bar that counts bytes in MB and GB; total is 0 where nobody knows it."""
    bar = progress_bar(total, description, unit="byte")
    bar.unit, bar.unit_scale = "B", True
    return bar


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar (of any compression) or zip archive into an empty folder.

    Files are written anew, so that neither permissions nor owners nor times come out of the archive.

    Args:
        archive: The archive; its checksum should have been verified.
        target: An existing empty folder. On an error it is left half full: unpack into a folder that nobody
            trusts yet, and rename it.

    Raises:
        InputError: The archive is damaged, of unknown type, or holds something that is not a plain file or
            folder below the target.
    """
    try:
        is_zip = zipfile.is_zipfile(archive)
        if not is_zip and not tarfile.is_tarfile(archive):
            raise InputError(f"{archive}: expected a .tar, .tar.gz, .tar.xz or .zip archive")
        size = archive.stat().st_size
        with archive.open("rb") as raw, byte_bar(size, f"Unpacking {archive.name}") as bar:
            for name, content in (_zip_members if is_zip else _tar_members)(archive, raw):
                path = target / name
                if content is None:
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                bar.update(max(0, raw.tell() - bar.n))
    except FileExistsError as error:
        raise InputError(f"{archive}: refused: it holds {Path(str(error.filename)).name!r} twice") from error
    except _DAMAGE as error:
        raise InputError(f"{archive}: damaged archive ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{target}: cannot unpack {archive.name}: {error.strerror or error}") from error
