"""The live line on a terminal. rich is imported when the first line is drawn, not before."""

from __future__ import annotations

from typing import Any, Optional, TextIO

from pybpfthrottle.cli.say import is_terminal, make_room
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import printable


class LiveLine:
    """One line that is redrawn in place; nothing if the file is not a terminal."""

    def __init__(self, file: TextIO, *, enabled: bool = True) -> None:
        self._file = file
        self.enabled = enabled and is_terminal(file)
        self._console: Optional[Any] = None
        self._drawn = False
        if self.enabled:
            make_room.append(self.clear)

    def draw(self, readings: list[Reading], reason: str = "") -> None:
        """Replace the line. Drawing stops once the terminal is gone.

        ``reason`` says why nothing passes.
        """
        if not self.enabled:
            return
        from rich.console import Console
        from rich.control import Control
        from rich.segment import ControlType
        from rich.text import Text

        self._console = self._console or Console(file=self._file, highlight=False)
        width = max(1, self._console.width - 1)
        forms = [Text(text, no_wrap=True) for text in _forms(readings, reason)]
        text = next((form for form in forms if form.cell_len <= width), forms[-1])
        text.truncate(width, overflow="ellipsis")
        try:
            self._console.control(
                Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
            )
            self._console.print(text, end="")
            self._file.flush()
        except OSError:
            self.enabled = False
        self._drawn = True

    def clear(self) -> None:
        """Clear the line, so that what follows begins on an empty one."""
        if not self.enabled or not self._drawn:
            return
        try:
            self._file.write("\r\x1b[2K")
            self._file.flush()
        except OSError:
            self.enabled = False
        self._drawn = False

    def close(self) -> None:
        """Clear the line for good."""
        self.clear()
        if self.clear in make_room:
            make_room.remove(self.clear)


def _forms(readings: list[Reading], reason: str) -> list[str]:
    """Return the forms of the line, the longest first; each shows every direction."""
    rates = [
        "   ".join(reading.line() for reading in readings),
        "   ".join(reading.short() for reading in readings),
        " ".join(reading.shortest() for reading in readings),
    ]
    why = f"   {printable(reason)}" if reason else ""
    return [f"{form}{why}" for form in rates]
