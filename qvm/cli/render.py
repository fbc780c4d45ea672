"""Results as text for people. Pure: result in, text out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvm.units import format_duration, format_size


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """`key  value` lines, aligned; the key is left out where it repeats; rows without a value are left out."""
    shown = [(key, value) for key, value in rows if value]
    width = max((len(key) for key, _ in shown), default=0)
    lines, last = [], None
    for key, value in shown:
        lines.append(f"  {'' if key == last else key:<{width}}  {value}")
        last = key
    return "\n".join(lines)


def render_state(status: Mapping[str, Any]) -> str:
    """"running for 3 min 05 s"."""
    state = str(status.get("state", "unknown"))
    uptime = status.get("uptime")
    return f"{state} for {format_duration(float(uptime))}" if uptime and state == "running" else state


def render_status(status: Mapping[str, Any]) -> str:
    """One instance, top down from what matters most."""
    rows: list[tuple[str, str]] = [("runtime", _runtime(status)), ("machine", _machine(status))]
    rows.append(("memory", _used(status, "memory")))
    rows.append(("disk", _used(status, "disk")))
    rows.append(("image", str(status.get("image", ""))))
    if status.get("ssh_port") and status.get("state") == "running":
        rows.append(("ssh", f"{status.get('user', '')}@127.0.0.1:{status['ssh_port']}"))
    rows += [("mount", _mount(mount)) for mount in status.get("mounts", ())]
    rows += [("socket", str(path)) for path in status.get("sockets", {}).values()]
    rows += [("variable", f"{name}={value}") for name, value in status.get("environment", {}).items()]
    rows += [("port", f"{name} at 127.0.0.1:{port}") for name, port in (status.get("ports") or {}).items()]
    rows += [("port", _forward(forward)) for forward in status.get("forwards", ())]
    if network := status.get("network"):
        rows.append(("address", f"{network['address']}, {network['address6']} ({network['interface']})"))
    rows += _names(status.get("dns") or {})
    rows.append(("emulates", ", ".join(status.get("binfmt") or ())))
    if status.get("state") != "running":
        waiting = status.get("requirements", {}).items()
        rows += [("waits for", f"{name} ({state})") for name, state in waiting if state != "done"]
    rows += [("error", str(status.get("error", ""))), ("hint", str(status.get("hint") or ""))]
    rows += [("note", str(note)) for note in status.get("notes", ())]
    return f"{status.get('profile', '?')} is {render_state(status)}\n{pairs(rows)}".rstrip()


def _names(dns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is special about names; the host's own are no news."""
    rows = [("search", " ".join(dns.get("search", ())))]
    rows += [("names", f"{domain} by {', '.join(servers)}") for domain, servers in dns.get("domains", {}).items()]
    rows += [("names", f"{name} is {address}") for name, address in dns.get("hosts", {}).items()
             if not name.endswith(".docker.internal") and name != "host.qvm.internal"]
    if dns and not dns.get("host_loopback", True):
        rows.append(("names", "services on the host's loopback cannot be reached"))
    return rows


def render_list(instances: Sequence[Mapping[str, Any]]) -> str:
    if not instances:
        return "There are no VMs; `qvm start` makes one."
    rows = [
        (
            str(item.get("profile", "?")), str(item.get("state", "unknown")), str(item.get("runtime", "")),
            str(item.get("arch", "")), str(item.get("accel", "")), str(item.get("cpus", "")),
            format_size(item["memory"]) if item.get("memory") else "",
            format_size(item["disk"]) if item.get("disk") else "",
        )
        for item in instances
    ]  # fmt: skip
    return table(("PROFILE", "STATE", "RUNTIME", "ARCH", "ACCEL", "CPUS", "MEMORY", "DISK"), rows)


def render_start(result: Any) -> str:
    """News of a start: what runs now and how to use it."""
    status = result.status
    if not result.changed:
        return f"{result.profile} is {status.get('state', 'running')} already"
    text = f"{result.profile} is {status.get('state', 'running')} after {format_duration(result.seconds)}"
    return f"{text}\n{pairs([('runtime', _runtime(status)), ('machine', _machine(status))])}".rstrip()


def render_stop(result: Any) -> str:
    if not result.changed:
        return f"{result.profile} is stopped already"
    return f"{result.profile} stopped after {format_duration(result.seconds)} ({result.how})"


def render_delete(result: Any) -> str:
    lines = [f"{result.profile} is deleted"]
    lines += [f"  kept {path}" for path in result.kept]
    if any(path.endswith(".qcow2") for path in result.kept):
        lines.append(f"  `qvm start {result.profile}` uses it again; `qvm delete {result.profile} --data` removes it")
    return "\n".join(lines)


def render_images(images: Sequence[Mapping[str, Any]]) -> str:
    """The catalogue and the cache; unknown fields are left to --json."""
    if not images:
        return "There are no images."
    rows = [
        (
            str(item.get("name", "?")), str(item.get("arch", "")), str(item.get("state", "")),
            str(item.get("id") or "")[:12], format_size(item["size"]) if item.get("size") else "",
            str(item.get("source", "")),
        )
        for item in images
    ]  # fmt: skip
    return table(("NAME", "ARCH", "STATE", "ID", "SIZE", "FROM"), rows)


def render_image(image: Mapping[str, Any]) -> str:
    return f"{image.get('name', '?')} ({image.get('arch', '?')}) is ready: {str(image.get('id', ''))[:12]}"


def render_warm_images(images: Sequence[Mapping[str, Any]]) -> str:
    if not images:
        return "There are no warm images; a start makes what it needs."
    rows = [
        (
            str(item["key"]), str(item["title"]), str(item["stage"]), format_size(item["size"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(item["last_used"])), "yes" if item["in_use"] else "",
        )
        for item in images
    ]  # fmt: skip
    return table(("KEY", "WHAT", "STAGE", "SIZE", "LAST USED", "IN USE"), rows)


def render_warm_image(item: Mapping[str, Any]) -> str:
    return f"warm image {item['key']} is ready: {item['title']}, {item['stage']} stage, {format_size(item['size'])}"


def render_warm_removed(images: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"removed {item['key']}: {item['title']}" for item in images) or "nothing to remove"


def render_checks(checks: Sequence[Any]) -> str:
    """The doctor's findings, each with what mends it."""
    marks = {True: "ok", False: "FAIL", None: "--"}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.ok]:<4}  {check.name}: {check.message}")
        if check.fix and check.ok is not True:
            lines.append(f"      mend: {check.fix}")
    return "\n".join(lines)


def render_version(version: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{key.replace('_', ' ')}: {value if value is not None else 'not installed'}" for key, value in version.items()
    )


def _runtime(status: Mapping[str, Any]) -> str:
    return str(status.get("runtime_version") or status.get("runtime") or "")


def _machine(status: Mapping[str, Any]) -> str:
    words = [str(status.get("arch", ""))]
    if status.get("accel"):
        words.append(str(status["accel"]))
    if status.get("cpus"):
        words.append(f"{status['cpus']} CPU{'s' if status['cpus'] != 1 else ''}")
    if status.get("memory"):
        words.append(format_size(status["memory"]))
    return ", ".join(word for word in words if word)


def _used(status: Mapping[str, Any], what: str) -> str:
    """"1.2 GiB of 4 GiB used"."""
    size, used = status.get(what), status.get(f"{what}_used")
    if not size:
        return ""
    return f"{format_size(used)} of {format_size(size)} used on the host" if used else format_size(size)


def _mount(mount: Mapping[str, Any]) -> str:
    where = "" if mount["source"] == mount["target"] else f" at {mount['target']}"
    words = [mount.get("type", ""), "" if mount.get("writable", True) else "read-only", mount.get("reason", "")]
    how = ", ".join(word for word in words if word)
    return f"{mount['source']}{where}{f' ({how})' if how else ''}"


def _forward(forward: Mapping[str, Any]) -> str:
    """"127.0.0.1:8080", where that is not said by it what it leads to, and what keeps it from working."""
    host, guest = str(forward["host"]), str(forward.get("guest", ""))
    text = host + ("/udp" if forward.get("protocol") == "udp" else "")
    if forward.get("path") == "reverse":
        text = f"{guest} in the VM leads to {host}"
    elif guest.rpartition(":")[2] != host.rpartition(":")[2]:
        text += f" leads to {guest}"
    if forward["state"] == "forwarding":
        return text
    reason = f": {forward['reason']}" if forward.get("reason") else ""
    return f"{text} ({forward['state']}{reason})"


def render_removed(removed: Any) -> str:
    rows = removed if isinstance(removed, list) else [removed]
    return "\n".join(f"removed {row.get('name', '?')} {str(row.get('id', ''))[:12]}".rstrip() for row in rows)
