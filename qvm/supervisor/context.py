"""What runtime plugins may know of the instance they serve."""

from __future__ import annotations

import os

from qvm import paths
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.runtime.base import RuntimeContext
from qvm.runtime.stack import sections_of
from qvm.supervisor.hostnetwork import read_network

_VARIABLES = ("DOCKER_CONFIG", "DOCKER_HOST", "DOCKER_CONTEXT", "KUBECONFIG", "HOME")


def runtime_context(record: Record) -> RuntimeContext:
    """The core's context of an instance; also used by commands that undo one when no supervisor runs."""
    config = record.config
    files = Files(config.profile)
    return RuntimeContext(
        profile=config.profile,
        folder=files.profile_folder,
        state_folder=files.runtime_state,
        user=record.user.name,
        env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        cache_folder=paths.cache_home() / "runtimes",
        arch=config.arch,
        sections=sections_of(config),
        network=read_network(config, os.environ),
    )
