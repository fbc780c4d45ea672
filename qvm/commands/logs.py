"""`qvm logs`: the files of one instance, and the runtime's journal in the guest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qvm.config.names import LOG_KINDS
from qvm.errors import UsageError
from qvm.filenames import Files
from qvm.instance.store import load_record
from qvm.supervisor.client import call

FOLLOW_PAUSE = 0.2


def logs(profile: str, kind: str = "serial", *, follow: bool = False, lines: int = 200) -> Iterator[str]:
    """The last `lines` lines of one log, then, with `follow`, what comes, without line ends.

    serial: the guest's console; supervisor: qvm's own log and QEMU's messages; runtime and boot: the guest's journal.
    """
    record = load_record(profile)
    files = Files(profile)
    if kind == "serial":
        return _file(files.serial_log, lines, follow=follow)
    if kind == "supervisor":
        return _files(files, lines, follow=follow)
    if kind not in LOG_KINDS:
        raise UsageError(f"unknown log {kind!r}", hint=f"there are: {', '.join(LOG_KINDS)}")
    if follow:
        raise UsageError(f"`logs --follow` cannot follow {kind}",
                         hint=f"`qvm ssh {profile} -- journalctl -f` follows the guest's journal")
    from qvm.runtime.stack import load_stack

    units = load_stack(record.config).units if kind == "runtime" else ()
    return _journal(files, units, lines)


def _files(files: Files, lines: int, *, follow: bool) -> Iterator[str]:
    if files.qemu_log.exists():
        yield from _file(files.qemu_log, lines, follow=False)
    yield from _file(files.supervisor_log, lines, follow=follow)


def _journal(files: Files, units: tuple[str, ...], lines: int) -> Iterator[str]:
    # Not `-b`: what a fork's runtime said while the warm image booted belongs to another boot id, and is of interest.
    argv = ["journalctl", "--no-pager", "-n", str(lines), *(f"--unit={unit}" for unit in units)]
    answer = call(files.control_socket, "exec", argv=argv, timeout=90.0, exec_timeout=80.0)
    yield from (str(answer["stdout"]) or str(answer["stderr"])).splitlines()


def _file(path: Path, lines: int, *, follow: bool) -> Iterator[str]:
    """Tail a file; a start rotates none of them, but a file that shrinks is read from its beginning."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        content = file.read().decode(errors="replace")
        shown = content.splitlines()
        yield from shown[-lines:]
        rest = ""
        while follow:
            chunk = file.read().decode(errors="replace")
            if not chunk:
                if path.stat().st_size < file.tell():
                    file.seek(0)
                time.sleep(FOLLOW_PAUSE)
                continue
            *whole, rest = (rest + chunk).split("\n")
            yield from (line.rstrip("\r") for line in whole)
