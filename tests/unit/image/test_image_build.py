"""How a base is built: where its tree lies, who builds it, and that the same tree makes the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qvm import process
from qvm.arch import AARCH64, RISCV64, X86_64, find_arch
from qvm.commands import builder as vm_builder
from qvm.errors import HostError, ImageError
from qvm.image import memory, mirror, namespace, recipe, rootfs
from qvm.image.builder import BuildJob
from qvm.image.recipe import find_recipe
from qvm.progress import NullProgress, Progress
from qvm.units import GiB

SCRIPTS = Path(__file__).parents[3] / "images"
EPOCH = 1_760_000_000
Heard = Callable[[str], None]
Logged = Callable[[bytes], None]


def test_the_tree_lies_in_memory_only_where_there_is_room() -> None:
    assert memory.choose_tree_bytes(16 * GiB, None) == memory.TREE
    assert memory.choose_tree_bytes(memory.TREE + memory.SPARE - 1, None) == 0
    assert memory.choose_tree_bytes(16 * GiB, 2 * GiB) == 0
    assert memory.choose_tree_bytes(None, None) == 0


def test_what_memory_is_available() -> None:
    assert memory.parse_available("MemTotal:  100 kB\nMemAvailable:    2048 kB\n") == 2 << 20
    assert memory.parse_available("MemTotal:  100 kB\n") is None
    assert memory.group_room("max\n", "4096\n") is None
    assert memory.group_room("8192\n", "4096\n") == 4096
    assert memory.group_room("4096\n", "8192\n") == 0
    assert memory.group_room("", "") is None


def test_the_key_of_a_base_follows_every_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = find_recipe("debian-13")
    assert found is not None
    copies = [Path(shutil.copy(path, tmp_path)) for path in recipe.build_scripts()]
    monkeypatch.setattr(recipe, "build_scripts", lambda: copies)
    keys = {recipe.base_key(found, AARCH64)}
    for path in copies:
        path.write_text(path.read_text() + "#\n")
        keys.add(recipe.base_key(found, AARCH64))
    assert len(keys) == len(copies) + 1


def test_a_recipe_names_architectures_that_exist() -> None:
    for name in recipe.list_recipes():
        found = find_recipe(name)
        assert found is not None
        assert [arch for arch in found.arches if find_arch(arch) is None] == []


def _hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    monkeypatch.setattr(process, "find_program", lambda name, *_: None if name in hidden else Path("/bin") / name)


def _refuse(job: BuildJob, *, on_line: Heard, log: Logged, progress: Progress) -> None:
    raise AssertionError("not to be called")


def test_a_builder_is_chosen_where_programs_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch)
    assert rootfs.choose_builder(_refuse) is None
    for name in ("mmdebstrap", "apt-get", "dpkg"):
        _hide(monkeypatch, name)
        assert rootfs.choose_builder(_refuse) is _refuse
        assert rootfs.choose_builder(None) is None


def test_what_any_build_needs_is_told_also_with_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "mmdebstrap", "debugfs")
    with pytest.raises(HostError, match="debugfs") as caught:
        rootfs.choose_builder(_refuse)
    assert "e2fsprogs" in (caught.value.hint or "")


def test_without_a_builder_the_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "mmdebstrap")
    with pytest.raises(HostError, match="mmdebstrap") as caught:
        rootfs.check_programs(X86_64)
    assert caught.value.hint == "sudo apt install mmdebstrap"


@pytest.fixture
def base_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, a mirror that answers and a host without mmdebstrap; the folder of logs."""
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    _hide(monkeypatch, "mmdebstrap")
    monkeypatch.setattr(mirror, "probe_mirror", lambda *_: mirror.Mirror("http://m/debian", None))
    monkeypatch.setattr(mirror, "KEYRING", tmp_path / "no-such-keyring")
    monkeypatch.setattr(namespace, "is_root", lambda: True)
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def test_a_base_made_by_a_builder_is_taken_and_logged(base_parts: Path) -> None:
    found = find_recipe("debian-13")
    assert found is not None

    def make(job: BuildJob, *, on_line: Heard, log: Logged, progress: Progress) -> None:
        assert "http://m/debian" in (job.out / "sources.list").read_text()
        assert "path-exclude=/usr/share/man/*" in (job.out / "dpkg" / "dpkg.cfg").read_text()
        assert (job.environment["QVM_ARCH"], job.environment["QVM_BINFMT"]) == ("riscv64", "qemu-riscv64")
        assert (job.scripts / "build-vm.sh").is_file()
        log(b"hello\n")
        on_line("qvm-packages: 1")
        for name in rootfs.BASE_FILES:
            (job.out / name).write_text(name)

    folder = rootfs.build_base(found, RISCV64, builder=make, progress=NullProgress(), log=base_parts / "log")
    assert folder == rootfs.find_base(found, RISCV64)
    assert (base_parts / "log").read_text() == "hello\n"


def test_what_a_builder_says_last_tells_why_it_failed(base_parts: Path) -> None:
    found = find_recipe("debian-13")
    assert found is not None

    def fail(job: BuildJob, *, on_line: Heard, log: Logged, progress: Progress) -> None:
        raise ImageError("no", details="E: Failed to fetch http://m/debian/x.deb")

    with pytest.raises(ImageError, match="building the image failed") as caught:
        rootfs.build_base(found, X86_64, builder=fail, progress=NullProgress(), log=base_parts / "log")
    assert "QVM_DEBIAN_MIRROR" in (caught.value.hint or "")
    assert [path for path in rootfs.bases_dir().iterdir() if path.is_dir()] == []


def test_only_what_killed_builds_have_left_is_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(namespace, "is_root", lambda: True)
    rootfs.bases_dir().mkdir(parents=True)
    left = rootfs.bases_dir() / "dead.building-1"
    left.mkdir()
    with rootfs.work_folder("a") as first:
        monkeypatch.setattr(rootfs.os, "getpid", lambda: 7)
        with rootfs.work_folder("b") as second:
            assert not left.exists() and first.is_dir() and second.is_dir()
        assert first.is_dir() and not second.exists()
        first.rename(rootfs.bases_dir() / "a")
    assert (rootfs.bases_dir() / "a").is_dir()


def test_output_in_pieces_becomes_lines() -> None:
    said: list[str] = []
    raw: list[bytes] = []
    lines = vm_builder.Lines(said.append, raw.append)
    for piece in (b"Unpack", b"ing a\nqvm-alive\nE: b", b"ad\nrest"):
        lines.feed(piece)
    assert said == ["Unpacking a", "qvm-alive", "E: bad"]
    assert lines.last == ["Unpacking a", "E: bad"]
    assert b"".join(raw) == b"Unpacking a\nqvm-alive\nE: bad\nrest"


def _make_tree(root: Path, names: list[str]) -> Path:
    """The same content for the same names, made in their order."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name * 999)
    with (root / "holes").open("wb") as file:
        file.truncate(3 << 20)
    (root / "linked").hardlink_to(root / "b/2")
    (root / "symbolic").symlink_to("b/2")
    for path in (root, *root.rglob("*")):
        with suppress(FileNotFoundError):
            os.utime(path, (EPOCH - 9, EPOCH - 9), follow_symlinks=False)
    return root


def _write_disk(tree: Path, image: Path, name: str = "debian-13 x86_64") -> str:
    assert process.find_program("mke2fs"), "needs mke2fs: apt install e2fsprogs"
    env = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "SOURCE_DATE_EPOCH": str(EPOCH)}
    subprocess.run(["sh", SCRIPTS / "build-disk.sh", tree, image, str(256 << 20), name], env=env, check=True)
    return hashlib.sha256(image.read_bytes()).hexdigest()


def test_the_same_tree_makes_the_same_disk(tmp_path: Path) -> None:
    names = ["a/1", "a/3", "b/2", "c"]
    first = _write_disk(_make_tree(tmp_path / "x", names), tmp_path / "1.raw")
    # Made later, in another order, and read meanwhile: other inode numbers, other times of change and of reading.
    again = _make_tree(tmp_path / "y", list(reversed(names)))
    (again / "c").chmod(0o600)
    (again / "c").chmod((tmp_path / "x" / "c").stat().st_mode & 0o777)
    assert _write_disk(again, tmp_path / "2.raw") == first
    (again / "c").write_text("another")
    assert _write_disk(again, tmp_path / "3.raw") != first


def test_a_disk_is_in_order_and_named_after_its_image(tmp_path: Path) -> None:
    tree = _make_tree(tmp_path / "x", ["a/1", "b/2"])
    for number, name in enumerate(("debian-13 x86_64", "debian-13 aarch64")):
        _write_disk(tree, tmp_path / f"{number}.raw", name)
        program = process.find_program("e2fsck")
        assert program is not None
        image = tmp_path / f"{number}.raw"
        checked = subprocess.run([program, "-fn", image], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    uuids = {(tmp_path / f"{number}.raw").read_bytes()[1024 + 0x68 : 1024 + 0x78] for number in range(2)}
    assert len(uuids) == 2


def test_compiling_a_tree_is_by_time_and_stays_inside_it(tmp_path: Path) -> None:
    package = tmp_path / "usr/lib/python3/p"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    (package / "broken.py").write_text("x = (\n")
    (package / "away.py").symlink_to("/etc/python3/away.py")
    os.utime(package / "a.py", (EPOCH, EPOCH))
    done = subprocess.run(
        [sys.executable, "-S", "-s", SCRIPTS / "compile.py", "--tree", tmp_path], text=True, capture_output=True,
        input="".join(f"usr/lib/python3/p/{name}.py\n" for name in ("a", "away", "broken")), check=True,
    )  # fmt: skip
    assert "/usr/lib/python3/p/broken.py is not compiled" in done.stdout
    (compiled,) = (package / "__pycache__").iterdir()
    data = compiled.read_bytes()
    assert compiled.name == f"a.{sys.implementation.cache_tag}.pyc"
    assert data[4:16] == bytes(4) + EPOCH.to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert b"/usr/lib/python3/p/a.py" in data and str(tmp_path).encode() not in data
