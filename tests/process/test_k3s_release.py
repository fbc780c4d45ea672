"""Releases of k3s from a real HTTP server: whole, right, once; and without any server after that."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qvm.errors import DigestMismatchError, ImageError, UsageError
from qvm.progress import NullProgress
from runtimes.k3s import K3s, release

VERSION = "v1.33.5+k3s1"
FOLDER = "/k3s-io/k3s/releases/download/v1.33.5%2Bk3s1/"
BINARY, IMAGES = b"\x7fELF k3s" * 90_000, b"images" * 200_000
CHANNELS = {"data": [{"id": "stable", "latest": VERSION}, {"id": "v1.33", "latest": VERSION}, {"id": "odd"}]}
QUIET = NullProgress()


def digests(**contents: bytes) -> bytes:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()).encode()


class Mirror(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {
            FOLDER + "k3s": BINARY, FOLDER + "k3s-arm64": BINARY[::-1],
            FOLDER + "k3s-airgap-images-amd64.tar.zst": IMAGES, FOLDER + "k3s-airgap-images-arm64.tar.zst": IMAGES,
            FOLDER + "sha256sum-amd64.txt": digests(**{"k3s": BINARY, "k3s-airgap-images-amd64.tar.zst": IMAGES}),
            FOLDER + "sha256sum-arm64.txt":
                digests(**{"k3s-arm64": BINARY[::-1], "k3s-airgap-images-arm64.tar.zst": IMAGES}),
            "/v1-release/channels": json.dumps(CHANNELS).encode(),
        }
        self.asked: list[str] = []
        self.cut: dict[str, int] = {}
        """Path -> bytes after which its next transfer breaks off."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        data = self.server.files.get(self.path)
        wanted = self.headers.get("Range")
        self.server.asked.append(self.path + (f" {wanted}" if wanted else ""))
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        body = data[start:]
        if (cut := self.server.cut.pop(self.path, None)) is not None:
            body = body[:cut]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    for name in ("http_proxy", "HTTP_PROXY", "QVM_K3S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(release, "_resolved", {})
    server = Mirror()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("QVM_MIRROR", server.url)
    yield server
    server.shutdown()
    server.server_close()


@contextmanager
def no_network(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody listens at the mirror's address."""
    monkeypatch.setenv("QVM_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setattr(release, "_resolved", {})
    before = len(mirror.asked)
    yield
    assert len(mirror.asked) == before


def obtain(cache: Path, arch: str = "x86_64") -> release.Artifacts:
    return release.obtain(VERSION, arch, cache, QUIET)


def test_binary_and_images_come_once_and_need_no_network_then(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = obtain(tmp_path)
    assert found.binary.read_bytes() == BINARY and found.digest == hashlib.sha256(BINARY).hexdigest()
    assert [path.read_bytes() for path in found.images] == [IMAGES]
    assert sorted(mirror.asked) == sorted(FOLDER + name for name in
                                          ("sha256sum-amd64.txt", "k3s", "k3s-airgap-images-amd64.tar.zst"))
    with no_network(mirror, monkeypatch):
        assert obtain(tmp_path) == found
        assert release.find(VERSION, "x86_64", tmp_path) == found


def test_another_architecture_has_files_of_its_own(mirror: Mirror, tmp_path: Path) -> None:
    found = obtain(tmp_path, "aarch64")
    assert found.binary.name == "k3s-arm64" and found.binary.read_bytes() == BINARY[::-1]
    assert (release.binary_name("armv7l"), release.list_name("armv7l")) == ("k3s-armhf", "sha256sum-arm.txt")
    with pytest.raises(UsageError):
        release.binary_name("ppc64le")


def test_what_is_not_in_the_list_is_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files[FOLDER + "k3s"] = b"something else"
    with pytest.raises(DigestMismatchError):
        obtain(tmp_path)
    assert not (tmp_path / VERSION / "k3s").exists()
    mirror.files[FOLDER + "k3s"] = BINARY
    assert obtain(tmp_path).binary.read_bytes() == BINARY


def test_a_transfer_that_breaks_off_goes_on_where_it_was(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut[FOLDER + "k3s"] = 300_000
    assert obtain(tmp_path).binary.read_bytes() == BINARY
    ranges = [line for line in mirror.asked if "bytes=" in line]
    assert len(ranges) == 1 and int(ranges[0].rpartition("=")[2].rstrip("-")) > 0


def test_what_changes_in_the_cache_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    binary = obtain(tmp_path).binary
    binary.write_bytes(b"damaged")
    assert release.find(VERSION, "x86_64", tmp_path) is None
    assert obtain(tmp_path).binary.read_bytes() == BINARY


@pytest.mark.parametrize("break_it", [
    lambda files: files.pop(FOLDER + "sha256sum-amd64.txt"),
    lambda files: files.update({FOLDER + "sha256sum-amd64.txt": b"<html>not found</html>"}),
    lambda files: files.update({FOLDER + "sha256sum-amd64.txt": digests(k3s=BINARY)}),
    lambda files: files.pop(FOLDER + "k3s-airgap-images-amd64.tar.zst"),
], ids=["no list", "no digests", "images not in it", "no images"])
def test_a_release_that_is_not_whole_is_refused(
    mirror: Mirror, tmp_path: Path, break_it: Callable[[dict[str, bytes]], Any]
) -> None:
    break_it(mirror.files)
    with pytest.raises(ImageError) as caught:
        obtain(tmp_path)
    assert caught.value.hint


def test_two_at_once_fetch_once(mirror: Mirror, tmp_path: Path) -> None:
    found: list[release.Artifacts] = []
    threads = [threading.Thread(target=lambda: found.append(obtain(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(map(str, found))) == 1
    assert mirror.asked.count(FOLDER + "k3s") == 1


def test_wishes_become_releases(mirror: Mirror, tmp_path: Path) -> None:
    def resolve(wish: str) -> str:
        return release.resolve(wish, tmp_path, QUIET)

    assert resolve("") == release.load_source().default
    assert resolve("v1.32.1+k3s2") == "v1.32.1+k3s2" and resolve("1.32.1") == "v1.32.1+k3s1"
    assert resolve("v1.35.0-rc1") == "v1.35.0-rc1+k3s1"
    assert mirror.asked == []
    assert resolve("stable") == resolve("v1.33") == resolve("1.33") == VERSION
    assert mirror.asked == ["/v1-release/channels"] * 3
    resolve("stable")
    assert len(mirror.asked) == 3  # one process means one release
    with pytest.raises(UsageError, match=r"v1\.99"):
        resolve("v1.99")


def test_a_channel_is_remembered_for_when_there_is_no_network(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.resolve("stable", tmp_path, QUIET)
    notes: list[str] = []

    class Noting(NullProgress):
        def note(self, line: str) -> None:
            notes.append(line)

    with no_network(mirror, monkeypatch):
        assert release.resolve("stable", tmp_path, Noting()) == VERSION
        assert VERSION in notes[0]
        assert release.resolve_known("stable", tmp_path) == VERSION
        monkeypatch.setattr(release, "_resolved", {})
        with pytest.raises(ImageError):
            release.resolve("stable", tmp_path / "empty", QUIET)


def test_warm_images_are_of_a_release_and_its_arguments(mirror: Mirror, tmp_path: Path) -> None:
    runtime = K3s()

    def settings(**said: Any) -> Any:
        return runtime.warm_settings({"version": "stable", "args": ["--disable=x"], "listen_port": 0, **said})

    assert settings()["version"] == "stable"  # nothing is known of it
    release.resolve("stable", tmp_path, QUIET)
    assert settings()["version"] == VERSION
    assert settings(listen_port=6443) == settings()
    assert settings(args=[]) != settings() != settings(version="v1.32.0")


def test_a_k3s_of_the_users_own_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Mirror
) -> None:
    (tmp_path / "k3s").write_bytes(BINARY)
    (tmp_path / "images.tar.gz").write_bytes(IMAGES)
    found = release.supplied(tmp_path)
    assert (found.digest, found.images) == (hashlib.sha256(BINARY).hexdigest(), (tmp_path / "images.tar.gz",))
    assert release.supplied(tmp_path / "k3s").images == ()
    monkeypatch.setenv("QVM_K3S", str(tmp_path))
    assert K3s().warm_settings({})["digest"] == found.digest
    with pytest.raises(UsageError):
        release.supplied(tmp_path / "nothing")
    assert mirror.asked == []
