"""Warm images of disks that boot by firmware: the machine they are frozen in, and what another one would be for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qvm import paths
from qvm.arch import X86_64
from qvm.image.store import Image
from qvm.qemu.features import Firmware, QemuFeatures
from qvm.runtime.registry import load_runtime
from qvm.runtime.stack import Stack
from qvm.warm import request as module
from qvm.warm.fork import build_fork_spec
from qvm.warm.request import RUNTIME, WarmRequest, build_warm_spec, warm_key
from qvm.warm.store import WarmImage

FEATURES = Path(__file__).parents[1] / "qemu" / "features" / "qemu-10.0-x86_64.json"


@pytest.fixture
def request_(tmp_path: Path) -> WarmRequest:
    for name in ("code.fd", "vars.fd"):
        (tmp_path / name).write_bytes(name.encode())
    features = replace(QemuFeatures.from_dict(json.loads(FEATURES.read_text())),
                       firmware=Firmware(tmp_path / "code.fd", tmp_path / "vars.fd"))
    image = Image("ab" * 32, "mine", X86_64, tmp_path, tmp_path / "disk.raw", "raw", None, None, "", {})
    return WarmRequest(image=image, arch=X86_64, features=features, accel="tcg", runtime=Stack(load_runtime("none")),
                       stage=RUNTIME, cpus=2, memory=2 << 30, mount_slots=4)  # fmt: skip


def test_it_boots_by_firmware_with_variables_of_its_own(request_: WarmRequest) -> None:
    spec = build_warm_spec(request_, Path("/w"))
    assert spec.boot is None and spec.firmware_vars == Path("/w/efivars.fd")


def test_a_fork_has_variables_of_its_own(request_: WarmRequest, tmp_path: Path) -> None:
    own = replace(build_warm_spec(request_, Path("/own")), name="dev")
    warm = WarmImage("key", tmp_path / "key-1", {"cpus": 2, "memory": 2 << 30, "mount_slots": 4})
    spec = build_fork_spec(warm, own)
    assert spec.firmware_vars == Path("/own/efivars.fd") and spec.incoming
    assert warm.firmware_vars == tmp_path / "key-1" / "efivars.fd"


def test_firmware_and_seed_are_part_of_the_key(
    request_: WarmRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = warm_key(request_)
    assert warm_key(request_) == key
    (tmp_path / "vars.fd").write_bytes(b"another build")
    assert warm_key(request_) != key
    (tmp_path / "vars.fd").write_bytes(b"vars.fd")
    assert warm_key(request_) == key
    seed = tmp_path / "cloud-init"
    shutil.copytree(paths.share_dir("cloud-init"), seed)
    monkeypatch.setattr(module, "share_dir", lambda name: seed)
    assert warm_key(request_) == key
    (seed / "user-data.yaml").write_text("#cloud-config\n{}\n")
    assert warm_key(request_) != key
