"""What a start makes of a suspended state, before anything else."""

from __future__ import annotations

from qvm.config.model import Config
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.instance.states import SavedState, discard_state, find_state
from qvm.progress import Progress
from qvm.supervisor.offline import finish_restore

# Settings a machine has for as long as it is not booted anew.
_FIXED = ("cpus", "memory", "disk", "root_disk", "arch", "runtime")


def check_suspended(record: Record, config: Config, *, cold: bool, progress: Progress) -> None:
    """Complete what was interrupted; give a suspended state up where `cold`.

    InstanceStateError where settings were asked for that what is suspended cannot take on.
    """
    profile = config.profile
    folder = Files(profile).suspended
    name = finish_restore(profile)
    if name is not None:
        progress.note(f"completed the interrupted restore of the snapshot {name!r}")
    state = _find(profile, progress)
    if state is None:
        return
    if cold:
        progress.note("gave up what was suspended: booting")
        discard_state(folder)
        return
    differing = [name for name in _FIXED if getattr(config, name) != getattr(record.config, name)]
    if differing:
        raise InstanceStateError(
            f"{profile!r} is suspended, and cannot change its {', '.join(differing).replace('_', ' ')}",
            hint=f"`qvm resume {profile}` goes on as it was; `qvm start {profile} --cold` with the same flags gives up "
                 "what ran",
        )


def _find(profile: str, progress: Progress) -> SavedState | None:
    folder = Files(profile).suspended
    try:
        return find_state(folder)
    except InstanceStateError as error:
        progress.note(f"{error.message}: starting cold")
        discard_state(folder)
        return None
