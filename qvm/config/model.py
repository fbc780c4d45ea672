"""What the user asked for, validated: pure data, every value in one unit (bytes, counts)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvm.config.ports import PortForward


@dataclass(frozen=True, slots=True)
class Mount:
    """One host folder in the guest."""

    source: Path
    target: PurePosixPath
    writable: bool = True
    mmap: bool = False
    """Whether programs can map files there to write to them (MAP_SHARED), as SQLite's WAL and LMDB do; 9p has either
    that or appending by several at once."""

    def to_dict(self) -> dict[str, Any]:
        mmap = {"mmap": True} if self.mmap else {}
        return {"source": str(self.source), "target": str(self.target), "writable": self.writable, **mmap}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Mount:
        return cls(Path(data["source"]), PurePosixPath(data["target"]), bool(data["writable"]),
                   bool(data.get("mmap", False)))


@dataclass(frozen=True, slots=True)
class Config:
    """One profile's settings with every default filled in; fields are the rows of `qvm.config.settings`."""

    profile: str
    cpus: int
    memory: int
    """Bytes."""
    disk: int
    """Data disk, bytes; grows only."""
    root_disk: int
    """Root overlay, bytes; grows only."""
    arch: str
    """`qvm.arch.Arch.name`."""
    runtime: str
    accel: str
    """auto, kvm, hvf or tcg."""
    image: str
    """Catalogue or recipe name."""
    hostname: str
    mounts: tuple[Mount, ...] = ()
    mount_inotify: bool = False
    """Whether changes of mounted host folders are replayed in the guest for its watchers."""
    dns: tuple[str, ...] = ()
    dns_hosts: dict[str, str] = field(default_factory=dict)
    """Name, or *.DOMAIN for all below it -> IP address, or a name that the host resolves."""
    dns_domains: dict[str, str] = field(default_factory=dict)
    """Domain -> the name servers asked for it, by commas."""
    host_loopback: bool = True
    """Whether the guest reaches services on the host's loopback."""
    gateway_address: str = "10.0.2.2"
    """IPv4 address at which the guest reaches the host; what QEMU gives it, or another that leads there too."""
    network_address: bool = False
    """Whether the machine has an address in the network that instances share."""
    forward_agent: bool = False
    """Whether the guest has the host's SSH agent."""
    env: dict[str, str] = field(default_factory=dict)
    ssh_config: bool = False
    """Whether ~/.ssh/config includes this instance's block."""
    ssh_port: int = 0
    """0: any free port."""
    docker: dict[str, Any] = field(default_factory=dict)
    """Into dockerd's daemon.json."""
    containerd: dict[str, Any] = field(default_factory=dict)
    """Into containerd's config.toml."""
    podman: dict[str, Any] = field(default_factory=dict)
    """Into podman's containers.conf."""
    registry_mirrors: tuple[str, ...] = ()
    """Addresses that are asked for Docker Hub's images first."""
    insecure_registries: tuple[str, ...] = ()
    """HOST[:PORT] of registries without (trusted) TLS."""
    proxies: dict[str, str] | None = None
    """http, https, all and no; None: as the host's environment has them."""
    ca_certs: tuple[str, ...] = ()
    """PEM files of the host's that the guest trusts."""
    port_forwards: tuple[PortForward, ...] = ()
    """First match wins."""
    port_forwarder: str = "auto"
    """auto, user, ssh or none."""
    activate: bool = True
    """Whether start switches the docker context (and others a runtime has) to this instance."""
    binfmt: bool = True
    """Whether programs and containers of other architectures run in the guest, emulated."""
    kubernetes: bool = False
    kubernetes_version: str = ""
    """A release or a channel of k3s; "": the one this qvm was made with."""
    k3s_args: tuple[str, ...] = ()
    k3s_listen_port: int = 0
    """Of 127.0.0.1, for the API server; 0: any free port."""

    def addons(self) -> dict[str, dict[str, Any]]:
        """Runtimes on top of `runtime`: name -> settings."""
        if not self.kubernetes:
            return {}
        return {"k3s": {"version": self.kubernetes_version, "args": list(self.k3s_args),
                        "listen_port": self.k3s_listen_port}}
