"""The two virtio-serial ports."""

import errno
import os
import time

from .base import CHUNK, log
from .files import read

CONTROL_PORT, STREAM_PORT = "org.qvm.agent", "org.qvm.stream"
OUTBOX_FULL = 256 << 10  # above this a port takes no more from commands or sockets


class Port:
    """One end of a byte channel to the host: a virtio-serial port, or a socket in tests.

    Watched edge-triggered: a port without a host reports hang-up for as long as that lasts, and the kernel wakes us
    when a host comes (drivers/char/virtio_console.c), so neither state costs a poll.
    """

    def __init__(self, fd):
        self.fd = fd
        self.out = bytearray()
        self.more = False  # there may be more to read without a new event
        self.closed = False
        os.set_blocking(fd, False)

    def read(self, budget=16):
        """What has come, up to `budget` reads of the kernel's 4 KiB each; b"" for nothing, with or without a host."""
        parts = []
        self.more = False
        for _ in range(budget):
            try:
                data = os.read(self.fd, CHUNK)
            except BlockingIOError:
                break
            except OSError as error:
                log("port:", error)
                break
            if not data:
                self.closed = True
                break
            self.closed = False
            parts.append(data)
        else:
            self.more = True
        return b"".join(parts)

    def flush(self):
        while self.out:
            try:
                with memoryview(self.out) as view:
                    sent = os.write(self.fd, view[: 32 << 10])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ENOTCONN):
                    log("port:", error)
                self.out.clear()
                return
            del self.out[:sent]

    @property
    def full(self):
        return len(self.out) > OUTBOX_FULL


def open_port(where, name):
    """The fd of a port: `fd:N`, a path, or (None) the virtio port of that name as soon as the kernel has it."""
    if where and where.startswith("fd:"):
        os.set_inheritable(int(where[3:]), False)
        return int(where[3:])
    if where:
        return os.open(where, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    pause = 0.005
    if not os.path.isdir("/sys/bus/virtio/drivers/virtio_console"):
        os.posix_spawnp("modprobe", ["modprobe", "virtio_console"], os.environ)  # udev would do it seconds later
    while True:
        # Not /dev/virtio-ports: those links are udev's, which starts later than we do.
        folder = "/sys/class/virtio-ports"
        for port in os.listdir(folder) if os.path.isdir(folder) else ():
            if (read(f"{folder}/{port}/name") or b"").strip() == name.encode() and os.path.exists(f"/dev/{port}"):
                os.chmod(f"/dev/{port}", 0o600)
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
