"""`qvm image warm`: make, list and remove warm images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.arch import find_arch
from qvm.commands.builder import build_in_vm
from qvm.config.resolve import resolve_config
from qvm.errors import InstanceStateError, UsageError
from qvm.image.ensure import ensure_image
from qvm.image.store import find_proof_files
from qvm.progress import Progress
from qvm.qemu.accel import choose_accelerator
from qvm.qemu.probe import probe_qemu
from qvm.runtime.stack import load_stack, sections_of
from qvm.warm.make import ensure_warm
from qvm.warm.request import BASE, RUNTIME, build_request, nobodys_context, warm_obstacle
from qvm.warm.store import WarmImage, list_warm, remove_warm


def warm(
    flags: Mapping[str, Any], *, cwd: Path, base: bool = False, count: int = 1, progress: Progress
) -> dict[str, Any]:
    """Have the warm image that a new profile of these settings would fork; what it is, described.

    `count`: how many to have in stock of those that serve one VM each (`qvm.runtime.base.Runtime.single_use`).
    `base`: the stage that a profile whose data disk outlived a delete begins on. UsageError where the settings allow
    no warm image.
    """
    config = resolve_config("default", {"mounts": (), **flags}, stored=None, cwd=cwd).config
    arch = find_arch(config.arch)
    assert arch is not None, "validated when it was resolved"
    runtime, features = load_stack(config), probe_qemu(arch)
    image = ensure_image(config.image, arch, builder=build_in_vm, progress=progress)
    runtime.prepare_host(nobodys_context(sections_of(config), arch, paths.cache_home()), progress)
    kernel, initrd = find_proof_files(image)
    accel = choose_accelerator(config.accel, arch, features, kernel=kernel, initrd=initrd,
                               memory=config.memory).accel
    stage = BASE if base else RUNTIME
    reason = warm_obstacle(config, image, runtime, stage=stage)
    if reason is not None:
        raise UsageError(f"no warm image: {reason}")
    return ensure_warm(
        build_request(config, image, arch, features, accel, runtime, stage=stage), count=count, progress=progress
    ).describe()


def list_all() -> list[dict[str, Any]]:
    return [entry.describe() for entry in list_warm()]


def remove(keys: list[str]) -> list[dict[str, Any]]:
    """Remove warm images by the beginning of their key; all that nobody uses where none is named.

    UsageError for a key that is not there, InstanceStateError for one that is in use; nothing else is removed then.
    """
    images = list_warm()
    chosen = [_find(images, key) for key in keys] or [entry for entry in images if not entry.describe()["in_use"]]
    removed = []
    for entry in chosen:
        row = entry.describe()
        if not remove_warm(entry):
            raise InstanceStateError(f"the warm image {entry.key} ({entry.title}) is in use",
                                     hint="`qvm list` shows instances; `qvm delete` those made from it first")
        removed.append(row)
    return removed


def _find(images: list[WarmImage], key: str) -> WarmImage:
    found = [entry for entry in images if entry.key.startswith(key)]
    if len(found) != 1:
        raise UsageError(f"{key!r} names {len(found)} warm images", hint="`qvm image warm --list` shows the keys")
    return found[0]
