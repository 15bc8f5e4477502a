"""The table of commands: it says where each is defined and what it does, as the command does."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pybpfthrottle.cli import commands
from pybpfthrottle.cli.commands import TABLE
from pybpfthrottle.cli.commands.bare import cli

ROOT = Path(__file__).resolve().parents[3]
CONTEXT = click.Context(cli, info_name="pybpfthrottle")


def defined() -> list[click.Command]:
    """All commands that the modules define, without those that belong to groups of theirs."""
    found: list[click.Command] = []
    for module in pkgutil.iter_modules(commands.__path__):
        names = vars(importlib.import_module(f"{commands.__name__}.{module.name}"))
        found += [each for each in names.values() if isinstance(each, click.Command)]
    groups = [each for each in found if isinstance(each, click.Group) and each is not cli]
    below = [id(each) for group in groups for each in group.commands.values()]
    return [each for each in found if id(each) not in below]


def test_every_command_is_in_the_table() -> None:
    """Each that a module defines, by its name and once; the bare command is above them."""
    there = [each for each in defined() if each is not cli]
    assert sorted(str(each.name) for each in there) == sorted(TABLE)
    assert {id(each) for each in there} == {id(cli.get_command(CONTEXT, name)) for name in TABLE}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_says_what_the_help_says(name: str) -> None:
    """The command has this name, and this short help, however narrow the terminal is."""
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    assert (command.name, command.hidden) == (name, False)
    for width in range(5, 150):
        assert cli.commands[name].get_short_help_str(width) == command.get_short_help_str(width)
    assert command.get_short_help_str(1000) == TABLE[name][1]


def test_the_help_lists_them_as_click_does() -> None:
    """In the order of the alphabet, with the lines that the commands themselves would give."""
    eager = click.Group(commands={str(each.name): each for each in defined() if each is not cli})
    shown, wanted = (CONTEXT.make_formatter() for _ in range(2))
    cli.format_commands(CONTEXT, shown)
    eager.format_commands(CONTEXT, wanted)
    assert shown.getvalue() == wanted.getvalue()
    assert cli.list_commands(CONTEXT) == sorted(TABLE)


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["--help"], {"bare"}),
        (["--version"], {"bare"}),
        (["--pid", "x"], {"bare"}),
        (["list", "--help"], {"list"}),
        (["run", "--help"], {"run"}),
        (["verify-setup", "--help"], {"machine"}),
    ],
)
def test_only_what_is_called_is_imported(arguments: list[str], imported: set[str]) -> None:
    """Of the modules of commands one is imported: that of the command, or of the bare one."""
    code = (
        "import sys; from pybpfthrottle.cli.app import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    start = f"{commands.__name__}."
    names = done.stderr.splitlines()[-1].split()
    assert {name[len(start) :] for name in names if name.startswith(start)} == imported
