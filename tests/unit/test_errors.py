"""The tree of errors: codes are unique and stable, and errors survive the way through JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvm import errors
from qvm.errors import ConfigError, NotReadyError, QvmError, error_from_dict
from qvm.process import CommandError


def all_classes() -> list[type[QvmError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, QvmError)]


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in all_classes()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("failed", 1), ("usage", 2), ("config", 2), ("no-such-instance", 3), ("host", 4), ("qemu-missing", 4),
        ("qemu-too-old", 4), ("accelerator", 4), ("no-space", 4), ("path-too-long", 4), ("port-taken", 4),
        ("image", 1), ("digest-mismatch", 1), ("lock-held", 1), ("instance-state", 1), ("qemu", 1), ("guest", 5),
        ("not-ready", 5), ("guest-command", 5), ("deadline", 1),
    ],
)  # fmt: skip
def test_codes_and_exit_codes_are_a_promise(code: str, exit_code: int) -> None:
    assert {cls.code: cls.exit_code for cls in all_classes()}[code] == exit_code


@pytest.mark.parametrize("cls", [cls for cls in all_classes() if cls not in (ConfigError, NotReadyError)])
def test_errors_survive_json(cls: type[QvmError]) -> None:
    error = cls("what", hint="mend", details="more\nlines", log_path=Path("/l"))
    back = error_from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(back) is cls
    assert back.to_dict() == error.to_dict()


@pytest.mark.parametrize("problems", [["one"], ["one", "two"]])
def test_problems_survive_json(problems: list[str]) -> None:
    back = error_from_dict(ConfigError(problems, hint="h").to_dict())
    assert isinstance(back, ConfigError)
    assert (back.problems, back.hint) == (problems, "h")


def test_requirements_survive_json() -> None:
    back = error_from_dict(NotReadyError("agent", "late", log_path=Path("/l")).to_dict())
    assert isinstance(back, NotReadyError)
    assert (back.requirement, back.log_path) == ("agent", Path("/l"))


def test_an_unknown_code_is_a_plain_error() -> None:
    back = error_from_dict({"code": "from-the-future", "message": "m", "hint": None})
    assert type(back) is QvmError
    assert back.message == "m"


def test_a_class_with_another_constructor_comes_back_as_its_parent() -> None:
    class OddError(errors.QemuError):
        def __init__(self, number: int) -> None:
            super().__init__(f"number {number}", hint="h")

    back = error_from_dict(OddError(7).to_dict())
    assert type(back) is errors.QemuError
    assert (back.message, back.hint) == ("number 7", "h")
    back = error_from_dict(CommandError(["/bin/false"], 1, "why").to_dict())
    assert (back.message, back.details) == ("false failed with exit code 1", "why")
