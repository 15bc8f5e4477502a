"""pybpfthrottle completion: the scripts by which shells complete."""

from __future__ import annotations

import click


@click.command(
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
    from pybpfthrottle.cli.commands.bare import cli

    if install:
        completion_command.install(shell, cli)
    else:
        completion_command.show(shell, cli)
