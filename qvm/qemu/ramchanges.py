"""What a machine has changed of the RAM file it began with: saved beside a link to that file, put back over it.

A machine that began at a frozen state has that state's RAM file mapped privately. Copying the file for each save is
hundreds of megabytes that nobody changed, which are to reach the disk too; so what is saved are the changed pages
alone, and whoever goes on from there maps the same file and gets them written into its memory before it runs.

The file: the pages one run after another, then the index (address within the RAM and length of each run, in bytes),
then the footer; all numbers little-endian. Pages come first, so that saving them anew overwrites what is there.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from qvm.errors import QemuError
from qvm.qemu.ram import READ_STEP, Reader, explain_error, find_changed
from qvm.units import MiB

SPAN_LIMIT = 256 * MiB
"""With more changes than this a whole RAM file serves better: it need not be read before the machine runs."""

_FOOTER = struct.Struct("<8sQQ")
_MAGIC = b"qvm-ram\x01"


def count_changed(pid: int, start: int, size: int) -> int:
    """Bytes that `save_changes` would write now. QemuError where the process has no memory there."""
    return sum(end - begin for begin, end in find_changed(pid, start, size))


def link_open_file(source: Path, target: Path) -> bool:
    """Give the file that is open at /proc/PID/fd/N another name, `target`; False where the file system refuses or the
    file has no name any more."""
    here = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # With a folder's descriptor, or Python takes the system call that links the link itself.
        os.link(source, target, src_dir_fd=here, follow_symlinks=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    finally:
        os.close(here)
    return True


def save_changes(pid: int, start: int, size: int, into: Path) -> int:
    """Write what process `pid` has changed of its mapping at address `start` into the file `into`; returns the bytes
    of RAM in it.

    Of a process that does not stand still it is a mixture of moments, good only to be overwritten by a second call,
    which is then the faster: the file has its pages. QemuError where the memory cannot be read, NoSpaceError where the
    disk is full.
    """
    target = os.open(into, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        index: list[int] = []
        at = 0
        with Reader(pid) as reader:
            for runs in _bundles(find_changed(pid, start, size)):
                index += chain.from_iterable(runs)
                data = reader.gather([(start + begin, length) for begin, length in runs])
                _write(target, data, at)
                at += len(data)
        tail = struct.pack(f"<{len(index)}Q", *index) + _FOOTER.pack(_MAGIC, len(index) // 2, size)
        _write(target, memoryview(tail), at)
        os.truncate(target, at + len(tail))
        return at
    except OSError as error:
        raise explain_error(error, into) from error
    finally:
        os.close(target)


def _bundles(changed: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """(begin, end) as (begin, length), in lists that can be read at once."""
    from qvm.qemu.vmcopy import PIECES_AT_ONCE

    bundle: list[tuple[int, int]] = []
    room = READ_STEP
    for begin, end in changed:
        while begin < end:
            if room == 0 or len(bundle) == PIECES_AT_ONCE:
                yield bundle
                bundle, room = [], READ_STEP
            length = min(end - begin, room)
            bundle.append((begin, length))
            begin, room = begin + length, room - length
    if bundle:
        yield bundle


def _write(target: int, view: memoryview, at: int) -> None:
    while view:
        written = os.pwrite(target, view, at)
        view = view[written:]
        at += written


def load_changes(pid: int, start: int, size: int, path: Path) -> int:
    """Write what `save_changes` wrote into process `pid`, which has the same `size` bytes of RAM at address `start` and
    does not use them yet; returns the bytes. QemuError where the file is not whole or of other RAM, or the process does
    not take it."""
    from qvm.qemu.vmcopy import write_pieces

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
            runs = list(_read_index(data, size))
            write_pieces(pid, [(start + at, length) for at, length in runs], data)
            return sum(length for _, length in runs)
    except (OSError, ValueError, struct.error) as error:
        raise QemuError(f"the saved changes of RAM in {path} cannot be used: {error}") from error


def _read_index(data: mmap.mmap, size: int) -> Iterator[tuple[int, int]]:
    """(address within the RAM, length). ValueError where the file is damaged or belongs to RAM of another size."""
    magic, count, whole = _FOOTER.unpack_from(data, len(data) - _FOOTER.size)
    begin = len(data) - _FOOTER.size - count * 16
    if magic != _MAGIC or begin < 0:
        raise ValueError("it is damaged")
    if whole != size:
        raise ValueError(f"it is of {whole >> 20} MiB of RAM")
    numbers = struct.unpack_from(f"<{2 * count}Q", data, begin)
    runs = list(zip(numbers[::2], numbers[1::2], strict=True))
    if sum(length for _, length in runs) != begin or any(at + length > size for at, length in runs):
        raise ValueError("it is damaged")
    yield from runs
