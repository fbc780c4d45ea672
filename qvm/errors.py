"""Every error qvm raises on purpose, as one tree.

    QvmError                      exit 1   something failed
    ├── UsageError                exit 2   the command line or the profile file is wrong
    │   └── ConfigError           exit 2   one or more problems in settings, all listed
    ├── NoSuchInstanceError       exit 3
    ├── HostError                 exit 4   the host lacks something; the hint names what mends it
    │   ├── QemuMissingError
    │   ├── QemuTooOldError
    │   ├── AcceleratorError
    │   ├── NoSpaceError
    │   ├── PathTooLongError
    │   └── PortTakenError
    ├── ImageError                exit 1   download, digest, build
    │   └── DigestMismatchError
    ├── LockHeldError             exit 1   another command works on the same thing
    ├── InstanceStateError        exit 1   the instance is not in the state the command needs
    ├── QemuError                 exit 1   QEMU refused, died or stopped answering
    ├── GuestError                exit 5   the guest did not do what it should
    │   ├── NotReadyError                  a named requirement was not met in time
    │   └── GuestCommandError              a command in the guest failed
    └── DeadlineError             exit 1   something took longer than it was given

`code` is the stable name programs may match on (it is in `--json` output); `exit_code` is what the CLI exits with.
Library code raises these and never exits or prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar


class QvmError(Exception):
    """Base of all errors: one sentence, how to mend it, what is known beyond that, and where to read more."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        details: str | None = None,
        log_path: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
        self.log_path = log_path

    def to_dict(self) -> dict[str, Any]:
        """The form that crosses the control socket and appears in `--json` output."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
            "log_path": str(self.log_path) if self.log_path else None,
        }


class UsageError(QvmError):
    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """Settings are wrong. `problems` holds one line each, with the field or `file:line:column` in front."""

    code = "config"

    def __init__(self, problems: list[str], *, hint: str | None = None) -> None:
        self.problems = list(problems)
        message = self.problems[0] if len(self.problems) == 1 else f"{len(self.problems)} problems in the settings"
        details = None if len(self.problems) == 1 else "\n".join(self.problems)
        super().__init__(message, hint=hint, details=details)


class NoSuchInstanceError(QvmError):
    code = "no-such-instance"
    exit_code = 3


class HostError(QvmError):
    code = "host"
    exit_code = 4


class QemuMissingError(HostError):
    code = "qemu-missing"


class QemuTooOldError(HostError):
    code = "qemu-too-old"


class AcceleratorError(HostError):
    code = "accelerator"


class NoSpaceError(HostError):
    code = "no-space"


class PathTooLongError(HostError):
    code = "path-too-long"


class PortTakenError(HostError):
    code = "port-taken"


class ImageError(QvmError):
    code = "image"


class DigestMismatchError(ImageError):
    code = "digest-mismatch"


class LockHeldError(QvmError):
    code = "lock-held"


class InstanceStateError(QvmError):
    code = "instance-state"


class QemuError(QvmError):
    code = "qemu"


class GuestError(QvmError):
    code = "guest"
    exit_code = 5


class NotReadyError(GuestError):
    """A readiness requirement failed; `requirement` is its name."""

    code = "not-ready"

    def __init__(self, requirement: str, message: str, *, hint: str | None = None, details: str | None = None,
                 log_path: Path | None = None) -> None:
        super().__init__(message, hint=hint, details=details, log_path=log_path)
        self.requirement = requirement

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"requirement": self.requirement}


class GuestCommandError(GuestError):
    code = "guest-command"


class DeadlineError(QvmError):
    code = "deadline"


def _subclasses(cls: type[QvmError]) -> list[type[QvmError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _subclasses(child))]


def error_from_dict(data: dict[str, Any]) -> QvmError:
    """Rebuild an error that crossed the control socket; an unknown code becomes a plain `QvmError`."""
    # A class without a code of its own shares its parent's, which then stands for both: the first one counts.
    by_code: dict[str, type[QvmError]] = {}
    for known in _subclasses(QvmError):
        by_code.setdefault(known.code, known)
    cls = by_code.get(str(data.get("code")), QvmError)
    log_path = Path(data["log_path"]) if data.get("log_path") else None
    message, hint, details = str(data.get("message", "unknown error")), data.get("hint"), data.get("details")
    if issubclass(cls, ConfigError):
        return ConfigError(details.splitlines() if details else [message], hint=hint)
    if issubclass(cls, NotReadyError):
        return NotReadyError(str(data.get("requirement", "?")), message, hint=hint, details=details,
                             log_path=log_path)
    # What a constructor of another shape wants (a command's argv, say) did not cross; the nearest plain parent will do.
    while "__init__" in vars(cls) and cls is not QvmError:
        cls = next(base for base in cls.__bases__ if issubclass(base, QvmError))
    return cls(message, hint=hint, details=details, log_path=log_path)
