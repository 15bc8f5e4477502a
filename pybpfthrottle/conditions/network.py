"""A bad network in force for some processes or cgroups: the throttle, the hooks, the diversion."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from secrets import randbelow
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    TypeVar,
    Union,
)

from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.conditions import profiles, texts
from pybpfthrottle.conditions.diversions import Diversions
from pybpfthrottle.conditions.hooks import Counted, Hooks
from pybpfthrottle.conditions.model import OFFLINE, Conditions, Impairment, Injected, Loss
from pybpfthrottle.conditions.traces import Replay, Trace
from pybpfthrottle.conditions.traces import read as read_trace
from pybpfthrottle.errors import LimitError, ThrottleError
from pybpfthrottle.model import Direction, Limits, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.plan import Wish
from pybpfthrottle.supervisor import Chore, Driver, InThread, Periodic
from pybpfthrottle.throttle import Throttle, limits_of, start

if TYPE_CHECKING:
    from pybpfthrottle.line.own import OwnNetwork

T = TypeVar("T")

_LOOK_S = 0.25  # how soon the new cgroup of a restarted unit is found
_LEAST_DELAY_S = 1e-6
# Short enough to be typed again.
_SEEDS = 1_000_000
_REPLAYS = {"replay": Direction.DOWNLOAD, "replay_upload": Direction.UPLOAD}


@dataclass(frozen=True)
class Asked:
    """What a network is to be: limits, and what is wrong with it. ``profile`` is its name."""

    conditions: Conditions
    limits: Limits
    profile: str = ""
    # The files of traces that are replayed, and what they say.
    replayed: tuple[str, ...] = ()
    traces: Mapping[Direction, Trace] = field(default_factory=dict)
    # The one whose round trips are replayed.
    late: Optional[Trace] = None

    @classmethod
    def of(cls, profile: str = "", **given: Any) -> Asked:
        """Read what is asked for: a profile, and rates and texts in place of the profile's own.

        ``replay`` and ``replay_upload`` name traces of what comes in and goes out. Their round
        trips are replayed as well, unless there is a delay.

        Raises LimitError or SettingsError.
        """
        files = {one: given.pop(name, None) for name, one in _REPLAYS.items()}
        replayed = {one: str(path) for one, path in files.items() if path is not None}
        named = profiles.find(profile) if profile else None
        rates = {name: given.pop(name) for name in profiles.RATES if name in given}
        wrong = {name: _text(name, value) for name, value in given.items() if value is not None}
        if "seed" not in {*wrong, *(named.texts if named else ())}:
            wrong["seed"] = str(randbelow(_SEEDS))
        limits: dict[Direction, Optional[Rate]] = dict.fromkeys(Direction)
        limits.update(named.rates if named else {})
        limits.update(limits_of(**rates))
        traces = {one: read_trace(path, one) for one, path in replayed.items()}
        limits.update({one: trace.peak for one, trace in traces.items()})
        found = named.conditions(wrong) if named else texts.conditions_from(wrong)
        if not found and not any(limits.values()):
            names = ", ".join(texts.ACCEPTED)
            raise LimitError(f"nothing is asked for: give a profile, or {names}")
        late = next((one for one in traces.values() if one.round_trips_s), None)
        if "delay" in {*wrong, *(named.texts if named else ())}:
            late = None
        return cls(found, limits, profile, tuple(replayed.values()), traces, late)

    @property
    def is_late(self) -> bool:
        """Whether what comes in has a delay, perhaps one that changes."""
        return bool(self.conditions.download.delay_s or self.late)

    def __str__(self) -> str:
        """Return its numbers for people, with the profile's name."""
        rates = [
            f"{one} up to {rate}" if one in self.traces else f"{one} {rate.written()}"
            for one, rate in self.limits.items()
            if rate
        ]
        wrong = [texts.described(self.conditions)] if self.conditions else []
        seed = [f"seed {self.conditions.download.seed}"] * self.conditions.is_by_chance
        replay = [f"replay {path}" for path in self.replayed]
        if self.late is not None:
            ends = map(texts.as_time, (min(self.late.round_trips_s), max(self.late.round_trips_s)))
            replay.append("delay {} to {} as recorded".format(*ends))
        numbers = ", ".join([*rates, *replay, *wrong, *seed])
        if self.profile in ("", numbers):  # that of an offline machine says no more
            return numbers
        return f"{self.profile}: {numbers}"


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name == "seed" and isinstance(value, int):
        return str(value)
    raise LimitError(f"{name} is {value!r}: give a text, {texts.ACCEPTED.get(name, '')}")


def wish_for(asked: Asked, wish: Wish = Wish()) -> Wish:  # noqa: B008 - immutable
    """Return how to start the throttle of a network: by eBPF, with nothing shaped without need.

    Where what comes in is late, the window is better than the gate: chromium loaded a page of 302
    KB by HTTP/1.1 on 3g in 2.8 s by the one, as predicted, and in 3.2 by the other. What passes the
    gate before a connection is gated makes the kernel learn a round trip later what may be on its
    way. Beyond that the two are alike.

    Raises ThrottleError if another backend is asked for.
    """
    others = {*wish.backends.values()} - {"auto", "ebpf"}
    if others:
        raise ThrottleError(f"bad networks need the backend ebpf, not {', '.join(sorted(others))}")
    options: Options = wish.options.get("ebpf") or Options()
    shape = {**options.shape}
    if asked.is_late and shape.get(Direction.DOWNLOAD, "auto") == "auto":
        shape[Direction.DOWNLOAD] = "window"
    shape.update((one, "police") for one, rate in asked.limits.items() if rate is None)
    options = options._replace(shape=shape, own_marks=True)
    return wish.changed(
        backends=dict.fromkeys(Direction, "ebpf"), options={**wish.options, "ebpf": options}
    )


class Network:
    """A network with its faults, in force on what a throttle is for. ``close`` or ``with`` ends it.

    The throttle ends with it if it is ``owned``.
    """

    def __init__(
        self,
        throttle: Throttle,
        asked: Asked,
        *,
        loopback: bool = False,
        owned: bool = True,
        line: Optional[OwnNetwork] = None,
    ) -> None:
        """Put it in force; with a ``line``, which is the caller's, by that both ways.

        Raises ThrottleError, BpfError or CgroupError; then nothing is left.
        """
        self.throttle = throttle
        self._loopback = loopback
        self._driver: Optional[Driver] = None
        self._replay: Optional[Replay] = None
        # That of a replay; a delay of the conditions does not change.
        self._delay_s: Optional[float] = None
        self._in_force = asked.conditions
        self._ended_with: Optional[dict[Direction, Done]] = None
        self._undo = ExitStack()
        with ExitStack() as undo:
            if owned:
                undo.callback(throttle.remove)
            refuse_what_is_missing(asked.conditions)
            self._line = line
            self._detour: Union[Diversions, OwnNetwork]
            self._detour = line or Diversions(throttle, loopback=loopback)
            undo.callback(self._detour.set, Conditions())
            # Programs of the diversion, as far as the limit and the hooks come after them.
            self._behind: Sequence[tuple[object, int]] = ()
            self._hooks = Hooks(throttle)
            undo.callback(self._hooks.close)
            self.asked = asked
            self._put(asked)
            # Only now, so that they do not count what passes while a diversion begins.
            self._hooks.follow()
            self._chore = Periodic(_LOOK_S, self._follow, together=True)
            self._undo = undo.pop_all()

    @property
    def conditions(self) -> Conditions:
        """What is wrong with it now."""
        return self.asked.conditions

    def set(self, **given: Any) -> None:
        """Make it another network: ``set(delay="200ms", loss="5%")``, with the names of options.

        What is not given is not wrong any more. Raises LimitError or ThrottleError.
        """
        self.profile("", **given)

    def profile(self, name: str, **given: Any) -> None:
        """Make it the network of a profile, but for what is given. Raises LimitError."""
        asked = Asked.of(name, **given)
        self.change(asked)

    def change(self, asked: Asked) -> None:
        """Make it what is asked for. Raises ThrottleError, BpfError or CgroupError."""
        refuse_what_is_missing(asked.conditions)
        self._do(lambda: self._put(asked))

    def offline(self) -> Offline:
        """Have nothing get through until ``online``, or the end of ``with network.offline():``."""
        conditions = self.asked.conditions.changed(outage=OFFLINE)
        self._do(lambda: self._put_conditions(conditions))
        return Offline(self)

    def online(self) -> None:
        """End ``offline``: it is again as it was asked for."""
        self._do(lambda: self._put_conditions(self.asked.conditions))

    def injected(self) -> dict[Direction, Done]:
        """Return what was done to the packets of each direction until now, or until the end."""
        return self._do(self._injected) if self._ended_with is None else self._ended_with

    def _injected(self) -> dict[Direction, Done]:
        held = self._detour.counts()
        return {
            direction: Done(counted, held.get(direction), direction is Direction.DOWNLOAD)
            for direction, counted in self._hooks.counts().items()
        }

    def told(self) -> list[str]:
        """Return what was done to the packets of each direction, a line each, for people."""
        return [f"{direction}: {done}" for direction, done in self.injected().items()]

    def to_json(self) -> dict[str, Any]:
        """Return what is asked for and what was done, for JSON."""
        done = {str(one): each.to_json() for one, each in self.injected().items()}
        seed = self.conditions.download.seed
        about = {} if self._line is None else {"addresses": self._line.addresses()}
        asked = str(self.asked)
        return {"profile": self.asked.profile, "asked": asked, "seed": seed, **about, **done}

    def own_chores(self) -> list[Chore]:
        """Return what a supervisor has to do for it, beside the throttle's chores."""
        replay = [] if self._replay is None else [self._replay]
        return [self._chore, *replay, *self._detour.chores()]

    def chores(self) -> list[Chore]:
        """Return all that a supervisor has to do for it."""
        return [*self.throttle.chores(), *self.own_chores()]

    def supervise(self) -> None:
        """Run its chores in a background thread of this process until it is closed."""
        if self._driver is None:
            self.throttle.supervise()
            self._driver = InThread(self.own_chores)

    def notes(self) -> list[str]:
        """Return what it does otherwise than may be expected, a line each."""
        return (
            []
            if self._ended_with is not None
            else [
                *self._do(self._detour.notes),
                *inexact(self.conditions, elsewhere=self._detour.serves()),
            ]
        )

    def close(self) -> None:
        """End it. Doing so twice is no error."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.release()
        self._replay = None
        try:
            if self._ended_with is None:
                self._ended_with = self._injected()
        finally:
            self._undo.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, function: Callable[[], T]) -> T:
        """Call a function where the chores are run, so that they do not meet."""
        return function() if self._driver is None else self._driver.call(function)

    def _put(self, asked: Asked) -> None:
        self._delay_s = None if asked.late is None else asked.late.round_trip_s(0)
        self._put_conditions(asked.conditions)
        for direction, rate in asked.limits.items():
            # A replay has moved it.
            if self._replay is not None or self.throttle.limits.get(direction) != rate:
                self.throttle.set_limit(direction, rate)
        self._replay = None
        if asked.traces:
            self._replay = Replay(self.throttle, asked.traces, asked.late, self._move_delay)
        self.asked = asked

    def _put_conditions(self, conditions: Conditions) -> None:
        self._in_force = conditions
        self._detour.set(self._as_replayed(conditions))
        self._hooks.set(conditions, loopback=self._loopback, elsewhere=self._detour.serves())
        self._come_last()

    def _move_delay(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._detour.set(self._as_replayed(self._in_force), anew=False)

    def _as_replayed(self, conditions: Conditions) -> Conditions:
        if self._delay_s is None:
            return conditions
        # Not without any: packets go the same way then.
        delay_s = max(self._delay_s, _LEAST_DELAY_S)
        return conditions.changed(download=conditions.download.changed(delay_s=delay_s))

    def _follow(self) -> None:
        """Be where the throttle's packets pass by now, such as in a restarted unit's cgroup.

        If somebody has removed the throttle, that is nowhere.
        """
        if self.throttle.ended() == "removed":
            self._hooks.detach()
            self._replay = None
            self._detour.set(Conditions())
        else:
            self._detour.follow()
            self._hooks.follow()
            self._come_last()

    def _come_last(self) -> None:
        """Have the limit and the hooks look at packets after the diversion has.

        What it takes comes again, and is to be counted only then.
        """
        attached = self._detour.attached()
        if attached and attached != self._behind:
            self.throttle.attach_last()
            self._hooks.follow(anew=True)
        self._behind = attached


class GoesOffline(Protocol):
    """A network that was taken offline."""

    def online(self) -> None:
        """End that."""


class Offline:
    """The time while a network is offline. ``with`` ends it."""

    def __init__(self, network: GoesOffline) -> None:
        self._network = network

    def __enter__(self) -> Offline:
        return self

    def __exit__(self, *_: object) -> None:
        self._network.online()


@dataclass(frozen=True)
class Done:
    """What was done to one direction's packets: by the hooks, and by a diversion or a line.

    The hooks see what comes in after that (``diverted_first``), and what goes out before.
    """

    hooks: Counted
    diverted: Optional[Injected] = None
    diverted_first: bool = True

    @property
    def seen(self) -> int:
        """All packets that came, as large as on the wire."""
        if not self.diverted_first:
            return self.hooks.seen
        lost = self.diverted.lost + self.diverted.late_dropped if self.diverted else 0
        twice = self.diverted.duplicated if self.diverted else 0
        return self.hooks.seen + lost - twice

    @property
    def dropped(self) -> int:
        """Those that got lost, whatever the reason."""
        lost = self.diverted.lost + self.diverted.late_dropped if self.diverted else 0
        return self.hooks.lost + self.hooks.outage + lost

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by their names; times in seconds."""
        found: dict[str, Any] = {**self.hooks._asdict(), "dropped": self.dropped}
        if self.diverted is not None:
            found["diverted"] = {
                each.name: getattr(self.diverted, each.name) for each in fields(self.diverted)
            }
        return found

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Done:
        """Return what ``to_json`` has written."""
        diverted = given.get("diverted")
        hooks = Counted(*(given[name] for name in Counted._fields))
        return cls(hooks, None if diverted is None else Injected(**diverted))

    def __str__(self) -> str:
        """Return it for people: ``dropped 12 of 1000``, and the delay if there was one."""
        one = self.diverted
        text = [f"dropped {self.dropped} of {self.seen}"]
        if one is not None and one.late_dropped:
            reasons = ", ".join(_named(_reasons(one)))
            text.append(f"{one.late_dropped} of them unasked ({reasons})")
        more = (("blocked", self.hooks.blocked), ("DNS answers dropped", self.hooks.unanswered))
        text += _named(more)
        if one is not None:
            text += _named(_beside(one))
            if one.delay_p50_s is not None and one.delay_p99_s is not None:
                times = map(texts.as_time, (one.delay_p50_s, one.delay_p99_s))
                text.append("delay p50 {}, p99 {}".format(*times))
        return ", ".join(text)


def _reasons(one: Injected) -> Sequence[tuple[str, int]]:
    return (("too late", one.too_late), ("no room", one.no_room), ("refused", one.refused))


def _beside(one: Injected) -> Sequence[tuple[str, int]]:
    return (
        ("passed undelayed", one.passed_undelayed),
        ("dropped by the command's full sockets", one.unread),
        ("DNS answers failed", one.failed_answers),
    )


def _named(counts: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{name} {count}" for name, count in counts if count]


def inexact(conditions: Conditions, *, elsewhere: Collection[Direction] = ()) -> list[str]:
    """Return what the means at hand do otherwise than may be expected, a line each.

    Packets of the directions ``elsewhere`` are split before they get lost.
    """
    found = []
    losses = {
        one: conditions.impairment(one).loss or Loss() for one in Direction if one not in elsewhere
    }
    # Where everything is lost, it does not matter how.
    losses = {one: loss for one, loss in losses.items() if 0 < loss.share < 1}
    if any(not loss.nth for loss in losses.values()):
        found.append(
            "packets that the kernel has merged (GRO), or is to split (TSO), are lost as a whole:"
            " the share of what is lost is kept, but it comes in bursts"
        )
    if Direction.UPLOAD in losses:
        found.append("TCP is told at once of a packet that it sent and that was lost")
    if conditions.dns == "slow":
        found.append(
            "the first of two answers to the same question is lost, so a name is found when its"
            " resolver has asked again (glibc does so after 5 s)"
        )
    if conditions.dns == "servfail":
        found.append(
            "answers of a name server on this machine (127.0.0.53) come as they are without"
            " --loopback"
        )
    if conditions.dns:
        found.append("names that another process looks up (nss-resolve, nscd) are found as before")
    return found


def refuse_what_is_missing(conditions: Conditions) -> None:
    """Raise ThrottleError for what nothing here can do."""
    up = conditions.upload
    if up != Impairment(loss=up.loss, seed=up.seed):
        raise ThrottleError(
            "what is sent can only be lost; delay, jitter, reorder, duplicate and"
            " corrupt are for what comes in, and a delay there makes the whole"
            " round trip longer (run --netns has them both ways)"
        )


def begin(
    target: Target,
    asked: Asked,
    *,
    wish: Wish = Wish(),  # noqa: B008 - immutable
    loopback: bool = False,
    label: str = "",
) -> Network:
    """Put a network in force on a target.

    Raises ProcessError, CgroupError, ThrottleError or BpfError; then nothing is left of it.
    """
    refuse_what_is_missing(asked.conditions)
    spec = ThrottleSpec(target, dict(asked.limits), Traffic(loopback), label)
    return Network(start(spec, wish_for(asked, wish)), asked, loopback=loopback)
