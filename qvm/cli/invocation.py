"""What every verb knows of how it was called: profile, output form, verbosity. Also the options common to all verbs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from qvm.config.names import default_profile, validate_profile_name
from qvm.errors import UsageError
from qvm.progress import NullProgress, Progress

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Invocation:
    """Filled in from the group's options and the verb's: both places count."""

    named: str | None = None
    """The profile, where one was named."""
    json: bool = False
    verbose: int = 0
    quiet: bool = False

    def name(self, profile: str | None) -> None:
        """Take note of a profile that was named; UsageError where another one was named before."""
        if profile is None:
            return
        problems = validate_profile_name(profile)
        if problems:
            raise UsageError(problems[0])
        if self.named is not None and self.named != profile:
            raise UsageError(
                f"two profiles are named: {self.named!r} and {profile!r}", hint="name one, by position or with -p"
            )
        self.named = profile

    @property
    def profile(self) -> str:
        """The profile to work on."""
        if self.named is None:
            self.name(default_profile(os.environ))
        assert self.named is not None
        return self.named

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """How work reports to this terminal while the block runs."""
        if self.quiet:
            yield NullProgress()
            return
        from qvm.cli.progress import open_progress

        with open_progress() as progress:
            yield progress

    def apply_verbosity(self) -> None:
        """Let the log speak for -v (what is done) and -vv (everything)."""
        if not self.verbose:
            return
        import logging

        from qvm.log import configure

        configure(logging.INFO if self.verbose == 1 else logging.DEBUG)


def complete_profile(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of instances and of profiles that have a file."""
    from qvm import paths
    from qvm.instance.store import list_profiles

    folder = paths.home()
    with_file = {path.parent.name for path in folder.glob("[!_]*/qvm.yaml")} if folder.is_dir() else set()
    return sorted(name for name in {*list_profiles(), *with_file} if name.startswith(incomplete))


def _merge(ctx: click.Context, options: dict[str, Any]) -> Invocation:
    invocation = ctx.ensure_object(Invocation)
    invocation.name(options.pop("profile_option", None))
    invocation.name(options.pop("profile_argument", None))
    invocation.json |= options.pop("json_option", False)
    invocation.verbose += options.pop("verbose_option", 0)
    invocation.quiet |= options.pop("quiet_option", False)
    return invocation


def common_options(*, json: bool = True, name: bool = True) -> Callable[[F], Callable[..., Any]]:
    """-p, -v, -q and, where asked for, --json and a positional NAME; the verb gets an Invocation as first argument."""

    def decorate(function: F) -> Callable[..., Any]:
        @wraps(function)
        def verb(**options: Any) -> Any:
            invocation = _merge(click.get_current_context(), options)
            invocation.apply_verbosity()
            return function(invocation, **options)

        decorated: Callable[..., Any] = verb
        for option in reversed(_options(json=json)):
            decorated = option(decorated)
        if name:
            decorated = click.argument(
                "profile_argument", metavar="[NAME]", required=False, shell_complete=complete_profile
            )(decorated)
        return decorated

    return decorate


def _options(*, json: bool) -> list[Callable[[Any], Any]]:
    options = [
        click.option("-p", "--profile", "profile_option", metavar="NAME", shell_complete=complete_profile,
                     help="The profile; else QVM_PROFILE, QVM_DEFAULT_PROFILE or `default`."),
        click.option("-v", "--verbose", "verbose_option", count=True, help="Tell more; -vv everything."),
        click.option("-q", "--quiet", "quiet_option", is_flag=True, help="Tell errors only."),
    ]
    if json:
        options.append(click.option("--json", "json_option", is_flag=True, help="Answer in JSON."))
    return options


def group_options(function: F) -> Callable[..., Any]:
    """The same options before the verb."""

    @wraps(function)
    def group(**options: Any) -> Any:
        _merge(click.get_current_context(), options)
        return function(**options)

    decorated: Callable[..., Any] = group
    for option in reversed(_options(json=True)):
        decorated = option(decorated)
    return decorated
