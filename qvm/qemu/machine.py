"""A machine as a process: started detached, so that it outlives whoever started it, and ended rung by rung."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING

from qvm.errors import AcceleratorError, InstanceStateError, NoSpaceError, PortTakenError, QemuError, QvmError
from qvm.filenames import check_socket_path
from qvm.instance.spec import InstanceSpec
from qvm.log import get_logger
from qvm.process import Identity, identify, is_alive, kill, spawn_detached, spawn_dying
from qvm.qemu.cmdline import build_argv
from qvm.qemu.features import QemuFeatures
from qvm.qemu.monitor import Monitor
from qvm.qemu.probe_monitor import probe_monitor
from qvm.units import MiB
from qvm.wait import Deadline, backoff

if TYPE_CHECKING:
    from subprocess import Popen

log = get_logger(__name__)

START_TIMEOUT = 30.0
"""Seconds until the monitor must answer. It takes 0.1; a loaded host may swap."""
POWERDOWN_TIMEOUT = 60.0
QUIT_TIMEOUT = 5.0
TERM_TIMEOUT = 3.0
KILL_TIMEOUT = 5.0
PRESS_AGAIN = 5.0
"""Seconds between presses of the power button: a guest in early boot does not hear the first."""

# Sockets are made with mode 0777 less this, files with 0666: all 0600. 9p is not touched by it, since QEMU sets the
# mode of every file a guest makes explicitly.
UMASK = 0o177
LOG_LIMIT = 4 * MiB

# Processes we are the parent of: kept so that their end is collected and leaves no zombie.
_children: dict[int, Popen[bytes]] = {}


def start_qemu(
    spec: InstanceSpec, features: QemuFeatures, *, log: Path, timeout: float = START_TIMEOUT, tied: bool = False
) -> Identity:
    """Start the machine and return once its monitor answers with the spec's UUID.

    A `tied` one is killed when the calling thread ends, however it ends.

    QEMU's own words go to `log`. Raises PortTakenError, NoSpaceError, AcceleratorError or QemuError with those words
    where it dies, QemuError where it does not answer within `timeout` seconds; no process is left then.
    """
    argv = build_argv(spec, features)
    _clear_sockets(spec)
    _ensure_variables(spec, features)
    for path in (log, spec.serial_log):
        _rotate(path)
    began = _note_argv(log, argv)
    child = _spawn_tied(argv, log) if tied else spawn_detached(argv, log=log, umask=UMASK)
    try:
        _wait_for_monitor(spec, child, Deadline(timeout, "QEMU's start"))
        identity = identify(child.pid, spec.uuid)
    except BaseException as error:
        child.kill()
        child.wait()
        _clear_sockets(spec)
        if isinstance(error, _EndedError):
            raise explain_failure(_read_from(log, began), child.returncode, spec, log) from None
        raise
    _children[child.pid] = child
    return identity


def _spawn_tied(argv: list[str], log: Path) -> Popen[bytes]:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        return spawn_dying(argv, log=fd, umask=UMASK).child
    finally:
        os.close(fd)


class _EndedError(Exception):
    """The process ended before its monitor answered."""


def _wait_for_monitor(spec: InstanceSpec, child: Popen[bytes], deadline: Deadline) -> None:
    # A socket that accepts proves nothing: QEMU listens before it has taken the other ports and files it needs.
    for pause in backoff(most=0.1):
        info = probe_monitor(spec.monitor_socket, timeout=max(0.05, min(1.0, deadline.left)))
        if child.poll() is not None:
            raise _EndedError
        if info is not None:
            if info.uuid != spec.uuid:
                raise QemuError(f"the machine on {spec.monitor_socket} is another one ({info.uuid})")
            return
        if deadline.passed:
            raise QemuError(f"QEMU's monitor did not answer within {deadline.seconds:g} s",
                            hint="the host may be overloaded; try again")
        time.sleep(pause)


def _clear_sockets(spec: InstanceSpec) -> None:
    for path in (spec.monitor_socket, spec.agent_socket, spec.stream_socket):
        check_socket_path(path)
        if path == spec.monitor_socket and _accepts(path):
            raise InstanceStateError(f"another QEMU already serves {path}",
                                     hint="see `qvm list`; `qvm stop -f` ends it")
        path.unlink(missing_ok=True)


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(1.0)
        try:
            attempt.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


def _ensure_variables(spec: InstanceSpec, features: QemuFeatures) -> None:
    """The machine's own copy of the firmware's variable store; made once, then the guest's."""
    if spec.boot is not None or spec.firmware_vars is None or features.firmware is None:
        return
    if not spec.firmware_vars.exists():
        temporary = spec.firmware_vars.with_suffix(".new")
        shutil.copyfile(features.firmware.variables, temporary)
        temporary.chmod(0o600)
        temporary.replace(spec.firmware_vars)


def _rotate(path: Path) -> None:
    """Logs are appended to over many starts; the one before last goes."""
    if path.exists() and path.stat().st_size > LOG_LIMIT:
        path.replace(path.with_name(path.name + ".1"))


def _note_argv(path: Path, argv: list[str]) -> int:
    """Write the command line into the log, ready to be pasted; returns the offset where QEMU's words begin."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "a") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {shlex.join(argv)}\n")
        return file.tell()


def _read_from(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace").strip()


def explain_failure(words: str, code: int, spec: InstanceSpec, log_path: Path) -> QvmError:
    """The error for a QEMU that died at its start, from its own words."""
    details = "\n".join(words.splitlines()[-15:]) or None
    low = words.lower()
    if "could not set up host forwarding rule" in low or "address already in use" in low:
        return PortTakenError(f"port {spec.ssh_port} on 127.0.0.1 is taken", details=details, log_path=log_path,
                              hint="end what listens there, or choose another with --ssh-port (0: any free one)")
    if "no space left on device" in low:
        return NoSpaceError("QEMU found no space left on the disk", details=details, log_path=log_path,
                            hint="free some space; `qvm image list` shows what images take")
    if "kvm" in low and ("permission denied" in low or "failed to initialize kvm" in low):
        return AcceleratorError("QEMU may not use /dev/kvm", details=details, log_path=log_path,
                                hint="sudo usermod -aG kvm $USER, then log in again; or start with --accel tcg")
    if "cannot allocate memory" in low or "cannot set up guest memory" in low:
        return QemuError(f"the host cannot give this machine {spec.memory // MiB} MiB of memory", details=details,
                         log_path=log_path, hint="start with less: --memory 2")
    if 'failed to get "write" lock' in low or "failed to get shared" in low:
        return InstanceStateError("another process uses this instance's disks", details=details, log_path=log_path,
                                  hint="a QEMU of this instance may still run; see `qvm list`")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return QemuError(f"QEMU ended at once with {how}", details=details, log_path=log_path,
                     hint=None if details else f"it said nothing; see {log_path}")


# QEMU up to 10.0.3 may abort while a guest of several CPUs sets up PCI under TCG: a stale memory map is used (QEMU's
# issue 3040, mended in 10.0.4 and 10.1). It strikes rarely (once in some 150 boots, counted), before a disk is mounted.
_RANDOM_ABORT = "iotlb_to_section: Assertion"


def ended_by_chance(log_path: Path) -> bool:
    """Whether a QEMU that has ended left words of a known defect that strikes at random: starting again helps."""
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            words = file.read().decode(errors="replace")
    except OSError:
        return False
    # Only the last run's: each begins with its command line.
    return _RANDOM_ABORT in words.rpartition(" -nodefaults ")[2]


async def stop_qemu(
    identity: Identity,
    monitor: Monitor | None,
    *,
    powerdown_timeout: float = POWERDOWN_TIMEOUT,
    quit_timeout: float = QUIT_TIMEOUT,
    term_timeout: float = TERM_TIMEOUT,
    force: bool = False,
) -> str:
    """End the machine, asking first: powerdown, quit, sigterm, sigkill, each with its time (seconds).

    Returns the rung that did it ("gone" where it had ended already). `force` starts at quit, which loses nothing on
    the disks but does not ask the guest. Works for a process that is not our child. Raises QemuError where even
    SIGKILL does not help (a process stuck in the kernel).
    """
    if await wait_gone(identity, 0.0):
        return "gone"
    if monitor is not None and monitor.is_open:
        if not force and await _power_down(identity, monitor, powerdown_timeout):
            return "powerdown"
        await _try(monitor.quit(timeout=quit_timeout))
        if await wait_gone(identity, quit_timeout):
            return "quit"
    signals = (("sigterm", signal.SIGTERM, term_timeout), ("sigkill", signal.SIGKILL, KILL_TIMEOUT))
    for rung, signum, patience in signals:
        kill(identity, signum)
        if await wait_gone(identity, patience):
            return rung
    raise QemuError(f"QEMU (process {identity.pid}) does not even end on SIGKILL",
                    hint="it is stuck in the host's kernel, most likely on a disk that does not answer")


async def _power_down(identity: Identity, monitor: Monitor, timeout: float) -> bool:
    """Press the power button until the machine ends or the time is up; not at all where no guest can hear it."""
    deadline = Deadline(timeout)
    try:
        status = await monitor.status(timeout=max(1.0, min(QUIT_TIMEOUT, timeout)))
        if status == "paused":
            await monitor.resume()
        elif status != "running":  # internal-error, guest-panicked, shutdown: nobody is there to shut down
            log.info("the machine is in state %s", status)
            return False
        while not deadline.passed:
            await monitor.powerdown(timeout=max(1.0, min(QUIT_TIMEOUT, deadline.left)))
            if await wait_gone(identity, min(PRESS_AGAIN, deadline.left)):
                return True
    except QemuError as error:
        log.info("%s", error)
        # The conversation ends before the process does: QEMU still writes its disks back.
        return not monitor.is_open and await wait_gone(identity, QUIT_TIMEOUT)
    return False


async def _try(request: Awaitable[None]) -> None:
    """Await a request whose failure only means that the next rung is due."""
    try:
        await request
    except QemuError as error:
        log.info("%s", error)


async def wait_gone(identity: Identity, timeout: float) -> bool:
    """Whether that process ends within `timeout` seconds; wakes by a pidfd where the system has them."""
    if _is_gone(identity):
        return True
    if timeout <= 0:
        return False
    try:
        descriptor = os.pidfd_open(identity.pid)
    except (AttributeError, OSError):
        return await _poll_gone(identity, timeout)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(timeout):
            await ended.wait()
    except TimeoutError:
        return _is_gone(identity)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return _is_gone(identity)


async def _poll_gone(identity: Identity, timeout: float) -> bool:
    deadline = Deadline(timeout)
    for pause in backoff(most=0.2):
        if _is_gone(identity):
            return True
        if deadline.passed:
            break
        await asyncio.sleep(min(pause, deadline.left))
    return False


def _is_gone(identity: Identity) -> bool:
    child = _children.get(identity.pid)
    if child is not None and child.poll() is not None:
        del _children[identity.pid]
    return not is_alive(identity)
