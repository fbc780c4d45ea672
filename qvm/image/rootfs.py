"""The part of an image that comes from the Debian mirror: packages in an ext4 file system, made once per package list.

`ensure_base` keeps its result in the cache. What qvm adds (units, the agent, tools) is baked into a copy later, so a
new agent costs seconds and not another installation.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from qvm import locks, paths, process
from qvm.arch import Arch, host_arch
from qvm.errors import HostError, ImageError, NoSpaceError, QvmError
from qvm.image import memory, mirror, namespace
from qvm.image.builder import Builder, BuildJob
from qvm.image.recipe import Recipe, base_key, build_scripts
from qvm.process import CommandError
from qvm.progress import Progress, Step
from qvm.units import GiB, format_size

NEEDED_SPACE = 5 * GiB
"""Bytes a build takes at its peak: packages, the unpacked root, the base image and the finished one."""

BASE_FILES = ("root.raw", "kernel", "busybox", "release", "packages", "modules", "python", "epoch")


def bases_dir() -> Path:
    return paths.cache_home() / "images" / "base"


def find_base(recipe: Recipe, arch: Arch) -> Path | None:
    """The folder of the current base, else None."""
    folder = bases_dir() / base_key(recipe, arch)[:16]
    return folder if all((folder / name).exists() for name in BASE_FILES) else None


_ALWAYS = (("debugfs", "e2fsprogs"), ("e2fsck", "e2fsprogs"))
_NATIVE = (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("apt-get", "apt"), ("dpkg", "dpkg"),
           ("xz", "xz-utils"), ("zstd", "zstd"))
"""Programs and Debian's packages of them: what puts an image together, and what unpacks packages into one."""


def _find_missing(programs: Iterable[tuple[str, str]]) -> HostError | None:
    for program, package in programs:
        if process.find_program(program) is None:
            return HostError(f"building an image needs {program!r}", hint=f"sudo apt install {package}")
    return None


def check_programs(arch: Arch) -> None:
    """HostError naming the first thing that building for `arch` on this host lacks, and the package that has it."""
    missing = _find_missing((*_ALWAYS, *_NATIVE))
    if missing is not None:
        raise missing
    namespace.check_host()
    check_foreign(arch)


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
    if Path(f"/proc/sys/fs/binfmt_misc/{arch.binfmt}").exists():
        return
    if process.find_program(f"{arch.binfmt}-static") and process.find_program("update-binfmts"):
        raise HostError(
            f"the kernel has not been told about {arch.binfmt}-static, which runs {arch.name} programs",
            hint="sudo mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc; sudo update-binfmts --enable",
        )
    raise HostError(f"building {arch.name} images here needs that architecture's user emulation",
                    hint="sudo apt install qemu-user-static binfmt-support")


class PackageProgress:
    """Follows apt and dpkg by their output: each package is unpacked and set up once."""

    def __init__(self, step: Step, on_phase: Callable[[str], None]) -> None:
        self.step = step
        self.on_phase = on_phase
        self.done = 0
        self.total = 0

    def line(self, text: str) -> None:
        if match := re.match(r"qvm-packages: (\d+)", text):
            self.total = 2 * int(match[1])
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
        self.step.update(self.done, max(self.total, self.done + 1))


def build_environment(
    recipe: Recipe, arch: Arch, work: Path, packages: Path, *, host: Arch, tree_bytes: int
) -> dict[str, str]:
    """What images/build.sh reads. `tree_bytes`: of a tmpfs for the unpacked root, 0 for none. Pure."""
    include = (arch.kernel_package, recipe.initramfs_package, *recipe.packages)
    return {
        "QVM_WORK": os.fspath(work),
        "QVM_PACKAGES": os.fspath(packages),
        "QVM_SUITE": recipe.suite,
        "QVM_ARCH": arch.debian,
        "QVM_HOST_ARCH": host.debian,
        "QVM_TREE_BYTES": str(tree_bytes),
        "QVM_LABEL": f"{recipe.name} {arch.name}",
        "QVM_INCLUDE": ",".join(include),
        "QVM_ROOT_BYTES": str(recipe.root_size),
        "QVM_PLAIN_MODULES": " ".join(recipe.plain_modules),
        "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
    }


def dpkg_options(recipe: Recipe) -> str:
    """dpkg.cfg(5) of the build: no fsync for each file, and what is left out."""
    lines = ["force-unsafe-io", *(f"path-exclude={path}" for path in recipe.exclude)]
    return "".join(line + "\n" for line in [*lines, *(f"path-include={path}" for path in recipe.include)])


def choose_builder(builder: Builder | None) -> Builder | None:
    """`builder` where this host lacks what unpacks packages, else None: it builds itself.

    Raises HostError where it lacks what is needed either way.
    """
    if builder is None or _find_missing(_NATIVE) is None:
        return None
    missing = _find_missing(_ALWAYS)
    if missing is not None:
        raise missing
    return builder


@contextmanager
def work_folder(key: str) -> Iterator[Path]:
    """A new folder below `bases_dir`, removed at the end unless renamed. Removes what killed builds have left."""
    with locks.lock(bases_dir() / "sweep.lock", what="builds that were interrupted"):
        for left in bases_dir().glob("*.building*"):
            with _held(left) as free:
                if free:
                    remove_tree(left)
        # A name of our own: the children of a build that was killed may take a moment to notice.
        work = bases_dir() / f"{key}.building-{os.getpid()}"
        work.mkdir()
        holder = ExitStack()
        holder.enter_context(_held(work))
    with holder:
        try:
            yield work
        finally:
            remove_tree(work)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder while the block runs; False where a build that lives has it, or it is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def build_base(
    recipe: Recipe, arch: Arch, *, builder: Builder | None = None, progress: Progress, log: Path
) -> Path:
    """Make the base anew and return its folder; the caller holds the image's lock.

    `builder` does it where this host lacks the programs (`choose_builder`).

    Raises HostError for what the host lacks, ImageError for what the mirror or a package did wrong; nothing half-made
    is ever found, and what an interrupted build left behind is removed by the next one.
    """
    chosen = choose_builder(builder)
    if chosen is None:
        check_programs(arch)
    final = paths.ensure_private_dir(bases_dir()) / base_key(recipe, arch)[:16]
    check_space(bases_dir())
    source = mirror.probe_mirror(recipe.suite, arch, recipe.components, progress)
    packages = paths.ensure_private_dir(paths.cache_home() / "apt" / arch.debian)
    with work_folder(final.name) as work:
        sources = mirror.render_sources(source, recipe.suite, recipe.components, check=chosen is None)
        (work / "sources.list").write_text(sources)
        (work / "dpkg").mkdir()
        (work / "dpkg" / "dpkg.cfg").write_text(dpkg_options(recipe))
        if chosen is None:
            _run(recipe, arch, work, packages, progress, log)
        else:
            _delegate(chosen, recipe, arch, work, packages, progress, log)
        for name in ("root.raw", "kernel"):
            paths.sync(work / name)
        discard_base(final)
        work.rename(final)
    return final


def _run(recipe: Recipe, arch: Arch, work: Path, packages: Path, progress: Progress, log: Path) -> None:
    # Through sh: a wheel does not keep the executable bit.
    argv = namespace.enter_argv(["sh", os.fspath(build_scripts()[0])], root=namespace.is_root())
    environment = build_environment(recipe, arch, work, packages, host=host_arch(), tree_bytes=memory.tree_bytes())
    with progress.step(f"installing Debian {recipe.suite} for {arch.name}") as step, log.open("wb") as output:
        follower = PackageProgress(step, lambda phase: step.detail(_PHASES.get(phase, phase)))
        try:
            process.stream(argv, follower.line, env=environment, log=output)
        except CommandError as error:
            raise _explain(error, log) from error


def _delegate(
    builder: Builder, recipe: Recipe, arch: Arch, work: Path, packages: Path, progress: Progress, log: Path
) -> None:
    environment = build_environment(recipe, arch, work, packages, host=host_arch(), tree_bytes=0)
    job = BuildJob(recipe.name, host_arch(), build_scripts()[0].parent, work, packages,
                   {**environment, "QVM_BINFMT": arch.binfmt})
    with progress.step(f"installing Debian {recipe.suite} for {arch.name} in a VM") as step, log.open("wb") as output:
        follower = PackageProgress(step, lambda phase: step.detail(_PHASES.get(phase, phase)))
        try:
            builder(job, on_line=follower.line, log=lambda data: _write(output, data), progress=progress)
        except ImageError as error:
            raise _explain(error, log) from error


def _write(output: BinaryIO, data: bytes) -> None:
    output.write(data)
    output.flush()


_PHASES = {"tools": "installing mmdebstrap", "compile": "compiling Python modules", "finish": "tidying up",
           "disk": "writing the disk", "copy": "copying the base"}


def _explain(error: QvmError, log: Path) -> Exception:
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
