"""Recipes, tools, the catalogue, and the keys that decide whether an image is current."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qvm.arch import AARCH64, X86_64
from qvm.errors import ImageError, UsageError
from qvm.image import recipe as module
from qvm.image.bake import compile_module, render_script, unit_links
from qvm.image.catalogue import find_entry, load_catalogue
from qvm.image.download import parse_digest
from qvm.image.ensure import ensure_image
from qvm.image.recipe import (
    BakedFile,
    Recipe,
    baked_files,
    base_key,
    check_arch,
    find_recipe,
    image_key,
    list_recipes,
    load_tools,
)
from qvm.image.rootfs import PackageProgress, build_environment, dpkg_options
from qvm.image.tools import go_build_argv
from qvm.progress import NullProgress


@pytest.fixture
def debian() -> Recipe:
    found = find_recipe("debian-13")
    assert found is not None
    return found


def test_every_recipe_loads() -> None:
    assert "debian-13" in list_recipes()
    for name in list_recipes():
        found = find_recipe(name)
        assert found is not None and found.name == name
        assert set(found.tools) <= set(load_tools())


def test_unknown_recipe() -> None:
    assert find_recipe("catalogue") is None
    assert find_recipe("nothing") is None


def test_tools_are_pinned() -> None:
    for tool in load_tools().values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", tool.version)
        for archive in tool.archives.values():
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
            assert f"v{tool.version}" in archive.url


def test_catalogue_entries_are_versioned_and_digested() -> None:
    downloads = [entry for entry in load_catalogue() if entry.url]
    assert {entry.arch.name for entry in downloads} == {"x86_64", "aarch64"}
    for name in ("debian", "ubuntu", "alpine"):
        assert any(entry.name.startswith(name) for entry in downloads)
    for entry in downloads:
        assert entry.url is not None and entry.digest is not None
        parse_digest(entry.digest)
        assert entry.url.startswith("https://") and "latest" not in entry.url and "/current" not in entry.url
    names = [(entry.name, entry.arch.name) for entry in load_catalogue()]
    assert len(names) == len(set(names))


def test_find_entry() -> None:
    entry = find_entry("debian-13", X86_64)
    assert entry is not None and entry.url is None
    assert find_entry("debian-99", X86_64) is None


def test_unknown_image_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'debian-13'"):
        ensure_image("debain-13", X86_64, progress=NullProgress())


@pytest.mark.parametrize("text", ["", "sha256:12", "md5:" + "0" * 32, "sha256:" + "g" * 64, "0" * 64])
def test_bad_digests(text: str) -> None:
    with pytest.raises(ImageError, match="is no digest"):
        parse_digest(text)


def test_keys_follow_what_matters(debian: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base, image = base_key(debian, X86_64), image_key(debian, X86_64)
    assert base_key(debian, AARCH64) != base
    assert base_key(replace(debian, packages=(*debian.packages, "vim")), X86_64) != base
    other = replace(debian, cmdline="root=/dev/vdb")
    assert base_key(other, X86_64) == base, "a new command line needs no new installation"
    assert image_key(other, X86_64) != image
    changed = [*baked_files()[1:], BakedFile("/usr/lib/qvm/agent.py", 0o755, b"another agent")]
    monkeypatch.setattr(module, "baked_files", lambda: changed)
    assert image_key(debian, X86_64) != image


def test_agent_and_units_are_baked(debian: Recipe) -> None:
    files = {file.path: file for file in baked_files()}
    assert files["/usr/lib/qvm/agent.py"].mode == 0o644, "imported, never run by itself"
    assert files["/usr/lib/qvm/acpi/PWRF/00000080"].mode == 0o755
    assert files["/usr/lib/systemd/system/qvm-agent.service"].mode == 0o644
    for units in debian.enable.values():
        for unit in units:
            assert unit.startswith("ssh.") or f"/usr/lib/systemd/system/{unit}" in files


def test_arch_without_recipe(debian: Recipe) -> None:
    with pytest.raises(ImageError, match="no recipe"):
        check_arch(replace(debian, arches=("aarch64",)), X86_64)


def test_units_become_links(debian: Recipe) -> None:
    small = replace(debian, mask=("a.timer",), mask_files=("/etc/x",), enable={"t.target": ("b.service",)},
                    disable={"u.target": ("c.service",)})
    links, removed = unit_links(small)
    assert links == {
        "/etc/systemd/system/a.timer": "/dev/null",
        "/etc/x": "/dev/null",
        "/etc/systemd/system/t.target.wants/b.service": "/usr/lib/systemd/system/b.service",
    }
    assert removed == [f"{folder}/systemd/system/u.target.wants/c.service" for folder in ("/etc", "/usr/lib")]


def test_debugfs_script() -> None:
    script = render_script([("/usr/lib/q/f", 0o755, Path("/tmp/0"))], {"/etc/l": "/dev/null"}, ["/old"])
    assert script.splitlines() == [
        "rm /old", "mkdir /usr", "mkdir /usr/lib", "mkdir /usr/lib/q", "mkdir /etc",
        "rm /usr/lib/q/f", "write /tmp/0 /usr/lib/q/f", "sif /usr/lib/q/f mode 0100755",
        "sif /usr/lib/q/f uid 0", "sif /usr/lib/q/f gid 0", "rm /etc/l", "symlink /etc/l /dev/null",
    ]  # fmt: skip


def test_incomplete_base_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="incomplete"):
        compile_module(tmp_path, BakedFile("/a.py", 0o644, b""))


def test_build_environment(debian: Recipe) -> None:
    found = build_environment(debian, AARCH64, Path("/w"), Path("/p"), host=X86_64, tree_bytes=7)
    assert (found["QVM_ARCH"], found["QVM_HOST_ARCH"], found["QVM_TREE_BYTES"]) == ("arm64", "amd64", "7")
    assert found["QVM_LABEL"] == "debian-13 aarch64"
    assert found["QVM_INCLUDE"].startswith("linux-image-arm64,")
    assert "docker.io" in found["QVM_INCLUDE"].split(",")
    assert "path-exclude=/usr/share/man/*\n" in dpkg_options(debian)
    excluded = dpkg_options(debian)
    assert excluded.index("path-exclude=/usr/bin/qemu-*") < excluded.index("path-include=/usr/bin/qemu-aarch64")


def test_go_builds_the_pinned_version() -> None:
    argv = go_build_argv(load_tools()["nerdctl"], Path("/go"), Path("/out"))
    assert argv[:2] == ["/go", "build"] and argv[-1] == "./cmd/nerdctl"
    assert any(f"Version=v{load_tools()['nerdctl'].version}" in word for word in argv)


class _Step:
    def __init__(self) -> None:
        self.updates: list[tuple[int, int | None]] = []
        self.details: list[str] = []

    def update(self, done: int, total: int | None = None) -> None:
        self.updates.append((done, total))

    def detail(self, text: str) -> None:
        self.details.append(text)


def test_package_progress() -> None:
    step, phases = _Step(), list[str]()
    follower = PackageProgress(step, phases.append)
    for line in (
        "Get:1 http://deb.debian.org/debian trixie InRelease [140 kB]",
        "Get:1 http://deb.debian.org/debian trixie/main amd64 runc amd64 1.1 [3,229 kB]",
        "qvm-packages: 2",
        "Unpacking libc6:amd64 (2.41) ...", "Unpacking runc (1.1) ...", "Setting up libc6:amd64 (2.41) ...",
        "Setting up runc (1.1) ...", "some noise", "qvm-phase: disk",
    ):  # fmt: skip
        follower.line(line)
    assert step.updates[-1] == (4, 5)
    assert step.details[0] == "fetching runc" and step.details[-1] == "setting up runc"
    assert phases == ["disk"]
