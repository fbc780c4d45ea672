"""What qvm adds to a base image, written into its file system with debugfs: no mount, no root, no second copy.

The agent is compiled here too, by the image's own Python, which otherwise would do that at an emulated first boot.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from qvm import process
from qvm.errors import ImageError
from qvm.image.recipe import BakedFile, Recipe, compile_script

_UNITS = "/usr/lib/systemd/system"
_SYSTEM = "/etc/systemd/system"


def compile_module(base: Path, file: BakedFile) -> BakedFile:
    """The compiled form of a Python file, where that image's Python looks for it."""
    python = base / "python"
    loader = next((python / "lib").glob("ld*.so.[0-9]"), None)
    if loader is None:
        raise ImageError("the base image's Python is incomplete", hint="build it anew: qvm image build --force")
    done = process.run(
        [loader, "--library-path", python / "lib", python / "python", "-S", "-s", compile_script(), file.path],
        input=file.data, env={"PYTHONHOME": os.fspath(python / "home")},
    )
    tag = done.stderr.decode().strip().splitlines()[-1]
    path = PurePosixPath(file.path)
    return BakedFile(f"{path.parent}/__pycache__/{path.stem}.{tag}.pyc", 0o644, done.stdout)


def unit_links(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """(symbolic link -> target, paths to remove) that mask, enable and disable units. Pure."""
    links = dict.fromkeys((*(f"{_SYSTEM}/{unit}" for unit in recipe.mask), *recipe.mask_files), "/dev/null")
    for target, units in recipe.enable.items():
        links.update({f"{_SYSTEM}/{target}.wants/{unit}": f"{_UNITS}/{unit}" for unit in units})
    removed = [
        f"{folder}/{target}.wants/{unit}"
        for target, units in recipe.disable.items()
        for unit in units
        for folder in (_SYSTEM, _UNITS)
    ]
    return links, removed


def _folders(path: str) -> Iterable[str]:
    parents = [parent.as_posix() for parent in PurePosixPath(path).parents]
    return reversed(parents[:-1])


def render_script(files: Sequence[tuple[str, int, Path]], links: dict[str, str], removed: Sequence[str]) -> str:
    """debugfs(8) commands. `files`: (path in the image, mode, host file that holds the content). Pure.

    debugfs does not overwrite, so each path is removed first; making a folder that is there changes nothing.
    """
    lines = [f"rm {path}" for path in removed]
    for folder in dict.fromkeys(f for path in (*(path for path, _, _ in files), *links) for f in _folders(path)):
        lines.append(f"mkdir {folder}")
    for path, mode, source in files:
        lines += [f"rm {path}", f"write {source} {path}", f"sif {path} mode 0{stat.S_IFREG | mode:o}",
                  f"sif {path} uid 0", f"sif {path} gid 0"]  # fmt: skip
    for path, target in links.items():
        lines += [f"rm {path}", f"symlink {path} {target}"]
    return "".join(line + "\n" for line in lines)


# What debugfs says of `rm` for a path that is not there and of `mkdir` for one that is, and its greeting.
_HARMLESS = re.compile(r"rm: File not found|(ext2fs_)?mkdir: Ext2 (directory|file) already exists|debugfs \d|$")


def run_script(disk: Path, script: Path, epoch: int) -> None:
    """Run debugfs commands on a raw disk image and check the file system; ImageError where either finds fault.

    `epoch`: the time of every change, in seconds since 1970.
    """
    program = process.find_program("debugfs") or Path("debugfs")
    # e2fsprogs heeds the first since 1.47.1, and the second, its own, before.
    times = {"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(epoch)}
    done = process.run([program, "-w", "-f", script, disk], env=times, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    complaints = [line for line in lines if not _HARMLESS.match(line.strip())]
    if done.returncode != 0 or complaints:
        raise ImageError("writing qvm's own files into the image failed", details="\n".join(complaints[-15:]) or None)
    checked = process.run([process.find_program("e2fsck") or "e2fsck", "-fn", disk], check=False)
    if checked.returncode != 0:
        raise ImageError("the image's file system is not in order", details=checked.text[-2000:])


def bake(disk: Path, base: Path, recipe: Recipe, files: Sequence[BakedFile], programs: dict[str, Path]) -> None:
    """Write `files` and `programs` (path in the image -> host file) and the recipe's unit settings into `disk`."""
    compiled = [compile_module(base, file) for file in files if file.path.endswith(".py")]
    links, removed = unit_links(recipe)
    with tempfile.TemporaryDirectory(prefix="bake-", dir=disk.parent) as name:
        folder = Path(name)
        contents = []
        for number, file in enumerate([*files, *compiled]):
            source = folder / str(number)
            source.write_bytes(file.data)
            contents.append((file.path, file.mode, source))
        contents += [(path, 0o755, source) for path, source in programs.items()]
        script = folder / "script"
        script.write_text(render_script(contents, links, removed))
        run_script(disk, script, int((base / "epoch").read_text()))
