"""The log on standard error: -v says what is done, -vv how."""

from __future__ import annotations

import logging
from typing import Any

from pybpfthrottle.cli.say import clear_the_line
from pybpfthrottle.model import printable


def start(verbose: int) -> None:
    """Log according to the number of -v; without any, nothing but one-line errors."""
    logging.addLevelName(logging.WARNING, "WARN")
    level = (logging.CRITICAL, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = ToTerminal()
    handler.setFormatter(OneLine("%(levelname)-5s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class OneLine(logging.Formatter):
    """Formats a record as one line, except for the traceback of a bug."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, with unprintable characters escaped."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return the traceback with each line escaped."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class ToTerminal(logging.StreamHandler):  # type: ignore[type-arg]  # no generic before 3.11
    """Log lines to standard error, each on a line of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        clear_the_line()
        super().emit(record)
