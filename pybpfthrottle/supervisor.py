"""One loop for everything that has to be done while limits are in force.

Limits have chores: looking for processes, pacing connections, sampling the rates. A supervisor runs
each chore when it is due or its descriptor is readable, one after the other: in the caller's own
loop by ``step``, in a background thread, or on an asyncio event loop.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from operator import is_not
from typing import TYPE_CHECKING, Callable, Iterable, Optional, TypeVar
from weakref import WeakKeyDictionary

from pybpfthrottle.bpf.obj.plain import Protocol
from pybpfthrottle.errors import Error
from pybpfthrottle.logger import Logger

if TYPE_CHECKING:
    import asyncio

log = Logger(__name__)

T = TypeVar("T")


class Chore(Protocol):
    """Something that has to be done repeatedly for a limit."""

    def fileno(self) -> int:
        """Return a descriptor whose being readable makes the chore due, or -1 for none."""

    @property
    def due_s(self) -> float:
        """When the chore is due in any case, on time.monotonic(); infinite means never."""

    def run(self) -> None:
        """Do the chore, and advance ``due_s``. Errors of this package and OSError are logged."""


class Frequent:
    """The base of chores that are done often, and seldom change what others there are.

    ``changes_chores`` says whether the last run did.
    """

    changes_chores = False


# Where a limit's chores come from: each call may return different ones.
Source = Callable[[], Iterable[Chore]]


def next_round(period_s: float) -> float:
    """Return a time within a period at which all do their chores of this period.

    Each on its own would wake the process up many times.
    """
    return (time.monotonic() // period_s + 1) * period_s


class Periodic:
    """A chore that is done at regular intervals; missed times are skipped.

    The first time comes after a whole interval, or earlier if chores of the same interval are done
    ``together``.
    """

    def __init__(
        self, period_s: float, work: Callable[[], object], *, together: bool = False
    ) -> None:
        self._period_s = period_s
        self._work = work
        self.due_s = next_round(period_s) if together else time.monotonic() + period_s

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Do the work, and set when it is due again."""
        now = time.monotonic()
        self.due_s += self._period_s
        if self.due_s <= now:  # the process was stopped meanwhile
            self.due_s = now + self._period_s
        self._work()


class Budget:
    """A share of one CPU's time that all who look around for one purpose have together.

    On a slow machine it may be several times as much, so that nobody waits for long.
    """

    _SUM_AGAIN_S = 1.0
    _LONG_S = 8.0
    _MOST_SHARES = 5

    def __init__(self, share: float) -> None:
        self._share = share
        self._busy = threading.Lock()
        self._costs: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._total_s = 0.0
        self._sum_again_s = -math.inf

    def next_due_s(self, who: object, cost_s: float, least_s: float) -> float:
        """Return when to look again, after a look that has cost so much; ``least_s`` is usual.

        All wait equally long, as far as their usual time is the same, and look in one go.
        """
        with self._busy:
            self._total_s += cost_s - self._costs.get(who, 0.0)
            self._costs[who] = cost_s
            now = time.monotonic()
            if now >= self._sum_again_s:  # who is gone costs nothing
                self._total_s = sum(self._costs.values())
                self._sum_again_s = now + self._SUM_AGAIN_S
            wait_s = self._total_s / self._share
            wait_s = min(wait_s, max(self._LONG_S, wait_s / self._MOST_SHARES))
            times = max(1.0, wait_s / least_s)
        # By powers of two, or they would never meet.
        return next_round(least_s * 2 ** math.ceil(math.log2(times)))


# Of all limits of a process: for sockets and processes that escape them, or whatever else is new.
LOOKS = Budget(0.004)


class Look(Frequent):
    """A chore that looks around, at regular intervals, and less often if the budget demands it.

    The work returns whether there may be other chores now. If so, it has done more than look, and
    the next look comes at its usual time.
    """

    def __init__(
        self, period_s: float, work: Callable[[], Optional[bool]], budget: Budget = LOOKS
    ) -> None:
        self._period_s = period_s
        self._work = work
        self._budget = budget
        self.due_s = next_round(period_s)

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Do the work, and set when it is due again."""
        self.changes_chores = False
        begin_s = time.thread_time()
        try:
            self.changes_chores = bool(self._work())
        finally:
            cost_s = 0.0 if self.changes_chores else time.thread_time() - begin_s
            self.due_s = self._budget.next_due_s(self, cost_s, self._period_s)


# How soon it is noticed in any case that a source has other chores: at least, and as often as costs
# this fraction of one CPU's time.
_ASK_AGAIN_S = 0.5
_MOST_ASKING = 0.002


class _Asked:
    """A source, and the chores that it had when it was asked last."""

    def __init__(self, source: Source, strict: bool) -> None:
        self.source = source
        self.strict = strict
        self.chores: list[Chore] = []
        self.is_stale = True


class Supervisor:
    """Does the chores of its sources. ``close`` or ``with`` ends it.

    With many limits something is due all the time. While it serves, it therefore asks a source for
    its chores only after one of them was done that may have changed others, after a call, and now
    and then.
    """

    def __init__(self) -> None:
        self._sources: list[_Asked] = []
        self._has_fewer = False
        # All chores, each with its sources: limits may share one.
        self._chores: dict[int, tuple[Chore, list[_Asked]]] = {}
        self._ask_again_s = -math.inf
        # Each with the source whose chores it may change; None for any.
        self._calls: deque[tuple[Callable[[], None], Optional[Source]]] = deque()
        self._resources = ExitStack()
        self._epoll = select.epoll()
        self._resources.callback(self._epoll.close)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._resources.callback(os.close, self._wake_read)
        self._resources.callback(os.close, self._wake_write)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._registered: set[int] = set()
        self._stopped = False
        self._thread: Optional[int] = None

    def add(self, source: Source, *, strict: bool = False) -> None:
        """Do a source's chores from now on; if ``strict``, ``step`` raises their errors."""
        self._sources.append(_Asked(source, strict))

    def discard(self, source: Source) -> None:
        """Stop doing a source's chores."""
        self._sources = [one for one in self._sources if one.source != source]
        self._has_fewer = True

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``step`` has something to do."""
        return self._epoll.fileno()

    def due_s(self) -> float:
        """When ``step`` has something to do in any case, on time.monotonic(); may be infinite."""
        self._ask_again_s = -math.inf
        self._ask()
        return self._due_s()

    def _due_s(self) -> float:
        return min((chore.due_s for chore, _ in self._chores.values()), default=math.inf)

    def step(self, until_s: float = -math.inf, *, ask_all: bool = True) -> None:
        """Wait for a due chore, at most until ``until_s`` (on time.monotonic()); do what is due.

        ``ask_all`` says that the caller may have changed what chores there are.
        """
        if ask_all:
            self._ask_again_s = -math.inf
        self._do_next(until_s)

    def _do_next(self, until_s: float) -> None:
        self._ask()
        wait_s = min(until_s, self._due_s()) - time.monotonic()
        timeout = None if math.isinf(wait_s) and wait_s > 0 else max(0.0, wait_s)
        ready = {fd for fd, _ in self._epoll.poll(timeout)}
        if self._wake_read in ready:
            self._answer()
            self._ask()
        now = time.monotonic()
        for chore, sources in list(self._chores.values()):
            if now >= chore.due_s or (ready and chore.fileno() in ready):
                try:
                    _do(chore, any(source.strict for source in sources))
                finally:
                    if getattr(chore, "changes_chores", True):
                        for source in sources:
                            source.is_stale = True

    def serve(self) -> None:
        """Do what is due, in this thread, until ``stop`` is called."""
        self._thread = threading.get_ident()
        with self:
            while not self._stopped:
                try:
                    self._do_next(math.inf)
                except Exception:  # from one limit: the others go on
                    log.exception("A limit's chore failed")

    def stop(self) -> None:
        """Have ``serve`` end. Use ``call`` to call this."""
        self._stopped = True

    def call(self, function: Callable[[], T], of: Optional[Source] = None) -> T:
        """Have ``serve`` call a function between two chores; return its result.

        ``of`` is the only source whose chores it may change, if that is known.
        """
        if self._thread == threading.get_ident():
            return function()
        from concurrent.futures import Future  # with logging, which takes a moment

        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self._calls.append((run, of))
        os.write(self._wake_write, b"x")
        return result.result()

    def close(self) -> None:
        """Close the descriptors; limits stay in force."""
        self._resources.close()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self) -> None:
        """Ask the sources whose chores may have changed, and wait for their descriptors."""
        begin_s = time.monotonic()
        asks_all = begin_s >= self._ask_again_s
        if asks_all:
            asked = self._sources
            are_new = True
        else:
            asked = [source for source in self._sources if source.is_stale]
            are_new = self._has_fewer
        self._has_fewer = False
        for source in asked:
            before, source.chores = source.chores, list(source.source())
            source.is_stale = False
            are_new |= len(before) != len(source.chores) or any(map(is_not, before, source.chores))
        if are_new:
            self._chores = {}
            for source in self._sources:
                for chore in source.chores:
                    self._chores.setdefault(id(chore), (chore, []))[1].append(source)
        self._register([chore for source in asked for chore in source.chores], are_new)
        if asks_all:
            now = time.monotonic()
            self._ask_again_s = now + max(_ASK_AGAIN_S, (now - begin_s) / _MOST_ASKING)

    def _register(self, asked: Iterable[Chore], are_new: bool) -> None:
        """Wait for the descriptors of all chores, and no others.

        A closed descriptor leaves the epoll instance by itself, and its number may be used again:
        so the descriptors of the chores that may have changed are registered again each time.
        """
        if are_new:
            fds = {chore.fileno() for chore, _ in self._chores.values()}
            again = self._registered
        else:
            fds = again = {chore.fileno() for chore in asked}
        for fd in again:
            if fd >= 0:
                with suppress(OSError):
                    self._epoll.unregister(fd)
        for fd in fds:
            if fd >= 0:
                self._epoll.register(fd, select.EPOLLIN)
        self._registered = fds if are_new else self._registered | fds

    def _answer(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._calls:
            function, of = self._calls.popleft()
            function()
            if of is None:
                self._ask_again_s = -math.inf
            for one in self._sources:
                one.is_stale |= one.source == of


def _do(chore: Chore, strict: bool) -> None:
    try:
        chore.run()
    except (Error, OSError) as error:
        if strict:
            raise
        # A limit stays in force if looking at a process fails: the next look may succeed.
        log.warning("Cannot check what is limited: %s", error)


class Driver(Protocol):
    """Runs the chores of a limit; changes to the limit go through it."""

    def call(self, function: Callable[[], T]) -> T:
        """Call a function where chores are done, so that none runs at the same time."""

    def release(self) -> None:
        """Stop running the chores."""


class InThread:
    """A driver in the background thread that all limits of this process share."""

    _lock = threading.Lock()
    _shared: Optional[Supervisor] = None
    _thread: Optional[threading.Thread] = None
    _users = 0

    def __init__(self, source: Source) -> None:
        self._source = source
        with self._lock:
            if InThread._shared is None:
                InThread._shared = Supervisor()
                InThread._thread = threading.Thread(
                    target=InThread._shared.serve, name="pybpfthrottle", daemon=True
                )
                InThread._thread.start()
            InThread._users += 1
            self._supervisor = InThread._shared
        self._supervisor.call(lambda: self._supervisor.add(source), source)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the thread; return its result."""
        return self._supervisor.call(function, self._source)

    def release(self) -> None:
        """Leave the thread, which ends when the last limit leaves it."""
        self._supervisor.call(lambda: self._supervisor.discard(self._source), self._source)
        with self._lock:
            InThread._users -= 1
            if InThread._users:
                return
            InThread._shared, thread, InThread._thread = None, InThread._thread, None
            self._supervisor.call(self._supervisor.stop)
        if thread is not None and thread is not threading.current_thread():
            thread.join()


class OnEventLoop:
    """A driver on an asyncio event loop; everything is done in its thread."""

    # A change may make something due sooner than the timer knows.
    _LONGEST_S = 0.25

    def __init__(self, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._supervisor = Supervisor()
        self._supervisor.add(source)
        self._timer: Optional[asyncio.TimerHandle] = None
        loop.add_reader(self._supervisor.fileno(), self._step)
        self._step()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function here: the event loop's thread does the chores."""
        return function()

    def release(self) -> None:
        """Leave the event loop."""
        self._loop.remove_reader(self._supervisor.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self._supervisor.close()

    def _step(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._supervisor.step()
        wait_s = min(max(0.0, self._supervisor.due_s() - time.monotonic()), self._LONGEST_S)
        self._timer = self._loop.call_later(wait_s, self._step)
