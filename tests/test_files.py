"""Files known by their content, whatever their names and times say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hgadlib import files
from hgadlib.files import FileError, cache_dir, content_digests, user_path


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    names: list[str] = []

    def sha256_of(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(files, "sha256_of", sha256_of)
    return names


def test_a_file_is_read_once(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_TICK_NS", -1)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(path.name.encode())
    first = content_digests(paths)
    assert first == [hashlib.sha256(path.name.encode()).hexdigest() for path in paths]
    assert content_digests(paths) == first
    assert read == ["a.png", "b.png"]


def test_another_content_is_seen_whatever_size_and_time_say(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TICK_NS", -1)
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(b"first")
    stat = path.stat()
    seen = content_digests([path])
    os.utime(path, ns=(10**18, 10**18))  # the time alone: read, and found to be the same
    assert content_digests([path]) == seen
    path.write_bytes(b"other")  # in place, with the time of before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen += content_digests([path])
    other.write_bytes(b"third")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)
    seen += content_digests([path])
    assert len(set(seen)) == 3 and read == ["a.png"] * 4


def test_what_was_written_just_now_is_not_yet_known_by_its_time(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"a")
    content_digests([path])
    content_digests([path])
    assert read == ["a.png"] * 2


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_TICK_NS", -1)
    path = tmp_path / "a.png"
    path.write_bytes(b"a")
    monkeypatch.setenv("HGAD_CACHE", str(path / "cache"))
    assert content_digests([path]) == content_digests([path])
    assert read == ["a.png"] * 2


def test_nobody_s_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HGAD_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_dir().name == "hgad"


def test_a_home_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/images") == Path("/somewhere/images")
    assert user_path("images") == Path("images")
    with pytest.raises(FileError, match=r"~nobody-of-this-name/x: expected a home directory for the ~"):
        user_path("~nobody-of-this-name/x")
    monkeypatch.setenv("HGAD_CACHE", "~nobody-of-this-name")
    with pytest.raises(FileError, match="expected a home directory"):
        cache_dir()
