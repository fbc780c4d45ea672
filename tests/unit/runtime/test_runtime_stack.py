"""Add-ons on top of a runtime, and what must answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from runtime_fakes import FakeGuest, make_context

from qvm.config.model import Config
from qvm.errors import GuestError, NotReadyError, UsageError
from qvm.runtime import stack as module
from qvm.runtime.base import Guest, HostPort, HostSocket, Needs, ReadyCheck, Runtime, RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.runtime.services import ensure_needs, upgrade_packages
from qvm.runtime.stack import Stack, load_stack, merge_settings, sections_of, withdraw_absent
from runtimes.k3s import kubefiles
from runtimes.k3s.kubeconfig import Access, build_entries

LOG: list[str] = []


@pytest.fixture(autouse=True)
def empty_log() -> None:
    LOG.clear()


class Base(Runtime):
    name = "below"
    summary = "a runtime"
    sockets = (HostSocket("below", PurePosixPath("/run/below.sock")),)
    data_folders = (PurePosixPath("/data"),)

    def say(self, what: str, context: RuntimeContext) -> None:
        LOG.append(f"{self.name} {what}")

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        self.say(f"provision {context.settings}", context)

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        self.say("start", context)

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        self.say("ready", context)
        return True

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        self.say("stop", context)

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return f"{self.name} 1"

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        self.say(f"deactivate {remove}", context)
        return [f"{self.name} was here"]

    async def watch_ports(
        self, guest: Guest, context: RuntimeContext, publish: Callable[[Sequence[tuple[str, int]]], None]
    ) -> None:
        publish([("10.0.0.1", len(self.name))])


class Addon(Base):
    name = "onto"
    runs_on = ("below",)
    single_use = True
    sockets = ()
    data_folders = (PurePosixPath("/data"), PurePosixPath("/more"))

    def primary_settings(self, primary: str) -> Mapping[str, Any]:
        return {"plugins": {"cri": True, "other": 1}, "level": "low"}

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        return (HostPort("api", 6443, int(context.settings.get("port", 0))),)


def context_of(tmp_path: Path, **sections: Mapping[str, Any]) -> RuntimeContext:
    context = make_context(tmp_path)
    return RuntimeContext(context.profile, context.folder, context.state_folder, context.user, sections=sections,
                          cache_folder=tmp_path / "cache")


def test_a_start_goes_upward_and_a_stop_downward(tmp_path: Path) -> None:
    whole = Stack(Base(), [Addon()])
    context = context_of(tmp_path, below={"level": "high"}, onto={"port": 7})

    async def scenario() -> None:
        guest = FakeGuest()
        await whole.provision(guest, context)
        await whole.start(guest, context)
        await wait_for_checks(whole, guest, context)
        await whole.stop(guest, context)

    asyncio.run(scenario())
    assert LOG == [
        "below provision {'plugins': {'cri': True, 'other': 1}, 'level': 'high'}", "below start", "below ready",
        "onto provision {'port': 7}", "onto start", "below ready", "onto ready", "onto stop", "below stop",
    ]
    assert whole.deactivate(context, remove=True) == ["onto was here", "below was here"]


def test_each_has_a_context_of_its_own(tmp_path: Path) -> None:
    context = context_of(tmp_path, onto={"port": 7})
    below, onto = (own for _, own in Stack(Base(), [Addon()]).parts(context))
    assert (below.primary, onto.primary) == ("", "below")
    assert below.state_folder == context.state_folder and onto.state_folder == context.state_folder / "onto"
    assert (below.cache_folder, onto.cache_folder) == (tmp_path / "cache" / "below", tmp_path / "cache" / "onto")


def test_a_stack_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    whole = Stack(Base(), [Addon()])
    context = context_of(tmp_path, onto={"port": 7})
    assert whole.name == "below+onto" and whole.single_use and not Stack(Base()).single_use
    assert whole.data_folders == (PurePosixPath("/data"), PurePosixPath("/more"))
    assert whole.host_ports(context) == (HostPort("api", 6443, 7),)
    assert asyncio.run(whole.version(FakeGuest(), context)) == "below 1, onto 1"
    assert whole.without("onto").name == "below"
    published: list[Sequence[tuple[str, int]]] = []
    asyncio.run(whole.watch_ports(FakeGuest(), context, published.append))
    assert sorted(published[-1]) == [("10.0.0.1", 4), ("10.0.0.1", 5)]


def test_warm_images_are_shared_by_what_is_the_same() -> None:
    alone, whole = Stack(Base()), Stack(Base(), [Addon()])
    assert alone.warm_identity({}) == Base().warm_identity({})
    assert alone.warm_identity({}) != whole.warm_identity({})
    assert whole.warm_identity({"onto": {"a": 1}}) != whole.warm_identity({"onto": {"a": 2}})


def test_settings_are_laid_over_key_by_key() -> None:
    assert merge_settings({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 3}, "d": {"e": 1}}) == {
        "a": {"b": 3, "c": 2}, "d": {"e": 1}}


def config(**said: Any) -> Config:
    return Config("dev", 2, 1 << 30, 1 << 30, 1 << 30, "x86_64", said.pop("runtime", "containerd"), "tcg", "debian-13",
                  "qvm", **said)


def test_a_profile_has_the_runtimes_it_asks_for() -> None:
    assert [layer.name for layer in load_stack(config()).layers] == ["containerd"]
    found = load_stack(config(runtime="docker", kubernetes=True))
    assert [layer.name for layer in found.layers] == ["docker", "k3s"]
    sections = sections_of(config(kubernetes=True, k3s_args=("--x",), k3s_listen_port=6443,
                                  containerd={"debug": {"level": "info"}}))
    assert sections == {"k3s": {"version": "", "args": ["--x"], "listen_port": 6443},
                        "containerd": {"debug": {"level": "info"}}}


@pytest.mark.parametrize(("wanted", "hint"), [
    (config(runtime="k3s"), "--kubernetes"), (config(runtime="none", kubernetes=True), "--runtime containerd"),
])
def test_an_addon_needs_something_to_stand_on(wanted: Config, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_stack(wanted)
    assert hint in (caught.value.hint or "")


def test_every_entry_point_of_ours_is_a_runtime_with_needs_that_can_be_met() -> None:
    for name in ("containerd", "docker", "k3s", "none"):
        runtime = module.load_runtime(name)
        assert isinstance(runtime.needs, Needs)
        assert not runtime.needs.packages or {"apt", "apk", "dnf"} == set(runtime.needs.packages)


def test_what_an_addon_had_published_goes_with_it(tmp_path: Path) -> None:
    context = make_context(tmp_path, HOME=str(tmp_path))
    state = context.state_folder / "k3s"
    state.mkdir(parents=True)
    home = str(context.folder.parent)
    entries = build_entries("qvm-dev", Access("https://127.0.0.1:1", "Q0E=", "Q0U=", "S0U="), home=home)
    kubefiles.publish([tmp_path / "config"], entries, state / "kubeconfig.json", home=home, switch=True)
    assert withdraw_absent(load_stack(config(kubernetes=True)), context) == []
    assert (tmp_path / "config").exists()
    assert withdraw_absent(load_stack(config()), context) == []
    assert not (tmp_path / "config").exists()


# --- what must answer


class Slow(Base):
    name = "slow"

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        async def never(guest: Guest, context: RuntimeContext) -> bool:
            return False

        return (ReadyCheck("the socket", self.ready, "no hint"), ReadyCheck("the page", never, "make a page", 0.05))


def test_what_does_not_answer_is_named_with_its_hint(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError) as caught:
        asyncio.run(wait_for_checks(Slow(), FakeGuest(), make_context(tmp_path)))
    assert "the page" in caught.value.message and caught.value.hint == "make a page"
    assert LOG == ["slow ready"]


# --- what is needed in the guest

NEEDS = Needs(packages={"apt": "web curl", "apk": "web"}, programs=("webd", "curl"), kernel_modules=("overlay",))


def test_what_is_there_is_not_installed() -> None:
    guest = FakeGuest()
    asyncio.run(ensure_needs(guest, NEEDS, what="web"))
    assert len(guest.commands) == 1 and guest.commands[0][-1] == "overlay"
    assert guest.envs[0]["QVM_PROGRAMS"] == "webd curl"
    asyncio.run(ensure_needs(guest, Needs(), what="nothing"))
    assert len(guest.commands) == 1


def test_what_is_missing_is_installed() -> None:
    guest = FakeGuest({"QVM_PROGRAMS": b"missing\n"})
    asyncio.run(ensure_needs(guest, NEEDS, what="web"))
    assert len(guest.commands) == 2 and guest.envs[1]["QVM_APT"] == "web curl"


def test_a_kernel_without_the_module_is_named() -> None:
    with pytest.raises(GuestError, match="module"):
        asyncio.run(ensure_needs(FakeGuest({"modprobe": 1}), NEEDS, what="web"))


def test_an_update_tells_what_changed() -> None:
    class Updating(FakeGuest):
        versions = (b"web 1.0\ncurl 8\n", b"web 2.0\ncurl 8\nnew 1\n")

        async def exec(self, argv: Sequence[str], **options: Any) -> Any:
            self.answers = {"dpkg-query": self.versions[any("upgrade" in " ".join(one) for one in self.commands)]}
            return await super().exec(argv, **options)

    lines = asyncio.run(upgrade_packages(Updating(), NEEDS.packages, what="web"))
    assert lines == ["new: not installed -> 1", "web: 1.0 -> 2.0"]
