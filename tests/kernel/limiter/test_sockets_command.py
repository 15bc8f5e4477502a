"""pybpfthrottle sockets: real sockets of each kind, what covers them, and why nothing does."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import pytest
from lab import ENVIRONMENT, ROOT, TOOL
from since import needs_option, needs_release

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import features
from pybpfthrottle.backends.ebpf.bucket import config_for
from pybpfthrottle.backends.ebpf.records import ThrottleConfig
from pybpfthrottle.backends.ebpf.registry import MARKS
from pybpfthrottle.backends.ebpf.strays import Strays
from pybpfthrottle.bpf import abi, btf_objects, links, maps, programs
from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.asm import load_map, return_imm
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import Lender
from pybpfthrottle.model import Direction, Rate, Traffic

BOTH = dict.fromkeys(Direction, Rate.parse("1M"))
BOTH_WORDS = ["download", "upload"]
MPTCP = 262
PORT = 7700
ANY = "0.0.0.0"  # noqa: S104 - only compared with

# Opens what its arguments ask for, tells the descriptors, and does each line as it comes in.
CHILD = """
import json, socket, subprocess, sys
S, D, R = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
I, I6 = socket.AF_INET, socket.AF_INET6
def to(address, family=I, type=S, protocol=0):
    s = socket.socket(family, type, protocol)
    s.connect(address)
    return s
def at(address, family=I, type=S):
    s = socket.socket(family, type)
    s.bind(address)
    if type == S:
        s.listen()
    return s
def heir(s):
    return subprocess.Popen(['sleep', '60'], pass_fds=[s.fileno()]).pid
kept = []
def tell(found):
    kept.append(found)
    numbers = {name: s if type(s) is int else s.fileno() for name, s in found.items()}
    print(json.dumps(numbers), flush=True)
for line in sys.stdin:
    tell(eval(line))
"""
SERVER = f"""
import socket, sys
s = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
kept = []
while True:
    kept.append(s.accept()[0])
"""


class Child:
    """A process that opens sockets when it is asked to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def open(self, expressions: str) -> dict[str, int]:
        """The descriptors of what a dict of expressions makes, by name."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(expressions + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the child has failed"
        found: dict[str, int] = json.loads(line)
        return found


@contextmanager
def started(command: Sequence[str], cgroup: Cgroup | None = None) -> Iterator[Child]:
    """A process of the test's, ended in the end."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: cgroup.move_in(0)) if cgroup else None,
    ) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


@pytest.fixture
def child(scratch: Cgroup) -> Iterator[Child]:
    """A child in the scratch cgroup and in the namespace of the test."""
    with started([sys.executable, "-c", CHILD], scratch) as own:
        yield own


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Two namespaces; in the server's somebody accepts connections."""
    with Wire() as own:
        server = own.server.inside(sys.executable, "-c", SERVER)
        with started(server) as process:
            assert process.process.stdout
            assert process.process.stdout.readline() == "ready\n"
            yield own


@pytest.fixture
def far(wire: Wire, scratch: Cgroup) -> Iterator[Child]:
    """A child in the scratch cgroup and in the client's namespace."""
    with started(wire.client.inside(sys.executable, "-c", CHILD), scratch) as own:
        yield own


def run(*pids: int, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """The command with --json."""
    arguments = [part for pid in pids for part in ("--pid", str(pid))]
    return subprocess.run(
        [*prefix, *TOOL, "sockets", *arguments, "--json"],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=60,
        **options,
    )


def told(pid: int) -> dict[int, dict[str, Any]]:
    """What the command tells of a process's sockets, by descriptor."""
    done = run(pid)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["errors"] == []
    (process,) = document["processes"]
    assert process["pid"] == pid
    assert process["unknown"] is None
    return {each["fd"]: each for each in process["sockets"]}


def shown(one: dict[str, Any]) -> tuple[Any, ...]:
    """What a socket is."""
    return one["family"], one["type"], one["protocol"], one["state"]


def end(address: str, port: int | None = None) -> dict[str, Any]:
    """An address as JSON has it."""
    return {"address": address, "port": port}


def covered_by(by: str, owner: int | None = None) -> list[dict[str, Any]]:
    """A throttle of both directions as JSON has it."""
    owner = os.getpid() if owner is None else owner
    return [{"owner_pid": owner, "owner_ended": False, "by": by, "directions": BOTH_WORDS}]


def code(one: dict[str, Any]) -> str | None:
    """Why a socket is not covered."""
    return one["reason"] and str(one["reason"]["code"])


def notes(one: dict[str, Any]) -> dict[str, str]:
    """What else is said of a socket, by code."""
    return {note["code"]: note["text"] for note in one["notes"]}


# What a throttle with marks has: programs of ours that are not for a whole cgroup, which use the
# map MARKS and the configuration. These let all pass: it is the command that is tested.

INT_BTF = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 16, 16, 5) + (
    struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32) + b"\0int\0"
)


@contextmanager
def marking(
    cgroup: Cgroup, *, loopback: bool = False, record_bytes: int = ctypes.sizeof(ThrottleConfig)
) -> Iterator[Map[int, int]]:
    """A throttle of marked sockets on a cgroup; its marks, by descriptors of this process."""
    with ExitStack() as stack:
        types = btf_objects.load(INT_BTF)
        assert types
        stack.enter_context(types)
        flags = abi.BPF_F_NO_PREALLOC | 1 << 9  # BPF_F_CLONE
        marks_spec = MapSpec(MARKS, MapType.SK_STORAGE, 4, 4, 0, flags, key_type=1, value_type=1)
        marks = stack.enter_context(maps.create(marks_spec, btf_fd=types.fd))
        configs_spec = MapSpec("CGROUP_CONFIGS", MapType.ARRAY, 4, record_bytes, 2)
        configs = stack.enter_context(maps.create(configs_spec))
        for direction, rate in BOTH.items():
            record = bytes(config_for(rate, loopback=loopback))[:record_bytes]
            configs.typed(U32, RAW)[direction] = record
        fd = cgroup.open()
        stack.callback(os.close, fd)
        for name, hook in (
            ("pybpft_mingress", AttachType.CGROUP_INET_INGRESS),
            ("pybpft_megress", AttachType.CGROUP_INET_EGRESS),
        ):
            code = load_map(1, marks.fd) + load_map(1, configs.fd) + return_imm(1)
            program = programs.load(
                code,
                type=ProgType.CGROUP_SKB,
                license="GPL",
                name=name,
                expected_attach_type=hook,
            )
            stack.enter_context(program)
            stack.callback(links.create_link(program, fd, hook).detach)
        yield marks.typed(U32, U32)


def mark(marks: Map[int, int], pid: int, *descriptors: int) -> None:
    """Mark sockets of a process."""
    with Lender(pid) as lender:
        for number in descriptors:
            own = lender.borrow(number)
            marks[own] = 1
            os.close(own)


def test_each_kind_is_told_with_its_addresses(far: Child, wire: Wire) -> None:
    """Family, type, protocol, addresses and TCP state are those of the socket, in any namespace."""
    four, six = wire.server.address, wire.server.address6
    fds = far.open(
        "{"
        f"'tcp4': to(('{four}', {PORT})), 'tcp6': to(('{six}', {PORT}), I6),"
        f"'mapped': to(('::ffff:{four}', {PORT}), I6),"
        f"'udp': to(('{four}', 9), I, D), 'bound': at(('', 5353), I, D),"
        "'loose': socket.socket(I, D), 'listener': at(('::1', 7), I6),"
        "'raw': socket.socket(I, R, 1), 'unix': at('\\0abstract-one', socket.AF_UNIX, D),"
        "'netlink': at((0, 0), socket.AF_NETLINK, R),"
        "'packet': socket.socket(socket.AF_PACKET, R, 0), 'vsock': socket.socket(40, S)}"
    )
    found = told(far.pid)
    one = {name: found.get(fd) for name, fd in fds.items()}
    assert set(fds.values()) == set(found)
    assert shown(one["tcp4"]) == ("inet", "stream", "tcp", "established")
    assert one["tcp4"]["remote"] == end(four, PORT)
    assert one["tcp4"]["local"]["address"] == wire.client.address
    assert shown(one["tcp6"]) == ("inet6", "stream", "tcp", "established")
    assert one["tcp6"]["remote"] == end(six, PORT)
    assert one["mapped"]["remote"] == end(f"::ffff:{four}", PORT)
    assert shown(one["udp"]) == ("inet", "dgram", "udp", None)
    assert one["udp"]["remote"] == end(four, 9)
    assert (one["bound"]["local"], one["bound"]["remote"]) == (end(ANY, 5353), None)
    assert (one["loose"]["local"], one["loose"]["remote"]) == (None, None)
    assert shown(one["listener"]) == ("inet6", "stream", "tcp", "listen")
    assert one["listener"]["local"] == end("::1", 7)
    assert shown(one["raw"]) == ("inet", "raw", "icmp", None)
    assert shown(one["unix"]) == ("unix", "dgram", None, None)
    assert one["unix"]["local"] == end("@abstract-one")
    assert shown(one["netlink"]) == ("netlink", "raw", None, None)
    assert shown(one["packet"]) == ("packet", "raw", None, None)
    assert shown(one["vsock"]) == ("vsock", "stream", None, None)
    with Lender(far.pid) as lender:
        own = lender.borrow(fds["tcp4"])
        assert one["tcp4"]["inode"] == os.fstat(own).st_ino
        os.close(own)
    assert {name: code(each) for name, each in one.items()} == {
        **dict.fromkeys(("tcp4", "tcp6", "mapped", "udp", "bound", "loose"), "no-throttle"),
        **dict.fromkeys(("listener", "raw"), "no-throttle"),
        **dict.fromkeys(("unix", "netlink", "vsock"), "not-ip"),
        "packet": "packet",
    }
    assert f"use --pid {far.pid}" in one["tcp4"]["reason"]["text"]
    assert f"use --pid {far.pid} --loopback" in one["listener"]["reason"]["text"]


def test_a_connection_that_the_peer_closed_is_told(child: Child) -> None:
    """A TCP socket whose other side is closed is in CLOSE-WAIT."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        fds = child.open(f"{{'tcp': to({server.getsockname()!r})}}")
        server.accept()[0].close()
        deadline = time.monotonic() + 10
        while told(child.pid)[fds["tcp"]]["state"] != "close-wait":
            assert time.monotonic() < deadline


def test_a_limited_cgroup_covers_its_sockets(far: Child, wire: Wire, scratch: Cgroup) -> None:
    """In another namespace too; but nothing that is no IP traffic, and not the loopback device."""
    fds = far.open(
        f"{{'tcp4': to(('{wire.server.address}', {PORT})), 'loose': socket.socket(I, D),"
        f"'tcp6': to(('{wire.server.address6}', {PORT}), I6), 'raw': socket.socket(I, R, 1),"
        f"'udp': to(('{wire.server.address}', 9), I, D), 'any': at(('', 7)), 'own': at(('', 0)),"
        f"'loopback': to(('127.0.0.1', 9), I, D), 'self': to(('{wire.client.address}', 9), I, D),"
        "'self6': to(('::ffff:127.0.0.1', 9), I6, D), 'local': at(('::1', 7), I6),"
        "'packet': socket.socket(socket.AF_PACKET, R, 0), 'unix': socket.socket(socket.AF_UNIX)}"
    )
    with throttle.apply([scratch], BOTH):
        found = told(far.pid)
    one = {name: found[fd] for name, fd in fds.items()}
    for name in ("tcp4", "tcp6", "udp", "raw", "any", "loose"):
        assert (one[name]["covered"], name) == (True, name)
        assert one[name]["covered_by"] == covered_by("cgroup")
        assert one[name]["reason"] is None
        assert one[name]["cgroup"] == scratch.path
    assert notes(one["any"]).keys() == {"listens"}
    assert one["tcp4"]["notes"] == []
    # The kernel lists no socket that is neither bound nor connected; raw ones not always.
    assumed = {name for name in one if one[name]["cgroup_assumed"]}
    assert {"loose"} <= assumed <= {"loose", "raw"}
    assert "cgroup-assumed" in notes(one["loose"])
    for name in ("loopback", "self", "self6", "local"):
        assert (one[name]["covered"], code(one[name])) == (False, "loopback")
    assert (code(one["packet"]), code(one["unix"])) == ("packet", "not-ip")


def test_loopback_is_covered_where_the_throttle_says_so(child: Child, scratch: Cgroup) -> None:
    """With --loopback sockets to the loopback device are covered."""
    fds = child.open("{'udp': to(('127.0.0.1', 9), I, D), 'six': to(('::1', 9), I6, D)}")
    with throttle.apply([scratch], BOTH, traffic=Traffic(loopback=True)):
        found = told(child.pid)
    assert [found[fd]["covered_by"] for fd in fds.values()] == [covered_by("cgroup")] * 2


def test_one_direction_is_told(child: Child, scratch: Cgroup) -> None:
    """A throttle of uploads covers the upload; a limit of a cgroup above counts too."""
    fds = child.open("{'udp': at(('', 0), I, D)}")
    below = scratch.create_child("below")
    try:
        with started([sys.executable, "-c", CHILD], below) as deep:
            deeper = deep.open("{'udp': at(('', 0), I, D)}")
            with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")}):
                for own, made in ((child, fds), (deep, deeper)):
                    (cover,) = told(own.pid)[made["udp"]]["covered_by"]
                    assert cover["directions"] == ["upload"]
    finally:
        below.remove(patience_s=5)


def test_a_limit_that_was_lifted_covers_nothing(child: Child, scratch: Cgroup) -> None:
    """A throttle that limits a direction no more does not cover it."""
    fds = child.open("{'udp': at(('', 0), I, D)}")
    with throttle.apply([scratch], BOTH) as own:
        own.set_limit(Direction.DOWNLOAD, None)
        assert told(child.pid)[fds["udp"]]["covered_by"][0]["directions"] == ["upload"]
        own.set_limit(Direction.UPLOAD, None)
        assert code(told(child.pid)[fds["udp"]]) == "no-throttle"


def test_a_socket_from_before_the_move_is_not_covered(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no marks can cover it besides, it is told with the cgroup that it was made in."""
    monkeypatch.setattr(Strays, "run", lambda self: None)
    before, after = scratch.create_child("before"), scratch.create_child("after")
    try:
        with started([sys.executable, "-c", CHILD], before) as own:
            old = own.open("{'udp': at(('', 0), I, D)}")
            after.move_in(own.pid)
            new = own.open("{'udp': at(('', 0), I, D)}")
            with throttle.apply([after], BOTH):
                found = told(own.pid)
            assert found[new["udp"]]["covered"] is True
            assert code(found[old["udp"]]) == "other-cgroup"
            assert before.path in found[old["udp"]]["reason"]["text"]
            assert found[old["udp"]]["cgroup"] == before.path
            before.remove(patience_s=5)
            gone = told(own.pid)[old["udp"]]
            assert (gone["covered"], code(gone)) == (None, "cgroup-removed")
    finally:
        before.remove(patience_s=5)
        after.remove(patience_s=5)


def test_a_mark_covers_one_socket(far: Child, wire: Wire, scratch: Cgroup) -> None:
    """Marked sockets are covered, others of the process not; a mark is nothing on loopback."""
    fds = far.open(
        f"{{'tcp': to(('{wire.server.address6}', {PORT}), I6), 'any': at(('', 7)),"
        "'other': at(('', 0), I, D), 'local': to(('::1', 9), I6, D)}"
    )
    with marking(scratch) as marks:
        assert code(told(far.pid)[fds["tcp"]]) == "no-throttle"
        mark(marks, far.pid, fds["tcp"], fds["any"], fds["local"])
        found = told(far.pid)
        with started(wire.client.inside(sys.executable, "-c", CHILD), scratch) as sibling:
            others = sibling.open("{'udp': at(('', 0), I, D)}")
            assert code(told(sibling.pid)[others["udp"]]) == "no-throttle"
    assert found[fds["tcp"]]["covered_by"] == covered_by("mark")
    assert found[fds["any"]]["covered_by"] == covered_by("mark")
    assert "listens" in notes(found[fds["any"]])
    assert code(found[fds["other"]]) == "not-marked"
    assert code(found[fds["local"]]) == "loopback"


def test_a_throttle_of_version_1_is_told(child: Child, scratch: Cgroup) -> None:
    """Its record is shorter, and has all that tells what is covered."""
    fds = child.open("{'udp': at(('', 0), I, D), 'local': at(('127.0.0.1', 0), I, D)}")
    with marking(scratch, loopback=True, record_bytes=72) as marks:
        mark(marks, child.pid, *fds.values())
        found = told(child.pid)
    assert {name: found[fd]["covered_by"] for name, fd in fds.items()} == dict.fromkeys(
        fds, covered_by("mark")
    )


def test_a_mark_out_of_the_programs_reach_is_told(child: Child, scratch: Cgroup) -> None:
    """A socket of a cgroup that the throttle is not on is not covered, marked or not."""
    fds = child.open("{'udp': at(('', 0), I, D)}")
    below = scratch.create_child("below")
    try:
        with marking(below) as marks:
            mark(marks, child.pid, fds["udp"])
            assert code(told(child.pid)[fds["udp"]]) == "out-of-reach"
    finally:
        below.remove(patience_s=5)


def test_a_cgroup_and_a_mark_may_both_cover(child: Child, scratch: Cgroup) -> None:
    """Each throttle that covers a socket is named."""
    fds = child.open("{'udp': at(('', 0), I, D)}")
    with marking(scratch) as marks, throttle.apply([scratch], BOTH):
        mark(marks, child.pid, fds["udp"])
        found = told(child.pid)[fds["udp"]]["covered_by"]
    assert found == [*covered_by("cgroup"), *covered_by("mark")]


def makes_mptcp() -> bool:
    """Whether this kernel makes sockets of MPTCP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
    except OSError:
        return False
    return True


def test_mptcp_escapes_marks_but_not_its_cgroup(far: Child, wire: Wire, scratch: Cgroup) -> None:
    """Of programs that do not know MPTCP, as those of older versions."""
    needs_release("5.6")
    needs_option("CONFIG_MPTCP", works=makes_mptcp())
    fds = far.open(f"{{'mptcp': to(('{wire.server.address}', {PORT}), I, S, {MPTCP})}}")
    alone = told(far.pid)[fds["mptcp"]]
    assert alone["protocol"] == "mptcp"
    assert code(alone) == ("no-throttle" if features.MPTCP_SOCKET.available() else "mptcp")
    with marking(scratch, loopback=True) as marks:
        mark(marks, far.pid, fds["mptcp"])
        assert code(told(far.pid)[fds["mptcp"]]) == "mptcp"
    with throttle.apply([scratch], BOTH):
        assert told(far.pid)[fds["mptcp"]]["covered_by"] == covered_by("cgroup")


def test_who_shares_a_socket_is_told(child: Child, scratch: Cgroup) -> None:
    """A socket that another process has as well is told with it; a duplicate is told twice."""
    fds = child.open("{'udp': at(('', 0), I, D), 'own': at(('', 0), I, D)}")
    more = child.open("{'udp': kept[0]['udp'].dup(), 'pid': heir(kept[0]['udp'])}")
    try:
        with throttle.apply([scratch], BOTH):
            found = told(child.pid)
    finally:
        os.kill(more["pid"], signal.SIGKILL)
    assert found[fds["udp"]]["shared_with"] == [more["pid"]]
    assert f"{more['pid']} (sleep)" in notes(found[fds["udp"]])["shared"]
    assert found[fds["own"]]["shared_with"] == []
    assert found[more["udp"]]["inode"] == found[fds["udp"]]["inode"]


# Each start of the tool, in any test, removes what a crash has left.
@pytest.mark.alone
def test_what_a_crash_has_left_is_told_as_that(child: Child, scratch: Cgroup) -> None:
    """A limit in force whose owner has ended is told, with the owner as ended."""
    fds = child.open("{'udp': at(('', 0), I, D)}")
    with started(
        [
            *(*TOOL, "-q", "--cgroup", scratch.path, "--download-limit", "1M"),
            *("--shape", "police", "--bpf-attach-method", "legacy", "--whole-cgroup"),
        ]
    ) as tool:
        deadline = time.monotonic() + 10
        while not told(child.pid)[fds["udp"]]["covered"]:
            assert time.monotonic() < deadline
        (alive,) = told(child.pid)[fds["udp"]]["covered_by"]
        assert (alive["owner_pid"], alive["owner_ended"]) == (tool.pid, False)
    (left,) = told(child.pid)[fds["udp"]]["covered_by"]
    subprocess.run([*TOOL, "cleanup"], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert (left["owner_pid"], left["owner_ended"]) == (tool.pid, True)
    assert code(told(child.pid)[fds["udp"]]) == "no-throttle"


def text_of(*pids: int) -> subprocess.CompletedProcess[str]:
    """The command as people use it."""
    arguments = [part for pid in pids for part in ("--pid", str(pid))]
    return subprocess.run(
        [*TOOL, "sockets", *arguments],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=60,
    )


def test_a_table_for_people(child: Child, scratch: Cgroup) -> None:
    """The table has a line for each socket, with who limits it, or why nobody does."""
    child.open("{'six': at(('::1', 0), I6), 'udp': at(('', 5354), I, D)}")
    with throttle.apply([scratch], BOTH):
        done = text_of(child.pid)
    assert (done.returncode, done.stderr) == (0, "")
    first, head, six, udp = done.stdout.splitlines()
    name = Path(f"/proc/{child.pid}/comm").read_text().strip()
    assert first == f"{child.pid} ({name}) has 2 sockets, 1 of them limited"
    assert head.split() == ["fd", "inode", "socket", "local", "remote", "state", "limited"]
    assert " tcp6 " in six
    assert "[::1]:" in six
    assert "no: loopback" in six
    assert "0.0.0.0:5354" in udp
    assert udp.endswith(f"download and upload, by process {os.getpid()} (its cgroup)")


def test_several_processes_and_one_that_is_gone(child: Child) -> None:
    """What can be told is told, and the status is 1 if a process could not be looked into."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    child.open("{'udp': socket.socket(I, D)}")
    done = run(child.pid, gone.pid, child.pid, os.getpid())
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [each["pid"] for each in document["processes"]] == [child.pid, os.getpid()]
    assert document["errors"] == [{"pid": gone.pid, "text": f"there is no process {gone.pid}"}]
    assert done.stderr == f"pybpfthrottle: error: there is no process {gone.pid}\n"


def test_a_zombie_and_a_kernel_thread_are_refused() -> None:
    """Each is an error of one line, with what it is."""
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        done = text_of(zombie.pid)
        assert done.returncode == 1
        assert "zombie" in done.stderr
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":
        assert "kernel thread" in text_of(2).stderr


def test_wrong_usage_is_status_2() -> None:
    """Without --pid there is nothing to show."""
    assert text_of().returncode == 2


def test_a_process_that_opens_and_closes_all_the_time(child: Child) -> None:
    """Sockets that vanish while they are listed are no error, nor is the end of the process."""
    busy = subprocess.Popen(
        [sys.executable, "-c", "import socket\nwhile True: [socket.socket() for _ in range(50)]"]
    )
    try:
        for _ in range(5):
            done = run(busy.pid)
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        busy.kill()
        busy.wait()


def test_a_process_that_ends_meanwhile() -> None:
    """A process that ends while its sockets are listed is an error of one line, or was told."""
    code = (
        "import resource, socket, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
    )
    code += "kept = [socket.socket() for _ in range(3000)]\nprint(flush=True)\nsys.stdin.read()"
    endings = set()
    for delay_s in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
        with started([sys.executable, "-c", code]) as own:
            assert own.process.stdout
            own.process.stdout.readline()
            tool = subprocess.Popen(
                [*TOOL, "sockets", "--pid", str(own.pid), "--json"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                text=True,
            )
            time.sleep(delay_s)
            own.process.kill()
            own.process.wait()
            out, err = tool.communicate(timeout=60)
        assert "Traceback" not in err
        assert tool.returncode in (0, 1)
        assert len(json.loads(out)["errors"]) == tool.returncode
        endings.add(tool.returncode)
    assert 1 in endings


REFUSING = [sys.executable, str(ROOT / "tests/kernel/refusing.py")]


@pytest.mark.parametrize(
    ("number", "why"), [(errno.ENOSYS, "Linux 5.6"), (errno.EPERM, "CAP_SYS_PTRACE")]
)
def test_without_borrowing_proc_tells_addresses(
    far: Child, wire: Wire, scratch: Cgroup, number: int, why: str
) -> None:
    """Where pidfd_getfd is refused, what can be told is, and that coverage is not known."""
    fds = far.open(
        f"{{'tcp4': to(('{wire.server.address}', {PORT})), 'six': at(('::1', 80), I6, D),"
        f"'tcp6': to(('{wire.server.address6}', {PORT}), I6), 'raw': socket.socket(I, R, 1),"
        "'unix': at('\\0abstract-one', socket.AF_UNIX, D), 'loose': socket.socket(I, D),"
        "'netlink': at((0, 0), socket.AF_NETLINK, R),"
        "'packet': socket.socket(socket.AF_PACKET, R, 0)}"
    )
    before = told(far.pid)
    with throttle.apply([scratch], BOTH):
        done = run(far.pid, prefix=[*REFUSING, f"pidfd_getfd={number}", "--"])
    assert (done.returncode, done.stderr) == (0, "")
    (process,) = json.loads(done.stdout)["processes"]
    assert why in process["unknown"]
    found = {each["fd"]: each for each in process["sockets"]}
    assert found.keys() == set(fds.values())
    for name in ("tcp4", "tcp6", "six"):
        for key in ("inode", "family", "type", "protocol", "local", "remote", "state"):
            assert (key, found[fds[name]][key]) == (key, before[fds[name]][key])
        assert (found[fds[name]]["covered"], code(found[fds[name]])) == (None, "unknown")
    assert (found[fds["raw"]]["family"], found[fds["raw"]]["type"]) == ("inet", "raw")
    assert found[fds["loose"]]["family"] is None
    for name, why_not in (("unix", "not-ip"), ("netlink", "not-ip"), ("packet", "packet")):
        assert (found[fds[name]]["family"], code(found[fds[name]])) == (name, why_not)


@pytest.mark.parametrize("missing", ["sys_admin", "net_admin", "bpf"])
def test_without_the_rights_coverage_is_not_known(child: Child, missing: str) -> None:
    """Who may not see throttles is told so once, and sees the sockets."""
    port = {"sys_admin": 5355, "net_admin": 5356, "bpf": 5357}[missing]  # they run side by side
    child.open(
        f"{{'udp': at(('', {port}), I, D), 'tcp': socket.socket(), 'unix': socket.socket(1)}}"
    )
    refused = {"sys_admin": ["-sys_admin"], "net_admin": ["-net_admin,-sys_admin"]}
    prefix = ["setpriv", f"--bounding-set={refused.get(missing, [''])[0]}"]
    if missing == "bpf":
        prefix = [*REFUSING, f"all={errno.ENOSYS}", "--"]
    done = run(child.pid, prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    (process,) = json.loads(done.stdout)["processes"]
    assert {"bpf": "bpf(2)"}.get(missing, "root (CAP_SYS_ADMIN") in process["unknown"]
    udp, tcp, unix = process["sockets"]
    assert udp["local"] == end(ANY, port)
    assert [one["covered"] for one in (udp, tcp, unix)] == [None, None, False]


def test_another_users_process_needs_ptrace(scratch: Cgroup) -> None:
    """Without CAP_SYS_PTRACE another user's process is an error that names the capability."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with started([*nobody, "sleep", "60"], scratch) as own:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{own.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
        done = run(own.pid, prefix=["setpriv", "--bounding-set=-sys_ptrace"])
        assert run(own.pid).returncode == 0
    assert done.returncode == 1
    assert "CAP_SYS_PTRACE" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.timed
def test_2000_sockets_are_told_within_a_second(scratch: Cgroup) -> None:
    """The best of three runs, with the start of Python."""
    code = (
        "import resource, socket, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
    )
    code += "kept = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2000)]\n"
    code += "for s in kept: s.bind(('127.0.0.1', 0))\nprint(flush=True)\nsys.stdin.read()"
    with started([sys.executable, "-c", code], scratch) as own, throttle.apply([scratch], BOTH):
        assert own.process.stdout
        own.process.stdout.readline()
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert len(told(own.pid)) == 2000
            took.append(time.monotonic() - began)
    assert min(took) < 1, took


def nat(wire: Wire, rule: str) -> None:
    """Translate what programs of the client's namespace send."""
    if shutil.which("nft") is None:
        pytest.skip("nft is not installed")
    table = f"table ip t {{ chain c {{ type nat hook output priority -100; {rule}; }}; }}"
    done = subprocess.run(
        wire.client.inside("nft", "-f", "-"), input=table, text=True, capture_output=True
    )
    if "No such file" in done.stderr or "not supported" in done.stderr:
        pytest.skip(f"this kernel has no NAT by nftables (CONFIG_NFT_NAT): {done.stderr}")
    assert done.returncode == 0, done.stderr


def test_what_is_redirected_to_the_machine_itself_is_loopback(
    far: Child, wire: Wire, scratch: Cgroup
) -> None:
    """It says that it goes far, and does not: a local proxy takes it."""
    nat(wire, f"ip daddr {wire.server.address} tcp dport 80 redirect to :{PORT}")
    address = wire.server.address
    fds = far.open(f"{{'listener': at(('', {PORT}))}}")
    fds.update(far.open(f"{{'client': to(('{address}', 80))}}"))
    with throttle.apply([scratch], BOTH):
        one = told(far.pid)[fds["client"]]
    assert one["remote"] == end(address, 80)
    assert (one["covered"], code(one)) == (False, "loopback")
    assert f":{PORT}" in notes(one)["translated"]


def test_what_is_sent_from_an_own_address_elsewhere_is_limited(
    far: Child, wire: Wire, scratch: Cgroup
) -> None:
    """It says that it stays here, and does not."""
    own = wire.client.address
    nat(wire, f"ip daddr {own} tcp dport 80 dnat to {wire.server.address}:{PORT}")
    fds = far.open(f"{{'client': to(('{own}', 80))}}")
    with throttle.apply([scratch], BOTH):
        one = told(far.pid)[fds["client"]]
    assert one["covered_by"] == covered_by("cgroup")
    assert wire.server.address in notes(one)["translated"]


def test_a_sockmap_makes_it_unknown(far: Child, wire: Wire, scratch: Cgroup) -> None:
    """Its programs hand data from socket to socket, and nobody tells which."""
    fds = far.open(f"{{'client': to(('{wire.server.address}', {PORT}))}}")
    with throttle.apply([scratch], BOTH):
        assert told(far.pid)[fds["client"]]["covered"] is True
        with programs.load(return_imm(1), type=ProgType.SK_MSG, license="GPL"):
            one = told(far.pid)[fds["client"]]
            assert (one["covered"], code(one)) == (None, "sockmap")
