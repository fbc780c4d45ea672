"""The seed document, and the moment of a boot at which it is applied."""

import _socket as socket
import _struct as struct
import os
import time

from .disks import find_disk
from .files import read


def read_iso_file(path, name):
    """A file of an ISO 9660 image's root directory by its plain name (ECMA-119 8.4, 9.1); None without it.

    Read straight from the disk: mounting would load a module and leave something to unmount.
    """
    with open(path, "rb") as disk:
        disk.seek(16 * 2048)
        descriptor = disk.read(2048)
        if descriptor[:6] != b"\x01CD001":
            return None
        start, size = struct.unpack_from("<I", descriptor, 158)[0], struct.unpack_from("<I", descriptor, 166)[0]
        disk.seek(start * 2048)
        folder, at = disk.read(size), 0
        while at < size:
            length = folder[at]
            if length == 0:  # records do not cross sectors: the rest of this one is padding
                at = (at // 2048 + 1) * 2048
                continue
            label = folder[at + 33 : at + 33 + folder[at + 32]]
            if label.split(b";")[0] == name.encode():
                disk.seek(struct.unpack_from("<I", folder, at + 2)[0] * 2048)
                return disk.read(struct.unpack_from("<I", folder, at + 10)[0])
            at += length
    return None


def load_seed(where):
    """The seed document's bytes, or None where there is no seed disk."""
    if where == "none":
        return None
    device = where or find_disk("seed")
    if device is None and os.path.exists("/dev/disk/by-label/cidata"):
        device = "/dev/disk/by-label/cidata"
    if device is None:
        return None
    if device.endswith(".json"):
        return read(device)
    return read_iso_file(device, "QVM.JSON")


def notify_ready():
    """Tell systemd that the seed is applied (sd_notify(3)): units ordered after ours begin now."""
    address = os.environ.pop("NOTIFY_SOCKET", None)
    if address:
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
        sender.close()


def wait_until_writable(root):
    """Some images mount their root read-only at first; systemd remounts it at about the time we start."""
    end = time.monotonic() + 60
    while os.path.isdir(root) and os.statvfs(root).f_flag & os.ST_RDONLY and time.monotonic() < end:
        time.sleep(0.02)
