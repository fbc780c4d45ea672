"""Ports at which a cluster's services answer although nobody listens there: kube-proxy does it in the packet filter.

The API server is watched (kubernetes.io/docs/reference/using-api/api-concepts, "Efficient detection of changes") over
one connection that costs nothing while nothing changes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .kubeconfig import Access

SERVICES = "/api/v1/services"
WATCH_SECONDS = 1800
"""The API server ends a watch after this long, and it is begun again."""
QUIET_TIMEOUT = 120.0
"""Seconds without a word (bookmarks come every minute) after which the connection is taken for dead."""
_LIMIT = 8 << 20

Port = tuple[str, int]


class ApiError(OSError):
    """The API server does not answer as it should."""


def service_ports(service: Mapping[str, Any], *, node: str) -> list[Port]:
    """Where the TCP ports of a service for the outside answer in the guest: (address, port).

    A NodePort answers at the node's address; a LoadBalancer's own port at the service's, whether or not something hands
    out addresses for load balancers.
    """
    spec = service.get("spec") or {}
    kind = spec.get("type")
    address = spec.get("clusterIP")
    if kind not in ("NodePort", "LoadBalancer") or not address or address == "None":
        return []
    found: list[Port] = []
    for port in spec.get("ports") or ():
        if port.get("protocol", "TCP") != "TCP":
            continue
        if port.get("nodePort"):
            found.append((node, int(port["nodePort"])))
        if kind == "LoadBalancer":
            found.append((str(address), int(port["port"])))
    return found


def collect(services: Mapping[str, Mapping[str, Any]], *, node: str) -> list[Port]:
    """The ports of all services, each number once: the older service has it."""
    taken: dict[int, Port] = {}
    for service in sorted(services.values(), key=_age):
        for port in service_ports(service, node=node):
            taken.setdefault(port[1], port)
    return sorted(taken.values(), key=lambda port: port[1])


def _age(service: Mapping[str, Any]) -> tuple[str, str]:
    metadata = service.get("metadata") or {}
    return str(metadata.get("creationTimestamp") or ""), str(metadata.get("uid") or "")


async def watch_services(
    port: int, access: Access, node_name: str, publish: Callable[[Sequence[Port]], None]
) -> None:
    """Publish the ports of all services, again at each change, for ever. ApiError or OSError where that ends."""
    context = make_tls(access)
    node = node_address(await get_json(port, context, f"/api/v1/nodes/{node_name}"))
    while True:
        listing = await get_json(port, context, SERVICES)
        services = {_key(item): item for item in listing.get("items") or ()}
        publish(collect(services, node=node))
        version = str(listing["metadata"]["resourceVersion"])
        path = (f"{SERVICES}?watch=1&allowWatchBookmarks=true&resourceVersion={version}"
                f"&timeoutSeconds={WATCH_SECONDS}")
        async for event in stream_json(port, context, path):
            if event["type"] == "ERROR":  # that version is too old: begin again
                break
            if event["type"] == "DELETED":
                services.pop(_key(event["object"]), None)
            elif event["type"] in ("ADDED", "MODIFIED"):
                services[_key(event["object"])] = event["object"]
            else:
                continue
            publish(collect(services, node=node))


def _key(item: Mapping[str, Any]) -> str:
    return f"{item['metadata'].get('namespace')}/{item['metadata']['name']}"


def node_address(node: Mapping[str, Any]) -> str:
    for entry in node["status"].get("addresses") or ():
        if entry.get("type") == "InternalIP":
            return str(entry["address"])
    raise ApiError("the node has no address")


def make_tls(access: Access) -> ssl.SSLContext:
    """A client's context with the cluster's authority and the administrator's certificate."""
    context = ssl.create_default_context(cadata=base64.b64decode(access.authority).decode())
    with TemporaryDirectory(prefix="qvm-k3s") as folder:  # 0700; Python loads keys from files only
        path = Path(folder) / "client.pem"
        path.write_bytes(base64.b64decode(access.certificate) + b"\n" + base64.b64decode(access.key))
        context.load_cert_chain(path)
    return context


async def get_json(port: int, context: ssl.SSLContext, path: str) -> dict[str, Any]:
    lines = [line async for line in _request(port, context, path)]
    try:
        return dict(json.loads(b"".join(lines)))
    except ValueError as error:
        raise ApiError(f"{path} is no JSON") from error


async def stream_json(port: int, context: ssl.SSLContext, path: str) -> AsyncIterator[dict[str, Any]]:
    """One document a line."""
    async for line in _request(port, context, path):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ApiError(f"{path} sent something that is no JSON") from error


async def _request(port: int, context: ssl.SSLContext, path: str) -> AsyncIterator[bytes]:
    """The lines of a GET's answer (HTTP/1.1, RFC 9112); the standard library's client would need a thread for each."""
    async with asyncio.timeout(QUIET_TIMEOUT):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="127.0.0.1", limit=_LIMIT
        )
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\n"
                     "Connection: close\r\n\r\n".encode())
        status = (await _line(reader)).split()
        headers: dict[str, str] = {}
        while line := (await _line(reader)).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip().lower()
        if len(status) < 2 or status[1] != b"200":
            raise ApiError(f"{path}: {b' '.join(status).decode('latin-1') or 'no answer'}")
        pending = b""
        async for piece in _body(reader, headers):
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                yield line
        if pending:
            yield pending
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise ApiError(f"{path}: {error}") from error
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        while piece := await _within(reader.read(1 << 16)):
            yield piece
        return
    while size := int((await _line(reader)).split(b";")[0], 16):
        yield await _within(reader.readexactly(size))
        await _line(reader)


async def _line(reader: asyncio.StreamReader) -> bytes:
    return await _within(reader.readline())


async def _within(reading: Any) -> bytes:
    async with asyncio.timeout(QUIET_TIMEOUT):
        return bytes(await reading)
