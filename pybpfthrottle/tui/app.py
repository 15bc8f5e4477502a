"""The full screen: a table of who uses the line, the connections of one row, and keys to limit."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Awaitable, Callable, NamedTuple, Optional, Sequence, TypeVar, Union

from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.drivers.linux_driver import LinuxDriver
from textual.events import Event, Key, Resize
from textual.widgets import Input

from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import InForce
from pybpfthrottle.model import Limits, Target
from pybpfthrottle.tui.columns import Cell
from pybpfthrottle.tui.dialogs import Help, LimitDialog, Question
from pybpfthrottle.tui.machine import Source
from pybpfthrottle.tui.view import View, target_of, throttles_of
from pybpfthrottle.tui.widgets import Line, Panel, Table

T = TypeVar("T")

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Selecting row after row does not look at the connections of each.
_REST_S = 0.1
# Below this height the table has the whole screen.
_LEAST_FOR_PANEL = 14


class _Key(NamedTuple):
    """What Textual calls a key; what it does; its name here, a word, and a line for the help."""

    keys: str
    action: str
    name: str
    word: str
    meaning: str

    @property
    def short(self) -> str:
        """Return its name, if it has several the first one."""
        return self.name.partition(",")[0]


_KEYS = (
    _Key("t,enter", "throttle", "t", "limit", "limit the selected row, or change its limit"),
    _Key("p", "pause", "p", "pause", "pause its limit, or put it back"),
    _Key("r,delete", "remove", "r", "remove", "remove its limit"),
    _Key("s,right", "sort(1)", "s, right", "sort", "sort by rate, down, up, total or name"),
    _Key("S", "turn_round", "S", "", "sort the other way round"),
    _Key("g", "group", "g", "group", "by name, user, cgroup, unit, container or interface"),
    _Key("i", "scope", "i", "scope", "network, internet, local, loopback or all traffic"),
    _Key("n", "interface", "n", "", "one network interface after the other, or all"),
    _Key("slash", "search", "/", "search", "show only what has a text; Escape shows all"),
    _Key("space", "freeze", "Space", "freeze", "freeze the picture, and go on"),
    _Key("ctrl+z", "suspend_process", "Ctrl-Z", "", "suspend this, until fg in the shell"),
    _Key("question_mark,f1,h", "help", "?", "help", "show this"),
    _Key("q", "leave", "q", "quit", "quit, which ends the limits that were made here"),
)
# What the last line leaves out first, where there is no room.
_LEAST_IMPORTANT = ("Space", "i", "g", "s, right", "p", "/", "r", "t", "?", "q")
_FAR = 1 << 30
_MOVES = (
    ("down,j", "move(1)"),
    ("up,k", "move(-1)"),
    ("pagedown", "page(1)"),
    ("pageup", "page(-1)"),
    ("home", f"move({-_FAR})"),
    ("end", f"move({_FAR})"),
    ("left", "sort(-1)"),
    ("escape", "show_all"),
    ("ctrl+c", "leave_always"),
)
_ACTIONS = {name.partition("(")[0] for _, name, *_ in (*_KEYS, *_MOVES)}


class _Patient:
    """A terminal that takes everything, even once it is gone: the writing thread has to go on."""

    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal

    def write(self, text: str) -> None:
        """Write, as far as anybody reads."""
        with suppress(OSError):
            self._terminal.write(text)

    def flush(self) -> None:
        """Flush, as far as anybody reads."""
        with suppress(OSError):
            self._terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


class _Driver(LinuxDriver):
    """Textual's driver, which waits for ever for a thread that has failed to write."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._file: Any = _Patient(self._file)


class Top(App[None]):
    """The full screen. ``failure`` is why it ended, if it was an error."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "pybpfthrottle"
    BINDINGS = [  # noqa: RUF012 - Textual's
        # With priority: in the order in which they come, even if they come at once.
        *(Binding(one.keys, one.action, show=False, priority=True) for one in _KEYS),
        *(Binding(key, action, show=False, priority=True) for key, action in _MOVES),
    ]
    CSS = """
    Screen { background: ansi_default; color: ansi_default; overflow: hidden; }
    Line { height: 1; text-wrap: nowrap; }
    #message { height: auto; max-height: 4; text-wrap: wrap; display: none; }
    Table { height: 1fr; text-wrap: nowrap; }
    Panel { height: 33%; text-wrap: nowrap; }
    Panel.hidden { display: none; }
    Input, Input:focus { border: none; height: 1; padding: 0; background: ansi_default;
        color: ansi_default; }
    #search { display: none; }
    Dialog { align: center middle; background: transparent; }
    #box { width: 72; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
        background: ansi_default; border: round ansi_default; scrollbar-size: 0 0; }
    #box.ascii { border: ascii ansi_default; }
    #said { height: auto; margin-top: 1; }
    #dialog-keys { margin-top: 1; }
    .field { height: 1; }
    .field Label { width: 10; }
    """

    def __init__(self, source: Source, view: View, *, interval_s: float = 1.0) -> None:
        super().__init__(driver_class=_Driver, ansi_color=True)
        self.failure: Optional[Union[Error, OSError]] = None
        self._source = source
        self._view = view
        self._interval_s = interval_s
        # One thread: what it asks the machine may take a while, and is asked one after the other.
        self._thread = ThreadPoolExecutor(1, "machine")

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Line(self._view, "status")
        yield Table(self._view)
        yield Panel(self._view)
        yield Line(self._view, "message", wraps=True)
        search = Input(id="search", placeholder="search", compact=True)
        search.cursor_blink = False
        yield search
        yield Line(self._view, "keys")

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one(Table).focus()
        self._draw()
        self.run_worker(self._watch(), name="watch")
        if not self.is_headless:
            self._end_at_signals()

    def on_resize(self, event: Resize) -> None:
        """Leave out what has no room."""
        self.query_one(Panel).set_class(event.size.height < _LEAST_FOR_PANEL, "hidden")
        self._draw_keys()

    async def look(self) -> None:
        """Show what has happened since the last look. Raises Error or OSError."""
        look = await self.ask(self._source.look)
        self._view.see(look)
        self.tell([Cell(note) for note in look.notes])
        await self._look_at_connections()

    async def ask(self, function: Callable[..., T], *given: Any) -> T:
        """Have the thread call a function, and wait for what it returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(function, *given))

    def tell(self, cells: Sequence[Cell]) -> None:
        """Show a message until the next key."""
        if cells:
            message = self.query_one("#message", Line)
            message.show(
                [Cell(self._view.plain(cell.text) + " ", cell.style or "strong") for cell in cells]
            )
            message.display = True

    def close(self) -> None:
        """Wait for what the thread is doing."""
        self._thread.shutdown()

    async def _watch(self) -> None:
        try:
            while True:
                await self.look()
                await asyncio.sleep(self._interval_s)
        except (Error, OSError) as error:
            self.failure = error
            self.exit(return_code=1)

    def _end_at_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _ENDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self.exit)

    async def _look_at_connections(self) -> None:
        row = self._view.row
        if row is not None:
            read = await self.ask(self._source.connections, row.members)
            self._view.see_connections(read)
        self._draw()

    def _draw(self) -> None:
        self.query_one("#status", Line).show(self._view.status())
        self.query_one(Table).refresh()
        self.query_one(Panel).refresh()

    def _draw_keys(self) -> None:
        """Show as many keys as there is room for."""
        shown = [one for one in _KEYS if one.word]
        for name in _LEAST_IMPORTANT:
            length = sum(len(f"{one.short} {one.word}   ") for one in shown)
            if length - len("   ") <= self.size.width:
                break
            shown = [one for one in shown if one.name != name]
        cells = [(Cell(one.short, "strong"), Cell(f" {one.word}   ")) for one in shown]
        self.query_one("#keys", Line).show([cell for pair in cells for cell in pair])

    @on(Table.Moved)
    def _moved(self) -> None:
        self._draw()
        self.run_worker(self._rest(), group="connections", exclusive=True)

    async def _rest(self) -> None:
        await asyncio.sleep(_REST_S)
        await self._look_at_connections()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> Optional[bool]:
        """Leave keys to a dialog, and letters to the search."""
        if action not in _ACTIONS:
            return True
        if len(self.screen_stack) > 1:
            return False
        seeks = isinstance(self.focused, Input)
        return not seeks or action in ("show_all", "leave_always")

    async def on_event(self, event: Event) -> None:
        """Forget the message at the next key."""
        if isinstance(event, Key):
            self.query("#message").set(display=False)
        await super().on_event(event)

    def action_move(self, by: int) -> None:
        """Select another row."""
        self.query_one(Table).move(by)

    def action_page(self, pages: int) -> None:
        """Select a row a page further."""
        self.query_one(Table).move(pages * self.query_one(Table).room)

    def action_sort(self, step: int) -> None:
        """Sort by something else."""
        self._view.sort(step)
        self._draw()

    def action_turn_round(self) -> None:
        """Sort the other way round."""
        self._view.turn_round()
        self._draw()

    def action_group(self) -> None:
        """Add up by something else."""
        self._view.next_group()
        self._moved()

    def action_scope(self) -> None:
        """Show other traffic."""
        self._view.next_scope()
        self._draw()

    def action_interface(self) -> None:
        """Show what passes another interface."""
        self._view.next_interface()
        self._draw()

    def action_freeze(self) -> None:
        """Stop the picture, or go on."""
        self._view.frozen = not self._view.frozen
        self._draw()

    def action_search(self) -> None:
        """Ask for what is sought."""
        search = self.query_one("#search", Input)
        search.display, self.query_one("#keys", Line).display = True, False
        self.screen.set_focus(search)

    @on(Input.Changed, "#search")
    def _seek(self, event: Input.Changed) -> None:
        self._view.seek(event.value)
        self._draw()

    @on(Input.Submitted, "#search")
    def _sought(self) -> None:
        search = self.query_one("#search", Input)
        search.display, self.query_one("#keys", Line).display = False, True
        self.screen.set_focus(self.query_one(Table))
        self._moved()

    def action_show_all(self) -> None:
        """End the search."""
        self.query_one("#search", Input).value = ""
        self._view.seek("")
        self._sought()

    async def action_help(self) -> None:
        """Show the keys."""
        moves = [("up, down, k, j", "select a row; also Page Up, Page Down, Home and End")]
        await self.push_screen(
            Help(self._view, [*moves, *((one.name, one.meaning) for one in _KEYS)])
        )

    async def action_throttle(self) -> None:
        """Ask for limits of the selected row."""
        row = self._view.row
        if row is None:
            return
        try:
            target = target_of(row, self._view.group)
            throttles = throttles_of(row, self._view.group)
        except Error as error:
            self.tell([Cell(f"{error}", "bad")])
            return
        dialog = self._change(target, throttles) if throttles else self._limit(target)
        await self.push_screen(dialog)
        dialog.set_focus(dialog.query_one(Input))

    def _limit(self, target: Target) -> LimitDialog:
        row = self._view.row
        name = self._view.name(row) if row is not None else ""
        extent = _EXTENT.get(self._view.group, "")
        return LimitDialog(
            self._view,
            f"Limit {name}{extent}",
            before={},
            foresee=lambda limits: self.ask(self._source.foresee, target, limits),
            confirm=lambda limits: self.ask(self._source.limit, target, limits),
            lines=["Looking how..."],
        )

    def _change(self, target: Target, throttles: Sequence[InForce]) -> LimitDialog:
        # Limits that are paused are put back, if they are confirmed.
        known: Sequence[Limits] = [each for one in throttles for each in (one.limits, one.paused)]
        before: Limits = {direction: rate for each in known for direction, rate in each.items()}
        return LimitDialog(
            self._view,
            f"Change the limit of {', '.join(one.target for one in throttles)}",
            before=before,
            foresee=None,
            confirm=lambda limits: self.ask(self._source.change, throttles, target, limits),
            lines=_kept_by(throttles),
        )

    def action_pause(self) -> None:
        """Pause the limit of the selected row, or put it back."""
        throttles = self._limiting()
        if throttles:
            self._do(lambda: self.ask(self._source.pause, throttles))

    async def action_remove(self) -> None:
        """Ask whether to remove the limit of the selected row."""
        throttles = self._limiting()
        if throttles:
            title = f"Remove the limit of {', '.join(one.target for one in throttles)}?"
            question = Question(self._view, title, _kept_by(throttles))
            await self.push_screen(question, lambda yes: self._remove(throttles) if yes else None)

    def _limiting(self) -> Sequence[InForce]:
        """Return the throttles of the selected row; if there are none, tell why."""
        row = self._view.row
        if row is None:
            return ()
        try:
            throttles = throttles_of(row, self._view.group) if row.throttles else ()
        except Error as error:
            self.tell([Cell(str(error), "bad")])
            return ()
        if not throttles:
            self.tell([Cell(f"{self._view.name(row)} is not limited")])
        return throttles

    def _remove(self, throttles: Sequence[InForce]) -> None:
        async def remove() -> str:
            await self.ask(self._source.remove, throttles)
            return "Removed."

        self._do(remove)

    def _do(self, work: Callable[[], Awaitable[str]]) -> None:
        """Have something done, and tell what it was, or why not."""

        async def do() -> None:
            try:
                self.tell([Cell(await work(), "good")])
            except (Error, OSError) as error:
                self.tell([Cell(str(error), "bad")])

        self.run_worker(do())

    async def action_leave(self) -> None:
        """End, after a question if limits end with this."""
        own = list(self._source.own())
        if not own:
            self.exit()
            return
        question = Question(self._view, "Quit? What was limited here ends with this:", own)
        await self.push_screen(question, lambda yes: self.exit() if yes else None)

    async def action_leave_always(self) -> None:
        """End, also where q is a letter."""
        await self.action_leave()

    async def action_quit(self) -> None:
        """End at Ctrl-Q, a key of Textual's own, in the same way."""
        await self.action_leave()


_EXTENT = {
    "process": ", and what it starts",
    "name": ": all processes of this name, and what they start",
    "user": ": all processes of this user",
}


def _kept_by(throttles: Sequence[InForce]) -> list[str]:
    return [
        ", ".join(f"{direction} {one.limit(direction)}" for direction in one.limits)
        + f", made by {one.owner}"
        for one in throttles
    ]
