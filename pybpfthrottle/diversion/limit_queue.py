"""The queue that a limit gets before UDP downloads come over it, and what is told of it.

It begins with the first large datagram that is sent, where that is told, so that it is ready when
data comes: senders double their rate each round trip, and lose half of what they send if nothing
holds it. For the same reason its programs are fitted to the kernel before anything needs it. At the
latest it begins once downloads are over the limit. Only then it is told to people.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Optional

from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.protocol import Foothold, Queueable
from pybpfthrottle.diversion.places import Diverted
from pybpfthrottle.errors import Error
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.supervisor import Budget, Chore, Look

if TYPE_CHECKING:
    from pybpfthrottle.diversion.diverted import Diversion

log = Logger(__name__)

_LOOK_S = 0.25
# So long after the start the programs are fitted: one that ends at once does not wait for that.
_SOON_S = 0.005
# A look is one system call while there is no queue.
_LOOKS = Budget(0.002)

QUEUE, EARLY = "queue", "early drops"
_WAITS = "a helper process can hold its packets"


class LimitQueue:
    """The queue of one limit. There is none until something needs it. ``close`` ends it."""

    def __init__(self, limit: Queueable) -> None:
        self._limit = limit
        self._diverted = Diverted(limit.before_limit, self._divert)
        # How often the programs of each were attached, as far as the limit comes after them.
        self._attached: list[tuple[Diversion, int]] = []
        self._told: Optional[str] = None
        self._impossible: Optional[str] = None
        self._is_prepared = self._is_expected = self._is_over = False
        self._looking = Look(_LOOK_S, self._look, _LOOKS)
        self._looking.due_s = time.monotonic() + _SOON_S
        limit.on_datagram(self._expect)
        # At once: some programs send their first datagram 10 ms after they have started.
        if limit.why_no_queue() is None:
            limit.lend(True)

    def chores(self) -> list[Chore]:
        """Return what a supervisor has to do for it."""
        if self._is_over:
            return []
        return [self._looking, *self._diverted.chores()]

    def close(self) -> None:
        """Give back what waits, and end for good. Doing so twice is no error."""
        self._is_over = True
        self._diverted.close()

    def _expect(self) -> None:
        """Begin it at once."""
        self._is_expected = True
        self._looking.due_s = 0.0

    def _look(self) -> bool:
        """Begin or end it, or be where the packets pass by now; return whether chores changed."""
        if self._is_over:
            return False
        refused = self._impossible or self._limit.why_no_queue()
        if not self._diverted:
            return self._look_without(refused)
        if refused is not None:
            return self._end_all()
        try:
            self._diverted.follow()
            self._start()
        except (Error, OSError) as error:
            log.info("The queue of UDP downloads cannot follow: %s", error)
        failure = self._failure()
        if failure is not None:
            return self._refuse(failure)
        if self._told != _WAITS and self._is_used():
            self._tell(None)
        return False

    def _look_without(self, refused: Optional[str]) -> bool:
        """Begin it, unless it is refused; then tell so once downloads are over the limit."""
        is_used = self._is_used()
        if refused is None:
            return self._begin() if is_used or self._is_expected else self._prepare()
        if is_used or self._told is not None:
            self._tell(refused)
            self._is_over = self._impossible is not None
        return self._is_over

    def _is_used(self) -> bool:
        """Whether downloads have come over the limit."""
        return self._limit.drops_early() or any(one.has_taken() for one in self._diverted.open)

    def _prepare(self) -> bool:
        """Once, do what is long ahead: data may come milliseconds after the first datagram."""
        if self._is_prepared:
            return False
        self._is_prepared = True
        from pybpfthrottle import diversion

        try:
            foothold = self._limit.before_limit()
            wanted = {False: foothold.cgroups, True: foothold.marked_at}
            # There may be places later.
            self._is_prepared = any(wanted.values())
            self._limit.lend(self._is_prepared)
            for marked, places in wanted.items():
                if places:
                    diversion.prepare_queue(foothold, marked=marked)
        except (Error, OSError):  # it is told once it is needed
            self._limit.lend(False)
        return self._begin() if self._is_expected else self._is_prepared

    def _begin(self) -> bool:
        try:
            self._diverted.begin()
            self._start()
        except (Error, OSError) as error:
            return self._refuse(str(error))
        return True

    def _refuse(self, why: str) -> bool:
        """Do without for good."""
        self._impossible = f"no queue is possible here: {why}"
        return self._end_all()

    def _end_all(self) -> bool:
        self._limit.lend(False)
        self._diverted.close()
        self._attached = []
        return True

    def _come_last(self) -> None:
        """Have the limit charge for packets after they were diverted."""
        now = self._diverted.attached()
        if now != self._attached:
            self._limit.attach_last()
        self._attached = now

    def _start(self) -> None:
        """Have packets wait, once the limit comes last: before, it would charge for them twice."""
        self._come_last()
        for one in self._diverted.open:
            one.start()

    def _failure(self) -> Optional[str]:
        """Return why packets do not wait although they are to, or None."""
        found = (one.failure() or one.unserved() for one in self._diverted.open)
        return next(filter(None, found), None)

    def _tell(self, refused: Optional[str]) -> None:
        """Tell how UDP is kept to the limit, if that has changed."""
        told = _WAITS if refused is None else refused
        if told != self._told:
            self._told = told
            self._limit.tell_udp(QUEUE if refused is None else EARLY, told)

    def _divert(self, scope: Scope, cgroup: Cgroup, foothold: Foothold) -> Diversion:
        from pybpfthrottle import diversion

        marked = scope is Scope.MARKED
        pids = self._limit.processes if marked else cgroup.pids_below
        return diversion.open_queue(cgroup, foothold, marked=marked, pids=pids)
