"""Block devices and the ext4 on them."""

import _struct as struct
import _thread
import os

from .files import read
from .kernel import ioctl_number
from .mounts import mounted_at

EXT4_IOC_RESIZE_FS = ioctl_number("w", "f", 16, 8)  # fs/ext4/ext4.h
BLKGETSIZE64 = ioctl_number("r", "\x12", 114, struct.calcsize("N"))  # linux/fs.h
DATA_FOLDER = "/var/lib/qvm"  # where the data disk is mounted
# The disk was proven blank, so nothing need be zeroed or discarded. All metadata lies together: strewn over the disk as
# by default it touches 67 tables of a qcow2 of 100 GiB instead of 12. Growing works without a resize inode (the kernel
# goes over to meta_bg), tried from 10 GiB to 1 TiB.
MKFS_OPTIONS = ("-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1", "-O", "^resize_inode")


def find_disk(serial):
    """/dev/vdX of the virtio disk with that serial; from sysfs, so that nothing waits for udev."""
    for name in sorted(os.listdir("/sys/block")):
        if (read(f"/sys/block/{name}/serial") or b"").strip() == serial.encode():
            return f"/dev/{name}"
    return None


def device_size(fd):
    import fcntl

    size = os.fstat(fd).st_size
    if size:
        return size  # a plain file, in tests
    return struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]


class Ext4:
    """What the superblock says (fs/ext4/ext4.h, struct ext4_super_block)."""

    def __init__(self, block):
        low, self.state = struct.unpack_from("<I", block, 4)[0], struct.unpack_from("<H", block, 0x3A)[0]
        high = struct.unpack_from("<I", block, 0x150)[0] if struct.unpack_from("<I", block, 0x60)[0] & 0x80 else 0
        self.block_size = 1024 << struct.unpack_from("<I", block, 0x18)[0]
        self.blocks = low | high << 32

    @classmethod
    def find(cls, device):
        with open(device, "rb", buffering=0) as disk:
            disk.seek(1024)
            block = disk.read(1024)
        return cls(block) if block[0x38:0x3A] == b"\x53\xef" else None


def is_blank(device):
    """Whether the first and last MiB hold nothing: stricter than a list of signatures, and no program to run."""
    fd = os.open(device, os.O_RDONLY)
    try:
        size = device_size(fd)
        span = min(1 << 20, size)
        return not os.pread(fd, span, 0).strip(b"\0") and not os.pread(fd, span, size - span).strip(b"\0")
    finally:
        os.close(fd)


def grow_ext4(device, mountpoint):
    """Grow a mounted ext4 to its device, as resize2fs does; True where it grew."""
    import fcntl

    system = Ext4.find(device)
    if system is None:
        return False
    fd = os.open(device, os.O_RDONLY)
    wanted = device_size(fd) // system.block_size
    os.close(fd)
    # Less than a block group more is not worth a group of its own.
    if wanted - system.blocks < 8 * system.block_size:
        return False
    fd = os.open(mountpoint, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("Q", wanted))
    finally:
        os.close(fd)
    return True


def grow_root():
    number = os.stat("/").st_dev
    folder = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    whole = os.path.isdir(folder) and not os.path.exists(f"{folder}/partition")
    return whole and grow_ext4(f"/dev/{os.path.basename(folder)}", "/")


def grow_disks():
    """Root and data file system to their devices' size, behind everything else that wants the processor."""
    os.setpriority(os.PRIO_PROCESS, _thread.get_native_id(), 19)
    grown = ["/"] if grow_root() else []
    device = find_disk("data")
    if device is not None and mounted_at(DATA_FOLDER) and grow_ext4(device, DATA_FOLDER):
        grown.append(DATA_FOLDER)
    return {"grown": grown}
