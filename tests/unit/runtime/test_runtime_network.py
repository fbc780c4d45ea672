from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest

from qvm.runtime import dnsd
from qvm.runtime.hostnames import names_file, names_socket, packet_rules, resolver_file
from qvm.runtime.network import Network, proxy_variables, rewrite_loopback, split_certificates
from qvm.runtime.trust import certificate_files, pack

PEM = b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("said", "guest"),
    [
        ("http://localhost:3128", "http://10.0.2.2:3128"),
        ("http://me:pw@127.0.0.1:8080/", "http://me:pw@10.0.2.2:8080/"),
        ("socks5://[::1]:1080", "socks5://10.0.2.2:1080"),
        ("localhost:3128", "http://10.0.2.2:3128"),
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("http://localhost:x", "http://localhost:x"),
    ],
)
def test_loopback_is_the_gateway_in_the_guest(said: str, guest: str) -> None:
    assert rewrite_loopback(said, "10.0.2.2") == guest


def test_the_hosts_environment_is_taken_where_nothing_is_said() -> None:
    environ = {"HTTP_PROXY": "http://a:1", "http_proxy": "http://localhost:2", "NO_PROXY": "x.example", "PATH": "/"}
    found = proxy_variables(None, environ)
    assert found["http_proxy"] == found["HTTP_PROXY"] == "http://10.0.2.2:2"
    assert found["no_proxy"].startswith("x.example,localhost,") and "host.docker.internal" in found["no_proxy"]
    assert proxy_variables({}, environ) == {} == proxy_variables(None, {"no_proxy": "x"})
    assert proxy_variables({"https": "http://b:1"}, environ)["https_proxy"] == "http://b:1"


def test_certificates_are_taken_apart_and_packed_for_roots_eyes() -> None:
    assert split_certificates(b"# a comment\n" + PEM.replace(b"\n", b"\r\n") + b"junk" + PEM) == [PEM, PEM]
    assert split_certificates(b"-----BEGIN CERTIFICATE-----\nhalf") == []
    network = Network(authorities=(PEM,), registry_files={"r:5000/ca.crt": PEM, "r:5000/client.key": b"k"})
    files = certificate_files(network)
    assert network.registry_authorities() == {"r:5000": ["/etc/docker/certs.d/r:5000/ca.crt"]}
    with tarfile.open(fileobj=io.BytesIO(pack(files))) as archive:
        assert {f"/{name}" for name in archive.getnames()} == {*files, "/etc/qvm/certificates"}
        assert all(entry.mode == 0o600 for entry in archive)


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return b"\x12\x34\x01\0\0\1\0\0\0\0\0\0" + labels + b"\0" + struct.pack(">HH", kind, 1)


def test_questions_are_read_and_answered() -> None:
    message = query("Host.Docker.Internal")
    asked = dnsd.question(message)
    assert asked is not None and asked[:2] == ("host.docker.internal", 1)
    reply = dnsd.answer(message + b"additional", asked[2], 1, ["10.0.2.2", "fd00::1", "10.0.2.4"])
    assert reply[:2] == b"\x12\x34" and struct.unpack(">H", reply[2:4])[0] == 0x8180
    assert reply.endswith(b"\0\4\x0a\0\2\4") and struct.unpack(">H", reply[6:8])[0] == 2
    six = dnsd.answer(message, asked[2], 28, ["10.0.2.2", "fd00::1"])
    assert six.endswith(b"\0\x10\xfd" + bytes(14) + b"\1")
    none = dnsd.answer(message, asked[2], 28, ["10.0.2.2"])
    assert struct.unpack(">H", none[6:8])[0] == 0 and none.endswith(message[12:])
    for broken in (b"", message[:14], reply, message[:12] + b"\xc0\x0c\0\1\0\1"):
        assert dnsd.question(broken) is None


def test_all_name_servers_of_the_guest_are_read(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("search x\nnameserver 1.2.3.4\nnameserver 5.6.7.8\n")
    assert dnsd.nameservers(str(file)) == ["1.2.3.4", "5.6.7.8"] and dnsd.nameservers(str(file) + "x") == []


HOSTS = """127.0.0.1 localhost
9.9.9.9 others.test
# qvm begin
127.0.1.1 dev
10.0.2.2 host.qvm.internal Host.Docker.Internal
fd00::5 host.qvm.internal
# qvm end
8.8.8.8 later.test
"""


def test_names_are_those_of_our_block_and_of_the_rules_and_change_with_the_files(tmp_path: Path) -> None:
    hosts, rules = tmp_path / "hosts", tmp_path / "names"
    hosts.write_text(HOSTS)
    names = dnsd.Names(str(hosts), str(rules))
    names.refresh()
    assert names.find("host.docker.internal") == ["10.0.2.2"]
    assert names.find("host.qvm.internal") == ["10.0.2.2", "fd00::5"]
    assert all(names.find(name) is None for name in ("others.test", "later.test", "dev", "localhost", "a.b.test"))
    network = Network(wildcards={"b.test": "1.1.1.1"}, domains={"corp.example": ("10.9.9.9", "10.9.9.8")})
    rules.write_bytes(names_file(network))
    names.refresh()
    assert names.find("a.b.test") == names.find("x.a.b.test") == ["1.1.1.1"]
    assert names.find("b.test") is None and names.find("ab.test") is None
    assert names.servers("git.corp.example") == names.servers("corp.example") == ["10.9.9.9", "10.9.9.8"]
    assert names.servers("notcorp.example") == dnsd.nameservers()[:1]


def test_rules_of_the_packet_filter_are_only_made_where_something_is_to_be_changed() -> None:
    assert packet_rules(Network()) == ("", "")
    split, six = packet_rules(Network(domains={"corp.example": ("10.9.9.9",)}, nameservers=("1.1.1.1", "fd00::1")))
    assert split == "-A QVM -p udp --dport 53 -m mark ! --mark 0x716d -d 1.1.1.1 -j DNAT " \
                    "--to-destination 169.254.53.53:10053\n" and six == ""
    closed, closed_six = packet_rules(Network(host_loopback=False, proxies={
        "http_proxy": "http://10.0.2.2:3128", "https_proxy": "http://proxy.example:1"}))
    lines = closed.splitlines()
    assert lines[0].endswith("--dst-type LOCAL -j RETURN")
    assert "-A QVM -p tcp -d 10.0.2.2 --dport 3128 -j RETURN" in lines
    assert "proxy.example" not in closed and lines[-1].startswith("-A QVM -p tcp -d 10.0.2.0/24 -j DNAT")
    assert packet_rules(Network(gateway="192.168.5.2")) == (
        "-A QVM -d 192.168.5.2 -j DNAT --to-destination 10.0.2.2\n", "")
    both = packet_rules(Network(gateway="192.168.5.2", host_loopback=False))[0]
    assert "-d 192.168.5.2 -j DNAT --to-destination 169.254.53.53:9" in both and "--to-destination 10.0.2.2" not in both
    assert "fec0::/64" in closed_six and closed_six.index("fec0::3") < closed_six.index("fec0::/64")


def test_the_resolvers_file_has_search_domains_first() -> None:
    assert resolver_file(Network(search=("a.example", "b.example"))) == b"search a.example b.example\n" \
                                                                       b"nameserver 10.0.2.3\n"


def test_a_rule_for_each_name_server_is_made_and_removed() -> None:
    unit = names_socket(Network(nameservers=("1.1.1.1", "fd00::1"))).decode()
    assert unit.count("-d 1.1.1.1") == 2 and "fd00::1" not in unit
