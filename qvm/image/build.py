"""Making an image by its recipe: base, tools, qvm's own files, kernel and initramfs, sealed and published as one."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from qvm import paths, process
from qvm.arch import Arch
from qvm.errors import ImageError
from qvm.image import bake, initramfs, rootfs, store
from qvm.image.builder import Builder
from qvm.image.recipe import Recipe, baked_files, check_arch, image_key, init_script, load_tools
from qvm.image.tools import BuiltTool, ensure_tools
from qvm.progress import Progress


class _Background:
    """One call in a thread: Go compiles while Debian installs. `result` waits and re-raises."""

    def __init__(self, recipe: Recipe, arch: Arch, progress: Progress) -> None:
        self._tools: list[BuiltTool] = []
        self._error: BaseException | None = None
        self._work = (recipe, arch, progress)
        self._thread = threading.Thread(target=self._run, name="qvm-image-tools", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        recipe, arch, progress = self._work
        try:
            known = load_tools()
            self._tools = ensure_tools([known[name] for name in recipe.tools], arch, progress=progress)
        except BaseException as error:
            self._error = error

    def result(self) -> list[BuiltTool]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._tools


def build_recipe(
    recipe: Recipe, arch: Arch, *, builder: Builder | None = None, progress: Progress, force: bool
) -> store.Image:
    """Build the image and make it current; the caller holds its lock. `force`: with the packages of today."""
    check_arch(recipe, arch)
    key = image_key(recipe, arch)
    log = paths.ensure_private_dir(paths.cache_home() / "logs") / f"build-{recipe.name}-{arch.name}.log"
    work = paths.ensure_private_dir(store.images_dir()) / f".building-{recipe.name}-{arch.name}"
    if work.exists():
        shutil.rmtree(work)
    tools = _Background(recipe, arch, progress)
    base = None if force else rootfs.find_base(recipe, arch)
    if base is None:
        base = rootfs.build_base(recipe, arch, builder=builder, progress=progress, log=log)
    built = tools.result()
    work.mkdir(mode=0o700)
    try:
        with progress.step(f"putting {recipe.name} together") as step:
            step.detail("copying the base")
            manifest = _assemble(work, base, recipe, arch, built)
            step.detail("sealing")
            image_id = store.seal(work, manifest)
        return store.publish(work, image_id, key=key)
    finally:
        if work.exists():
            shutil.rmtree(work)


def _assemble(work: Path, base: Path, recipe: Recipe, arch: Arch, tools: list[BuiltTool]) -> dict[str, Any]:
    rootfs.check_space(work, rootfs.NEEDED_SPACE // 2)
    # GNU cp keeps holes, and shares the blocks where the file system can.
    process.run(["cp", "--sparse=auto", "--reflink=auto", base / "root.raw", work / "disk.raw"])
    programs = {f"/usr/local/bin/{tool.name}": tool.path for tool in tools}
    bake.bake(work / "disk.raw", base, recipe, baked_files(), programs)
    shutil.copyfile(base / "kernel", work / "vmlinuz")
    (work / "initrd").write_bytes(make_initramfs(base, recipe, arch))
    return {
        "name": recipe.name,
        "arch": arch.name,
        "format": "raw",
        "cmdline": recipe.cmdline,
        "files": {"disk": "disk.raw", "kernel": "vmlinuz", "initrd": "initrd"},
        "source": _source_text(tools),
        "kernel_release": (base / "release").read_text().strip(),
        "tools": {tool.name: {"version": tool.version, "from": tool.source} for tool in tools},
        "packages": dict(_packages(base)),
        "base": base.name,
    }


def _packages(base: Path) -> list[tuple[str, str]]:
    rows = [line.split("\t") for line in (base / "packages").read_text().splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def _source_text(tools: list[BuiltTool]) -> str:
    """E.g. "Debian mirror; nerdctl 2.1.2 (go module)": where everything came from, in a line."""
    words = [f"{tool.name} {tool.version} ({tool.source})" for tool in tools]
    return "; ".join(["Debian mirror", *words])


def make_initramfs(base: Path, recipe: Recipe, arch: Arch) -> bytes:
    folder = base / "modules"

    def read(path: PurePosixPath) -> bytes:
        try:
            return (folder / path).read_bytes()
        except OSError as error:
            raise ImageError(f"the base image lacks {os.fspath(path)}", hint="qvm image build --force") from error

    needed = initramfs.collect_modules(recipe.initramfs_modules, PurePosixPath(), read)
    wanted = [*recipe.initramfs_modules, *recipe.background_modules, *recipe.arch_modules.get(arch.name, ())]
    both = initramfs.collect_modules(wanted, PurePosixPath(), read)
    later = [module for module in both if module not in needed]
    return initramfs.build_initramfs(init_script(), (base / "busybox").read_bytes(), needed, later)
