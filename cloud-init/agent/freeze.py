"""A machine is made ready to be frozen."""

import os
import time

from .base import Failure, log
from .command import account_of
from .disks import find_disk
from .files import read, write_atomic
from .fork import NEW_HOME
from .ids import BOOT_ID, PRODUCT_ID, KnownId, cover
from .kernel import interfaces, write_kernel
from .mounts import mounted_at
from .personality import SERVICE_DROP_IN, SERVICE_ENVIRONMENT, STATE_FOLDER, Personality
from .programs import processes, run_program

FORK_MODULES = ("9p", "9pnet_virtio", "overlay", "bridge", "br_netfilter", "veth")
# What a fork writes. That the files are there already makes it cheap, see overwrite().
FORK_FILES = {
    "/etc/hostname": 0o644, "/etc/hosts": 0o644, "/etc/resolv.conf": 0o644, "/etc/environment": 0o644,
    "/etc/subuid": 0o644, "/etc/subgid": 0o644, "/etc/sudoers.d/90-qvm": 0o440, "/etc/profile.d/qvm.sh": 0o644,
    "/etc/qvm/environment": 0o644, "/etc/ssh/ssh_host_ed25519_key": 0o600, "/etc/ssh/ssh_host_ed25519_key.pub": 0o644,
    "/etc/ssh/sshd_config.d/10-qvm.conf": 0o644,
}


class Freezer:
    """Makes a machine ready to be frozen and forked: what each fork would do alike is done once, and what it should
    not share goes. Stage `ahead` is the part that can be done while the machine's runtime still starts. Stage `running`
    is a machine that somebody uses, about to be copied: nothing is taken from it.
    """

    def __init__(self, stage, known):
        self.stage, self.known = stage, known

    def run(self):
        steps = {
            "ahead": (self.load, self.forget, self.prepare, self.units, self.rehearse),
            "base": (self.quiet_network, self.unbind_data_disk, self.know_ids, self.sync),
            "runtime": (self.quiet_network, self.know_ids, self.sync),
            "running": (self.know_ids, self.sync),
        }
        timings = {}
        for step in steps[self.stage]:
            begun = time.monotonic()
            step()
            timings[step.__name__] = round(time.monotonic() - begun, 4)
        return {"timings": timings}

    @staticmethod
    def load():
        missing = [name for name in FORK_MODULES if not os.path.isdir(f"/sys/module/{name}")]
        if missing:
            try:
                run_program(["modprobe", "-a", *missing])
            except Failure as error:  # a distribution's kernel need not have them all; modprobe loads the others
                log("modules for forks:", error)

    @staticmethod
    def forget():
        folder = "/etc/ssh"
        names = os.listdir(folder) if os.path.isdir(folder) else ()
        gone = [f"{folder}/{name}" for name in names if name.startswith("ssh_host_")]
        for path in (*gone, "/var/lib/systemd/random-seed", f"{STATE_FOLDER}/applied"):
            if os.path.exists(path):
                os.unlink(path)

    @staticmethod
    def prepare():
        for path, mode in FORK_FILES.items():
            if not os.path.lexists(path):
                write_atomic(path, b"\n", mode)
        os.makedirs("/etc/ssh/authorized_keys.d", 0o755, exist_ok=True)
        os.makedirs("/run/qvm", 0o755, exist_ok=True)
        for path in (BOOT_ID, PRODUCT_ID):
            if os.path.exists(path):
                cover(path, read(path).decode())
        Personality({}).home(NEW_HOME, 1000, 1000)
        # Reading and writing brings into memory what the file system needs for it.
        for path in (*FORK_FILES, "/etc/passwd", "/etc/group", "/etc/shadow"):
            read(path)
        for folder in ("/", "/mnt", "/home", "/etc/ssh/authorized_keys.d"):
            if os.path.isdir(folder):
                os.mkdir(f"{folder}/.qvm-new")
                os.rmdir(f"{folder}/.qvm-new")

    @staticmethod
    def units():
        """Services get the environment by a drop-in; systemd must have read it, which takes it long."""
        if write_atomic(SERVICE_DROP_IN, SERVICE_ENVIRONMENT) and os.path.isdir("/run/systemd/system"):
            run_program(["systemctl", "daemon-reload"])

    @staticmethod
    def quiet_network():
        for name in interfaces("device")[:1]:
            # A fork that gets another MAC must say so, or the host's side of the network goes on with the old one.
            write_kernel(f"/proc/sys/net/ipv4/conf/{name}/arp_notify", "1")
            if os.path.exists(f"/proc/sys/net/ipv6/conf/{name}"):
                write_kernel(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")

    @staticmethod
    def rehearse():
        """So that no fork reads libraries and programs from the disk."""
        import fcntl  # noqa: F401
        import subprocess

        subprocess.run(["sh", "-c", ":"], stdin=subprocess.DEVNULL, check=False)
        account_of("nobody")
        mounted_at("/")

    @staticmethod
    def unbind_data_disk():
        device = find_disk("data")
        if device is not None:
            name = os.path.basename(os.path.realpath(f"/sys/block/{os.path.basename(device)}/device"))
            write_kernel("/sys/bus/virtio/drivers/virtio_blk/unbind", name)

    def know_ids(self):
        pids = processes(lambda name: name.startswith(("systemd", "dbus-")))
        wanted = {}
        for name, path in (("machine-id", "/etc/machine-id"), ("boot-id", BOOT_ID)):
            digits = (read(path) or b"").decode().strip().replace("-", "")
            if name in self.known:
                self.known.pop(name).close()
            if len(digits) == 32:
                wanted[name] = digits
        self.known.update(KnownId.find(wanted, pids))

    @staticmethod
    def sync():
        os.sync()
