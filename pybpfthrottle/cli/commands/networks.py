"""pybpfthrottle profiles and network-helper: bad networks by name, and for tests."""

from __future__ import annotations

import sys
from typing import Optional

import click

from pybpfthrottle.cli import completing


@click.command(
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


@click.command(
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
