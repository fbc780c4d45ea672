"""From a record to a machine: the spec the command line is built from, and the seed the guest reads."""

from __future__ import annotations

import hashlib
import os

from qvm.arch import Arch, find_arch
from qvm.filenames import Files
from qvm.image.layers import data_disk, newest, root_disk
from qvm.image.store import Image
from qvm.instance.kernel import kernel_boot
from qvm.instance.record import Record
from qvm.instance.spec import Disk, InstanceSpec
from qvm.qemu.monitor import Monitor
from qvm.qemu.plug import Plugs
from qvm.runtime.base import Runtime
from qvm.runtime.network import proxy_variables
from qvm.seed.data import SeedData
from qvm.supervisor.hostnetwork import agent_variables, static_hosts
from qvm.supervisor.hostresolver import reachable_server


def build_spec(record: Record, image: Image, arch: Arch) -> InstanceSpec:
    config = record.config
    files = Files(config.profile)
    boot = kernel_boot(image.kernel, image.initrd, image.cmdline, arch, record.accel)
    return InstanceSpec(
        name=config.profile,
        uuid=record.uuid,
        arch=arch.name,
        accel=record.accel,
        cpus=config.cpus,
        memory=config.memory,
        disks=(
            # Resolved: layers name each other relative to where they are.
            Disk(newest(root_disk(files)), "root"),
            Disk(newest(data_disk(files)), "data"),
            Disk(files.seed, "seed", format="raw", readonly=True),
        ),
        mounts=config.mounts,
        plug_link=files.plug_link,
        mac=record.mac,
        ssh_port=record.ssh_port,
        monitor_socket=files.monitor_socket,
        agent_socket=files.agent_socket,
        stream_socket=files.stream_socket,
        serial_log=files.serial_log,
        boot=boot,
        firmware_vars=None if boot is not None else files.firmware_vars,
    )


def plugs_of(monitor: Monitor, record: Record) -> Plugs:
    """Where more mounts can be plugged into the running machine of `record`."""
    arch = find_arch(record.config.arch)
    assert arch is not None, "validated when the record was made"
    return Plugs(monitor, arch.bus, Files(record.config.profile).plug_link)


def build_seed(record: Record, runtime: Runtime) -> SeedData:
    """What the guest is to become; reads the instance's key files."""
    config = record.config
    files = Files(config.profile)
    return SeedData(
        instance_id=record.uuid,
        hostname=config.hostname,
        user=record.user.name,
        uid=record.user.uid,
        gid=record.user.gid,
        home=record.user.home,
        shell="/bin/bash",
        authorized_keys=(files.ssh_key.with_suffix(".pub").read_text().strip(),),
        host_key=files.ssh_host_key.read_text(),
        host_key_public=files.ssh_host_key.with_suffix(".pub").read_text().strip(),
        mounts=config.mounts,
        env={**proxy_variables(config.proxies, os.environ), **agent_variables(config), **config.env},
        dns=tuple(map(reachable_server, config.dns)),
        hosts=static_hosts(config),
        data_folders=tuple(str(folder) for folder in runtime.data_folders),
        mac=record.mac,
    )


def mac_address(uuid: str) -> str:
    """A stable locally administered unicast address (IEEE 802, second hex digit 2) under QEMU's 52:54:00 prefix."""
    digest = hashlib.sha256(uuid.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])
