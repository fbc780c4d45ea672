"""`python -m qvm.supervisor [PROFILE]`: the supervisor's process, started detached by `qvm.supervisor.launch`.

Without a profile it waits for one on its standard input, so that its code is loaded while the start prepares the
instance; where none comes, it ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from typing import Any

from qvm import log as qvm_log
from qvm.filenames import Files
from qvm.supervisor.addons import addon_handlers
from qvm.supervisor.control import Handler, Send, serve_control
from qvm.supervisor.core import Supervisor
from qvm.supervisor.execute import execute
from qvm.supervisor.mounts import mount_handlers
from qvm.supervisor.ports import port_handlers
from qvm.supervisor.report import describe
from qvm.supervisor.saves import saving_handlers
from qvm.supervisor.updating import update_handlers

# How long the answer to the last request, and a failed start's reason, can be fetched before the process ends.
LINGER = 0.3
# After an end that was asked for, nobody comes any more: only the answer has to leave.
GOODBYE = 0.02


def handlers(supervisor: Supervisor) -> dict[str, Handler]:
    async def status(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return describe(supervisor)

    async def watch(request: dict[str, Any], send: Send) -> dict[str, Any]:
        """Stream events until the instance is ready, has failed or has stopped."""
        async for event in supervisor.bus.watch():
            await send(event)
            if event["event"] in ("ready", "failed", "stopped"):
                break
        return {}

    async def follow(request: dict[str, Any], send: Send) -> dict[str, Any]:
        async for event in supervisor.bus.watch():
            await send(event)
        return {}

    async def stop(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return {"how": await supervisor.stop(force=bool(request.get("force")))}

    async def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return await execute(supervisor.require_link().channel, request, send)

    return {"status": status, "watch": watch, "follow": follow, "stop": stop, "exec": run,
            **port_handlers(supervisor), **mount_handlers(supervisor), **saving_handlers(supervisor),
            **addon_handlers(supervisor), **update_handlers(supervisor)}


async def supervise(profile: str) -> None:
    supervisor = Supervisor(profile)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signum, lambda: asyncio.ensure_future(supervisor.leave()))
    async with serve_control(supervisor.files.control_socket, handlers(supervisor)):
        supervisor.begin()
        await supervisor.finished.wait()
        await asyncio.sleep(GOODBYE if supervisor.phase == "stopping" else LINGER)


def await_profile() -> str:
    """The name that comes on standard input, "" where its other end closes; our output is logged from then on."""
    profile = sys.stdin.readline().strip()
    if profile:
        log = os.open(Files(profile).supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    return profile


def main() -> int:
    profile = sys.argv[1] if len(sys.argv) > 1 else await_profile()
    if not profile:
        return 0
    qvm_log.configure(logging.DEBUG if os.environ.get("QVM_DEBUG") else logging.INFO)
    logging.captureWarnings(capture=True)
    # One supervisor per instance, whoever else was started in the same moment; the kernel frees the lock at our end.
    lock = os.open(Files(profile).supervisor_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        qvm_log.get_logger(__name__).info("another supervisor serves this instance already")
        return 0
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    asyncio.run(supervise(profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
