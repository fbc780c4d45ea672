"""Building an image in a VM, for hosts without mmdebstrap: macOS, other distributions.

The VM is that of a `qvm run`: it ends with this process, whatever ends that, and leaves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from qvm.arch import Arch
from qvm.errors import ImageError
from qvm.image import store
from qvm.image.builder import BuildJob
from qvm.image.memory import SPARE, TREE
from qvm.progress import Progress
from qvm.units import MiB

CLOUD_IMAGE = "debian-13-cloud"
"""Of the catalogue: what builds where no image of qvm's own is there yet."""
_TAIL = 40
"""Lines of a failed build that its error shows."""
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def choose_image(arch: Arch) -> str:
    """The image whose VM builds: of qvm's own in the cache the newest, if possible one with mmdebstrap in it (which is
    installed where not), else the official cloud image.
    """
    own = [image for image in store.list_images()
           if image.arch == arch and image.kernel is not None and image.manifest.get("packages")]
    ready = [image for image in own if "mmdebstrap" in image.manifest["packages"]]
    return (ready or own)[0].id if own else CLOUD_IMAGE


def build_in_vm(
    job: BuildJob, *, on_line: Callable[[str], None], log: Callable[[bytes], None], progress: Progress
) -> None:
    """The `qvm.image.builder.Builder` that starts a VM."""
    from qvm.commands.run import run_collected
    from qvm.commands.run_plan import Wish
    from qvm.config.model import Mount

    image = choose_image(job.host)
    progress.note(f"this host has no mmdebstrap: building in a VM of {image[:16]}")
    flags = {
        "image": image, "arch": job.host.name, "runtime": "none", "cpus": os.cpu_count() or 1,
        "memory": _memory(), "mounts": [Mount(path, PurePosixPath(path), writable) for path, writable in job.folders],
    }  # fmt: skip
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    words = {**job.environment, **passed, "QVM_OUT": os.fspath(job.out), "QVM_TREE_ROOM": str(TREE)}
    argv = ["sudo", "env", *(f"{name}={value}" for name, value in words.items()),
            "sh", os.fspath(job.scripts / "build-vm.sh")]  # fmt: skip
    lines = Lines(on_line, log)
    outcome = run_collected(Wish(flags, Path("/"), None, cold=True), argv, on_stdout=lines.feed, on_stderr=lines.feed,
                            progress=progress)
    if outcome.exit_code != 0:
        raise ImageError("building the image in a VM failed", details="\n".join(lines.last) or None,
                         hint="read the log; then try again: what was downloaded is kept")


def _memory() -> str:
    """What the tree in memory needs where the host has twice that to spare, else the least a build runs in."""
    from qvm.image.memory import available_bytes

    wanted = TREE + 2 * SPARE
    available = available_bytes()
    return f"{(wanted if available is None or available > 2 * wanted else 2 * SPARE) // MiB}MiB"


class Lines:
    """Lines of output that comes in pieces."""

    def __init__(self, on_line: Callable[[str], None], log: Callable[[bytes], None]) -> None:
        self.last: list[str] = []
        self._on_line = on_line
        self._log = log
        self._rest = b""

    def feed(self, data: bytes) -> None:
        self._log(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for raw in whole:
            line = raw.decode(errors="replace")
            self.last = [*self.last, line][-_TAIL:] if line != "qvm-alive" else self.last
            self._on_line(line)
