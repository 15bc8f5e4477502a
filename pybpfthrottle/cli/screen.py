"""The full screen of pybpfthrottle top: whether it is possible here, and for how long."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Mapping, Optional, TextIO

from pybpfthrottle.cli.options import wish_by_settings
from pybpfthrottle.cli.say import is_terminal

# As in setup.cfg: a distribution may have an older one.
_OLDEST_TEXTUAL = 8

if TYPE_CHECKING:
    from pybpfthrottle.cli.top import Options


def is_possible() -> bool:
    """Whether Textual is there, and a terminal on which it can read keys and draw."""
    # It reads from the standard input, and draws on the standard error.
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(map(is_terminal, streams)) and _has_textual()


def _has_textual() -> bool:
    if find_spec("pybpfthrottle.tui") is None:  # a zip that is without
        return False
    try:
        return int(version("textual").partition(".")[0]) >= _OLDEST_TEXTUAL
    except (PackageNotFoundError, ValueError):
        return False


def show(options: Options) -> None:
    """Show who uses the line until it is told to end. Raises an error of this package."""
    from pybpfthrottle.tui.app import Top
    from pybpfthrottle.tui.machine import Machine
    from pybpfthrottle.tui.view import ASCII, UNICODE, View
    from pybpfthrottle.usage import GROUPS

    view = View(
        scope=options.scope,
        group=options.group,
        order=options.order,
        keeps=options.keeps,
        lines=options.lines,
        # Addresses are counted only where they were asked for.
        groups=[one for one in GROUPS if one != "remote" or options.group == "remote"],
        signs=UNICODE if _shows_unicode(sys.stderr, os.environ) else ASCII,
    )
    machine = Machine(wish_by_settings(), options.watch())
    try:
        app = Top(machine, view, interval_s=options.interval_s)
        try:
            app.run()
        finally:
            app.close()
    finally:
        machine.close()
    if app.failure is not None:
        raise app.failure
    if app.return_code:
        sys.exit(app.return_code)


def _shows_unicode(stream: Optional[TextIO], environment: Mapping[str, str]) -> bool:
    """Whether a terminal shows more than ASCII, as far as the locale tells.

    Where no locale is set, Python sets LC_CTYPE itself (PEP 538).
    """
    kind = environment.get("LC_CTYPE", "")
    named = kind if kind != "C.UTF-8" else ""
    locale = environment.get("LC_ALL") or named or environment.get("LANG", "")
    encoding = getattr(stream, "encoding", None) or ""
    return all("utf" in name.lower() for name in (locale, encoding))
