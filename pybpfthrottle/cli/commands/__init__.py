"""What people type: each command's options and help, which are imported when it is called.

A module has a command, or a few that belong together, and imports what they do when they do it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Optional

import click

# Where each command is defined, and the first sentence of its help.
TABLE = {
    "run": ("run:run", "Run COMMAND with its bandwidth limited, and exit with its exit status."),
    "plot": (
        "plot:plot",
        "Show the rates, limits, drops and round trips that were recorded in FILE.",
    ),
    "profiles": (
        "networks:profiles",
        "List the networks that --profile knows by name, with their numbers.",
    ),
    "network-helper": (
        "networks:network_helper",
        "Give bad networks to the tests of a user who is not root, until Ctrl-C.",
    ),
    "demo": (
        "demo:demo",
        "Show real transfers with and without a limit, between two network namespaces.",
    ),
    "list": ("list:list_throttles", "List the throttles that are in force, whoever made them."),
    "show": (
        "throttles:show_throttle",
        "Show a throttle: what it limits, how, and what it has counted.",
    ),
    "set": ("throttles:set_throttle", "Change a throttle while it is in force, whoever made it."),
    "remove": ("throttles:remove_throttle", "Remove a throttle, whoever made it."),
    "pause": (
        "throttles:pause",
        "Lift a throttle for now: all packets pass until pybpfthrottle resume.",
    ),
    "resume": ("throttles:resume", "Put back the limits that pybpfthrottle pause has lifted."),
    "supervise": (
        "supervise:supervise",
        "Keep the throttles of --detach whose process was killed, until they end.",
    ),
    "apply": ("rules:apply_rules", "Make the machine match rules, and keep it so."),
    "daemon": (
        "rules:daemon",
        "Keep rules in force until told to stop: pybpfthrottle apply for a service manager.",
    ),
    "explain": ("rules:explain", "Say which rule is for a process, why, and what limits it now."),
    "switch": ("throttles:switch", "Switch the running instance PID to METHOD."),
    "top": ("traffic:top", "Show which processes use the line, and how much; limit them by keys."),
    "monitor": (
        "traffic:monitor",
        "Print a line every second for each process that uses the line, until Ctrl-C.",
    ),
    "usage": ("counted:usage", "Show what was sent and received on the last days, today included."),
    "metrics": (
        "counted:metrics",
        "Print metrics for Prometheus: the throttles in force, their limits and counters.",
    ),
    "sockets": (
        "sockets:sockets",
        "Show a process's sockets, and which throttles limit each one, or why none does.",
    ),
    "backends": (
        "machine:backends",
        "List the ways to limit, whether they work here, and if not, why.",
    ),
    "cleanup": (
        "machine:cleanup",
        (
            "Remove leftovers of a crash: programs, tables of nftables, tc's classes and devices,"
            " cgroups."
        ),
    ),
    "verify-setup": (
        "machine:verify_setup",
        "Check whether limits work on this machine; if not, say why and how to fix it.",
    ),
    "inspect": (
        "inspect:inspect",
        "Show what the object file OBJECT contains, and which kernels support it.",
    ),
    "cgroup": (
        "cgroup:cgroup",
        "Show which BPF programs are attached to cgroups, whoever attached them.",
    ),
    "bpf": ("bpf:bpf", "Load BPF objects; show the programs, maps and links of the system."),
    "config": ("config:config", "Show the settings."),
    "install-service": (
        "services:install_service",
        "Have systemd run pybpfthrottle daemon, now and after each boot.",
    ),
    "drop-in": (
        "services:drop_in",
        "Limit the systemd service UNIT whenever it runs, from its first packet on.",
    ),
    "completion": (
        "completion:completion",
        "Print the script by which SHELL completes this command line.",
    ),
}


class Commands(click.Group):  # type: ignore[misc]  # mypy does not read click
    """The group of all commands. It lists them without importing them."""

    def __init__(self, **given: Any) -> None:
        summaries = {name: click.Command(name, help=text) for name, (_, text) in TABLE.items()}
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        super().__init__(commands=summaries, context_settings=settings, **given)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        """Import a command."""
        if cmd_name not in TABLE:
            return None
        module, _, function = TABLE[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"{__name__}.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them with what the table says."""
        click.Group(commands=self.commands).format_commands(ctx, formatter)
