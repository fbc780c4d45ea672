"""Names, and what else a guest has of its host: name servers followed while it runs, the SSH agent, certificates.

The VM lives in a mount namespace whose /etc/resolv.conf is the test's, and asks name servers of the test on the
loopback; that takes root. Two VMs (one with docker), about 90 s, and more on a loaded host.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import QVM, User, clear, make_user, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

OFFICE, VPN, CORP = "127.0.0.77", "127.0.0.78", "127.0.0.1"
GATEWAY = "192.168.5.2"
ANSWERS = {OFFICE: {"intranet.office.example": "10.5.5.5"}, VPN: {"intranet.vpn.example": "10.6.6.6"},
           CORP: {"git.corp.example": "10.7.7.7"}}
FOLLOWED_WITHIN = 15.0
"""Seconds; a loaded host. Ours looks every 2, QEMU every second."""


def serve_names(sock: socket.socket, answers: dict[str, str]) -> None:
    """A name server that knows `answers`, and says of everything else that it does not exist."""
    while True:
        try:
            message, asker = sock.recvfrom(4096)
        except OSError:
            return
        labels, at = [], 12
        while message[at]:
            labels.append(message[at + 1 : at + 1 + message[at]].decode())
            at += 1 + message[at]
        kind = struct.unpack_from(">H", message, at + 1)[0]
        address = answers.get(".".join(labels).lower())
        record = b"" if address is None or kind != 1 else (
            b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(address))
        flags = 0x8180 if address is not None else 0x8183
        head = message[:2] + struct.pack(">HHHHH", flags, 1, int(bool(record)), 0, 0)
        sock.sendto(head + message[12 : at + 5] + record, asker)


@pytest.fixture(scope="module")
def host(cache_home: Path) -> Iterator[User]:
    """A user whose commands see `resolv.conf` of their home as the host's."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("another /etc/resolv.conf takes a mount namespace: run as root, with util-linux")
    user = make_user(cache_home)
    use(user, OFFICE, "office.example")
    with ExitStack() as stack:
        for address, answers in ANSWERS.items():
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            try:
                sock.bind((address, 53))
            except OSError as error:
                clear(user)
                pytest.skip(f"the test's name server needs {address}:53: {error.strerror}")
            threading.Thread(target=serve_names, args=(sock, answers), daemon=True).start()
        yield user
        clear(user)


def use(user: User, server: str, domain: str) -> None:
    (user.home / "resolv.conf").write_text(f"search {domain}\nnameserver {server}\n")


def qvm_there(user: User, *words: str) -> None:
    user.run("unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"', "there",
             str(user.home / "resolv.conf"), str(QVM), *words, timeout=1500)


@pytest.fixture(scope="module")
def dns(host: User, busybox_tar: Path) -> Iterator[User]:
    """The VM `dns` with docker, a container image `box`, and the user's SSH agent with one key in it."""
    with subprocess.Popen(["ssh-agent", "-D", "-a", f"{host.home}/agent.sock"], stdout=subprocess.DEVNULL) as agent:
        host.env["SSH_AUTH_SOCK"] = f"{host.home}/agent.sock"
        try:
            host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "the-users-key", "-f", f"{host.home}/key")
            wait_for(lambda: (host.home / "agent.sock").exists(), 10, "the agent's socket")
            host.run("ssh-add", "-q", f"{host.home}/key")
            qvm_there(host, "start", "dns", "--runtime", "docker", "--mount", "none", "--ssh-agent", "--ssh-config",
                      "--gateway-address", GATEWAY,
                      "--dns-host", "api.test=10.1.2.3", "--dns-host", "*.dev.test=10.1.2.4",
                      "--dns-host", "db.test=host.qvm.internal", "--dns-domain", f"corp.example={CORP}")
            host.docker("import", str(busybox_tar), "box")
            yield host
        finally:
            agent.terminate()


def address(user: User, name: str, profile: str = "dns") -> str:
    """What the VM's C library makes of a name."""
    return user.qvm("ssh", profile, "--", f"getent ahostsv4 {name} | sed -n '1s/ .*//p'", check=False).stdout.strip()


def test_vm_and_containers_know_the_same_names(dns: User) -> None:
    wanted = {"host.docker.internal": GATEWAY, "host.qvm.internal": GATEWAY, "dns.qvm.internal": "10.0.2.15",
              "api.test": "10.1.2.3", "x.dev.test": "10.1.2.4", "db.test": GATEWAY, "git.corp.example": "10.7.7.7",
              "intranet.office.example": "10.5.5.5"}
    names = " ".join(wanted)
    in_vm = dns.qvm("ssh", "dns", "--", f"for name in {names}; do getent ahostsv4 $name | sed -n '1s/ .*//p'; done")
    assert dict(zip(wanted, in_vm.stdout.split(), strict=True)) == wanted
    script = f"for name in {names}; do /bin/busybox nslookup $name | /bin/busybox tail -n 4; echo ==; done"
    in_container = dns.docker("run", "--rm", "box", "/bin/sh", "-c", script).stdout.split("==")
    for (name, address), said in zip(wanted.items(), in_container, strict=False):
        assert f"Address: {address}\n" in said, (name, said)


def test_a_vpn_that_comes_and_goes_is_followed(dns: User) -> None:
    assert address(dns, "intranet") == "10.5.5.5", "by the search domain"
    use(dns, VPN, "vpn.example")
    wait_for(lambda: address(dns, "intranet") == "10.6.6.6", FOLLOWED_WITHIN, "the VPN's servers and domain")
    assert address(dns, "intranet.office.example") == ""
    assert dns.status("dns")["dns"]["search"] == ["vpn.example"]
    use(dns, OFFICE, "office.example")
    wait_for(lambda: address(dns, "intranet") == "10.5.5.5", FOLLOWED_WITHIN, "the office's servers and domain")


def test_the_guest_has_the_users_ssh_agent_and_ssh_the_vm(dns: User) -> None:
    assert "the-users-key" in dns.qvm("ssh", "dns", "--", "ssh-add -l").stdout
    seen = dns.qvm("ssh", "dns", "--", "SSH_AUTH_SOCK=/run/host-services/ssh-auth.sock ssh-add -l").stdout
    assert "the-users-key" in seen, "and without a session of SSH, as containers get it"
    said = dns.run("ssh", "-F", f"{dns.home}/.ssh/config", "qvm-dns", "echo $SSH_AUTH_SOCK").stdout
    assert said.strip()


def test_another_vm_is_known_by_name_and_reaches_nothing_of_the_hosts_loopback(dns: User) -> None:
    qvm_there(dns, "start", "closed", "--runtime", "none", "--mount", "none", "--no-host-loopback")
    wait_for(lambda: address(dns, "closed.qvm.internal") == "10.0.2.2", FOLLOWED_WITHIN, "the other VM's name")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def reach(profile: str, target: str) -> int:
            line = f"timeout 20 bash -c 'exec 3<>/dev/tcp/{target}/{port}'"
            return dns.qvm("ssh", profile, "--", line, check=False).returncode

        assert reach("dns", "host.qvm.internal") == 0
        assert [reach("closed", target) for target in ("10.0.2.2", "10.0.2.3", "10.0.2.9")] == [1, 1, 1], "at once"
    assert address(dns, "intranet", "closed") == "10.5.5.5", "names are still resolved"
    dns.qvm("delete", "closed", "-f", "--data")
    wait_for(lambda: address(dns, "closed.qvm.internal") == "", FOLLOWED_WITHIN, "the name to go")


def test_a_run_has_the_hosts_proxies_and_the_templates_certificates(dns: User) -> None:
    authority = dns.home / "ca.pem"
    dns.run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=qvm test authority", "-keyout", str(dns.home / "ca.key"), "-out", str(authority))
    template = dns.home / "q" / "_templates" / "default.yaml"
    template.parent.mkdir()
    template.write_text(f"caCerts: ['{authority}']\n")
    dns.env["http_proxy"] = "http://127.0.0.1:3128"
    try:
        done = dns.qvm("run", "--mount", "none", "--", "sh", "-c",
                       "echo $http_proxy $HTTP_PROXY; cat /etc/environment /etc/ssl/certs/ca-certificates.crt")
    finally:
        del dns.env["http_proxy"]
        template.unlink()
    assert done.stdout.startswith("http://10.0.2.2:3128 http://10.0.2.2:3128\n")
    assert 'http_proxy="http://10.0.2.2:3128"' in done.stdout
    assert authority.read_text().strip() in done.stdout, "in the system's own list"


def test_deleting_takes_the_line_out_of_the_ssh_configuration(dns: User) -> None:
    dns.qvm("delete", "dns", "-f", "--data")
    assert not (dns.home / ".ssh" / "config").exists()
