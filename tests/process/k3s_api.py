"""An API server of Kubernetes as far as listing and watching services goes, with real TLS and client certificates."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import json
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from runtimes.k3s.kubeconfig import Access


class Authority:
    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._build(self.name, self.key.public_key(), authority=True)

    def _build(self, name: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                           critical=False)
        )  # fmt: skip
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """Certificate and key in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(subject, key.public_key(), authority=False)
        return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def make_access(authority: Authority) -> Access:
    certificate, key = authority.issue("admin")
    return Access("https://127.0.0.1:1", *(base64.b64encode(part).decode() for part in (authority.pem(), certificate,
                                                                                      key)))


def service(name: str, kind: str, *ports: dict[str, Any], created: str = "2026-01-01", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "default", "name": name, "creationTimestamp": created, "uid": name},
            "spec": {"type": kind, "clusterIP": "10.43.0.7", "ports": list(ports), **spec}}


class ApiServer:
    """`services` is what is listed; `tell` sends an event to those who watch."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority("server-ca")
        self.services: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.listings = 0
        self.watchers: list[asyncio.StreamWriter] = []
        self.watched = asyncio.Event()
        self.node: dict[str, Any] = {"status": {"addresses": [{"type": "Hostname", "address": "qvm"},
                                                              {"type": "InternalIP", "address": "10.0.2.15"}]}}
        certificate, key = self.authority.issue("server")
        path = folder / "server.pem"
        path.write_bytes(certificate + key)
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=self.authority.pem().decode())
        self.tls.verify_mode = ssl.CERT_REQUIRED
        self.tls.load_cert_chain(path)
        self.port = 0

    async def __aenter__(self) -> ApiServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.drop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        self.requests.append(path)
        if "watch=1" in path:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.watchers.append(writer)
            self.watched.set()
            return
        if path.startswith("/api/v1/nodes/"):
            document = self.node
        else:
            self.listings += 1
            document = {"metadata": {"resourceVersion": "41"}, "items": self.services}
        body = json.dumps(document).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    def tell(self, kind: str, item: dict[str, Any], *, torn: bool = False) -> None:
        """`torn`: in two chunks, the second later."""
        data = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        for part in (data[:10], data[10:]) if torn else (data,):
            for writer in self.watchers:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def end_watch(self) -> None:
        for writer in self.watchers:
            writer.write(b"0\r\n\r\n")
            writer.close()
        self.watchers.clear()
        self.watched.clear()

    def drop(self) -> None:
        for writer in self.watchers:
            writer.transport.abort()
        self.watchers.clear()
        self.watched.clear()
