"""The bare command limits what already runs; all other commands are below it."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.core import ParameterSource

from pybpfthrottle import __version__
from pybpfthrottle.cli import completing
from pybpfthrottle.cli.commands import Commands
from pybpfthrottle.cli.options import BackendOption, limit_options, request_from, start_logging
from pybpfthrottle.cli.say import echo_lines
from pybpfthrottle.cli.values import ProcessId

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
    cls=Commands,
    invoke_without_command=True,
    epilog=_EPILOG,
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
        from pybpfthrottle.cli import misplaced

        misplaced.refuse_options_in_front(ctx)
        return
    if options.pop("list_backends"):
        from pybpfthrottle.cli import backends as backends_command

        backends_command.show(as_json=options["as_json"], try_them=False)
        return
    if not any(ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE for name in options):
        if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
            ctx.invoke(ctx.command.get_command(ctx, "top"))
            return
        echo_lines(ctx.get_help(), err=True)
        ctx.exit(2)
    from pybpfthrottle.cli import limit

    request = request_from(options)
    start_logging(request.verbose)
    sys.exit(limit.limit(request, limit.Wanted(**options)))
