"""SSH keys of an instance, made on the host, and the texts that pin them.

The host key is generated here and injected by the seed, so it is known before the guest boots: nobody ever has to
trust a key on first use. Formats: the private key is OpenSSH's own (PROTOCOL.key), the public one a line as in
authorized_keys (sshd(8)).
"""

from __future__ import annotations

import os
from pathlib import Path

from qvm.errors import HostError
from qvm.filenames import Files
from qvm.paths import replace_file

# ssh binds ControlPath with "." and 16 random letters behind it before it renames (OpenSSH mux.c), so a path may
# have 17 bytes less than sun_path holds (103, `qvm.filenames.MAX_SOCKET_PATH`).
MAX_CONTROL_PATH = 86
CONTROL_PERSIST = "60s"


def host_alias(profile: str) -> str:
    """The name under which the guest's host key is pinned, and that `ssh` users type."""
    return f"qvm-{profile}"


def ensure_key(path: Path, *, comment: str) -> str:
    """Make an ed25519 key pair at `path` (0600) and `path`.pub where it is missing; returns the public line.

    A missing public file beside a good private one is written again. HostError where the private key is unreadable.
    """
    public_path = path.with_suffix(".pub")
    if not path.exists():
        private, public = _generate(comment)
        _write_private(path, private)
        _write_private(public_path, public)
    elif not public_path.exists():
        _write_private(public_path, _public_of(path, comment))
    return public_path.read_text().strip()


def _generate(comment: str) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, _public_line(key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ), comment)


def _public_of(path: Path, comment: str) -> bytes:
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise HostError(f"the SSH key {path} cannot be read: {error}",
                        hint="delete the instance (the data disk is kept) and start it again") from error
    return _public_line(key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ), comment)


def _public_line(key: bytes, comment: str) -> bytes:
    return key + b" " + comment.encode() + b"\n"


def _write_private(path: Path, data: bytes) -> None:
    """Write in one step, 0600 from the first moment on."""
    try:
        replace_file(path, data, durable=False)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}",
                        hint="set QVM_HOME to a folder you can write to") from error


def known_hosts_text(profile: str, port: int, host_key: Path) -> str:
    """known_hosts with the guest's host key under its alias and under [127.0.0.1]:`port`.

    `host_key` is the path of the private key made by `ensure_key`; the public one lies beside it.
    """
    kind, key, *_ = host_key.with_suffix(".pub").read_text().split()
    return f"{host_alias(profile)},[127.0.0.1]:{port} {kind} {key}\n"


def ssh_config_text(files: Files, *, user: str, port: int, forward_agent: bool = False) -> str:
    """A block for ~/.ssh/config that reaches the guest with its key pinned.

    Connections are shared through a control socket, since a handshake with an emulated guest takes over a second;
    that is left out where the socket's path would be too long for the system.
    """
    lines = [
        f"Host {host_alias(files.profile)}",
        "HostName 127.0.0.1",
        f"Port {port}",
        f"User {user}",
        f"IdentityFile {quote_path(files.ssh_key)}",
        "IdentitiesOnly yes",
        f"UserKnownHostsFile {quote_path(files.known_hosts)}",
        "GlobalKnownHostsFile /dev/null",
        f"HostKeyAlias {host_alias(files.profile)}",
        "HostKeyAlgorithms ssh-ed25519",
        "StrictHostKeyChecking yes",
        "UpdateHostKeys no",
        "CheckHostIP no",
    ]
    if forward_agent:
        lines.append("ForwardAgent yes")
    if len(os.fsencode(files.ssh_mux)) <= MAX_CONTROL_PATH:
        lines += [
            "ControlMaster auto",
            f"ControlPath {quote_path(files.ssh_mux)}",
            f"ControlPersist {CONTROL_PERSIST}",
        ]
    return "\n    ".join(lines) + "\n"


def quote_path(path: Path) -> str:
    """A path as one word of ssh_config(5): quoted, with `%` doubled (it begins a token in these options)."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
