"""The way in for disks that qvm did not make: whatever the file is, a raw disk comes out, or a reason why not.

    header read by us -> unpacked -> header read again -> qemu-img check, convert (qcow2 named in words) -> partitions,
    boot loader -> architecture

What machines run on later is raw: no header of anybody else's is ever opened by a running QEMU, and compressed clusters
are not unpacked again at each read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvm import process
from qvm.arch import ALL, Arch, find_arch
from qvm.errors import HostError, ImageError, UsageError
from qvm.image.bootable import find_architectures
from qvm.image.headers import QCOW2, RAW, read_header
from qvm.image.unpack import check_space, copy_raw, unpack
from qvm.process import CommandError
from qvm.progress import Progress, Step

CHECK_TIMEOUT = 600.0
_LOOK = 0.2


def admit(source: Path, target: Path, *, progress: Progress, movable: bool = False) -> None:
    """Make `target`, a new raw disk, of `source`; ImageError with the reason where qvm does not take it.

    Only `source` is ever opened. `movable`: the source is ours and may be used up.
    """
    unpacked = target.with_name(target.name + ".unpacked")
    try:
        header = read_header(source)
        if header.format not in (RAW, QCOW2):
            with progress.step(f"unpacking {source.name}", total=header.size, unit="B") as step:
                unpack(source, header.format, unpacked, step=step)
            source, movable = unpacked, True
            header = read_header(source, unpacked=True)
        if header.format == QCOW2:
            _convert(source, target, progress=progress)
        elif movable:
            source.rename(target)
        else:
            with progress.step(f"copying {source.name}", total=header.size, unit="B") as step:
                copy_raw(source, target, step=step)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        unpacked.unlink(missing_ok=True)


def _convert(source: Path, target: Path, *, progress: Progress) -> None:
    with progress.step(f"checking {source.name}"):
        used = check_qcow2_clusters(source)
    check_space(target.parent, used)
    with progress.step(f"unpacking {source.name}", total=used, unit="B") as step, _watched(target, step):
        _qemu_img_convert(source, target)


def check_qcow2_clusters(path: Path) -> int:
    """Bytes of clusters in use; ImageError where clusters lie behind the end of the file or tables are damaged.

    qemu-img reads what is missing behind the end as zeros: a qcow2 that was cut short would pass for a whole one.
    """
    program = process.find_program("qemu-img")
    if program is None:
        raise HostError("the program 'qemu-img' is not installed", hint="sudo apt install qemu-utils")
    done = process.run([program, "check", "-f", QCOW2, "--output=json", path.resolve()], check=False,
                       timeout=CHECK_TIMEOUT)
    try:
        report = json.loads(done.stdout)
        cluster = 1 << int.from_bytes(_bytes_at(path, 20, 4), "big")
        used = int(report.get("allocated-clusters", 0)) * cluster
        flaws = int(report.get("corruptions", 0)) + int(report.get("check-errors", 0))
        end = int(report.get("image-end-offset", 0))
    except (ValueError, TypeError) as error:
        raise ImageError(f"{path.name} is a damaged qcow2",
                         details=done.stderr.decode(errors="replace").strip() or None) from error
    # The last cluster of compressed data may end before its cluster does.
    if flaws or end - cluster >= path.stat().st_size:
        raise ImageError(f"{path.name} is a truncated or damaged qcow2",
                         details=done.stderr.decode(errors="replace").strip()[:2000] or None,
                         hint="fetch or copy it again; compare its digest with the publisher's")
    return used


def _bytes_at(path: Path, at: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(length)


def _qemu_img_convert(source: Path, target: Path) -> None:
    """By a process that ends with us, so that Ctrl-C leaves nothing writing."""
    program = process.find_program("qemu-img")
    assert program is not None, "asked before"
    words: list[str | Path] = [program, "convert", "-f", QCOW2, "-O", RAW, source.resolve(), target]
    try:
        process.stream(words, lambda line: None)
    except CommandError as error:
        check_space(target.parent, 0)
        raise ImageError(f"{source.name} could not be read as a qcow2", details=error.details) from error


@contextmanager
def _watched(target: Path, step: Step) -> Iterator[None]:
    """Show how much of `target` is there; the program that writes it does not tell."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            if target.exists():
                step.update(target.stat().st_blocks * 512)

    watcher = threading.Thread(target=look, name="watch the conversion", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def choose_arch(disk: Path, wanted: Arch | None, *, what: str) -> Arch:
    """The architecture of a raw disk; ImageError where it cannot boot, or not on `wanted`; UsageError where it has to
    be asked for. `what` names the image in messages."""
    found = find_architectures(disk)
    known = [arch for name in found if (arch := find_arch(name)) is not None]
    if not known:
        raise ImageError(f"{what} is for {', '.join(found)}, which qvm has no machine for",
                         hint="there are machines for " + ", ".join(arch.name for arch in ALL))
    if wanted is not None:
        if wanted not in known:
            raise ImageError(f"{what} is for {', '.join(found)}, not {wanted.name}", hint=f"--arch {known[0].name}")
        return wanted
    if len(known) > 1:
        raise UsageError(f"{what} boots on {', '.join(arch.name for arch in known)}", hint="say which one by --arch")
    return known[0]
