"""Under which circumstances a rule is in force: what ``when`` says; all of it must hold.

::

    when = { metered = true, network = "Office", interface = "wlan0" }
    when = { on_battery = true, running = ["zoom", "/usr/bin/teams"] }

``metered``: whether NetworkManager takes the connection for a metered one. ``network``: the name of
an active connection, or of its wireless network. ``interface``: it is up, and the best default
route leads through it. ``on_battery``: the machine runs on a battery. ``running``: a process of
that name runs, or, with a path, of that executable. Of a list one suffices.

What cannot be known, such as the network without NetworkManager, does not hold, and a note says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import AbstractSet, Any, Callable, NamedTuple, Optional, Protocol, Sequence, TypeVar

from pybpfthrottle.errors import ProcessError, SettingsError
from pybpfthrottle.linux import network_manager, process, surroundings
from pybpfthrottle.linux.executable import Executable
from pybpfthrottle.linux.network_manager import Networks
from pybpfthrottle.periods import Span
from pybpfthrottle.targets import Selection

T = TypeVar("T")

_BOOLS = ("metered", "on_battery")
_TEXTS = ("network", "interface", "running")
_ACCEPTED = "metered, on_battery (true or false), network, interface, running (a name, or a list)"

# Reading files takes microseconds, asking NetworkManager milliseconds; 2,000 processes take 20 ms.
_FILES_LAST_S = 1.0
_NETWORKS_LAST_S = 5.0
_PROCESSES_LAST_S = 5.0


class Machine(Protocol):
    """What conditions ask. None means that it cannot be known."""

    def metered(self) -> Optional[bool]:
        """Whether the connection is metered."""

    def networks(self) -> AbstractSet[str]:
        """Return the names of the networks that the machine is connected to."""

    def interfaces(self) -> AbstractSet[str]:
        """Return the interfaces that lead to the internet."""

    def on_battery(self) -> Optional[bool]:
        """Whether the machine runs on a battery."""

    def runs(self, program: str) -> bool:
        """Whether a process of a name, or of the executable at a path, is running."""

    def used(self, rule: str, span: Span) -> int:
        """Return how many bytes a rule has passed on some days."""

    def notes(self) -> Sequence[str]:
        """Return what could not be known so far, each once."""


@dataclass(frozen=True)
class Condition:
    """What must hold, all of it; None and empty: whatever it is."""

    metered: Optional[bool] = None
    on_battery: Optional[bool] = None
    network: tuple[str, ...] = ()
    interface: tuple[str, ...] = ()
    running: tuple[str, ...] = ()

    def holds(self, machine: Machine) -> bool:
        """Whether it holds now. Only what is in it is asked, the cheapest first."""
        return (
            (self.on_battery is None or machine.on_battery() is self.on_battery)
            and (not self.interface or not machine.interfaces().isdisjoint(self.interface))
            and (self.metered is None or machine.metered() is self.metered)
            and (not self.network or not machine.networks().isdisjoint(self.network))
            and (not self.running or any(machine.runs(program) for program in self.running))
        )


def parse(value: object) -> Condition:
    """Return the condition that a rule has, from TOML. Raises SettingsError, in one line."""
    if not isinstance(value, dict) or not value:
        raise SettingsError(f"when is {value!r}: write {{ on_battery = true }}; known: {_ACCEPTED}")
    found: dict[str, Any] = {}
    for key, given in value.items():
        if key in _BOOLS:
            if not isinstance(given, bool):
                raise SettingsError(f"{key} of when is {given!r}: write true or false")
            found[key] = given
        elif key in _TEXTS:
            found[key] = _texts(key, given)
        else:
            raise SettingsError(f"unknown key {key} in when; known: {_ACCEPTED}")
    return Condition(**found)


def _texts(key: str, given: object) -> tuple[str, ...]:
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise SettingsError(f"{key} of when is {given!r}: write a name, or a list of names")
    return tuple(texts)


class _Kept(NamedTuple):
    until_s: float
    answer: Any


class ThisMachine:
    """The machine that this runs on; each answer is kept for a second or a few."""

    def __init__(
        self,
        *,
        networks: Callable[[], Networks] = network_manager.networks,
        interfaces: Callable[[], frozenset[str]] = surroundings.default_devices,
        on_battery: Callable[[], Optional[bool]] = surroundings.on_battery,
        used: Callable[[str, Span], int] = lambda rule, span: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask_networks = networks
        self._ask_interfaces = interfaces
        self._ask_on_battery = on_battery
        self._clock = clock
        self.used = used
        self._kept: dict[str, _Kept] = {}
        self._notes: dict[str, None] = {}
        self._found: dict[str, tuple[int]] = {}

    def notes(self) -> list[str]:
        """Return what could not be known so far, each once."""
        return list(self._notes)

    def metered(self) -> Optional[bool]:
        """Whether the connection is metered."""
        return self._networks().metered

    def networks(self) -> frozenset[str]:
        """Return the names of active connections and of their wireless networks."""
        return self._networks().names

    def interfaces(self) -> frozenset[str]:
        """Return the interfaces that are up and that the best default routes lead through."""
        return self._keep("interfaces", _FILES_LAST_S, self._ask_interfaces)

    def on_battery(self) -> Optional[bool]:
        """Whether the machine runs on a battery."""
        found = self._keep("power", _FILES_LAST_S, self._ask_on_battery)
        if found is None:
            self._notes["on_battery does not hold: the kernel tells nothing of the power"] = None
        return found

    def runs(self, program: str) -> bool:
        """Whether a process of a name, or of the executable at a path, is running."""
        return self._keep(f"runs {program}", _PROCESSES_LAST_S, lambda: self._look(program))

    def _look(self, program: str) -> bool:
        """Look for a process, and first at the one that was found last."""
        try:
            selection = _selection(program)
        except ProcessError:  # there is no such file, so nobody runs it
            return False
        candidates = chain(self._found.pop(program, ()), process.running())
        found = next((pid for pid in candidates if selection.matches(pid)), None)
        if found is not None:
            self._found[program] = (found,)
        return found is not None

    def _networks(self) -> Networks:
        return self._keep("networks", _NETWORKS_LAST_S, self._asked)

    def _asked(self) -> Networks:
        try:
            return self._ask_networks()
        except OSError as error:
            why = error.strerror or str(error)
            note = f"metered and network do not hold: NetworkManager cannot be asked ({why})"
            self._notes[note] = None
            return Networks(frozenset(), None)

    def _keep(self, what: str, seconds: float, read: Callable[[], T]) -> T:
        now_s = self._clock()
        if what not in self._kept or now_s >= self._kept[what].until_s:
            self._kept[what] = _Kept(now_s + seconds, read())
        answer: T = self._kept[what].answer
        return answer


def _selection(program: str) -> Selection:
    if "/" in program:
        return Selection(executables=frozenset([Executable(program)]))
    return Selection(names=frozenset([program]))
