"""Limits on single processes by one process: one set of programs at the root serves them all."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterable, Iterator

import pytest
from lab import ENVIRONMENT
from since import needs_release, since
from targets import Target, eventually, target

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import crowd, features, pins, programs, registry, shared
from pybpfthrottle.backends.ebpf import throttle as ebpf_throttle
from pybpfthrottle.backends.ebpf.marks import PROCESSES
from pybpfthrottle.backends.ebpf.placed import Placements, Wanted
from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.ebpf.registry import Rules
from pybpfthrottle.backends.ebpf.shared import Sharing
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Direction, Limits, Rate, Traffic
from pybpfthrottle.targets import Selection
from pybpfthrottle.throttle import Throttle

UPLOAD = Direction.UPLOAD
BOTH: Limits = dict.fromkeys(Direction, Rate.parse("1M"))
LOOPBACK = Traffic(loopback=True)
# The kernel attaches so many programs at a hook of a cgroup.
MOST_ATTACHED = 64
HELD = """
import sys, time
from pybpfthrottle import throttle
from pybpfthrottle.model import Direction, Rate, Target, ThrottleSpec, Traffic
limits = dict.fromkeys(Direction, Rate.parse("1M"))
for pid in sys.argv[2:]:
    spec = ThrottleSpec(Target(pids=(int(pid),)), limits, Traffic(loopback=True),
                        kept=sys.argv[1] == "kept")
    held = throttle.start(spec)
    print(held.id, flush=True)
    globals().setdefault("all", []).append(held)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    """As in a process that has no throttle yet."""
    if not features.DIRECT_PACKET_ACCESS.available():
        needs_release("5.1", str(features.DIRECT_PACKET_ACCESS.missing()))
    new = Sharing()
    for module in (shared, ebpf_throttle):
        monkeypatch.setattr(module, "sharing", new)
    return new


def limit(*pids: int) -> Throttle:
    """A limit for these processes together."""
    selection = Selection(tuple(map(Process, pids)))
    return throttle.apply([], BOTH, traffic=LOOPBACK, processes=selection)


@contextmanager
def limited(*targets: Target) -> Iterator[list[Throttle]]:
    """A limit for each process."""
    with ExitStack() as stack:
        made = []
        for one in targets:
            made.append(limit(one.pid))
            stack.callback(made[-1].remove)
        yield made


@contextmanager
def some(scratch: Cgroup, count: int) -> Iterator[list[Target]]:
    """So many processes."""
    with ExitStack() as stack:
        yield [stack.enter_context(target(scratch)) for _ in range(count)]


@contextmanager
def idle(count: int) -> Iterator[list[int]]:
    """Processes that do nothing."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
            assert one.stdin
            stack.callback(one.stdin.close)
            found.append(one.pid)
        yield found


@contextmanager
def held_elsewhere(how: str, *targets: Target) -> Iterator[tuple[int, list[str]]]:
    """Another process that limits each, and the ids of its throttles."""
    command = [sys.executable, "-c", HELD, how, *(str(one.pid) for one in targets)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout
            yield owner.pid, [owner.stdout.readline().strip() for _ in targets]
        finally:
            owner.kill()


def ids(throttles: list[Throttle]) -> list[str]:
    """Their ids."""
    return [one.id for one in throttles]


def records(*known: str) -> list[Record]:
    """What the kernel tells of throttles with these ids."""
    return [one for one in registry.in_force() if one.id in known and not one.removed]


def make(one: Target) -> int:
    """A new datagram socket there."""
    number: int = one.do("make(AF_INET, SOCK_DGRAM)")
    return number


def send(one: Target, number: int) -> None:
    """A datagram from that socket."""
    one.do(f"socket.socket(fileno=os.dup({number})).sendto(b'', ('127.0.0.1', 9)) and 0")


def packets(live: Throttle) -> int:
    """How many uploaded packets it has counted."""
    return live.counters()[UPLOAD].packets_total


def is_there(map_id: int) -> bool:
    """Whether the kernel still has a map."""
    with suppress(OSError), maps.open_by_id(map_id):
        return True
    return False


def test_there_may_be_more_than_the_kernel_attaches_programs() -> None:
    """Each is listed with its process; they are removed in any order, and nothing is left."""
    with ExitStack() as stack:
        pids = stack.enter_context(idle(MOST_ATTACHED + 10))
        made = []
        for pid in pids:
            made.append(limit(pid))
            stack.callback(made[-1].remove)
        found = records(*ids(made))
        own = {one.id: registry.processes(one) for one in found}
        kept = {map_id for one in found for map_id in one.handles["maps"].values()}
        assert [own[one.id] for one in made] == [[pid] for pid in pids]
        random.Random(1).shuffle(made)
        for count, live in enumerate(made, 1):
            live.remove()
            if count % 20 == 0:
                left = records(*own)
                assert {one.id for one in left} == {one.id for one in made[count:]}
        assert not records(*own)
        eventually(lambda: not any(map(is_there, kept)))


def test_each_counts_its_own_packets(scratch: Cgroup) -> None:
    """Of sockets from before and of later ones, and no packet twice."""
    with some(scratch, 4) as processes:
        before = [make(one) for one in processes]
        with limited(*processes) as made:
            assert len({record.handles["maps"]["MARKS"] for record in records(*ids(made))}) == 2
            for times, (one, number) in enumerate(zip(processes, before)):
                for _ in range(times):
                    send(one, number)
                    send(one, make(one))
            assert [packets(one) for one in made] == [0, 2, 4, 6]


def test_what_one_starts_is_limited_with_it(scratch: Cgroup) -> None:
    """Processes are told apart in the kernel, too."""
    with some(scratch, 3) as processes, limited(*processes) as made:
        child = processes[2].do("child()")
        processes[2].do(f"tell({child}, 'make(AF_INET, SOCK_DGRAM)')")
        eventually(lambda: set(made[2].processes()) == {processes[2].pid, child})
        assert made[1].processes() == [processes[1].pid]


def starts_limited(live: Throttle, program: Path) -> bool:
    """Whether a process is limited as soon as it has its name."""
    with subprocess.Popen([program, "60"]) as one:
        try:
            eventually(lambda: Path(f"/proc/{one.pid}/comm").read_text().strip() == program.name)
            return live.by_name([one.pid]) == {one.pid} and one.pid in live.processes()
        finally:
            one.kill()


@since("5.8")
def test_a_name_goes_to_the_next_that_expects_it(tmp_path: Path) -> None:
    """After the end of the first that does, and not to one that has ended meanwhile."""
    program = tmp_path / f"n{os.getpid()}"
    shutil.copy(shutil.which("sleep") or "", program)
    with ExitStack() as stack:
        made = []
        for pid in stack.enter_context(idle(4)):
            made.append(limit(pid))
            stack.callback(made[-1].remove)
        _, first, second, third = made
        for live in (first, second, third):
            live.expect([program.name])
        assert starts_limited(first, program)
        second.remove()
        first.remove()
        assert starts_limited(third, program)


def test_what_was_started_in_the_last_moment_is_not_left_behind(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are many processes, a limit knows them as they were a moment ago."""
    monkeypatch.setattr(crowd, "_MANY", 0)
    monkeypatch.setattr(crowd.Crowd.slots, "__defaults__", (1000.0,))
    with some(scratch, 3) as processes, limited(*processes[:2]):
        parent = processes[2]
        live = limit(parent.pid)
        [record] = records(live.id)
        with maps.open_by_id(record.handles["maps"][PROCESSES]) as live_map:
            followed = live_map.typed(U32, RAW)
            child = parent.do("child()")
            assert {parent.pid, child} <= set(followed)
            live.remove()
            assert not {parent.pid, child} & set(followed)


def test_no_other_thread_comes_between_a_gate_and_its_place(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two limits that begin at the same time would attach it twice, or to what has ended."""
    free: list[bool] = []
    attach = Placements.attach

    def is_free() -> bool:
        if not crowd.sharing.busy.acquire(blocking=False):
            return False
        crowd.sharing.busy.release()
        return True

    def attach_shared(placed: Placements, wanted: Iterable[Wanted]) -> None:
        wanted = list(wanted)
        if programs.gate(Scope.MARKED) in [program for program, *_ in wanted]:
            with ThreadPoolExecutor(1) as other:
                free.append(other.submit(is_free).result())
        attach(placed, wanted)

    monkeypatch.setattr(Placements, "attach", attach_shared)
    with some(scratch, 2) as processes, limited(*processes):
        # The first one has a gate of its own.
        assert free == [True, False]


def test_a_socket_is_limited_again_after_its_limit_has_ended(scratch: Cgroup) -> None:
    """It keeps the mark of the throttle that has ended."""
    with some(scratch, 3) as processes, limited(*processes[:2]) as made:
        number = make(processes[2])
        for _ in range(2):
            live = limit(processes[2].pid)
            try:
                send(processes[2], number)
                assert packets(live) == 1
            finally:
                live.remove()
        send(processes[2], number)
        assert [packets(one) for one in made] == [0, 0]


def test_a_process_and_what_has_started_it_are_limited_by_both(scratch: Cgroup) -> None:
    """A mark is for one throttle, so that these do not share marks."""
    with some(scratch, 2) as processes, limited(processes[0]):
        parent = processes[1]
        child = parent.do("child()")
        with ExitStack() as stack:
            made = []
            for pid in (parent.pid, child):
                made.append(limit(pid))
                stack.callback(made[-1].remove)
            number = parent.do(f"tell({child}, 'make(AF_INET, SOCK_DGRAM)')")
            how = f"socket.socket(fileno=os.dup({number})).sendto(b'', ('127.0.0.1', 9)) and 0"
            parent.do(f"tell({child}, {how!r})")
            assert [packets(one) for one in made] == [1, 1]


def test_coverage_tells_whose_mark_it_is(scratch: Cgroup) -> None:
    """A rule for each throttle, though the program is the same."""
    with some(scratch, 3) as processes, limited(*processes) as made, Rules() as rules:
        found = records(*ids(made)[1:])
        (marks,) = {one.handles["maps"]["MARKS"] for one in found}
        told = {rule.mark for rule in rules.all if rule.mark and rule.mark[0] == marks}
        assert told == {(marks, one.handles["slot"]) for one in found}


def test_nothing_is_left_of_those_whose_owner_is_killed(scratch: Cgroup) -> None:
    """Their programs and maps end with it."""
    with some(scratch, 3) as processes, held_elsewhere("own", *processes) as (owner, made):
        found = records(*made)
        assert len(found) == 3
        kept = {map_id for one in found for map_id in one.handles["maps"].values()}
        os.kill(owner, signal.SIGKILL)
        eventually(lambda: not any(map(is_there, kept)))
        assert not records(*made)


def test_those_that_stay_do_so_without_their_owner(scratch: Cgroup) -> None:
    """Each until it is removed, and its process is limited until then."""
    with some(scratch, 3) as processes, held_elsewhere("kept", *processes) as (owner, made):
        try:
            os.kill(owner, signal.SIGKILL)
            os.waitpid(owner, 0)
            marks = {one.handles["maps"]["MARKS"] for one in records(*made)}
            assert len(records(*made)) == 3
            assert len(marks) == 2
            for one in processes[1:]:
                send(one, make(one))
            assert [passed(one) for one in made] == [0, 1, 1]
            throttle.open_record(*records(made[1])).remove()
            send(processes[2], make(processes[2]))
            assert passed(made[2]) == 2
        finally:
            for record in records(*made):
                throttle.open_record(record).remove()
        assert not any(pins.of(one) for one in made)
        eventually(lambda: not any(map(is_there, marks)))


def passed(throttle_id: str) -> int:
    """How many uploaded packets a throttle has counted."""
    with throttle.open_record(*records(throttle_id)) as live:
        return packets(live)


@since("5.4")
def test_the_kernels_types_are_not_kept(sharing: Sharing) -> None:
    """They are megabytes, which nothing needs once the programs are fitted to them."""
    gc.collect()
    gc.disable()
    try:
        with idle(3) as pids:
            throttles = [limit(pid) for pid in pids]
            try:
                kept = [one for one in gc.get_objects() if isinstance(one, Btf)]
                assert all(len(bytes(one)) < 1 << 20 for one in kept)
            finally:
                for one in throttles:
                    one.remove()
    finally:
        gc.enable()
