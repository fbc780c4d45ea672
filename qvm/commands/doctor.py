"""`qvm doctor`: what this host has and lacks, the accelerator's verdict with its proof, and what mends each."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qvm import paths
from qvm.arch import ALL, Arch, find_arch, host_arch
from qvm.errors import HostError, QvmError, UsageError
from qvm.filenames import Files, check_socket_path
from qvm.image.ensure import find_image
from qvm.image.store import Image
from qvm.instance.store import find_record
from qvm.process import call, find_program
from qvm.qemu.accel import choose_accelerator
from qvm.qemu.features import QemuFeatures
from qvm.qemu.packages import install_argv
from qvm.qemu.probe import probe_qemu
from qvm.units import GiB, format_duration, format_size

ENOUGH_SPACE = 8 * GiB


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` None: nothing qvm needs, but worth knowing."""

    name: str
    ok: bool | None
    message: str
    fix: str | None = None


def doctor(profile: str | None = None, *, arch_name: str | None = None) -> list[Check]:
    """Look at the host, for guests of `arch_name` (else of `profile`'s architecture, else of the host's).

    Changes nothing but caches. Raises UsageError for an architecture qvm does not know.
    """
    arch = _wanted_arch(profile, arch_name)
    return [*_folders(profile or "default"), *_qemu_and_accelerator(arch), *_builders(arch), *_clients()]


def _wanted_arch(profile: str | None, name: str | None) -> Arch:
    if name is not None:
        arch = find_arch(name)
        if arch is None:
            known = ", ".join(each.name for each in ALL)
            raise UsageError(f"{name!r} is not an architecture qvm knows", hint=f"one of {known}")
        return arch
    record = find_record(profile) if profile else None
    return (find_arch(record.config.arch) if record else None) or host_arch()


def mend(checks: Sequence[Check], say: Callable[[str], None]) -> list[Check]:
    """Run, on our own terminal, the install commands that failed checks name; `say` is told each before.

    Returns the checks whose command was run. Raises HostError where one fails; what is no install command is left.
    """
    done: list[Check] = []
    ran: set[tuple[str, ...]] = set()
    for check in checks:
        argv = install_argv(check.fix, root=os.geteuid() == 0) if check.ok is False and check.fix else None
        if argv is None:
            continue
        if tuple(argv) not in ran:
            ran.add(tuple(argv))
            say(shlex.join(argv))
            code = call(argv)
            if code != 0:
                raise HostError(f"`{shlex.join(argv)}` ended with exit code {code}",
                                hint=f"run it yourself: {check.fix}")
        done.append(check)
    return done


def _folders(profile: str) -> Iterator[Check]:
    for name, folder in (("QVM_HOME", paths.home()), ("cache", paths.cache_home())):
        try:
            paths.ensure_private_dir(folder)
        except HostError as error:
            yield Check(name, ok=False, message=error.message, fix=error.hint)
            continue
        free = shutil.disk_usage(folder).free
        enough = free >= ENOUGH_SPACE
        yield Check(name, enough, f"{folder}, {format_size(free)} free",
                    None if enough else f"free some space: an image needs up to {format_size(ENOUGH_SPACE)}")
    files = Files(profile)
    try:
        for path in (*files.sockets(), files.host_socket("containerd")):
            check_socket_path(path)
    except HostError as error:
        yield Check("socket paths", ok=False, message=error.message, fix=error.hint)
    else:
        yield Check("socket paths", ok=True, message="short enough")


def _qemu_and_accelerator(arch: Arch) -> Iterator[Check]:
    try:
        features = probe_qemu(arch)
    except QvmError as error:
        yield Check("QEMU", ok=False, message=error.message, fix=error.hint)
        return
    yield Check("QEMU", ok=True, message=f"{features.version_text} ({features.binary})")
    image = find_image("debian-13", arch)
    yield from _accelerator(arch, features, image)


def _accelerator(arch: Arch, features: QemuFeatures, image: Image | None) -> Iterator[Check]:
    kernel, initrd = (image.kernel, image.initrd) if image else (None, None)
    choice = choose_accelerator("auto", arch, features, kernel=kernel, initrd=initrd)
    yield Check("accelerator", ok=choice.accel != "tcg" or None, message=choice.note or f"{choice.accel} is used",
                fix=None)
    for verdict in choice.verdicts:
        word = "usable" if verdict.usable else f"not usable: {verdict.reason}"
        took = f" ({format_duration(verdict.seconds)}{', remembered' if verdict.cached else ''})"
        proof = f"; proof: {verdict.proof}" if verdict.proof else ""
        yield Check(f"accelerator {verdict.accel}", verdict.usable or None, f"{word}{proof}{took}")


def _builders(arch: Arch) -> Iterator[Check]:
    from qvm.image.rootfs import check_programs

    try:
        check_programs(arch)
    except HostError as error:
        yield Check("image builder", ok=False, message=error.message, fix=error.hint)
        return
    how = "as root" if os.geteuid() == 0 else "in user namespaces"
    yield Check("image builder", ok=True, message=f"can build {arch.name} images {how}")


def _clients() -> Iterator[Check]:
    wanted = (
        ("ssh", True, "`qvm ssh` and `qvm nerdctl` need it", "install openssh-client"),
        ("qemu-img", True, "disks are made with it", "install qemu-utils"),
        ("docker", None, "optional: the host's client for --runtime docker", "install docker-cli (or docker.io)"),
        ("go", None, "optional: builds nerdctl and buildkit where release archives cannot be reached",
         "install golang-go"),
    )
    for name, needed, why, fix in wanted:
        found = find_program(name)
        if found is not None:
            yield Check(name, ok=True, message=str(found))
        else:
            yield Check(name, ok=False if needed else None, message=f"not found; {why}", fix=fix)
