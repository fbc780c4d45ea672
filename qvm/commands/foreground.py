"""`qvm start --foreground`: stay with the instance until it stops; an interrupt stops it gracefully."""

from __future__ import annotations

from qvm.commands.stop import stop
from qvm.filenames import Files
from qvm.progress import Progress
from qvm.supervisor.client import Event, NoSupervisorError, call


def stay(profile: str, *, progress: Progress) -> None:
    """Return when the instance has stopped; KeyboardInterrupt stops it first and is then raised on."""

    def see(event: Event) -> None:
        if event.get("event") == "forward":
            progress.note(f"port {event.get('port')}: {event.get('state')}")

    progress.note(f"{profile} is running in the foreground; Ctrl-C stops it")
    try:
        call(Files(profile).control_socket, "follow", on_event=see, timeout=None)
    except NoSupervisorError:
        progress.note(f"the supervisor of {profile} has gone; `qvm status {profile}` tells more")
    except KeyboardInterrupt:
        stop(profile, progress=progress)
        raise
