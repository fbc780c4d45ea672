"""Every file name inside an instance's and a profile's folder: names live here and nowhere else.

`Files(profile)` gives the paths. The tree is shown, with what each file is for, in ARCHITECTURE.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qvm import paths
from qvm.errors import PathTooLongError

# sun_path holds 108 bytes on Linux and 104 on macOS, the closing NUL included (unix(7), <sys/un.h>).
MAX_SOCKET_PATH = 103
FIRMWARE_VARS = "efivars.fd"
"""UEFI's variables, beside a machine's disks: in instances, warm images, saved states and runs alike."""


@dataclass(frozen=True, slots=True)
class Files:
    """The paths of one instance."""

    profile: str

    @property
    def folder(self) -> Path:
        return paths.instance_dir(self.profile)

    @property
    def profile_folder(self) -> Path:
        return paths.profile_dir(self.profile)

    @property
    def config(self) -> Path:
        return self.profile_folder / "qvm.yaml"

    @property
    def lock(self) -> Path:
        """Beside the folder, so that `delete` can hold it while the folder goes."""
        return paths.instances_dir() / f"{self.profile}.lock"

    @property
    def record(self) -> Path:
        return self.folder / "instance.json"

    @property
    def run(self) -> Path:
        """Which process serves the instance now; the supervisor's."""
        return self.folder / "run.json"

    @property
    def fork_plan(self) -> Path:
        """There only while the instance's disks are those of a warm image's instant: they may be forked, once."""
        return self.folder / "fork.json"

    @property
    def supervisor_lock(self) -> Path:
        return self.folder / "supervisor.lock"

    @property
    def runtime_state(self) -> Path:
        """Small files of the runtime plugin, such as the docker context that was current before."""
        return self.folder / "runtime"

    @property
    def plug_link(self) -> Path:
        """Leads to the host folder that was last mounted while the machine ran (`qvm.qemu.plug`)."""
        return self.folder / "plug"

    @property
    def host_ports(self) -> Path:
        """The numbers that the runtime's ports have on the host, to have them again."""
        return self.folder / "host-ports.json"

    @property
    def root_disk(self) -> Path:
        return self.folder / "root.qcow2"

    @property
    def data_disk(self) -> Path:
        return paths.data_dir() / f"{self.profile}.qcow2"

    @property
    def root_layers(self) -> Path:
        """Layers of the root disk, once there is a snapshot: then `root_disk` is a link to the newest."""
        return self.folder / "layers"

    @property
    def data_layers(self) -> Path:
        """Likewise for the data disk; beside it, since it may outlive the instance."""
        return paths.data_dir() / f"{self.profile}.layers"

    @property
    def suspended(self) -> Path:
        """The saved state that the next start goes on from, if there is one."""
        return self.folder / "suspended"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    @property
    def restore_plan(self) -> Path:
        """There while disks are being put back to a snapshot: an interrupted command's work is ended by the next."""
        return self.folder / "restore.json"

    @property
    def seed(self) -> Path:
        return self.folder / "seed.iso"

    @property
    def firmware_vars(self) -> Path:
        return self.folder / FIRMWARE_VARS

    @property
    def monitor_socket(self) -> Path:
        return self.folder / "qmp.sock"

    @property
    def agent_socket(self) -> Path:
        return self.folder / "agent.sock"

    @property
    def stream_socket(self) -> Path:
        """Second virtio-serial port: byte streams between host sockets and guest sockets."""
        return self.folder / "stream.sock"

    @property
    def control_socket(self) -> Path:
        return self.folder / "ctl.sock"

    @property
    def serial_log(self) -> Path:
        return self.folder / "serial.log"

    @property
    def qemu_log(self) -> Path:
        return self.folder / "qemu.log"

    @property
    def supervisor_log(self) -> Path:
        return self.folder / "supervisor.log"

    @property
    def ssh_folder(self) -> Path:
        return self.folder / "ssh"

    @property
    def ssh_key(self) -> Path:
        return self.ssh_folder / "id_ed25519"

    @property
    def ssh_host_key(self) -> Path:
        return self.ssh_folder / "host_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.ssh_folder / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        return self.ssh_folder / "config"

    @property
    def ssh_mux(self) -> Path:
        return self.folder / "mux.sock"

    def sockets(self) -> list[Path]:
        return [self.monitor_socket, self.agent_socket, self.stream_socket, self.control_socket]

    def host_socket(self, name: str) -> Path:
        """A runtime's socket for the user, e.g. ~/.qvm/<profile>/docker.sock."""
        return self.profile_folder / f"{name}.sock"


def check_socket_path(path: Path) -> None:
    """PathTooLongError where `path` cannot be bound as a unix socket."""
    length = len(str(path).encode())
    if length > MAX_SOCKET_PATH:
        raise PathTooLongError(
            f"the socket path {path} has {length} bytes; the system allows {MAX_SOCKET_PATH}",
            hint="set QVM_HOME to a shorter folder, or use a shorter profile name",
        )
