"""process_vm_readv(2) and process_vm_writev(2): other processes' memory without a copy on the way, many pieces at once.

A module of its own because `ctypes` takes a while to load, and only savings and restores need it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence

PIECES_AT_ONCE = 512
"""Below IOV_MAX (1024), which bounds one system call."""

Pieces = Sequence[tuple[int, int]]
"""(address, size in bytes)"""


class _Piece(ctypes.Structure):
    """struct iovec (readv(2))."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _find_call(name: str) -> Callable[[int, int, Pieces], int] | None:
    """call(pid, address of our memory, their pieces); returns bytes, -1 where it was refused (`ctypes.get_errno`)."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except AttributeError:
        return None
    function.restype = ctypes.c_ssize_t
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)

    def call(pid: int, here: int, pieces: Pieces) -> int:
        ours = _Piece(here, sum(size for _, size in pieces))
        theirs = (_Piece * len(pieces))(*(_Piece(address, size) for address, size in pieces))
        return int(function(pid, ctypes.byref(ours), 1, theirs, len(pieces), 0))

    return call


def find_reader(pid: int, buffer: bytearray) -> Callable[[Pieces], int] | None:
    """A function that reads pieces of process `pid`'s memory into `buffer`, one behind the other, and returns how many
    bytes it got, -1 for none; None where the C library lacks it."""
    call = _find_call("process_vm_readv")
    if call is None:
        return None
    here = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return lambda pieces: call(pid, here, pieces)


def write_pieces(pid: int, pieces: Pieces, data: mmap.mmap) -> None:
    """Write the beginning of `data` (a writable mapping) into these pieces of process `pid`'s memory. OSError."""
    call = _find_call("process_vm_writev")
    if call is None:
        raise OSError("this system lacks process_vm_writev")
    # No reference to it may outlast this line, not even in a traceback, or `data` could not be closed.
    here = ctypes.addressof(ctypes.c_char.from_buffer(data))
    for first in range(0, len(pieces), PIECES_AT_ONCE):
        some = pieces[first : first + PIECES_AT_ONCE]
        wanted = sum(size for _, size in some)
        done = call(pid, here, some)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if done != wanted:
            raise OSError(f"the process has taken {done} bytes of {wanted}")
        here += wanted
