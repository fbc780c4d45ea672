"""What is asked of the host: mirrors, user namespaces, disks, space."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from qvm import process
from qvm.arch import find_arch
from qvm.errors import HostError, ImageError, NoSpaceError
from qvm.image import disk, mirror, namespace, rootfs
from qvm.image.download import mirrored
from qvm.image.mirror import Mirror, choose_mirror, parse_sources, render_sources
from qvm.progress import NullProgress
from qvm.units import GiB, MiB

ARM = find_arch("aarch64")
assert ARM is not None

ONE_LINE = """\
# deb http://old/debian trixie main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb-src http://sources/debian trixie main
"""
DEB822 = """\
Types: deb
URIs: https://ftp.example/debian
Suites: trixie
"""
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img: apt install qemu-utils")


def test_sources_of_both_formats() -> None:
    assert parse_sources([ONE_LINE, DEB822]) == [
        "http://mirror.example/debian", "http://mirror.example/debian-security", "https://ftp.example/debian",
    ]  # fmt: skip


def test_mirror_of_the_host() -> None:
    found = choose_mirror(parse_sources([ONE_LINE]), None)
    assert found == Mirror("http://mirror.example/debian", "http://mirror.example/debian-security")


def test_mirror_of_the_user_wins() -> None:
    found = choose_mirror(parse_sources([ONE_LINE]), "http://mine/debian/")
    assert found == Mirror("http://mine/debian", "http://mine/debian-security")


def test_mirror_on_a_host_that_is_not_debian() -> None:
    found = choose_mirror(["http://archive.ubuntu.com/ubuntu", "file:///srv/debian"], None)
    assert found.main == mirror.DEFAULT


def test_sources_are_tied_to_the_keyring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ring = tmp_path / "ring.gpg"
    monkeypatch.setattr(mirror, "KEYRING", ring)
    with pytest.raises(HostError, match="keyring") as caught:
        render_sources(Mirror("http://m/debian", None), "trixie", ["main"])
    assert "debian-archive-keyring" in (caught.value.hint or "")
    ring.touch()
    text = render_sources(Mirror("http://m/debian", "http://m/debian-security"), "trixie", ["main"])
    assert text.count(f"[signed-by={ring}]") == 3
    assert "debian-security trixie-security main" in text
    assert "security" not in render_sources(Mirror("http://m/debian", None), "trixie", ["main"])
    assert "updates" not in render_sources(Mirror("http://m/debian", None, updates=False), "trixie", ["main"])


def test_mirror_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("QVM_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    with pytest.raises(ImageError, match=r"127\.0\.0\.1:9/debian does not answer") as caught:
        mirror.probe_mirror("trixie", ARM, ["main"], NullProgress())
    assert "QVM_DEBIAN_MIRROR" in (caught.value.hint or "")


class Archive(SimpleHTTPRequestHandler):
    """A mirror's folder, served without a log."""

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A whole mirror of no packages, as QVM_DEBIAN_MIRROR; the folder that holds `debian` and `debian-security`."""
    for suite in ("debian/dists/trixie", "debian/dists/trixie-updates", "debian-security/dists/trixie-security"):
        lists = tmp_path / suite / "main" / "binary-arm64"
        lists.mkdir(parents=True)
        (lists / "Packages.xz").write_bytes(suite.encode())
        digest = hashlib.sha256(suite.encode()).hexdigest()
        (tmp_path / suite / "InRelease").write_text(
            f"SHA256:\n {'0' * 64}        9 main/binary-all/Packages.xz\n"
            f" {digest} {len(suite):8} main/binary-arm64/Packages.xz\n"
        )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Archive, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("QVM_DEBIAN_MIRROR", f"http://127.0.0.1:{server.server_port}/debian")
    yield tmp_path
    server.shutdown()
    thread.join()
    server.server_close()


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def test_a_whole_mirror_is_used_whole(archive: Path) -> None:
    notes = Notes()
    found = mirror.probe_mirror("trixie", ARM, ["main", "contrib"], notes)
    assert found.updates and found.security == f"{found.main}-security" and notes.notes == []


def test_lists_that_are_older_than_their_release_file_are_left_out(archive: Path) -> None:
    """A mirror in the middle of a synchronisation, where apt-get update fails."""
    for suite in ("debian/dists/trixie-updates", "debian-security/dists/trixie-security"):
        (archive / suite / "main" / "binary-arm64" / "Packages.xz").write_bytes(b"of yesterday")
    notes = Notes()
    found = mirror.probe_mirror("trixie", ARM, ["main"], notes)
    assert not found.updates and found.security is None
    assert [("being synchronised" in note, "main/binary-arm64" in note) for note in notes.notes] == [(True, True)] * 2
    assert "without Debian's security updates" in notes.notes[1]


def test_lists_found_by_their_digest_are_fresh(archive: Path) -> None:
    suite = archive / "debian/dists/trixie-updates"
    lists = suite / "main" / "binary-arm64"
    by_hash = lists / "by-hash" / "SHA256"
    by_hash.mkdir(parents=True)
    digest = hashlib.sha256(b"debian/dists/trixie-updates").hexdigest()
    (lists / "Packages.xz").rename(by_hash / digest)
    assert mirror.probe_mirror("trixie", ARM, ["main"], NullProgress()).updates


def test_no_security_archive(archive: Path) -> None:
    (archive / "debian-security").rename(archive / "gone")
    notes = Notes()
    assert mirror.probe_mirror("trixie", ARM, ["main"], notes).security is None
    assert "does not answer" in notes.notes[0]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (None, "https://github.com/a/b.tar.gz?c=d"),
        ("http://mirror:8080", "http://mirror:8080/a/b.tar.gz?c=d"),
        ("http://mirror/cache/", "http://mirror/cache/a/b.tar.gz?c=d"),
        ("mirror.example", "https://mirror.example/a/b.tar.gz?c=d"),
    ],
)
def test_download_mirror(base: str | None, expected: str) -> None:
    assert mirrored("https://github.com/a/b.tar.gz?c=d", base) == expected


def test_namespaces_of_root_and_others() -> None:
    assert "--user" not in namespace.enter_argv(["true"], root=True)
    argv = namespace.enter_argv(["true"], root=False)
    assert argv[-2:] == ["--", "true"]
    assert {"--user", "--map-auto", "--map-root-user", "--mount", "--pid", "--kill-child"} <= set(argv)


def test_granted_ids() -> None:
    table = "jane:100000:65536\n1001:165536:1000\nbroken\n"
    assert namespace.granted(table, "jane", 1000) == 65536
    assert namespace.granted(table, "joe", 1001) == 1000
    assert namespace.granted(table, "nobody", 1) == 0


@pytest.mark.parametrize(
    ("missing", "words"),
    [("newuidmap", "apt install uidmap"), ("/etc/subuid", "--add-subuids 165536-231071"),
     ("/etc/subgid", "--add-subgids 100000-165535")],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_cure(missing: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"/etc/subuid": "other:100000:65536\n", "/etc/subgid": ""}
    if missing == "/etc/subgid":
        tables["/etc/subuid"] = "jane:100000:65536\n"
    monkeypatch.setattr(namespace, "is_root", lambda: False)
    monkeypatch.setattr(namespace.getpass, "getuser", lambda: "jane")
    monkeypatch.setattr(namespace, "_read", lambda path: tables.get(path, ""))
    monkeypatch.setattr(namespace.process, "find_program", lambda name: None if name == missing else Path("/bin/x"))
    with pytest.raises(HostError) as caught:
        namespace.check_host()
    assert words in (caught.value.hint or "")


def test_no_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    done = process.Completed(1, b"", b"unshare: unshare failed: Operation not permitted")
    monkeypatch.setattr(namespace.process, "run", lambda *_, **__: done)
    monkeypatch.setattr(namespace, "_read", lambda path: "1\n" if "apparmor" in path else "")
    with pytest.raises(HostError, match="user namespaces") as caught:
        namespace._probe()
    assert "apparmor_restrict_unprivileged_userns=0" in (caught.value.hint or "")


def test_space_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootfs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 * GiB))
    with pytest.raises(NoSpaceError, match=r"5 GiB .* 1 GiB are free"):
        rootfs.check_space(tmp_path)


@needs_qemu_img
def test_overlay_names_its_backing_format(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(8 * MiB)
    top = tmp_path / "top.qcow2"
    disk.create_overlay(top, backing=base, backing_format="raw", size=16 * MiB)
    info = disk.disk_info(top)
    assert (info.backing, info.backing_format, info.virtual_size) == (base, "raw", 16 * MiB)
    assert top.stat().st_mode & 0o777 == 0o600


@needs_qemu_img
def test_overlay_smaller_than_its_image_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(2 * GiB)
    with pytest.raises(ImageError, match="smaller than its image") as caught:
        disk.create_overlay(tmp_path / "top.qcow2", backing=base, backing_format="raw", size=GiB)
    assert "--root-disk 2" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == [base]


@needs_qemu_img
def test_disks_grow_only(tmp_path: Path) -> None:
    path = tmp_path / "data.qcow2"
    disk.create_disk(path, 2 * GiB)
    disk.resize_disk(path, 3 * GiB)
    assert disk.disk_info(path).virtual_size == 3 * GiB
    with pytest.raises(ImageError, match="cannot shrink"):
        disk.resize_disk(path, GiB)
    assert disk.disk_info(path).virtual_size == 3 * GiB


@needs_qemu_img
@pytest.mark.parametrize("with_mke2fs", [True, False])
def test_data_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_mke2fs: bool) -> None:
    if not with_mke2fs:
        find = process.find_program
        monkeypatch.setattr(disk.process, "find_program", lambda name: None if name == "mke2fs" else find(name))
    path = tmp_path / "data.qcow2"
    disk.create_data_disk(path, 4 * GiB)
    assert disk.disk_info(path).virtual_size == 4 * GiB
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    raw = tmp_path / "back.raw"
    process.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw])
    with raw.open("rb") as file:
        file.seek(1024 + 0x38)
        assert (file.read(2) == b"\x53\xef") == (with_mke2fs and process.find_program("mke2fs") is not None)


@needs_qemu_img
def test_garbage_is_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(b"no disk")
    with pytest.raises(ImageError, match="qemu-img info failed"):
        disk.disk_info(path)
