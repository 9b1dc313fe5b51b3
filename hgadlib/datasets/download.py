"""Fetch a dataset: licence, resumed download, checksum, safe unpacking, and only then its place.

Pooch verifies the checksum and keeps a file under its name only if it is right; the download itself is
ours, for gigabytes must resume after a broken line. An interrupted fetch leaves a partial archive, which
the next one goes on with, and nothing that looks like a dataset.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlparse

import pooch  # type: ignore[import-untyped, unused-ignore]
import requests

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


CHUNK = 1 << 14
"""Bytes written at a time; when the line breaks, what came of a chunk is lost."""
_BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def resume(url: str, part: Path, pause: float, attempts: int = 5) -> None:
    """Fill a partial file until the server's length is reached; getting further renews the patience.

    Args:
        url: Address, http or https.
        part: The partial file, with what an earlier call left; a note on its version lies beside it.
        pause: Seconds before the first retry; each further wait is twice as long.
        attempts: How many in a row may fail without getting further.

    Raises:
        requests.RequestException: It failed `attempts` times in a row, or cannot be asked at all.
        InputError: The server does not have the file, or does not keep to HTTP.
    """
    tag = part.with_suffix(".tag")
    failures, best = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            if _continue(url, part, tag):
                tag.unlink(missing_ok=True)
                return
            problem: requests.RequestException = requests.ConnectionError("the line broke before the end")
        except _BROKEN as error:
            problem = error
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > best else failures + 1
        best = max(best, after)
        if failures >= attempts:
            raise problem
        time.sleep(min(30.0, pause * 2.0 ** max(0, failures - 1)))


def _continue(url: str, part: Path, tag: Path) -> bool:
    """Ask for what is missing and append it. Returns whether the file is as long as the server says."""
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # Without it the end of a newer file could be glued to the start of an older one.
        if validator := tag.read_text(encoding="utf-8"):
            headers["If-Range"] = validator
    with requests.get(url, headers=headers, stream=True, timeout=(15, 60)) as response:
        if response.status_code == 416:
            # Nothing beyond what we have: a download that was complete when it was killed, or another file.
            complete = response.headers.get("Content-Range", "") == f"bytes */{have}"
            if not complete:
                part.unlink(missing_ok=True)
            return complete
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise requests.ConnectionError(f"the server answered {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise InputError(f"{url}: the server answered {response.status_code} {response.reason}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise InputError(f"{url}: expected an archive, found a web page; the address has probably moved")
        start = _start(response) if response.status_code == 206 else 0
        if start > have:
            raise InputError(f"{url}: asked for bytes from {have}, the server sent them from {start}")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdecimal() else None
        tag.write_text(_validator(response), encoding="utf-8")
        with part.open("r+b" if part.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            label = f"Fetching {urlparse(url).path.rsplit('/', 1)[-1]}"
            with byte_bar(total or 0, label) as bar:
                bar.update(start)
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            size = file.tell()
    # urllib3 before 2 does not notice a short answer by itself.
    return total is None or size == total


def _start(response: requests.Response) -> int:
    """Read where a partial answer starts."""
    text = response.headers.get("Content-Range", "")
    first = text.removeprefix("bytes ").partition("-")[0]
    if not text.startswith("bytes ") or not first.isdecimal():
        raise InputError(f"{response.url}: partial answer without a usable Content-Range, found {text!r}")
    return int(first)


def _validator(response: requests.Response) -> str:
    """Return what tells this version of the file from others: a strong ETag, or the time of change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    Attributes:
        url: Address of its archive.
        checksum: Of the archive, "algorithm:digest".
        licence: Its licence, and who gave it.
        page: The authors' page, for those whom the address fails.
        suffix: What the archive's name ends with.
    """

    url: str
    checksum: str
    licence: str
    page: str
    suffix: str


SOURCES: dict[str, Source] = {
    "mvtec": Source(
        "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/"
        "420938113-1629952094/mvtec_anomaly_detection.tar.xz",
        "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        "MVTec AD, CC BY-NC-SA 4.0 (not for commercial use), MVTec Software GmbH",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        ".tar.xz",
    ),
    "btad": Source(
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "sha256:461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        "BTAD, CC BY-NC-SA 4.0 (not for commercial use), beanTech and University of Udine",
        "https://avires.dimi.uniud.it/papers/btad/",
        ".zip",
    ),
    "mvtec3d": Source(
        "https://www.mydrive.ch/shares/45920/dd1eb345346df066c63b5c95676b961b/download/"
        "428824485-1643285832/mvtec_3d_anomaly_detection.tar.xz",
        "md5:d8bb2800fbf3ac88e798da6ae10dc819",
        "MVTec 3D-AD, CC BY-NC-SA 4.0 (not for commercial use), MVTec Software GmbH",
        "https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
        ".tar.xz",
    ),
    "visa": Source(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "sha256:2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "VisA, CC BY 4.0, Amazon.com, Inc.",
        "https://github.com/amazon-science/spot-diff",
        ".tar",
    ),
}


def fetch(
    name: str,
    *,
    root: Path,
    source: str | None = None,
    checksum: str | None = None,
    say: Callable[[str], None] | None = None,
    pause: float = 1.0,
) -> Path:
    """Fetch a dataset into its folder, unless it is there.

    Args:
        name: One of `SOURCES`.
        root: The folder that is to hold the dataset; it must not exist, or be empty.
        source: A URL or an archive on disk to use instead of the known address.
        checksum: "algorithm:digest" of that archive, where it is not the published one.
        say: Shows one line to the user; None prints to standard error.
        pause: Seconds before the first retry; each further wait is twice as long.

    Returns:
        The folder.

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
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror}; give another data_root") from error
    with _alone(store / f"{name}.lock"):
        local = source is not None and urlparse(source).scheme not in ("http", "https")
        if local:
            archive = Path(str(source)).expanduser()
            _verify(archive, checksum or known.checksum)
        else:
            archive = _download(source or known.url, store, name, known, checksum or known.checksum, pause)
        _put(archive, root)
        if not local:
            archive.unlink()
    say(f"{name} is in {root}")
    return root


def _put(archive: Path, root: Path) -> None:
    """Unpack beside the place and move there when all is written."""
    for old in root.parent.glob(f".{root.name}-unfinished-*"):
        shutil.rmtree(old, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-unfinished-", dir=root.parent))
    try:
        unpack(archive, unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep two fetches of the same set from writing into one file. The lock dies with its process."""
    with lock.open("w") as file:
        try:
            import fcntl
        except ImportError:
            # Windows has no flock; there the checksum alone catches a mixed file.
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{lock}: another fetch of this dataset is running; wait for it") from error
        yield


def _download(url: str, store: Path, name: str, known: Source, checksum: str, pause: float) -> Path:
    """Download through pooch, which verifies the checksum; return the archive."""
    part = store / f"{name}.part"
    advice = f"see {known.page}, and give another address or an archive on disk as source (--from)"

    def downloader(address: str, output_file: Any, _: Any) -> None:
        resume(address, part, pause)
        # Pooch looks at the file it named; a wrong one must not be resumed either.
        os.replace(part, str(output_file))

    path = store / f"{name}{known.suffix}"
    try:
        return Path(pooch.retrieve(url, checksum, path.name, store, downloader=downloader))
    except requests.RequestException as error:
        raise InputError(f"{url}: cannot be fetched: {_reason(error)}; {advice}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise InputError(f"{error}; {advice}") from error
        reason = " ".join(str(error).split())
        raise InputError(f"{url}: the file is not the expected one: {reason}; {advice}") from error
    except OSError as error:
        raise InputError(f"{store}: cannot be written: {error.strerror or error}") from error


def _reason(error: requests.RequestException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
