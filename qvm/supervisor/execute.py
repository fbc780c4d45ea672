"""A command in the guest for a program on the host, through the control socket: its output streamed or collected."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

from qvm.guest.channel import AgentChannel
from qvm.supervisor.control import Send


async def execute(channel: AgentChannel, request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Run `argv` to its end. Of the request: cwd, env, user, input (base64), exec_timeout (s; null: none), stream.

    With `stream` the output comes as events {"event": "output", "out"|"err": base64} and is not collected. A client
    that goes away ends the command as soon as there is something to tell it.
    """
    stream = bool(request.get("stream"))
    timeout = request.get("exec_timeout", 60.0)
    process = channel.start_process(
        [str(word) for word in request["argv"]], input=b64decode(request.get("input") or ""),
        env=request.get("env"), cwd=request.get("cwd"), user=request.get("user"),
        timeout=None if timeout is None else float(timeout),
    )  # fmt: skip
    collected: dict[str, list[bytes]] = {"out": [], "err": []}
    try:
        async for name, data in process:
            if stream:
                await send({"event": "output", name: b64encode(data).decode()})
            else:
                collected[name].append(data)
        code = await process.wait()
    finally:
        process.close()
    return {
        "exit_code": code, "timed_out": process.timed_out,
        "stdout": b"".join(collected["out"]).decode(errors="replace"),
        "stderr": b"".join(collected["err"]).decode(errors="replace"),
    }  # fmt: skip
