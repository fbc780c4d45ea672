"""The tiny initramfs of a qvm image: busybox, the few modules that reach the root disk, and one short script.

It has two lives. Normally it loads the modules, mounts the root disk and becomes systemd. With `qvm.proof` on the
kernel command line it says so on the console and powers off, which proves that an accelerator runs this kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from qvm.image import cpio, modules

PROOF_WORD = "qvm.proof"
"""On the kernel command line: prove and power off."""
PROOF_ANSWER = "qvm-proof-ok"
"""What the console shows then."""


Module = tuple[str, bytes]
"""Name and plain content."""


def build_initramfs(init: bytes, busybox: bytes, needed: Sequence[Module], later: Sequence[Module] = ()) -> bytes:
    """An uncompressed archive. `needed`: modules that mounting the root needs, in the order of loading; `later`: those
    that may be loaded while systemd starts.
    """
    entries = [
        cpio.folder("dev"),
        # The kernel opens this one for init's first three descriptors, before devtmpfs can be mounted.
        cpio.character_device("dev/console", 5, 1),
        cpio.folder("proc"),
        cpio.folder("root"),
        cpio.folder("bin"),
        cpio.file("bin/busybox", busybox, 0o755),
        cpio.file("init", init, 0o755),
        cpio.folder("modules"),
        cpio.folder("modules/later"),
        cpio.folder("later"),
    ]
    for folder, modules_there in (("modules", needed), ("modules/later", later)):
        for number, (name, data) in enumerate(modules_there):
            entries.append(cpio.file(f"{folder}/{number:02d}-{name}.ko", data))
    return cpio.build_archive(entries)


def collect_modules(
    wanted: Sequence[str], folder: PurePosixPath, read: modules.ReadFile
) -> list[Module]:
    """(name, plain content) of `wanted` and their needs; `folder` is /usr/lib/modules/<release> in the guest."""
    dependencies = modules.parse_dependencies(read(folder / "modules.dep").decode())
    builtin = modules.parse_builtin(read(folder / "modules.builtin").decode())
    return [
        (modules.module_name(path), modules.strip_signature(modules.decompress(path, read(folder / path))))
        for path in modules.resolve(wanted, dependencies, builtin)
    ]
