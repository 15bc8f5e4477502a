"""What is asked before something is limited, changed, removed or ended; and the help."""

from __future__ import annotations

from typing import Awaitable, Callable, Optional, Sequence

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from pybpfthrottle.errors import Error, LimitError
from pybpfthrottle.model import Direction, Limits, Rate
from pybpfthrottle.tui.columns import Cell
from pybpfthrottle.tui.view import ASCII, View
from pybpfthrottle.tui.widgets import content


class Dialog(ModalScreen[bool]):
    """A box above the table, with a title and a line of keys. Escape closes it: False."""

    BINDINGS = [  # noqa: RUF012 - Textual's
        Binding("escape", "close", priority=True),
        Binding("ctrl+c", "close", priority=True),
    ]

    def __init__(self, view: View, title: str, keys: str) -> None:
        super().__init__()
        self._view = view
        self._title = title
        self._keys = keys

    def compose(self) -> ComposeResult:
        """Lay out the box."""
        with VerticalScroll(id="box", classes="ascii" if self._view.signs is ASCII else ""):
            yield Static(content([Cell(self._view.plain(self._title), "strong")]))
            yield from self.inside()
            yield Static(content([Cell(self._keys, "weak")]), id="dialog-keys")

    def inside(self) -> ComposeResult:
        """Lay out what is between the title and the keys."""
        yield from ()

    def say(self, cells: Sequence[Cell]) -> None:
        """Show other lines in the middle, one for each cell."""
        plain = [Cell(self._view.plain(cell.text) + "\n", cell.style) for cell in cells]
        self.query_one("#said", Static).update(content(plain))

    def action_close(self) -> None:
        """Close it."""
        self.dismiss(False)


class Question(Dialog):
    """A question: True for yes."""

    BINDINGS = [  # noqa: RUF012 - Textual's
        Binding("y,enter", "yes"),
        Binding("n,q", "close"),
    ]

    def __init__(self, view: View, title: str, lines: Sequence[str]) -> None:
        super().__init__(view, title, "y yes   n no")
        self._lines = lines

    def inside(self) -> ComposeResult:
        """Lay out the lines."""
        for line in self._lines:
            yield Static(content([Cell(self._view.plain(line))]))

    def action_yes(self) -> None:
        """Answer yes."""
        self.dismiss(True)


class Help(Dialog):
    """All keys, and what they do."""

    BINDINGS = [Binding("question_mark,q,enter,f1,h", "close")]  # noqa: RUF012 - Textual's

    def __init__(self, view: View, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__(view, "Keys", "Escape close")
        self._lines = keys

    def inside(self) -> ComposeResult:
        """Lay out a line for each key."""
        for key, meaning in self._lines:
            yield Static(content([Cell(f"{key:<16}", "strong"), Cell(meaning)]))


# Limits as they are given: None where a direction is to have none.
Confirmed = Callable[[Limits], Awaitable[Sequence[str]]]
Foreseen = Callable[[Limits], Awaitable[Sequence[str]]]


class LimitDialog(Dialog):
    """Asks for both limits, and puts them in force; what that means is told before and after.

    True once they are in force.
    """

    AUTO_FOCUS = "Input"
    _KEYS = "Enter confirm   Tab other limit   Escape close"

    def __init__(
        self,
        view: View,
        title: str,
        *,
        before: Limits,
        foresee: Optional[Foreseen],
        confirm: Confirmed,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(view, title, self._KEYS)
        self._before = before
        self._foresee = foresee
        self._confirm = confirm
        self._lines = lines
        self._busy = self._done = False

    def inside(self) -> ComposeResult:
        """Lay out the two fields, and room for what is to be said."""
        for direction in Direction:
            with Horizontal(classes="field"):
                yield Label(f"{direction}:", markup=False)
                rate = self._before.get(direction)
                field = Input(
                    "" if rate is None else rate.written(),
                    placeholder="no limit",
                    id=str(direction),
                    compact=True,
                )
                field.cursor_blink = False
                yield field
        yield Static(content([Cell("such as 500K, 1.5M, or 8mbit; empty: no limit", "weak")]))
        yield Static(id="said")

    def on_mount(self) -> None:
        """Say what is known before."""
        self.say([Cell(line) for line in self._lines])
        self._look_ahead()

    @on(Input.Changed)
    def _look_ahead(self) -> None:
        """Say how what is typed would be put in force, if it can be read."""
        if self._foresee is not None and not self._done:
            self.run_worker(self._tell_ahead(self._foresee), exclusive=True)

    async def _tell_ahead(self, foresee: Foreseen) -> None:
        try:
            limits = self._given() or dict.fromkeys(Direction)
            told = [Cell(line) for line in await foresee(limits)]
        except LimitError:  # not typed to the end, perhaps
            return
        except (Error, OSError) as error:
            told = [Cell(str(error), "bad")]
        if not self._busy and not self._done:
            self.say(told)

    @on(Input.Submitted)
    async def _submitted(self) -> None:
        if self._done:
            self.dismiss(True)
        elif not self._busy:
            self.run_worker(self._put_in_force(), exclusive=True)

    async def _put_in_force(self) -> None:
        try:
            limits = self._given()
            if not limits:
                raise LimitError("give a download limit, an upload limit or both")
            self._busy = True
            self.say([Cell("One moment...")])
            notes = await self._confirm(limits)
        except (Error, OSError) as error:
            self.say([Cell(str(error), "bad")])
        else:
            self._done = True
            if not notes:
                self.dismiss(True)
                return
            self.say([Cell("It is limited now.", "good"), *map(Cell, notes)])
            self.query_one("#dialog-keys", Static).update("Enter close")
        finally:
            self._busy = False

    def _given(self) -> dict[Direction, Optional[Rate]]:
        """Return what is typed; directions without a limit before and after are left out.

        Raises LimitError.
        """
        found: dict[Direction, Optional[Rate]] = {}
        for direction in Direction:
            text = self.query_one(f"#{direction}", Input).value.strip()
            rate = None
            if text.lower() not in ("", "none", "off"):
                try:
                    rate = Rate.parse(text)
                except LimitError as error:
                    raise LimitError(f"{direction}: {error}") from error
            if rate is not None or direction in self._before:
                found[direction] = rate
        return found

    def action_close(self) -> None:
        """Close it, unless a limit is just being put in force."""
        if not self._busy:
            self.dismiss(self._done)
