"""The door to other programs, with real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qvm import process
from qvm.errors import DeadlineError, HostError
from qvm.process import CommandError, Identity
from qvm.wait import Deadline, wait_until


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_captures() -> None:
    done = process.run(python("import sys; sys.stderr.write('e'); print(sys.stdin.read())"), input=b"in")
    assert (done.returncode, done.text, done.stderr) == (0, "in\n", b"e")


def test_run_lays_env_over_the_own() -> None:
    done = process.run(python("import os; print(os.environ['A'], 'PATH' in os.environ)"), env={"A": "b"})
    assert done.text == "b True\n"


def test_a_failed_program_tells_its_last_words() -> None:
    with pytest.raises(CommandError, match="failed with exit code 3") as caught:
        process.run(python("import sys; sys.stderr.write('why\\n'); sys.exit(3)"))
    assert caught.value.details == "why"
    assert process.run(python("raise SystemExit(3)"), check=False).returncode == 3


def test_a_missing_program_is_a_host_error() -> None:
    for call in (process.run, process.call, lambda argv: process.stream(argv, print)):
        with pytest.raises(HostError, match="'no-such-program' is not installed"):
            call(["no-such-program"])


def test_a_slow_program_is_ended() -> None:
    with pytest.raises(DeadlineError):
        process.run(["sleep", "60"], timeout=0.05)


def test_stream_hands_over_lines_as_they_come(tmp_path: Path) -> None:
    lines: list[str] = []
    with (tmp_path / "log").open("wb") as log:
        code = "import sys; print('a'); sys.stdout.flush(); sys.stderr.write('b\\n')"
        process.stream(python(code), lines.append, log=log)
    assert lines == ["a", "b"]
    assert (tmp_path / "log").read_bytes() == b"a\nb\n"
    with pytest.raises(CommandError) as caught:
        process.stream(python("print('last words'); raise SystemExit(1)"), lines.append)
    assert caught.value.details == "last words"


def test_an_interrupted_stream_leaves_no_children() -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.stream(["sh", "-c", "sleep 60 & echo $!; wait"], interrupt)
    # The grandchild may be a zombie for a moment, until init reaps it.
    wait_until(lambda: process._observe(pids[0]) is None, Deadline(5))


def test_exit_codes_of_signals() -> None:
    assert process.call(["sh", "-c", "kill -TERM $$"]) == 128 + signal.SIGTERM
    assert process.call(["sh", "-c", "exit 7"]) == 7


def spawn(tmp_path: Path, marker: str) -> tuple[subprocess.Popen[bytes], Identity]:
    child = process.spawn_detached([*python("import time; print('up', flush=True); time.sleep(60)"), marker],
                                   log=tmp_path / "log")
    return child, process.identify(child.pid, marker)


def test_a_detached_process_is_recognised_again(tmp_path: Path) -> None:
    child, identity = spawn(tmp_path, "marker-1")
    try:
        wait_until(lambda: (tmp_path / "log").read_text() == "up\n", Deadline(10))
        assert os.getsid(child.pid) == child.pid
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
        wait_until(lambda: process.is_alive(identity), Deadline(5))
        assert process.is_alive(Identity.from_dict(identity.to_dict()))
        assert not process.is_alive(replace(identity, started=identity.started - 1)), "a reused pid is another process"
        assert not process.is_alive(replace(identity, marker="marker-2")), "another program with that pid"
        process.kill(replace(identity, marker="marker-2"), signal.SIGKILL)
        assert process.is_alive(identity)
    finally:
        process.kill(identity, signal.SIGTERM)
        assert process.wait_gone(identity, Deadline(10)), "a zombie counts as gone"
        child.wait()


def test_a_gone_process_has_no_identity() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(HostError, match="ended at once"):
        process.identify(child.pid, "true")


def test_end_session_ends_what_ignores_sigterm() -> None:
    child = subprocess.Popen(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"],
                             stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    began = time.monotonic()
    process.end_session(child, grace=0.2)
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 5


def test_programs_are_found_beside_path(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert process.find_program("tool", tmp_path) == tool
    assert process.find_program("tool") is None
