"""pybpfthrottle config: the settings."""

from __future__ import annotations

import click


@click.group(epilog="\b\nExample:\n  pybpfthrottle config show")
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
