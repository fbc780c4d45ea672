from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest

from qvm.runtime import dnsd
from qvm.runtime.hostnames import names_socket
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
    reply = dnsd.answer(message + b"additional", asked[2], 1, "10.0.2.2")
    assert reply[:2] == b"\x12\x34" and struct.unpack(">H", reply[2:4])[0] == 0x8180
    assert reply.endswith(b"\0\4\x0a\0\2\2") and struct.unpack(">H", reply[6:8])[0] == 1
    none = dnsd.answer(message, asked[2], 28, "10.0.2.2")
    assert struct.unpack(">H", none[6:8])[0] == 0 and none.endswith(message[12:])
    for broken in (b"", message[:14], reply, message[:12] + b"\xc0\x0c\0\1\0\1"):
        assert dnsd.question(broken) is None


def test_the_first_name_server_of_the_guest_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("search x\nnameserver 1.2.3.4\nnameserver 5.6.7.8\n")
    assert dnsd.nameserver(str(file)) == "1.2.3.4"


def test_a_rule_for_each_name_server_is_made_and_removed() -> None:
    unit = names_socket(Network(nameservers=("1.1.1.1", "fd00::1"))).decode()
    assert unit.count("-d 1.1.1.1") == 2 and "fd00::1" not in unit
