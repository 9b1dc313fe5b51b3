"""Fetching from a local server that drops, truncates, redirects and lies; unpacking harmful archives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import trees
from filelock import FileLock

from hgadlib.__main__ import main
from hgadlib.datasets import load_dataset
from hgadlib.datasets.download import CHUNK, SOURCES, fetch, unpack
from hgadlib.errors import InputError

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test wants; keeps what was asked for."""

    protocol_version = "HTTP/1.1"
    content = b""
    etag = '"one"'
    answers: Iterator[Answer]
    ranges: list[str | None]

    def do_GET(self) -> None:
        self.ranges.append(self.headers.get("Range"))
        next(self.answers)(self)

    def send(self, status: int, body: bytes, headers: dict[str, str], promised: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(promised or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if promised is not None and promised != len(body):
            self.close_connection = True

    def part(self, keep: int | None = None) -> None:
        """Serve from the range asked for, but break off after some bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", self.etag) == self.etag
        start = int(asked[1]) if asked and fresh else 0
        rest = self.content[start:]
        if not rest:
            self.send(416, b"", {"Content-Range": f"bytes */{len(self.content)}"})
            return
        headers = {"ETag": self.etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        self.send(206 if start else 200, rest[:keep], headers, promised=len(rest))

    def log_message(self, *_: object) -> None: ...


def whole(handler: Handler) -> None:
    handler.part()


def drop(keep: int) -> Answer:
    return lambda handler: handler.part(keep)


def ignore_range(handler: Handler) -> None:
    handler.send(200, handler.content, {"ETag": handler.etag})


def forever(answer: Answer) -> Iterator[Answer]:
    while True:
        yield answer


@pytest.fixture
def packed(tmp_path: Path) -> bytes:
    """A small MVTec AD, packed like the real one."""
    trees.mvtec(tmp_path / "made")
    (tmp_path / "made" / "license.txt").write_bytes(np.random.default_rng(0).bytes(100_000))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz") as tar:
        for path in sorted((tmp_path / "made").iterdir()):
            tar.add(path, path.name)
    return file.getvalue()


@pytest.fixture
def server(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    handler = type("Fresh", (Handler,), {"content": packed, "answers": forever(whole), "ranges": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        url = f"http://127.0.0.1:{httpd.server_port}/mvtec.tar.xz"
        checksum = "sha256:" + hashlib.sha256(packed).hexdigest()
        local = dataclasses.replace(SOURCES["mvtec"], url=url, checksum=checksum)
        monkeypatch.setitem(SOURCES, "mvtec", local)
        yield handler
        httpd.shutdown()
        thread.join()


def get(tmp_path: Path, **options: str) -> Path:
    return fetch("mvtec", root=tmp_path / "data" / "mvtec", say=lambda _: None, pause=0.0, **options)


def nothing_trusted(tmp_path: Path) -> bool:
    """No dataset, no half-unpacked folder, no archive under its final name."""
    left = {path.name for path in (tmp_path / "data").rglob("*")} if (tmp_path / "data").exists() else set()
    return left <= {".downloads", "mvtec.lock", "mvtec.part", "mvtec.tag"}


@pytest.mark.filterwarnings("ignore:.* is not the published set:UserWarning")
def test_fetch_then_load(tmp_path: Path, server: type[Handler]) -> None:
    dataset = load_dataset("mvtec", root=tmp_path / "data" / "mvtec", download=True)
    assert dataset.classes == ("bottle", "cable") and server.ranges == [None]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".downloads", "mvtec"]
    assert [path.name for path in (tmp_path / "data" / ".downloads").iterdir()] == ["mvtec.lock"]
    get(tmp_path)
    assert server.ranges == [None], "what is there is not fetched again"


def test_licence_is_shown_before_anything_is_asked_of_the_server(
    tmp_path: Path, server: type[Handler]
) -> None:
    said: list[tuple[str, int]] = []
    fetch("mvtec", root=tmp_path / "mvtec", say=lambda text: said.append((text, len(server.ranges))))
    assert "CC BY-NC-SA 4.0" in said[0][0] and said[0][1] == 0


def test_every_source_has_a_licence_and_a_checksum() -> None:
    for source in SOURCES.values():
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", source.checksum)
        assert "CC BY" in source.licence and source.url.startswith("https://")


def test_dropped_line_is_resumed(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = iter([drop(40000), drop(30000), whole])
    get(tmp_path)
    assert server.ranges == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]
    assert (tmp_path / "data" / "mvtec" / "bottle").is_dir()


def test_interrupted_fetch_is_resumed_by_the_next(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = iter([drop(40000), *[drop(0)] * 5, whole])
    with pytest.raises(InputError, match=r"cannot be fetched: .*--from"):
        get(tmp_path)
    assert nothing_trusted(tmp_path)
    get(tmp_path)
    assert server.ranges[-1] == f"bytes={2 * CHUNK}-" and (tmp_path / "data" / "mvtec" / "cable").is_dir()


def test_killed_after_the_last_byte(tmp_path: Path, server: type[Handler]) -> None:
    store = tmp_path / "data" / ".downloads"
    store.mkdir(parents=True)
    (store / "mvtec.part").write_bytes(server.content)
    (store / "mvtec.tag").write_text(server.etag)
    get(tmp_path)
    assert server.ranges == [f"bytes={len(server.content)}-"]


def test_server_without_ranges_starts_anew(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = iter([drop(40000), ignore_range])
    get(tmp_path)
    assert (tmp_path / "data" / "mvtec" / "bottle").is_dir()


def test_changed_file_is_not_glued_to_the_old_start(tmp_path: Path, server: type[Handler]) -> None:
    store = tmp_path / "data" / ".downloads"
    store.mkdir(parents=True)
    (store / "mvtec.part").write_bytes(b"x" * 500)
    (store / "mvtec.tag").write_text('"an older one"')
    get(tmp_path)
    assert server.ranges == ["bytes=500-"] and (tmp_path / "data" / "mvtec" / "bottle").is_dir()


def test_redirect_is_followed(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = iter([lambda handler: handler.send(302, b"", {"Location": "/moved.tar.xz"}), whole])
    get(tmp_path)
    assert len(server.ranges) == 2


def test_redirect_loop(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = forever(lambda handler: handler.send(302, b"", {"Location": "/mvtec.tar.xz"}))
    with pytest.raises(InputError, match="TooManyRedirects"):
        get(tmp_path)
    assert nothing_trusted(tmp_path)


def test_other_bytes_than_promised(tmp_path: Path, server: type[Handler]) -> None:
    server.content = server.content[:-1] + b"!"
    with pytest.raises(InputError, match=r"not the expected one: .*hash.*--from"):
        get(tmp_path)
    assert nothing_trusted(tmp_path)
    assert not (tmp_path / "data" / ".downloads" / "mvtec.part").exists(), "a wrong file must not be resumed"


def test_truncated_with_a_matching_length(tmp_path: Path, server: type[Handler]) -> None:
    server.content = server.content[:2000]
    with pytest.raises(InputError, match="not the expected one"):
        get(tmp_path)
    assert nothing_trusted(tmp_path)


def test_lie_about_the_range(tmp_path: Path, server: type[Handler]) -> None:
    def lie(handler: Handler) -> None:
        handler.send(206, handler.content[50000:], {"Content-Range": "bytes 50000-99999/100000"})

    server.answers = iter([drop(40000), lie])
    with pytest.raises(InputError, match="asked for bytes from 32768, the server sent them from 50000"):
        get(tmp_path)
    server.answers = iter([lambda handler: handler.send(206, b"xx", {})])
    with pytest.raises(InputError, match="without a usable Content-Range"):
        get(tmp_path)


def test_web_page_instead_of_an_archive(tmp_path: Path, server: type[Handler]) -> None:
    server.answers = forever(lambda h: h.send(200, b"<html>Log in</html>", {"Content-Type": "text/html"}))
    with pytest.raises(InputError, match=r"found a web page; the address has probably moved.*--from"):
        get(tmp_path)
    assert nothing_trusted(tmp_path)


def test_not_found_fails_at_once_and_a_busy_server_is_asked_again(
    tmp_path: Path, server: type[Handler]
) -> None:
    server.answers = forever(lambda handler: handler.send(404, b"", {}))
    with pytest.raises(InputError, match="the server answered 404 Not Found"):
        get(tmp_path)
    assert len(server.ranges) == 1
    server.answers = iter([lambda handler: handler.send(503, b"", {}), whole])
    get(tmp_path)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be fetched"):
        get(tmp_path, source="http://127.0.0.1:9/mvtec.tar.xz")
    assert nothing_trusted(tmp_path)


def test_other_address(tmp_path: Path, server: type[Handler]) -> None:
    other = SOURCES["mvtec"].url.replace("mvtec.tar", "mirror/mvtec.tar")
    get(tmp_path, source=other)
    assert (tmp_path / "data" / "mvtec" / "bottle").is_dir()


def test_archive_on_disk(tmp_path: Path, server: type[Handler], capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "my.tar.xz"
    archive.write_bytes(server.content)
    root = tmp_path / "data" / "mvtec"
    assert main(["data", "fetch", "mvtec", "--root", str(root), "--from", str(archive)]) == 0
    assert (root / "bottle").is_dir() and archive.is_file() and server.ranges == []
    assert "CC BY-NC-SA" in capsys.readouterr().err


def test_wrong_archive_on_disk(tmp_path: Path, server: type[Handler]) -> None:
    archive = tmp_path / "my.tar.xz"
    archive.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"my.tar.xz: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        get(tmp_path, source=str(archive))
    with pytest.raises(InputError, match="expected an http"):
        get(tmp_path, source=str(tmp_path / "none.zip"))
    assert archive.is_file() and nothing_trusted(tmp_path)


def test_own_checksum(tmp_path: Path, packed: bytes) -> None:
    archive = tmp_path / "my.tar.xz"
    archive.write_bytes(packed)
    get(tmp_path, source=str(archive), checksum="md5:" + hashlib.md5(packed).hexdigest())
    assert (tmp_path / "data" / "mvtec" / "bottle").is_dir()


def test_kill_while_unpacking_leaves_no_dataset(
    tmp_path: Path, server: type[Handler], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(archive: Path, target: Path) -> None:
        (target / "bottle").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hgadlib.datasets.download.unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    assert not (tmp_path / "data" / "mvtec").exists()
    # What a kill that runs no clean-up would leave is swept away by the next fetch.
    (tmp_path / "data" / ".mvtec-unfinished-abc" / "bottle").mkdir(parents=True)
    get(tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".downloads", "mvtec"]
    assert server.ranges == [None], "the archive was whole and is not fetched again"


def test_two_fetches_at_once(tmp_path: Path, server: type[Handler]) -> None:
    store = tmp_path / "data" / ".downloads"
    store.mkdir(parents=True)
    with (
        FileLock(store / "mvtec.lock"),
        pytest.raises(InputError, match="another fetch of this dataset is running"),
    ):
        get(tmp_path)
    assert server.ranges == []


# Unpacking


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 1) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../evil.png"), "outside of its folder"),
        (member("/tmp/evil.png"), "outside of its folder"),
        (member("a/../../evil.png"), "outside of its folder"),
        (member("a\\..\\..\\evil.png"), "outside of its folder"),
        (member("C:evil.png"), "outside of its folder"),
        (member("link", tarfile.SYMTYPE, "/etc"), "'link' is a link"),
        (member("link", tarfile.LNKTYPE, "good.png"), "'link' is a link"),
        (member("device", tarfile.CHRTYPE), "'device' is a special file"),
        (member("pipe", tarfile.FIFOTYPE), "'pipe' is a special file"),
        (member("good.png"), "twice"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_harmful_tar_is_refused(tmp_path: Path, bad: tarfile.TarInfo, message: str) -> None:
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    archive = tar_of(tmp_path / "a.tar", member("good.png"), bad)
    with pytest.raises(InputError, match=message):
        unpack(archive, target)
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "target", "a.tar", "good.png"}


def test_harmful_zip_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("../evil.png", b"x")
    with pytest.raises(InputError, match="outside of its folder"):
        unpack(tmp_path / "up.zip", target)
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(InputError, match="'link' is a link"):
        unpack(tmp_path / "link.zip", target)
    assert list(target.iterdir()) == []


def test_damaged_archives(tmp_path: Path, packed: bytes) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "a.tar.xz").write_bytes(packed[:-200])
    with pytest.raises(InputError, match="damaged archive"):
        unpack(tmp_path / "a.tar.xz", target)
    (tmp_path / "b.zip").write_bytes(b"words")
    with pytest.raises(InputError, match=r"expected a .tar, .tar.gz, .tar.xz or .zip archive"):
        unpack(tmp_path / "b.zip", target)


def test_permissions_do_not_come_out_of_the_archive(tmp_path: Path) -> None:
    info = member("a/tool.png")
    info.mode = 0o4777
    (tmp_path / "target").mkdir()
    unpack(tar_of(tmp_path / "a.tar", info), tmp_path / "target")
    assert (tmp_path / "target" / "a" / "tool.png").stat().st_mode & 0o7111 == 0


def test_zip_unpacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("01/train/ok/0.bmp", b"data")
    (tmp_path / "target").mkdir()
    unpack(tmp_path / "a.zip", tmp_path / "target")
    assert (tmp_path / "target" / "01" / "train" / "ok" / "0.bmp").read_bytes() == b"data"
