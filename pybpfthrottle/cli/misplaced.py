"""Options that stand where they are not known: which command has them, and where they belong."""

from __future__ import annotations

from typing import Iterator, Optional

import click
from click.core import ParameterSource

from pybpfthrottle.cli.commands import TABLE
from pybpfthrottle.cli.commands.bare import cli


def refuse_options_in_front(ctx: click.Context) -> None:
    """Raise a usage error if options of the bare command stand before a command."""
    name = ctx.invoked_subcommand or ""
    command = cli.get_command(ctx, name)
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


def where_it_belongs(error: click.NoSuchOption) -> Optional[str]:
    """Return what to say about an option that another command has, or None."""
    option, ctx = error.option_name, error.ctx
    if ctx is None or not option.startswith("--"):
        return None
    if ctx.parent is not None and option in _options_of(cli):
        instead = "; use --json-file FILE" if (ctx.info_name, option) == ("run", "--json") else ""
        return (
            f"{ctx.info_name!r} does not accept {option}; it is an option of the bare command"
            f" (pybpfthrottle {option} ...){instead}"
        )
    if ctx.parent is not None and ctx.parent.parent is not None:
        return None
    found = list(_commands_with(option, ctx))
    if not found:
        return None
    first = "run" if "run" in found else found[0]
    return f"{option} is an option of {first!r}: pybpfthrottle {first} {option} ..."


def _commands_with(option: str, ctx: click.Context) -> Iterator[str]:
    for name in TABLE:
        command = cli.get_command(ctx, name)
        if command is not None and option in _options_of(command):
            yield name
