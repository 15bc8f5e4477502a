"""Limits for processes where something is refused: what remains is done, and the rest is said."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, Sequence

import pytest
from lab import ENVIRONMENT, TOOL, attached
from targets import (
    Target,
    as_user,
    eventually,
    followed,
    marked,
    programs_of,
    target,
    tool,
)

from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.bpf.abi import Cmd
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup

STREAM = "make(AF_INET, SOCK_STREAM)"
USER = 2_000_000 + os.getpid()  # nobody else, nor a test beside this one
CAP_SYS_RESOURCE = 24


def refusing(*rules: str) -> list[str]:
    """The command that runs another one with some system calls refused."""
    return [sys.executable, str(Path(__file__).parents[1].joinpath("refusing.py")), *rules, "--"]


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to be limited."""
    with target(scratch) as one:
        yield one


def notes(running: subprocess.Popen[str]) -> Iterator[str]:
    """What it says, one after another."""
    assert running.stdout
    for line in running.stdout:
        event = json.loads(line)
        if event["event"] == "note":
            yield event["text"]


def note(running: subprocess.Popen[str], *words: str) -> str:
    """The first one that has these words."""
    return next(text for text in notes(running) if all(word in text for word in words))


def failed(*arguments: str, prefix: Sequence[str]) -> str:
    """The one line with which it is refused."""
    done = subprocess.run(
        [*prefix, *TOOL, *arguments, "--download-limit", "1M", "-q"],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("call", ["pidfd_open", "pidfd_getfd"])
def test_without_borrowing_new_sockets_are_limited(own: Target, call: str) -> None:
    """As on a kernel before 5.6; that those of before are not is said."""
    before = own.do(STREAM)
    with tool("--pid", str(own.pid), prefix=refusing(f"{call}={errno.ENOSYS}")) as (running, _):
        assert f"{own.pid} (" in note(running, "had open before are not limited")
        after = own.do(STREAM)
        assert marked(own.pid, [before, after], running.pid) == [False, True]


@pytest.mark.parametrize("call", ["pidfd_open", "pidfd_getfd"])
def test_where_no_right_helps_new_sockets_are_limited(own: Target, call: str) -> None:
    """EPERM for root with all capabilities is no error, as it is without CAP_SYS_PTRACE.

    It comes from a filter, and nobody could do what an error would ask for: what can be limited
    is, and the true cause is named with what is not.
    """
    before = own.do(STREAM)
    with tool("--pid", str(own.pid), prefix=refusing(f"{call}={errno.EPERM}")) as (running, _):
        said = note(running, f"{own.pid} (", "had open before are not limited")
        assert f"a seccomp filter, such as a container's, refuses {call}" in said
        assert "is needed" not in said
        after = own.do(STREAM)
        assert marked(own.pid, [before, after], running.pid) == [False, True]


def test_yama_is_named_where_it_forbids_to_look(own: Target) -> None:
    """With ptrace_scope 3 nobody may; no capability changes that, nor another filter."""
    script = 'mount -t tmpfs none $0 && mkdir $0/yama && echo 3 >$0/yama/ptrace_scope && exec "$@"'
    here = ["unshare", "--mount", "sh", "-ec", script, "/proc/sys/kernel"]
    prefix = [*here, *refusing(f"pidfd_getfd={errno.EPERM}")]
    own.do(STREAM)
    with tool("--pid", str(own.pid), prefix=prefix) as (running, _):
        assert "ptrace_scope is 3" in note(running, "had open before are not limited")
        assert marked(own.pid, [own.do(STREAM)], running.pid) == [True]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_without_tracepoints_children_are_looked_for(own: Target, number: int) -> None:
    """They are found with the next pass, and what they have opened meanwhile; that is said."""
    prefix = refusing(f"{Cmd.RAW_TRACEPOINT_OPEN:d}={number}")
    with tool("--pid", str(own.pid), prefix=prefix) as (running, _):
        assert "every 1 s" in note(running, "started from now on")
        child = own.do("child('fork exec')")
        fd = own.do(f"tell({child}, {STREAM!r})")
        eventually(lambda: marked(child, [fd], running.pid) == [True])
        assert followed(running.pid) == {own.pid, child}
        assert marked(own.pid, [own.do(STREAM)], running.pid) == [True]
        grandchild = own.do(f"tell({child}, 'child()')")
        eventually(lambda: grandchild in followed(running.pid))


def test_without_tracepoints_each_is_looked_for(own: Target, tmp_path: Path) -> None:
    """It gets its limit with the next look; that is said."""
    program = str(tmp_path / f"pbt{os.getpid()}")
    shutil.copy(str(shutil.which("sleep")), program)
    prefix = refusing(f"{Cmd.RAW_TRACEPOINT_OPEN:d}={errno.EPERM}")
    arguments = ("--each", "--exe", program, "--pid", str(own.pid))
    with tool(*arguments, prefix=prefix) as (running, _):
        assert "within 1 s" in note(running, "not at once")
        with subprocess.Popen([program, "60"]) as later:
            assert running.stdout
            events = (json.loads(line) for line in running.stdout)
            assert any(event.get("pid") == later.pid for event in events)
            later.kill()


def test_without_tracepoints_an_id_is_forgotten_too(own: Target) -> None:
    """With the next pass after the end of a process."""
    prefix = refusing(f"{Cmd.RAW_TRACEPOINT_OPEN:d}={errno.EPERM}")
    child = own.do("child()")
    with tool("--pid", str(own.pid), prefix=prefix) as (running, _):
        assert followed(running.pid) == {own.pid, child}
        own.do(f"os.kill({child}, 9)")
        eventually(lambda: followed(running.pid) == {own.pid})


def test_without_children_nobody_needs_tracepoints(own: Target) -> None:
    """Then there is nothing to say."""
    prefix = refusing(f"{Cmd.RAW_TRACEPOINT_OPEN:d}={errno.EPERM}")
    arguments = ("--pid", str(own.pid), "--no-children", "--duration", "1.5")
    with tool(*arguments, prefix=prefix) as (running, _):
        assert list(notes(running)) == []


def test_without_links_the_legacy_call_attaches(own: Target) -> None:
    """All of the programs, and they are taken away at the end."""
    prefix = refusing(f"{Cmd.LINK_CREATE:d}={errno.EINVAL}")
    with tool("--pid", str(own.pid), prefix=prefix) as (running, event):
        assert event["how"]["download"]["attached_by"].startswith("legacy")
        ours = programs_of(running.pid) & at_the_top()
        assert len(ours) >= 2
        assert marked(own.pid, [own.do(STREAM)], running.pid) == [True]
        child = own.do("child()")
        assert child in followed(running.pid)
    assert not ours & at_the_top()


@pytest.mark.alone
def test_what_the_legacy_call_leaves_is_cleaned_up(own: Target) -> None:
    """After kill -9: the programs stay at the top cgroup until the next start."""
    prefix = refusing(f"{Cmd.LINK_CREATE:d}={errno.EINVAL}")
    with tool("--pid", str(own.pid), prefix=prefix) as (running, _):
        ours = programs_of(running.pid) & at_the_top()
        running.kill()
        running.wait()
    assert ours <= at_the_top()
    # Nobody's sockets are limited meanwhile, and none are marked.
    subprocess.run([*TOOL, "cleanup"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    assert not ours & at_the_top()


def at_the_top() -> set[int]:
    """The programs at the hooks of the top cgroup that a limit for processes may use."""
    return set(attached(cgroup.root(), HOOKS))


# Without marks: the best that remains.

NO_MARKS = f"{Cmd.BTF_LOAD:d}={errno.EINVAL}"  # such a map cannot do without types


@contextmanager
def speaking(own: Target, *options: str, prefix: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The tool with what it says to people."""
    with subprocess.Popen(
        [*prefix, *TOOL, "--pid", str(own.pid), "--download-limit", "1M", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.terminate()
            running.communicate(timeout=10)


def lines_until_it_limits(running: subprocess.Popen[str]) -> list[str]:
    """What it says before."""
    assert running.stdout
    found = []
    for line in running.stdout:
        if line.startswith("Limiting "):
            return found
        found.append(line.rstrip("\n"))
    raise AssertionError(found)


def test_without_marks_a_cgroup_of_its_own_is_limited(own: Target, scratch: Cgroup) -> None:
    """Nobody else is in it: that is the same, but for what was opened elsewhere."""
    with speaking(own, prefix=refusing(NO_MARKS)) as running:
        lines = lines_until_it_limits(running)
        assert len(lines) == 2
        assert lines[0].startswith("Single sockets cannot be limited here: ")
        assert lines[1].startswith("The processes are alone in their cgroup")
        assert set(attached(scratch)) <= programs_of(running.pid)
        assert attached(scratch)
    assert attached(scratch) == []


def test_without_marks_a_process_in_company_is_moved(own: Target, scratch: Cgroup) -> None:
    """The other one stays unlimited; what the limit cannot reach is said."""
    with target(scratch) as other, speaking(own, prefix=refusing(NO_MARKS)) as running:
        lines = lines_until_it_limits(running)
        assert lines[0].startswith("Single sockets cannot be limited here: ")
        assert lines[1].startswith("The processes are moved")
        assert lines[2].startswith("Connections that are already open are not limited: ")
        [made] = [each for each in cgroup.walk() if each in scratch and each != scratch]
        assert (made.pids(), scratch.pids()) == ([own.pid], [other.pid])
        assert attached(made)
        assert attached(scratch) == []
        running.terminate()
        running.wait()
        assert sorted(scratch.pids()) == sorted([own.pid, other.pid])
        assert not made.exists()


@pytest.mark.parametrize("options", [("--name", "nobody-has-this"), ("--user", str(USER))])
def test_without_marks_there_are_no_names(options: Sequence[str]) -> None:
    """Processes that are started anywhere later cannot be limited otherwise: that is an error."""
    complaint = failed(*options, "--download-backend", "ebpf", prefix=refusing(NO_MARKS))
    assert "single processes cannot be limited here" in complaint
    assert "--cgroup" in complaint


def test_without_marks_each_has_none(own: Target) -> None:
    """One line says so."""
    complaint = failed("--pid", str(own.pid), "--each", prefix=refusing(NO_MARKS))
    assert "marks" in complaint


def test_in_a_pid_namespace_the_process_is_moved(scratch: Cgroup) -> None:
    """Its ids are not the kernel's; the connections that are open get marks all the same."""
    script = (
        "sleep 60 & echo $! >$0/cgroup.procs; sleep 60 & echo $! >$0/cgroup.procs;"
        ' exec "$@" --pid $!'
    )
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*TOOL, "--download-limit", "1M", "--duration", "1"]
    with subprocess.Popen(
        [*inside, "sh", "-c", script, scratch.path, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
    ) as running:
        lines = lines_until_it_limits(running)
        [made] = [each for each in cgroup.walk() if each in scratch and each != scratch]
        assert (len(made.pids()), len(scratch.pids())) == (1, 1)
        assert running.wait(10) == 0
    assert "pid namespace" in lines[0]
    assert lines[1].startswith("The processes are moved")
    assert len(lines) == 2


@pytest.mark.parametrize("alone", [False, True])
def test_a_limit_on_the_first_process_is_one_on_all(alone: bool) -> None:
    """Which is said. Here it is that of a pid namespace, so that it is not that of the machine."""
    inside = ["unshare", "--pid", "--cgroup", "--fork", "--kill-child", "--mount-proc"]
    limit = [*TOOL, "--pid", "1", "--upload-limit", "1G", "--duration", "0.3"]
    done = subprocess.run(
        [*inside, "sh", "-c", '"$@"; true', "sh", *limit, *["--no-children"] * alone],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=60,
    )
    assert "Limiting process 1 (sh)" in done.stdout
    said = [line for line in done.stdout.splitlines() if "all processes" in line]
    assert len(said) == (not alone)
    assert all("process 1 (sh) has started all others" in line for line in said)


# Capabilities.


def with_only(*capabilities: str) -> list[str]:
    """The command that runs another one as root with nothing but these capabilities.

    And with CAP_SYS_RESOURCE, if there is: before Linux 5.11 maps are charged to locked memory.
    """
    status = Path("/proc/self/status").read_text()
    [bounds] = re.findall(r"^CapBnd:\t(.*)$", status, re.MULTILINE)
    if int(bounds, 16) >> CAP_SYS_RESOURCE & 1:
        capabilities += ("sys_resource",)
    held = ",".join(["-all", *(f"+{each}" for each in capabilities)])
    return ["setpriv", f"--bounding-set={held}", f"--inh-caps={held}"]


@pytest.mark.parametrize("rights", [("bpf", "perfmon"), ("sys_admin",)])
def test_a_process_of_another_user_needs_a_right(scratch: Cgroup, rights: Sequence[str]) -> None:
    """Without CAP_SYS_PTRACE its sockets cannot be borrowed: an error names that, and it."""
    with target(scratch, partial(as_user, USER)) as own:
        own.do(STREAM)
        complaint = failed("--pid", str(own.pid), prefix=with_only("net_admin", *rights))
        assert f"{own.pid} (" in complaint
        assert "CAP_SYS_PTRACE" in complaint


def test_three_rights_are_enough(own: Target) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_SYS_PTRACE; without CAP_PERFMON children are looked for."""
    before = own.do(STREAM)
    prefix = with_only("bpf", "net_admin", "sys_ptrace")
    with tool("--pid", str(own.pid), prefix=prefix) as (running, _):
        assert "every 1 s" in note(running, "started from now on")
        assert marked(own.pid, [before, own.do(STREAM)], running.pid) == [True, True]
