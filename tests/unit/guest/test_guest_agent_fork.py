"""What the agent does when a frozen machine goes on as another one, as far as a scratch root and own processes show."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_agent import load_agent

from qvm.guest.protocol import MountUser, SeedState
from qvm.seed.data import SeedData
from qvm.seed.render import fork_document

OLD, NEW = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"

agent = load_agent()

DATA = SeedData(
    instance_id="one", hostname="dev", user="jane", uid=1000, gid=1000, home="/home/jane.guest", shell="/bin/bash",
    authorized_keys=("ssh-ed25519 AAAA jane",), host_key="PRIVATE\n", host_key_public="ssh-ed25519 BBBB",
    env={"A": "1"}, mac="52:54:00:00:00:01",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, text in {
        "bin/bash": "",
        "etc/group": "root:x:0:\nsudo:x:27:\n",
        "etc/hostname": "\n",
        "etc/machine-id": OLD + "\n",
        "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
        "etc/shadow": "root:*:19000:0:99999:7:::\n",
        "etc/skel/.profile": "# skeleton\n",
        "etc/ssh/ssh_host_ed25519_key": "\n",
        "home/.qvm/.profile": "# waits\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def fork(root: Path, known: dict[str, Any] | None = None, data: SeedData = DATA) -> tuple[dict[str, Any], Any]:
    document = fork_document(data)
    report: dict[str, Any] = agent.Fork(document, known or {}, 0, str(root)).apply()
    return document, report


def test_a_fork_becomes_its_own_machine(root: Path) -> None:
    inode = (root / "etc/hostname").stat().st_ino
    document, report = fork(root)
    assert report["errors"] == [] and report["fresh"] and report["stale"] == []
    assert (root / "etc/hostname").read_text() == "dev\n"
    assert (root / "etc/hostname").stat().st_ino == inode, "written into the file that was there"
    assert (root / "etc/machine-id").read_text() == document["fork"]["machine_id"] + "\n"
    assert (root / "etc/ssh/ssh_host_ed25519_key").read_text() == "PRIVATE\n"
    assert (root / "etc/ssh/authorized_keys.d/jane").read_text() == "ssh-ed25519 AAAA jane\n"
    assert "jane:x:1000:1000" in (root / "etc/passwd").read_text()
    assert (root / "home/jane.guest/.profile").read_text() == "# waits\n", "the home that waited was taken"
    assert not (root / "home/.qvm").exists()
    assert not (root / "etc/qvm/applied").exists(), "the next cold start applies its seed, whatever a crash lost"
    steps = list(report["timings"])
    assert steps[:2] == ["entropy", "clock"] and steps[-1] == "mounts"


def test_a_fork_of_a_fork_changes_again(root: Path) -> None:
    first, _ = fork(root)
    second, report = fork(root)
    assert report["errors"] == []
    assert first["fork"]["machine_id"] != second["fork"]["machine_id"]
    assert (root / "etc/machine-id").read_text() == second["fork"]["machine_id"] + "\n"
    assert (root / "etc/hosts").read_text().count("127.0.1.1") == 1


def test_without_a_home_that_waits_one_is_made(root: Path) -> None:
    (root / "home/.qvm/.profile").unlink()
    (root / "home/.qvm").rmdir()
    assert fork(root)[1]["errors"] == []
    assert (root / "home/jane.guest/.profile").read_text() == "# skeleton\n"


def test_overwriting_keeps_the_file_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("much longer than what comes\n")
    inode = path.stat().st_ino
    assert agent.overwrite(str(path), b"short\n", 0o600)
    assert (path.read_text(), path.stat().st_ino, path.stat().st_mode & 0o777) == ("short\n", inode, 0o600)
    assert not agent.overwrite(str(path), b"short\n", 0o600)
    assert agent.overwrite(str(tmp_path / "folder" / "new"), b"made")
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "link").symlink_to("other")
    assert agent.overwrite(str(tmp_path / "link"), b"instead of the link")
    assert (tmp_path / "other").read_text() == "untouched" and not (tmp_path / "link").is_symlink()


HOLDER = """
import sys
kept = [bytes.fromhex(sys.argv[1]), sys.argv[1].encode() * 1, bytearray(sys.argv[2].encode())]
sys.argv = sys.argv[:1]
print("ready", flush=True)
for line in sys.stdin:
    print(kept[0].hex(), bytes(kept[2]).decode(), flush=True)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    uuid = f"{OLD[:8]}-{OLD[8:12]}-{OLD[12:16]}-{OLD[16:20]}-{OLD[20:]}"
    with subprocess.Popen([sys.executable, "-c", HOLDER, OLD, uuid], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield child
        child.kill()


def track(pids: list[int], file: Path | None = None) -> Any:
    try:
        return agent.KnownId.find({"other": "f" * 32, "wanted": OLD}, pids, str(file) if file else None)["wanted"]
    except PermissionError:
        pytest.skip("this system lets nobody read a child's memory (kernel.yama.ptrace_scope 2 or 3); root may")


def test_an_id_is_replaced_where_a_program_keeps_it(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert holder.stdin is not None and holder.stdout is not None
    file = tmp_path / "engine-id"
    file.write_text("01234567-89ab-cdef-0123-456789abcdef")
    known = track([holder.pid], file)
    assert known.count >= 3
    assert known.replace(NEW)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == f"{NEW} fedcba98-7654-3210-fedc-ba9876543210\n"
    assert file.read_text() == "fedcba98-7654-3210-fedc-ba9876543210"
    assert known.replace(OLD), "and once more"
    assert file.read_text() == "01234567-89ab-cdef-0123-456789abcdef"
    known.close()


def test_a_program_that_has_gone_needs_no_new_id(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    file = tmp_path / "engine-id"
    file.write_text(OLD + "\n")
    known = track([holder.pid], file)
    holder.kill()
    holder.wait()
    assert known.replace(NEW)
    assert file.read_text() == NEW + "\n", "whoever starts next reads it"


def test_an_id_that_is_not_where_it_was_is_told(root: Path, holder: subprocess.Popen[str]) -> None:
    known = track([holder.pid])
    known.digits = NEW  # as if the program had changed it since
    _, report = fork(root, {"docker-engine": known})
    assert report["stale"] == ["docker-engine"] and report["errors"] == []


def test_each_fork_gets_another_id_of_the_right_form(root: Path) -> None:
    class Known:
        ids: list[str] = []  # noqa: RUF012

        def replace(self, digits: str) -> bool:
            self.ids.append(digits)
            return True

    known = Known()
    documents = [fork(root, {"engine": known, "machine-id": known})[0] for _ in range(2)]
    engine, machine = known.ids[::2], known.ids[1::2]
    assert len(set(engine)) == 2
    assert all(len(digits) == 32 and digits[12] == "4" and digits[16] in "89ab" for digits in engine)
    assert machine == [document["fork"]["machine_id"] for document in documents]


def test_who_holds_a_mount_is_found(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.path.ismount(shared):
        pytest.skip("/dev/shm is no mount here; any Linux with systemd has it")
    name = shared / f"qvm-test-{os.getpid()}"
    script = "import sys, time; file = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(60)"
    try:
        with subprocess.Popen([sys.executable, "-c", script, str(name)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            users = agent.mount_users([str(shared), str(tmp_path)])
            child.kill()
    finally:
        name.unlink(missing_ok=True)
    ours = [MountUser.from_message(user) for user in users if user["pid"] == child.pid]
    assert [(user.target, user.how) for user in ours] == [(str(shared), "fd")]
    assert not any(user["target"] == str(tmp_path) for user in users), "no mount of its own"


def test_mount_points_are_told_by_their_device() -> None:
    assert agent.is_mount("/proc") and not agent.is_mount("/proc/self") and not agent.is_mount("/no/such/folder")


def test_the_container_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    number = "a1" * 32
    for line, wanted in {
        f"0::/system.slice/docker-{number}.scope\n": number,
        f"0::/default/{number}\n": number,
        "0::/user.slice/user-1000.slice/session-1.scope\n": None,
        f"0::/x/{'g' * 64}\n": None,
    }.items():
        monkeypatch.setattr(agent, "read", lambda _path, line=line: line.encode())
        assert agent.container_of(1) == wanted


def test_stale_ids_reach_the_host() -> None:
    assert SeedState.from_message({"state": "applied", "stale": ["docker-engine"]}).stale == ("docker-engine",)
