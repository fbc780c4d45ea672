"""Becoming root without being it: the namespaces in which a root file system is made.

As root, a mount and a pid namespace keep what the build mounts and starts to itself: both end with it, however it
ends. Anybody else gets a user namespace on top, in which they are root and own the ids that /etc/subuid grants.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qvm import process
from qvm.errors import HostError

_MAP = ("--map-auto", "--map-root-user")
# A Debian system's ids end at nobody, 65534.
_IDS = 65536


def enter_argv(argv: Sequence[str], *, root: bool) -> list[str]:
    """`argv` as (mapped) root, in namespaces that die with it. Pure."""
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return [*unshare, *(() if root else ("--user", *_MAP)), "--", *argv]


def is_root() -> bool:
    return os.geteuid() == 0


def granted(table: str, user: str, uid: int) -> int:
    """How many ids a subuid(5) or subgid(5) table grants; 0 without an entry."""
    counts = [0]
    for line in table.splitlines():
        words = line.strip().split(":")
        if len(words) == 3 and words[0] in (user, str(uid)) and words[2].isdigit():
            counts.append(int(words[2]))
    return max(counts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_host() -> None:
    """HostError naming the first thing that is missing and the command that mends it."""
    if process.find_program("unshare") is None:
        raise HostError("the program 'unshare' is not installed", hint="sudo apt install util-linux")
    if is_root():
        return
    user, uid = getpass.getuser(), os.getuid()
    if process.find_program("newuidmap") is None:
        raise HostError("building an image without root needs newuidmap", hint="sudo apt install uidmap")
    for table, option in (("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")):
        if granted(_read(table), user, uid) < _IDS - 1:
            raise HostError(f"building an image without root needs an entry for {user} in {table}",
                            hint=f"sudo usermod {option} {_free_range(_read(table))} {user}")
    _probe()


def _free_range(table: str) -> str:
    """A range of ids that no line of the table uses yet, as usermod takes it."""
    ends = [100000]
    for line in table.splitlines():
        words = line.strip().split(":")
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            ends.append(int(words[1]) + int(words[2]))
    return f"{max(ends)}-{max(ends) + _IDS - 1}"


def _probe() -> None:
    """Enter once: nothing else tells reliably whether this kernel and its security modules allow it."""
    done = process.run(enter_argv(["true"], root=False), check=False, timeout=30)
    if done.returncode == 0:
        return
    words = done.stderr.decode(errors="replace").strip()
    if re.search(r"unrecognized option.*map-auto", words):
        raise HostError("this host's unshare is too old to build an image without root", details=words,
                        hint="install util-linux 2.38 or newer, or build once as root: sudo qvm image build")
    if _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        hint = "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    elif _read("/proc/sys/kernel/unprivileged_userns_clone").strip() == "0":
        hint = "sudo sysctl kernel.unprivileged_userns_clone=1"
    elif _read("/proc/sys/user/max_user_namespaces").strip() == "0":
        hint = "sudo sysctl user.max_user_namespaces=10000"
    else:
        hint = "allow user namespaces on this host (unshare --user --map-root-user --map-auto true must work)"
    raise HostError("this host does not let you make user namespaces, which building an image without root needs",
                    details=words or None, hint=hint)
