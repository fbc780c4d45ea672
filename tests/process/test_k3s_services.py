"""Services of a cluster become ports of the host: the API server is watched as it is in earnest, over TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from k3s_api import ApiServer, Authority, make_access, service

from runtimes.k3s.services import Port, collect, service_ports, watch_services

NODE = "10.0.2.15"
WEB = service("web", "LoadBalancer", {"port": 8080, "nodePort": 30100})


class Watch:
    """`watch_services` under way; `ports` is what was published last."""

    def __init__(self, server: ApiServer) -> None:
        self.published: list[list[Port]] = []
        self.news = asyncio.Event()
        self.task = asyncio.create_task(
            watch_services(server.port, make_access(server.authority), "qvm", self._take)
        )

    def _take(self, ports: Sequence[Port]) -> None:
        self.published.append(list(ports))
        self.news.set()

    async def next(self) -> list[Port]:
        async with asyncio.timeout(10):
            await self.news.wait()
        self.news.clear()
        return self.published[-1]

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_services_come_change_and_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ApiServer(tmp_path) as server:
            server.services = [service("kubernetes", "ClusterIP", {"port": 443}), WEB]
            watch = Watch(server)
            assert await watch.next() == [("10.43.0.7", 8080), (NODE, 30100)]
            await asyncio.wait_for(server.watched.wait(), 10)
            assert "resourceVersion=41" in server.requests[-1]
            server.tell("ADDED", service("node", "NodePort", {"port": 80, "nodePort": 30200}), torn=True)
            assert await watch.next() == [("10.43.0.7", 8080), (NODE, 30100), (NODE, 30200)]
            server.tell("BOOKMARK", {"metadata": {"resourceVersion": "50"}})
            server.tell("MODIFIED", service("node", "ClusterIP", {"port": 80}))
            assert await watch.next() == [("10.43.0.7", 8080), (NODE, 30100)]
            server.tell("DELETED", WEB)
            assert await watch.next() == []
            assert len(watch.published) == 4
            await watch.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["ended", "expired"])
def test_a_watch_that_ends_is_begun_again_from_a_new_listing(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        async with ApiServer(tmp_path) as server:
            watch = Watch(server)
            assert await watch.next() == []
            await asyncio.wait_for(server.watched.wait(), 10)
            server.services = [WEB]
            if how == "ended":
                server.end_watch()
            else:
                server.tell("ERROR", {"kind": "Status", "code": 410})
            assert await watch.next() == [("10.43.0.7", 8080), (NODE, 30100)]
            assert server.listings == 2
            await watch.close()

    asyncio.run(scenario())


def test_a_server_that_breaks_off_is_an_error_for_the_supervisor_to_retry(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ApiServer(tmp_path) as server:
            watch = Watch(server)
            await watch.next()
            await asyncio.wait_for(server.watched.wait(), 10)
            server.drop()
            with pytest.raises(OSError):
                await asyncio.wait_for(watch.task, 10)

    asyncio.run(scenario())


def test_another_clusters_server_is_not_believed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ApiServer(tmp_path) as server:
            other = make_access(Authority("server-ca"))
            with pytest.raises(ssl.SSLError):
                await watch_services(server.port, other, "qvm", lambda ports: None)
            assert server.requests == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("item", "ports"), [
    (service("a", "NodePort", {"port": 80, "nodePort": 30001}), [(NODE, 30001)]),
    (service("a", "LoadBalancer", {"port": 80}), [("10.43.0.7", 80)]),
    (service("a", "NodePort", {"port": 53, "nodePort": 30053, "protocol": "UDP"}), []),
    (service("a", "ClusterIP", {"port": 80}), []),
    (service("a", "ExternalName", clusterIP=None), []),
    (service("a", "LoadBalancer", {"port": 80}, clusterIP="None"), []),
    ({"metadata": {"name": "a"}}, []),
], ids=["node port", "load balancer", "udp", "cluster ip", "external", "headless", "empty"])
def test_ports_of_one_service(item: dict[str, Any], ports: list[Port]) -> None:
    assert service_ports(item, node=NODE) == ports


def test_of_two_services_with_one_port_the_older_has_it() -> None:
    old = service("old", "LoadBalancer", {"port": 80}, created="2026-01-01", clusterIP="10.43.0.1")
    new = service("new", "LoadBalancer", {"port": 80}, created="2026-02-01", clusterIP="10.43.0.2")
    assert collect({"b": new, "a": old}, node=NODE) == [("10.43.0.1", 80)]
