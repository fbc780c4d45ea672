"""Podman's configuration files (containers.conf(5), containers-registries.conf(5)): pure text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvm.runtime.network import Network
from qvm.runtime.toml import render_toml


def containers_conf(settings: Mapping[str, Any], network: Network) -> bytes:
    """The profile's `podman:` section over our defaults, table by table. ValueError for what TOML cannot say."""
    document: dict[str, Any] = {
        # The host, in each container's /etc/hosts, as host.containers.internal and host.docker.internal.
        "containers": {"host_containers_internal_ip": network.gateway},
    }
    for table, values in settings.items():
        known = document.get(table)
        document[table] = {**known, **values} if isinstance(known, dict) and isinstance(values, Mapping) else values
    return render_toml(document).encode()


def registries_conf(network: Network) -> bytes:
    """Names without a registry are Docker Hub's, as docker has them; mirrors and registries without trusted TLS."""
    lines = ['unqualified-search-registries = ["docker.io"]', 'short-name-mode = "permissive"']
    if network.mirrors:
        lines += ["", "[[registry]]", 'location = "docker.io"']
    for mirror in network.mirrors:
        scheme, _, place = mirror.partition("://")
        lines += ["", "[[registry.mirror]]", *render_toml(
            {"location": place.rstrip("/"), "insecure": scheme == "http"}).splitlines()]
    for registry in network.insecure:
        lines += ["", "[[registry]]", *render_toml({"location": registry, "insecure": True}).splitlines()]
    return ("\n".join(lines) + "\n").encode()


def service_drop_in() -> bytes:
    """Debian's service ends after five idle seconds, and the next command would wait for its start."""
    return b"""[Service]
ExecStart=
ExecStart=/usr/bin/podman system service --time=0
Restart=always
RestartSec=1
"""
