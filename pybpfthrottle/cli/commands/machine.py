"""pybpfthrottle backends, verify-setup and cleanup: what works here, and what a crash has left."""

from __future__ import annotations

import sys
from typing import Any

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.values import ProcessId


@click.command(
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


@click.command(
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


@click.command(
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
