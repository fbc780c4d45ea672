"""What a guest is to become: everything its seed says, as pure data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qvm.config.model import Mount

_NAME = re.compile(r"^[a-z_][a-z0-9_-]{0,31}$")  # useradd(8)
_GATEWAY = "10.0.2.2"
# Accounts of Debian, Ubuntu and Alpine images: a host user of such a name gets another one in the guest.
_SYSTEM_NAMES = frozenset({
    "root", "daemon", "bin", "sys", "sync", "games", "man", "lp", "mail", "news", "uucp", "proxy", "backup", "list",
    "irc", "nobody", "docker", "sudo", "adm", "wheel", "sshd", "messagebus", "uuidd", "tcpdump", "landscape",
    "pollinate", "polkitd", "syslog", "operator", "postmaster", "cyrus", "ntp", "dhcp", "www-data",
})


@dataclass(frozen=True, slots=True)
class SeedData:
    instance_id: str
    hostname: str
    user: str
    uid: int
    gid: int
    home: str
    shell: str
    authorized_keys: tuple[str, ...]
    """OpenSSH public keys, one line each."""
    host_key: str = field(repr=False)
    """The guest's private SSH host key (ed25519, OpenSSH's own format)."""
    host_key_public: str
    mounts: tuple[Mount, ...] = ()
    """Mount number i has the 9p tag `qvm<i>`."""
    env: dict[str, str] = field(default_factory=dict)
    dns: tuple[str, ...] = ()
    """Name servers; none: QEMU's own."""
    data_folders: tuple[str, ...] = ()
    """Guest folders that live on the data disk."""
    data_disk: bool = True
    """Whether the data disk is mounted, and formatted where it is blank; a warm image's base stage leaves it alone."""
    mac: str = ""
    """Of the one network interface; for foreign images' network configuration."""
    hosts: dict[str, str] = field(
        default_factory=lambda: {f"{name}.internal": _GATEWAY for name in ("host.docker", "gateway.docker", "host.qvm")}
    )
    """Names the guest knows besides its own."""
    machine_id: str = ""
    """32 hexadecimal digits; empty: the guest's systemd makes one at its first boot."""


def guest_user_name(name: str, *, fallback: str = "qvm") -> str:
    """The host user's name as a Linux account can have it; `fallback` where nothing usable is left.

    "john.doe" becomes "john_doe", "CORP\\\\Jane" "jane"; names of a distribution's own accounts are not taken.
    """
    plain = re.sub(r"[^a-z0-9_-]", "_", name.rpartition("\\")[2].lower())[:32]
    return plain if _NAME.match(plain) and plain not in _SYSTEM_NAMES else fallback


def validate_seed(data: SeedData) -> list[str]:
    """Problems that would make a broken guest, one line each; empty when it is sound."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", data.hostname):
        problems.append(f"hostname: {data.hostname!r} is no host name (letters, digits and hyphens, at most 64)")
    if data.uid and not _NAME.match(data.user):
        problems.append(f"user: {data.user!r} is no account name")
    if not data.home.startswith("/") or ":" in data.home or "\n" in data.home:
        problems.append(f"home: {data.home!r} is no absolute path that /etc/passwd can hold")
    for name, value in data.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"env: {name!r} is no name of a variable")
        if "\n" in value or "\0" in value:
            problems.append(f"env: the value of {name} holds a line end")
    for key in data.authorized_keys:
        if "\n" in key.strip():
            problems.append("authorized_keys: a key must be one line")
    return problems
