"""`qvm version`: what a defect report needs."""

from __future__ import annotations

import platform
from typing import Any

from qvm.errors import HostError


def version() -> dict[str, Any]:
    """Versions of qvm, Python and QEMU; QEMU's is None where it is not installed."""
    from importlib.metadata import version as distribution_version

    from qvm.arch import host_arch
    from qvm.qemu.probe import probe_qemu

    try:
        features = probe_qemu(host_arch())
        qemu: str | None = features.version_text
        binary: str | None = str(features.binary)
    except HostError:
        qemu = binary = None
    return {
        "qvm": distribution_version("qvm"),
        "python": platform.python_version(),
        "qemu": qemu,
        "qemu_binary": binary,
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
