"""The command line: the bare command limits cgroups; subcommands do the rest."""

from __future__ import annotations

import os
import signal
import stat
import sys
from contextlib import suppress
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from io import TextIOWrapper
from typing import Any, NoReturn, Optional, TextIO

import click
from click.core import ParameterSource

from pybpfthrottle import __version__
from pybpfthrottle.cli import completing
from pybpfthrottle.cli.bpf import bpf
from pybpfthrottle.cli.options import (
    BackendOption,
    ProcessId,
    drop_in_options,
    limit_options,
    parse_rate,
    request_from,
    start_logging,
    words_of,
)
from pybpfthrottle.cli.records import BOTH_ON_STDOUT, Output, record_option
from pybpfthrottle.cli.say import echo_lines, say, say_error, show_error
from pybpfthrottle.errors import Error, LimitError
from pybpfthrottle.model import Direction, Rate

_EPILOG = """
\b
Examples:
  pybpfthrottle
  pybpfthrottle run --download-limit 1M -- wget https://example.org/image.iso
  pybpfthrottle --pid 1234 --download-limit 1M --upload-limit 500K
  pybpfthrottle --pid 1234 --download-limit 1M --prove --record rates.csv
  pybpfthrottle --name rsync --user backup --upload-limit 500K
  pybpfthrottle --unit backup --upload-limit 8mbit --duration 1h
  pybpfthrottle --pid 1234 --download-limit 1M --detach --expires 2h
  pybpfthrottle demo

\b
Exit status: 0 done, 1 failed, 2 wrong usage, 3 a limit did not hold (--prove). run exits with the
status of its command, or 125 failed, 126 cannot be executed, 127 not found.
"""


@click.group(
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--pid",
    "pids",
    type=ProcessId(),
    multiple=True,
    help="Limit this process and its children. Repeat it to share the limit among several.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=completing.names,
    help="Limit all processes with this name.",
)
@click.option(
    "--exe",
    "executables",
    multiple=True,
    metavar="PATH",
    type=click.Path(exists=True, dir_okay=False),
    help="Limit all processes that run this executable.",
)
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="USER",
    shell_complete=completing.users,
    help="Limit all processes of this user. With --name or --exe: only those that match both.",
)
@click.option(
    "--no-children",
    is_flag=True,
    help="Do not limit children of the processes, unless they match too.",
)
@click.option("--each", is_flag=True, help="Give each process a limit of its own.")
@click.option(
    "--move-cgroup",
    is_flag=True,
    help="With --pid: move the processes into a cgroup below their own until the limit ends. This"
    " also covers their children.",
)
@click.option(
    "--cgroup",
    "cgroups",
    multiple=True,
    metavar="PATH",
    shell_complete=completing.cgroups,
    help="Limit a cgroup (v2) and those below it. Repeat it to share the limit among several.",
)
@click.option(
    "--unit",
    "units",
    multiple=True,
    metavar="NAME",
    shell_complete=completing.units,
    help="Limit a systemd unit, even after it restarts.",
)
@click.option(
    "--whole-cgroup",
    is_flag=True,
    help="With --pid: limit the whole cgroup of the process. With --cgroup and --unit: limit the"
    " cgroup even if this session is in it.",
)
@click.option("--stack", is_flag=True, help="Also limit what another pybpfthrottle already limits.")
@click.option(
    "--exclusive",
    cls=BackendOption,
    backend="ebpf",
    is_flag=True,
    help="Before Linux 4.15: attach even if that may replace another tool's program.",
)
@limit_options
@click.option(
    "--detach",
    is_flag=True,
    help="End at once and leave the limit in force, until its --expires, or until it is removed. A"
    " process in the background follows what is limited; if that is killed, the kernel goes on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--list-backends", is_flag=True, help="List the available backends and exit.")
@click.version_option(__version__, prog_name="pybpfthrottle")
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Limit the bandwidth of running programs, or of cgroups (version 2).

    Runs until Ctrl-C, SIGTERM, SIGHUP or the end of --duration, or until everything limited has
    ended, and then removes the limit. With --name, --exe or --user it also limits processes that
    start later.

    Without any option, on a terminal, it is the same as pybpfthrottle top.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_in_front(ctx)
        return
    if options.pop("list_backends"):
        from pybpfthrottle.cli import backends as backends_command

        backends_command.show(as_json=options["as_json"], try_them=False)
        return
    if not any(ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE for name in options):
        if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
            ctx.invoke(top)
            return
        echo_lines(ctx.get_help(), err=True)
        ctx.exit(2)
    from pybpfthrottle.cli import limit

    request = request_from(options)
    start_logging(request.verbose)
    sys.exit(limit.limit(request, limit.Wanted(**options)))


def _refuse_options_in_front(ctx: click.Context) -> None:
    name = ctx.invoked_subcommand or ""
    command = cli.commands.get(name)
    for parameter in ctx.command.params:
        if command is None or not _is_given(ctx, parameter):
            continue
        option = parameter.opts[-1]
        if option in _options_of(command):
            raise click.UsageError(f"{option} must come after {name!r}")
        raise click.UsageError(
            f"{name!r} does not accept {option}; it is an option of the bare command"
            f" (pybpfthrottle {option} ...)"
        )


def _is_given(ctx: click.Context, parameter: click.Parameter) -> bool:
    return bool(ctx.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE)


def _options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def _where_it_belongs(error: click.NoSuchOption) -> Optional[str]:
    """Return what to say about an option that another command has, or None."""
    option, ctx = error.option_name, error.ctx
    if ctx is None or not option.startswith("--"):
        return None
    if ctx.command is not cli and option in _options_of(cli):
        instead = "; use --json-file FILE" if (ctx.info_name, option) == ("run", "--json") else ""
        return (
            f"{ctx.info_name!r} does not accept {option}; it is an option of the bare command"
            f" (pybpfthrottle {option} ...){instead}"
        )
    found = [name for name, command in cli.commands.items() if option in _options_of(command)]
    if not found or (ctx.parent is not None and ctx.parent.command is not cli):
        return None
    first = "run" if "run" in found else found[0]
    return f"{option} is an option of {first!r}: pybpfthrottle {first} {option} ..."


@cli.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""
\b
Examples:
  pybpfthrottle run --upload-limit 500K -- rsync -a /home backup:
  pybpfthrottle run --download-limit 8mbit --user www-data -- ./crawl
  pybpfthrottle run --download-limit 2M --prove --record rates.csv -- apt-get upgrade
  pybpfthrottle run --netns --delay 80ms --loss 1% -- ./upload
""",
)
@limit_options
@click.option(
    "--user",
    metavar="NAME[:GROUP]",
    shell_complete=completing.users,
    help="Run the command as this user instead of this one.",
)
@click.option(
    "--wait", is_flag=True, help="Keep the limit while processes of the command outlive it."
)
@click.option(
    "--netns",
    is_flag=True,
    help="Give the command a network namespace, so that a bad network impairs what it sends as well"
    " as what it receives. Its addresses are others then.",
)
@click.option(
    "--json-file",
    type=click.File("w", lazy=False),
    help="Write one JSON object per line to this file.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(**options: Any) -> None:
    """Run COMMAND with its bandwidth limited, and exit with its exit status.

    The command gets a cgroup of its own, and has the terminal and standard output to itself; the
    live line and the summary go to standard error.
    """
    from pybpfthrottle.cli import run as run_command

    request = request_from(options)
    start_logging(request.verbose)
    sys.exit(run_command.run(request, **options))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle run --download-limit 2M --record rates.csv -- apt-get upgrade
  pybpfthrottle plot rates.csv
  pybpfthrottle plot rates.csv -o rates.svg
  sudo pybpfthrottle --pid 1234 -d 2M --duration 1m --record - | pybpfthrottle plot -
""",
)
@click.argument("file", type=click.File(errors="replace"))
@click.option(
    *("-o", "--output"),
    metavar="PICTURE",
    help="Draw a picture, .svg, .png or .pdf. Needs matplotlib.",
)
@click.option(
    "--direction",
    type=click.Choice([str(direction) for direction in Direction]),
    help="Show only downloads, or only uploads.",
)
def plot(file: TextIO, output: Optional[str], direction: Optional[str]) -> None:
    """Show the rates, limits, drops and round trips that were recorded in FILE.

    FILE is what --record, --json-file, a limit's --json or monitor --json has written; - is
    standard input.
    """
    from pybpfthrottle.cli import plot as plot_command

    plot_command.plot(file, output, direction)


@cli.command(
    epilog="""
\b
Examples:
  pybpfthrottle profiles
  pybpfthrottle profiles --json | jq -r '.profiles[].name'
  sudo pybpfthrottle run --profile 3g -- chromium
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def profiles(as_json: bool) -> None:
    """List the networks that --profile knows by name, with their numbers.

    Own ones are tables of profiles.toml, beside the configuration files (see config show).
    """
    from pybpfthrottle.cli import conditions

    conditions.show_profiles(as_json=as_json)


@cli.command(
    "network-helper",
    epilog="""
\b
Examples:
  sudo pybpfthrottle network-helper
  sudo pybpfthrottle network-helper --user ci --socket /run/ci-network.sock
""",
)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    default="/run/pybpfthrottle-network.sock",
    show_default=True,
    help="Listen on this Unix socket; tests find it by PYBPFTHROTTLE_NETWORK_HELPER.",
)
@click.option(
    "--user",
    metavar="NAME",
    shell_complete=completing.users,
    help="Let this user connect; by default the one who called sudo.",
)
def network_helper(path: str, user: Optional[str]) -> None:
    """Give bad networks to the tests of a user who is not root, until Ctrl-C.

    It does nothing to a process that is not the user's own, and ends a network with the connection
    that it was asked for by.
    """
    from pybpfthrottle.cli import conditions

    sys.exit(conditions.help_tests(path, user))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle demo
  sudo pybpfthrottle demo --download-limit 2M --seconds 2
  sudo pybpfthrottle demo --loopback
""",
)
@click.option(
    "-d", "--download-limit", metavar="RATE", default="10M", show_default=True, callback=parse_rate
)
@click.option(
    "-u", "--upload-limit", metavar="RATE", default="5M", show_default=True, callback=parse_rate
)
@click.option(
    "--seconds",
    type=click.IntRange(2, 60),
    default=4,
    show_default=True,
    help="How long each limited transfer takes.",
)
@click.option("--loopback", is_flag=True, help="Use the loopback device instead of namespaces.")
def demo(download_limit: Rate, upload_limit: Rate, seconds: int, loopback: bool) -> None:
    """Show real transfers with and without a limit, between two network namespaces.

    The exit status is 0 only if the limits held.
    """
    from pybpfthrottle.cli import demo as demo_command

    sys.exit(demo_command.demo(download_limit, upload_limit, seconds, loopback=loopback))


def _parse_change(ctx: click.Context, param: click.Parameter, text: Optional[str]) -> Any:
    """Return a limit, None for ``none``, or ... if nothing is given."""
    if text is None:
        return ...
    if text.lower() in ("none", "off"):
        return None
    try:
        return Rate.parse(text)
    except LimitError as error:
        raise click.BadParameter(f"{error}; or none to lift the limit") from error


def _which_options(function: Any) -> Any:
    """Add the options that choose throttles."""
    for option in (
        click.option(
            "--unit",
            metavar="NAME",
            shell_complete=completing.units,
            help="Choose the throttles of a systemd unit.",
        ),
        click.option(
            "--cgroup",
            metavar="PATH",
            shell_complete=completing.cgroups,
            help="Choose the throttles of a cgroup.",
        ),
        click.option(
            "--pid",
            type=ProcessId(),
            help="Choose the throttles that limit this process, or that it keeps in force.",
        ),
        click.argument("name", metavar="[ID]", required=False, shell_complete=completing.throttles),
    ):
        function = option(function)
    return function


@cli.command(
    "list",
    epilog="""
\b
Examples:
  sudo pybpfthrottle list
  sudo pybpfthrottle list --json | jq -r '.throttles[].id'
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_throttles(as_json: bool) -> None:
    """List the throttles that are in force, whoever made them."""
    from pybpfthrottle.cli import throttles

    throttles.show_all(as_json=as_json)


@cli.command(
    "show",
    epilog="""
\b
Examples:
  sudo pybpfthrottle show web
  sudo pybpfthrottle show --pid 1234
  sudo pybpfthrottle show --unit backup --json
""",
)
@_which_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_throttle(as_json: bool, **which: Any) -> None:
    """Show a throttle: what it limits, how, and what it has counted.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.show(_which(which), as_json=as_json)


@cli.command(
    "set",
    epilog="""
\b
Examples:
  pybpfthrottle set k3x9fd --download-limit 2M
  pybpfthrottle set --pid 1234 --upload-limit none
  pybpfthrottle set backup --bpf-attach-method legacy
""",
)
@_which_options
@click.option(
    *("-d", "--download-limit"),
    metavar="RATE|none",
    callback=_parse_change,
    help="Change the download limit, or lift it.",
)
@click.option(
    *("-u", "--upload-limit"),
    metavar="RATE|none",
    callback=_parse_change,
    help="Change the upload limit, or lift it.",
)
@click.option(
    "--bpf-attach-method", type=click.Choice(["link", "legacy"]), help="Attach it by this method."
)
def set_throttle(
    download_limit: Any, upload_limit: Any, bpf_attach_method: Optional[str], **which: Any
) -> None:
    """Change a throttle while it is in force, whoever made it.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    given = {Direction.DOWNLOAD: download_limit, Direction.UPLOAD: upload_limit}
    limits = {direction: rate for direction, rate in given.items() if rate is not ...}
    if not limits and bpf_attach_method is None:
        raise click.UsageError(
            "nothing to change: give --download-limit, --upload-limit or --bpf-attach-method"
        )
    throttles.change(_which(which), limits, bpf_attach_method)


@cli.command(
    "remove",
    epilog="""
\b
Examples:
  sudo pybpfthrottle remove web
  sudo pybpfthrottle remove --unit backup
  sudo pybpfthrottle remove --all
""",
)
@_which_options
@click.option("--all", "all_of_them", is_flag=True, help="Remove all throttles.")
def remove_throttle(all_of_them: bool, **which: Any) -> None:
    """Remove a throttle, whoever made it. The pybpfthrottle that keeps it ends.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.remove(_which(which, all_of_them), all_of_them=all_of_them)


@cli.command(
    "pause",
    epilog="""
\b
Examples:
  sudo pybpfthrottle pause web
  sudo pybpfthrottle pause --pid 1234
""",
)
@_which_options
def pause(**which: Any) -> None:
    """Lift a throttle for now: all packets pass until pybpfthrottle resume.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.pause(_which(which))


@cli.command(
    "resume",
    epilog="""
\b
Examples:
  sudo pybpfthrottle resume web
  sudo pybpfthrottle resume --unit backup
""",
)
@_which_options
def resume(**which: Any) -> None:
    """Put back the limits that pybpfthrottle pause has lifted.

    ID is the id or the name (--label) of a throttle; see pybpfthrottle list.
    """
    from pybpfthrottle.cli import throttles

    throttles.resume(_which(which))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle supervise
  sudo pybpfthrottle supervise k3x9fd

\b
Exit status: 0 done, or nothing to do; 1 no throttle could be kept; 2 wrong usage.
""",
)
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=completing.throttles)
def supervise(ids: tuple[str, ...]) -> None:
    """Keep the throttles of --detach whose process was killed, until they end.

    Any command that limits starts this by itself where it is needed. Without an ID it keeps all of
    them. It counts anew.
    """
    from pybpfthrottle.cli import background

    sys.exit(background.supervise(ids))


def _rules_argument(function: Any) -> Any:
    return click.argument(
        "files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, path_type=str)
    )(function)


@cli.command(
    "apply",
    epilog="""
\b
Examples:
  sudo pybpfthrottle apply --dry-run
  sudo pybpfthrottle apply
  sudo pybpfthrottle apply --diff backups.toml
  sudo pybpfthrottle apply --stop

\b
Exit status: 0 the machine matches the rules; 1 failed, or a mistake in the rules, of which then
nothing is applied; 2 wrong usage.
""",
)
@_rules_argument
@click.option("-n", "--dry-run", is_flag=True, help="Say what would change; change nothing.")
@click.option(
    "--diff", is_flag=True, help="Also say what changes, and which rule goes before which."
)
@click.option("--stop", is_flag=True, help="Remove all limits of rules, and keep none.")
@click.option("--json", "as_json", is_flag=True, help="Print the rules and the changes as JSON.")
def apply_rules(
    files: tuple[str, ...], dry_run: bool, diff: bool, stop: bool, as_json: bool
) -> None:
    """Make the machine match rules, and keep it so.

    FILE is a rules file, or a directory of them. Without one, rules are read from
    /etc/pybpfthrottle/rules.d/*.toml and ~/.config/pybpfthrottle/rules.d/*.toml. A process in the
    background keeps the rules, also for processes that start later; at the next start of the
    machine pybpfthrottle daemon does so.
    """
    from pybpfthrottle.cli import rules

    if stop and (files or dry_run or diff or as_json):
        raise click.UsageError("--stop stands alone")
    sys.exit(rules.apply(files, dry_run=dry_run, diff=diff, stop=stop, as_json=as_json))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle daemon
  sudo pybpfthrottle daemon -v /etc/pybpfthrottle/rules.d
  sudo pybpfthrottle daemon --metrics 9853 --usage

\b
Exit status: 0 told to stop; 1 failed, or a mistake in the rules; 2 wrong usage.
""",
)
@_rules_argument
@click.option(
    "--metrics",
    metavar="[ADDRESS:]PORT",
    help="Serve metrics by HTTP; on this machine only if there is no ADDRESS.",
)
@click.option(
    "--usage",
    "counts",
    is_flag=True,
    help="Count all traffic, for pybpfthrottle usage and --metrics.",
)
@click.option("-v", "--verbose", count=True, help="Log what is done (-v), and how (-vv).")
def daemon(files: tuple[str, ...], metrics: Optional[str], counts: bool, verbose: int) -> None:
    """Keep rules in force until told to stop: pybpfthrottle apply for a service manager.

    SIGHUP has it read the rules again; with mistakes those of before go on. SIGTERM and Ctrl-C
    remove all limits of rules. If it is killed they stay, and the next start takes them over.
    """
    from pybpfthrottle.cli import rules
    from pybpfthrottle.cli.accounts import Accounts
    from pybpfthrottle.endpoint import Address

    start_logging(verbose)
    address = None if metrics is None else Address.parse(metrics)
    sys.exit(rules.daemon(files, Accounts(address, counts)))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle explain 1234
  sudo pybpfthrottle explain --json 1234
""",
)
@click.argument("pid", type=ProcessId())
@_rules_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(pid: int, files: tuple[str, ...], as_json: bool) -> None:
    """Say which rule is for a process, why, and what limits it now."""
    from pybpfthrottle.cli import rules

    sys.exit(rules.explain(pid, files, as_json=as_json))


def _which(given: dict[str, Any], all_of_them: Optional[bool] = None) -> Any:
    from pybpfthrottle.cli.throttles import Which

    which = Which(**given)
    mistake = which.mistake(all_of_them)
    if mistake:
        raise click.UsageError(mistake)
    return which


@cli.command(
    epilog="""
\b
Example:
  sudo pybpfthrottle switch 4711 legacy
""",
)
@click.argument("pid", type=ProcessId())
@click.argument("method", type=click.Choice(["link", "legacy"]))
def switch(pid: int, method: str) -> None:
    """Switch the running instance PID to METHOD.

    The limit stays in force; for a moment, packets are charged twice. This does the same as
    pybpfthrottle set --pid PID --bpf-attach-method METHOD.
    """
    from pybpfthrottle.cli import throttles

    throttles.switch(pid, method)


def _traffic_options(command: Any) -> Any:
    """Add the options that top and monitor share."""
    options = (
        click.option(
            "--interval",
            type=click.FloatRange(min=0.1, max=3600),
            default=1.0,
            metavar="SECONDS",
            help="How often to measure. [default: 1]",
        ),
        click.option(
            "--scope",
            type=click.Choice(["network", "internet", "local", "loopback", "all"]),
            default="network",
            help="Which traffic to show; network is all but loopback. [default: network]",
        ),
        click.option(
            "--by",
            "group",
            type=click.Choice(
                [
                    *("process", "name", "user", "cgroup", "unit", "container"),
                    *("interface", "remote"),
                ]
            ),
            default="process",
            help="Add up what belongs together; remote is the address. [default: process]",
        ),
        click.option(
            "--interface",
            "interfaces",
            multiple=True,
            metavar="NAME",
            shell_complete=completing.interfaces,
            help="Only what passes this interface of a process's network namespace.",
        ),
        click.option(
            "--sort",
            "order",
            type=click.Choice(["rate", "down", "up", "total", "name"]),
            default="rate",
            help="The order of the lines. [default: rate]",
        ),
        click.option("--lines", type=click.IntRange(min=1), help="Show at most so many lines."),
        click.option("--pid", "pids", type=ProcessId(), multiple=True, help="Only this process."),
        click.option(
            "--name",
            "names",
            multiple=True,
            shell_complete=completing.names,
            help="Only processes of this name.",
        ),
        click.option(
            "--user",
            "users",
            multiple=True,
            shell_complete=completing.users,
            help="Only processes of this user.",
        ),
        click.option(
            "--cgroup",
            "cgroups",
            multiple=True,
            shell_complete=completing.cgroups,
            help="Only what is in this cgroup.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _traffic(given: dict[str, Any]) -> Any:
    from pybpfthrottle.cli import top as top_command

    keeps = top_command.kept(*(given.pop(name) for name in ("pids", "names", "users", "cgroups")))
    return top_command.Options(interval_s=given.pop("interval"), keeps=keeps, **given)


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle top
  sudo pybpfthrottle top --by user --scope internet
  sudo pybpfthrottle top --plain --name rsync
  sudo pybpfthrottle top --once --json | jq '.processes[0]'
""",
)
@click.option("--once", is_flag=True, help="Show one interval and end.")
@click.option("--plain", is_flag=True, help="Show a table without keys, until Ctrl-C.")
@_traffic_options
def top(**options: Any) -> None:
    """Show which processes use the line, and how much; limit them by keys.

    The kernel counts the packets of every process in every network namespace from the start of
    this command, with their headers. What belongs to no process has a line of its own.

    On a terminal this takes the whole screen, and ? shows its keys: t limits the selected process,
    or changes its limit, r removes a limit, q quits. A limit that is made here ends with this.
    Where Textual is missing (pip install 'pybpfthrottle[tui]') there is a table without keys.
    """
    from pybpfthrottle.cli import top as top_command

    top_command.top(_traffic(options))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle monitor --pid 1234
  sudo pybpfthrottle monitor --name rsync --by name --record rsync.csv
""",
)
@_traffic_options
@record_option
def monitor(record: Optional[Output], **options: Any) -> None:
    """Print a line every second for each process that uses the line, until Ctrl-C.

    With --json each line is a JSON object; --record writes the same to a file. See pybpfthrottle
    top for what is counted.
    """
    from pybpfthrottle.cli import top as top_command

    if options["as_json"] and record is not None and record.on_stdout:
        raise click.UsageError(BOTH_ON_STDOUT)
    top_command.monitor(_traffic(options), record)


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle usage --record
  sudo pybpfthrottle usage --last 30d
  sudo pybpfthrottle usage --last 4w --by unit
  sudo pybpfthrottle usage --by day --csv
""",
)
@click.option(
    "--last",
    metavar="DAYS",
    default="7d",
    help="How many days, such as 30d or 4w. [default: 7d]",
)
@click.option(
    "--by",
    type=click.Choice(["name", "unit", "container", "user", "rule", "day"]),
    default="name",
    help="What to add up: what processes of a name moved, or what a rule or a throttle has passed."
    " [default: name]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: a row for each day.")
@click.option("--record", "records", is_flag=True, help="Record the usage, until Ctrl-C.")
@click.option(
    "--file", "path", metavar="FILE", help="The file. [default: /var/lib/pybpfthrottle/usage.db]"
)
def usage(path: Optional[str], **options: Any) -> None:
    """Show what was sent and received on the last days, today included.

    The usage is recorded by pybpfthrottle daemon --usage, or by usage --record, which count the
    packets of every process in every network namespace, with their headers, loopback excluded. Days
    are those of local time. 400 of them are kept, and on each at least the hundred that have moved
    the most.
    """
    from pybpfthrottle.cli import usage as usage_command

    usage_command.usage(path, **options)


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle metrics
  sudo pybpfthrottle metrics --output /var/lib/prometheus/node-exporter/pybpfthrottle.prom
  sudo pybpfthrottle metrics --listen 9853

\b
Exit status: 0 done, 1 the throttles could not be read (the metrics say so as well), 2 wrong usage.
""",
)
@click.option(
    *("-o", "--output"),
    metavar="FILE",
    help="Write them to FILE in one step, for node_exporter's textfile collector.",
)
@click.option(
    "--openmetrics", is_flag=True, help="Write OpenMetrics, which node_exporter cannot read."
)
@click.option(
    "--listen",
    metavar="[ADDRESS:]PORT",
    help="Serve them and the traffic by HTTP, until Ctrl-C; on this machine only if there is no"
    " ADDRESS.",
)
def metrics(output: Optional[str], openmetrics: bool, listen: Optional[str]) -> None:
    """Print metrics for Prometheus: the throttles in force, their limits and counters.

    With --listen, also what processes, units, containers and users send and receive.
    """
    from pybpfthrottle.cli import metrics as metrics_command
    from pybpfthrottle.endpoint import Address

    if listen is not None:
        if output is not None or openmetrics:
            raise click.UsageError("--listen serves what is asked for; it has no other options")
        metrics_command.serve(Address.parse(listen))
        return
    sys.exit(metrics_command.write(output, openmetrics=openmetrics))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle sockets --pid 1234
  sudo pybpfthrottle sockets --pid 1234 --pid 1240
  sudo pybpfthrottle sockets --pid 1234 --json | jq '.processes[].sockets[] | select(.covered)'

\b
Exit status: 0 done, 1 a process could not be inspected, 2 wrong usage.
""",
)
@click.option(
    "--pid",
    "pids",
    type=ProcessId(),
    multiple=True,
    required=True,
    help="Inspect this process. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sockets(pids: tuple[int, ...], as_json: bool) -> None:
    """Show a process's sockets, and which throttles limit each one, or why none does."""
    from pybpfthrottle.cli import sockets as sockets_command

    sys.exit(sockets_command.sockets(pids, as_json=as_json))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle backends
  sudo pybpfthrottle backends --try
  sudo pybpfthrottle backends --json | jq '.backends[] | select(.download.available) | .name'

\b
Exit status: 0 done, 1 a packet passed an available backend uncounted (--try), 2 wrong usage.
"""
)
@click.option(
    "--try",
    "try_them",
    is_flag=True,
    help="Also limit a packet by each, between two network namespaces.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(try_them: bool, as_json: bool) -> None:
    """List the ways to limit, whether they work here, and if not, why.

    The best one that can do what was asked is used, unless --download-backend or --upload-backend
    names another one.
    """
    from pybpfthrottle.cli import backends as backends_command

    sys.exit(backends_command.show(as_json=as_json, try_them=try_them))


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle cleanup --dry-run
  sudo pybpfthrottle cleanup
""",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cleanup(dry_run: bool, as_json: bool) -> None:
    """Remove leftovers of a crash: programs, tables of nftables, tc's classes and devices, cgroups.

    Starting a limit does this too. It leaves what other tools have made and running throttles
    alone.
    """
    from pybpfthrottle.cli import cleanup as cleanup_command

    cleanup_command.cleanup(dry_run=dry_run, as_json=as_json)


@cli.command(
    "verify-setup",
    epilog="""
\b
Examples:
  sudo pybpfthrottle verify-setup
  sudo pybpfthrottle verify-setup --pid 1234
  sudo pybpfthrottle verify-setup --json | jq .conclusion
  sudo pybpfthrottle verify-setup --report pybpfthrottle.txt

\b
Exit status: 0 this machine can limit, 1 it cannot, 2 wrong usage.
python -m pybpfthrottle.diagnostics does the same where click and rich are missing.
""",
)
@click.option("--pid", type=ProcessId(), help="Examine the cgroup of this process.")
@click.option(
    "--cgroup", metavar="PATH", shell_complete=completing.cgroups, help="Examine this cgroup."
)
@click.option(
    "--unit",
    metavar="NAME",
    shell_complete=completing.units,
    help="Examine the cgroup of this systemd unit.",
)
@click.option(
    "--root-cgroup",
    is_flag=True,
    help="Also try to attach to the root cgroup (or set PYBPFTHROTTLE_TEST_ROOT_CGROUP=1).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--report",
    metavar="FILE",
    help="Write a text file for a bug report, without names and addresses.",
)
@click.option("-v", "--verbose", is_flag=True, help="Also show the evidence of checks that passed.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; only set the exit status.")
def verify_setup(**options: Any) -> None:
    """Check whether limits work on this machine; if not, say why and how to fix it.

    It tests everything for real, and then removes it again.
    """
    from pybpfthrottle.cli import verify
    from pybpfthrottle.diagnostics import command

    asked = command.Options(**options)
    wrong = command.mistake(asked)
    if wrong:
        raise click.UsageError(wrong)
    sys.exit(verify.verify(asked))


@cli.command(
    epilog="""
\b
Examples:
  pybpfthrottle inspect filter.o
  pybpfthrottle inspect filter.o --types
  pybpfthrottle inspect filter.o --json | jq '.programs[].name'
""",
)
@click.argument("path", metavar="OBJECT", type=click.Path(exists=True, dir_okay=False))
@click.option("--types", "with_types", is_flag=True, help="Also show the types, as C declarations.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, with_types: bool, as_json: bool) -> None:
    """Show what the object file OBJECT contains, and which kernels support it.

    It loads nothing, and needs no privileges.
    """
    from pybpfthrottle.cli import inspect as inspect_command

    inspect_command.inspect(path, as_json=as_json, with_types=with_types)


@cli.group(
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice
  sudo pybpfthrottle cgroup tree
""",
)
def cgroup() -> None:
    """Show which BPF programs are attached to cgroups, whoever attached them."""


@cgroup.command(
    "show",
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice
  sudo pybpfthrottle cgroup show /sys/fs/cgroup/system.slice --effective
""",
)
@click.argument("path", shell_complete=completing.cgroups)
@click.option("--effective", is_flag=True, help="Also show programs inherited from its ancestors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cgroup_show(path: str, effective: bool, as_json: bool) -> None:
    """Show what is attached to the cgroup PATH, at each cgroup hook."""
    from pybpfthrottle.cli import attachments

    attachments.show(path, effective=effective, as_json=as_json)


@cgroup.command(
    "tree",
    epilog="""
\b
Examples:
  sudo pybpfthrottle cgroup tree
  sudo pybpfthrottle cgroup tree /sys/fs/cgroup/user.slice --json
""",
)
@click.argument("path", required=False, shell_complete=completing.cgroups)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cgroup_tree(path: Optional[str], as_json: bool) -> None:
    """Show what is attached at and below PATH, or to all visible cgroups."""
    from pybpfthrottle.cli import attachments

    attachments.tree(path, as_json=as_json)


cli.add_command(bpf)


@cli.group(epilog="\b\nExample:\n  pybpfthrottle config show")
def config() -> None:
    """Show the settings."""


@config.command(epilog="\b\nExample:\n  pybpfthrottle config show --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool) -> None:
    """Print each setting, its value, and where it came from.

    The command line overrides PYBPFTHROTTLE_BPF_ATTACH_METHOD, which overrides the config files
    (the user's before /etc), which override the default.
    """
    from pybpfthrottle.cli import config as config_command

    config_command.show(as_json=as_json)


@cli.command(
    "install-service",
    epilog="""
\b
Examples:
  sudo pybpfthrottle install-service
  pybpfthrottle install-service --dry-run
  sudo pybpfthrottle install-service --uninstall
""",
)
@click.option("--uninstall", is_flag=True, help="Stop, disable and delete the service.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written or deleted.")
def install_service(uninstall: bool, dry_run: bool) -> None:
    """Have systemd run pybpfthrottle daemon, now and after each boot.

    The service has only the capabilities that it needs, and sees no home directories.
    """
    from pybpfthrottle.cli import services

    if uninstall:
        services.uninstall_service(dry_run=dry_run)
    else:
        services.install_service(dry_run=dry_run)


@cli.command(
    "drop-in",
    epilog="""
\b
Examples:
  sudo pybpfthrottle drop-in nginx.service --upload-limit 5M
  sudo pybpfthrottle drop-in backup@.service -u 500K --traffic internet
  pybpfthrottle drop-in nginx.service --upload-limit 5M --dry-run
  sudo pybpfthrottle drop-in nginx.service --remove
""",
)
@click.argument("unit", shell_complete=completing.units)
@drop_in_options
@click.option("--optional", is_flag=True, help="Start UNIT even where it cannot be limited.")
@click.option("--remove", is_flag=True, help="Limit UNIT no longer.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written or deleted.")
def drop_in(unit: str, optional: bool, remove: bool, dry_run: bool, **limits: Any) -> None:
    """Limit the systemd service UNIT whenever it runs, from its first packet on.

    This writes a drop-in for UNIT, and a second service that keeps the limit while UNIT runs. Both
    survive restarts and reboots. If the limit cannot be put in force, UNIT does not start. A
    template, such as backup@.service, limits each of its instances.
    """
    from pybpfthrottle.cli import services
    from pybpfthrottle.linux import systemd

    unit = systemd.service_name(unit)
    options = words_of(limits)
    if remove:
        if options or optional:
            raise click.UsageError("--remove cannot be combined with a limit or --optional")
        services.remove(unit, dry_run=dry_run)
        return
    if not limits["upload_limit"] and not limits["download_limit"]:
        raise click.UsageError("no limit: give --download-limit, --upload-limit or both")
    services.add(unit, services.Limit(options, optional), dry_run=dry_run)


@cli.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle completion bash --install
  pybpfthrottle completion fish --install
  eval "$(pybpfthrottle completion zsh)"
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option(
    "--install",
    is_flag=True,
    help="Write it to where SHELL looks for it: for all users if this is root, else for this user.",
)
def completion(shell: str, install: bool) -> None:
    """Print the script by which SHELL completes this command line.

    It completes commands, options and their values, and the processes, users, units, throttles and
    interfaces of this machine. Throttles are only visible to root.
    """
    from pybpfthrottle.cli import completion as completion_command

    if install:
        completion_command.install(shell, cli)
    else:
        completion_command.show(shell, cli)


def main(argv: Optional[list[str]] = None) -> NoReturn:
    """Run the command line and exit: a failure is one clear line, a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = _status(argv)
    error = _flush(sys.stdout)
    if error is not None and not status:  # what failed before has said why
        if not isinstance(error, BrokenPipeError):
            say(f"error: cannot write: {error.strerror}")
        status = 1
    _flush(sys.stderr)  # what fails has a status already, and that of a command is its own
    sys.exit(status)


def _flush(stream: Optional[TextIO]) -> Optional[OSError]:
    """Write what is left; return why that failed, or None."""
    if stream is None:  # it was closed
        return None
    try:
        stream.flush()
    except OSError as error:
        # Otherwise Python would fail again at exit, with status 120.
        is_device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # Who closes a terminal expects nothing more on it.
        return None if is_device and error.errno == EIO else error
    return None


def _status(argv: Optional[list[str]]) -> int:
    try:
        status = cli.main(argv, prog_name="pybpfthrottle", standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    except click.Abort:
        return 128 + signal.SIGINT
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            where = _where_it_belongs(error)
            if where:
                error.message, error.possibilities = where, None
        with suppress(OSError):
            show_error(error)
        return int(error.exit_code)
    except Error as error:
        say_error(error)
    except BrokenPipeError:
        pass
    except OSError as error:
        unnamed = error.filename is None and error.errno in (ENOSPC, EDQUOT, EFBIG, EIO)
        if unnamed:
            say(f"error: cannot write: {error.strerror}")
        else:
            say_error(error)
    else:
        return status if isinstance(status, int) else 0
    return 1
