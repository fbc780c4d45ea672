"""qvm: Linux VMs with containers in them, driven by Python straight on QEMU.

    import qvm

    with qvm.start("ci", runtime="docker", memory="4GiB") as vm:
        print(vm.run(["uname", "-a"]).stdout)
    print(qvm.run(["python3", "-c", "print(42)"]).stdout)   # a VM for one command

Names are loaded on first use: `import qvm` itself costs nothing, and neither does the CLI's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvm.api import VM as VM
    from qvm.api import RunResult as RunResult
    from qvm.api import get as get
    from qvm.api import list_vms as list_vms
    from qvm.api import run as run
    from qvm.api import start as start
    from qvm.errors import QvmError as QvmError

__all__ = ["VM", "QvmError", "RunResult", "get", "list_vms", "run", "start"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qvm' has no attribute {name!r}")
    if name == "QvmError":
        from qvm.errors import QvmError

        return QvmError
    from qvm import api

    return getattr(api, name)
