from __future__ import annotations

from pathlib import Path

import pytest

from qvm.config.resolve import resolve_config
from qvm.config.save import render_profile
from qvm.errors import ConfigError
from qvm.instance.record import config_from_dict, config_to_dict

FILE = """\
docker:
  insecure-registries: [a.example:5000]
  log-opts: {max-file: "3", max-size: 10m}
  debug: true
  shutdown-timeout: 20
  label: yes
containerd:
  plugins: {"io.containerd.grpc.v1.cri": {x: 1.5}}
registryMirrors: https://mirror.example
proxies:
  http: localhost:3128
  no: [a, b]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    (tmp_path / "q" / "dev").mkdir(parents=True)
    return tmp_path


def write(home: Path, text: str) -> Path:
    path = home / "q" / "dev" / "qvm.yaml"
    path.write_text(text)
    return path


def test_sections_keep_the_types_that_were_written(home: Path) -> None:
    write(home, FILE)
    config = resolve_config("dev", {}, cwd=home).config
    assert config.docker == {
        "insecure-registries": ["a.example:5000"], "log-opts": {"max-file": "3", "max-size": "10m"}, "debug": True,
        "shutdown-timeout": 20, "label": "yes",
    }
    assert config.containerd == {"plugins": {"io.containerd.grpc.v1.cri": {"x": 1.5}}}
    assert config.registry_mirrors == ("https://mirror.example",)
    assert config.proxies == {"http": "localhost:3128", "no": "a,b"}
    assert config_from_dict(config_to_dict(config)) == config


def test_a_rendered_profile_says_the_same(home: Path) -> None:
    write(home, FILE)
    config = resolve_config("dev", {}, cwd=home).config
    write(home, render_profile(config))
    assert resolve_config("dev", {}, cwd=home).config == config


def test_programs_values_are_taken_as_they_are(home: Path) -> None:
    config = resolve_config("dev", {"docker": {"a": "3", "b": 3, "c": None}, "proxies": "none"}, cwd=home).config
    assert config.docker == {"a": "3", "b": 3, "c": None} and config.proxies == {}


def test_every_mistake_is_told_with_its_place(home: Path) -> None:
    (home / "no.pem").write_text("nothing")
    path = write(home, "docker: [1]\nproxies: {ftp: x}\ncaCerts: [no.pem, gone.pem]\nregistryMirrors: [mirror]\n"
                 "insecureRegistries: ['http://x']\n")
    with pytest.raises(ConfigError) as caught:
        resolve_config("dev", {}, cwd=home)
    text = caught.value.message + (caught.value.details or "") + str(caught.value)
    for words in (f"{path}:1:9: docker: must be a mapping", "unknown key 'ftp'"):
        assert words in text
    write(home, "caCerts: [no.pem, gone.pem]\nregistryMirrors: [mirror]\ninsecureRegistries: ['http://x']\n")
    with pytest.raises(ConfigError) as caught:
        resolve_config("dev", {}, cwd=home)
    text = str(caught.value) + (caught.value.details or "")
    for words in ("no.pem holds no certificate", "gone.pem cannot be read", "'mirror' is not an address",
                  "'http://x' is not HOST[:PORT]"):
        assert words in text
