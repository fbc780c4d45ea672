"""Whether values that could be read make sense on this host: each function returns every problem it finds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from qvm.arch import find_arch
from qvm.config.context import Context, Problem
from qvm.config.model import Mount
from qvm.config.names import validate_profile_name as validate_profile_name
from qvm.units import GiB, MiB, TiB, format_size

MOST_CPUS = 256
LEAST_MEMORY = 256 * MiB
LEAST_DISK = 1 * GiB
MOST_DISK = 64 * TiB

# A mount there would hide the guest's own system. Folders below them are fine, except below _KERNEL's.
_SYSTEM = frozenset(
    map(PurePosixPath, (
        "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys",
        "/tmp", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/sbin", "/usr/share", "/var", "/var/lib",
        "/var/log", "/var/run", "/var/tmp",
    ))
)  # fmt: skip
_KERNEL = tuple(map(PurePosixPath, ("/dev", "/proc", "/sys")))

# RFC 1123, section 2.1: letters, digits and hyphens in labels of 63; the kernel holds 64 characters (utsname(2)).
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._+-]*")
_ADDRESS = re.compile(r"https?://[^#\s]+#(sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128})")


def host_cpus() -> int:
    return os.cpu_count() or 1


def host_memory() -> int:
    """Bytes of physical memory of this host."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        import psutil

        return int(psutil.virtual_memory().total)


def validate_cpus(value: int, context: Context) -> list[Problem]:
    if 1 <= value <= MOST_CPUS:
        return []
    return [Problem(f"{value} is out of range; a VM has 1 to {MOST_CPUS} CPUs (this host has {host_cpus()})")]


def remark_cpus(value: int, context: Context) -> str | None:
    """A note where the VM gets more CPUs than the host has."""
    host = host_cpus()
    return None if value <= host else f"{value} CPUs are more than this host's {host}: the VM will not be faster for it"


def validate_memory(value: int, context: Context) -> list[Problem]:
    host = host_memory()
    if value < LEAST_MEMORY:
        return [Problem(f"{format_size(value)} is too little; a VM needs at least {format_size(LEAST_MEMORY)}")]
    if value > host:
        return [Problem(f"{format_size(value)} is more than this host's memory of {format_size(host)}")]
    return []


def validate_disk(value: int, context: Context) -> list[Problem]:
    if value < LEAST_DISK:
        return [Problem(f"{format_size(value)} is too small; a disk has at least {format_size(LEAST_DISK)}")]
    if value > MOST_DISK:
        return [Problem(f"{format_size(value)} is too large; a disk has at most {format_size(MOST_DISK)}")]
    return []


def find_misfits(arch: str, memory: int) -> list[str]:
    """What does not fit together of values that are each in order."""
    found = find_arch(arch)
    most = found.memory_limit if found else None
    if most is not None and memory > most:
        return [f"memory: an {arch} VM has at most {format_size(most)}"]
    return []


def validate_image(value: str, context: Context) -> list[Problem]:
    """Only the form: which images there are is known to `qvm.image`."""
    if _IMAGE.fullmatch(value):
        return []
    if "://" in value:
        return [] if _ADDRESS.fullmatch(value) else [Problem(
            f"{value!r} is not an address with a digest; write https://HOST/FILE#sha256:DIGEST"
        )]
    if value.startswith("/"):
        return []
    return [Problem(f"{value!r} is not the name of an image (`qvm image list` shows them); a file is written ./FILE")]


def validate_hostname(value: str, context: Context) -> list[Problem]:
    if len(value) <= 64 and all(_LABEL.fullmatch(label) for label in value.split(".")):
        return []
    return [Problem(f"{value!r} is not a host name: letters, digits and inner hyphens, at most 63 in each part")]


def validate_ssh_port(value: int, context: Context) -> list[Problem]:
    if value == 0 or 1024 <= value <= 65535:
        return []
    return [Problem(f"{value} is out of range; use 1024 to 65535 (ports below need root), or 0 for any free port")]


_KUBERNETES = re.compile(r"stable|latest|testing|v?1\.\d+(\.\d+([-+][0-9A-Za-z.+-]+)?)?")


def validate_kubernetes_version(value: str, context: Context) -> list[Problem]:
    if not value or _KUBERNETES.fullmatch(value):
        return []
    return [Problem(f"{value!r} is no version of k3s: write v1.34.3+k3s1, v1.34.3, or a channel: "
                    "stable, latest, v1.34")]


def validate_k3s_args(value: Sequence[str], context: Context) -> list[Problem]:
    """Options of `k3s server`; those that qvm itself sets would part the cluster from its kubeconfig."""
    problems = []
    for number, text in enumerate(value):
        name = text.split("=", 1)[0]
        if not text.startswith("-"):
            problems.append(Problem(f"{text!r} is not an option; write option and value as one: --k3s-arg=--key=value",
                                    (number,)))
        elif name in ("--https-listen-port", "--data-dir", "-d", "--write-kubeconfig", "-o"):
            problems.append(Problem(f"{name} is set by qvm" + ("; use --k3s-listen-port" if "port" in name else ""),
                                    (number,)))
    return problems


def validate_dns(value: Sequence[str], context: Context) -> list[Problem]:
    import ipaddress

    problems = []
    for number, text in enumerate(value):
        try:
            ipaddress.ip_address(text)
        except ValueError:
            problems.append(Problem(f"{text!r} is not an IP address", (number,)))
    return problems


def validate_env(value: dict[str, str], context: Context) -> list[Problem]:
    problems = []
    for key, text in value.items():
        if _VARIABLE.fullmatch(key) is None:
            problems.append(Problem(f"{key!r} is not a name of a variable: letters, digits and '_'", (key,)))
        if "\0" in text or "\n" in text:
            problems.append(Problem(f"the value of {key} must be one line of text", (key,)))
    return problems


def find_target_problem(target: PurePosixPath) -> str | None:
    """Why nothing may be mounted at `target` in the guest, else None."""
    if ".." in target.parts:
        return f"the target {target} must not contain '..'"
    if target in _SYSTEM or any(folder in target.parents for folder in _KERNEL):
        return f"{target} belongs to the guest's own system and cannot be a mount's target"
    if any(ord(letter) < 32 for letter in str(target)):
        return f"the target {str(target)!r} contains a control character"
    return None


def find_source_problem(source: Path) -> str | None:
    """Why `source` cannot be mounted, else None."""
    if any(ord(letter) < 32 for letter in str(source)):
        return f"{str(source)!r} contains a control character"
    try:
        if not source.exists():
            return f"{source} does not exist"
        if not source.is_dir():
            return f"{source} is a file; only folders can be mounted"
    except OSError as error:
        return f"{source} cannot be read: {error.strerror}"
    return None if os.access(source, os.R_OK | os.X_OK) else f"{source} cannot be read: permission denied"


def validate_mounts(value: Sequence[Mount], context: Context) -> list[Problem]:
    problems = []
    seen: dict[PurePosixPath, Path] = {}
    for number, mount in enumerate(value):
        problems += [
            Problem(text, (number,))
            for text in (find_source_problem(mount.source), find_target_problem(mount.target))
            if text is not None
        ]
        if mount.target in seen:
            problems.append(
                Problem(f"{mount.target} is the target of {seen[mount.target]} and {mount.source}", (number,))
            )
        seen[mount.target] = mount.source
    return problems


def default_mounts(context: Context) -> tuple[Mount, ...]:
    """The working directory at its own path, writable; nothing where it cannot be mounted."""
    mount = Mount(context.cwd, PurePosixPath(context.cwd))
    return () if find_default_mount_problem(context) else (mount,)


def find_default_mount_problem(context: Context) -> str | None:
    return find_target_problem(PurePosixPath(context.cwd)) or find_source_problem(context.cwd)


def remark_default_mounts(value: Sequence[Mount], context: Context) -> str | None:
    """A note where the working directory was left out."""
    if value:
        return None
    problem = find_default_mount_problem(context)
    return problem and f"the working directory is not mounted: {problem}"
