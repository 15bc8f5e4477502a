"""The parts of the full screen: each draws the lines that its place has room for, as they are."""

from __future__ import annotations

from typing import Iterable, Sequence

from textual.content import Content
from textual.events import Click, MouseScrollDown, MouseScrollUp
from textual.message import Message
from textual.widget import Widget

from pybpfthrottle.tui.columns import Cell, Column, fit
from pybpfthrottle.tui.view import CONNECTION_COLUMNS, View

# Colours of the terminal's own palette; without colours the words suffice.
_STYLES = {"strong": "bold", "good": "ansi_green", "bad": "bold ansi_red", "weak": "dim"}


def content(cells: Iterable[Cell]) -> Content:
    """Return cells as text, in which nothing is markup."""
    return Content.assemble(*((cell.text, _STYLES.get(cell.style, "")) for cell in cells))


class Line(Widget):
    """One line, or as many as its text needs if it ``wraps``."""

    def __init__(self, view: View, id: str, *, wraps: bool = False) -> None:
        super().__init__(id=id)
        self._view = view
        self._wraps = wraps
        self._content = Content()

    def show(self, cells: Iterable[Cell]) -> None:
        """Show something else."""
        self._content = content(cells)
        self.refresh(layout=self._wraps)

    def render(self) -> Content:
        """Return the line."""
        if self._wraps:
            return self._content
        return _cut(self._content, self.size.width, self._view)


class Table(Widget, can_focus=True):
    """The rows, with a head; the selected one is always visible."""

    class Moved(Message):
        """Another row was selected."""

    def __init__(self, view: View) -> None:
        super().__init__(id="table")
        self._view = view
        self._first = 0

    @property
    def room(self) -> int:
        """How many rows are visible."""
        return max(1, self.size.height - 1)

    def move(self, by: int) -> None:
        """Select a row that is so far from the selected one."""
        self._view.move_to(self._view.position + by)
        self.post_message(self.Moved())

    def render(self) -> Content:
        """Return the visible rows."""
        view, width = self._view, self.size.width
        position = view.position
        self._first = max(0, min(self._first, position, len(view.rows) - self.room))
        self._first = max(self._first, position - self.room + 1)
        shown = view.rows[self._first : self._first + self.room]
        cells = [view.cells(row) for row in shown]
        lines = _lines(view.columns(), cells, width, view)
        if position - self._first < len(shown):
            selected = lines[1 + position - self._first]
            lines[1 + position - self._first] = Content(selected.plain).stylize("reverse")
        if not view.rows:
            lines.append(Content("counting..." if view.look is None else _nothing(view)))
        return Content("\n").join(lines)

    def on_click(self, event: Click) -> None:
        """Select what was clicked."""
        self._view.move_to(self._first + max(0, event.y - 1))
        self.post_message(self.Moved())

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        """Select the next row."""
        self.move(1)

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        """Select the row before."""
        self.move(-1)


class Panel(Widget):
    """What the selected row has: its limits and its connections."""

    def __init__(self, view: View) -> None:
        super().__init__(id="panel")
        self._view = view

    def render(self) -> Content:
        """Return as many connections as there is room for."""
        view, width = self._view, self.size.width
        lines = [Content(view.signs.rule * width).stylize("dim")]
        row = view.row
        if row is not None:
            about = [view.about(row), view.about_limits(row)]
            lines += [_cut(content(cells), width, view) for cells in about if cells]
            cells = [view.connection_cells(one) for one in view.connections[: self.size.height]]
            if cells:
                lines += _lines(CONNECTION_COLUMNS, cells, width, view)
        return Content("\n").join(lines[: self.size.height])


def _nothing(view: View) -> str:
    return "nothing was found" if view.search else "nobody has sent or received anything"


def _lines(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int, view: View
) -> list[Content]:
    placed = fit(columns, width)
    heads = [Cell(column.head, "strong") for column in columns]
    return [
        Content(" ").join(
            _cell(cells[number], room, columns[number].right, view)
            for number, room in placed.items()
        )
        for cells in (heads, *rows)
    ]


def _cell(cell: Cell, width: int, right: bool, view: View) -> Content:
    """Return a cell as wide as its column; of one to the right the end is what matters."""
    text = content([cell])
    if not right:
        return _cut(text, width, view).pad_right(max(0, width - text.cell_length))
    return text[-width:].pad_left(max(0, width - text.cell_length))


def _cut(text: Content, width: int, view: View) -> Content:
    if text.cell_length <= width:
        return text
    return text.truncate(width - 1) + view.signs.cut
