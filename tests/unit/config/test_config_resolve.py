"""Precedence, what is fixed after creation, and that every problem is told at once with its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from qvm.arch import host_arch
from qvm.config import validate
from qvm.config.model import Config, Mount
from qvm.config.resolve import Resolved, describe_changes, resolve_config
from qvm.errors import ConfigError
from qvm.instance.record import config_to_dict
from qvm.units import GiB, MiB

Resolve = Callable[..., Resolved]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    (folder / "_templates").mkdir(parents=True)
    (folder / "dev").mkdir()
    monkeypatch.setenv("QVM_HOME", str(folder))
    monkeypatch.setattr(validate, "host_memory", lambda: 8 * GiB)
    monkeypatch.setattr(validate, "host_cpus", lambda: 4)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "my wörk"
    folder.mkdir()
    return folder


@pytest.fixture
def resolve(home: Path, work: Path) -> Resolve:
    def call(
        flags: Mapping[str, Any] | None = None,
        *,
        stored: Config | None = None,
        environ: Mapping[str, str] | None = None,
        profile: str = "dev",
        cwd: Path = work,
    ) -> Resolved:
        return resolve_config(
            profile, flags or {}, stored=config_to_dict(stored) if stored else None, cwd=cwd, environ=environ or {}
        )

    return call


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_defaults(resolve: Resolve, work: Path) -> None:
    resolved = resolve()
    assert resolved.config == Config(
        profile="dev", cpus=2, memory=2 * GiB, disk=100 * GiB, root_disk=20 * GiB, arch=host_arch().name,
        runtime="containerd", accel="auto", image="debian-13", hostname="qvm-dev",
        mounts=(Mount(work, PurePosixPath(work)),),
    )  # fmt: skip
    assert resolved.explicit == {}
    assert resolved.notes == []
    assert resolve(profile="default").config.hostname == "qvm"


def test_nearer_places_win(resolve: Resolve, home: Path) -> None:
    (home / "_templates" / "default.yaml").write_text("cpus: 1\nmemory: 1\nruntime: none\nhostname: template\n")
    (home / "dev" / "qvm.yaml").write_text("memory: 3\nruntime: none\n")
    resolved = resolve({"cpus": "4"}, environ={"QVM_DEFAULT_RUNTIME": "docker"})
    config = resolved.config
    assert (config.cpus, config.memory, config.runtime, config.hostname) == (4, 3 * GiB, "docker", "template")
    assert resolved.explicit == {
        "cpus": "flag", "memory": "file", "runtime": "environment", "hostname": "template"
    }  # fmt: skip


def test_flags_go_by_file_key_and_by_field_and_none_is_not_given(resolve: Resolve) -> None:
    config = resolve({"rootDisk": "30", "ssh_port": 2222, "cpus": None, "activate": False, "memory": "512MiB"}).config
    assert (config.root_disk, config.ssh_port, config.cpus, config.activate) == (30 * GiB, 2222, 2, False)
    assert config.memory == 512 * MiB


def test_every_problem_at_once_with_its_place(resolve: Resolve, home: Path, work: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.write_text(
        "memroy: 4\n"
        "cpus: many\n"
        "cpus: 3\n"
        "mounts:\n"
        f"  - {work}\n"
        "  - source: /does/not/exist\n"
        "    writeable: yes\n"
        "dns: [1.1.1.1, nonsense]\n"
    )
    found = problems(lambda: resolve({"memory": "10TiB", "cpu": 1, "hostname": "-x"}))
    assert found == [
        "cpu: there is no such setting; did you mean cpus?",
        f"{file}:1:1: unknown key 'memroy'; did you mean memory?",
        f"{file}:3:1: the key 'cpus' stands in line 2 already",
        f"{file}:2:7: cpus: 'many' is not a whole number",
        f"{file}:7:16: mounts: unknown key 'writeable'; a mount has source, target, writable and mmap",
        "--memory: 10 TiB is more than this host's memory of 8 GiB",
        f"{file}:8:16: dns: 'nonsense' is not an IP address",
        "--hostname: '-x' is not a host name: letters, digits and inner hyphens, at most 63 in each part",
    ]


def test_what_a_nearer_place_hides_must_be_readable_but_need_not_make_sense(resolve: Resolve, home: Path) -> None:
    (home / "dev" / "qvm.yaml").write_text("mounts: [/does/not/exist]\n")
    assert resolve({"mounts": ["none"]}).config.mounts == ()
    (home / "dev" / "qvm.yaml").write_text("cpus: [1, 2]\n")
    assert "must be one value, not a list" in problems(lambda: resolve({"cpus": "2"}))[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"cpus": "0"}, "--cpus: 0 is out of range"),
        ({"cpus": "1.5"}, "not a whole number"),
        ({"memory": "100MiB"}, "at least 256 MiB"),
        ({"memory": "2 parsecs"}, "unknown unit 'parsecs'"),
        ({"disk": "0.5"}, "--disk: 512 MiB is too small"),
        ({"root_disk": "1PiB"}, "unknown unit 'PiB'"),
        ({"disk": "100TiB"}, "at most 64 TiB"),
        ({"arch": "sparc"}, "not an architecture qvm knows"),
        ({"arch": "armv7l", "memory": "3.5GiB"}, "an armv7l VM has at most 3 GiB"),
        ({"runtime": "dokcer"}, "did you mean docker?"),
        ({"accel": "warp"}, "not one of auto, kvm, hvf, tcg"),
        ({"image": "Some Disk"}, "`qvm image list`"),
        ({"image": "https://host/disk.qcow2"}, "address with a digest"),
        ({"ssh_port": "22"}, "1024 to 65535"),
        ({"env": ["NOVALUE"]}, "write NOVALUE=VALUE"),
        ({"env": {"1X": "y"}}, "not a name of a variable"),
        ({"env": {"X": "a\nb"}}, "one line"),
    ],
)
def test_bad_values(resolve: Resolve, flags: dict[str, Any], words: str) -> None:
    [problem] = problems(lambda: resolve(flags))
    assert words in problem


@pytest.mark.parametrize("name", ["", "_x", "Dev", "a b", "-a", "a/b", "serial", "all", "x" * 40, "../x", "a\n"])
def test_bad_profile_names(resolve: Resolve, name: str) -> None:
    assert problems(lambda: resolve(profile=name))[0].startswith("--profile: ")


@pytest.mark.parametrize("name", ["a", "0", "my.app_1-x", "x" * 39])
def test_good_profile_names(name: str) -> None:
    assert validate.validate_profile_name(name) == []


def make_config(work: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "profile": "dev", "cpus": 3, "memory": 3 * GiB, "disk": 50 * GiB, "root_disk": 20 * GiB,
        "arch": host_arch().name, "runtime": "docker", "accel": "auto", "image": "debian-13", "hostname": "qvm-dev",
        "mounts": (Mount(work, PurePosixPath("/work")),), "dns": ("1.1.1.1",), "env": {"A": "b"},
    }  # fmt: skip
    return Config(**values | changes)


def test_an_existing_instance_keeps_what_it_had(resolve: Resolve, work: Path, tmp_path: Path) -> None:
    stored = make_config(work)
    resolved = resolve({"cpus": "4"}, stored=stored, environ={"QVM_DEFAULT_RUNTIME": "none"}, cwd=tmp_path)
    assert describe_changes(stored, resolved.config) == ["cpus: 3 -> 4"]


def test_the_profile_file_says_what_holds_later_but_the_mounts_of_the_first_start_stay(
    resolve: Resolve, home: Path, work: Path, tmp_path: Path
) -> None:
    (home / "dev" / "qvm.yaml").write_text("cpus: 1\n")
    stored = make_config(work)
    config = resolve(stored=stored, cwd=tmp_path).config
    assert config.cpus == 1
    assert config.dns == ()  # the user took the line out of the file
    assert config.mounts == stored.mounts
    assert config.disk == 50 * GiB


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"image": "debian-12"}, "was made with debian-13"),
        ({"disk": "49"}, "--disk: 50 GiB cannot shrink to 49 GiB"),
        ({"root_disk": "10"}, "--root-disk: 20 GiB cannot shrink"),
    ],
)
def test_what_cannot_change_says_what_to_do(resolve: Resolve, work: Path, flags: dict[str, Any], words: str) -> None:
    [problem] = problems(lambda: resolve(flags, stored=make_config(work)))
    assert words in problem
    assert "`qvm delete dev -f" in problem


def test_what_cannot_change_counts_in_the_file_too_but_growing_is_fine(
    resolve: Resolve, home: Path, work: Path
) -> None:
    file = home / "dev" / "qvm.yaml"
    file.write_text("image: debian-12\ndisk: 60\n")
    [problem] = problems(lambda: resolve(stored=make_config(work)))
    assert problem.startswith(f"{file}:1:8: image: 'dev' was made with debian-13")
    file.write_text("disk: 60\n")
    assert resolve(stored=make_config(work)).config.disk == 60 * GiB
    assert resolve({"disk": "70"}, stored=make_config(work)).config.disk == 70 * GiB


def test_the_same_value_in_other_words_is_no_change(resolve: Resolve, work: Path) -> None:
    same = resolve({"arch": host_arch().debian, "runtime": "docker", "disk": "50GiB"}, stored=make_config(work))
    assert same.config.arch == host_arch().name


def test_more_cpus_than_the_host_has_is_a_note(resolve: Resolve) -> None:
    assert resolve({"cpus": "5"}).notes == ["5 CPUs are more than this host's 4: the VM will not be faster for it"]


def test_a_working_directory_that_cannot_be_mounted_is_left_out_with_a_note(resolve: Resolve) -> None:
    resolved = resolve(cwd=Path("/etc"))
    assert resolved.config.mounts == ()
    assert resolved.notes == [
        "the working directory is not mounted: /etc belongs to the guest's own system and cannot be a mount's target"
    ]
    assert resolve({"mounts": ["none"]}, cwd=Path("/etc")).notes == []


def test_changes_never_show_values_of_variables(work: Path) -> None:
    lines = describe_changes(make_config(work), make_config(work, env={"A": "b", "TOKEN": "secret"}))
    assert lines == ["env: A -> A, TOKEN"]


def test_the_runtime_switches_by_flag_and_file_but_not_by_the_environment(
    resolve: Resolve, home: Path, work: Path
) -> None:
    stored = make_config(work)
    assert resolve({"runtime": "containerd"}, stored=stored).config.runtime == "containerd"
    assert resolve(stored=stored, environ={"QVM_DEFAULT_RUNTIME": "none"}).config.runtime == "docker"
    (home / "dev" / "qvm.yaml").write_text("runtime: none\n")
    assert resolve(stored=stored).config.runtime == "none"
