"""Bad networks for one process: what the hooks lose, refuse and count, and that nothing is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import Any, Iterator

import pytest
from lab import ENVIRONMENT, attached
from targets import Target, eventually, programs_of, target

from pybpfthrottle import model, registry
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.conditions import conditions
from pybpfthrottle.conditions.model import Conditions, Impairment, Loss
from pybpfthrottle.conditions.network import Asked, Network, begin, wish_for
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup, root
from pybpfthrottle.model import Direction, ThrottleSpec
from pybpfthrottle.throttle import open_record, start

DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD
PACKETS = 2000


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to have a bad network."""
    with target(scratch) as one:
        yield one


def bad(own: Target, **given: Any) -> Network:
    """A bad network for its packets on the loopback device."""
    return conditions(pid=own.pid, loopback=True, **given)


def arrived(own: Target, count: int = PACKETS) -> list[int]:
    """Which of so many packets arrive that it sends to itself, one after the other."""
    found: list[int] = own.do(f"echoes({count})")
    return found


@pytest.mark.parametrize("of", ["pid", "cgroup"])
@pytest.mark.parametrize("share", [0.1, 20])
def test_the_share_that_is_asked_for_is_lost_and_counted(
    own: Target, scratch: Cgroup, share: float, of: str
) -> None:
    """Within five standard deviations, of what a process or a whole cgroup receives."""
    who: dict[str, Any] = {"pid": own.pid} if of == "pid" else {"cgroup": scratch.path}
    with conditions(download_loss=f"{share}%", seed="1", loopback=True, **who) as network:
        lost = PACKETS - len(arrived(own))
        done = network.injected()
    chance = share / 100
    deviation = (PACKETS * chance * (1 - chance)) ** 0.5
    assert abs(lost - PACKETS * chance) <= 5 * deviation
    assert (done[DOWN].seen, done[DOWN].dropped, done[UP].dropped) == (PACKETS, lost, 0)
    assert len(arrived(own, 50)) == 50


def test_a_cgroup_may_be_gone_before_its_network_begins(scratch: Cgroup) -> None:
    """Nothing is attached then, and nothing counted; that is no error."""
    asked = Asked.of(loss="1%")
    spec = ThrottleSpec(model.Target(cgroups=(scratch.path,)), dict(asked.limits))
    throttle = start(spec, wish_for(asked))
    scratch.remove(patience_s=5)
    with Network(throttle, asked) as network:
        network.set(outage="always", block="refuse")
        assert [done.seen for done in network.injected().values()] == [0, 0]


def test_the_same_seed_loses_the_same_packets(own: Target) -> None:
    """Another one loses others."""
    found = []
    for seed in ("5", "5", "6"):
        with bad(own, download_loss="10%", seed=seed):
            found.append(arrived(own, 300))
    assert found[0] == found[1] != found[2]


def test_each_nth_packet_is_lost(own: Target) -> None:
    """The hundredth, the two hundredth, and so on."""
    with bad(own, upload_loss="every:100"):
        there = set(arrived(own, 1000))
    assert [one for one in range(1000) if one not in there] == list(range(99, 1000, 100))


def test_bursts_are_as_long_as_asked_for(own: Target) -> None:
    """The mean of the bursts, of hundreds of them."""
    wanted = Loss.burst(0.3, 5)
    with bad(own, download_loss="burst:30%,5", seed="3"):
        there = set(arrived(own, 5000))
    lost = [one not in there for one in range(5000)]
    bursts = sum(one and not before for before, one in zip([False, *lost], lost))
    assert 4 < sum(lost) / bursts < 6
    assert abs(sum(lost) / 5000 - wanted.share) < 0.06


def test_another_process_loses_nothing(own: Target, scratch: Cgroup) -> None:
    """Although it is in the same cgroup."""
    with target(scratch) as other, bad(own, loss="100%"):
        assert len(arrived(other, 200)) == 200
        assert arrived(own, 20) == []


def test_offline_is_changed_while_it_is_in_force(own: Target) -> None:
    """Nothing arrives until the block ends; then another network begins."""
    with bad(own, loss="0.1%") as network:
        with network.offline():
            assert arrived(own, 20) == []
        assert len(arrived(own, 20)) >= 18
        network.profile("offline")
        assert arrived(own, 20) == []
        assert network.injected()[UP].hooks.outage == 40
        network.set(upload_loss="every:2")
        assert arrived(own, 10) == [0, 2, 4, 6, 8]


def test_an_outage_comes_back_in_each_period(own: Target) -> None:
    """A fifth of a second of each two fifths nothing gets through, and then all does."""
    with bad(own, outage="200ms/400ms"):
        for _ in range(2):
            eventually(lambda: arrived(own, 1) == [])
            eventually(lambda: arrived(own, 1) == [0])


def test_new_connections_are_refused_or_time_out(own: Target) -> None:
    """With EPERM at once, or because no packet opens them; those that are open go on."""
    port = own.do("port(listen())")
    with bad(own, block="refuse") as network:
        assert own.do(f"failure({port}, 5)") == errno.EPERM
        assert network.injected()[UP].hooks.blocked == 1
        network.set(block="drop")
        assert own.do(f"failure({port}, 0.3)") == "timed out"
        assert network.injected()[UP].hooks.blocked >= 2
        network.set(loss="0.001%")
        assert own.do(f"failure({port}, 5)") is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_connections_within_this_machine_are_refused_with_loopback_only(
    own: Target, host: str
) -> None:
    """However their address is written."""
    port = own.do("port(listen())")
    with conditions(pid=own.pid, block="refuse"):
        assert own.do(f"failure({port}, 5, {host!r})") is None
    with bad(own, block="refuse"):
        assert own.do(f"failure({port}, 5, {host!r})") == errno.EPERM


@pytest.mark.parametrize(("how", "answers"), [("lost", [0, 0]), ("slow", [0, 1])])
def test_answers_of_name_servers_are_lost(own: Target, how: str, answers: list[int]) -> None:
    """All of them, or the first to each question; also from this machine, and nothing else."""
    with conditions(pid=own.pid, dns=how) as network:
        assert own.do("asked(53, 2)") == answers
        assert own.do("asked(0, 2)") == [1, 1]
        assert network.injected()[DOWN].hooks.unanswered == answers.count(0)


@pytest.mark.since("5.10")
def test_name_servers_fail(own: Target) -> None:
    """Their answers come, and say so; others come as they are."""
    with bad(own, dns="servfail") as network:
        assert (own.do("rcode(53)"), own.do("rcode(0)")) == (2, 0)
        diverted = network.injected()[DOWN].diverted
        assert diverted is not None
        assert diverted.failed_answers == 1


def test_nothing_is_attached_any_more_after_the_end_and_after_a_kill(own: Target) -> None:
    """Neither by a throttle that was removed nor by one whose process was killed."""
    hooks = (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET4_CONNECT)

    def attached_by(owner: int) -> set[int]:
        """All that it has at the root, which must be something at each of the hooks."""
        ours = programs_of(owner)
        assert all(ours & set(attached(root(), [hook])) for hook in hooks)
        return ours

    def is_gone(ours: set[int]) -> bool:
        return not ours & set(attached(root(), hooks))

    with bad(own, loss="1%", block="refuse"):
        ours = attached_by(os.getpid())
    assert eventually(lambda: is_gone(ours))
    code = (
        "import sys, time; from pybpfthrottle.conditions import conditions;"
        f"conditions(pid={own.pid}, loopback=True, loss='100%', block='refuse');"
        "print('on', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as keeper:
        assert keeper.stdout
        assert keeper.stdout.readline() == "on\n"
        assert arrived(own, 5) == []
        ours = attached_by(keeper.pid)
        keeper.send_signal(signal.SIGKILL)
    assert eventually(lambda: is_gone(ours))
    assert len(arrived(own, 5)) == 5


def test_a_network_is_a_throttle_that_others_see_and_remove(own: Target) -> None:
    """Its record says that nothing is limited; when it is removed, the network is gone."""
    with bad(own, loss="100%", label="broken") as network:
        (record,) = [one for one in registry.records() if one.spec.name == "broken"]
        assert dict(record.spec.limits) == {DOWN: None, UP: None}
        assert record.spec.target.pids == (own.pid,)
        assert network.throttle.id == record.id
        assert arrived(own, 5) == []
        with open_record(record) as found:
            found.remove()
        assert eventually(lambda: len(arrived(own, 5)) == 5)
    assert network.injected()[UP].dropped >= 5


def test_several_networks_in_one_process_do_not_disturb_each_other(
    own: Target, scratch: Cgroup
) -> None:
    """They share programs and maps of their throttles, and each loses and counts its own."""
    with target(scratch) as other, target(scratch) as third:
        with bad(own, upload_loss="every:2"), bad(other, upload_loss="every:3") as second:
            with bad(third, upload_loss="every:4") as last:
                assert arrived(own, 12) == [0, 2, 4, 6, 8, 10]
                assert arrived(other, 6) == [0, 1, 3, 4]
                assert arrived(third, 4) == [0, 1, 2]
                assert (second.injected()[UP].dropped, last.injected()[UP].dropped) == (2, 1)
            assert arrived(third, 4) == [0, 1, 2, 3]


def test_what_cannot_be_had_leaves_nothing(own: Target) -> None:
    """What is sent cannot be late; the error says what can be done instead."""
    before = len(registry.records())
    late = Asked(Conditions(upload=Impairment(delay_s=1.0)), dict.fromkeys(Direction))
    with pytest.raises(ThrottleError, match="can only be lost"):
        begin(model.Target(pids=(own.pid,)), late)
    assert len(registry.records()) == before


def test_the_program_for_old_kernels_counts_merged_packets_by_their_size(
    own: Target, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded where the other is refused, and does the same with packets as they are."""
    from pybpfthrottle.bpf import loader
    from pybpfthrottle.conditions import hooks
    from pybpfthrottle.errors import ProgramLoadError

    def old(spec: Any, *how: Any, **given: Any) -> Any:
        if spec.name == "conditions":
            raise ProgramLoadError("invalid bpf_context access", errno=errno.EACCES)
        return loader.load(spec, *how, **given)

    monkeypatch.setattr(hooks, "loader", type("Old", (), {"load": staticmethod(old)}))
    with conditions(cgroup=scratch.path, loopback=True, download_loss="every:4") as network:
        assert len(arrived(own, 100)) == 75
        assert network.injected()[DOWN].seen == 100
