"""pybpfthrottle bpf: the commands that load BPF objects, and show what the kernel has of them."""

from __future__ import annotations

from typing import Any, Callable, Optional, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _one_or_more(function: F) -> F:
    """Add the argument and the option that choose objects of the system."""
    option = click.option("--name", help="Choose by this name instead of by id or path.")
    argument = click.argument("target", metavar="[ID|PATH]", required=False)
    decorated: F = argument(option(function))
    return decorated


@click.group(
    epilog="""
\b
Examples:
  pybpfthrottle bpf load filter.o
  pybpfthrottle bpf prog list
  pybpfthrottle bpf map dump --name counts
"""
)
def bpf() -> None:
    """Load BPF objects; show the programs, maps and links of the system.

    Choose an object by its id, by the path that it is pinned to, or by --name.
    """


@bpf.command(
    epilog="""
\b
Examples:
  pybpfthrottle bpf load filter.o
  pybpfthrottle bpf load filter.o --program ingress --pin /sys/fs/bpf/filter
"""
)
@click.argument("path", metavar="OBJECT", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--pin",
    "directory",
    metavar="DIR",
    help="Pin the programs in this directory of a bpf file system, and the maps in DIR/maps.",
)
@click.option(
    "--program",
    "names",
    metavar="NAME",
    multiple=True,
    help="Load only this program. May be repeated.",
)
@click.option("--log", is_flag=True, help="Print the verifier's full log if it rejects a program.")
@_json
def load(
    path: str, directory: Optional[str], names: tuple[str, ...], log: bool, as_json: bool
) -> None:
    """Load the object file OBJECT, as built by clang, and show what was loaded.

    Without --pin everything is unloaded again: this only shows whether the kernel accepts the
    object, and if not, why.
    """
    from pybpfthrottle.cli import bpf_load

    bpf_load.load(path, directory, names, show_log=log, as_json=as_json)


@bpf.command(
    "compile",
    epilog="""
\b
Examples:
  pybpfthrottle bpf compile flows.bpf.c
  pybpfthrottle bpf compile flows.bpf.c -o flows.o -D LIMIT=100
  pybpfthrottle bpf compile flows.bpf.c --headers include
""",
)
@click.argument("source", metavar="SOURCE", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", metavar="OBJECT", help="Write the object here.")
@click.option("-D", "defines", metavar="NAME[=VALUE]", multiple=True, help="Define a macro.")
@click.option("-I", "includes", metavar="DIR", multiple=True, help="Look for headers here too.")
@click.option(
    "--headers",
    metavar="DIR",
    help="Keep vmlinux.h and the other headers in this directory, for editors and the next time.",
)
def compile_(
    source: str,
    output: Optional[str],
    defines: tuple[str, ...],
    includes: tuple[str, ...],
    headers: Optional[str],
) -> None:
    """Compile SOURCE, a C file, to a BPF object with clang.

    Provides vmlinux.h, made of the running kernel's types, and bpf/bpf_helpers.h, bpf_core_read.h,
    bpf_tracing.h, bpf_endian.h and usdt.bpf.h. SOURCE.c becomes SOURCE.o. $CLANG may name the
    compiler.
    """
    from pybpfthrottle.cli import bpf_load

    flags = [*(f"-D{macro}" for macro in defines), *(f"-I{path}" for path in includes)]
    bpf_load.compile_source(source, output, flags, headers)


@bpf.command(
    epilog="""
\b
Examples:
  pybpfthrottle bpf stubs flows.o > flows.py
  pybpfthrottle bpf stubs flows.o --type report > flows.py
"""
)
@click.argument("path", metavar="OBJECT", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--type",
    "types",
    metavar="NAME",
    multiple=True,
    help="Add a struct, union or enum that no map or variable has. May be repeated.",
)
def stubs(path: str, types: tuple[str, ...]) -> None:
    """Print a Python module with the maps, programs, variables and types of OBJECT.

    Each has its own type, so that type checkers and editors know what is in the object. The text is
    a module to import; as a .pyi file it is a stub.
    """
    from pybpfthrottle.bpf.obj import elf
    from pybpfthrottle.bpf.obj import stubs as generator
    from pybpfthrottle.cli import bpf_show
    from pybpfthrottle.cli.say import echo_lines

    with bpf_show.refused(f"read {path}"):
        spec = elf.read_file(path)
        with elf.naming(path):
            text = generator.module(spec, path, types)
    echo_lines(text.rstrip("\n"))


@bpf.group(epilog="\b\nExample:\n  pybpfthrottle bpf prog show --name ingress")
def prog() -> None:
    """Show programs."""


@prog.command("list", epilog="\b\nExample:\n  pybpfthrottle bpf prog list --json")
@_json
def prog_list(as_json: bool) -> None:
    """List all programs of the system."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.PROGRAMS, None, None, as_json=as_json)


@prog.command("show", epilog="\b\nExample:\n  pybpfthrottle bpf prog show --name ingress")
@_one_or_more
@_json
def prog_show(target: Optional[str], name: Optional[str], as_json: bool) -> None:
    """Show what the kernel reports about a program."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.PROGRAMS, target, name, as_json=as_json)


@prog.command("dump", epilog="\b\nExample:\n  pybpfthrottle bpf prog dump 42")
@_one_or_more
@_json
def prog_dump(target: Optional[str], name: Optional[str], as_json: bool) -> None:
    """Print a program's instructions as text, as the verifier rewrote them."""
    from pybpfthrottle.cli import bpf_dump

    bpf_dump.dump_program(target, name, as_json=as_json)


@bpf.group("map", epilog="\b\nExample:\n  pybpfthrottle bpf map list")
def map_() -> None:
    """Show maps."""


@map_.command("list", epilog="\b\nExample:\n  pybpfthrottle bpf map list --json")
@_json
def map_list(as_json: bool) -> None:
    """List all maps of the system."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.MAPS, None, None, as_json=as_json)


@map_.command("show", epilog="\b\nExample:\n  pybpfthrottle bpf map show /sys/fs/bpf/filter/maps/x")
@_one_or_more
@_json
def map_show(target: Optional[str], name: Optional[str], as_json: bool) -> None:
    """Show what the kernel reports about a map."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.MAPS, target, name, as_json=as_json)


@map_.command("dump", epilog="\b\nExample:\n  pybpfthrottle bpf map dump --name counts --json")
@_one_or_more
@_json
def map_dump(target: Optional[str], name: Optional[str], as_json: bool) -> None:
    """Print a map's elements: by field name where it has BTF, else in hex."""
    from pybpfthrottle.cli import bpf_dump

    bpf_dump.dump_map(target, name, as_json=as_json)


@bpf.group(epilog="\b\nExample:\n  pybpfthrottle bpf link show 7")
def link() -> None:
    """Show links."""


@link.command("list", epilog="\b\nExample:\n  pybpfthrottle bpf link list --json")
@_json
def link_list(as_json: bool) -> None:
    """List all links of the system."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.LINKS, None, None, as_json=as_json)


@link.command("show", epilog="\b\nExample:\n  pybpfthrottle bpf link show 7")
@click.argument("target", metavar="ID|PATH")
@_json
def link_show(target: str, as_json: bool) -> None:
    """Show what the kernel reports about a link."""
    from pybpfthrottle.cli import bpf_show

    bpf_show.show(bpf_show.LINKS, target, None, as_json=as_json)
