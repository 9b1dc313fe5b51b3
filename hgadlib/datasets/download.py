"""Fetch a dataset: licence, resumed download, checksum, safe unpacking, and only then its place.

Pooch verifies the checksum and keeps a file under its name only if it is right; the download itself is
ours, for gigabytes must resume after a broken line. An interrupted fetch leaves a partial archive, which
the next one goes on with, and nothing that looks like a dataset.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pooch  # type: ignore[import-untyped, unused-ignore]
import requests

from hgadlib.datasets.archives import unpack
from hgadlib.datasets.resume import resume
from hgadlib.errors import InputError


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
