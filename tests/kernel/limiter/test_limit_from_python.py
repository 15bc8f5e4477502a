"""Limiting from Python: in force, looked after, seen by others, and gone when it ends."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from typing import Any, Iterator

import pytest
from lab import ENVIRONMENT, TOOL, attached
from targets import NEXT_PASS_S, Target, eventually, followed, marked, programs_of, target

import pybpfthrottle
from pybpfthrottle import Direction, Rate, registry
from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.errors import CgroupError, LimitError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup

STREAM = "make(AF_INET, SOCK_STREAM)"


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to be limited."""
    with target(scratch) as one:
        yield one


def threads() -> int:
    """How many threads of ours this process has."""
    return sum(thread.name == "pybpfthrottle" for thread in threading.enumerate())


def test_a_process_is_limited_within_the_block(own: Target) -> None:
    """With its sockets of before and later ones; afterwards nothing of it is there."""
    before = own.do(STREAM)
    with pybpfthrottle.limit(pid=own.pid, upload="8mbit") as throttle:
        assert throttle.limits == {Direction.UPLOAD: Rate(1_000_000)}
        assert throttle.processes() == [own.pid]
        assert marked(own.pid, [before, own.do(STREAM)]) == [True, True]
        assert threads() == 1
        ours = programs_of(os.getpid()) & set(attached(cgroup.root(), programs.HOOKS))
        assert ours
    assert threads() == 0
    assert not ours & set(attached(cgroup.root(), programs.HOOKS))


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_a_short_burst_passes_at_a_low_rate(own: Target, direction: str) -> None:
    """QUIC begins with two datagrams or three: a queue that they would make is none yet."""
    with pybpfthrottle.limit(pid=own.pid, loopback=True, **{direction: "400kbit"}):
        assert own.do("burst(2, 1250)") == 2


def test_limits_change_while_it_is_in_force(scratch: Cgroup) -> None:
    """By text, by number, to nothing; what is no limit is refused and changes nothing."""
    with pybpfthrottle.limit(cgroup=scratch.path, download="1M", upload=4096) as throttle:
        throttle.set(download="2M", upload=None)
        expected = {Direction.DOWNLOAD: Rate(2 << 20), Direction.UPLOAD: None}
        assert throttle.limits == expected
        with pytest.raises(LimitError, match="much"):
            throttle.set(download="much")
        assert throttle.limits == expected
        assert throttle.counters()[Direction.UPLOAD].packets_total == 0


def test_a_removed_throttle_says_so(scratch: Cgroup) -> None:
    """After the block there are no counters, and nothing to change."""
    with pybpfthrottle.limit(cgroup=scratch.path, download="1M") as throttle:
        throttle.pause()
    for use in (throttle.counters, throttle.resume, lambda: throttle.set(download="2M")):
        with pytest.raises(ThrottleError, match=f"the throttle {throttle.id} was removed"):
            use()
    throttle.remove()


@pytest.mark.parametrize("pid", ["1234", [1, "2"]])
def test_a_process_id_that_is_no_number_is_refused(pid: Any) -> None:
    """Such as one that was read from a file."""
    with pytest.raises(ThrottleError, match="a process id is a number"):
        pybpfthrottle.limit(pid=pid, download="1M")


def test_all_limits_of_a_process_share_one_thread(scratch: Cgroup) -> None:
    """It ends with the last of them."""
    child = scratch.create_child("child")
    try:
        with pybpfthrottle.limit(cgroup=child.path, upload="1M"):
            second = pybpfthrottle.limit(cgroup=child.path, download="1M")
            assert threads() == 1
            second.remove()
            assert threads() == 1
        assert threads() == 0
    finally:
        child.remove(patience_s=5)


def test_many_limits_in_a_row_tidy_up_once(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at all that is on the machine, for what a crash may have left."""
    tidied: list[float] = []
    monkeypatch.setattr(registry, "tidy_up", lambda: tidied.append(time.monotonic()))
    for moment, times in ((-math.inf, 1), (time.monotonic(), 1), (-math.inf, 2)):
        monkeypatch.setattr(registry, "_tidied_s", moment)
        pybpfthrottle.limit(cgroup=scratch.path, upload="1M").remove()
        assert len(tidied) == times


def test_later_processes_are_taken_in(scratch: Cgroup, own: Target) -> None:
    """The thread looks after what matches by name."""
    name = own.do("open('/proc/self/comm').read().strip()")
    marker = f"n{os.getpid()}"
    own.do(f"open('/proc/self/comm', 'w').write({marker!r}) and None")
    with pybpfthrottle.limit(name=marker, upload="1M", children=False) as throttle:
        assert throttle.processes() == [own.pid]
        with target(scratch) as later:
            later.do(f"open('/proc/self/comm', 'w').write({marker!r}) and None")
            eventually(lambda: later.pid in followed(), within_s=NEXT_PASS_S)
    assert name


def test_an_event_loop_looks_after_it(own: Target) -> None:
    """Without any thread; a child that is started is limited, and what it hands over is found."""

    async def main() -> None:
        async with pybpfthrottle.limit(pid=own.pid, upload="1M") as throttle:
            assert threads() == 0
            throttle.set(upload="2M")
            child = own.do("child()")
            assert child in throttle.processes()
            await asyncio.sleep(1.2)
            assert throttle.ended() == ""

    asyncio.run(main())
    assert threads() == 0


def test_the_caller_may_look_after_it(own: Target) -> None:
    """With a loop of the caller's own, by the chores."""
    throttle = pybpfthrottle.limit(pid=own.pid, upload="1M", supervise=False)
    try:
        assert threads() == 0
        assert throttle.chores()
        for chore in throttle.chores():
            chore.run()
    finally:
        throttle.remove()


OTHER = [*TOOL, "--upload-limit", "1M", "--json"]


def test_a_throttle_of_another_process_is_found_changed_and_removed(scratch: Cgroup) -> None:
    """As the command line does."""
    with subprocess.Popen(
        [*OTHER, "--cgroup", scratch.path, "--label", "theirs"],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as other:
        assert other.stdout
        assert other.stdout.readline()
        [found] = [one for one in pybpfthrottle.throttles() if one.owner_pid == other.pid]
        assert (found.name, found.cgroups, found.kept) == ("theirs", (scratch.path,), False)
        assert found.limits == {Direction.UPLOAD: Rate(1 << 20)}
        with found.open() as throttle:
            throttle.set(upload="3M")
            assert throttle.counters()[Direction.UPLOAD].packets_total == 0
        assert other.poll() is None
        [again] = [one for one in pybpfthrottle.throttles() if one.id == found.id]
        assert again.limits == {Direction.UPLOAD: Rate(3 << 20)}
        again.open().remove()
        assert attached(scratch) == []
        other.communicate(timeout=10)
        assert other.returncode == 0
    with pytest.raises(ThrottleError, match="gone"):
        found.open()


def test_own_throttles_are_listed_too(scratch: Cgroup) -> None:
    """What this process keeps is in force like any other."""
    with pybpfthrottle.limit(cgroup=scratch.path, upload="1M", label="mine") as throttle:
        [found] = [one for one in pybpfthrottle.throttles() if one.id == throttle.id]
        assert (found.name, found.owner_pid) == ("mine", os.getpid())
    assert throttle.id not in {one.id for one in pybpfthrottle.throttles()}


def test_what_others_remove_is_noticed(scratch: Cgroup) -> None:
    """Within a moment, without asking for anything."""
    with pybpfthrottle.limit(cgroup=scratch.path, upload="1M") as throttle:
        subprocess.run([*TOOL, "remove", throttle.id], env=ENVIRONMENT, check=True)
        assert attached(scratch) == []
        eventually(lambda: throttle.ended() == "removed", within_s=5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pid": 1}, ThrottleError, "no limit"),
        ({"upload": "1M"}, ThrottleError, "no target"),
        ({"pid": 1, "cgroup": "/", "upload": "1M"}, ThrottleError, "cannot share"),
        ({"pid": 1 << 22, "upload": "1M"}, ProcessError, "no process"),
        ({"pid": 1, "upload": "8mbps"}, LimitError, "bits or bytes"),
    ],
)
def test_a_mistake_is_an_error_of_this_package(arguments, error, words) -> None:
    """With the same words as on the command line; nothing is attached, no thread runs."""
    with pytest.raises(error, match=words):
        pybpfthrottle.limit(**arguments)
    assert threads() == 0


def test_this_session_is_not_limited_by_accident() -> None:
    """The safety rules are those of the command line, and so is what insists."""
    with pytest.raises(ProcessError, match="this session"):
        pybpfthrottle.limit(cgroup=cgroup.from_pid(os.getpid()).path, upload="1M")


def test_what_another_process_limits_is_refused(scratch: Cgroup, own: Target) -> None:
    """Unless both are wanted. It may have begun since this process looked for others last."""
    pybpfthrottle.limit(cgroup=scratch.path, upload="1M").remove()
    code = "import pybpfthrottle, sys; pybpfthrottle.limit(pid=int(sys.argv[1]), upload='1M')"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(1, flush=True); sys.stdin.read()", str(own.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as other:
        assert other.stdout
        assert other.stdout.readline()
        with pytest.raises(ProcessError, match=f"already limited by process {other.pid}"):
            pybpfthrottle.limit(pid=own.pid, upload="1M")
        wish = pybpfthrottle.Wish(stack=True)
        pybpfthrottle.limit(pid=own.pid, upload="1M", wish=wish).remove()
        other.communicate(timeout=10)


def test_what_this_program_limits_is_refused(scratch: Cgroup, own: Target) -> None:
    """In the same direction, unless both are wanted, until the first limit ends."""
    first = pybpfthrottle.limit(pid=own.pid, upload="1M")
    with pytest.raises(
        ProcessError, match=rf"{own.pid} .* is already limited by {first.id}, .* set"
    ):
        pybpfthrottle.limit(pid=[os.getpid(), own.pid], upload="2M", download="1M")
    with pytest.raises(ProcessError, match="already limited"):
        pybpfthrottle.conditions(pid=own.pid, upload="2M")
    pybpfthrottle.limit(pid=own.pid, download="1M").remove()
    pybpfthrottle.limit(pid=own.pid, upload="2M", stack=True).remove()
    next(one for one in pybpfthrottle.throttles() if one.id == first.id).open().remove()
    eventually(lambda: not first.in_force)
    with pybpfthrottle.limit(pid=own.pid, upload="2M"):
        first.remove()
    with pybpfthrottle.limit(cgroup=scratch.path, upload="1M") as throttle:
        with pytest.raises(
            CgroupError, match=rf"{scratch.path} is already limited by {throttle.id}"
        ):
            pybpfthrottle.limit(cgroup=scratch.path, upload="1M")
        throttle.set(upload=None)
        pybpfthrottle.limit(cgroup=scratch.path, upload="1M").remove()


def test_a_child_of_this_program_asks_only_the_kernel(own: Target) -> None:
    """It has no thread that would answer for the throttles of its parent."""
    with pybpfthrottle.limit(pid=own.pid, upload="1M"):
        child = os.fork()
        if child == 0:
            try:
                pybpfthrottle.limit(pid=own.pid, upload="1M")
            except ProcessError as error:
                os._exit(f"by process {os.getppid()}" not in str(error))
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_a_burst_of_threads_may_use_one_throttle(scratch: Cgroup) -> None:
    """All changes go through the thread that looks after it."""
    with pybpfthrottle.limit(cgroup=scratch.path, upload="1M") as throttle:
        rates = [Rate(1_000_000 + each) for each in range(20)]
        changing = [
            threading.Thread(target=throttle.set_limit, args=(Direction.UPLOAD, rate))
            for rate in rates
        ]
        for thread in changing:
            thread.start()
        for thread in changing:
            thread.join()
        assert throttle.limits[Direction.UPLOAD] in rates
        time.sleep(0.3)
        assert throttle.limits[Direction.UPLOAD] in rates


# What takes long to import, and no start of a limit has to wait for.
UNUSED = {
    *("click", "rich", "elftools", "logging", "subprocess", "concurrent", "tempfile", "csv"),
    *("dataclasses", "inspect", "ast"),
    *("pybpfthrottle.backends.nft", "pybpfthrottle.backends.tc", "pybpfthrottle.networks"),
    *("pybpfthrottle.groups", "pybpfthrottle.shares", "pybpfthrottle.sharing"),
}


@pytest.mark.alone  # limits in force by other backends are looked for by these
def test_a_start_imports_only_what_it_needs(scratch: Cgroup) -> None:
    """A limit is in force without any other package, and without the backends it does not use."""
    code = (
        "import sys, pybpfthrottle\n"
        f"limit = pybpfthrottle.limit(cgroup={scratch.path!r}, upload=10**9, supervise=False)\n"
        "print(*sys.modules)\n"
        "limit.remove()"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert UNUSED & set(done.stdout.split()) == set()
