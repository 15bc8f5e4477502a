"""The log on standard error: with -v what is done, with -vv how."""

from __future__ import annotations

import logging
from typing import Any

from pybpfthrottle.cli.say import make_room
from pybpfthrottle.model import printable


def start(verbose: int) -> None:
    """Log as much as -v was given; without, nothing: errors are one line."""
    logging.addLevelName(logging.WARNING, "WARN")
    level = (logging.CRITICAL, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = ToTerminal()
    handler.setFormatter(OneLine("%(levelname)-5s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class OneLine(logging.Formatter):
    """A record as one line, but for the traceback of a bug."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line; what is no text in it is shown escaped."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return the traceback, each line of it escaped."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class ToTerminal(logging.StreamHandler[Any]):
    """Log lines to standard error, each on a line of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        for clear in make_room:
            clear()
        super().emit(record)
