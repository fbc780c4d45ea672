"""Importing real files: qemu-img makes what is sent, and the `qvm` program or its library takes it or does not."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qvm import locks
from qvm.arch import AARCH64, X86_64
from qvm.errors import DigestMismatchError, ImageError, NoSpaceError, UsageError
from qvm.image import ensure, foreign, store, unpack
from qvm.image.ensure import ensure_image, import_image
from qvm.progress import NullProgress

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "image"))
from disk_parts import ESP, LINUX, bootable, fat16, gpt, loader

MiB = 1 << 20
QVM = Path(sys.executable).with_name("qvm")
QUIET = NullProgress()

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img: apt install qemu-utils")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bootable("BOOTX64.EFI"))
    return path


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def make_qcow2(raw: Path, *options: str, to: str = "disk.qcow2") -> Path:
    path = raw.with_name(to)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    return path


def leftovers() -> list[str]:
    """What is in the cache beside finished images, references and locks."""
    return [entry.name for entry in store.images_dir().glob(".*")]


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(1).compress(data)


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


def two(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(data[:1000]) + pack(data[1000:])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gz, "xz": xz, "zst": zst, "gz of two": two(gz), "xz of two": two(xz),
    "zst of two": two(zst), "gz with padding": lambda data: gz(data) + bytes(512),
}  # fmt: skip


def test_every_form_of_one_disk_is_the_same_image(raw: Path, tmp_path: Path) -> None:
    content = raw.read_bytes()
    files = [raw, make_qcow2(raw), make_qcow2(raw, "-c", to="small.qcow2"),
             make_qcow2(raw, "-o", "compat=0.10", to="old.qcow2"),
             make_qcow2(raw, "-c", "-o", "compression_type=zstd,extended_l2=on", to="new.qcow2")]
    for name, pack in PACKERS.items():
        path = tmp_path / f"disk.raw.{name}"
        path.write_bytes(pack(content))
        files.append(path)
    nested = tmp_path / "disk.qcow2.xz"
    nested.write_bytes(xz(files[1].read_bytes()))
    images = [import_image(path, "mine", None, progress=QUIET) for path in (*files, nested)]
    assert len({image.id for image in images}) == 1, [image.id for image in images]
    image = images[-1]
    assert (image.arch, image.format, image.kernel) == (X86_64, "raw", None)
    assert image.disk.read_bytes() == content
    assert image.disk.stat().st_mode & 0o222 == 0
    assert image.disk.stat().st_blocks * 512 < len(content) / 2, "it should be sparse"
    assert images[0].manifest["digest"] == "sha256:" + hashlib.sha256(content).hexdigest()
    assert ensure_image("mine", X86_64, progress=QUIET) == image
    assert not leftovers()


def _with_external_data(raw: Path) -> Path:
    path = raw.with_name("data.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={raw.with_name('outside.raw')}", path, "16M")
    return path


def _converted(form: str, *options: str) -> Callable[[Path], Path]:
    def make(raw: Path) -> Path:
        path = raw.with_name(f"disk.{form}")
        qemu_img("convert", "-f", "raw", "-O", form, *options, raw, path)
        return path
    return make


def _cut(raw: Path) -> Path:
    """Whole tables at the front, and half of the data missing."""
    path = make_qcow2(raw)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3 * 65536)
    return path


def _cut_packed(pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(raw: Path) -> Path:
        path = raw.with_name("cut")
        packed = pack(raw.read_bytes())
        path.write_bytes(packed[: len(packed) // 2])
        return path
    return make


def _flipped(raw: Path) -> Path:
    path = raw.with_name("flipped.gz")
    packed = bytearray(gz(raw.read_bytes()))
    packed[-6] ^= 1  # the checksum
    path.write_bytes(packed)
    return path


def _cut_raw(raw: Path) -> Path:
    with raw.open("r+b") as file:
        file.truncate(10 * MiB)
    return raw


def _named_as_backing(raw: Path) -> Path:
    path = raw.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", path)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "backing file": (_named_as_backing, "on top of another file"),
    "data file": (_with_external_data, "data is in another file"),
    "VMDK": (_converted("vmdk"), "VMDK"),
    "VMDK with extents": (_converted("vmdk", "-o", "subformat=monolithicFlat"), "VMDK"),
    "VHD": (_converted("vpc"), "VHD"),
    "VHD, fixed": (_converted("vpc", "-o", "subformat=fixed"), "VHD"),
    "VHDX": (_converted("vhdx"), "VHDX"),
    "VDI": (_converted("vdi"), "VDI|web page"),
    "QED": (_converted("qed"), "QED"),
    "truncated qcow2": (_cut, "truncated or damaged qcow2"),
    "truncated raw": (_cut_raw, "truncated disk"),
    "truncated gz": (_cut_packed(gz), "ends in the middle"),
    "truncated xz": (_cut_packed(xz), "ends in the middle"),
    "truncated zst": (_cut_packed(zst), "ends in the middle"),
    "damaged gz": (_flipped, "cannot be unpacked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_nothing_left(case: str, raw: Path) -> None:
    make, reason = REFUSED[case]
    path = make(raw)
    before = sorted(raw.parent.rglob("*"))
    with pytest.raises(ImageError, match=reason):
        import_image(path, "mine", None, progress=QUIET)
    assert store.list_images() == [] and not leftovers()
    assert [entry for entry in before if not entry.exists()] == [], "it took something away"


def test_host_files_are_never_read(raw: Path, tmp_path: Path) -> None:
    """Whoever opens this backing file hangs: it is a FIFO that nobody writes to."""
    trap = tmp_path / "trap"
    os.mkfifo(trap)
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", trap, "-F", "raw", top, "16M")
    done = subprocess.run([QVM, "image", "import", top, "--name", "mine", "--json"], capture_output=True, timeout=60,
                          check=False)
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "image" and str(trap) in error["message"]
    packed = tmp_path / "top.qcow2.gz"
    packed.write_bytes(gz(top.read_bytes()))
    with pytest.raises(ImageError, match="on top of another file"):
        import_image(packed, "mine", None, progress=QUIET)


@pytest.mark.parametrize("pack", [gz, xz, zst])
def test_a_bomb_is_disarmed_by_its_size(
    pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros cost no space, so the size of the disk is what ends it."""
    bomb = tmp_path / "bomb"
    bomb.write_bytes(pack(bytes(64 * MiB)))
    assert bomb.stat().st_size < MiB
    monkeypatch.setattr(unpack, "MAX_SIZE", 32 * MiB)
    with pytest.raises(ImageError, match="no disk is that large"):
        import_image(bomb, "mine", None, progress=QUIET)
    assert not leftovers()


def test_the_disk_is_never_filled(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "disk.zst"
    packed.write_bytes(zst(raw.read_bytes()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda path: usage._replace(free=unpack.RESERVE))
    for path in (packed, raw, make_qcow2(raw)):
        with pytest.raises(NoSpaceError, match="no space for the unpacked disk"):
            import_image(path, "mine", None, progress=QUIET)
    assert not leftovers()


def test_the_architecture_is_found_or_checked_or_asked_for(tmp_path: Path) -> None:
    arm = tmp_path / "arm.raw"
    arm.write_bytes(bootable("BOOTAA64.EFI"))
    assert import_image(arm, "arm", None, progress=QUIET).arch is AARCH64
    with pytest.raises(ImageError, match="for aarch64, not x86_64"):
        import_image(arm, "arm", X86_64, progress=QUIET)
    both = tmp_path / "both.raw"
    both.write_bytes(bootable("BOOTX64.EFI", "BOOTAA64.EFI"))
    with pytest.raises(UsageError, match="boots on"):
        import_image(both, "both", None, progress=QUIET)
    assert import_image(both, "both", X86_64, progress=QUIET).arch is X86_64
    with pytest.raises(ImageError, match="no image 'arm' for x86_64") as wrong:
        ensure_image("arm", X86_64, progress=QUIET)
    assert wrong.value.hint == "it exists for aarch64"


def test_names_and_digests(raw: Path, tmp_path: Path) -> None:
    digest = "sha256:" + hashlib.sha256(raw.read_bytes()).hexdigest()
    with pytest.raises(DigestMismatchError):
        import_image(raw, "mine", None, digest="sha256:" + "0" * 64, progress=QUIET)
    first = import_image(raw, "mine", None, digest=digest, progress=QUIET)
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(gpt([(ESP, fat16({"BOOTX64.EFI": loader(0x8664)})), (LINUX, b"other")])))
    with pytest.raises(UsageError, match="already, with other content"):
        import_image(other, "mine", None, progress=QUIET)
    assert ensure_image("mine", X86_64, progress=QUIET) == first
    second = import_image(other, "mine", None, force=True, progress=QUIET)
    assert ensure_image("mine", X86_64, progress=QUIET) == second != first
    with pytest.raises(UsageError, match="name of the catalogue"):
        import_image(raw, "debian-13", None, progress=QUIET)
    states = {row["id"]: row["state"] for row in ensure.describe_images() if row["name"] == "mine"}
    assert states == {first.id: "outdated", second.id: "ready"}
    assert [row["id"] for row in ensure.prune_images(in_use={})] == [first.id], "the current one stays"
    store.remove_images("mine", in_use={})
    with pytest.raises(UsageError, match="unknown image 'mine'"):
        ensure_image("mine", X86_64, progress=QUIET)
    assert not store.ref_path("mine", X86_64).exists()


def test_a_file_as_image_is_taken_again_when_it_changes(raw: Path) -> None:
    first = ensure_image(str(raw), X86_64, progress=QUIET)
    assert ensure_image(str(raw), X86_64, progress=QUIET) == first
    os.utime(raw, ns=(0, 0))
    assert ensure_image(str(raw), X86_64, progress=QUIET) == first, "the same content"
    with raw.open("r+b") as file:
        file.seek(12 * MiB)
        file.write(b"changed")
    assert ensure_image(str(raw), X86_64, progress=QUIET) != first
    with pytest.raises(ImageError, match="for x86_64, not aarch64"):
        ensure_image(str(raw), AARCH64, progress=QUIET)
    with pytest.raises(ImageError, match="No such file"):
        ensure_image(str(raw) + "x", X86_64, progress=QUIET)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "www"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_address_with_its_digest(raw: Path, served: str, tmp_path: Path) -> None:
    file = tmp_path / "www" / "Cloud Disk.qcow2.xz"
    file.write_bytes(xz(make_qcow2(raw).read_bytes()))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    url = f"{served}/Cloud%20Disk.qcow2.xz"
    image = ensure_image(f"{url}#sha256:{digest}", X86_64, progress=QUIET)
    assert image.disk.read_bytes() == raw.read_bytes()
    assert image.manifest["source"] == url and image.manifest["digest"] == f"sha256:{digest}"
    file.unlink()
    assert ensure_image(f"{url}#sha256:{digest}", X86_64, progress=QUIET) == image, "not fetched again"
    with pytest.raises(ImageError, match="no digest"):
        ensure_image(url, X86_64, progress=QUIET)
    file.write_bytes(b"something else")
    with pytest.raises(DigestMismatchError):
        ensure_image(f"{url}#sha256:{'0' * 64}", X86_64, progress=QUIET)
    assert not leftovers()


def test_a_download_that_is_refused_leaves_nothing(raw: Path, served: str, tmp_path: Path) -> None:
    file = tmp_path / "www" / "top.qcow2"
    shutil.move(_named_as_backing(raw), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ImageError, match="on top of another file"):
        ensure_image(f"{served}/top.qcow2#sha256:{digest}", X86_64, progress=QUIET)
    assert store.list_images() == [] and not leftovers()


@pytest.mark.parametrize("form", ["raw", "qcow2", "gz"])
def test_ctrl_c_leaves_nothing(form: str, tmp_path: Path) -> None:
    """A disk that takes a while, interrupted in the middle of it."""
    path = tmp_path / "big.raw"
    with path.open("wb") as file:
        file.write(bootable("BOOTX64.EFI"))
        for _ in range(40):
            file.write(os.urandom(4 * MiB))
    if form == "qcow2":
        path = make_qcow2(path)
    elif form == "gz":
        packed = tmp_path / "big.gz"
        packed.write_bytes(gz(path.read_bytes()))
        path = packed
    child = subprocess.Popen([QVM, "image", "import", path, "--name", "big"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not any(entry.name.startswith("disk.raw") and entry.stat().st_size
                  for entry in store.images_dir().glob(".fetching-*/image/*")):
        assert time.monotonic() < end and child.poll() is None, "it never began to write"
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130
    time.sleep(0.3)
    assert store.list_images() == [] and not leftovers(), "nothing, and nobody goes on writing"


def test_what_a_killed_import_left_is_pruned(raw: Path) -> None:
    import_image(raw, "mine", None, progress=QUIET)
    left = store.images_dir() / ".fetching-other-any" / "image"
    left.mkdir(parents=True)
    (left / "disk.raw").write_bytes(b"half")
    busy = store.images_dir() / ".fetching-busy-any"
    busy.mkdir()
    with locks.lock(store.images_dir() / "busy-any.lock", what="it"):
        child = subprocess.run([QVM, "image", "prune", "--json"], capture_output=True, check=True)
    assert json.loads(child.stdout)["result"] == []
    assert leftovers() == [busy.name], "it belongs to somebody"


def test_two_at_once_make_one(raw: Path) -> None:
    children = [subprocess.Popen([QVM, "image", "import", raw, "--name", "mine", "--json"], stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL) for _ in range(3)]
    answers = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({answer["result"]["id"] for answer in answers}) == 1
    assert len(store.list_images()) == 1 and not leftovers()


def test_what_the_commands_say(raw: Path) -> None:
    def qvm(*words: str | Path) -> tuple[int, dict[str, Any]]:
        done = subprocess.run([QVM, "image", *words, "--json"], capture_output=True, check=False)
        return done.returncode, json.loads(done.stdout)

    code, answer = qvm("import", raw)
    assert code == 0 and (answer["result"]["name"], answer["result"]["arch"]) == ("disk", "x86_64")
    assert answer["result"]["imported"] is True and answer["result"]["digest"].startswith("sha256:")
    _, listed = qvm("list")
    (row,) = [row for row in listed["result"] if row["name"] == "disk"]
    assert row["state"] == "ready" and row["source"] == str(raw)
    assert qvm("prune") == (0, {**qvm("prune")[1], "result": []})
    code, answer = qvm("import", raw, "--name", "Not A Name")
    assert code == 2 and "--name" in answer["error"]["hint"]
    assert qvm("import", raw.with_name("absent"))[1]["error"]["code"] == "image"
    assert [row["name"] for row in qvm("rm", "disk")[1]["result"]] == ["disk"]
    assert foreign.find_imported("disk", X86_64) is None
