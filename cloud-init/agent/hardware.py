"""CPUs and memory that were plugged in."""

import os
import time

from .base import log
from .files import read
from .kernel import write_kernel
from .mounts import PLUG_TIMEOUT


def switch_on(path, before, after):
    """Whether a device is on now. The kernel may be switching it on by itself, and refuses to be told meanwhile."""
    if read(path) == before:
        try:
            write_kernel(path, after.decode())
        except OSError as error:
            log(path, error)
    return read(path) == after + b"\n"


def settle_hardware(cpus, memory):
    """Switch on what was plugged in; returns what there is when all has come, or at the latest after PLUG_TIMEOUT."""
    end = time.monotonic() + PLUG_TIMEOUT
    blocks, processors = "/sys/devices/system/memory", "/sys/devices/system/cpu"
    size = int(read(f"{blocks}/block_size_bytes") or b"0", 16)
    while True:
        names = [name for name in os.listdir(blocks) if name[6:].isdigit()] if size else []
        plugged = sum(size for name in names if switch_on(f"{blocks}/{name}/state", b"offline\n", b"online"))
        for name in sorted(os.listdir(processors)):
            path = f"{processors}/{name}/online"
            if len(os.sched_getaffinity(0)) < cpus and name[:3] == "cpu" and os.path.exists(path):
                switch_on(path, b"0\n", b"1")
        online = len(os.sched_getaffinity(0))
        total = int((read("/proc/meminfo") or b"MemTotal: 0").split(None, 2)[1]) << 10
        complete = online >= cpus and (plugged or total * 8 // 7) >= memory  # the kernel keeps a part for itself
        if complete or time.monotonic() > end:
            return {"cpus": online, "memory": total, "complete": complete}
        time.sleep(0.01)
