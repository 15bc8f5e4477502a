"""Limits for processes: whose sockets have marks is looked up in the kernel's own map."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from pathlib import Path
from socket import SOCK_DGRAM as DGRAM
from typing import Iterable, Iterator

import pytest
from since import needs_option, needs_release
from targets import (
    NEXT_PASS_S,
    Target,
    eventually,
    followed,
    limited,
    marked,
    target,
)

from pybpfthrottle.bpf.features import Feature
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import descendants, sockets
from pybpfthrottle.linux.cgroup import Cgroup

AF_XDP = 44
IPPROTO_MPTCP = 262
# From the first to the last of these are made, with what a process has open already.
KINDS = (
    "make(AF_INET, SOCK_STREAM)",
    "make(AF_INET6, SOCK_STREAM)",
    "make(AF_INET, SOCK_DGRAM)",
    "make(AF_INET6, SOCK_DGRAM)",
    "make(AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "make(AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)",
    "listen()",
    "connect(port(listen()))",
)


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to be limited."""
    with target(scratch) as one:
        yield one


def test_sockets_of_each_kind_are_marked_old_and_new(own: Target) -> None:
    """Those that a process has open, from the beginning, and those that it makes, at once."""
    before = [own.do(kind) for kind in KINDS]
    with limited(own.pid):
        assert marked(own.pid, before) == [True] * len(KINDS)
        after = [own.do(kind) for kind in KINDS]
        assert marked(own.pid, after) == [True] * len(KINDS)


def test_another_process_of_the_cgroup_gets_no_marks(own: Target, scratch: Cgroup) -> None:
    """Neither on what it has nor on what it makes; nor do its parents, and these tests."""
    with target(scratch) as other, socket.socket() as mine:
        fds = [other.do(kind) for kind in KINDS]
        with limited(own.pid):
            fds += [other.do(kind) for kind in KINDS]
            time.sleep(1.5)
            assert marked(other.pid, fds) == [False] * len(fds)
            assert marked(os.getpid(), [mine.fileno()]) == [False]
            assert followed() == {own.pid}


def test_what_a_listener_accepts_is_marked(own: Target, scratch: Cgroup) -> None:
    """It inherits the mark from the listener, whether that is old or new; the peer does not."""
    listeners = [own.do("listen()")]
    with limited(own.pid), target(scratch) as peer:
        listeners.append(own.do("listen()"))
        theirs = [peer.do(f"connect({own.do(f'port({each})')})") for each in listeners]
        accepted = [own.do(f"accept({each})") for each in listeners]
        assert marked(own.pid, accepted) == [True, True]
        assert marked(peer.pid, theirs) == [False, False]


def test_a_connection_that_waited_to_be_accepted_is_found(own: Target, scratch: Cgroup) -> None:
    """The handshake was over before the listener had a mark: the next pass marks it."""
    listener = own.do("listen()")
    with target(scratch) as peer:
        peer.do(f"connect({own.do(f'port({listener})')})")
        with limited(own.pid):
            accepted = own.do(f"accept({listener})")
            eventually(lambda: marked(own.pid, [accepted]) == [True], within_s=NEXT_PASS_S)


def test_a_process_in_another_network_namespace_is_limited(scratch: Cgroup) -> None:
    """The tool needs to be in none of its namespaces but that of the process ids."""
    with Wire() as wire, target(scratch, wire.client.inside) as own:
        assert os.readlink(f"/proc/{own.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        before = [own.do(kind) for kind in KINDS[:4]]
        with limited(own.pid):
            after = [own.do(kind) for kind in KINDS[:4]]
            assert marked(own.pid, before + after) == [True] * 8


def test_sockets_of_all_threads_are_marked(own: Target) -> None:
    """Those that a thread had, and those that it makes later, in a new thread too."""
    before = own.do("thread('make(AF_INET, SOCK_STREAM)')")
    with limited(own.pid):
        after = own.do("thread('make(AF_INET, SOCK_STREAM)')")
        assert marked(own.pid, [before, after]) == [True, True]


WAYS = ["fork", "double fork", "fork exec", "fork setsid", "double fork setsid exec"]


@pytest.mark.parametrize("way", WAYS)
def test_what_it_starts_is_limited_at_once(own: Target, way: str) -> None:
    """However a child is made: its first socket is marked."""
    with limited(own.pid) as live:
        child = own.do(f"child({way!r})")
        fd = own.do(f"tell({child}, 'make(AF_INET, SOCK_STREAM)')")
        assert marked(child, [fd]) == [True]
        assert live.processes() == sorted([own.pid, child])


@pytest.mark.parametrize("way", [way for way in WAYS if "double" not in way])
def test_what_it_had_started_is_limited(own: Target, way: str) -> None:
    """A child of before, with what it has open, what it makes, and what it starts itself."""
    child = own.do(f"child({way!r})")
    fds = [own.do(f"tell({child}, 'make(AF_INET, SOCK_STREAM)')")]
    with limited(own.pid):
        fds.append(own.do(f"tell({child}, 'make(AF_INET6, SOCK_DGRAM)')"))
        assert marked(child, fds) == [True, True]
        grandchild = own.do(f"tell({child}, 'child()')")
        assert {own.pid, child, grandchild} == followed()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_is_started_while_it_begins_is_not_missed(
    own: Target, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between the time when a process is followed and that when its children are looked up."""
    look_up = descendants.of
    started: dict[int, int] = {}

    def of(pids: Iterable[int]) -> set[int]:
        pids = list(pids)
        found = look_up(pids) if moment == "after" else set()
        if not started:
            child = own.do("child()")
            grandchild = own.do(f"tell({child}, 'child()')")
            started[child] = own.do(f"tell({child}, 'make(AF_INET, SOCK_STREAM)')")
            how = repr(f"tell({grandchild}, 'make(AF_INET, SOCK_STREAM)')")
            started[grandchild] = own.do(f"tell({child}, {how})")
        return found or look_up(pids)

    monkeypatch.setattr(descendants, "of", of)
    with limited(own.pid):
        assert followed() == {own.pid, *started}
        assert [marked(pid, [fd]) for pid, fd in started.items()] == [[True], [True]]


def test_children_may_be_left_out(own: Target) -> None:
    """Neither those that it has nor those that it starts, but the process itself all the same."""
    children = [own.do("child()")]
    with limited(own.pid, children=False) as live:
        children.append(own.do("child('fork exec')"))
        fds = [own.do(f"tell({child}, 'make(AF_INET, SOCK_STREAM)')") for child in children]
        time.sleep(1.5)
        assert [marked(*each) for each in zip(children, [[fd] for fd in fds])] == [[False]] * 2
        assert marked(own.pid, [own.do("make(AF_INET, SOCK_STREAM)")]) == [True]
        assert (live.processes(), followed()) == ([own.pid], {own.pid})


def test_a_child_that_outlives_its_parent_stays_limited(own: Target) -> None:
    """The limit ends with the last of them."""
    child = own.do("child('fork setsid')")
    with limited(own.pid) as live:
        own.do(f"order({child}, 'time.sleep(0.5), make(AF_INET, SOCK_STREAM), time.sleep(60)')")
        own.end()
        assert live.processes() == [child]
        assert not live.vanished()
        [fd] = eventually(lambda: sockets.descriptors(child))
        assert marked(child, [fd.number]) == [True]
        os.kill(child, signal.SIGKILL)
        eventually(live.vanished, within_s=0.5)


def test_an_id_is_forgotten_with_the_last_thread(own: Target) -> None:
    """Not with the first one, if others go on. Who has the id later is not limited."""
    with limited(own.pid) as live:
        own.do("end_first_thread()")
        eventually(lambda: state(own.pid) == "Z")
        assert own.pid in followed()
        assert live.processes() == [own.pid]
        assert not live.vanished()
        fd = own.do("make(AF_INET, SOCK_STREAM)")
        if other_threads_lend(own.pid):
            assert marked(own.pid, [fd]) == [True]
        own.process.kill()
        eventually(lambda: own.pid not in followed(), within_s=0.5)
        assert live.vanished()


def test_what_a_process_without_its_first_thread_has_open_is_marked(own: Target) -> None:
    """Its other threads have the descriptors. That they are out of reach before 6.9 is said."""
    fds = [own.do(kind) for kind in KINDS]
    own.do("end_first_thread()")
    eventually(lambda: state(own.pid) == "Z")
    with limited(own.pid) as live:
        if other_threads_lend(own.pid):
            assert marked(own.pid, fds) == [True] * len(KINDS)
        else:
            [note] = live.notes()
            assert "Linux 6.9" in note


def other_threads_lend(pid: int) -> bool:
    """Whether this kernel lends from a thread, for a process whose first one has ended."""
    try:
        sockets.Lender(pid).close()
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def test_a_forgotten_id_does_not_come_back(own: Target) -> None:
    """What is left of a child that has ended, a zombie, is not followed."""
    with limited(own.pid) as live:
        child = own.do("child()")
        assert child in followed()
        os.kill(child, signal.SIGKILL)
        eventually(lambda: state(child) == "Z")
        time.sleep(1.5)
        assert followed() == {own.pid}
        assert live.processes() == [own.pid]


def state(pid: int) -> str:
    """The state of the first thread of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_forked_server_shares_its_limit_and_that_is_said(own: Target, scratch: Cgroup) -> None:
    """A mark is the socket's: what a process accepts by the same listener is limited for it too."""
    listener = own.do("listen()")
    worker = own.do("child()")
    with limited(worker, children=False) as live, target(scratch) as peer:
        eventually(
            lambda: any(
                f"{own.pid} (" in note and "limited for it as well" in note for note in live.notes()
            ),
            within_s=NEXT_PASS_S,
        )
        peer.do(f"connect({own.do(f'port({listener})')})")
        accepted = own.do(f"accept({listener})")  # by the parent, which is not limited itself
        assert marked(own.pid, [accepted]) == [True]
        assert marked(own.pid, [own.do("make(AF_INET, SOCK_STREAM)")]) == [False]


def test_nobody_is_said_to_share_who_does_not(own: Target, scratch: Cgroup) -> None:
    """There is no note where a process has its sockets for itself."""
    own.do("listen()")
    with target(scratch) as other, limited(own.pid) as live:
        other.do("listen()")
        time.sleep(1.5)
        assert live.notes() == []


def test_a_socket_that_is_handed_over_is_found(own: Target) -> None:
    """By another process, over a Unix socket: the next pass marks it."""
    unix, name = own.do("letter_box()")
    with limited(own.pid), socket.socket() as given, socket.socket(socket.AF_UNIX, DGRAM) as mine:
        time.sleep(0.3)
        mine.connect(f"\0{name}")
        socket.send_fds(mine, [b"x"], [given.fileno()])
        received = own.do(f"receive({unix})")
        eventually(lambda: marked(own.pid, [received]) == [True], within_s=NEXT_PASS_S)


def test_it_is_found_on_a_busy_machine_too(own: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that has to wait for the CPU costs nobody anything: the next is not put off."""
    unix, name = own.do("letter_box()")
    look_up = sockets.descriptors

    def descriptors(pid: int) -> list[sockets.Descriptor]:
        time.sleep(0.05)
        return look_up(pid)

    monkeypatch.setattr(sockets, "descriptors", descriptors)
    with limited(own.pid), socket.socket() as given, socket.socket(socket.AF_UNIX, DGRAM) as mine:
        time.sleep(0.5)
        mine.connect(f"\0{name}")
        socket.send_fds(mine, [b"x"], [given.fileno()])
        received = own.do(f"receive({unix})")
        eventually(lambda: marked(own.pid, [received]) == [True], within_s=NEXT_PASS_S)


def test_two_thousand_sockets_are_marked(own: Target) -> None:
    """All of them, in a fraction of a second, and the next passes cost next to nothing."""
    fds = own.do("make_many(2000)")
    begin = time.monotonic()
    with limited(own.pid):
        assert time.monotonic() - begin < 1.5
        assert all(marked(own.pid, fds))
    scan = sockets.Scan()
    begin = time.monotonic()
    assert sum(1 for _ in scan.new([own.pid])) >= 2000
    first = time.monotonic()
    assert not list(scan.new([own.pid]))
    assert first - begin < 0.5
    assert time.monotonic() - first < 0.2


def test_sockets_that_come_and_go_hide_none_of_those_that_stay(own: Target) -> None:
    """A thousand are opened and closed each second, and files in between get their numbers."""
    before = own.do("make_many(100)")
    own.do("[churn(0.001), churn(0.0007)] and None")
    middle = own.do("make_many(100)")
    for _ in range(5):
        with limited(own.pid) as live:
            after = own.do("make_many(20)")
            assert all(marked(own.pid, before + middle + after))
            assert live.notes() == []


def test_a_number_that_is_a_file_meanwhile_stops_no_scan(
    own: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a socket's when it was looked up; those behind it are marked, nothing stays open."""
    first, second = own.do("make_many(2)")
    look_up = sockets.descriptors

    def descriptors(pid: int) -> list[sockets.Descriptor]:
        found = look_up(pid)
        own.do(f"os.dup2(0, {first})")
        return found

    monkeypatch.setattr(sockets, "descriptors", descriptors)
    mine = len(os.listdir("/proc/self/fd"))
    assert [found.place.number for found in sockets.Scan().new([own.pid])] == [second]
    assert len(os.listdir("/proc/self/fd")) == mine


def test_a_socket_that_has_no_address_stops_no_scan(own: Target) -> None:
    """Some families cannot even be asked for one; the sockets behind it are marked."""
    strange = [
        own.do("make_if_possible(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
        own.do(f"make_if_possible({AF_XDP}, socket.SOCK_RAW)"),
    ]
    needs_option("CONFIG_XDP_SOCKETS", works=strange != [None, None])
    behind = own.do("make_many(4)")
    with limited(own.pid):
        assert all(marked(own.pid, behind))


def test_a_process_may_end_during_the_scan(
    own: Target, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one is limited all the same; where there is no other, that is an error."""
    own.do("make_many(50)")
    look_up = sockets.descriptors

    def descriptors(pid: int) -> list[sockets.Descriptor]:
        found = look_up(pid)
        own.end()
        return found

    monkeypatch.setattr(sockets, "descriptors", descriptors)
    with target(scratch) as other:
        fds = other.do("make_many(50)")
        with limited(own.pid, other.pid) as live:
            assert all(marked(other.pid, fds))
            assert live.processes() == [other.pid]
            assert not live.vanished()
    with pytest.raises(ProcessError, match="no process"):
        limited(own.pid)


def test_a_stopped_process_is_limited(own: Target) -> None:
    """It cannot hinder that, and goes on with marks."""
    fds = own.do("make_many(4)")
    os.kill(own.pid, signal.SIGSTOP)
    eventually(lambda: state(own.pid) == "T")
    with limited(own.pid):
        assert all(marked(own.pid, fds))
        os.kill(own.pid, signal.SIGCONT)
        assert marked(own.pid, [own.do("make(AF_INET, SOCK_STREAM)")]) == [True]


def test_what_goes_past_the_hooks_is_said(own: Target) -> None:
    """AF_PACKET is not limited, which is told with the process's name."""
    own.do("make(socket.AF_PACKET, socket.SOCK_RAW)")
    with limited(own.pid) as live:
        [note] = live.notes()
        assert f"{own.pid} (" in note
        assert "AF_PACKET" in note


@pytest.mark.parametrize("moment", ["before", "later"])
def test_multipath_tcp_is_said(own: Target, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its packets cannot be told by marks; what would limit them is told."""
    how = f"make(AF_INET, SOCK_STREAM, {IPPROTO_MPTCP})"
    needs_release("5.6")
    made = own.do(how.replace("make", "make_if_possible"))
    needs_option("CONFIG_MPTCP", works=made is not None)
    monkeypatch.setattr(Feature, "available", lambda feature: feature.since != "5.19")
    if moment == "later":
        own.do("close_all()")
    with limited(own.pid) as live:
        if moment == "later":
            assert live.notes() == []
            own.do(how)
        [note] = eventually(live.notes, within_s=NEXT_PASS_S)
        assert f"{own.pid} (" in note
        assert "--whole-cgroup" in note
