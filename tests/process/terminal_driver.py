"""To be run on a terminal or on pipes: `FOLDER ARGV...` runs ARGV behind a real agent, attached to our streams."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from agent_process import running

from qvm.guest.terminal import attach, is_terminal, on_terminal, terminal_size

STUCK = 99


async def drive(folder: Path, argv: list[str]) -> int:
    async with running(folder) as (_, channel):
        tty = is_terminal()
        process = channel.start_process(argv, stdin=True, tty=terminal_size() if tty else None, cwd=str(folder))
        with on_terminal(process, tty=tty):
            code = await attach(process, tty=tty, on_stuck=lambda: os._exit(STUCK))
        process.close()
        return code


if __name__ == "__main__":
    sys.exit(asyncio.run(drive(Path(sys.argv[1]), sys.argv[2:])))
