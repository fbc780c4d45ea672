"""What must hold before an instance counts as started: the named requirements, in terms of guest and runtime."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import GuestError, NotReadyError, QvmError
from qvm.guest.channel import AgentChannel
from qvm.guest.mounts import ensure_mounts
from qvm.guest.requirements import Requirement
from qvm.instance.mounted import MountedFolder
from qvm.instance.record import Record
from qvm.logtail import tail_of
from qvm.runtime.base import Runtime, RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.runtime.trust import install_certificates
from qvm.wait import backoff

# Generous: a guest under software emulation on a busy host takes tens of seconds where hardware takes two.
AGENT_TIMEOUT = 240.0
# Firmware, boot loader, a kernel for every machine there is, all of its services, cloud-init's two first stages.
FOREIGN_AGENT_TIMEOUT = 1200.0
FOREIGN_SSH_TIMEOUT = 600.0
INSTALL_TIMEOUT = 1800.0
"""Seconds that a runtime may take to be installed from the packages of the guest's distribution."""
SEED_TIMEOUT = 120.0
MOUNTS_TIMEOUT = 60.0
SSH_TIMEOUT = 120.0
SERIAL_TAIL = 25
_AGENT_HINT = "the guest did not boot as far as qvm's agent; `qvm logs serial` shows its console"
_FOREIGN_AGENT_HINT = ("the guest did not boot as far as qvm's agent, which cloud-init starts: the image must boot by "
                       "UEFI and have cloud-init with NoCloud, and python3; `qvm logs serial` shows its console")


@dataclass(frozen=True, slots=True)
class ReadyParts:
    """What the checks act on."""

    record: Record
    channel: AgentChannel
    runtime: Runtime
    context: RuntimeContext
    ssh_port: int
    serial_log: Path
    note: Callable[[str], None] = lambda text: None
    """Hears what the user should know."""
    mounts: Sequence[MountedFolder] = ()
    foreign: bool = False
    """qvm did not make the image: it boots in its own time, and its runtime comes from its distribution."""


def build_requirements(parts: ReadyParts, *, agent: asyncio.Future[None]) -> list[Requirement]:
    """The readiness list; `agent` resolves when the guest's agent has said hello."""

    async def check_agent() -> None:
        await asyncio.shield(agent)

    async def check_seed() -> None:
        seed = await parts.channel.wait_for_seed()
        if seed.state == "failed":
            raise GuestError("the guest could not be set up", details="\n".join(seed.errors))
        await install_certificates(parts.channel, parts.context.network, fresh=False)

    async def check_mounts() -> None:
        await ensure_mounts(parts.channel, parts.mounts)

    async def check_runtime() -> None:
        await start_runtime(parts.runtime, parts.channel, parts.context)

    async def check_ssh() -> None:
        for pause in backoff():
            if await ssh_answers(parts.ssh_port):
                break
            await asyncio.sleep(pause)
        if parts.foreign:  # the stages of cloud-init that do something are over by then
            for error in await find_cloud_init_errors(parts.channel):
                parts.note(f"cloud-init: {error}")

    requirements = [
        Requirement("agent", FOREIGN_AGENT_TIMEOUT if parts.foreign else AGENT_TIMEOUT,
                    _FOREIGN_AGENT_HINT if parts.foreign else _AGENT_HINT, check_agent),
        Requirement("ssh", FOREIGN_SSH_TIMEOUT if parts.foreign else SSH_TIMEOUT,
                    "sshd in the guest does not answer; see `qvm logs serial`", check_ssh, after=("agent",)),
        Requirement("seed", SEED_TIMEOUT, "user, keys or data disk could not be set up; see `qvm logs serial`",
                    check_seed, after=("agent",)),
    ]
    settled: tuple[str, ...] = ("seed",)
    if parts.mounts:
        requirements.append(
            Requirement("mounts", MOUNTS_TIMEOUT, "a host folder could not be mounted; `qvm start --mount none` "
                        "starts without", check_mounts, after=settled)
        )
        settled = ("mounts",)
    if parts.runtime.name != "none":
        requirements.append(
            Requirement("runtime", runtime_timeout(parts.runtime, foreign=parts.foreign), f"{parts.runtime.name} in "
                        "the guest does not answer; `qvm logs runtime` shows its journal", check_runtime, after=settled)
        )
    return requirements


def runtime_timeout(runtime: Runtime, *, foreign: bool) -> float:
    """Seconds until a runtime must answer that may have to be installed first."""
    return runtime.start_timeout + (INSTALL_TIMEOUT if foreign else 0.0)


async def start_runtime(runtime: Runtime, channel: AgentChannel, context: RuntimeContext) -> None:
    """Have the runtime provisioned and started, and wait until it answers, as long as it takes."""
    await runtime.provision(channel, context)
    await runtime.start(channel, context)
    await wait_for_checks(runtime, channel, context)


async def find_cloud_init_errors(channel: AgentChannel) -> list[str]:
    """What cloud-init has noted as failed in this boot (its status.json, "v1")."""
    done = await channel.exec(["cat", "/run/cloud-init/status.json"], check=False)
    try:
        stages = json.loads(done.stdout)["v1"]
        return [str(error) for stage in stages.values() if isinstance(stage, dict) for error in stage.get("errors", ())]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # no cloud-init, or one that writes it in another way


async def ssh_answers(port: int, *, timeout: float = 10.0) -> bool:
    """Whether an SSH server greets on the forwarded port.

    The user network accepts a connection before anything listens in the guest, so only the server's greeting
    (RFC 4253, section 4.2) is proof.
    """
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return (await reader.readline()).startswith(b"SSH-")
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False


def with_serial(error: QvmError, serial_log: Path) -> QvmError:
    """A failed requirement shows the last serial lines and names the log."""
    if not isinstance(error, NotReadyError):
        return error
    tail = tail_of(serial_log, lines=SERIAL_TAIL)
    parts = [error.details or "", f"last lines of the guest's console:\n{tail}" if tail else ""]
    return NotReadyError(
        error.requirement, error.message, hint=error.hint,
        details="\n".join(part for part in parts if part) or None, log_path=serial_log,
    )
