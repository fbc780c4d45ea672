"""What a host that cannot build an image itself asks another machine for.

The image room knows no machines: whoever stands above it passes a `Builder` in (`qvm.commands.builder` has the one
that starts a VM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qvm.arch import Arch
from qvm.progress import Progress


@dataclass(frozen=True, slots=True)
class BuildJob:
    """A base to be made: images/build-vm.sh with `environment`, as root, on a Linux of the architecture `host`."""

    name: str
    """Of the recipe."""
    host: Arch
    scripts: Path
    """Folder of the scripts, which is only read."""
    out: Path
    """Holds sources.list and dpkg/; receives the finished files."""
    packages: Path
    """Cache of Debian packages."""
    environment: Mapping[str, str]

    @property
    def folders(self) -> tuple[tuple[Path, bool], ...]:
        """What the other machine must see at the same paths, and whether it writes there."""
        return (self.scripts, False), (self.out, True), (self.packages, True)


class Builder(Protocol):
    def __call__(
        self, job: BuildJob, *, on_line: Callable[[str], None], log: Callable[[bytes], None], progress: Progress
    ) -> None:
        """Do the job; each line that the build says goes to `on_line`, everything to `log`.

        Raises ImageError where the build failed, and what starting the other machine raises.
        """
