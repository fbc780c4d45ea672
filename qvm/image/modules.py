"""Kernel modules: which files a module needs, in the order they are loaded, and their plain content."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from qvm.errors import ImageError

ReadFile = Callable[[PurePosixPath], bytes]


def module_name(path: str) -> str:
    """"crc32c_generic" of "kernel/crypto/crc32c-generic.ko.xz": dashes and underscores are one to the kernel."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def parse_dependencies(text: str) -> dict[str, tuple[str, ...]]:
    """modules.dep(5): path of a module -> paths it needs, in the order depmod wrote them."""
    table: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        path, colon, needs = line.partition(":")
        if colon:
            table[path.strip()] = tuple(needs.split())
    return table


def parse_builtin(text: str) -> frozenset[str]:
    """modules.builtin: names of the modules that are part of the kernel itself."""
    return frozenset(module_name(line) for line in text.splitlines() if line.strip())


def resolve(
    wanted: Iterable[str], dependencies: dict[str, tuple[str, ...]], builtin: frozenset[str]
) -> list[str]:
    """Paths of `wanted` and all they need, each once, ready for insmod one after the other.

    Built-in modules are left out. Raises ImageError for a name the kernel does not have at all.
    """
    by_name = {module_name(path): path for path in dependencies}
    order: list[str] = []

    def add(path: str) -> None:
        if path in order:
            return
        for need in reversed(dependencies.get(path, ())):
            add(need)
        order.append(path)

    for name in wanted:
        plain = name.replace("-", "_")
        if plain in by_name:
            add(by_name[plain])
        elif plain not in builtin:
            raise ImageError(f"the image's kernel has no module {name!r}")
    return order


def decompress(path: str, data: bytes) -> bytes:
    """The plain module: insmod of a tiny initramfs reads no compressed ones."""
    if path.endswith(".ko"):
        return data
    if path.endswith(".ko.xz"):
        return lzma.decompress(data)
    if path.endswith(".ko.gz"):
        return gzip.decompress(data)
    raise ImageError(f"cannot read the kernel module {path}: unknown compression")


_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_INFO = 12


def strip_signature(data: bytes) -> bytes:
    """A module without its signature (include/linux/module_signature.h: signature, 12 bytes of info, magic string).

    The kernel checks a signature that is there and, as Debian sets it up, needs none. Checking takes some 15 ms for
    each module under emulation. What the initramfs holds is covered by the image's digests.
    """
    if not data.endswith(_SIGNED):
        return data
    end = len(data) - len(_SIGNED) - _SIGNATURE_INFO
    length = int.from_bytes(data[end + 8 : end + 12], "big")
    return data[: end - length]
