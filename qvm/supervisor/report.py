"""What only the supervisor knows of its instance; `status` adds the rest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qvm.supervisor.mounts import describe_mounts

if TYPE_CHECKING:
    from qvm.supervisor.core import Supervisor


def describe(supervisor: Supervisor) -> dict[str, Any]:
    link, publishing, run = supervisor.link, supervisor.publishing, supervisor.run
    return {
        "phase": supervisor.phase,
        "supervisor_pid": os.getpid(),
        "requirements": dict(supervisor.requirements),
        "runtime_version": run.runtime_version if run else "",
        "mounts": describe_mounts(run.mounts) if run else [],
        "forwards": link.forwards() if link else [],
        "forward_events": link.forward_events() if link else [],
        "sockets": link.sockets() if link else {},
        "ports": publishing.ports() if publishing else {},
        **supervisor.services.status(),
        "environment": dict(supervisor.runtime.environment(supervisor.context)),
    }
