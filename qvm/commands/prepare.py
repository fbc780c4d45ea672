"""Everything a start needs on the host before QEMU: image, accelerator, keys, disks, seed, record."""

from __future__ import annotations

import os
import pwd
import socket
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from qvm import paths
from qvm.arch import Arch, find_arch
from qvm.commands.builder import build_in_vm
from qvm.config.model import Config
from qvm.errors import HostError, PortTakenError, QvmError, UsageError
from qvm.filenames import Files, check_socket_path
from qvm.guest.keys import ensure_key, known_hosts_text, ssh_config_text
from qvm.image.ensure import ensure_image
from qvm.image.store import Image, find_image_by_id, find_proof_files
from qvm.instance.netaddr import machine_socket, with_number
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import save_record
from qvm.progress import Progress
from qvm.qemu.accel import choose_accelerator
from qvm.qemu.features import QemuFeatures
from qvm.qemu.probe import probe_qemu
from qvm.runtime.base import Runtime, RuntimeContext
from qvm.runtime.stack import load_stack, withdraw_absent
from qvm.seed.iso import write_iso
from qvm.seed.render import render_seed
from qvm.supervisor.assemble import build_seed, mac_address
from qvm.supervisor.context import runtime_context
from qvm.supervisor.disks import drop_unused_fork, ensure_disks, prepare_fork
from qvm.warm.make import take_warm
from qvm.warm.request import BASE, RUNTIME, build_request, warm_obstacle
from qvm.warm.store import WarmImage, using


@dataclass(frozen=True, slots=True)
class Prepared:
    record: Record
    notes: list[str]


def check_host(profile: str, runtime: Runtime) -> None:
    """What can be known to fail before anything is made: socket paths, folders that cannot be written."""
    files = Files(profile)
    for path in (*files.sockets(), machine_socket(250), *(files.host_socket(entry.name) for entry in runtime.sockets)):
        check_socket_path(path)
    for folder in (files.folder.parent, paths.data_dir(), paths.cache_home()):
        paths.ensure_private_dir(folder)


def prepare(config: Config, record: Record | None, *, cold: bool = False, progress: Progress) -> Prepared:
    """Bring the host's side of an instance up to date; the caller holds the instance's lock.

    What may fail without a trace (QEMU, image, accelerator, port) comes first; files of the instance are made last.
    A new instance begins on a warm image, which is made if need be, unless `cold`.
    """
    runtime = load_stack(config)
    check_host(config.profile, runtime)
    arch = find_arch(config.arch)
    if arch is None:
        raise UsageError(f"unknown architecture {config.arch!r}")
    features = probe_qemu(arch)
    image = obtain_image(config, record, arch, progress=progress)
    kernel, initrd = find_proof_files(image)
    with progress.step("checking the accelerator"):
        choice = choose_accelerator(config.accel, arch, features, kernel=kernel, initrd=initrd,
                                    memory=config.memory)
    notes = [choice.note] if choice.note else []
    if config.forward_agent and not os.environ.get("SSH_AUTH_SOCK"):
        notes.append("there is no SSH agent to forward: SSH_AUTH_SOCK is not set here")
    for note in notes:
        progress.note(note)
    record = replace(
        record or new_record(config, image),
        config=config,
        image_id=image.id,
        accel=choice.accel,
        ssh_port=choose_ssh_port(config.ssh_port, record.ssh_port if record else 0),
        notes=tuple(notes),
    )
    context = runtime_context(record)
    check_host_ports(runtime, context)
    runtime.prepare_host(context, progress)
    for note in withdraw_absent(runtime, context):
        progress.note(note)
    drop_unused_fork(config.profile)
    warm = None
    if not cold and not Files(config.profile).root_disk.exists():
        warm = obtain_warm(record, image, features, runtime, progress=progress)
    if config.network_address:
        paths.ensure_private_dir(Files(config.profile).folder)
        record = with_number(record)
    write_files(record, image, runtime, warm)
    return Prepared(record, notes)


def obtain_warm(
    record: Record, image: Image, features: QemuFeatures, runtime: Runtime, *, progress: Progress
) -> WarmImage | None:
    """The warm image that a new instance begins on; None, with a note that says why, where it must boot."""
    config = record.config
    # A data disk that outlived a delete has its own content; only a machine that has not mounted one can take it.
    stage = BASE if Files(config.profile).data_disk.exists() else RUNTIME
    reason = warm_obstacle(config, image, runtime, stage=stage)
    if reason is None:
        request = build_request(config, image, image.arch, features, record.accel, runtime, stage=stage)
        try:
            return take_warm(request, progress=progress)
        except QvmError as error:
            reason = error.message
    progress.note(f"starting cold: {reason}")
    return None


def obtain_image(config: Config, record: Record | None, arch: Arch, *, progress: Progress) -> Image:
    """The image an instance was made from while its root disk lasts, else the current one of that name."""
    if record is not None and Files(config.profile).root_disk.exists():
        image = find_image_by_id(record.image_id)
        if image is None:
            raise HostError(
                f"the image {record.image_id[:12]} that {config.profile!r} was made from is gone from the cache",
                hint=f"`qvm delete {config.profile} -f` and start again; the data disk with containers is kept",
            )
        return image
    return ensure_image(config.image, arch, builder=build_in_vm, progress=progress)


def new_record(config: Config, image: Image) -> Record:
    identifier = str(uuid.uuid4())
    return Record(
        uuid=identifier, config=config, image_id=image.id, mac=mac_address(identifier), user=guest_user(),
        ssh_port=0, accel="", created=time.time(),
    )


def guest_user() -> GuestUser:
    """The host user as the guest will know it.

    The home is /home/<name>.guest, never the host's path: a mount of the host's home must not hide it.
    """
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "user"
    home = "/root" if uid == 0 else f"/home/{name}.guest"
    return GuestUser(name if uid else "root", uid, os.getgid(), home)


def choose_ssh_port(wanted: int, last: int) -> int:
    """The host port that reaches the guest's sshd: the wanted one, else the last one while free, else any."""
    for candidate in (wanted, last) if wanted == 0 else (wanted,):
        if candidate and _port_is_free(candidate):
            return candidate
    if wanted:
        raise PortTakenError(f"port {wanted} on 127.0.0.1 is taken",
                             hint="end what listens there, or choose another with --ssh-port (0: any free one)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_host_ports(runtime: Runtime, context: RuntimeContext) -> None:
    """PortTakenError where a port that the user wished for a runtime is somebody else's."""
    for entry in runtime.host_ports(context):
        if entry.wish and not _port_is_free(entry.wish):
            raise PortTakenError(f"port {entry.wish} on 127.0.0.1 is taken, which {entry.name} was to have",
                                 hint="end what listens there, or leave the choice to qvm")


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_files(record: Record, image: Image, runtime: Runtime, warm: WarmImage | None) -> None:
    """Make or refresh the instance's folder; each step is idempotent, so an interrupted one is completed later."""
    files = Files(record.config.profile)
    for folder in (files.folder, files.ssh_folder, files.profile_folder, files.runtime_state):
        paths.ensure_private_dir(folder)
    ensure_key(files.ssh_key, comment=f"qvm-{record.config.profile}")
    ensure_key(files.ssh_host_key, comment=record.config.hostname)
    _write(files.known_hosts, known_hosts_text(record.config.profile, record.ssh_port, files.ssh_host_key))
    _write(files.ssh_config, ssh_config_text(files, user=record.user.name, port=record.ssh_port,
                                             forward_agent=record.config.forward_agent))
    save_record(record)
    if warm is None:
        ensure_disks(record, image)
    else:
        with using(warm):
            prepare_fork(record, warm)
    write_iso(render_seed(build_seed(record, runtime)), files.seed)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        path.chmod(0o600)
