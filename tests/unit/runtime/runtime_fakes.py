"""A guest that records what is asked of it and answers from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from qvm.errors import DeadlineError, GuestCommandError
from qvm.runtime.base import ExecResult, RuntimeContext


@dataclass
class FakeGuest:
    """`answers`: a word of the argv -> its output, or an exit code, or "late" for a deadline."""

    answers: dict[str, bytes | int | str] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    envs: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tracked: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> file and process."""
    stale_ids: tuple[str, ...] = ()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> ExecResult:
        self.commands.append(list(argv))
        self.envs.append(dict(env or {}))
        answer = next((answer for word, answer in self.answers.items() if any(word in part for part in argv)), b"")
        if answer == "late":
            raise DeadlineError("the command took too long")
        code = answer if isinstance(answer, int) else 0
        if code and check:
            raise GuestCommandError(f"exit code {code}", details="E: Unable to locate package")
        return ExecResult(code, answer if isinstance(answer, bytes) else b"", b"failed words" if code else b"")

    async def write_file(self, path: PurePosixPath, data: bytes, *, mode: int = 0o644) -> bool:
        changed = self.files.get(str(path)) != data
        self.files[str(path)] = data
        return changed

    async def track_id(self, name: str, *, file: PurePosixPath, process: str) -> int:
        self.tracked[name] = (str(file), process)
        return 1

    def scripts(self) -> str:
        """Everything that was run, for looking into."""
        return "\n".join(" ".join(command) for command in self.commands)


def make_context(tmp_path: Path, profile: str = "dev", **env: str) -> RuntimeContext:
    return RuntimeContext(
        profile=profile,
        folder=tmp_path / "qvm" / profile,
        state_folder=tmp_path / "qvm" / "_instances" / profile / "runtime",
        user="ann",
        env={"HOME": str(tmp_path), **env},
    )
