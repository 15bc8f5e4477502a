"""The full screen on a machine that is made up: its keys, its dialogs, and what it shows."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from made_up import HOSTILE, SCREENS, K, M, MadeUp, Shown, limited, moving, screen, some

from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux import process
from pybpfthrottle.model import Direction, Rate, Target
from pybpfthrottle.traffic import Scope, Usage
from pybpfthrottle.tui.view import ASCII, View
from pybpfthrottle.usage import GROUPS

CURL = Target(pids=(26235,))
DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD


@pytest.fixture(autouse=True)
def _names(monkeypatch) -> None:
    """Processes have the names that they are made up with."""
    names = {26235: "curl", 1840: "rsync", 1: "init"}
    monkeypatch.setattr(process, "name_of", lambda pid: names.get(pid, "?"))


def with_limits() -> MadeUp:
    """Two of the processes are limited, one of them in both directions."""
    source = some()
    source.throttles = [
        limited(CURL, download=Rate(M), upload=Rate(500 * K)),
        limited(Target(pids=(1840,)), key="xyz789", upload=Rate(200 * K)),
    ]
    return source


@pytest.mark.parametrize(
    ("name", "size", "view", "keys"),
    [
        ("table", (80, 24), {}, ()),
        ("ascii", (80, 24), {"signs": ASCII}, ()),
        ("narrow", (46, 12), {}, ()),
        ("wide", (150, 24), {}, ()),
        ("groups", (80, 24), {}, ("g", "g", "g")),
        ("dialog", (80, 24), {}, ("t",)),
        ("help", (80, 24), {}, ("question_mark",)),
        ("remove", (80, 24), {"signs": ASCII}, ("r",)),
    ],
)
def test_a_screen_is_as_it_was(name, size, view, keys) -> None:
    """It is the text in screens/, which UPDATE_SCREENS=1 writes anew."""

    async def compare(shown: Shown) -> None:
        await shown.look()
        await shown.press(*keys)
        path = SCREENS / f"{name}.txt"
        if "UPDATE_SCREENS" in os.environ:
            path.write_text(shown.text())
        assert shown.text() == path.read_text()

    screen(compare, with_limits(), View(**view), size)


@pytest.mark.parametrize("keys", [(), ("question_mark",), ("t",), ("r",), ("slash", "c"), ("g",)])
def test_a_c_locale_gets_ascii_only(keys) -> None:
    """Also for names, which are escaped."""

    async def look(shown: Shown) -> None:
        await shown.look()
        await shown.press(*keys)
        assert shown.text().isascii()

    screen(look, with_limits(), View(signs=ASCII))


@pytest.mark.parametrize("size", [(20, 5), (30, 8), (60, 16), (80, 24), (100, 30), (300, 70)])
def test_whatever_the_size_nothing_is_wider(size) -> None:
    """Each line is exactly as wide as the terminal, and the busiest process is among them."""

    async def look(shown: Shown) -> None:
        assert [strip.cell_length for strip in shown.strips()] == [size[0]] * size[1]
        assert "curl" in shown.text()

    screen(look, with_limits(), size=size)


def test_a_terminal_may_change_its_size() -> None:
    """A low one has no room for connections; a high one has them again."""

    async def resize(shown: Shown) -> None:
        assert "198.51.100.7:443" in shown.text()
        await shown.resize(50, 10)
        assert "198.51.100.7:443" not in shown.text()
        assert "curl" in shown.text()
        await shown.resize(120, 30)
        assert "198.51.100.7:443" in shown.text()

    screen(resize)


def test_hostile_names_are_plain_text() -> None:
    """Neither an escape sequence nor markup nor a newline has an effect, wherever it is shown."""

    async def look(shown: Shown) -> None:
        line = next(line for line in shown.lines() if line.lstrip().startswith("77 "))
        assert r"\x1b[31m[bold]" in line
        await shown.press("down", "down", "t")
        assert r"Limit 77 (\x1b[31m[bold]x\n), and what it starts" in shown.text()
        assert not any(
            character in segment.text
            for strip in shown.strips()
            for segment in strip
            for character in "\x1b\n"
        )

    screen(look)


def test_hostile_searches_are_plain_text_too() -> None:
    """What is pasted into the field is."""

    async def look(shown: Shown) -> None:
        await shown.press("slash", *"[bold]x", "enter")
        assert shown.labels() == [f"77 ({HOSTILE})"]
        assert "search: [bold]x" in shown.lines()[0]

    screen(look)


def test_without_colours_the_selected_row_stands_out(monkeypatch) -> None:
    """NO_COLOR leaves only what is no colour."""
    monkeypatch.setenv("NO_COLOR", "1")

    async def look(shown: Shown) -> None:
        styles = [segment.style for strip in shown.strips() for segment in strip if segment.style]
        assert {style.color.name for style in styles if style.color} <= {"default"}
        assert {style.bgcolor.name for style in styles if style.bgcolor} <= {"default"}
        reverse = ["".join(s.text for s in strip if s.style.reverse) for strip in shown.strips()]
        assert [line.split()[1] for line in reverse if line] == ["curl"]

    screen(look, with_limits())


def test_rows_are_sorted_as_asked() -> None:
    """By rate at first; s goes on to the next, left back, and S turns it round."""

    async def sort(shown: Shown) -> None:
        by_rate = shown.labels()
        await shown.press("s", "s")
        assert shown.view.order == "up"
        assert shown.labels()[:2] == ["1840 (rsync)", "26235 (curl)"]
        await shown.press("left", "left")
        assert shown.labels() == by_rate
        await shown.press("S")
        assert shown.labels() == by_rate[::-1]
        assert "reversed" in shown.lines()[0]

    screen(sort)


def test_the_selection_stays_with_its_row() -> None:
    """Also where that moves, and until it is gone."""

    async def move(shown: Shown) -> None:
        await shown.press("j", "j", "k")
        assert shown.view.selected == "1840 rsync"
        shown.source.processes[1] = moving(1840, "rsync", 9 * M, 9 * M)
        await shown.look()
        assert (shown.view.selected, shown.view.position) == ("1840 rsync", 0)
        del shown.source.processes[1]
        await shown.look()
        assert (shown.view.selected, shown.view.position) == ("26235 curl", 0)
        await shown.press("end")
        assert shown.view.position == len(shown.view.rows) - 1
        await shown.press("pageup", "home")
        assert shown.view.position == 0

    screen(move)


def test_far_rows_can_be_reached() -> None:
    """The selected one is visible, whatever is above."""
    many = MadeUp(*(moving(pid, f"p{pid}", 1000 - pid, 0) for pid in range(1, 300)))

    async def go(shown: Shown) -> None:
        await shown.press("end")
        assert "p299" in shown.text()
        assert "p1 " not in shown.text()
        await shown.press("home")
        assert "p1 " in shown.text()

    screen(go, many)


def test_a_click_selects() -> None:
    """The first line below the head is the first row."""

    async def click(shown: Shown) -> None:
        await shown._pilot.click("#table", offset=(10, 2))
        await shown.settle()
        assert shown.view.position == 1

    screen(click)


def test_a_search_shows_what_has_the_text() -> None:
    """A name, a user, a cgroup or a process id; Escape shows all."""

    async def search(shown: Shown) -> None:
        every = shown.labels()
        await shown.press("slash", *"rsync")
        assert shown.labels() == ["1840 (rsync)", "9 (rsync)"]
        await shown.press("enter", "s")  # a key again
        assert shown.view.order == "down"
        await shown.press("escape", "left")
        assert shown.labels() == every
        for text, found in (("backup.serv", "1840 (rsync)"), ("4242", "4194000 (日本語プロセス)")):
            await shown.press("slash", *text, "enter")
            assert shown.labels() == [found]
            await shown.press("escape")
        await shown.press("slash", *"nobody has it")
        assert "nothing was found" in shown.text()

    screen(search)


def test_a_frozen_picture_stays() -> None:
    """It can be sorted and grouped, but nothing new comes until space goes on."""

    async def freeze(shown: Shown) -> None:
        await shown.press("space")
        assert "FROZEN" in shown.lines()[0]
        shown.source.processes.append(moving(5, "late", 50 * M, 0))
        await shown.look()
        assert "late" not in shown.text()
        await shown.press("space")
        await shown.look()
        assert shown.labels()[0] == "5 (late)"

    screen(freeze)


def test_groups_add_up() -> None:
    """By name, user, cgroup and so on, and by process again."""

    async def group(shown: Shown) -> None:
        await shown.press("g")
        assert shown.labels()[:2] == ["curl", "rsync"]
        await shown.press("g")
        assert shown.labels()[0] == "root"
        await shown.press("g")
        assert shown.labels()[0] == "/user.slice"
        await shown.press("g")
        assert "backup.service" in shown.labels()
        await shown.press("g", "g")
        assert shown.view.group == "interface"
        await shown.press("g")
        assert shown.labels()[0] == "26235 (curl)"

    screen(group, view=View(groups=[one for one in GROUPS if one != "remote"]))


def test_scopes_are_switched() -> None:
    """What was only local is gone in the internet's scope, and loopback is one of its own."""

    async def switch(shown: Shown) -> None:
        seen = []
        for _ in range(5):
            await shown.press("i")
            seen.append(shown.view.scope)
            if shown.view.scope == "loopback":
                assert {row.total.download_bytes for row in shown.view.rows} == {7}
            assert (shown.view.scope == "local") == (not shown.view.rows)
        assert seen == ["internet", "local", "loopback", "all", "network"]

    screen(switch)


def test_interfaces_are_switched() -> None:
    """Each shows what has passed it, in whichever group."""
    curl = moving(26235, "curl", 5 * K, K)
    ways = {
        "eth0": {Scope.INTERNET: Usage(1, 3 * K, 1, K)},
        "wg0": {Scope.INTERNET: Usage(1, 2 * K)},
    }
    source = MadeUp(replace(curl, by_interface=ways), moving(5, "sshd", K, K))

    async def switch(shown: Shown) -> None:
        seen = []
        for _ in range(3):
            await shown.press("n")
            seen.append(
                (shown.view.interface, [row.total.download_bytes for row in shown.view.rows])
            )
        assert seen == [("eth0", [3 * K]), ("wg0", [2 * K]), ("", [5 * K, K])]
        await shown.press("n")
        assert "scope: network on eth0" in shown.text()

    screen(switch, source)


def test_a_limit_is_made_in_a_dialog() -> None:
    """What the plan says is there before; then the limit is in the table."""

    async def limit(shown: Shown) -> None:
        await shown.press("t")
        assert "Limit 26235 (curl), and what it starts" in shown.text()
        assert "By ebpf: the sockets." in shown.text()
        await shown.press(*"1.5M", "tab", *"8mbit", "enter")
        limits = {DOWN: Rate(M + M // 2), UP: Rate(1_000_000)}
        assert shown.source.done() == [("limit", CURL, limits)]
        await shown.look()
        assert "1.5M/976.6K" in shown.text()
        assert "Limit 26235" not in shown.text()

    screen(limit)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ("enter", "give a download limit, an upload limit or both"),
        ("5 apples enter", "download: '5apples' is not a limit"),
        ("tab 1 enter", "upload: 1 is out of range"),
    ],
)
def test_a_mistake_is_told_in_the_dialog(keys, complaint) -> None:
    """It stays open, and nothing was asked for."""

    async def mistake(shown: Shown) -> None:
        await shown.press("t")
        for word in keys.split():
            await shown.press(*([word] if word in ("enter", "tab") else word))
        assert complaint in " ".join(shown.text().split())
        assert shown.source.done() == []
        await shown.press("escape")
        assert "Limit 26235" not in shown.text()

    screen(mistake)


def test_a_refusal_is_told_in_the_dialog() -> None:
    """Before, as far as it is known, and after; then it can be tried again."""

    async def refuse(shown: Shown) -> None:
        shown.source.refusal = ThrottleError("no [bold]such thing")
        await shown.press("t")
        assert "no [bold]such thing" in shown.text()
        shown.source.refusal = None
        await shown.press(*"1M")
        assert "no [bold]such thing" not in shown.text()
        shown.source.refusal = ThrottleError("it has ended")
        await shown.press("enter")
        assert "it has ended" in shown.text()
        shown.source.refusal = None
        await shown.press("enter")
        assert [name for name, *_ in shown.source.done()] == ["limit", "limit"]
        assert shown.app.screen_stack[1:] == []

    screen(refuse)


def test_notes_are_told_after_the_limit_began() -> None:
    """The dialog stays open for them; Enter closes it, and limits nothing more."""

    async def note(shown: Shown) -> None:
        shown.source.notes = ["Its tap device is not limited."]
        await shown.press("t", *"1M", "enter")
        assert "Its tap device is not limited." in shown.text()
        await shown.press("enter")
        assert "Its tap device is not limited." not in shown.text()
        assert len(shown.source.done()) == 1

    screen(note)


def test_a_limit_is_changed_in_the_same_dialog() -> None:
    """It has what is in force already; an empty field lifts that limit."""

    async def change(shown: Shown) -> None:
        await shown.press("t")
        assert "Change the limit of 26235" in shown.text()
        assert [line.split()[2] for line in shown.lines() if "load:" in line] == ["1M", "500K"]
        await shown.press("end", "backspace", "backspace", *"2M", "tab", "ctrl+u", "enter")
        changed = {DOWN: Rate(2 * M), UP: None}
        assert shown.source.done() == [("change", ["abc123"], CURL, changed)]

    screen(change, with_limits())


def test_a_group_is_limited_as_a_group() -> None:
    """By its name; members that have limits of their own are in the way, and that is told."""

    async def group(shown: Shown) -> None:
        await shown.press("g", "j", "t", *"1M", "enter")
        assert shown.source.done() == [("limit", Target(names=("rsync",)), {DOWN: Rate(M)})]
        await shown.press("g", "home", "t")
        assert "there is a limit of" not in shown.text()
        await shown.press("escape")
        shown.source.throttles = [limited(CURL, download=Rate(M))]
        await shown.look()
        await shown.press("t")
        assert "there is a limit of 26235" in shown.text()

    screen(group)


def test_what_belongs_to_nobody_cannot_be_limited() -> None:
    """That is told; there is no dialog."""

    async def try_it(shown: Shown) -> None:
        await shown.press("end", "t")
        assert "cannot be limited" in shown.text()
        await shown.press("k")
        assert "cannot be limited" not in shown.text()

    screen(try_it)


def test_a_limit_is_removed_after_a_question() -> None:
    """With n nothing is; with y it is."""

    async def remove(shown: Shown) -> None:
        await shown.press("r")
        assert "Remove the limit of 26235" in shown.text()
        assert "made by 1 (init)" in shown.text()
        await shown.press("n")
        assert shown.source.done() == []
        await shown.press("r", "y")
        assert shown.source.done() == [("remove", ["abc123"])]
        await shown.look()
        await shown.press("r")
        assert "26235 (curl) is not limited" in shown.text()

    screen(remove, with_limits())


def test_a_limit_is_paused_by_a_key() -> None:
    """Without a question: the same key puts it back. In the table that is seen."""

    async def pause(shown: Shown) -> None:
        await shown.press("p")
        assert shown.source.done() == [("pause", ["abc123"])]
        assert "It was paused." in shown.text()
        record = shown.source.throttles[0].record
        spec = record.spec.with_limit(DOWN, None, Rate(M)).with_limit(UP, None, Rate(500 * K))
        shown.source.throttles[0] = InForce((replace(record, spec=spec),))
        await shown.look()
        assert "paused" in shown.lines()[2]
        assert "download 1.0 MB/s (paused)" in shown.text()
        await shown.press("t", "enter")
        changed = {DOWN: Rate(M), UP: Rate(500 * K)}
        assert shown.source.done()[1:] == [("change", ["abc123"], CURL, changed)]
        await shown.press("end", "p")
        assert "is not limited" in shown.text()

    screen(pause, with_limits())


def test_what_cannot_be_removed_is_told() -> None:
    """It may be gone already."""

    async def remove(shown: Shown) -> None:
        shown.source.refusal = ThrottleError("it is gone")
        await shown.press("r", "y")
        assert "it is gone" in shown.text()

    screen(remove, with_limits())


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_it_ends(key) -> None:
    """At once where nothing is limited from here."""

    async def leave(shown: Shown) -> None:
        await shown.press(key)
        assert not shown.app.is_running or shown.app._exit

    assert screen(leave).return_code == 0


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_limits_that_end_with_it_are_told(key) -> None:
    """It goes on after n, and ends after y."""

    async def leave(shown: Shown) -> None:
        shown.source.mine = ["process 7 (curl), and what it starts"]
        await shown.press(key)
        assert "process 7 (curl), and what it starts" in shown.text()
        await shown.press("n")
        assert not shown.app._exit
        await shown.press(key, "y")
        assert shown.app._exit

    screen(leave)


def test_the_help_has_every_key() -> None:
    """What each does, in a line that fits."""

    async def look(shown: Shown) -> None:
        await shown.press("question_mark")
        text = shown.text()
        for key in ("t", "p", "r", "s, right", "S", "g", "i", "/", "Space", "Ctrl-Z", "?", "q"):
            assert f"│ {key} " in text
        await shown.press("escape", "h", "q")
        assert shown.app.screen_stack[1:] == []

    screen(look)


def test_an_error_ends_it() -> None:
    """It is there for whoever has started it to tell."""
    source = some()
    source.failure = ThrottleError("no more")

    async def nothing(shown: Shown) -> None:
        pass

    app = screen(nothing, source)
    assert str(app.failure) == "no more"
