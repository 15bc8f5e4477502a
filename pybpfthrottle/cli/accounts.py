"""What pybpfthrottle daemon tells besides keeping rules: metrics by HTTP, and the usage by day."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Callable, Mapping, NamedTuple, Optional

from pybpfthrottle import traffic
from pybpfthrottle.cli.say import say
from pybpfthrottle.endpoint import Address, Endpoint
from pybpfthrottle.errors import Error, StoreError
from pybpfthrottle.history import Recorder, throttles_in_force
from pybpfthrottle.inforce import InForce
from pybpfthrottle.metrics import Collector
from pybpfthrottle.model import Counters, Direction
from pybpfthrottle.store import Store, default_path
from pybpfthrottle.supervisor import Supervisor
from pybpfthrottle.throttle import Throttle
from pybpfthrottle.traffic import Watch


class Accounts(NamedTuple):
    """Where to serve metrics, if at all, and whether to count traffic and to record the usage."""

    metrics: Optional[Address] = None
    usage: bool = False

    def begin(
        self, supervisor: Supervisor, stack: ExitStack, own: Callable[[], Mapping[str, Throttle]]
    ) -> None:
        """Begin with both, until the stack ends; ``own`` are the throttles that are kept here.

        Raises SettingsError if nobody can listen there. What else is impossible is said.
        """

        def counters(one: InForce) -> Mapping[Direction, Counters]:
            throttle = own().get(one.id)
            return one.counters() if throttle is None else throttle.counters()

        watch = _watch(supervisor, stack) if self.usage else None
        if self.usage:
            try:
                store = stack.enter_context(Store.open(default_path()))
                recorder = Recorder(store, watch, lambda: throttles_in_force(counters))
                supervisor.add(recorder.chores)
            except StoreError as error:
                say(f"the usage is not recorded: {error}")
        if self.metrics is not None:
            collector = Collector(watch, counters=counters)
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
