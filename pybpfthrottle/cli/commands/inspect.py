"""pybpfthrottle inspect: what an object file contains."""

from __future__ import annotations

import click


@click.command(
    epilog="""
\b
Examples:
  pybpfthrottle inspect filter.o
  pybpfthrottle inspect filter.o --types
  pybpfthrottle inspect filter.o --json | jq '.programs[].name'
""",
)
@click.argument("path", metavar="OBJECT", type=click.Path(exists=True, dir_okay=False))
@click.option("--types", "with_types", is_flag=True, help="Also show the types, as C declarations.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, with_types: bool, as_json: bool) -> None:
    """Show what the object file OBJECT contains, and which kernels support it.

    It loads nothing, and needs no privileges.
    """
    from pybpfthrottle.cli import inspect as inspect_command

    inspect_command.inspect(path, as_json=as_json, with_types=with_types)
