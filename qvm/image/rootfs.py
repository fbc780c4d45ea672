"""The part of an image that comes from the Debian mirror: packages in an ext4 file system, made once per package list.

`ensure_base` keeps its result in the cache. What qvm adds (units, the agent, tools) is baked into a copy later, so a
new agent costs seconds and not another installation.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from qvm import paths, process
from qvm.arch import Arch, host_arch
from qvm.errors import HostError, ImageError, NoSpaceError
from qvm.image import mirror, namespace
from qvm.image.recipe import Recipe, base_key, build_script
from qvm.process import CommandError
from qvm.progress import Progress, Step
from qvm.units import GiB, format_size

NEEDED_SPACE = 5 * GiB
"""Bytes a build takes at its peak: packages, the unpacked root, the base image and the finished one."""

BASE_FILES = ("root.raw", "kernel", "busybox", "release", "packages", "modules", "python")


def bases_dir() -> Path:
    return paths.cache_home() / "images" / "base"


def find_base(recipe: Recipe, arch: Arch) -> Path | None:
    """The folder of the current base, else None."""
    folder = bases_dir() / base_key(recipe, arch)[:16]
    return folder if all((folder / name).exists() for name in BASE_FILES) else None


def check_programs() -> None:
    """HostError naming the package of the first program that is missing."""
    for program, package in (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"),
                             ("apt-get", "apt"), ("xz", "xz-utils")):
        if process.find_program(program) is None:
            raise HostError(f"building an image needs {program!r}", hint=f"sudo apt install {package}")
    namespace.check_host()


def check_space(folder: Path, needed: int = NEEDED_SPACE) -> None:
    """NoSpaceError where `folder`'s file system has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpaceError(
            f"building an image needs {format_size(needed)} in {folder}, and {format_size(free)} are free",
            hint="free some space (`qvm image list` shows what images take), or set QVM_CACHE_HOME to another disk",
        )


def check_foreign(arch: Arch) -> None:
    """HostError where this host cannot run the maintainer scripts of another architecture's packages."""
    if arch == host_arch():
        return
    if not Path(f"/proc/sys/fs/binfmt_misc/qemu-{arch.name}").exists():
        raise HostError(f"building an {arch.name} image here needs that architecture's user emulation",
                        hint="sudo apt install qemu-user-static binfmt-support")


class PackageProgress:
    """Follows apt and dpkg by their output: each package is unpacked and set up once."""

    def __init__(self, step: Step, on_phase: Callable[[str], None]) -> None:
        self.step = step
        self.on_phase = on_phase
        self.done = 0
        self.total = 0
        self._announced = 0

    def line(self, text: str) -> None:
        if match := re.search(r"(\d+) newly installed", text):
            # Said again by the run that installs when another has downloaded before.
            if int(match[1]) != self._announced:
                self._announced = int(match[1])
                self.total += 2 * self._announced
        elif match := re.match(r"Get:\d+ \S+ \S+ \S+ (\S+) \S+ \S+ \[", text):
            self.step.detail(f"fetching {match[1]}")
        elif match := re.match(r"(Unpacking|Setting up) ([^ :]+)", text):
            self.done += 1
            self.step.detail(f"{match[1].lower()} {match[2]}")
        elif text.startswith("qvm-phase: "):
            self.on_phase(text.removeprefix("qvm-phase: "))
            return
        else:
            return
        # apt counts the essential packages only when it has come to them.
        self.step.update(self.done, max(self.total, self.done + 1))


def build_environment(recipe: Recipe, arch: Arch, work: Path, packages: Path) -> dict[str, str]:
    """What images/build.sh reads. Pure."""
    include = (arch.kernel_package, recipe.initramfs_package, *recipe.packages)
    return {
        "QVM_WORK": os.fspath(work),
        "QVM_PACKAGES": os.fspath(packages),
        "QVM_SUITE": recipe.suite,
        "QVM_ARCH": arch.debian,
        "QVM_INCLUDE": ",".join(include),
        "QVM_ROOT_BYTES": str(recipe.root_size),
        "QVM_PLAIN_MODULES": " ".join(recipe.plain_modules),
        "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
    }


def dpkg_options(recipe: Recipe) -> str:
    """dpkg.cfg(5) of the build: no fsync for each file, and what is left out."""
    lines = ["force-unsafe-io", *(f"path-exclude={path}" for path in recipe.exclude)]
    return "".join(line + "\n" for line in [*lines, *(f"path-include={path}" for path in recipe.include)])


def build_base(recipe: Recipe, arch: Arch, *, progress: Progress, log: Path) -> Path:
    """Make the base anew and return its folder; the caller holds the image's lock.

    Raises HostError for what the host lacks, ImageError for what the mirror or a package did wrong; nothing half-made
    is ever found, and what an interrupted build left behind is removed by the next one.
    """
    check_programs()
    check_foreign(arch)
    final = paths.ensure_private_dir(bases_dir()) / base_key(recipe, arch)[:16]
    for left in bases_dir().glob("*.building*"):
        remove_tree(left)
    # A name of our own: the children of a build that was killed may take a moment to notice.
    work = final.with_name(f"{final.name}.building-{os.getpid()}")
    check_space(bases_dir())
    source = mirror.probe_mirror(recipe.suite, progress)
    packages = paths.ensure_private_dir(paths.cache_home() / "apt" / arch.debian)
    work.mkdir()
    try:
        (work / "sources.list").write_text(mirror.render_sources(source, recipe.suite, recipe.components))
        (work / "dpkg.cfg").write_text(dpkg_options(recipe))
        _run(recipe, arch, work, packages, progress, log)
        for name in ("root.raw", "kernel"):
            paths.sync(work / name)
        discard_base(final)
        work.rename(final)
    except BaseException:
        remove_tree(work)
        raise
    return final


def _run(recipe: Recipe, arch: Arch, work: Path, packages: Path, progress: Progress, log: Path) -> None:
    # Through sh: a wheel does not keep the executable bit.
    argv = namespace.enter_argv(["sh", os.fspath(build_script())], root=namespace.is_root())
    environment = build_environment(recipe, arch, work, packages)
    with progress.step(f"installing Debian {recipe.suite} for {arch.name}") as step, log.open("wb") as output:
        follower = PackageProgress(step, lambda phase: step.detail(_PHASES.get(phase, phase)))
        try:
            process.stream(argv, follower.line, env=environment, log=output)
        except CommandError as error:
            raise _explain(error, log) from error


_PHASES = {"finish": "tidying up", "disk": "writing the disk"}


def _explain(error: CommandError, log: Path) -> Exception:
    text = error.details or ""
    hint = "read the log; then try again: what was downloaded is kept"
    if re.search(r"NO_PUBKEY|is not signed|signatures couldn't be verified", text):
        hint = "update Debian's keyring on this host: sudo apt install --only-upgrade debian-archive-keyring"
    elif re.search(r"Failed to fetch|Could not resolve|Unable to connect", text):
        hint = "check the network, or name another mirror: export QVM_DEBIAN_MIRROR=http://deb.debian.org/debian"
    elif "No space left" in text:
        return NoSpaceError("the disk filled up while the image was being built", log_path=log,
                            hint="free some space, or set QVM_CACHE_HOME to another disk")
    return ImageError("building the image failed", details=text or None, hint=hint, log_path=log)


def discard_base(folder: Path) -> None:
    """Remove a finished base; it stops being one before the first of its files goes."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.building-{os.getpid()}-old")
        folder.rename(doomed)
        remove_tree(doomed)


def remove_tree(folder: Path) -> None:
    """Remove a build's folder; without root, what belongs to mapped ids goes through the namespace again."""
    if not folder.exists():
        return
    if not namespace.is_root():
        process.run(namespace.enter_argv(["rm", "-rf", "--", os.fspath(folder)], root=False), check=False)
    if folder.exists():
        shutil.rmtree(folder)
