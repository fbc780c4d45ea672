"""Downloads against a real HTTP server that truncates, forgets ranges, changes its file and says no."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qvm.errors import DigestMismatchError, ImageError, NoSpaceError
from qvm.image import download as module
from qvm.image.download import download
from qvm.progress import NullProgress

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several pieces of a transfer


class Server(ThreadingHTTPServer):
    """What it serves and how it misbehaves; `requests` keeps the Range header (or None) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.ranges = True
        self.cut_after: list[int] = []
        """Bytes after which the next transfers break off, one entry each."""
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/disk.qcow2"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if self.path != "/disk.qcow2":
            self.send_error(404)
            return
        start, data = 0, server.content
        if wanted and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cut_after:
            self.wfile.write(body[: server.cut_after.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "QVM_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "disk.qcow2"


def digest(content: bytes = CONTENT, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def part(dest: Path) -> Path:
    return dest.with_name(dest.name + ".part")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_whole(server: Server, dest: Path, algorithm: str) -> None:
    assert download(server.url, digest(algorithm=algorithm), dest, progress=NullProgress()) == dest
    assert dest.read_bytes() == CONTENT
    assert not part(dest).exists()


def test_present_and_right_is_not_fetched_again(server: Server, dest: Path) -> None:
    for _ in range(2):
        download(server.url, digest(), dest, progress=NullProgress())
    assert server.requests == [None]


def test_present_and_wrong_is_fetched_again(server: Server, dest: Path) -> None:
    dest.parent.mkdir()
    dest.write_bytes(b"something else")
    download(server.url, digest(), dest, progress=NullProgress())
    assert dest.read_bytes() == CONTENT


def test_truncated_transfer_is_taken_up_where_it_ended(server: Server, dest: Path) -> None:
    server.cut_after = [1_000_000, 1_000_000]
    download(server.url, digest(), dest, progress=NullProgress())
    assert dest.read_bytes() == CONTENT
    assert server.requests[0] is None
    assert server.requests[1:] and all(asked is not None for asked in server.requests[1:])


def test_always_truncated_fails_and_the_next_try_goes_on(server: Server, dest: Path) -> None:
    server.cut_after = [200_000] * module._TRIES
    with pytest.raises(ImageError, match="cannot download") as caught:
        download(server.url, digest(), dest, progress=NullProgress())
    assert "QVM_MIRROR" in (caught.value.hint or "")
    assert not dest.exists()
    kept = part(dest).stat().st_size
    assert kept > 0
    download(server.url, digest(), dest, progress=NullProgress())
    assert server.requests[-1] == f"bytes={kept}-"
    assert dest.read_bytes() == CONTENT


def test_server_without_ranges(server: Server, dest: Path) -> None:
    server.ranges = False
    server.cut_after = [1_500_000]
    download(server.url, digest(), dest, progress=NullProgress())
    assert dest.read_bytes() == CONTENT


def test_server_without_validator_is_asked_for_the_whole(server: Server, dest: Path) -> None:
    server.etag = None
    server.cut_after = [1_500_000]
    download(server.url, digest(), dest, progress=NullProgress())
    assert server.requests == [None, None]
    assert dest.read_bytes() == CONTENT


def test_file_that_changed_between_tries_comes_whole(server: Server, dest: Path) -> None:
    server.cut_after = [1_500_000, 0]
    with pytest.raises(ImageError):
        download(server.url, digest(), dest, progress=NullProgress())
    server.content, server.etag = CONTENT[::-1], '"two"'
    download(server.url, digest(server.content), dest, progress=NullProgress())
    assert dest.read_bytes() == server.content


def test_wrong_digest_removes_the_file(server: Server, dest: Path) -> None:
    with pytest.raises(DigestMismatchError) as caught:
        download(server.url, digest(b"another"), dest, progress=NullProgress())
    assert digest() in (caught.value.details or "")
    assert not dest.exists() and not part(dest).exists()


def test_complete_but_unchecked_part_is_used(server: Server, dest: Path) -> None:
    """Killed between the last byte and the rename: the server answers 416, and the digest decides."""
    server.cut_after = [1_500_000, 0]
    with pytest.raises(ImageError):
        download(server.url, digest(), dest, progress=NullProgress())
    part(dest).write_bytes(CONTENT)
    download(server.url, digest(), dest, progress=NullProgress())
    assert server.requests[-1] == f"bytes={len(CONTENT)}-"
    assert dest.read_bytes() == CONTENT


def test_not_found(server: Server, dest: Path) -> None:
    with pytest.raises(ImageError, match="HTTP 404"):
        download(server.url.replace("disk", "nothing"), digest(), dest, progress=NullProgress())
    assert not dest.exists()


def test_nobody_listens(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ImageError, match="cannot download"):
        download("http://127.0.0.1:9/disk.qcow2", digest(), dest, progress=NullProgress())


def test_mirror_replaces_scheme_and_host(server: Server, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_MIRROR", server.url.removesuffix("/disk.qcow2"))
    download("https://images.invalid/disk.qcow2", digest(), dest, progress=NullProgress())
    assert dest.read_bytes() == CONTENT


def test_no_space_is_said_before_anything_is_written(
    server: Server, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESERVE", 1 << 60)
    with pytest.raises(NoSpaceError, match="are free"):
        download(server.url, digest(), dest, progress=NullProgress())
    assert not part(dest).exists()


def _fetch(url: str, dest: Path) -> None:
    download(url, digest(), dest, progress=NullProgress())


def test_two_processes_fetch_once(server: Server, dest: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fetch, args=(server.url, dest)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert server.requests == [None]
    assert dest.read_bytes() == CONTENT
