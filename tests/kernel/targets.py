"""Processes to be limited, and what the kernel knows of their sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

from lab import ENVIRONMENT, TOOL

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.records import ThrottleConfig
from pybpfthrottle.bpf import maps, programs
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import Error
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.linux.sockets import Lender, Scan
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.targets import Selection
from pybpfthrottle.throttle import Throttle

PATIENCE_S = 30.0
# A pass over all processes is made each second, or each eight on a slow machine. So long its result
# may take.
NEXT_PASS_S = 20.0
BOTH = dict.fromkeys(Direction, Rate.parse("1M"))


def eventually(predicate: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """Poll until it gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.01)
    return value


def listening(pid: int) -> bytes:
    """What /proc tells of the TCP sockets in a process's network namespace."""
    return Path(f"/proc/{pid}/net/tcp").read_bytes() + Path(f"/proc/{pid}/net/tcp6").read_bytes()


class Target:
    """A process that does what it is told; see target.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def do(self, how: str) -> Any:
        """What an expression gives there."""
        assert self.process.stdin
        assert self.process.stdout
        print(how, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the target has failed"
        return json.loads(line)

    def end(self) -> None:
        """End it and wait for that."""
        self.process.kill()
        self.process.wait()


@contextmanager
def target(
    cgroup: Cgroup, inside: Callable[..., list[str]] = lambda *c: list(c)
) -> Iterator[Target]:
    """A new one, in a cgroup; ``inside`` makes the command that runs one in another way."""
    name = f"TARGET={uuid.uuid4()}"
    with subprocess.Popen(
        inside("env", name, sys.executable, str(Path(__file__).with_name("target.py"))),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: cgroup.move_in(0),
    ) as process:
        one = Target(process)
        try:
            assert one.do("os.getpid()") == process.pid
            yield one
        finally:
            one.end()
            for pid in cgroup.pids_below():
                if name.encode() in _environment(pid):  # what it has started
                    with suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGKILL)


def as_user(uid: int, *command: str) -> list[str]:
    """The command that runs another one as this user, who may read the interpreter all the same."""
    rights = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    return ["setpriv", f"--reuid={uid}", *rights, *command]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def selected(*pids: int, **how: Any) -> Selection:
    """These processes."""
    return Selection(tuple(map(Process, pids)), **how)


def limited(*pids: int, options: Options = Options(), **how: Any) -> Throttle:  # noqa: B008
    """A limit on these processes, of this process."""
    return throttle.apply([], BOTH, processes=selected(*pids, **how), options=options)


def programs_of(pid: int) -> set[int]:
    """The ids of a limit's programs that its process has descriptors of, or of links of them.

    While it starts, it looks at those of others too.
    """
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found.update(map(int, re.findall(r"^prog_id:\t(\d+)$", path.read_text(), re.M)))
    return {program for program in found if _owner(program) in (pid, None)}


@contextmanager
def _maps_of(program: int) -> Iterator[dict[str, Map[Any, Any]]]:
    """By their names; none if the program is gone meanwhile."""
    with ExitStack() as stack:
        found = {}
        with suppress(Error, OSError):
            for each in programs.info_by_id(program).map_ids:
                one = stack.enter_context(maps.open_by_id(each))
                found[one.spec.name] = one
        yield found


def _owner(program: int) -> Optional[int]:
    """The process that a program says it belongs to, if it says so."""
    with _maps_of(program) as found:
        configs = found.get("CGROUP_CONFIGS")
        if configs is None:
            return None
        records = configs.typed(U32, StructureCodec(ThrottleConfig)).values()
        # A direction without a limit has none.
        return max(int(record.owner_pid) for record in records)


@contextmanager
def live_map(name: str, owner: Optional[int] = None) -> Iterator[Map[Any, Any]]:
    """A map of the limit that a process keeps; it is the only one of that process."""
    for program in programs_of(owner or os.getpid()):
        with _maps_of(program) as found:
            if "CGROUP_CONFIGS" in found and name in found:
                yield found[name]
                return
    raise AssertionError(f"process {owner or os.getpid()} has no map {name}")


def marked(pid: int, numbers: Sequence[int], owner: Optional[int] = None) -> list[bool]:
    """Which of a process's descriptors are sockets with a mark."""
    found = []
    with live_map("MARKS", owner) as marks, Lender(pid) as lender:
        for number in numbers:
            own = lender.borrow(number)
            found.append(own in marks.typed(U32, U32))
            os.close(own)
    return found


def followed(owner: Optional[int] = None) -> set[int]:
    """The processes whose new sockets are marked."""
    with live_map("PROCESSES", owner) as processes:
        return set(processes.typed(U32, U32))


@contextmanager
def tool(
    *arguments: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """The tool with ``--json``, once the limit is in force, and what it says of that."""
    limits = [] if any("-limit" in each for each in arguments) else ["--download-limit", "1M"]
    with subprocess.Popen(
        [*prefix, *TOOL, *arguments, *limits, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def transferred(pid: int, direction: Direction) -> int:
    """Payload bytes of the TCP connections that a process has open."""
    total = 0
    for found in Scan().new([pid]):
        if found.is_tcp:
            info = found.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            acked, received = struct.unpack_from("=QQ", info, 120)
            total += acked if direction is Direction.UPLOAD else received
    return total


def pacing(pid: int) -> list[int]:
    """The most that each TCP connection of a process is paced at, in bytes per second."""
    infos = (
        found.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 120)
        for found in Scan().new([pid])
        if found.is_tcp
    )
    return [struct.unpack_from("=Q", info, 112)[0] for info in infos]


def rates_over(pids: Sequence[int], direction: Direction, seconds: float) -> list[float]:
    """Bytes per second of each process's connections, in the same time."""
    begin = time.monotonic()
    before = [transferred(pid, direction) for pid in pids]
    time.sleep(seconds)
    after = [transferred(pid, direction) for pid in pids]
    elapsed = time.monotonic() - begin
    return [(end - start) / elapsed for start, end in zip(before, after)]
