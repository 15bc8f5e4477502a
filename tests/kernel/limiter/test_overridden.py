"""Another tool's program that may be overridden is never switched off, unless somebody insists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager
from errno import EROFS
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest.mock import Mock

import pytest
from foreign import other
from lab import ENVIRONMENT, TOOL, attached, lab
from own_mounts import __file__ as own_mounts
from since import since

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import attached as attachments
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.errors import AttachError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy

UPLOAD = {Direction.UPLOAD: Rate.parse("1M")}
INSISTING = Options(attach=dict.fromkeys(Direction, AttachPolicy(override_others=True)))
# By eBPF and nothing else: where that is refused, another backend would do.
LIMITS = (
    *("--upload-limit", "1M", "--upload-backend", "ebpf"),
    *("--download-limit", "1M", "--download-backend", "ebpf"),
)
HOOK_PROGRAMS = {
    "ingress": (ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS),
    "egress": (ProgType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS),
    "sock_ops": (ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
    "setsockopt": (ProgType.CGROUP_SOCKOPT, AttachType.CGROUP_SETSOCKOPT),
}
# Says each 5 ms how many datagrams it could send itself so far, over one socket.
TALKS = """
import socket, time
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("127.0.0.1", 0))
own.setblocking(False)
count = 0
print("ready", flush=True)
while True:
    try:
        own.sendto(b"x", own.getsockname())
        own.recv(9)
        count += 1
        print("through", count, flush=True)
    except OSError:
        pass
    time.sleep(0.0005)
"""
# Tries for a second to send itself something, and says how often it could.
TRIES = TALKS.replace("while True:", "end = time.monotonic() + 1\nwhile time.monotonic() < end:")


class Talker:
    """A process that talks to itself in a cgroup, below a firewall that lets nothing pass."""

    def __init__(self, cgroup: Cgroup, output: Path) -> None:
        self.cgroup = cgroup
        self._output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TALKS],
                stdout=file,
                preexec_fn=lambda: cgroup.move_in(0),
            )
        while "ready" not in output.read_text():
            time.sleep(0.01)

    def through(self) -> int:
        """How many datagrams came through."""
        return self._output.read_text().count("through")

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def child(scratch: Cgroup) -> Iterator[Cgroup]:
    """A cgroup below the test's own."""
    below = scratch.create_child(f"pybpft-{uuid.uuid4().hex[:8]}.service")
    yield below
    below.remove(patience_s=5)


@pytest.fixture
def talker(scratch: Cgroup, child: Cgroup, tmp_path: Path) -> Iterator[Talker]:
    """A process below a firewall that was attached with BPF_F_ALLOW_OVERRIDE."""
    with ExitStack() as stack:
        for hook in (AttachType.CGROUP_INET_EGRESS, AttachType.CGROUP_INET_INGRESS):
            stack.enter_context(other(scratch, "ALLOW_OVERRIDE", hook=hook, verdict=0))
        own = Talker(child, tmp_path / "talk")
        stack.callback(own.end)
        time.sleep(0.1)
        assert own.through() == 0
        yield own


def tool(*arguments: str, inside: Cgroup | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, from within a cgroup if one is given."""
    return subprocess.run(
        [*TOOL, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=None if inside is None else lambda: inside.move_in(0),
    )


@pytest.mark.parametrize(
    "target",
    ["--cgroup", "--unit", "--pid", "--move-cgroup", "--whole-cgroup", "run", "verify-setup"],
)
def test_a_firewall_above_stays_in_force(talker: Talker, target: str) -> None:
    """Nothing comes through before, during and after; what would end it is refused by its name."""
    pid = str(talker.process.pid)
    brief = ("--duration", "0.7", "-q", *LIMITS)
    refused, inside = True, None
    if target == "--cgroup":
        arguments = ["--cgroup", talker.cgroup.path, *brief]
    elif target == "--unit":
        arguments = ["--unit", os.path.basename(talker.cgroup.path), *brief]
    elif target == "run":
        # From a shell below the firewall: the command is to stay below it as well.
        inside, refused = talker.cgroup, False
        arguments = ["run", *LIMITS, "--loopback", "-q", "--", sys.executable, "-c", TRIES]
    elif target == "verify-setup":
        arguments = ["verify-setup", "--pid", pid, "--json"]
    elif target == "--pid":
        refused = False
        arguments = ["--pid", pid, "--loopback", *brief]
    else:
        arguments = ["--pid", pid, target, *brief]
    done = tool(*arguments, inside=inside)
    time.sleep(0.05)
    assert talker.through() == 0
    if target == "verify-setup":
        assert json.loads(done.stdout)["conclusion"]["id"] == "overridable-program"
    elif refused:
        assert done.returncode == 1
        assert "theirs (id " in done.stderr
        assert "loaded by root" in done.stderr
        assert "BPF_F_ALLOW_OVERRIDE" in done.stderr
        assert "--override-others" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    if target == "run":
        assert done.stdout.split() == ["ready"]


def test_run_below_a_firewall_is_limited_all_the_same(scratch: Cgroup, child: Cgroup) -> None:
    """The sockets of the command are: what is over the limit is dropped, and it says so."""
    with other(scratch, "ALLOW_OVERRIDE"):
        send = (
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
            "s.bind(('127.0.0.1', 0)); s.settimeout(0.2); n = 0\n"
            "for _ in range(400):\n"
            " try: s.sendto(bytes(1000), s.getsockname())\n"
            " except PermissionError: pass\n"
            "try:\n while s.recv(2000): n += 1\nexcept OSError: print(n)"
        )
        done = tool(
            *("run", "--upload-limit", "1K", "--loopback", "--wait", "--"),
            *(sys.executable, "-c", send),
            inside=child,
        )
        assert done.returncode == 0
        assert int(done.stdout) < 200
        assert "the command's sockets are limited, not a cgroup" in done.stderr


def test_run_leaves_no_firewall_for_the_root_cgroup(scratch: Cgroup, child: Cgroup) -> None:
    """Where no cgroup can be made below its own, another place is no way out of a firewall."""
    with open(os.path.join(child.path, "cgroup.max.descendants"), "w") as file:
        file.write("0")
    done = tool("run", *LIMITS, "-q", "--", "true", inside=child)
    assert (done.returncode, done.stderr) == (0, "")
    with other(scratch, "ALLOW_MULTIPLE", verdict=0) as theirs:
        done = tool("run", *LIMITS, "-q", "--", "true", inside=child)
        assert done.returncode == 125
        assert f"theirs (id {theirs.info().id}" in done.stderr


@pytest.mark.parametrize("method", ["auto", "link", "legacy"])
def test_whoever_insists_overrides_it(scratch: Cgroup, child: Cgroup, method: str) -> None:
    """With --override-others the limit is attached; the program above stays where it is."""
    policy = AttachPolicy(method, override_others=True)
    with other(scratch, "ALLOW_OVERRIDE") as theirs:
        with throttle.apply([child], UPLOAD, options=Options(attach={Direction.UPLOAD: policy})):
            assert len(attached(child)) == 1
        assert attached(scratch) == [theirs.info().id]


def test_the_option_insists(scratch: Cgroup, child: Cgroup) -> None:
    """On the command line it is --override-others."""
    with other(scratch, "ALLOW_OVERRIDE"):
        where = ("--cgroup", child.path, "--duration", "0.2", "-q", *LIMITS)
        assert tool(*where).returncode == 1
        assert tool(*where, "--override-others").returncode == 0


@pytest.mark.parametrize("hook", ["sock_ops", "setsockopt"])
def test_what_is_not_needed_is_left_out(scratch: Cgroup, child: Cgroup, hook: str) -> None:
    """A program at a hook that the limit can do without stays in force, and a note tells."""
    kind, attach_type = HOOK_PROGRAMS[hook]
    program = other(scratch, "ALLOW_OVERRIDE", hook=attach_type, kind=kind, verdict=1)
    with program as theirs, open_connection(child):
        with throttle.apply([child], UPLOAD, options=Options()) as live:
            assert theirs.info().id in attachments.effective_ids(child, attach_type)
            assert len(attached(child)) == 1
            assert any("theirs (id " in note for note in live.notes())


@contextmanager
def open_connection(cgroup: Cgroup) -> Iterator[None]:
    """A connection of a process in a cgroup, which downloads from another namespace."""
    with lab() as own:
        with subprocess.Popen(
            own.inside("curl", "-sN", "--max-time", "60", own.url),
            stdout=subprocess.PIPE,
            preexec_fn=lambda: cgroup.move_in(0),
        ) as client:
            assert client.stdout
            client.stdout.read(1)
            try:
                yield
            finally:
                client.kill()


def test_one_that_is_overridden_already_is_no_obstacle(scratch: Cgroup, child: Cgroup) -> None:
    """Where something is attached in between, another program ends nobody's."""
    lower = child.create_child("lower")
    try:
        with other(scratch, "ALLOW_OVERRIDE"), other(child, "ALLOW_MULTIPLE"):
            for target in (child, lower):
                with throttle.apply([target], UPLOAD):
                    pass
    finally:
        lower.remove(patience_s=5)


def test_one_that_comes_later_is_told(scratch: Cgroup, child: Cgroup) -> None:
    """A program that is attached above while a limit is in force does not run below: a note."""
    with throttle.apply([child], UPLOAD) as live:
        assert live.notes() == []
        with other(scratch, "ALLOW_OVERRIDE"):
            deadline = time.monotonic() + 10
            while not any("theirs (id " in note for note in live.notes()):
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_the_method_may_be_switched(scratch: Cgroup, child: Cgroup) -> None:
    """Who has insisted, or was there first, ends nobody's program by a switch."""
    with other(scratch, "ALLOW_OVERRIDE"):
        with throttle.apply([child], UPLOAD, options=INSISTING) as live:
            live.switch("legacy")
            live.switch("link")


TOP = cgroups.root().path
# The cgroup that it is started in is the root of all that it sees.
CONTAINER = [
    *("unshare", "--cgroup", sys.executable, own_mounts, "--", "sh", "-ec"),
    f'umount {TOP}; mount -t cgroup2 none {TOP}; exec "$@"',
    "sh",
]


@pytest.mark.parametrize("how", ["ALLOW_OVERRIDE", "ALLOW_MULTIPLE", "link"])
def test_one_above_what_is_visible_stays_in_force(
    scratch: Cgroup, child: Cgroup, tmp_path: Path, how: str
) -> None:
    """In a cgroup namespace the ancestors' modes are not told: it is tried where nobody is."""
    with other(scratch, how, verdict=0) as theirs, ExitStack() as stack:
        own = Talker(child, tmp_path / "talk")
        stack.callback(own.end)
        limits = ("--cgroup", TOP, "--whole-cgroup", *LIMITS, "--duration", "0.5")
        done = subprocess.run(
            [*CONTAINER, *TOOL, *limits, "-q"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: child.move_in(0),
        )
        assert own.through() == 0
        assert done.returncode == (how == "ALLOW_OVERRIDE"), done.stderr
        if how == "ALLOW_OVERRIDE":
            assert f"theirs (id {theirs.info().id}" in done.stderr
            assert "above the cgroups visible here" in done.stderr


@since("4.15")
def test_one_above_that_ends_meanwhile_was_not_switched_off(
    scratch: Cgroup, child: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a limit's that another instance removes between the question and the trial."""
    with other(scratch, "ALLOW_MULTIPLE"):
        found = list(attachments.at(scratch, [AttachType.CGROUP_INET_EGRESS]))
    assert found
    for later in (found, []):
        answers = chain([found], repeat(later))
        monkeypatch.setattr(attachments, "from_above", lambda *_, given=answers: next(given))
        if not later:  # then it need not be tried out, which cannot be done everywhere
            monkeypatch.setattr(own_cgroups, "create_empty", Mock(side_effect=OSError(EROFS, "")))
        throttle.apply([child], UPLOAD).remove()


@since("4.15")
def test_one_above_both_that_begins_or_ends_meanwhile_is_not_left(
    scratch: Cgroup, child: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs for one cgroup and not for another is asked for one after the other."""
    sibling = scratch.create_child("sibling")
    ask, stack = attachments.at, ExitStack()

    def begin() -> None:
        stack.enter_context(other(scratch, "ALLOW_MULTIPLE"))

    def asked_before(change: Callable[[], None]) -> Callable[..., list[Any]]:
        def asked(*arguments: Any, **options: Any) -> list[Any]:
            found = list(ask(*arguments, **options))
            change()
            return found

        return asked

    try:
        with stack:
            for change in (begin, stack.close):
                monkeypatch.setattr(attachments, "at", asked_before(change))
                assert attachments.left(sibling, child) == []
    finally:
        sibling.remove(patience_s=5)


def show(*arguments: str) -> Any:
    """What cgroup show prints: the lines, and the JSON."""
    lines = tool("cgroup", "show", *arguments).stdout.splitlines()
    return lines, json.loads(tool("cgroup", "show", *arguments, "--json").stdout)


def test_cgroup_show_tells_what_may_be_overridden(scratch: Cgroup, child: Cgroup) -> None:
    """Of an ancestor's program: that whatever is attached here would switch it off."""
    with other(scratch, "ALLOW_OVERRIDE") as theirs:
        lines, _ = show(child.path)
        [line] = [line for line in lines if f"id {theirs.info().id}" in line]
        assert "would switch off" in line
        assert scratch.path in line
        _, rows = show(child.path, "--effective")
        [found] = [row for row in rows if row["id"] == theirs.info().id]
        assert found["attach_flags"] == "override"
        assert found["cgroup"] == scratch.path


def test_cgroup_show_tells_what_is_overridden(scratch: Cgroup, child: Cgroup) -> None:
    """Of a program: which ones of ancestors do not run here because of it."""
    with other(scratch, "ALLOW_OVERRIDE") as theirs, other(child, "link"):
        lines, [found] = show(child.path)
        assert any("has switched off" in line and scratch.path in line for line in lines)
        assert [each["id"] for each in found["switches_off"]] == [theirs.info().id]


def test_the_trials_leave_all_hooks_alone(scratch: Cgroup, child: Cgroup) -> None:
    """verify-setup attaches nothing to a target where that would switch off a program."""
    with other(scratch, "ALLOW_OVERRIDE") as theirs:
        done = tool("verify-setup", "--cgroup", child.path, "--json")
        found = json.loads(done.stdout)
        assert found["conclusion"]["id"] == "overridable-program"
        assert f"theirs (id {theirs.info().id}" in found["conclusion"]["reasons"][0]
        assert attached(child, HOOKS) == []
        with pytest.raises(AttachError):
            throttle.apply([child], UPLOAD)
