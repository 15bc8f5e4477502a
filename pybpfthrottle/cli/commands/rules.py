"""pybpfthrottle apply, daemon and explain: limits by rules."""

from __future__ import annotations

import sys
from typing import Any, Optional

import click

from pybpfthrottle.cli.values import ProcessId


def _rules_argument(function: Any) -> Any:
    return click.argument(
        "files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, path_type=str)
    )(function)


@click.command(
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


@click.command(
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
    from pybpfthrottle.cli.options import start_logging
    from pybpfthrottle.endpoint import Address

    start_logging(verbose)
    address = None if metrics is None else Address.parse(metrics)
    sys.exit(rules.daemon(files, Accounts(address, counts)))


@click.command(
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
