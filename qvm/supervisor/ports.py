"""The control socket's `ports`: what is forwarded, and other rules while the machine runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qvm.config.ports import parse_rule
from qvm.supervisor.control import Handler, Send
from qvm.supervisor.core import Supervisor


def port_handlers(supervisor: Supervisor) -> dict[str, Handler]:
    async def ports(request: dict[str, Any], send: Send) -> dict[str, Any]:
        """`rules`, where they are given, take the place of all there were; whoever asks has recorded them."""
        link = supervisor.require_link()
        if "rules" in request:
            rules = tuple(parse_rule(str(text)) for text in request["rules"])
            record = supervisor.record
            supervisor.record = replace(record, config=replace(record.config, port_forwards=rules))
            link.set_rules(rules)
        return {
            "rules": [str(rule) for rule in supervisor.record.config.port_forwards],
            "forwards": link.forwards(),
            "events": link.forward_events(),
        }

    return {"ports": ports}
