"""The host's registry logins, lent to a client program in the guest for as long as it runs.

Format of docker's config.json: docs.docker.com, "docker login"; of what helpers say: docker/docker-credential-helpers.
"""

from __future__ import annotations

import json
import secrets
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvm.errors import QvmError
from qvm.log import get_logger
from qvm.process import find_program, run

log = get_logger(__name__)

HELPER_TIMEOUT = 30.0
"""Seconds; a helper may ask the user to unlock a keychain."""
# Words of nerdctl and podman after which registries are asked for something.
_REACHING = frozenset({"pull", "push", "run", "create", "build", "compose", "image", "manifest", "container", "search"})

# The guest's own logins stay in force where the host has none for a registry.
_STORE = """
set -e
umask 077
mkdir -p "$1"
cat >"$1/config.json"
[ -e /root/.docker/config.json ] || exit 0
exec python3 -I -S - "$1/config.json" /root/.docker/config.json <<'PYTHON'
import json, sys
lent, own = (json.load(open(path)) for path in sys.argv[1:])
own["auths"] = {**own.get("auths", {}), **lent["auths"]}
json.dump(own, open(sys.argv[1], "w"))
PYTHON
"""
_LEND = 'folder=$1; shift; trap \'rm -rf "$folder"\' EXIT; trap "exit 129" HUP; trap "exit 143" TERM; "$@"'


def lend(
    argv: Sequence[str], prefix: Sequence[str], variable: str, control_socket: Path, environ: Mapping[str, str]
) -> list[str]:
    """The command line of a client (`prefix`, `argv`) that has the host's logins; without, where it needs none.

    They go to a folder in the guest's memory that only root reads, named by `variable` (`NAME={folder}`), and are
    removed by the command line itself, however it ends.
    """
    plain = [*prefix, *argv]
    if not _REACHING.intersection(argv):
        return plain
    logins = read_logins(environ, argv)
    if not logins:
        return plain
    from qvm.supervisor.client import call

    folder = f"/run/qvm-clients/{secrets.token_hex(8)}"
    document = json.dumps({"auths": logins}).encode()
    stored = call(control_socket, "exec", argv=["sh", "-c", _STORE, "store", folder], timeout=60.0,
                  input=b64encode(document).decode())
    if stored["exit_code"] != 0:
        log.warning("the host's logins could not be lent: %s", stored["stderr"].strip())
        return plain
    program = prefix[1:] if prefix[0] == "sudo" else prefix
    return ["sudo", "sh", "-c", _LEND, "lend", folder, "env", variable.format(folder=folder), *program, *argv]


def read_logins(environ: Mapping[str, str], argv: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Registry -> what docker's config.json has under `auths`, helpers asked. Those that fail are left out, and logged.

    Where `argv` names images, helpers are asked for those images' registries alone: each may be a question to the user.
    """
    explicit = environ.get("DOCKER_CONFIG")
    folder = Path(explicit) if explicit else Path(environ.get("HOME") or Path.home()) / ".docker"
    try:
        config = json.loads((folder / "config.json").read_bytes())
        said: dict[str, Any] = {**config.get("auths", {})}
        helpers: dict[str, str] = {**config.get("credHelpers", {})}
        store = config.get("credsStore")
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    logins = {
        str(name): dict(entry) for name, entry in said.items()
        if isinstance(entry, dict) and (entry.get("auth") or entry.get("identitytoken"))
    }
    wanted = find_registries(argv)
    if store:
        helpers = {**dict.fromkeys(_list_store(store), store), **helpers}
    for name, helper in helpers.items():
        if wanted and _plain(name) not in wanted:
            continue
        entry = _ask_helper(helper, name)
        if entry is not None:
            logins[name] = entry
    return logins


def find_registries(argv: Sequence[str]) -> set[str]:
    """The registries of words that look like images; empty where none does (a build file or compose may name any)."""
    if {"build", "compose"}.intersection(argv):
        return set()
    found = set()
    for word in argv:
        first, slash, _ = word.partition("/")
        if slash and not word.startswith(("-", ".", "/")) and (set(first) & {".", ":"} or first == "localhost"):
            found.add(first)
    return found


def _plain(server: str) -> str:
    """The host of a server's address as config files have it."""
    return server.partition("://")[2].partition("/")[0] if "://" in server else server.partition("/")[0]


def _list_store(store: str) -> list[str]:
    listed = _call_helper(store, "list", b"")
    return [str(name) for name in listed] if isinstance(listed, dict) else []


def _ask_helper(helper: str, server: str) -> dict[str, str] | None:
    answer = _call_helper(helper, "get", server.encode())
    if not isinstance(answer, dict) or not answer.get("Secret"):
        return None
    user, secret = str(answer.get("Username", "")), str(answer["Secret"])
    if user == "<token>":
        return {"identitytoken": secret}
    return {"auth": b64encode(f"{user}:{secret}".encode()).decode()}


def _call_helper(helper: str, verb: str, words: bytes) -> Any:
    program = find_program(f"docker-credential-{helper}")
    if program is None:
        log.warning("the credential helper docker-credential-%s is not installed", helper)
        return None
    try:
        return json.loads(run([str(program), verb], input=words, timeout=HELPER_TIMEOUT).stdout)
    except (QvmError, ValueError) as error:
        log.warning("docker-credential-%s %s: %s", helper, verb, error)
        return None
