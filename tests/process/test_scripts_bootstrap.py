"""scripts/bootstrap.sh on hosts that lack things: a PATH of our own, an apt-get that only writes down its calls."""

from __future__ import annotations

import os
import platform
import pty
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# What every Debian has and the script itself uses.
BASICS = ("bash", "env", "cat", "cksum", "dirname", "id", "uname", "rm", "test", "ldd")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="looks at Debian hosts"
)


@dataclass
class Host:
    folder: Path

    @property
    def calls(self) -> list[str]:
        log = self.folder / "apt.log"
        return log.read_text().splitlines() if log.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.folder / "bin"), "HOME": str(self.folder), "LOG": str(self.folder / "apt.log"), **more}

    def bootstrap(self, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "scripts/bootstrap.sh", *argv], cwd=self.folder / "checkout", env=self.environment(**environ),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A Debian with nothing on it; installing fails there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in BASICS:
        found = shutil.which(name)
        assert found is not None, name
        (programs / name).symlink_to(found)
    (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    apt = '#!/bin/sh\necho "$@" >>"$LOG"\ncase "$*" in *update*) exit 0 ;; esac\nexit 100\n'
    (programs / "apt-get").write_text(apt)
    for name in ("sudo", "apt-get"):
        (programs / name).chmod(0o755)
    (tmp_path / "checkout" / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "bootstrap.sh", tmp_path / "checkout" / "scripts")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "checkout")
    return Host(tmp_path)


def test_without_a_terminal_it_says_why_and_installs_by_itself(host: Host) -> None:
    done = host.bootstrap(CI="true")
    assert done.returncode == 4
    assert "apt-get could not install: qemu-system" in done.stderr
    assert "builds the VM's image from the Debian mirror" in done.stderr
    update, install = host.calls
    assert update.endswith("update")
    assert "--no-install-recommends" in install
    assert {"qemu-utils", "python3-venv", "openssh-client"} <= set(install.split())
    assert "shellcheck" not in install
    assert not (host.folder / "checkout" / ".venv").exists()


def test_the_test_mode_installs_more(host: Host) -> None:
    host.bootstrap("--test")
    assert {"shellcheck", "qemu-utils"} <= set(host.calls[-1].split())


def test_on_a_terminal_it_asks_and_takes_no_for_an_answer(host: Host) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        ["bash", "scripts/bootstrap.sh"], cwd=host.folder / "checkout", env=host.environment(), stdin=theirs,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"n\n")
    _, text = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 4
    assert "nothing was installed" in text
    assert host.calls == []


def test_without_sudo_it_says_what_root_should_type(host: Host) -> None:
    (host.folder / "bin" / "sudo").unlink()
    (host.folder / "bin" / "id").unlink()
    fake = host.folder / "bin" / "id"
    fake.write_text("#!/bin/sh\necho 1000\n")
    fake.chmod(0o755)
    done = host.bootstrap()
    assert done.returncode == 4
    assert "sudo is not installed; run as root: apt-get install qemu-system" in done.stderr


def test_an_old_python_is_named(host: Host) -> None:
    old = host.folder / "bin" / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = host.bootstrap()
    assert done.returncode == 4
    assert "qvm needs Python 3.11 or newer; this host has Python 3.9.2" in done.stderr
    assert host.calls == []


def test_nothing_missing_means_no_apt_and_no_network(host: Host) -> None:
    for name in ("qemu-system-x86_64", "qemu-system-aarch64", "qemu-img", "mmdebstrap", "mke2fs", "newuidmap", "ssh",
                 "xz", "zstd"):
        program = host.folder / "bin" / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    for path in ("/usr/share/keyrings/debian-archive-keyring.gpg", "/etc/ssl/certs/ca-certificates.crt"):
        if not Path(path).exists():
            pytest.skip(f"{path} is missing: apt-get install debian-archive-keyring ca-certificates")
    python = host.folder / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    checkout = host.folder / "checkout"
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    sums = subprocess.run(["cksum"], stdin=(checkout / "pyproject.toml").open(), capture_output=True, text=True,
                          check=True).stdout.strip()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".qvm-run").write_text(f"{version}\n{sums}\n{checkout}\n")
    done = host.bootstrap()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.calls == []


def test_unknown_arguments_are_refused(host: Host) -> None:
    assert host.bootstrap("--tset").returncode == 2
