"""Guest work that runtimes have in common: packages of the distribution, and services under systemd or OpenRC.

Each call is one `exec`: under software emulation a round trip costs tens of milliseconds and every program that a
script starts ten or more, so scripts use the shell's own commands where they can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qvm.errors import DeadlineError, GuestCommandError, GuestError
from qvm.runtime.base import Guest, Needs

INSTALL_TIMEOUT = 1800.0
LOOK_TIMEOUT = 300.0
"""Seconds. Loading modules takes one, but the rest of a foreign image's boot may go on beside it."""
STOP_TIMEOUT = 60.0
PATIENCE = 5.0
"""Seconds one call of `wait_for_services` may take."""

_INSTALL = """
set -e
if command -v apt-get; then
    export DEBIAN_FRONTEND=noninteractive
    # A cloud image's own updates may be at work, and a mirror may stumble.
    set -- -q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0
    # An update that fails ends here, not at a package that an old list names.
    apt-get "$@" -o APT::Update::Error-Mode=any update
    apt-get "$@" install -y --no-install-recommends $QVM_APT
elif command -v apk; then apk add --update-cache $QVM_APK
elif command -v dnf; then dnf install -y $QVM_DNF
else echo "none of apt-get, apk and dnf is there" >&2; exit 1
fi
"""

_LOOK = """
for program in $QVM_PROGRAMS; do command -v "$program" >/dev/null || { echo missing; break; }; done
for module; do [ -e "/sys/module/$module" ] || modprobe "$module" || exit 1; done
"""

_VERSIONS = """
if command -v dpkg-query >/dev/null; then dpkg-query -W -f '${Package} ${Version}\\n' $QVM_APT 2>/dev/null
elif command -v apk >/dev/null; then
    for name in $QVM_APK; do apk list -I "$name" 2>/dev/null | sed "s/^$name-\\([^ ]*\\).*/$name \\1/"; done
elif command -v rpm >/dev/null; then rpm -q --qf '%{NAME} %{VERSION}-%{RELEASE}\\n' $QVM_DNF
fi
exit 0
"""

# A mirror that cannot be reached is only a warning to `apt-get update` unless it is told otherwise.
_UPGRADE = """
set -e
if command -v apt-get; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o APT::Update::Error-Mode=any -o Acquire::Retries=1 update
    apt-get -q -o Dpkg::Options::=--force-confold install -y --no-install-recommends --only-upgrade $QVM_APT
elif command -v apk; then apk update; apk add --upgrade $QVM_APK
elif command -v dnf; then dnf upgrade -y $QVM_DNF
else echo "none of apt-get, apk and dnf is there" >&2; exit 1
fi
"""

# Every script gets the systemd names as arguments and the OpenRC names in QVM_RC.
_SYSTEMD = "[ -d /run/systemd/system ]"

_START = f"""
if {_SYSTEMD}; then exec systemctl start --no-block "$@"; fi
for service in $QVM_RC; do rc-service "$service" --ifnotstarted start; done
"""

_RESTART = f"""
if {_SYSTEMD}; then exec systemctl restart --no-block "$@"; fi
for service in $QVM_RC; do rc-service "$service" restart; done
"""

_WAIT = f"""
if {_SYSTEMD}; then systemctl start "$@" || exit 3
else for service in $QVM_RC; do rc-service "$service" --ifnotstarted start || exit 3; done
fi
for socket in $QVM_SOCKETS; do until [ -S "$socket" ]; do sleep 0.05; done; done
"""

_REPORT = f"""
if {_SYSTEMD}; then
    # One that systemd is about to start again has not failed for good, but it is the one to tell of.
    for service; do systemctl is-active --quiet "$service" || journalctl -b -u "$service" -n 15 --no-pager -o cat; done
else for service in $QVM_RC; do tail -n 15 "/var/log/$service.log" 2>/dev/null; done
fi
exit 0
"""

_STOP = f"""
if {_SYSTEMD}; then exec systemctl stop "$@"; fi
for service in $QVM_RC; do rc-service "$service" --ifstarted stop; done
"""

# A Go program takes some 0.3 s to say its version under software emulation, so what it said is kept until the program
# is newer than that. Reading it back starts no program.
_VERSION = """
program=$(command -v "$1") || exit 1
known=/var/cache/qvm-version-$1
[ "$known" -nt "$program" ] || { text=$("$program" --version) && echo "$text" >"$known"; } || exit 1
IFS= read -r line <"$known"
echo "$line"
"""


async def ensure_needs(guest: Guest, needs: Needs, *, what: str) -> None:
    """Bring packages and kernel modules into the guest where they are missing; `what` is whose they are, for messages.

    GuestError, with the words of modprobe or of the package manager, where that fails.
    """
    if not needs.programs and not needs.kernel_modules:
        return
    try:
        look = await guest.exec(["sh", "-c", _LOOK, "look", *needs.kernel_modules],
                                env={"QVM_PROGRAMS": " ".join(needs.programs)}, timeout=LOOK_TIMEOUT)
    except GuestCommandError as error:
        raise GuestError(f"the guest's kernel lacks a module that {what} needs", details=error.details,
                         hint="use qvm's own image (--image debian-13)") from error
    if b"missing" in look.stdout.split():
        await install_packages(guest, needs.packages, what=what)


async def install_packages(guest: Guest, packages: Mapping[str, str], *, what: str) -> None:
    """Install from the guest's distribution; `packages` maps "apt", "apk" and "dnf" to names with spaces between.

    GuestError with the package manager's own words where that fails.
    """
    await _manage(guest, _INSTALL, packages, problem=f"{what} could not be installed in the guest")


async def upgrade_packages(guest: Guest, packages: Mapping[str, str], *, what: str) -> list[str]:
    """Upgrade what is installed of `packages`; returns "name: old -> new" for each that changed. Errors as above."""
    before = await package_versions(guest, packages)
    await _manage(guest, _UPGRADE, packages, problem=f"{what} could not be updated in the guest")
    after = await package_versions(guest, packages)
    return [f"{name}: {before.get(name, 'not installed')} -> {version}" for name, version in sorted(after.items())
            if before.get(name) != version]


async def package_versions(guest: Guest, packages: Mapping[str, str]) -> dict[str, str]:
    """Name -> version of those of `packages` that are installed."""
    done = await guest.exec(["sh", "-c", _VERSIONS], env=_by_manager(packages))
    words = (line.split() for line in done.stdout.decode(errors="replace").splitlines())
    return {line[0]: line[1] for line in words if len(line) == 2}


async def _manage(guest: Guest, script: str, packages: Mapping[str, str], *, problem: str) -> None:
    try:
        await guest.exec(["sh", "-c", script], env=_by_manager(packages), timeout=INSTALL_TIMEOUT)
    except GuestCommandError as error:
        raise GuestError(problem, details=error.details or error.message,
                         hint="check that the guest reaches its package mirror, or use qvm's own image") from error


def _by_manager(packages: Mapping[str, str]) -> dict[str, str]:
    return {f"QVM_{manager.upper()}": names for manager, names in packages.items()}


async def start_services(guest: Guest, names: Sequence[str], *, openrc: Sequence[str] | None = None) -> None:
    """Ask for services to be started, without waiting for them.

    `names` are systemd's; `openrc` the names elsewhere where they differ.
    """
    await guest.exec(["sh", "-c", _START, "start", *names], env=_rc(names, openrc))


async def restart_services(guest: Guest, names: Sequence[str]) -> None:
    """Ask for services to be restarted, without waiting for them."""
    await guest.exec(["sh", "-c", _RESTART, "restart", *names], env=_rc(names, None))


async def reload_units(guest: Guest) -> None:
    """Have systemd read its unit files again."""
    await guest.exec(["systemctl", "daemon-reload"])


async def wait_for_services(
    guest: Guest,
    names: Sequence[str],
    *,
    openrc: Sequence[str] | None = None,
    sockets: Sequence[str] = (),
    patience: float = PATIENCE,
) -> bool:
    """Whether the services have said they are ready and the sockets exist; waits in the guest up to `patience` s.

    systemd's `start` joins the job under way and ends when the service has notified its readiness, so nothing polls.
    GuestError with the last lines of the journal where a service has failed.
    """
    env = _rc(names, openrc)
    try:
        done = await guest.exec(["sh", "-c", _WAIT, "wait", *names], env={**env, "QVM_SOCKETS": " ".join(sockets)},
                                timeout=patience, check=False)
    except DeadlineError:
        return False
    if done.exit_code == 0:
        return True
    report = await guest.exec(["sh", "-c", _REPORT, "report", *names], env=env, check=False)
    details = (done.stderr + report.stdout).decode(errors="replace").strip()
    raise GuestError(f"{' or '.join(names)} failed to start in the guest", details=details or None,
                     hint="`qvm logs runtime` shows the journal")


async def stop_services(guest: Guest, names: Sequence[str], *, openrc: Sequence[str] | None = None) -> None:
    """Stop services and wait for their end; names that do not exist are passed over."""
    await guest.exec(["sh", "-c", _STOP, "stop", *names], env=_rc(names, openrc), timeout=STOP_TIMEOUT, check=False)


async def find_version(guest: Guest, program: str) -> str:
    """The version number in what `program --version` says, e.g. "26.1.5"; "" where it says none."""
    done = await guest.exec(["sh", "-c", _VERSION, "version", program])
    return parse_version(done.stdout.decode(errors="replace"))


def parse_version(text: str) -> str:
    """The first word that is a dotted number, without what a distribution adds to it."""
    match = re.search(r"(?<![\w.])v?(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else ""


def _rc(names: Sequence[str], openrc: Sequence[str] | None) -> dict[str, str]:
    return {"QVM_RC": " ".join(names if openrc is None else openrc)}
