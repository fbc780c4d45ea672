"""Registries on this host's loopback, as Debian's docker-registry serves them."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOST = "host.docker.internal"
USER, PASSWORD = "ann", "wonder land"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A private authority, and the certificate and key it vouches for: (ca, certificate, key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def build(subject: str, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("qvm test authority"))
            .public_key(public).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    paths = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(build("qvm test authority", ca_key.public_key(), ca=True).public_bytes(pem))
    paths[1].write_bytes(build(HOST, key.public_key(), ca=False).public_bytes(pem))
    paths[2].write_bytes(key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))
    return paths


@contextmanager
def serve_registry(folder: Path, *, tls: tuple[Path, Path] | None = None, login: bool = False) -> Iterator[int]:
    """A registry on a free port of 127.0.0.1, which it yields; with a certificate and key, with a login."""
    folder.mkdir(parents=True)
    port = free_port()
    lines = ["version: 0.1", "log: {level: warn}", f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}",
             "http:", f"  addr: 127.0.0.1:{port}"]
    if tls is not None:
        lines += ["  tls:", f"    certificate: {tls[0]}", f"    key: {tls[1]}"]
    if login:
        import bcrypt

        (folder / "htpasswd").write_text(f"{USER}:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
        lines += ["auth:", "  htpasswd:", "    realm: test", f"    path: {folder / 'htpasswd'}"]
    (folder / "config.yml").write_text("\n".join(lines) + "\n")
    program = "/usr/bin/docker-registry"
    if not os.access(program, os.X_OK):
        pytest.fail("docker-registry is missing: apt-get install docker-registry (make test does it)")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"docker-registry did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)
