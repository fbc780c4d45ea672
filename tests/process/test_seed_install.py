"""install-agent.sh in a root of its own: busybox for commands, and an init system that notes what it is told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qvm.seed.render import load_templates

BUSYBOX = Path("/bin/busybox")
COMMANDS = ("sh", "cmp", "cp", "chmod", "mv", "mkdir", "cat", "echo", "sleep")
NOTE = '#!/bin/sh\necho "$(/bin/busybox basename $0) $*" >>/log\n'


def can_change_root() -> bool:
    return BUSYBOX.exists() and shutil.which("unshare") is not None and subprocess.run(
        ["unshare", "-rm", "true"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip


pytestmark = pytest.mark.skipif(not can_change_root(), reason="needs user namespaces, and busybox-static")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What every image has: commands, a Python, the seed."""
    for folder in ("bin", "dev", "etc/init.d", "etc/systemd/system", "usr/lib", "usr/bin", "run", "seed"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, tmp_path / "bin" / "busybox")
    for name in COMMANDS:
        (tmp_path / "bin" / name).symlink_to("busybox")
    program(tmp_path, "python3")
    (tmp_path / "dev" / "console").write_text("")
    texts = load_templates()
    (tmp_path / "seed" / "agent.py").write_bytes(texts.agent)
    (tmp_path / "seed" / "qvm-agent.service").write_bytes(texts.unit)
    (tmp_path / "seed" / "install-agent.sh").write_bytes(texts.installer)
    return tmp_path


def program(root: Path, name: str) -> None:
    (root / "bin" / name).write_text(NOTE)
    (root / "bin" / name).chmod(0o755)


def install(root: Path) -> tuple[int, list[str], str]:
    """Exit code, what the init system was told since the last time, the console."""
    (root / "log").write_text("")
    (root / "dev" / "console").write_text("")
    done = subprocess.run(
        ["unshare", "-rm", "chroot", root, "/bin/sh", "-c", "/bin/sh /seed/install-agent.sh /seed; code=$?; sleep 0.2; "
         "exit $code"], env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, (root / "log").read_text().splitlines(), (root / "dev" / "console").read_text()


def test_under_systemd(root: Path) -> None:
    program(root, "systemctl")
    (root / "run" / "systemd" / "system").mkdir(parents=True)
    code, told, _ = install(root)
    assert (code, told) == (0, ["systemctl daemon-reload", "systemctl enable qvm-agent.service",
                                "systemctl start --no-block qvm-agent.service"])
    texts = load_templates()
    assert (root / "usr/lib/qvm/agent.py").read_bytes() == texts.agent
    assert (root / "etc/systemd/system/qvm-agent.service").read_bytes() == texts.unit
    assert install(root)[:2] == (0, ["systemctl start --no-block qvm-agent.service"]), "the next boot has little to do"
    (root / "seed" / "agent.py").write_bytes(b"newer")
    install(root)
    assert (root / "usr/lib/qvm/agent.py").read_bytes() == b"newer"


def test_labels_where_the_distribution_has_them(root: Path) -> None:
    program(root, "systemctl")
    program(root, "restorecon")
    (root / "run" / "systemd" / "system").mkdir(parents=True)
    assert install(root)[1][0] == "restorecon -R /usr/lib/qvm /etc/systemd/system/qvm-agent.service"


def test_under_openrc(root: Path) -> None:
    for name in ("rc-update", "rc-service"):
        program(root, name)
    code, told, _ = install(root)
    assert (code, told) == (0, ["rc-update add qvm-agent default", "rc-service qvm-agent --ifnotstarted start"])
    script = root / "etc" / "init.d" / "qvm-agent"
    assert script.stat().st_mode & 0o777 == 0o755
    assert script.read_text().startswith("#!/sbin/openrc-run\n") and "/usr/lib/qvm/agent.py" in script.read_text()
    assert install(root)[:2] == (0, ["rc-service qvm-agent --ifnotstarted start"])


def test_without_python_the_console_says_why(root: Path) -> None:
    (root / "bin" / "python3").unlink()
    code, told, console = install(root)
    assert code == 1 and not told
    assert "no python3, which qvm's agent needs" in console and "could not be installed" in console


def test_a_console_that_cannot_be_opened_is_no_hindrance(root: Path) -> None:
    program(root, "systemctl")
    (root / "run" / "systemd" / "system").mkdir(parents=True)
    (root / "dev" / "console").unlink()
    (root / "dev" / "console").mkdir()
    (root / "log").write_text("")
    done = subprocess.run(["unshare", "-rm", "chroot", root, "/bin/sh", "/seed/install-agent.sh", "/seed"],
                          env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and "systemctl start" in (root / "log").read_text()
