"""The options that several commands share, and what they mean to the core."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, TypeVar

import click
from click.core import ParameterSource

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.cli.conditions import asked_from, condition_options
from pybpfthrottle.cli.say import say
from pybpfthrottle.cli.values import parse_duration, parse_rate, record_option
from pybpfthrottle.errors import LimitError, SettingsError, ThrottleError
from pybpfthrottle.linux import clock
from pybpfthrottle.model import (
    TRAFFIC_KINDS,
    Direction,
    Limits,
    Target,
    ThrottleSpec,
    Traffic,
)
from pybpfthrottle.settings import ATTACH_METHODS, BACKENDS, EGRESS_VERDICTS, SHAPES

if TYPE_CHECKING:
    from pybpfthrottle.cli.records import Output
    from pybpfthrottle.conditions.network import Asked

F = TypeVar("F", bound=Callable[..., Any])


class BackendOption(click.Option):  # type: ignore[misc]  # mypy does not read click
    """An option of one backend: whoever gives it asks for that backend."""

    def __init__(self, *args: Any, backend: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend


def limit_options(function: F) -> F:
    """Add the options for limits, and for how they are put in force."""
    for option in reversed(
        (
            click.option(
                "-d",
                "--download-limit",
                metavar="RATE",
                callback=parse_rate,
                help="Limit downloads: bytes per second as 500K, 1.5M, 1G (1024-based), or bits per"
                " second as 8mbit.",
            ),
            click.option(
                "-u",
                "--upload-limit",
                metavar="RATE",
                callback=parse_rate,
                help="Limit uploads, with the same units.",
            ),
            click.option(
                *("--expires", "--duration"),
                "duration",
                metavar="TIME",
                callback=parse_duration,
                help="End the limit after this time: seconds, or 90s, 5m, 2h, 1d. With eBPF the"
                " kernel ends it even if no process is left to do so.",
            ),
            click.option(
                "--label", metavar="NAME", default="", help="Name the limit, for set and remove."
            ),
            click.option("--loopback", is_flag=True, help="Also limit the loopback device."),
            record_option,
            condition_options,
            click.option(
                "--traffic",
                cls=BackendOption,
                backend="ebpf",
                type=click.Choice(TRAFFIC_KINDS),
                default="all",
                show_default=True,
                help="Limit only this traffic: local is private, link-local and multicast addresses"
                " and this machine's own networks, internet is all else.",
            ),
            click.option(
                "--to",
                cls=BackendOption,
                backend="ebpf",
                multiple=True,
                metavar="NETWORK",
                help="Limit only what goes to or comes from this address or network, such as"
                " 192.0.2.0/24. May be repeated.",
            ),
            click.option(
                *("--except", "but"),
                cls=BackendOption,
                backend="ebpf",
                multiple=True,
                metavar="NETWORK",
                help="Do not limit this address or network. Of several the smallest decides.",
            ),
            click.option(
                "--prove",
                is_flag=True,
                help="Say after two seconds whether the limit holds: what was asked, what the"
                " kernel and the sockets have counted, and what went past.",
            ),
            click.option(
                "--bpf-attach-method",
                cls=BackendOption,
                backend="ebpf",
                type=click.Choice(ATTACH_METHODS),
                help="auto (the default) tries a BPF link, and after EINVAL the legacy call.",
            ),
            click.option(
                "--override-others",
                cls=BackendOption,
                backend="ebpf",
                is_flag=True,
                help="Attach even if that switches off another tool's program, attached above with"
                " BPF_F_ALLOW_OVERRIDE.",
            ),
            click.option(
                "--egress-verdict",
                cls=BackendOption,
                backend="ebpf",
                type=click.Choice(EGRESS_VERDICTS),
                default="auto",
                show_default=True,
                help="How to drop uploads over the limit: like congestion (Linux 5.3), or deny them"
                " with EPERM.",
            ),
            click.option(
                "--shape",
                cls=BackendOption,
                backend="ebpf",
                type=click.Choice(SHAPES),
                help="How to keep TCP to the limit. pace: pace uploads. gate, window: hold the"
                " receive window of downloads (gate by a process, window by the kernel only)."
                " police: drop packets. auto (the default) chooses.",
            ),
            click.option(
                "--mount-cgroup2",
                is_flag=True,
                help="If cgroup v2 is not mounted, mount it on /run/cgroup2. It stays mounted.",
            ),
            click.option(
                "--download-backend",
                type=click.Choice(BACKENDS),
                help="How to limit downloads: auto (the default) takes the best of those that"
                " pybpfthrottle backends lists.",
            ),
            click.option(
                "--upload-backend",
                type=click.Choice(BACKENDS),
                help="How to limit uploads.",
            ),
            click.option(
                "-v",
                "--verbose",
                count=True,
                help="Log what is done (-v), and how (-vv), to standard error.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="Show no live line and no summary."),
        )
    ):
        function = option(function)
    return function


def check_rate(ctx: click.Context, param: click.Parameter, text: Optional[str]) -> Optional[str]:
    """Return a limit as it was typed, for another command line."""
    parse_rate(ctx, param, text)
    return text


def drop_in_options(function: F) -> F:
    """Add the options for limits that can be written down for later; ``words_of`` does that."""
    for option in reversed(
        (
            click.option(
                *("-d", "--download-limit"),
                metavar="RATE",
                callback=check_rate,
                help="Limit downloads: 500K or 1.5M bytes per second, or 8mbit.",
            ),
            click.option(
                *("-u", "--upload-limit"),
                metavar="RATE",
                callback=check_rate,
                help="Limit uploads, with the same units.",
            ),
            click.option("--loopback", is_flag=True, help="Also limit the loopback device."),
            click.option(
                "--traffic",
                type=click.Choice(TRAFFIC_KINDS),
                default="all",
                show_default=True,
                help="Limit only this traffic.",
            ),
            click.option(
                "--to",
                multiple=True,
                metavar="NETWORK",
                help="Limit only this address or network. May be repeated.",
            ),
            click.option(
                *("--except", "but"),
                multiple=True,
                metavar="NETWORK",
                help="Do not limit this address or network. May be repeated.",
            ),
        )
    ):
        function = option(function)
    return function


def words_of(given: Mapping[str, Any]) -> list[str]:
    """Return the options of ``drop_in_options`` that were given, as words of a command line."""
    _traffic(dict(given))  # says what is wrong
    named = {"upload_limit": "--upload-limit", "download_limit": "--download-limit"}
    words = [f"{option}={given[name]}" for name, option in named.items() if given[name]]
    words += ["--loopback"] * given["loopback"]
    words += [f"--traffic={given['traffic']}"] * (given["traffic"] != "all")
    words += [f"--to={network}" for network in given["to"]]
    return words + [f"--except={network}" for network in given["but"]]


class Request(NamedTuple):
    """What the shared options ask for. ``backends`` and ``options`` are as in plan.Wish."""

    limits: Limits
    traffic: Traffic
    label: str
    backends: dict[Direction, str]
    options: dict[str, Any]
    duration_s: Optional[float]
    verbose: int
    quiet: bool
    record: Optional[Output]
    prove: bool
    mount_cgroup2: bool = False
    network: Optional[Asked] = None

    def spec(self, target: Target, *, kept: bool = False) -> ThrottleSpec:
        """Return the requested throttle for a target, which begins now."""
        expires_ns = 0
        if self.duration_s is not None:
            expires_ns = clock.boottime_ns() + int(self.duration_s * 1e9)
        # What is wrong with a network ends with this process, so its throttle does too.
        kept = kept and self.network is None
        return ThrottleSpec(target, self.limits, self.traffic, self.label, kept, expires_ns)

    def for_network(self, network: Optional[Asked]) -> Request:
        """Return the same with a network, in which what is not limited is let through."""
        if network is None:
            return self
        from pybpfthrottle.conditions.network import refuse_what_is_missing, wish_for
        from pybpfthrottle.plan import Wish

        if self.traffic.changed(loopback=False) != Traffic():
            raise click.UsageError(
                "--traffic, --to and --except are for limits; a bad network is for all traffic"
            )
        if self.prove and not any(network.limits.values()):
            raise click.UsageError("--prove needs a limit: a bad network counts what it does")
        try:
            refuse_what_is_missing(network.conditions)
            wish = wish_for(network, Wish(backends=self.backends, options=self.options))
        except ThrottleError as error:
            raise click.UsageError(str(error)) from error
        return self._replace(
            limits=network.limits,
            backends=dict(wish.backends),
            options=dict(wish.options),
            network=network,
        )


def request_from(given: dict[str, Any]) -> Request:
    """Take the shared options out of a command's options; a usage error if nothing is asked for."""
    from pybpfthrottle import settings
    from pybpfthrottle.backends.ebpf.options import Options

    chosen = {direction: given.pop(f"{direction}_backend") for direction in Direction}
    try:
        found = settings.load(
            method=given.pop("bpf_attach_method"),
            shape=given.pop("shape"),
            backends=chosen,
            exclusive=given.pop("exclusive", False),
            override_others=given.pop("override_others"),
        )
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    for warning in found.warnings:
        say(f"warning: {warning}")
    rates = {direction: given.pop(f"{direction}_limit") for direction in Direction}
    limits = {direction: rate for direction, rate in rates.items() if rate is not None}
    network = asked_from(given, limits)
    verdict = given.pop("egress_verdict")
    request = Request(
        limits=limits,
        traffic=_traffic(given),
        label=given.pop("label"),
        backends=_backends(found.backends, limits),
        options={
            "ebpf": Options(
                attach=found.attach,
                egress_verdict=verdict,
                shape=found.shape,
                guard=True,
            )
        },
        duration_s=given.pop("duration"),
        verbose=given.pop("verbose"),
        quiet=given.pop("quiet"),
        record=given.pop("record"),
        prove=given.pop("prove"),
        mount_cgroup2=given.pop("mount_cgroup2"),
    )
    if not limits and network is None:
        raise click.UsageError(
            "no limit: give --download-limit, --upload-limit or both (or what is to be wrong with"
            " the network: --profile, --loss, ...)"
        )
    for direction in Direction:
        if direction not in limits and chosen[direction]:
            raise click.UsageError(f"--{direction}-backend needs --{direction}-limit")
    if Direction.UPLOAD not in limits and verdict != "auto":
        raise click.UsageError("--egress-verdict needs --upload-limit")
    return request.for_network(network)


def _traffic(given: dict[str, Any]) -> Traffic:
    loopback, kind, to, but = (given.pop(name) for name in ("loopback", "traffic", "to", "but"))
    if kind == "all" and not to and not but:
        return Traffic(loopback)
    from pybpfthrottle import networks  # which takes a moment

    try:
        return networks.traffic(kind, to, but, loopback=loopback)
    except LimitError as error:
        raise click.UsageError(str(error)) from error


def _backends(chosen: Mapping[Direction, str], limits: Limits) -> dict[Direction, str]:
    """Return the backend of each direction: the one whose own options are given, if any.

    No option is ignored by a backend that does not know it: that is a usage error.
    """
    found = dict(chosen)
    ctx = click.get_current_context()
    for option in ctx.command.params:
        if not isinstance(option, BackendOption) or ctx.params.get(option.name) == "auto":
            continue
        if ctx.get_parameter_source(option.name or "") != ParameterSource.COMMANDLINE:
            continue
        able = [one for one in limits if found[one] in ("auto", option.backend)]
        if limits and not able:
            others = " and ".join(dict.fromkeys(found[one] for one in limits))
            raise click.UsageError(
                f"{option.opts[-1]} works only with the backend {option.backend}, not with {others}"
            )
        found.update(dict.fromkeys(able, option.backend))
    return found


def wish_by_settings() -> Any:
    """Return how a limit is put in force that is asked for without options: a plan.Wish."""
    from pybpfthrottle import settings
    from pybpfthrottle.backends.ebpf.options import Options
    from pybpfthrottle.plan import Wish

    found = settings.load()
    options = Options(attach=found.attach, shape=found.shape, guard=True)
    return Wish(backends=found.backends, options={"ebpf": options})


def start_logging(verbose: int) -> None:
    """Log to standard error: -v says what is done, -vv how; without, errors are one line."""
    if not verbose and "logging" not in sys.modules:
        return  # nobody listens
    from pybpfthrottle.cli import logs

    logs.start(verbose)
