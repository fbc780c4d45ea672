"""`qvm doctor`: what this host has and lacks, the accelerator's verdict with its proof, and what mends each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from qvm import paths
from qvm.arch import Arch, find_arch, host_arch
from qvm.errors import HostError, QvmError
from qvm.filenames import Files, check_socket_path
from qvm.image.ensure import find_image
from qvm.image.store import Image
from qvm.instance.store import find_record
from qvm.process import find_program
from qvm.qemu.accel import choose_accelerator
from qvm.qemu.features import QemuFeatures
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


def doctor(profile: str | None = None) -> list[Check]:
    """Look at the host (and at `profile`'s architecture and image where it exists); changes nothing but caches."""
    record = find_record(profile) if profile else None
    arch = (find_arch(record.config.arch) if record else None) or host_arch()
    return [*_folders(profile or "default"), *_qemu_and_accelerator(arch), *_builders(arch), *_clients()]


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
    from qvm.image.rootfs import check_foreign, check_programs

    try:
        check_programs()
        check_foreign(arch)
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
