"""The command line: one command is called, and its end is an exit status."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from io import TextIOWrapper
from typing import NoReturn, Optional, TextIO

import click

from pybpfthrottle.cli.commands import TABLE, Commands
from pybpfthrottle.cli.say import say, say_error, show_error
from pybpfthrottle.errors import Error

_INTERRUPTED = 130  # as shells tell SIGINT


def main(argv: Optional[list[str]] = None) -> NoReturn:
    """Run the command line and exit: a failure is one clear line, a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = _status(argv)
    error = _flush(sys.stdout)
    if error is not None and not status:  # what failed before has said why
        if not isinstance(error, BrokenPipeError):
            say(f"error: cannot write: {error.strerror}")
        status = 1
    _flush(sys.stderr)  # what fails has a status already, and that of a command is its own
    sys.exit(status)


def _flush(stream: Optional[TextIO]) -> Optional[OSError]:
    """Write what is left; return why that failed, or None."""
    if stream is None:  # it was closed
        return None
    try:
        stream.flush()
    except OSError as error:
        # Otherwise Python would fail again at exit, with status 120.
        is_device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # Who closes a terminal expects nothing more on it.
        return None if is_device and error.errno == EIO else error
    return None


def _status(argv: Optional[list[str]]) -> int:
    try:
        status = _entry(argv).main(argv, prog_name="pybpfthrottle", standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    except (click.Abort, KeyboardInterrupt):  # the second while a command is imported
        return _INTERRUPTED
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            from pybpfthrottle.cli import misplaced

            where = misplaced.where_it_belongs(error)
            if where:
                error.message, error.possibilities = where, None
        with suppress(OSError):
            show_error(error)
        return int(error.exit_code)
    except Error as error:
        say_error(error)
    except BrokenPipeError:
        pass
    except OSError as error:
        unnamed = error.filename is None and error.errno in (ENOSPC, EDQUOT, EFBIG, EIO)
        if unnamed:
            say(f"error: cannot write: {error.strerror}")
        else:
            say_error(error)
    else:
        return status if isinstance(status, int) else 0
    return 1


def _entry(argv: Optional[list[str]]) -> click.Group:
    """Return the bare command, or only those below it if one of them comes first.

    The bare command has some forty options, and none of them can be given then.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in TABLE:
        return Commands()
    from pybpfthrottle.cli.commands import bare

    return bare.cli
