"""What the kernel is told by files and ioctls that neither `os` nor a program does for us."""

import _socket as socket
import _struct as struct
import os

POWER = os.uname().machine.startswith("ppc")


def ioctl_number(way, kind, number, size):
    """As _IO, _IOW and _IOR of asm-generic/ioctl.h make it (`way` "", "w", "r"); POWER has its own asm/ioctl.h."""
    direction = {"": 1, "r": 2, "w": 4}[way] << 29 if POWER else {"": 0, "w": 1, "r": 2}[way] << 30
    return direction | size << 16 | ord(kind) << 8 | number


RNDADDENTROPY, RNDRESEEDCRNG = ioctl_number("w", "R", 3, 8), ioctl_number("", "R", 7, 0)  # random(4)
SIOCSIFHWADDR = 0x8924


def write_kernel(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def add_entropy(seed):
    """Have the kernel's random numbers go on from here: whoever was frozen in the same state goes on another way."""
    import fcntl

    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def interfaces(kind):
    """Network interfaces with this entry in sysfs: `device` for real ones, `bridge`."""
    return [name for name in os.listdir("/sys/class/net") if os.path.exists(f"/sys/class/net/{name}/{kind}")]


def set_mac(name, mac):
    """While the interface is up; virtio_net and bridges allow that."""
    import fcntl

    some = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        fcntl.ioctl(some.fileno(), SIOCSIFHWADDR, struct.pack("16sH6s8x", name.encode(), 1, mac))
    finally:
        some.close()
