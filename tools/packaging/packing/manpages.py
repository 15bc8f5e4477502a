"""Manual pages for section 8, from the commands as click knows them: one for each command."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
import time
from typing import Iterator, NamedTuple

import click

from pybpfthrottle import __version__

SECTION = 8
_HEADINGS = {"Example": "EXAMPLES", "Examples": "EXAMPLES", "Exit status": "EXIT STATUS"}
_HEADED = re.compile(r"({}):\n?(.*)".format("|".join(_HEADINGS)), re.S)

_ENVIRONMENT = {
    "PYBPFTHROTTLE_BPF_ATTACH_METHOD": "auto, link or legacy, as --bpf-attach-method.",
    "NO_COLOR": "If set, nothing is coloured.",
}
_FILES = {
    "/etc/pybpfthrottle/config.toml": "Settings of all users.",
    "$XDG_CONFIG_HOME/pybpfthrottle/config.toml": "Settings of one user, which come first.",
    "/sys/fs/bpf/pybpfthrottle": "What keeps the limits of --detach in the kernel.",
}


class Page(NamedTuple):
    """A manual page: its name, such as ``pybpfthrottle-run``, and its source."""

    name: str
    source: str

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.{SECTION}"


def pages(cli: click.Command) -> Iterator[Page]:
    """Yield the pages of a command and of all commands below it."""
    yield from _pages(cli, click.Context(cli, info_name="pybpfthrottle"))


def _pages(command: click.Command, context: click.Context) -> Iterator[Page]:
    source = "\n".join([*_page(command, context), ""])
    yield Page(_name(context), source)
    for below in _below(command, context):
        yield from _pages(below.command, below)


def _below(command: click.Command, context: click.Context) -> Iterator[click.Context]:
    """Yield the contexts of the commands that a group shows."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield click.Context(below, info_name=name, parent=context)


def _name(context: click.Context) -> str:
    return str(context.command_path).replace(" ", "-")


def _page(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield the lines of a page."""
    name = _name(context)
    yield f'.TH {_escaped(name).upper()} {SECTION} {_date()} "pybpfthrottle {__version__}"'
    yield from (".SH NAME", f"{_escaped(name)} \\- {_escaped(_summary(command))}")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (".SH SYNOPSIS", f".B {_escaped(context.command_path)}", _escaped(usage))
    yield ".SH DESCRIPTION"
    yield from _paragraphs(inspect.cleandoc(command.help or ""))
    yield from _options(command, context)
    yield from _commands(command, context)
    yield from _epilog(command)
    if context.parent is None:
        yield from _listed("ENVIRONMENT", _ENVIRONMENT)
        yield from _listed("FILES", _FILES)
    else:
        yield from (".SH SEE ALSO", f".BR {_escaped(_name(context.parent))} ({SECTION})")


def _date() -> str:
    """Return the day of the sources where a build that can be repeated gives it, or today."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _summary(command: click.Command) -> str:
    return str(command.get_short_help_str(limit=1000)).rstrip(".")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield from _listed("OPTIONS", dict(record for record in records if record is not None))


def _commands(command: click.Command, context: click.Context) -> Iterator[str]:
    found = [(_name(below), _summary(below.command)) for below in _below(command, context)]
    yield from _listed("COMMANDS", {f"{name}({SECTION})": text for name, text in found})


def _listed(heading: str, meanings: dict[str, str]) -> Iterator[str]:
    """Yield a section that lists words, each with its meaning."""
    if meanings:
        yield f".SH {heading}"
    for word, meaning in meanings.items():
        yield from (".TP", f".B {_escaped(word)}", _escaped(meaning))


def _epilog(command: click.Command) -> Iterator[str]:
    """Yield the examples and what else follows the options."""
    for block in _blocks(inspect.cleandoc(command.epilog or "")):
        headed = _HEADED.match(block)
        if headed is None:
            yield from (".SH NOTES", *_paragraphs(block))
        elif _HEADINGS[headed[1]] == "EXAMPLES":
            yield from (".SH EXAMPLES", *_verbatim(textwrap.dedent(headed[2])))
        else:
            yield from (".SH EXIT STATUS", *map(_escaped, headed[2].strip().splitlines()))


def _paragraphs(text: str) -> Iterator[str]:
    for number, block in enumerate(_blocks(text)):
        if number:
            yield ".PP"
        yield from map(_escaped, block.splitlines())


def _blocks(text: str) -> list[str]:
    """Return the paragraphs of a text; click's mark for those that keep their lines is left out."""
    return [block for part in text.split("\n\n") if (block := part.replace("\b", "").strip("\n"))]


def _verbatim(text: str) -> Iterator[str]:
    yield from (".nf", *map(_escaped, text.splitlines()), ".fi")


def _escaped(text: str) -> str:
    """Return roff that shows this very line."""
    line = " ".join(text.split("\n")).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line
