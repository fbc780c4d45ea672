"""What k3s is given in the guest, and what the host gets of it."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from runtime_fakes import FakeGuest, make_context

from qvm.errors import GuestError
from qvm.runtime.base import ExecResult, RuntimeContext
from runtimes.k3s import K3s
from runtimes.k3s import guest as inside

LOOK_NEW = b"none\ncni /usr/lib/cni\n"
SECRET = base64.b64encode(b"x").decode()
K3S_YAML = yaml.safe_dump({
    "clusters": [{"cluster": {"certificate-authority-data": SECRET, "server": "https://127.0.0.1:6443"}}],
    "users": [{"user": {"client-certificate-data": SECRET, "client-key-data": SECRET}}],
}).encode()


@dataclass
class Guest(FakeGuest):
    sent: dict[str, Path] = field(default_factory=dict)

    async def exec(self, argv: Any, **options: Any) -> ExecResult:
        if argv[-1] == "--version":
            self.commands.append(list(argv))
            return ExecResult(0, b"k3s version v1.34.3+k3s1 (151ca514)\ngo version go1.24\n", b"")
        return await super().exec(argv, **options)

    async def send_file(self, source: Path, target: PurePosixPath, **_: Any) -> None:
        self.sent[str(target)] = source


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeContext:
    place = tmp_path / "k3s"
    place.mkdir()
    (place / "k3s").write_bytes(b"binary")
    (place / "pause.tar").write_bytes(b"image")
    monkeypatch.setenv("QVM_K3S", str(place))
    return replace(make_context(tmp_path), primary="containerd", arch="x86_64", cache_folder=tmp_path / "cache",
                   settings={"version": "", "args": ["--disable=coredns"], "listen_port": 0})


def provision(guest: Guest, context: RuntimeContext) -> None:
    asyncio.run(K3s().provision(guest, context))


def test_a_new_guest_gets_binary_images_network_and_unit(context: RuntimeContext) -> None:
    guest = Guest({"cat /usr/local/lib/qvm/k3s": LOOK_NEW})
    provision(guest, context)
    assert set(guest.sent) == {"/usr/local/bin/k3s", "/var/lib/rancher/k3s/.pause.tar"}
    assert {"/etc/systemd/system/k3s.service", "/etc/cni/k3s/10-k3s.conflist"} <= set(guest.files)
    assert guest.files["/usr/local/lib/qvm/k3s"].endswith(b" v1.34.3+k3s1\n")
    imports = [command for command in guest.commands if "import" in command]
    assert len(imports) == 1 and "ctr --namespace k8s.io images import" in imports[0][2]
    assert asyncio.run(K3s().version(Guest({"cat": b"abc v1.34.3+k3s1\n"}), context)) == "k3s v1.34.3+k3s1"


def test_a_guest_that_has_it_gets_nothing(context: RuntimeContext) -> None:
    first = Guest({"cat /usr/local/lib/qvm/k3s": LOOK_NEW})
    provision(first, context)
    stamp = first.files["/usr/local/lib/qvm/k3s"]
    image = b"image " + stamp[:12] + b"-pause.tar\n"
    again = Guest({"cat /usr/local/lib/qvm/k3s": stamp + image + b"running\ncni /usr/lib/cni\n"}, files=first.files)
    provision(again, context)
    assert again.sent == {} and "restart" not in again.scripts()
    other = replace(context, settings={**context.settings, "args": ["--disable=traefik"]})
    provision(again, other)
    assert again.sent == {} and any(command[-1:] == ["k3s"] and "restart" in command for command in again.commands)


def test_on_docker_images_are_dockers(context: RuntimeContext) -> None:
    guest = Guest({"cat /usr/local/lib/qvm/k3s": LOOK_NEW})
    provision(guest, replace(context, primary="docker"))
    assert "docker load" in guest.scripts() and "/etc/cni/net.d/10-k3s.conflist" in guest.files
    assert b"--docker" in guest.files["/etc/systemd/system/k3s.service"]


def test_a_guest_without_network_plugins_is_refused(context: RuntimeContext) -> None:
    with pytest.raises(GuestError, match="CNI"):
        provision(Guest({"cat /usr/local/lib/qvm/k3s": b"none\n"}), context)


def test_arguments_of_the_user_come_last() -> None:
    args = inside.server_args("containerd", ["--tls-san=a.example"])
    assert args[0] == "server" and args[-1] == "--tls-san=a.example" and "--disable=traefik" in args
    assert "--disable=traefik" not in inside.server_args("containerd", ["--disable=coredns"])
    assert not [word for word in inside.server_args("containerd", ["--disable=none"]) if "--disable=" in word]
    assert "--kubelet-arg=cgroup-driver=systemd" in args  # what containerd is told too
    runc = inside.containerd_settings()["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]["runc"]
    assert runc["options"]["SystemdCgroup"] is True


def test_systemds_own_letters_are_escaped() -> None:
    text = inside.unit(["server", "--x=50% of $HOME", "--y='q'"], primary="docker").decode()
    assert "--x=50%% of $$HOME" in text and "After=network-online.target docker.service" in text


def test_the_network_is_what_cni_reads() -> None:
    document = json.loads(inside.network())
    assert [plugin["type"] for plugin in document["plugins"]] == ["bridge", "portmap", "firewall"]


def test_the_kubeconfig_comes_to_the_host_and_goes(context: RuntimeContext, tmp_path: Path) -> None:
    guest = Guest({"/etc/rancher/k3s/k3s.yaml": K3S_YAML})
    assert asyncio.run(K3s().after_fork(guest, context)) == []
    ready = replace(context, host_ports={"kubernetes": 40001})
    context.folder.mkdir(parents=True)
    assert K3s().activate(ready, switch=True) == []
    own, theirs = context.folder / "kubeconfig.yaml", tmp_path / ".kube" / "config"
    for path in (own, theirs):
        document = yaml.safe_load(path.read_text())
        assert document["current-context"] == "qvm-dev" and path.stat().st_mode & 0o777 == 0o600
        assert document["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:40001"
    assert K3s().deactivate(context, remove=False) == []
    assert yaml.safe_load(theirs.read_text()).get("current-context") is None
    assert K3s().deactivate(context, remove=True) == [] == K3s().deactivate(context, remove=True)
    assert not own.exists() and not theirs.exists()


def test_a_kubeconfig_that_cannot_be_changed_is_a_note(context: RuntimeContext, tmp_path: Path) -> None:
    asyncio.run(K3s().after_fork(Guest({"k3s.yaml": K3S_YAML}), context))
    context.folder.mkdir(parents=True)
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text("- not a mapping\n")
    notes = K3s().activate(replace(context, host_ports={"kubernetes": 1}), switch=True)
    assert len(notes) == 1 and "kubeconfig.yaml" in notes[0]
    assert (tmp_path / ".kube" / "config").read_text() == "- not a mapping\n"


def test_a_copy_gets_keys_of_its_own(context: RuntimeContext) -> None:
    guest = Guest({"k3s.yaml": K3S_YAML})
    notes = asyncio.run(K3s().after_fork(guest, replace(context, sole=False)))
    assert len(notes) == 1 and "rm -rf server/tls" in guest.scripts()
    order = [index for index, command in enumerate(guest.commands) for word in ("systemctl stop", "rm -rf server/tls",
             "--no-block", "nodes/qvm") if word in " ".join(command)]
    assert order == sorted(order) and len(order) >= 4
