"""Bring a disk out of a compressed file, or copy a raw one: sparse, bounded, whole or not at all.

A few kilobytes can unpack to terabytes. So output comes in bounded pieces, zeros become holes, and the work ends with
an error before the host's disk is full or the disk is larger than any real one. Decompressors get bounded memory.
"""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qvm.errors import HostError, ImageError, NoSpaceError
from qvm.image.headers import MAX_SIZE
from qvm.progress import Step
from qvm.units import KiB, MiB, format_size

RESERVE = 256 * MiB
"""Bytes that stay free on the host's disk."""
_BLOCK = 64 * KiB
_PIECE = MiB
_MEMORY = 256 * MiB
"""Most that a decompressor may use; xz -9 uses 65 MiB, zstd --long=27 128."""
# One byte of zstd can stand for 32 KiB: little at a time bounds what comes out at once.
_ZSTD_INPUT = KiB
_LOOK_EVERY = 32 * MiB
_ZEROS = bytes(_BLOCK)


def unpack(source: Path, compression: str, target: Path, *, step: Step) -> None:
    """Decompress `source` ("gz", "xz" or "zst") to a new sparse file.

    Raises ImageError where it is damaged, cut short or too large, NoSpaceError before the disk is full.
    """
    with source.open("rb") as file, _Sparse(target) as out:
        try:
            for data in _READERS[compression](file):
                out.write(data)
                step.update(file.tell())
        except (zlib.error, lzma.LZMAError, _DamagedError) as error:
            raise ImageError(f"{source.name} cannot be unpacked: {error}",
                             hint="fetch or copy it again; compare its digest with the publisher's") from error


def copy_raw(source: Path, target: Path, *, step: Step) -> None:
    """Copy a raw disk to a new file in which zeros are holes."""
    size = source.stat().st_size
    with source.open("rb") as file, _Sparse(target) as out:
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole up to the end
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            out.skip(start - at)
            at = start
            while at < end:
                data = os.pread(file.fileno(), min(_PIECE, end - at), at)
                if not data:
                    raise ImageError(f"{source.name} became shorter while it was read")
                out.write(data)
                at += len(data)
                step.update(at, size)
        out.skip(size - at)


class _DamagedError(Exception):
    pass


def _read_gz(file: IO[bytes]) -> Iterator[bytes]:
    """RFC 1952: members one behind another; zeros behind the last are padding."""
    data = file.read(_PIECE)
    while data.strip(b"\0"):
        decoder = zlib.decompressobj(wbits=31)
        while not decoder.eof:
            if not data:
                raise _DamagedError("it ends in the middle")
            yield decoder.decompress(data, _PIECE)
            data = decoder.unconsumed_tail or decoder.unused_data or file.read(_PIECE)
        data = decoder.unused_data or file.read(_PIECE)


def _read_xz(file: IO[bytes]) -> Iterator[bytes]:
    data = file.read(_PIECE)
    while data.strip(b"\0"):
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
        while not decoder.eof:
            if decoder.needs_input and not data:
                raise _DamagedError("it ends in the middle")
            yield decoder.decompress(data, _PIECE)
            data = b""
            if not decoder.eof and decoder.needs_input:
                data = file.read(_PIECE)
        data = decoder.unused_data or file.read(_PIECE)


def _read_zst(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    data = file.read(_ZSTD_INPUT)
    while data:
        decoder = zstandard.ZstdDecompressor(max_window_size=_MEMORY).decompressobj()
        try:
            while not decoder.eof:
                if not data:
                    raise _DamagedError("it ends in the middle")
                yield decoder.decompress(data)
                data = b"" if decoder.eof else file.read(_ZSTD_INPUT)
        except zstandard.ZstdError as error:
            raise _DamagedError(str(error)) from error
        data = decoder.unused_data or file.read(_ZSTD_INPUT)


_READERS = {"gz": _read_gz, "xz": _read_xz, "zst": _read_zst}


class _Sparse:
    """A new file (0600) that takes what is not zero; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._unlooked = _LOOK_EVERY  # look before the first write

    def __enter__(self) -> _Sparse:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.ftruncate(self._fd, self._at)
        finally:
            os.close(self._fd)
            if kind is not None:
                self._path.unlink(missing_ok=True)

    def skip(self, length: int) -> None:
        self._at += length
        if self._at > MAX_SIZE:
            raise ImageError(f"it unpacks to more than {format_size(MAX_SIZE)}: no disk is that large")

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            if block != _ZEROS[: len(block)]:
                self._put(block)
            self.skip(len(block))

    def _put(self, block: memoryview) -> None:
        if self._unlooked >= _LOOK_EVERY:
            self._unlooked = 0
            check_space(self._path.parent, _LOOK_EVERY)
        self._unlooked += len(block)
        try:
            written = os.pwrite(self._fd, block, self._at)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(self._path.parent, len(block)) from error
            raise HostError(f"cannot write {self._path}: {error.strerror}", hint="set QVM_CACHE_HOME") from error
        if written < len(block):
            raise _no_space(self._path.parent, len(block))


def check_space(folder: Path, needed: int) -> None:
    """NoSpaceError where `needed` bytes would leave less than the reserve."""
    if shutil.disk_usage(folder).free < needed + RESERVE:
        raise _no_space(folder, needed)


def _no_space(folder: Path, needed: int) -> NoSpaceError:
    free = shutil.disk_usage(folder).free
    return NoSpaceError(f"no space for the unpacked disk in {folder}: {format_size(free)} are free, "
                        f"{format_size(needed)} more and a reserve are needed",
                        hint="free some space, or set QVM_CACHE_HOME to another disk")
