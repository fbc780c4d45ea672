from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qvm.config import plugins
from qvm.errors import HostError, UsageError
from qvm.runtime import registry
from qvm.runtime.base import Runtime


@pytest.fixture
def with_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Third parties' plugins, most of them broken, as installed beside qvm's own."""
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "odd_plugin.py").write_text("class Odd:\n    summary = 'odd'\nTHING = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = plugins.entry_points
    values = {"broken": "broken_plugin:Broken", "odd": "odd_plugin:Odd", "gone": "odd_plugin:Gone",
              "thing": "odd_plugin:THING", "alias": "runtimes.none:NoRuntime", "docker": "odd_plugin:Odd"}

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [*real(group=group), *(EntryPoint(name, value, group) for name, value in values.items())]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


@pytest.mark.parametrize("name", ["docker", "containerd", "none"])
def test_the_runtimes_of_this_repository_load(name: str) -> None:
    runtime = registry.load_runtime(name)
    assert isinstance(runtime, Runtime)
    assert runtime.name == name and runtime.summary


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        registry.load_runtime("dokcer")
    assert caught.value.hint == "did you mean 'docker'?"
    with pytest.raises(UsageError) as caught:
        registry.load_runtime("zzz")
    assert caught.value.hint == "there are: " + ", ".join(plugins.list_runtime_names())


@pytest.mark.usefixtures("with_plugins")
def test_a_broken_plugin_spoils_only_itself() -> None:
    infos = {info.name: info for info in registry.list_runtimes()}
    assert infos["docker"].error is None and infos["none"].error is None
    assert "a_module_that_is_not_there" in (infos["broken"].error or "")
    for name in ("odd", "gone", "thing", "alias"):
        assert infos[name].error, name
        with pytest.raises(HostError):
            registry.load_runtime(name)


@pytest.mark.usefixtures("with_plugins")
def test_nobody_takes_the_name_of_one_of_ours() -> None:
    assert registry.load_runtime("docker").name == "docker"


def test_listing_names_imports_no_plugin() -> None:
    for module in [name for name in sys.modules if name.endswith("none") and "runtimes" in name]:
        del sys.modules[module]
    plugins.list_runtime_names()
    assert not any(name.endswith("runtimes.none") for name in sys.modules)
