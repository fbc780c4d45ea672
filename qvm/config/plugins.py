"""Which runtimes are installed, by name alone: loading one is the business of `qvm.runtime.registry`."""

from __future__ import annotations

from pathlib import Path

GROUP = "qvm.runtimes"


def list_runtime_names() -> tuple[str, ...]:
    """The entry-point names of the installed runtime plugins, sorted."""
    from importlib.metadata import entry_points

    names = {entry.name for entry in entry_points(group=GROUP)}
    return tuple(sorted(names | _checkout_names()))


def _checkout_names() -> set[str]:
    """What pyproject.toml declares beside a checkout that is used without having been installed."""
    import tomllib

    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text())["project"]
        return set(project["entry-points"][GROUP]) if project["name"] == "qvm" else set()
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return set()
