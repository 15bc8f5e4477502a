"""What the process that keeps rules tells of them: metrics by HTTP, and the usage by day."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Mapping, NamedTuple, Optional

from pybpfthrottle import traffic
from pybpfthrottle.cli.say import say
from pybpfthrottle.endpoint import Address, Endpoint
from pybpfthrottle.errors import Error, StoreError
from pybpfthrottle.history import Recorder, throttles_in_force
from pybpfthrottle.inforce import InForce
from pybpfthrottle.metrics import Collector
from pybpfthrottle.model import Counters, Direction
from pybpfthrottle.rules.keeper import Keeper
from pybpfthrottle.store import Store, default_path
from pybpfthrottle.supervisor import Supervisor
from pybpfthrottle.traffic import Watch


class StoreWhenNeeded:
    """The file of what was counted, which is made only where something has to be kept."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._store: Optional[Store] = None

    def get(self) -> Optional[Store]:
        """Return the file; None if it cannot be used, which is said."""
        if self._store is None:
            try:
                self._store = Store.open(default_path())
            except StoreError as error:
                say(f"what is counted is not kept: {error}")
                return None
            self._supervisor.add(self._store.chores)
        return self._store

    def close(self) -> None:
        """Write what is left, and close it. Doing so twice is no error."""
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> StoreWhenNeeded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Accounts(NamedTuple):
    """Where to serve metrics, if at all, and whether to count traffic and to record the usage."""

    metrics: Optional[Address] = None
    usage: bool = False

    def begin(
        self, supervisor: Supervisor, stack: ExitStack, keeper: Keeper, file: StoreWhenNeeded
    ) -> None:
        """Begin with both, until the stack ends.

        Raises SettingsError if nobody can listen there. What else is impossible is said.
        """

        def counters(one: InForce) -> Mapping[Direction, Counters]:
            throttle = keeper.throttles().get(one.id)
            return one.counters() if throttle is None else throttle.counters()

        watch = _watch(supervisor, stack) if self.usage else None
        store = file.get() if self.usage else None
        if store is not None:
            recorder = Recorder(store, watch, lambda: throttles_in_force(counters))
            stack.callback(recorder.end)
            supervisor.add(lambda: [recorder])
        if self.metrics is not None:
            collector = Collector(watch, keeper.decisions, counters=counters)
            endpoint = stack.enter_context(Endpoint(self.metrics, collector))
            supervisor.add(endpoint.chores)


def _watch(supervisor: Supervisor, stack: ExitStack) -> Optional[Watch]:
    try:
        watch = stack.enter_context(traffic.watch())
    except (Error, OSError) as error:
        say(f"traffic is not counted: {error}")
        return None
    supervisor.add(lambda: [watch])
    return watch
