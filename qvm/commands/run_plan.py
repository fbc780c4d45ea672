"""What machine a `qvm run` gets: decided once, and remembered for the next run of the same kind.

Deciding reads the settings, the recipe, the runtime's plugin and the warm image's key: 0.3 s of Python. A remembered
plan is good while everything it was made from is as it was: the same words from the same folder and environment, the
same boot of the host, and every file of `_watched` with its size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvm import paths
from qvm.errors import QvmError
from qvm.filenames import FIRMWARE_VARS
from qvm.supervisor.runplan import FOLDER, RunPlan

if TYPE_CHECKING:
    from qvm.arch import Arch
    from qvm.config.model import Config, Mount
    from qvm.image.store import Image
    from qvm.instance.record import GuestUser
    from qvm.instance.spec import InstanceSpec
    from qvm.progress import Progress
    from qvm.qemu.features import QemuFeatures
    from qvm.runtime.base import Runtime
    from qvm.warm.request import WarmRequest
    from qvm.warm.store import WarmImage

FORMAT = 1
PROFILE = "run"
_PLAIN_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0\n]*")
_KEPT = 30 * 24 * 3600.0
"""Seconds after which a plan that was made then is made anew."""
_DECIDING = ("PATH", "HOME", "LOGNAME", "XDG_CACHE_HOME")


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for, as typed."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    """Config field -> raw value, as for `resolve_config`; `env` is a list of KEY=VALUE or a mapping."""
    cwd: Path = field(default_factory=Path.cwd)
    guest_cwd: str | None = None
    """Where in the guest; None: in `cwd` where that is mounted, else the user's home."""
    cold: bool = False


def plan_run(wish: Wish, *, progress: Progress, remember: bool = True) -> tuple[RunPlan, dict[str, str]]:
    """The machine, made ready so that it can start at once, and the environment of what runs in it.

    Makes the image and the warm image where they are missing, which takes minutes. Raises ConfigError with every
    problem of the wish, and what making them raises.
    """
    env = _plain_env(wish.flags.get("env"))
    usable = remember and env is not None and not wish.cold
    name, key = _entry_name(wish), _key(wish)
    if usable:
        plan = _remembered(name, key)
        if plan is not None:
            assert env is not None
            return plan, env
    plan, env, watched = _Maker(wish, progress).make()
    if usable and plan.warm is not None:
        from qvm.qemu.cache import save_entry

        save_entry(name, key, {"plan": plan.to_dict(), "watched": _stamps(watched)})
        _drop_old_plans()
    return plan, env


def forget_plan(wish: Wish) -> None:
    """It did not work: the next run decides anew."""
    (paths.cache_home() / "probe" / _entry_name(wish)).unlink(missing_ok=True)


def _drop_old_plans() -> None:
    """Those of folders that nobody runs anything in any more."""
    oldest = time.time() - _KEPT
    for path in (paths.cache_home() / "probe").glob("run-*.json"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:
            continue  # another run was first


def _plain_env(raw: object) -> dict[str, str] | None:
    """The environment where it is beyond doubt; None where the settings' own reading must judge it."""
    items = [f"{name}={value}" for name, value in raw.items()] if isinstance(raw, Mapping) else raw or ()
    if not isinstance(items, list | tuple):
        return None
    if not all(isinstance(item, str) and _PLAIN_VARIABLE.fullmatch(item) for item in items):
        return None
    return {name: value for name, _, value in (item.partition("=") for item in items)}


def _key(wish: Wish) -> str:
    """Everything that decides besides files. Values of the environment may be secrets and decide nothing."""
    flags = {name: value for name, value in sorted(wish.flags.items()) if name != "env"}
    environ = {name: value for name, value in os.environ.items() if name.startswith("QVM_") or name in _DECIDING}
    said = [FORMAT, flags, str(wish.cwd), wish.guest_cwd, environ, os.getuid(), os.getgid(), os.uname().release,
            _boot(), _sources(), sys.version]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode()).hexdigest()


def _entry_name(wish: Wish) -> str:
    """One file for each kind of run from each folder, so that old plans do not pile up."""
    said = [sorted((name, repr(value)) for name, value in wish.flags.items() if name != "env"), str(wish.cwd),
            wish.guest_cwd, str(paths.home())]
    return f"run-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}.json"


def _boot() -> str:
    from qvm.qemu.hostinfo import read_boot_id

    return read_boot_id()


def _sources() -> str:
    """The state of qvm's own files: in a checkout they change under us."""
    package = Path(__file__).resolve().parents[1]
    roots = [package]
    for name in ("runtimes", "images", "cloud-init"):
        roots += [root for root in (package.parent / name, package.parent / "qvm_share" / name,
                                    package.parent / "qvm_runtimes") if root.is_dir()]
    total = hashlib.sha256()
    for root in dict.fromkeys(roots):
        for entry in _files(str(root)):
            stat = entry.stat()
            total.update(f"{entry.path}\0{stat.st_mtime_ns}\0{stat.st_size}\n".encode())
    return total.hexdigest()


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    yield from _files(entry.path)
            else:
                yield entry


def _stamps(files: Sequence[Path]) -> dict[str, list[int] | None]:
    return {str(path): _stamp(str(path)) for path in files}


def _stamp(path: str) -> list[int] | None:
    try:
        stat = os.stat(path)  # noqa: PTH116  a hundred of them on the way to every run
    except OSError:
        return None
    return [stat.st_mtime_ns, stat.st_size]


def _remembered(name: str, key: str) -> RunPlan | None:
    try:
        # Not `qvm.qemu.cache.load_entry`: it brings modules that take longer to load than this.
        entry = json.loads((paths.cache_home() / "probe" / name).read_text())
        value = entry["value"]
        if entry["key"] != key or any(_stamp(path) != stamp for path, stamp in value["watched"].items()):
            return None
        plan = RunPlan.from_dict(value["plan"])
        # The mounts were judged when the plan was made; that their folders are still there is for now to tell.
        return plan if all(Path(mount["source"]).is_dir() for mount in plan.mounts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Maker:
    """Decides slowly and completely."""

    def __init__(self, wish: Wish, progress: Progress) -> None:
        self.wish = wish
        self.progress = progress

    def make(self) -> tuple[RunPlan, dict[str, str], list[Path]]:
        from qvm.arch import find_arch
        from qvm.commands.builder import build_in_vm
        from qvm.image.ensure import ensure_image
        from qvm.image.store import find_proof_files
        from qvm.qemu.accel import choose_accelerator
        from qvm.qemu.probe import probe_qemu
        from qvm.runtime.registry import load_runtime

        config = self._config()
        arch = find_arch(config.arch)
        assert arch is not None, "validated when it was resolved"
        runtime, features = load_runtime(config.runtime), probe_qemu(arch)
        image = ensure_image(config.image, arch, builder=build_in_vm, progress=self.progress)
        kernel, initrd = find_proof_files(image)
        choice = choose_accelerator(config.accel, arch, features, kernel=kernel, initrd=initrd,
                                    memory=config.memory)
        request, warm = self._warm(config, image, features, choice.accel, runtime)
        spec = _own_spec(config, image, arch, choice.accel, request)
        plan = _build_plan(self.wish, config, image, spec, features, runtime, warm)
        return plan, dict(config.env), _watched(config, image, arch, features, runtime)

    def _config(self) -> Config:
        from qvm.config.context import Context
        from qvm.config.resolve import resolve_config
        from qvm.config.validate import default_mounts, remark_default_mounts
        from qvm.warm.request import DATA_SIZE

        flags = {"runtime": "none", "disk": f"{DATA_SIZE}B", "hostname": "qvm-run", "activate": False,
                 "kubernetes": False,
                 **{name: value for name, value in self.wish.flags.items() if value is not None}}
        if "mounts" not in flags:
            context = Context(PROFILE, self.wish.cwd, os.environ)
            flags["mounts"] = list(default_mounts(context)) or "none"
            if note := remark_default_mounts(default_mounts(context), context):
                self.progress.note(note)
        return resolve_config(PROFILE, flags, cwd=self.wish.cwd, profile_file=False).config

    def _warm(
        self, config: Config, image: Image, features: QemuFeatures, accel: str, runtime: Runtime
    ) -> tuple[WarmRequest | None, WarmImage | None]:
        from qvm.warm.make import ensure_warm
        from qvm.warm.request import RUNTIME, build_request, warm_obstacle

        if self.wish.cold:
            return None, None
        reason = warm_obstacle(config, image, runtime, stage=RUNTIME)
        if reason is None:
            request = build_request(config, image, image.arch, features, accel, runtime, stage=RUNTIME)
            try:
                return request, ensure_warm(request, progress=self.progress)
            except QvmError as error:
                reason = error.message
        self.progress.note(f"starting cold: {reason}")
        return None, None


def _own_spec(config: Config, image: Image, arch: Arch, accel: str, request: WarmRequest | None) -> InstanceSpec:
    from dataclasses import replace

    from qvm.instance.kernel import kernel_boot
    from qvm.instance.spec import Disk, InstanceSpec
    from qvm.supervisor.assemble import mac_address
    from qvm.warm.request import build_warm_spec

    folder = Path(FOLDER)
    uuid = "00000000-0000-4000-8000-000071766d72"
    boot = kernel_boot(image.kernel, image.initrd, image.cmdline, arch, accel)
    spec = InstanceSpec(
        name=PROFILE, uuid=uuid, arch=arch.name, accel=accel, cpus=config.cpus, memory=config.memory,
        disks=(Disk(folder / "root.qcow2", "root"), Disk(folder / "data.qcow2", "data"),
               Disk(folder / "seed.iso", "seed", format="raw", readonly=True)),
        mounts=config.mounts, mac=mac_address(uuid), ssh_port=0, monitor_socket=folder / "m",
        agent_socket=folder / "a", stream_socket=folder / "s", serial_log=folder / "serial.log", boot=boot,
        firmware_vars=None if boot is not None else folder / FIRMWARE_VARS,
    )
    # The guest knows one network card, the warm machine's; each guest has a network of its own, so it can keep it.
    return spec if request is None else replace(spec, mac=build_warm_spec(request, folder).mac)


def _build_plan(
    wish: Wish, config: Config, image: Image, spec: InstanceSpec, features: QemuFeatures, runtime: Runtime,
    warm: WarmImage | None,
) -> RunPlan:
    from dataclasses import replace

    from qvm.commands.prepare import guest_user
    from qvm.image.disk import disk_info
    from qvm.qemu.cmdline import build_argv
    from qvm.supervisor.hostnetwork import static_hosts
    from qvm.warm.fork import build_fork_spec
    from qvm.warm.request import DATA_SIZE

    if warm is not None:
        seed = replace(spec.disks[2], path=warm.folder / "seed.iso")
        spec = build_fork_spec(warm, replace(spec, disks=(*spec.disks[:2], seed)))
    root, root_format = (warm.root_disk, "qcow2") if warm is not None else (image.disk, image.format)
    base = disk_info(root, format=root_format).virtual_size
    user = guest_user()
    return RunPlan(
        argv=tuple(build_argv(spec, features)), features=features.to_dict(),
        warm=str(warm.folder) if warm is not None else None, root=str(root), root_format=root_format,
        root_size=base if warm is not None else max(base, config.root_disk),
        data=str(warm.data_disk) if warm is not None else None, data_size=config.disk, cpus=config.cpus,
        memory=config.memory, plug=config.memory - spec.memory, runtime=runtime.name, user=user.to_dict(),
        hostname=config.hostname, mounts=tuple(mount.to_dict() for mount in config.mounts), dns=config.dns,
        hosts=static_hosts(config), proxies=config.proxies, ca_certs=config.ca_certs,
        data_folders=tuple(str(folder) for folder in runtime.data_folders),
        cwd=wish.guest_cwd or _guest_cwd(config.mounts, wish.cwd, user),
        grow=warm is not None and config.disk > DATA_SIZE, firmware_vars=_firmware_vars(image, features, warm),
    )  # fmt: skip


def _firmware_vars(image: Image, features: QemuFeatures, warm: WarmImage | None) -> str | None:
    """What a machine that boots by UEFI begins its variables as."""
    if not image.is_foreign:
        return None
    if warm is not None:
        return str(warm.firmware_vars)
    return None if features.firmware is None else str(features.firmware.variables)


def _guest_cwd(mounts: Sequence[Mount], cwd: Path, user: GuestUser) -> str:
    from qvm.commands.ssh import guest_folder

    return str(guest_folder(mounts, cwd) or user.home)


def _watched(config: Config, image: Image, arch: Arch, features: QemuFeatures, runtime: Runtime) -> list[Path]:
    """Files whose change may lead to another decision, those included that are not there yet."""
    import inspect

    from qvm.config.resolve import template_file
    from qvm.image.ensure import deciding_files

    folders = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    return [
        template_file(),
        *deciding_files(config.image, arch),
        image.disk,
        features.binary.resolve(),
        *(folder / arch.qemu_binary for folder in folders),
        *sorted(Path(inspect.getfile(type(runtime))).parent.glob("*.py")),
    ]
