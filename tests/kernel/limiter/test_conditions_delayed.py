"""Bad networks that delay: the diversion, a limit and the hooks on the same packets."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from echo import PORT, Near
from targets import eventually

from pybpfthrottle.conditions import conditions
from pybpfthrottle.conditions.traces import Replay
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction

pytestmark = pytest.mark.since("5.10")

DOWN = Direction.DOWNLOAD
# Far more than a machine takes by itself.
DELAY_S = 0.1
BYTES = 400_000


@pytest.mark.parametrize("of", ["pid", "cgroup"])
def test_what_is_delayed_is_limited_and_counted_once(
    wire: Wire, near: Near, scratch: Cgroup, of: str
) -> None:
    """Each packet is seen twice by the kernel, and once by the limit and by the hooks."""
    who: dict[str, Any] = {"pid": near.process.pid} if of == "pid" else {"cgroup": scratch.path}
    host = wire.server.address
    with conditions(delay="100ms", download="100M", **who) as network:
        assert min(near.ask("ping", host, PORT, "tcp", 2)) >= DELAY_S
        assert near.ask("bulk", host, PORT, BYTES)
        billed = network.throttle.counters()[DOWN].bytes_total
        assert BYTES * 0.99 <= billed < BYTES * 1.5
        done = network.injected()[DOWN]
        assert done.diverted is not None
        assert done.diverted.delay_p50_s is not None
        assert done.diverted.delay_p50_s >= DELAY_S * 0.95
        assert BYTES / 65536 <= done.seen < 2 * done.diverted.seen
        with network.offline():
            near.ask("send", host, PORT, 3, 64)
            assert near.ask("receive", 0.5)[0] == []
        network.set(loss="0.0001%")
        assert min(near.ask("ping", host, PORT, "udp", 3)) < DELAY_S
        assert network.injected()[DOWN].diverted is not None


def test_what_is_delayed_is_counted_once_after_its_keeper_was_killed(
    wire: Wire, near: Near
) -> None:
    """The keeper is replaced, and the limit and the hooks come after the diversion again."""
    host = wire.server.address
    with conditions(pid=near.process.pid, delay="1ms", download="100M") as network:
        (keeper,) = [
            pid
            for pid in process.families()[os.getpid()]
            if b"pybpfthrottle.diversion.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(keeper, signal.SIGKILL)

        def is_counted_once() -> bool:
            before = network.throttle.counters()[DOWN].packets_total, network.injected()[DOWN]
            # What comes in while the keeper dies is lost.
            near.ask("send", host, PORT, 5, 64)
            near.ask("receive", 1.0, 5)
            after = network.throttle.counters()[DOWN].packets_total, network.injected()[DOWN]
            assert before[1].diverted is not None
            assert after[1].diverted is not None
            diverted = after[1].diverted.seen - before[1].diverted.seen
            return after[0] - before[0] == after[1].seen - before[1].seen == diverted == 5

        eventually(is_counted_once)


def test_what_could_not_come_last_is_tried_again(
    wire: Wire, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not, once it has worked."""
    with conditions(pid=near.process.pid, delay="1ms", supervise=False) as network:
        diversion = network._detour._diverted.open[0]
        monkeypatch.setattr(diversion, "times_attached", 2)  # as when its keeper was replaced
        attach_last, calls = network.throttle.attach_last, []

        def refuse_once() -> None:
            calls.append(len(calls))
            if len(calls) == 1:
                raise ThrottleError("not now")
            attach_last()

        monkeypatch.setattr(network.throttle, "attach_last", refuse_once)
        look = network.own_chores()[0]
        with pytest.raises(ThrottleError):
            look.run()
        look.run()
        look.run()
        assert calls == [0, 1]


def test_recorded_round_trips_are_replayed(wire: Wire, near: Near, tmp_path: Path) -> None:
    """One after the other, in a round."""
    file = tmp_path / "recorded.csv"
    head = "time,elapsed_s,direction,actual,round_trip_ms\n"
    file.write_text(head + "x,1,download,1e7,100\nx,2,download,1e7,300\n")
    host = wire.server.address
    with conditions(pid=near.process.pid, replay=str(file)) as network:

        def round_trip_s() -> float:
            found: float = near.ask("ping", host, PORT, "udp", 1)[0]
            assert found >= DELAY_S
            return found

        eventually(lambda: round_trip_s() >= 3 * DELAY_S)
        eventually(lambda: round_trip_s() < 3 * DELAY_S)
        assert any(isinstance(chore, Replay) for chore in network.own_chores())
    assert not any(isinstance(chore, Replay) for chore in network.own_chores())


def test_loss_and_delay_are_by_the_diversion_and_counted_there(wire: Wire, near: Near) -> None:
    """All that comes in is lost; what goes out is not."""
    with conditions(pid=near.process.pid, delay="1ms", download_loss="100%") as network:
        near.ask("send", wire.server.address, PORT, 20, 64)
        assert near.ask("receive", 0.5)[0] == []
        done = network.injected()
    assert done[DOWN].dropped == done[DOWN].seen == 20
    assert done[DOWN].hooks.lost == 0
    assert done[Direction.UPLOAD].dropped == 0
