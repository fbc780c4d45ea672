"""A machine's RAM, saved from outside QEMU: only what changed is read, while the machine stands still.

RAM is either a private mapping of a file (a machine that began at a frozen state) or anonymous memory (one that was
booted). What a private mapping has changed are its anonymous pages, and the kernel tells which those are:
/proc/PID/pagemap, 8 bytes a page (Linux, Documentation/admin-guide/mm/pagemap.rst). Few changes are saved by
themselves (`qvm.qemu.ramchanges`); with many, and of anonymous memory, the saved RAM file is a sparse copy of the file
the machine began with, made while it still runs, plus the changed pages, written while it is paused. QEMU's own
`migrate` instead reads every page of RAM, holes too: seconds for an idle guest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import NoSpaceError, QemuError
from qvm.units import KiB, MiB

# ioctl(FICLONE) of <linux/fs.h>: share a file's blocks, where the file system can (btrfs, XFS, bcachefs).
_FICLONE = 0x40049409
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_NO_COPY_RANGE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP)
_COPY_STEP = 64 * MiB
READ_STEP = 4 * MiB
_GRAIN = 64 * KiB
"""What is all zeros in pieces of this many bytes becomes a hole."""
_ZEROS = bytes(_GRAIN)

# The top byte of a pagemap entry: 0x80 present, 0x40 swapped out, 0x20 a page of a file (or of shared memory).
# Changed are present pages of no file, and swapped ones. A few unchanged pages between two runs cost less to copy than
# another read: they hold what the file holds.
_GAP = 8
_CHANGED = rb"[\x80-\x9f\x40-\x7f\xc0-\xff]"
_RUN = re.compile(rb"(?s)%s+(?:.{1,%d}?%s+)*" % (_CHANGED, _GAP, _CHANGED))
_ENTRY = 8
_PAGES_AT_ONCE = 1 << 17
"""Pagemap entries read in one go: 1 MiB of them, which describe 512 MiB of memory."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a file is mapped in a process: addresses, and the file's offset that stands at the first."""

    start: int
    end: int
    offset: int


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, holes staying holes, into a new one (0600): shared blocks where the file system can, else copied
    in the kernel, else read and written. NoSpaceError where the disk is full."""
    with source.open("rb") as reading:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(fd, os.fstat(reading.fileno()).st_size)
            if not _clone(reading.fileno(), fd):
                for start, end in data_extents(reading.fileno()):
                    _copy_range(reading.fileno(), fd, start, end)
        except OSError as error:
            raise explain_error(error, target) from error
        finally:
            os.close(fd)


def _clone(source: int, target: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data, as (start, end) offsets; all of it where holes cannot be asked for."""
    size, end = os.fstat(fd).st_size, 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size
        yield start, end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        if not hasattr(os, "copy_file_range"):
            break
        try:
            copied = os.copy_file_range(source, target, min(end - start, _COPY_STEP), start, start)
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
            break
        if copied == 0:  # some file systems say so instead of refusing
            break
        start += copied
    while start < end:
        data = os.pread(source, min(end - start, READ_STEP), start)
        if not data:
            return
        write_sparse(target, data, start, over=False)
        start += len(data)


def can_read_memory(pid: int) -> str | None:
    """None where we may read that process's memory, else the reason why not, in a few words."""
    if sys.platform != "linux":
        return "this system does not let one process read another's memory"
    try:
        for name in ("mem", "pagemap"):
            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"process {pid} has gone"
    except OSError as error:
        return f"the host does not let us read QEMU's memory ({error.strerror}; see kernel.yama.ptrace_scope)"
    return None


def find_mapping(pid: int, path: Path) -> Mapping | None:
    """Where process `pid` has mapped the file at `path` (which may be deleted by now); None where it has not.

    The pieces of one mapping that the kernel keeps apart (madvise, mprotect) are joined.
    """
    found: Mapping | None = None
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
        entry = _parse_map_line(line, os.fspath(path))
        if entry is None:
            continue
        if found is None:
            found = entry
        elif entry.start == found.end and entry.offset == found.offset + (found.end - found.start):
            found = Mapping(found.start, entry.end, found.offset)
    return found


def _parse_map_line(line: str, path: str) -> Mapping | None:
    """One line of /proc/PID/maps (proc(5)): `start-end perms offset device inode   path[ (deleted)]`."""
    fields = line.split(maxsplit=5)
    if len(fields) < 6:
        return None
    # The kernel writes a newline in a path as \\012; nothing else is changed.
    name = fields[5].replace("\\012", "\n")
    if name not in (path, f"{path} (deleted)"):
        return None
    start, _, end = fields[0].partition("-")
    return Mapping(int(start, 16), int(end, 16), int(fields[2], 16))


def changed_runs(pagemap: bytes) -> list[tuple[int, int]]:
    """Runs (first page, page behind the last) of what differs from the mapped file; near ones are joined."""
    return [match.span() for match in _RUN.finditer(pagemap[_ENTRY - 1 :: _ENTRY])]


def save_changed(pid: int, start: int, size: int, into: Path) -> int:
    """Write what process `pid` has changed of its mapping at address `start` into the file `into`, at the same offsets.

    `into` is a copy of what was mapped; for anonymous memory an empty file (made here where there is none), since
    there every page that exists counts as changed. Returns the bytes read. Of a process that does not stand still it is
    a mixture of moments, good only to be overwritten by a second call, which is then the faster: its pages are there.
    QemuError where the memory cannot be read, NoSpaceError where the disk is full.
    """
    target = os.open(into, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(target, size)
        return _save_changed(pid, start, size, target)
    except OSError as error:
        raise explain_error(error, into) from error
    finally:
        os.close(target)


def _save_changed(pid: int, start: int, size: int, target: int) -> int:
    total = 0
    with Reader(pid) as reader:
        for begin, end in find_changed(pid, start, size):
            _save_run(reader, start, begin, end, target)
            total += end - begin
    return total


def find_changed(pid: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """What process `pid` has changed of its mapping of `size` bytes at address `start`: (begin, end) in bytes.

    QemuError where the process has no memory there.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for first in range(0, size // page, _PAGES_AT_ONCE):
            wanted = min(_PAGES_AT_ONCE, size // page - first) * _ENTRY
            entries = os.pread(pagemap.fileno(), wanted, (start // page + first) * _ENTRY)
            if len(entries) != wanted:
                raise QemuError(f"process {pid} has no memory at {start:#x}")
            yield from (((first + begin) * page, (first + end) * page) for begin, end in changed_runs(entries))


def _save_run(reader: Reader, start: int, begin: int, end: int, target: int) -> None:
    offset = begin
    while offset < end:
        # Pieces end at whole grains of the file, so that zeros become holes wherever a run begins.
        data = reader.read(start + offset, min(end - offset, READ_STEP - offset % _GRAIN))
        write_sparse(target, data, offset, over=True)
        offset += len(data)


class Reader:
    """Reads another process's memory into one buffer, again and again: fresh memory costs more than what is read."""

    def __init__(self, pid: int) -> None:
        from qvm.qemu.vmcopy import find_reader

        self._buffer = bytearray(READ_STEP)
        self._view = memoryview(self._buffer)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._copy = find_reader(pid, self._buffer)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)

    def read(self, address: int, size: int) -> memoryview:
        """At most `size` bytes, at least one; they stay only until the next call. OSError, QemuError."""
        size = min(size, READ_STEP)
        count = self._copy([(address, size)]) if self._copy is not None else -1
        if count <= 0:  # it was refused, or stopped at a hole
            count = os.preadv(self._memory, [self._view[:size]], address)
        if count <= 0:
            raise QemuError(f"memory at {address:#x} cannot be read")
        return self._view[:count]

    def gather(self, pieces: Sequence[tuple[int, int]]) -> memoryview:
        """All of these (address, size), at most READ_STEP bytes and `vmcopy.PIECES_AT_ONCE` pieces, one behind another;
        they stay only until the next call. OSError, QemuError."""
        wanted = sum(size for _, size in pieces)
        if self._copy is not None and self._copy(pieces) == wanted:
            return self._view[:wanted]
        at = 0
        for address, size in pieces:
            while size > 0:
                count = os.preadv(self._memory, [self._view[at : at + size]], address)
                if count <= 0:
                    raise QemuError(f"memory at {address:#x} cannot be read")
                at, address, size = at + count, address + count, size - count
        return self._view[:wanted]


def write_sparse(target: int, data: bytes | memoryview, offset: int, *, over: bool) -> None:
    """Write `data` at `offset`, leaving holes where it is zeros; with `over`, what the file held there is replaced."""
    view = memoryview(data)
    begin = 0  # of the piece that is to be written
    position = 0
    while position < len(view):
        step = min(_GRAIN - (offset + position) % _GRAIN, len(view) - position)
        if view[position : position + step] == _ZEROS[:step] and not (
            over and _has_data(target, offset + position, offset + position + step)
        ):
            _write_all(target, view[begin:position], offset + begin)
            begin = position + step
        position += step
    _write_all(target, view[begin:], offset + begin)


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(target, view, offset)
        view = view[written:]
        offset += written


def _has_data(fd: int, start: int, end: int) -> bool:
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < end
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        if error.errno != errno.EINVAL:
            raise
        return True


def explain_error(error: OSError, path: Path) -> QemuError | NoSpaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"the disk is full: {path} cannot be written", hint="free some space")
    return QemuError(f"RAM cannot be saved into {path}: {error.strerror}")
