"""Download over a line that breaks: go on where it broke, and never glue two versions of a file together."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlparse

import requests

from hgadlib.datasets.archives import byte_bar
from hgadlib.errors import InputError

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
