"""What a proof concludes from what was counted."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from pybpfthrottle import proof, witness
from pybpfthrottle.linux import tcp
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.linux.sockets import TcpInfo
from pybpfthrottle.linux.tcp import Look
from pybpfthrottle.model import BLOCKED, Counters, Direction, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.proof import Evidence, Outcome, Proof, Prover

LIMIT = Rate(1 << 20)
MB = 1 << 20
DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD


def evidence(
    passed: int = 0, dropped: int = 0, asked: Optional[Rate] = LIMIT, **past: int
) -> Evidence:
    """Of two seconds of a download."""
    at_sockets = passed + sum(past.values())
    return Evidence(DOWNLOAD, asked, 2.0, passed, dropped, at_sockets, None, past, MB // 4)


@pytest.mark.parametrize(
    ("found", "outcome", "said"),
    [
        (evidence(2 * MB, 5), Outcome.HOLDS, "holds"),
        (evidence(2 * MB + MB // 4), Outcome.HOLDS, "holds"),
        (evidence(MB // 2), Outcome.HOLDS, "holds, far below the limit"),
        (evidence(MB // 2, 5), Outcome.HOLDS, "holds"),
        (evidence(), Outcome.NOTHING, "nothing to limit yet"),
        (evidence(4 * MB), Outcome.FAILS, "does not hold: 2.00 times the limit"),
        (evidence(loopback=4 * MB), Outcome.FAILS, "does not hold: 4.0 MB went over loopback"),
        (
            evidence(2 * MB, loopback=MB),
            Outcome.FAILS,
            "does not hold: 1.0 MB went over loopback",
        ),
        (evidence(MB, loopback=MB // 2), Outcome.HOLDS, "holds: 512.0 KB went over loopback"),
        (evidence(loopback=10), Outcome.NOTHING, "nothing to limit yet: 10 B went over loopback"),
        (evidence(unseen=100_000), Outcome.FAILS, "does not hold: 97.7 KB went past unseen"),
        (evidence(MB, unseen=100_000), Outcome.HOLDS, "holds: 97.7 KB went past unseen"),
        (evidence(2 * MB, exempt=9 * MB), Outcome.HOLDS, "holds: 9.0 MB is exempt by its address"),
        (
            evidence(4 * MB, exempt=MB),
            Outcome.FAILS,
            "does not hold: 2.00 times the limit: 1.0 MB is exempt by its address",
        ),
        (evidence(9 * MB, asked=None), Outcome.HOLDS, "no limit"),
        (evidence(0, 5, asked=BLOCKED), Outcome.HOLDS, "holds"),
        (evidence(1, 5, asked=BLOCKED), Outcome.FAILS, "does not hold"),
    ],
)
def test_a_limit_is_for_all_that_its_target_moves(
    found: Evidence, outcome: Outcome, said: str
) -> None:
    """Whichever way it took; a burst is allowed."""
    assert found.outcome is outcome
    assert found.conclusion == said


def test_one_line_tells_all() -> None:
    """And JSON the same."""
    upload = evidence(2 * MB, 1000)._replace(direction=UPLOAD, retransmitted=1500)
    both = Proof((evidence(loopback=4 * MB), upload))
    assert str(both) == (
        "Proof of 2.0 s: download: asked 1.0 MB/s, in the kernel 0 B/s, at the sockets 2.0 MB/s:"
        " does not hold: 4.0 MB went over loopback; upload: asked 1.0 MB/s, in the kernel 1.0 MB/s,"
        " at the sockets 1.0 MB/s, 1000 B dropped, 1.5 KB retransmitted: holds"
    )
    told = both.to_json()
    assert (told["holds"], told["conclusion"]) == (False, "does not hold")
    assert (told["upload"]["holds"], told["upload"]["bytes_retransmitted"]) == (True, 1500)
    assert told["download"]["past"] == {"loopback": 4 * MB}
    assert Proof((evidence(),)).to_json()["holds"] is None


def connection(number: int, received: int = 0, sent: int = 0, cgroup_id: int = 1) -> Connection:
    """One that has moved so much."""
    info = TcpInfo(1, 0, 0, 100, 0, sent, received, sent, 0, 0)
    return Connection(number, number, cgroup_id, (("10.0.0.1", 1), ("10.0.0.2", 2)), info)


class Throttled:
    """A throttle that counts what it is told, of a cgroup with the id 1."""

    spec = ThrottleSpec(Target(), {DOWNLOAD: LIMIT, UPLOAD: LIMIT})
    limits = spec.limits
    cgroups = ("/one",)

    def __init__(self) -> None:
        self.passed = self.dropped = 0

    def counters(self) -> dict[Direction, Counters]:
        """Downloads; uploads are all dropped."""
        total = self.passed + self.dropped
        return {DOWNLOAD: Counters(1, 1, total, 0, self.dropped), UPLOAD: Counters()}

    def burst_bytes(self, direction: Direction) -> int:
        """None."""
        return 0


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A throttle, the looks at its connections that follow, and a clock."""
    found: list[Optional[Look]] = []
    now = [100.0]
    monkeypatch.setattr(proof.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(witness, "look", lambda throttle: found.pop(0))
    monkeypatch.setattr(witness, "processes", lambda throttle: [7])
    monkeypatch.setattr(witness, "cgroup_ids", lambda throttle: {1})
    monkeypatch.setattr(tcp, "multipath", lambda pids: {3})
    return Throttled(), found, now


def look(*connections: Connection, local: tuple[int, ...] = ()) -> Look:
    """At these."""
    return Look({one.cookie: one for one in connections}, frozenset(local))


def test_what_was_not_counted_is_explained(moments: Any) -> None:
    """By loopback, another cgroup, MPTCP, or by nothing, as far as each goes."""
    throttle, looks, now = moments
    looks += [
        look(),
        look(
            connection(1, 2 * MB),
            connection(2, MB, cgroup_id=9),
            connection(3, MB // 2),
            connection(4, 5 * MB),
            local=(4,),
        ),
    ]
    looks.append(looks[-1])
    prover = Prover(throttle)
    throttle.passed = MB
    now[0] += 2
    assert prover.sample() is None
    now[0] += 1
    found = prover.sample()
    assert found is not None
    assert found.evidence[0].past == {
        "loopback": 5 * MB,
        "other_cgroup": MB,
        "mptcp": MB // 2,
        "unseen": MB,
    }
    assert found.evidence[0].at_sockets == 8 * MB + MB // 2


def test_what_is_exempt_is_told_and_not_held_against_the_limit(moments: Any) -> None:
    """It was asked not to limit it."""
    throttle, looks, now = moments
    traffic = Traffic(but=("10.0.0.0/8",))
    throttle.spec = ThrottleSpec(Target(), throttle.limits, traffic)
    looks += [look(), look(connection(1, 9 * MB))]
    prover = Prover(throttle)
    throttle.passed = MB
    now[0] += 2
    found = prover.sample()
    assert found is not None
    assert found.evidence[0].past == {"loopback": 0, "exempt": 9 * MB}
    assert found.outcome is Outcome.HOLDS


def test_that_a_limit_does_not_hold_is_looked_at_twice(moments: Any) -> None:
    """What was read at a bad moment is another thing a second later."""
    throttle, looks, now = moments
    looks += [look(), look(connection(1, 2 * MB)), look(connection(1, 3 * MB))]
    prover = Prover(throttle)
    now[0] += 2
    assert prover.sample() is None
    assert not prover.waits
    throttle.passed = 3 * MB
    now[0] += 1
    found = prover.sample()
    assert found is not None
    assert (found.outcome, found.seconds) == (Outcome.HOLDS, 3.0)


def test_counters_that_are_read_a_moment_apart_differ(moments: Any) -> None:
    """What is in between is not past; closed connections only make it less."""
    throttle, looks, now = moments
    looks += [look(connection(1, MB), connection(2, 9 * MB)), look(connection(1, 2 * MB))]
    prover = Prover(throttle)
    throttle.passed = MB - 50_000
    now[0] += 2
    found = prover.sample()
    assert found is not None
    assert found.evidence[0].past == {"loopback": 0}


def test_where_the_kernel_lists_no_connections_the_counters_remain(moments: Any) -> None:
    """The other measure is unknown, and not nothing."""
    throttle, looks, now = moments
    looks += [None, None]
    prover = Prover(throttle)
    throttle.passed = 2 * MB
    now[0] += 2
    found = prover.sample()
    assert found is not None
    assert found.evidence[0].at_sockets is None
    assert "at the sockets unknown: holds" in str(found)


def test_the_first_traffic_begins_the_time(moments: Any) -> None:
    """Seconds without any are left out."""
    throttle, looks, now = moments
    looks += [look(connection(1)) for _ in range(6)]
    prover = Prover(throttle)
    now[0] += 1
    assert (prover.sample(), prover.waits) == (None, False)
    for _ in range(2):
        now[0] += 2
        assert (prover.sample(), prover.waits) == (None, True)
    throttle.passed = 2 * MB
    now[0] += 1
    assert prover.sample() is None
    now[0] += 1
    found = prover.sample()
    assert found is not None
    assert (found.seconds, found.outcome) == (2.0, Outcome.HOLDS)
    assert prover.end() is None


def test_at_the_end_there_is_a_proof_at_the_latest(moments: Any) -> None:
    """Of the whole time, if nothing has moved."""
    throttle, looks, now = moments
    looks += [look(), look(), look()]
    prover = Prover(throttle)
    now[0] += 2
    assert prover.sample() is None
    now[0] += 1
    found = prover.end()
    assert found is not None
    assert (found.seconds, found.outcome) == (3.0, Outcome.NOTHING)
    assert prover.end() is None
