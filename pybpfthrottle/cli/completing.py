"""What a shell may complete besides options: processes, users, units, throttles, interfaces.

Others choose these names, and shells insert them into the command line as they are. So only names
that mean nothing to a shell are offered. What cannot be read without root is left out.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import wraps
from typing import Any, Callable, Iterable, Iterator, Tuple

import click

from pybpfthrottle.errors import Error
from pybpfthrottle.model import printable

# A value, and what it stands for.
_Found = Iterator[Tuple[str, str]]
_Completer = Callable[[click.Context, click.Parameter, str], Any]

# Neither quotes nor blanks, nothing that a shell expands, no option.
_HARMLESS = r"[\w.@:+,/][\w.@:+,/-]*"


def _completer(find: Callable[[], _Found]) -> _Completer:
    """Return what click calls: those of the found values that begin as the word does."""

    @wraps(find)
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        from click.shell_completion import CompletionItem

        found: dict[str, str] = {}
        with suppress(Error, OSError):  # there is no place to say so
            found.update(find())
        return [
            CompletionItem(value, help=printable(meaning) or None)
            for value, meaning in sorted(found.items())
            if value.startswith(incomplete) and re.fullmatch(_HARMLESS, value)
        ]

    return complete


@_completer
def pids() -> _Found:
    """Ids of processes, with their names."""
    for pid, name in _processes():
        yield str(pid), name


@_completer
def names() -> _Found:
    """Names of processes."""
    for _, name in _processes():
        yield name, ""


def _processes() -> Iterable[tuple[int, str]]:
    from pybpfthrottle.linux import process

    running = [pid for pid in process.running() if not process.is_kernel_thread(pid)]
    return [(pid, process.name_of(pid)) for pid in running]


@_completer
def users() -> _Found:
    """Names of users."""
    import pwd

    for user in pwd.getpwall():
        yield user.pw_name, ""


@_completer
def units() -> _Found:
    """Units of systemd that run."""
    from pybpfthrottle.linux import cgroup

    for one in cgroup.walk():
        name = one.path.rpartition("/")[2]
        if cgroup.is_unit(name):
            yield name, ""


@_completer
def throttles() -> _Found:
    """Ids and names of throttles in force."""
    from pybpfthrottle import registry
    from pybpfthrottle.inforce import in_force

    for one in in_force(registry.records()):
        yield one.id, one.target
        if one.record.spec.name:
            yield one.record.spec.name, one.target


@_completer
def profiles() -> _Found:
    """Names of networks that are known by them."""
    from pybpfthrottle.conditions import profiles

    for one in profiles.all_profiles().values():
        yield one.name, one.numbers()


@_completer
def interfaces() -> _Found:
    """Network interfaces of this network namespace."""
    import socket

    for _, name in socket.if_nameindex():
        yield name, ""


def cgroups(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
    """Have the shell complete directories."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]
