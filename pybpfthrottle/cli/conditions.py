"""The options for a bad network, and the profiles that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, TypeVar

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import Direction, Rate

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Asked, Network
    from pybpfthrottle.line.own import OwnNetwork
    from pybpfthrottle.throttle import Throttle

F = TypeVar("F", bound=Callable[..., Any])

# By the names of what conditions are given by: what the option is followed by, and what it does.
_HELP = {
    "delay": ("TIME", "Delay what comes in by this time, such as 80ms: each round trip is longer."),
    "jitter": ("TIME", "Let the delay vary by up to this time, such as 20ms, both ways."),
    "loss": (
        "SHARE",
        "Lose packets both ways: 1% by chance, burst:1%,8 in bursts of 8, every:100 each 100th.",
    ),
    "download_loss": ("SHARE", "Lose packets that come in; as --loss."),
    "upload_loss": ("SHARE", "Lose packets that go out; as --loss."),
    "outage": ("TIME/TIME", "Let nothing through for 5s in each 60s (5s/60s), or always."),
    "duplicate": ("SHARE", "Have this share of what comes in come twice."),
    "reorder": (
        "SHARE",
        "Have this share of what comes in overtake others; see --delay.",
    ),
    "corrupt": ("SHARE", "Flip a bit in this share of what comes in."),
    "block": (("refuse", "drop"), "Refuse new connections (refuse), or have them time out (drop)."),
    "dns": (
        ("lost", "slow", "servfail"),
        "Have names not be found: no answer, one to the second question, or that of a failure.",
    ),
    "seed": ("NUMBER", "Lose the same packets again as with this number before."),
}


def condition_options(function: F) -> F:
    """Add the options for a bad network."""
    for name, (what, text) in reversed(_HELP.items()):
        option = f"--{name.replace('_', '-')}"
        if isinstance(what, str):
            function = click.option(option, name, metavar=what, help=text)(function)
        else:
            function = click.option(option, name, type=click.Choice(what), help=text)(function)
    for name, what in (("replay-upload", "uploads"), ("replay", "downloads")):
        function = click.option(
            f"--{name}",
            type=click.Path(exists=True, dir_okay=False),
            help=f"Let {what} be as fast as FILE says: what --record wrote, or a mahimahi trace."
            " Recorded round trips are replayed as well, unless there is a --delay.",
            metavar="FILE",
        )(function)
    option = click.option(
        "--profile",
        metavar="NAME",
        shell_complete=completing.profiles,
        help="Give a bad network by name, such as 3g: rates, delay, loss. See pybpfthrottle"
        " profiles.",
    )
    made: F = option(function)
    return made


def asked_from(
    given: dict[str, Any], limits: Mapping[Direction, Optional[Rate]]
) -> Optional[Asked]:
    """Take the options out of a command's; return what network they ask for, if any.

    A usage error if they ask for what cannot be.
    """
    profile = given.pop("profile", None)
    texts = {name: given.pop(name, None) for name in (*_HELP, "replay", "replay_upload")}
    texts = {name: text for name, text in texts.items() if text is not None}
    if not (profile or texts):
        return None
    from pybpfthrottle.conditions.network import Asked

    rates = {str(direction): rate for direction, rate in limits.items()}
    try:
        return Asked.of(profile or "", **rates, **texts)
    except (LimitError, SettingsError) as error:
        raise click.UsageError(str(error)) from error


def begin(
    throttle: Throttle,
    network: Optional[Asked],
    *,
    loopback: bool,
    line: Optional[OwnNetwork] = None,
) -> Optional[Network]:
    """Put a network in force on what a throttle is for, which stays the caller's to remove.

    With a ``line`` it is what becomes of all that passes there. Raises ThrottleError, BpfError or
    CgroupError.
    """
    if network is None:
        return None
    from pybpfthrottle.conditions.network import Network

    return Network(throttle, network, loopback=loopback, owned=False, line=line)


def show_profiles(*, as_json: bool) -> None:
    """Print the profiles, each with its numbers."""
    import json

    from pybpfthrottle.cli.say import echo, echo_json
    from pybpfthrottle.conditions import profiles

    try:
        found = profiles.all_profiles()
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        every = [one.to_json() for one in found.values()]
        echo_json(json.dumps({"profiles": every, "files": profiles.files()}, indent=2))
        return
    width = max(map(len, found))
    for one in found.values():
        where = f"  ({one.source})" if one.source else ""
        echo(f"{one.name:<{width}}  {one.numbers()}{where}")
        if one.about:
            echo(f"{'':<{width}}  {one.about}")


def help_tests(path: str, user: Optional[str]) -> int:
    """Give bad networks to a user's tests until a signal comes; return the exit status."""
    import os
    import signal

    from pybpfthrottle.cli.say import echo, say
    from pybpfthrottle.conditions.helper import Helper
    from pybpfthrottle.linux.signals import SignalQueue
    from pybpfthrottle.supervisor import Supervisor
    from pybpfthrottle.targets import user_id

    # A container's users may have a number and no name.
    uid = user_id(user or os.environ.get("SUDO_UID") or str(os.getuid()))
    with SignalQueue((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as signals:
        try:
            helper = Helper(path, uid=uid)
        except OSError as error:
            say(f"error: cannot listen on {path}: {error.strerror}")
            return 1
        with helper, Supervisor() as supervisor:
            echo(f"Bad networks for processes of user {uid}, by {path}. Ctrl-C ends it.")
            supervisor.add(lambda: [signals], strict=True)
            helper.serve(supervisor, lambda: bool(list(signals.take())))
    return 0
