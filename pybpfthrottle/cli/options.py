"""The options that several commands share, and what they mean to the core."""

from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import click

from pybpfthrottle.cli.say import say
from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import Direction, Limits, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.settings import ATTACH_METHODS, BACKENDS, EGRESS_VERDICTS, SHAPES

F = TypeVar("F", bound=Callable[..., Any])

_MAX_DURATION_S = 10 * 366 * 86400.0


def parse_rate(ctx: click.Context, param: click.Parameter, text: Optional[str]) -> Optional[Rate]:
    """Return a limit, as Rate.parse reads it."""
    if text is None:
        return None
    try:
        return Rate.parse(text)
    except LimitError as error:
        raise click.BadParameter(str(error)) from error


def parse_duration(
    ctx: click.Context, param: click.Parameter, text: Optional[str]
) -> Optional[float]:
    """Return seconds, more than 0."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_DURATION_S:
        raise click.BadParameter(
            f"{text!r}: give a number of seconds above 0 and up to ten years, such as 5 or 0.5"
        )
    return seconds


def limit_options(function: F) -> F:
    """Add the limits, and how they are put in force."""
    for option in reversed(
        (
            click.option(
                "--download-limit",
                metavar="RATE",
                callback=parse_rate,
                help="Bytes per second: 500K, 1.5M, 1G (1024-based), or bits: 8mbit.",
            ),
            click.option(
                "--upload-limit",
                metavar="RATE",
                callback=parse_rate,
                help="The same for uploads.",
            ),
            click.option(
                "--duration",
                metavar="SECONDS",
                callback=parse_duration,
                help="Remove the limit after this time.",
            ),
            click.option(
                "--label", metavar="NAME", default="", help="Name it, for set and remove."
            ),
            click.option("--loopback", is_flag=True, help="Limit the loopback device too."),
            click.option(
                "--bpf-attach-method",
                type=click.Choice(ATTACH_METHODS),
                help="auto (the default) tries a BPF link, and after EINVAL the legacy call.",
            ),
            click.option(
                "--egress-verdict",
                type=click.Choice(EGRESS_VERDICTS),
                default="auto",
                show_default=True,
                help="Drop uploads as congestion does (Linux 5.3), or deny them (EPERM).",
            ),
            click.option(
                "--shape",
                type=click.Choice(SHAPES),
                help="Keep TCP to a limit by pacing uploads, by the receive window of downloads"
                " (opened by a process: gate; by the kernel alone: window), or by dropping packets"
                " (police). auto (the default) chooses.",
            ),
            click.option(
                "--download-backend",
                type=click.Choice(BACKENDS),
                default="auto",
                help="See --list-backends.",
            ),
            click.option(
                "--upload-backend",
                type=click.Choice(BACKENDS),
                default="auto",
                help="See --list-backends.",
            ),
            click.option(
                "-v",
                "--verbose",
                count=True,
                help="Log what is done (-v), and how (-vv), to standard error.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="No live line and no summary."),
        )
    ):
        function = option(function)
    return function


class Request(NamedTuple):
    """What the shared options ask for. ``backends`` and ``options`` are those of a plan.Wish."""

    limits: Limits
    traffic: Traffic
    label: str
    backends: dict[Direction, str]
    options: dict[str, Any]
    duration_s: Optional[float]
    verbose: int
    quiet: bool

    def spec(self, target: Target) -> ThrottleSpec:
        """Return the throttle that is asked for, for a target."""
        return ThrottleSpec(target, self.limits, self.traffic, self.label)


def request_from(given: dict[str, Any], *, own_cgroup: bool = False) -> Request:
    """Take the shared options out of those of a command; a usage error if there is no limit.

    With ``own_cgroup`` nobody else can have attached anything where the limit goes.
    """
    from pybpfthrottle import settings
    from pybpfthrottle.backends.ebpf.options import Options

    try:
        found = settings.load(
            method=given.pop("bpf_attach_method"),
            shape=given.pop("shape"),
            exclusive=own_cgroup or given.pop("exclusive", False),
        )
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    for warning in found.warnings:
        say(f"warning: {warning}")
    rates = {direction: given.pop(f"{direction}_limit") for direction in Direction}
    limits = {direction: rate for direction, rate in rates.items() if rate is not None}
    verdict = given.pop("egress_verdict")
    request = Request(
        limits=limits,
        traffic=Traffic(loopback=given.pop("loopback")),
        label=given.pop("label"),
        backends={direction: given.pop(f"{direction}_backend") for direction in Direction},
        options={
            "ebpf": Options(
                attach=found.attach, egress_verdict=verdict, shape=found.shape, guard=True
            )
        },
        duration_s=given.pop("duration"),
        verbose=given.pop("verbose"),
        quiet=given.pop("quiet"),
    )
    if not limits:
        raise click.UsageError("no limit: give --download-limit, --upload-limit or both")
    for direction in Direction:
        if direction not in limits and request.backends[direction] != "auto":
            raise click.UsageError(f"--{direction}-backend goes with --{direction}-limit")
    if Direction.UPLOAD not in limits and verdict != "auto":
        raise click.UsageError("--egress-verdict goes with --upload-limit")
    return request


def start_logging(verbose: int) -> None:
    """Log to standard error: with -v what is done, with -vv how; without, errors are one line."""
    import logging

    logging.addLevelName(logging.WARNING, "WARN")
    level = (logging.CRITICAL, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)-5s %(message)s")
