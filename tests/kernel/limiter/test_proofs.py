"""Proofs of limits by each backend, and of limits that something goes past."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from by_backend import FAST, RATE, Case, started
from lab import ENVIRONMENT, TOOL, Lab, lab
from since import needs_option, since
from targets import Target, eventually, target

from pybpfthrottle import throttle
from pybpfthrottle.idle import why
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Traffic
from pybpfthrottle.proof import EXEMPT, LOOPBACK, OTHER_CGROUP, Outcome, Prover

DOWNLOAD = Direction.DOWNLOAD
# The directions that a backend can limit, and the first kernel that has what it needs.
CASES = {
    "ebpf": (tuple(Direction), "4.15"),
    "nftables": (tuple(Direction), "5.13"),
    "tc_htb": ((Direction.UPLOAD,), "5.13"),
    "ifb_tc": ((Direction.DOWNLOAD,), "5.8"),
    "tc_police": ((Direction.DOWNLOAD,), "4.15"),
}


@pytest.fixture
def own() -> Iterator[Lab]:
    """Two namespaces, with a server in one of them."""
    with lab(fastest=FAST) as made:
        yield made


def proof_in(path: Path) -> Callable[[], Any]:
    """What gives the proof that is recorded in a file, once it is there."""

    def find() -> Any:
        lines = path.read_text().splitlines() if path.exists() else []
        found = [event for event in map(json.loads, lines) if event["event"] == "proof"]
        return found[0] if found else None

    return find


def transfer(lab: Lab, direction: Direction) -> list[str]:
    """A command that moves data in a direction for long."""
    curl = f"exec curl --globoff -sN --max-time 60 {lab.url}"
    upload = f"{curl} -T - </dev/zero"
    return ["sh", "-c", f"{curl if direction is DOWNLOAD else upload} >/dev/null"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(backend, direction), marks=since(release), id=f"{backend}-{direction}")
        for backend, (directions, release) in CASES.items()
        for direction in directions
    ],
)
def test_each_backend_can_be_proved(own: Lab, case: Case, tmp_path: Path) -> None:
    """Two measures, one of them from the sockets, and nothing has gone past."""
    if case.backend == "tc_police":
        done = subprocess.run(
            own.inside(*TOOL, "run", *case.options, "true"), env=ENVIRONMENT, capture_output=True
        )
        needs_option("CONFIG_NET_ACT_POLICE", works=b"CONFIG_NET_ACT_POLICE" not in done.stderr)
    path = tmp_path / "x.jsonl"
    options = [*case.options, "--prove", "--record", str(path)]
    command = own.inside(*TOOL, "run", *options, "--", *transfer(own, case.direction))
    with started(command) as running:
        proof = eventually(proof_in(path))
        running.terminate()
        said = running.communicate()[1]
    own_way = proof[str(case.direction)]
    assert own_way["asked"] == RATE.bytes_per_s
    assert own_way["bytes_passed"] > 0, path.read_text()
    assert own_way["bytes_at_sockets"] > 0
    # What comes in the first moments, before it has found the connection, is told.
    if case.backend != "ifb_tc":
        assert set(own_way["past"].values()) <= {0}
        assert proof["holds"] is own_way["holds"] is True
    [line] = [line for line in said.splitlines() if "Proof of" in line]
    assert f"{case.direction}: asked 1.0 MB/s, in the kernel " in line
    assert line.endswith(own_way["conclusion"])


class Local:
    """A process that has a connection to itself over loopback, and can use it."""

    def __init__(self, made: Target) -> None:
        self.target = made
        self.pid = made.pid
        listener = made.do("listen()")
        self._one = made.do(f"connect(port({listener}))")
        self._other = made.do(f"accept({listener})")

    def move(self, count: int) -> None:
        """Send so many bytes from one end, and receive them at the other."""
        self.target.do(f"_kept[{self._one}].sendall(bytes({count}))")
        self.target.do(f"len(_kept[{self._other}].recv({count}, socket.MSG_WAITALL))")


@pytest.fixture
def local(scratch: Cgroup) -> Iterator[Local]:
    """One of them, in a cgroup of its own."""
    with target(scratch) as made:
        yield Local(made)


def test_what_goes_over_loopback_goes_past(local: Local, scratch: Cgroup) -> None:
    """A limit that covers a fraction of what its target moves does not hold."""
    with throttle.apply([scratch], {DOWNLOAD: RATE}) as live:
        prover = Prover(live)
        for _ in range(100):
            local.move(100_000)
        proof = eventually(prover.sample)
        [evidence] = proof.evidence
        assert evidence.passed == 0
        assert evidence.past[LOOPBACK] >= 10_000_000
        assert evidence.at_sockets == evidence.past[LOOPBACK]
        assert "does not hold: " in str(proof)
        assert "went over loopback" in str(proof)
        assert prover.sample() is None


def test_the_first_traffic_is_waited_for(local: Local, scratch: Cgroup) -> None:
    """There is no proof of nothing, except at the end."""
    with throttle.apply([scratch], {DOWNLOAD: RATE}) as live:
        prover = Prover(live)
        idle = Prover(live)
        eventually(lambda: prover.sample() or prover.waits)
        local.move(1000)
        proof = eventually(prover.sample)
        assert proof.outcome is Outcome.NOTHING  # for loopback is not limited
        assert proof.evidence[0].past[LOOPBACK] == 1000
        assert "nothing to limit yet: 1000 B went over loopback" in str(proof)
        assert idle.end() is not None
        assert idle.end() is None


@since("5.13")
def test_what_another_cgroup_has_goes_past(own: Lab, scratch: Cgroup) -> None:
    """A socket that was created elsewhere, which nftables tells by its cgroup only."""
    elsewhere = scratch.create_child("elsewhere")
    limited = scratch.create_child("limited")
    try:
        with target(elsewhere, own.inside) as made:
            host, port = own.url.split("/")[2].split(":")
            made.do(f"download({host!r}, {port})")
            limited.move_in(made.pid)
            backends = {DOWNLOAD: "nftables"}
            with throttle.apply([limited], {DOWNLOAD: RATE}, backends=backends) as live:
                proof = eventually(Prover(live).sample)
                reason = why(live, made.pid, 3)
            assert reason is not None
            assert reason.code == "other-cgroup"
            assert elsewhere.path in reason.text
            [evidence] = proof.evidence
            assert evidence.passed == 0
            assert evidence.past[OTHER_CGROUP] > 1 << 20
            assert evidence.outcome is Outcome.FAILS
            assert "on sockets created in another cgroup" in str(proof)
    finally:
        for one in (elsewhere, limited):
            one.remove(patience_s=5)


def test_what_is_exempt_does_not_count(own: Lab, scratch: Cgroup) -> None:
    """It was asked not to limit that address; it is told, and is why nothing passes."""
    with target(scratch, own.inside) as made:
        host, port = own.url.split("/")[2].split(":")
        traffic = Traffic(but=(f"{host}/32",))
        with throttle.apply([scratch], {DOWNLOAD: RATE}, traffic=traffic) as live:
            prover = Prover(live)
            made.do(f"download({host!r}, {port})")
            eventually(lambda: prover.sample() or prover.waits)
            reason = why(live, made.pid, 3)
            proof = prover.end()
    assert reason == ("exempt", f"all goes to {host}, which is exempt")
    assert proof is not None
    [evidence] = proof.evidence
    assert evidence.past[EXEMPT] > 1 << 20
    assert evidence.outcome is Outcome.NOTHING


def test_loopback_is_why_nothing_passes(local: Local, scratch: Cgroup) -> None:
    """With the process at the other end: itself, or a proxy."""
    with throttle.apply([scratch], {DOWNLOAD: RATE}) as live, target(cgroups.root()) as proxy:
        local.move(1000)
        assert why(live, local.pid, 3600) == ("loopback", "all goes over loopback, to itself")
        listener = proxy.do("listen()")
        own = local.target.do(f"connect({proxy.do(f'port({listener})')})")
        proxy.do(f"accept({listener})")
        local.target.do(f"_kept[{own}].sendall(bytes(1000))")
        reason = eventually(lambda: why(live, local.pid, 3600))
        assert reason.code == "loopback"
        assert f"to {proxy.pid} (python" in reason.text


def test_who_has_left_is_why_nothing_passes(local: Local, scratch: Cgroup) -> None:
    """For a cgroup's limit stays where it is."""
    inside = scratch.create_child("inside")
    try:
        inside.move_in(local.pid)
        with throttle.apply([inside], {DOWNLOAD: RATE}) as live:
            before = why(live, local.pid, 0)
            assert before is not None
            assert before.code == "no-connection"
            scratch.move_in(local.pid)
            reason = why(live, local.pid, 3)
            assert reason is not None
            assert reason.code == "left"
            assert reason.text.endswith(f"has moved to {scratch.path}")
            assert str(local.pid) in reason.text
            local.target.end()
            assert why(live, local.pid, 3) is None
    finally:
        inside.remove(patience_s=5)


def test_a_limit_that_does_not_hold_has_a_status(local: Local) -> None:
    """3, and one line that says why; what holds or has nothing to limit has 0."""
    command = [*TOOL, "--pid", str(local.pid), "--download-limit", "1M", "--prove"]
    for count, status in ((0, 0), (200, 3)):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
        ) as running:
            assert running.stdout
            lines = [running.stdout.readline()]
            assert "Ctrl-C ends it" in lines[0]
            for _ in range(count):
                local.move(100_000)
            while count and "Proof" not in lines[-1]:
                lines.append(running.stdout.readline())
            running.send_signal(signal.SIGINT)
            out, _ = running.communicate(timeout=30)
        assert running.returncode == status
        [line] = [line for line in [*lines, *out.splitlines()] if "Proof of" in line]
        assert ("does not hold" in line) is bool(status)
    assert cgroups.from_pid(local.pid).exists()
