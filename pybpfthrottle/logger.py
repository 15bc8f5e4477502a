"""Loggers that leave logging alone until somebody else has imported it, to read what is written.

That takes a tenth of a start, and most starts log nothing.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import logging

# The levels of logging.
DEBUG, INFO, WARNING = 10, 20, 30


class Logger:
    """The logger of a name, with the methods of logging.Logger."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        """Return a method of the logger, or what does nothing where nobody listens."""
        return getattr(_logger(self._name), method) if "logging" in sys.modules else _ignore


def log_to(stream: TextIO) -> None:
    """Have what is logged go to another stream, if it goes to one."""
    if "logging" in sys.modules:
        import logging

        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(stream)


@cache
def _logger(name: str) -> logging.Logger:
    import logging

    # A library prints nothing by itself.
    package = logging.getLogger("pybpfthrottle")
    if not package.handlers:
        package.addHandler(logging.NullHandler())
    return logging.getLogger(name)


def _ignore(*_: object, **__: object) -> None:
    pass
