"""What the command line says and exits with, over fake commands: the verbs' work is tested where it is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qvm.cli.main import VERBS, run
from qvm.errors import (
    ConfigError,
    GuestError,
    HostError,
    NoSuchInstanceError,
    NotReadyError,
    QvmError,
)


@dataclass(frozen=True)
class Result:
    profile: str = "dev"
    changed: bool = True
    status: Any = None
    notes: tuple[str, ...] = ()
    seconds: float = 1.5
    how: str = "powerdown"
    removed: tuple[str, ...] = ("/h/_instances/dev",)
    kept: tuple[str, ...] = ("/h/_data/dev.qcow2",)


class Fakes:
    """Stands in for `qvm.commands.*`: records calls, answers or raises what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._monkeypatch = monkeypatch

    def set(self, module: str, function: str, answer: Any) -> None:
        """`qvm.commands.<module>.<function>` gives `answer`, raises it, or calls it."""

        def fake(*args: Any, **options: Any) -> Any:
            options.pop("progress", None)
            options.pop("waiting", None)
            self.calls.append((function, args, options))
            if isinstance(answer, BaseException):
                raise answer
            return answer() if callable(answer) else answer

        name = f"qvm.commands.{module}"
        stand_in = sys.modules.get(name)
        if not getattr(stand_in, "fake", False):
            stand_in = ModuleType(name)
            stand_in.fake = True  # type: ignore[attr-defined]
            self._monkeypatch.setitem(sys.modules, name, stand_in)
        setattr(stand_in, function, fake)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fakes]:
    for name in ("QVM_PROFILE", "QVM_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # No supervisor begins to load: nobody would use it.
    monkeypatch.setattr("qvm.supervisor.prelaunch.spawn_detached", lambda *_, **__: SimpleNamespace(stdin=BytesIO()))
    yield Fakes(monkeypatch)


Capture = pytest.CaptureFixture[str]


# --- the JSON contract ---


def test_a_result_is_an_envelope(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("status", "status", {"profile": "dev", "state": "running", "folder": Path("/x")})
    assert run(["status", "dev", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ok": True, "result": {"profile": "dev", "state": "running", "folder": "/x"},
    }  # fmt: skip


def test_a_dataclass_is_an_object(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("stop", "stop", Result())
    assert run(["--json", "stop", "dev"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert answer["result"]["changed"] is True


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (QvmError("m", hint="h", details="d", log_path=Path("/l")), "failed", 1),
        (ConfigError(["cpus: bad", "memory: bad"]), "config", 2),
        (NoSuchInstanceError("m"), "no-such-instance", 3),
        (HostError("m"), "host", 4),
        (GuestError("m"), "guest", 5),
        (NotReadyError("agent", "m"), "not-ready", 5),
    ],
)
def test_an_error_is_an_envelope(fakes: Fakes, capsys: Capture, error: QvmError, code: str, exit_code: int) -> None:
    fakes.set("status", "status", error)
    assert run(["status", "--json"]) == exit_code
    captured = capsys.readouterr()
    assert captured.err == ""
    answer = json.loads(captured.out)
    assert answer["ok"] is False
    assert answer["error"]["code"] == code
    assert {"code", "message", "hint", "details", "log_path"} <= set(answer["error"])
    assert set(answer["error"]) <= {"code", "message", "hint", "details", "log_path", "requirement"}


def test_usage_errors_are_json_too_where_json_was_asked_for(fakes: Fakes, capsys: Capture) -> None:
    assert run(["status", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_a_guests_own_json_flag_is_not_ours(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("ssh", "run_client", QvmError("no"))
    assert run(["nerdctl", "ps", "--json"]) == 1
    assert capsys.readouterr().err == "qvm: no\n"


# --- errors as text ---


def test_an_error_as_text(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("stop", "stop", QvmError("it broke", hint="mend it", details="one\ntwo", log_path=Path("/l")))
    assert run(["stop"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "qvm: it broke\n    one\n    two\nhint: mend it\nlog: /l\n"


def test_an_interrupt(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("stop", "stop", KeyboardInterrupt())
    assert run(["stop"]) == 130
    assert capsys.readouterr().err == "qvm: interrupted\n"


def test_a_bug_shows_its_traceback_only_where_asked_for(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("stop", "stop", ZeroDivisionError("oops"))
    assert run(["stop", "dev"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("qvm: ZeroDivisionError: oops\nhint: this is a bug")
    assert run(["stop", "dev", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- usage ---


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["strat"], "unknown verb 'strat'; did you mean start?"),
        (["stat"], "did you mean status?"),
        (["start", "--cpu", "2"], "unknown option --cpu; did you mean --cpus?"),
        (["start", "--zzz"], "unknown option --zzz"),
        (["stop", "--forse"], "did you mean --force?"),
        (["status", "a", "b"], "unexpected extra argument"),
        (["start", "--cpus"], "requires an argument"),
        (["image"], "missing command"),
        (["image", "lst"], "unknown verb 'lst'; did you mean list?"),
        (["completion", "bsh"], "did you mean bash?"),
        (["status", "Bad Name"], "'Bad Name' cannot name a profile"),
        (["-p", "a", "status", "b"], "two profiles are named: 'a' and 'b'"),
        (["status", "-p", "a", "b"], "two profiles are named"),
        (["ssh", "dev", "uname"], "'uname' is one word too many"),
        (["logs", "a", "b"], "'b' is not a log"),
        (["delete", "dev"], "delete asks first"),
        (["delete", "--all", "dev", "-f"], "exclude each other"),
    ],
)
def test_bad_usage(fakes: Fakes, capsys: Capture, argv: list[str], words: str) -> None:
    assert run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qvm: ")
    assert words in captured.err
    assert fakes.calls == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(capsys: Capture, verb: str) -> None:
    assert run([verb, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out


def test_help_of_all(capsys: Capture) -> None:
    assert run([]) == 0
    assert "ssh (exec, x)" in capsys.readouterr().out
    assert run(["-h"]) == 0


# --- profiles ---


@pytest.mark.parametrize(
    ("argv", "environ", "profile"),
    [
        (["status"], {}, "default"),
        (["status"], {"QVM_DEFAULT_PROFILE": "b"}, "b"),
        (["status"], {"QVM_DEFAULT_PROFILE": "b", "QVM_PROFILE": "a"}, "a"),
        (["status", "dev"], {"QVM_PROFILE": "a"}, "dev"),
        (["status", "-p", "dev"], {}, "dev"),
        (["-p", "dev", "status"], {}, "dev"),
        (["-p", "dev", "status", "dev", "--profile", "dev"], {}, "dev"),
    ],
)
def test_which_profile(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, argv: list[str], environ: dict[str, str], profile: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    fakes.set("status", "status", {})
    assert run(argv) == 0
    assert fakes.calls == [("status", (profile,), {})]


# --- the verbs hand over what was typed ---


def test_start(fakes: Fakes, capsys: Capture, tmp_path: Path) -> None:
    fakes.set("start", "start", Result(status={"state": "running", "runtime": "docker", "arch": "x86_64", "cpus": 2}))
    argv = ["start", "dev", "-c", "4", "--mount", "a:/b", "--mount", "c", "--no-activate", "--cold", "--env", "A=b"]
    assert run(argv) == 0
    flags = {"cpus": "4", "mounts": ("a:/b", "c"), "activate": False, "env": ("A=b",)}
    assert fakes.calls == [("start", ("dev", flags), {"cwd": tmp_path, "cold": True})]
    assert capsys.readouterr().out.startswith("dev is running after 1.5 s\n")


def test_quiet_start_says_nothing_and_quiet_status_still_answers(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("start", "start", Result(status={"state": "running"}))
    fakes.set("status", "status", {"profile": "dev", "state": "stopped"})
    assert run(["start", "dev", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["status", "dev", "-q"]) == 0
    assert capsys.readouterr().out.startswith("dev is stopped")


def test_restart(fakes: Fakes, tmp_path: Path) -> None:
    fakes.set("restart", "restart", Result(status={}))
    assert run(["restart", "dev", "-f", "--memory", "4"]) == 0
    assert fakes.calls == [("restart", ("dev", {"memory": "4"}), {"cwd": tmp_path, "force": True})]


def test_delete(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("delete", "delete", Result())
    assert run(["delete", "dev", "-f", "--data"]) == 0
    assert fakes.calls == [("delete", ("dev",), {"data": True, "force": True})]
    assert "kept /h/_data/dev.qcow2" in capsys.readouterr().out


def test_delete_all_goes_on_after_a_failure(
    fakes: Fakes, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvm.cli.life._all_profiles", lambda: ["a", "b"])
    fakes.set("delete", "delete", GuestError("stuck"))
    assert run(["delete", "--all", "-f"]) == 1
    assert [call[1] for call in fakes.calls] == [("a",), ("b",)]
    assert "2 VMs could not be deleted" in capsys.readouterr().err


def test_ssh_passes_words_and_the_exit_code(fakes: Fakes, tmp_path: Path) -> None:
    fakes.set("ssh", "ssh", 42)
    assert run(["ssh", "dev", "-A", "--", "ls", "-l", "--", "x", "--json"]) == 42
    assert run(["x", "-p", "dev"]) == 42
    assert run(["exec", "-T", "--", "true"]) == 42
    assert fakes.calls == [
        ("ssh", ("dev", ["ls", "-l", "--", "x", "--json"]), {"cwd": tmp_path, "agent": True, "tty": None}),
        ("ssh", ("dev", []), {"cwd": tmp_path, "agent": False, "tty": None}),
        ("ssh", ("default", ["true"]), {"cwd": tmp_path, "agent": False, "tty": False}),
    ]


@pytest.mark.parametrize(
    ("argv", "profile", "words"),
    [
        (["nerdctl", "run", "--rm", "-p", "8080:80", "IMAGE"], "default", ["run", "--rm", "-p", "8080:80", "IMAGE"]),
        (["nerdctl", "-p", "dev", "--", "ps", "-a"], "dev", ["ps", "-a"]),
        (["n", "-p", "dev", "ps", "-v"], "dev", ["ps", "-v"]),
        (["nerdctl", "--", "-p", "x"], "default", ["-p", "x"]),
        (["-p", "dev", "nerdctl", "--namespace", "k8s.io", "ps"], "dev", ["--namespace", "k8s.io", "ps"]),
        (["nerdctl", "exec", "c", "--", "sh"], "default", ["exec", "c", "--", "sh"]),
        (["nerdctl", "run", "--help"], "default", ["run", "--help"]),
    ],
)
def test_nerdctl(fakes: Fakes, tmp_path: Path, argv: list[str], profile: str, words: list[str]) -> None:
    fakes.set("ssh", "run_client", 3)
    assert run(argv) == 3
    assert fakes.calls == [("run_client", (profile, "nerdctl", words), {"cwd": tmp_path})]


@pytest.mark.parametrize(
    ("argv", "profile", "kind"),
    [
        (["logs"], "default", "serial"),
        (["logs", "dev"], "dev", "serial"),
        (["logs", "boot"], "default", "boot"),
        (["logs", "dev", "supervisor"], "dev", "supervisor"),
        (["logs", "supervisor", "-p", "dev"], "dev", "supervisor"),
    ],
)
def test_logs(fakes: Fakes, capsys: Capture, argv: list[str], profile: str, kind: str) -> None:
    fakes.set("logs", "logs", lambda: iter(["one", "two"]))
    assert run([*argv, "--lines", "5"]) == 0
    assert fakes.calls == [("logs", (profile, kind), {"follow": False, "lines": 5})]
    assert capsys.readouterr().out == "one\ntwo\n"


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool | None
    message: str
    fix: str | None = None


def test_doctor_fails_where_something_is_missing(fakes: Fakes, capsys: Capture) -> None:
    fakes.set("doctor", "doctor", [Check("qemu", True, "7.2"), Check("kvm", None, "unusable", "nothing")])
    assert run(["doctor"]) == 0
    fakes.set("doctor", "doctor", [Check("qemu", False, "missing", "apt-get install qemu-system-x86")])
    assert run(["doctor", "--json"]) == 4
    assert run(["doctor"]) == 4
    assert "mend: apt-get install qemu-system-x86" in capsys.readouterr().out


def test_doctor_mends_what_fails_and_looks_again(fakes: Fakes) -> None:
    missing = Check("qemu", False, "missing", "sudo apt install qemu-system-riscv")
    fakes.set("doctor", "doctor", [missing])
    fakes.set("doctor", "mend", [missing])
    assert run(["doctor", "-a", "riscv64", "--fix"]) == 4
    assert [name for name, _, _ in fakes.calls] == ["doctor", "mend", "doctor"]
    assert fakes.calls[0][2] == fakes.calls[2][2] == {"arch_name": "riscv64"}
    assert fakes.calls[1][1][0] == [missing]


def test_image_verbs(fakes: Fakes) -> None:
    fakes.set("image", "list_images", [])
    fakes.set("image", "build", {"name": "debian-13"})
    fakes.set("image", "pull", {"name": "debian-13"})
    fakes.set("image", "remove", [{"name": "debian-13", "id": "abc"}])
    for argv in (["list"], ["ls"], ["build", "--force"], ["pull", "alpine-3", "-a", "aarch64"], ["rm", "abc"]):
        assert run(["image", *argv]) == 0
    assert fakes.calls[2:] == [
        ("build", ("debian-13", None), {"force": True}),
        ("pull", ("alpine-3", "aarch64"), {}),
        ("remove", ("abc",), {}),
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish", "bash"])
def test_completion_scripts(capsys: Capture, shell: str) -> None:
    assert run(["completion", shell]) == 0
    assert "_QVM_COMPLETE" in capsys.readouterr().out


Complete = Callable[..., list[str]]


@pytest.fixture
def complete(fakes: Fakes) -> Complete:
    from click.shell_completion import ShellComplete

    from qvm.cli.main import root

    def ask(*words: str) -> list[str]:
        shell = ShellComplete(root, {}, "qvm", "_QVM_COMPLETE")
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    return ask


def test_completion_of_verbs_flags_profiles_runtimes_and_images(
    complete: Complete, fakes: Fakes, tmp_path: Path
) -> None:
    (tmp_path / "home" / "dev").mkdir(parents=True)
    (tmp_path / "home" / "dev" / "qvm.yaml").write_text("")
    fakes.set("image", "list_images", [{"name": "debian-13"}, {"name": "alpine-3"}])
    assert complete("st") == ["start", "stop", "status"]
    assert "--cpus" in complete("start", "--")
    assert complete("status", "") == ["dev"]
    assert complete("-p", "d") == ["dev"]
    assert complete("ssh", "") == ["dev"]
    assert complete("start", "--runtime", "d") == ["docker"]
    assert complete("start", "--accel", "") == ["auto", "kvm", "hvf", "tcg"]
    assert complete("start", "--image", "deb") == ["debian-13"]
    assert complete("image", "rm", "al") == ["alpine-3"]
    assert complete("logs", "dev", "s") == ["serial", "supervisor"]
