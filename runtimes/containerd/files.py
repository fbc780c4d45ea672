"""The configuration files of containerd, nerdctl and BuildKit: pure text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qvm.runtime.network import Network
from qvm.runtime.toml import render_toml

_HOSTS = PurePosixPath("/etc/containerd/certs.d")

# Kubernetes' interface is not served here; it takes a good part of containerd's start and listens on a port.
CONTAINERD_DEFAULTS: dict[str, Any] = {"version": 2, "disabled_plugins": ["io.containerd.grpc.v1.cri"]}


def containerd_toml(settings: Mapping[str, Any]) -> bytes:
    """containerd's config.toml: the profile's `containerd:` section over our defaults. ValueError for what TOML cannot
    say."""
    return render_toml({**CONTAINERD_DEFAULTS, **settings}).encode()


def registry_hosts(network: Network) -> dict[PurePosixPath, bytes]:
    """hosts.toml files (containerd, docs/hosts.md), which nerdctl reads at each call.

    A registry that is named insecure is tried without TLS first, then with a certificate nobody vouches for.
    """
    files = {}
    if network.mirrors:
        hosts = {mirror: {"capabilities": ["pull", "resolve"]} for mirror in network.mirrors}
        files[_HOSTS / "docker.io" / "hosts.toml"] = {"server": "https://registry-1.docker.io", "host": hosts}
    for registry in network.insecure:
        rights = ["pull", "resolve", "push"]
        files[_HOSTS / registry / "hosts.toml"] = {
            "server": f"https://{registry}",
            "host": {
                f"http://{registry}": {"capabilities": rights},
                f"https://{registry}": {"capabilities": rights, "skip_verify": True},
            },
        }
    return {path: render_toml(document).encode() for path, document in files.items()}


def nerdctl_toml(*, cni_path: str) -> bytes:
    """nerdctl looks for CNI plugins in /opt/cni/bin; distributions have them elsewhere."""
    return render_toml({"cni_path": cni_path}).encode()


def buildkitd_toml(network: Network) -> bytes:
    """BuildKit on containerd's store, in nerdctl's namespace: an image that is built is there without being copied."""
    registries: dict[str, dict[str, Any]] = {
        host: {"ca": paths} for host, paths in network.registry_authorities().items()
    }
    for host in network.insecure:
        registries[host] = {**registries.get(host, {}), "http": True, "insecure": True}
    if network.mirrors:
        plain = [mirror.partition("://")[2].rstrip("/") for mirror in network.mirrors]
        registries["docker.io"] = {**registries.get("docker.io", {}), "mirrors": plain}
        for mirror, address in zip(plain, network.mirrors, strict=True):
            if address.startswith("http://"):
                registries[mirror] = {**registries.get(mirror, {}), "http": True}
    return render_toml({
        **({"registry": registries} if registries else {}),
        "worker": {
            "oci": {"enabled": False},
            "containerd": {"enabled": True, "namespace": "default"},
        },
    }).encode()


def buildkit_service(program: str) -> bytes:
    return f"""[Unit]
Description=BuildKit
Requires=buildkit.socket containerd.service
After=buildkit.socket containerd.service

[Service]
Type=notify
ExecStart={program} --addr fd://
""".encode()


def buildkit_socket() -> bytes:
    return b"""[Unit]
Description=BuildKit's socket

[Socket]
ListenStream=/run/buildkit/buildkitd.sock
SocketMode=0660
"""
