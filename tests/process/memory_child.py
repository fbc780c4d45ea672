"""A process whose memory is to be saved, and what is done to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvm.units import MiB

SIZE = 64 * MiB

# Maps SIZE bytes (a file privately where one is named, else anonymous), does to them what its input says,
# and tells the address.
CHILD = """
import ctypes, mmap, sys
size = int(sys.argv[1])
if len(sys.argv) > 2:
    file = open(sys.argv[2], "r+b")
    area = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
else:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdout is not None
        self.address = int(process.stdout.readline())

    def do(self, line: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


@contextmanager
def child(*words: str) -> Iterator[Child]:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(SIZE), *words], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        yield Child(process)
        assert process.stdin is not None
        process.stdin.close()


def make_base(path: Path) -> Path:
    """A RAM file with holes."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(10 * MiB)
        file.write(os.urandom(20 * MiB))
    return path


CHANGES = (
    "area[0:5] = b'first'",
    "area[11 << 20:12 << 20] = b'z' * (1 << 20)",
    "area[15 << 20:18 << 20] = bytes(3 << 20)",
    "area[size - 3:] = b'end'",
    "[area.__setitem__(50000000 + n * 20000, 7) for n in range(500)]",
    "sum(area[n] for n in range(0, size, 4096))",
)


def expected(content: bytes) -> bytes:
    area = bytearray(content)
    size = len(area)
    for line in CHANGES:
        exec(line, {"area": area, "size": size})
    return bytes(area)
