"""Fetch a dataset: licence, resumed download, checksum, safe unpacking, and only then its place.

Pooch verifies the checksum and keeps a file under its name only if it is right; the download itself is ours,
for gigabytes must resume after a broken line. An interrupted fetch leaves a partial archive, which the next
one goes on with, and nothing that looks like a dataset.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlparse

import pooch  # type: ignore[import-untyped, unused-ignore]
import requests
from filelock import FileLock, Timeout

from hgadlib.errors import InputError
from hgadlib.files import new_folder, user_path
from hgadlib.progress import progress_bar

CHUNK = 1 << 14
"""Bytes written at a time; when the line breaks, what came of a chunk is lost."""
_BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
# NotImplementedError, of unknown compressions, is a RuntimeError.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from: its archive, and the authors' page for those whom the address fails."""

    url: str
    checksum: str
    """Of the archive, "algorithm:digest"."""
    licence: str
    page: str


SOURCES: dict[str, Source] = {
    "mvtec": Source(
        "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/"
        "420938113-1629952094/mvtec_anomaly_detection.tar.xz",
        "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        "MVTec AD, CC BY-NC-SA 4.0 (not for commercial use), MVTec Software GmbH",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
    ),
    "btad": Source(
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "sha256:461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        "BTAD, CC BY-NC-SA 4.0 (not for commercial use), beanTech and University of Udine",
        "https://avires.dimi.uniud.it/papers/btad/",
    ),
    "mvtec3d": Source(
        "https://www.mydrive.ch/shares/45920/dd1eb345346df066c63b5c95676b961b/download/"
        "428824485-1643285832/mvtec_3d_anomaly_detection.tar.xz",
        "md5:d8bb2800fbf3ac88e798da6ae10dc819",
        "MVTec 3D-AD, CC BY-NC-SA 4.0 (not for commercial use), MVTec Software GmbH",
        "https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    ),
    "visa": Source(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "sha256:2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "VisA, CC BY 4.0, Amazon.com, Inc.",
        "https://github.com/amazon-science/spot-diff",
    ),
}


def fetch(
    name: str, *, root: Path, source: str | None = None, checksum: str | None = None,
    say: Callable[[str], None] | None = None, pause: float = 1.0,
) -> Path:  # fmt: skip
    """Fetch a dataset into its folder, unless that holds something already; return the folder.

    Args:
        name: One of `SOURCES`.
        root: The folder that is to hold the dataset.
        source: A URL or an archive on disk to use instead of the known address.
        checksum: "algorithm:digest" of that archive, where it is not the published one.
        say: Shows one line to the user; None prints to standard error.
        pause: Seconds before the first retry; each further wait is twice as long.
    Raises:
        InputError: The name is unknown, the address fails, the checksum differs, the archive is damaged or
            unsafe, or something cannot be written.
    """
    if name not in SOURCES:
        raise InputError(f"nothing to fetch for {name!r}; expected one of {', '.join(sorted(SOURCES))}")
    say = say or (lambda text: print(text, file=sys.stderr))
    known = SOURCES[name]
    if root.is_dir() and any(root.iterdir()):
        say(f"{name} is there already: {root}")
        return root
    say(f"Licence: {known.licence}. By using the data you accept it. Page: {known.page}")
    store = root.parent / ".downloads"
    try:
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / f"{name}.lock", timeout=0):
            _fetch(name, root, store, source, checksum or known.checksum, pause)
    except Timeout as error:
        reason = "another fetch of this dataset is running; wait for it"
        raise InputError(f"{error.lock_file}: {reason}") from error
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror}; give another data_root") from error
    say(f"{name} is in {root}")
    return root


def _fetch(name: str, root: Path, store: Path, source: str | None, checksum: str, pause: float) -> None:
    address = source or SOURCES[name].url
    local = urlparse(address).scheme not in ("http", "https")
    archive = user_path(address) if local else _download(address, store, name, checksum, pause)
    if local:
        _verify(archive, checksum)
    # What a killed fetch left; nobody else is here.
    for old in root.parent.glob(f".{root.name}-unfinished-*"):
        shutil.rmtree(old, ignore_errors=True)
    with new_folder(root) as unfinished:
        unpack(archive, unfinished)
    if not local:
        archive.unlink()


def _verify(archive: Path, checksum: str) -> None:
    if not archive.is_file():
        raise InputError(f"{archive}: expected an http(s) address or an archive on disk, found no file")
    algorithm, _, digest = checksum.rpartition(":")
    try:
        found = pooch.file_hash(str(archive), alg=algorithm or "sha256")
    except ValueError as error:
        raise InputError(f"checksum: expected algorithm:digest, found {checksum!r} ({error})") from error
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {error.strerror}") from error
    if found.lower() != digest.lower():
        raise InputError(f"{archive}: expected {algorithm} {digest}, found {found}; not the expected file")


def _download(url: str, store: Path, name: str, checksum: str, pause: float) -> Path:
    """Download through pooch, which verifies the checksum; return the archive."""
    part = store / f"{name}.part"
    advice = f"see {SOURCES[name].page}, and give another address or an archive on disk as source (--from)"

    def downloader(address: str, output_file: Any, _: Any) -> None:
        _resume(address, part, pause)
        # Pooch looks at the file it named; a wrong one must not be resumed either.
        os.replace(part, str(output_file))

    try:
        return Path(pooch.retrieve(url, checksum, f"{name}.archive", store, downloader=downloader))
    except requests.RequestException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{url}: cannot be fetched: {reason}; {advice}") from error
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{url}: the file is not the expected one: {reason}; {advice}") from error


def _resume(url: str, part: Path, pause: float, attempts: int = 5) -> None:
    """Go on with a partial file until it is whole; give up when `attempts` calls in a row get no further."""
    tag = part.with_suffix(".tag")  # Notes the version of the file.
    failures, best = 0, _size(part)
    while True:
        try:
            if _continue(url, part, tag):
                return tag.unlink(missing_ok=True)
            raise requests.ConnectionError("the line broke before the end")
        except _BROKEN:
            failures = 0 if _size(part) > best else failures + 1
            if failures >= attempts:
                raise
        best = max(best, _size(part))
        time.sleep(min(30.0, pause * 2.0 ** max(0, failures - 1)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(url: str, part: Path, tag: Path) -> bool:
    """Ask for what is missing and append it. Returns whether the file is as long as the server says."""
    have = _size(part) if tag.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # Without it the end of a newer file could be glued to the start of an older one.
        if validator := tag.read_text(encoding="utf-8"):
            headers["If-Range"] = validator
    with requests.get(url, headers=headers, stream=True, timeout=(15, 60)) as response:
        status, answered = response.status_code, response.headers
        span = answered.get("Content-Range", "")
        if status == 416:
            # Nothing beyond what we have: a download that was complete when it was killed, or another file.
            if span != f"bytes */{have}":
                part.unlink(missing_ok=True)
            return span == f"bytes */{have}"
        if status in (408, 429) or status >= 500:
            raise requests.ConnectionError(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            raise InputError(f"{url}: the server answered {status} {response.reason}")
        if answered.get("Content-Type", "").startswith("text/html"):
            raise InputError(f"{url}: expected an archive, found a web page; the address has probably moved")
        if (first := re.match(r"bytes (\d+)-", span if status == 206 else "bytes 0-")) is None:
            raise InputError(f"{response.url}: partial answer without a usable Content-Range, found {span!r}")
        if (start := int(first[1])) > have:
            raise InputError(f"{url}: asked for bytes from {have}, the server sent them from {start}")
        length = answered.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        # What tells this version of the file from others: a strong ETag, or the time of change.
        etag = answered.get("ETag", "")
        version = etag if etag.startswith('"') else answered.get("Last-Modified", "")
        tag.write_text(version, encoding="utf-8")
        with part.open("r+b" if part.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            with _byte_bar(total or 0, f"Fetching {PurePosixPath(urlparse(url).path).name}") as bar:
                bar.update(start)
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            size = file.tell()
    # urllib3 before 2 does not notice a short answer by itself.
    return total is None or size == total


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar (of any compression) or zip archive into an existing empty folder.

    Neither permissions nor owners nor times come out of the archive. On an error the folder is left half
    full: unpack into one that nobody trusts yet.

    Raises:
        InputError: The archive is damaged, of unknown type, or holds something that is not a plain file or
            folder below the target.
    """
    try:
        bar = _byte_bar(archive.stat().st_size, f"Unpacking {archive.name}")
        with bar, archive.open("rb") as raw:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(raw) as packed:
                    packed.extractall(target, _plain(archive, packed.infolist(), raw, bar))
            elif tarfile.is_tarfile(archive):
                with tarfile.open(fileobj=raw, mode="r:*") as tar:
                    # Before 3.11.4 Python has no filter, and nothing but the refusals below.
                    tar.extraction_filter = getattr(tarfile, "data_filter", None)
                    tar.extractall(target, _plain(archive, tar, raw, bar))
            else:
                raise InputError(f"{archive}: expected a .tar, .tar.gz, .tar.xz or .zip archive")
    except _DAMAGE as error:
        raise InputError(f"{archive}: damaged archive ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{target}: cannot unpack {archive.name}: {error.strerror or error}") from error


def _plain(archive: Path, members: Iterable[Any], raw: IO[bytes], bar: Any) -> Iterator[Any]:
    """Yield an archive's members; refuse all that is no plain file or folder below the target, or twice."""
    # The filters of tarfile and zipfile would mend names, or pass links, without a word.
    seen: set[PurePosixPath] = set()
    for member in members:
        if isinstance(member, zipfile.ZipInfo):
            name, is_folder, kind = member.filename, member.is_dir(), stat.S_IFMT(member.external_attr >> 16)
            is_file, is_link = kind in (0, stat.S_IFREG), kind == stat.S_IFLNK
        else:
            name, is_folder, is_file = member.name, member.isdir(), member.isreg()
            is_link = member.issym() or member.islnk()
            member = member.replace(mode=None, mtime=None, deep=False)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name[1:2] == ":":
            raise InputError(f"{archive}: refused: it wants to write {name!r}, outside of its folder")
        if not (is_folder or is_file):
            what = "a link" if is_link else "a special file"
            raise InputError(f"{archive}: refused: {name!r} is {what}; expected files and folders only")
        if path in seen:
            raise InputError(f"{archive}: refused: it holds {name!r} twice")
        if is_file and not is_folder:
            seen.add(path)
        yield member
        bar.update(max(0, raw.tell() - bar.n))


def _byte_bar(total: int, description: str) -> Any:
    """Open a progress bar that counts bytes in MB and GB; total is 0 where nobody knows it."""
    bar = progress_bar(total, description, unit="byte")
    bar.unit, bar.unit_scale = "B", True
    return bar
