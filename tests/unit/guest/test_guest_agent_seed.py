"""What the agent does to a system, on a scratch root: the seed's files, disks as files, ports that CNI redirects."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from guest_agent import load_agent

from qvm.seed.iso import write_iso

agent = load_agent()

DOCUMENT = {
    "instance_id": "one",
    "hostname": "qvm-dev",
    "hosts": {"host.docker.internal": "10.0.2.2"},
    "user": {"name": "jane", "uid": 1000, "gid": 1000, "home": "/home/jane.guest", "shell": "/bin/bash"},
    "authorized_keys": ["ssh-ed25519 AAAA jane"],
    "host_key": "PRIVATE\n",
    "host_key_public": "ssh-ed25519 BBBB",
    "env": {"http_proxy": 'http://p/?a="b"&c=$d', "WORD": "it's"},
    "dns": ["9.9.9.9"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, text in {
        "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\n",
        "etc/group": "root:x:0:\nsudo:x:27:\ndocker:x:999:admin\n",
        "etc/shadow": "root:*:19000:0:99999:7:::\n",
        "etc/hosts": "127.0.0.1 localhost\n",
        "etc/environment": "PATH=/usr/bin\n",
        "etc/skel/.profile": "# profile\n",
        "etc/ssh/ssh_host_rsa_key": "old",
        "etc/ssh/ssh_host_ed25519_key": "old",
        "bin/bash": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "etc/shadow").chmod(0o640)
    (tmp_path / "etc/resolv.conf").symlink_to("../run/stub.conf")
    return tmp_path


def apply(root: Path, document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    report: dict[str, Any] = agent.Personality(document, str(root)).apply(agent.sha256(json.dumps(document).encode()))
    return report


def test_a_seed_is_applied(root: Path) -> None:
    report = apply(root)
    assert report["errors"] == [] and report["fresh"]

    def text(path: str) -> str:
        return (root / path).read_text()

    assert text("etc/hostname") == "qvm-dev\n"
    assert text("etc/hosts") == ("127.0.0.1 localhost\n# qvm begin\n127.0.1.1 qvm-dev\n"
                                 "10.0.2.2 host.docker.internal\n# qvm end\n")
    assert "jane:x:1000:1000::/home/jane.guest:/bin/bash\n" in text("etc/passwd")
    assert "jane:*:" in text("etc/shadow") and (root / "etc/shadow").stat().st_mode & 0o777 == 0o640
    assert text("etc/group") == "root:x:0:\nsudo:x:27:jane\ndocker:x:999:admin,jane\njane:x:1000:\n"
    assert text("etc/subuid") == "jane:100000:65536\n"
    assert text("home/jane.guest/.profile") == "# profile\n"
    assert (root / "etc/sudoers.d/90-qvm").stat().st_mode & 0o777 == 0o440
    assert text("etc/ssh/authorized_keys.d/jane") == "ssh-ed25519 AAAA jane\n"
    assert sorted(each.name for each in (root / "etc/ssh").glob("ssh_host*")) == [
        "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"]
    assert (root / "etc/ssh/ssh_host_ed25519_key").stat().st_mode & 0o777 == 0o600
    assert "PermitRootLogin no\n" in text("etc/ssh/sshd_config.d/10-qvm.conf")
    assert text("etc/resolv.conf") == "nameserver 9.9.9.9\n" and not (root / "etc/resolv.conf").is_symlink()


def test_environment_reaches_shells_services_and_pam(root: Path) -> None:
    apply(root)
    shown = subprocess.run(["sh", "-c", f". {root}/etc/profile.d/qvm.sh; printf %s \"$http_proxy|$WORD\""],
                           capture_output=True, text=True, check=True, env={})
    assert shown.stdout == 'http://p/?a="b"&c=$d|it\'s'
    assert (root / "etc/qvm/environment").read_text() == 'http_proxy="http://p/?a=\\"b\\"&c=$d"\nWORD="it\'s"\n'
    assert (root / "etc/environment").read_text().startswith("PATH=/usr/bin\n# qvm begin\n")


def test_the_same_seed_again_changes_nothing_and_another_does(root: Path) -> None:
    apply(root)
    (root / "etc/hostname").write_text("changed by hand\n")
    again = apply(root)
    assert not again["fresh"] and (root / "etc/hostname").read_text() == "changed by hand\n"
    passwd = (root / "etc/passwd").read_text()
    other = apply(root, DOCUMENT | {"hostname": "other", "env": {}})
    assert other["fresh"] and other["errors"] == []
    assert (root / "etc/hosts").read_text().count("127.0.1.1") == 1
    assert (root / "etc/passwd").read_text() == passwd
    assert "WORD" not in (root / "etc/environment").read_text()


def test_root_keeps_its_account(root: Path) -> None:
    before = (root / "etc/passwd").read_text()
    user = {"name": "root", "uid": 0, "gid": 0, "home": "/root", "shell": "/bin/bash"}
    assert apply(root, DOCUMENT | {"user": user})["errors"] == []
    assert (root / "etc/passwd").read_text() == before
    assert "PermitRootLogin prohibit-password" in (root / "etc/ssh/sshd_config.d/10-qvm.conf").read_text()
    assert (root / "etc/ssh/authorized_keys.d/root").exists()


def test_a_uid_that_the_image_uses_gets_our_name_and_a_shell_that_exists(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("debian:x:1000:1000::/home/debian:/bin/bash\n")
    user = {"name": "jane", "uid": 1000, "gid": 27, "home": "/home/jane.guest", "shell": "/usr/bin/fish"}
    apply(root, DOCUMENT | {"user": user})
    lines = (root / "etc/passwd").read_text().splitlines()
    ours = "jane:x:1000:27::/home/jane.guest:/bin/sh"
    assert lines.index(ours) < lines.index("debian:x:1000:1000::/home/debian:/bin/bash")
    assert "jane:x" not in (root / "etc/group").read_text(), "gid 27 has a name already"


def test_one_step_that_fails_stops_no_other_and_is_tried_again(root: Path) -> None:
    user = {"name": "www-data", "uid": 1000, "gid": 1000, "home": "/home/w", "shell": "/bin/bash"}
    report = apply(root, DOCUMENT | {"user": user})
    assert [error["step"] for error in report["errors"]] == ["user"]
    assert "system account" in report["errors"][0]["message"]
    assert (root / "etc/hostname").read_text() == "qvm-dev\n"
    assert apply(root, DOCUMENT | {"user": user})["fresh"]


def test_the_seed_is_read_from_the_iso(tmp_path: Path) -> None:
    document = json.dumps(DOCUMENT).encode()
    many = {f"file{number:03}.txt": b"x" * number for number in range(60)}  # a directory of several sectors
    write_iso({"qvm.json": document, "user-data": b"y" * 5000} | many, tmp_path / "seed.iso")
    assert agent.load_seed(str(tmp_path / "seed.iso")) == document
    assert agent.read_iso_file(str(tmp_path / "seed.iso"), "NOTHING.HERE") is None
    (tmp_path / "noise").write_bytes(os.urandom(1 << 16))
    assert agent.load_seed(str(tmp_path / "noise")) is None


def test_only_a_disk_without_anything_is_blank(tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def made(offset: int | None) -> bool:
        with disk.open("wb") as file:
            file.truncate(64 << 20)
            if offset is not None:
                file.seek(offset, 2 if offset < 0 else 0)
                file.write(b"\1")
        return bool(agent.is_blank(str(disk)))

    assert made(None)
    assert not any(made(offset) for offset in (0, 510, 1080, 32768, 65600, -1, -512, -65536))


@pytest.mark.skipif(not shutil.which("mkfs.ext4") and not Path("/sbin/mkfs.ext4").exists(),
                    reason="mkfs.ext4 is missing: apt install e2fsprogs")
def test_our_file_system_is_recognised(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(8 << 30)
    assert agent.Ext4.find(str(disk)) is None
    program = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
    subprocess.run([program, "-q", "-F", "-L", "qvm-data", "-m", "0", *agent.MKFS_OPTIONS, str(disk)], check=True)
    system = agent.Ext4.find(str(disk))
    assert system.blocks * system.block_size == 8 << 30 and not agent.is_blank(str(disk))
    assert disk.stat().st_blocks * 512 < 40 << 20


def test_paths_of_mounts_are_unescaped() -> None:
    assert agent.unescape(rb"/src/a\040b\134c") == b"/src/a b\\c"
    assert agent.unescape(b"/plain") == b"/plain"


def test_ports_that_cni_redirects_are_reported(tmp_path: Path) -> None:
    results = tmp_path / "var/lib/cni/results"
    results.mkdir(parents=True)
    (tmp_path / "run").mkdir()

    def attach(name: str, mappings: Any) -> None:
        (results / name).write_text(json.dumps({"kind": "cniCacheV1", "capabilityArgs": {"portMappings": mappings}}))

    attach("left-from-a-crash", [{"HostPort": 9999, "ContainerPort": 1, "Protocol": "tcp", "HostIP": ""}])
    listeners = agent.Listeners(str(tmp_path))
    assert listeners.redirected() == set(), "nothing is told before it is known what is stale"
    listeners.remember_stale()
    assert listeners.redirected() == set()
    attach("bridge-1-eth0", [
        {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"},
        {"hostPort": 8081, "containerPort": 80, "protocol": "TCP", "hostIP": "127.0.0.1"},
        {"HostPort": 53, "ContainerPort": 53, "Protocol": "udp", "HostIP": ""},
    ])
    (results / "half-written").write_text('{"capabilityArgs": {"portM')
    (results / "none").write_text('{"capabilityArgs": null}')
    wanted = {("tcp", "0.0.0.0", 8080), ("tcp", "127.0.0.1", 8081), ("udp", "0.0.0.0", 53)}
    assert listeners.redirected() == wanted
    # A restarted agent knows what was stale before it, and what is not.
    again = agent.Listeners(str(tmp_path))
    again.remember_stale()
    assert again.redirected() == wanted
    (results / "bridge-1-eth0").unlink()
    assert listeners.redirected() == set()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_netlink_and_proc_tell_the_same(tmp_path: Path, protocol: str) -> None:
    listeners = agent.Listeners(str(tmp_path))
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as four, socket.socket(socket.AF_INET6, kind) as six:
        for sock, address in ((four, "127.0.0.1"), (six, "::1")):
            sock.bind((address, 0))
            if protocol == "tcp":
                sock.listen()
        wanted = {("127.0.0.1", four.getsockname()[1]), ("::1", six.getsockname()[1])}
        assert wanted <= listeners.by_proc(protocol)
        told = listeners.changed()
        assert told is not None and wanted <= {(address, port) for address, port in told[protocol]}
        try:
            dump = listeners.diag.dump(protocol)
        except OSError as error:
            pytest.skip(f"this kernel has no sock_diag for {protocol} ({error}); one with {protocol}_diag shows it")
        assert wanted <= set(agent.parse_dump(dump))


def test_a_mount_needs_a_place(tmp_path: Path) -> None:
    for target in ("relative", "/", "//", "/.."):
        with pytest.raises(agent.Failure):
            agent.mount_9p({"tag": "qvm0", "target": target}, {})


def test_resize_request_is_the_kernels() -> None:
    # _IOW('f', 16, __u64) by asm-generic/ioctl.h: direction 1, size 8, type 'f', number 16.
    assert 1 << 30 | struct.calcsize("Q") << 16 | ord("f") << 8 | 16 == agent.EXT4_IOC_RESIZE_FS
