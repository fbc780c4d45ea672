"""A program streamed by a background thread ends with us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qvm.wait import Deadline, wait_until

PROGRAM = """
import sys, threading, time
from qvm import process
def work():
    process.stream(["sh", "-c", "echo $$; exec sleep 300"], lambda line: print(line, flush=True))
threading.Thread(target=work, daemon=True).start()
time.sleep(1)
"""


def test_streamed_program_ends_with_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    pid = int(done.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), Deadline(5))
