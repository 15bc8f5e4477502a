"""The cgroups that we make for commands: held by a lock, and tidied away after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import ENVIRONMENT, TOOL

from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import cgroup, own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.own_cgroups import PREFIX as OWN_PREFIX


@pytest.fixture
def sleeper():
    """A process of the test's own."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


def test_the_process_is_moved_in_and_the_cgroup_goes_after_it(sleeper) -> None:
    """The process is in the new cgroup; only once it has ended the cgroup can be removed."""
    own = own_cgroups.create_for(sleeper.pid)
    assert cgroup.from_pid(sleeper.pid) == own.cgroup
    sleeper.kill()
    sleeper.wait()
    assert own.remove()
    assert not own.cgroup.exists()


def test_a_populated_cgroup_is_left(sleeper) -> None:
    """Removing reports that a process is still in it, and leaves it to the next start."""
    own = own_cgroups.create_for(sleeper.pid)
    assert not own.remove()
    assert own.cgroup not in own_cgroups.remove_abandoned()
    sleeper.kill()
    sleeper.wait()
    own_cgroups.remove_abandoned()
    assert not own.cgroup.exists()


def test_a_cgroup_whose_owner_lives_is_left(sleeper) -> None:
    """An empty cgroup that another instance holds is not taken for abandoned."""
    own = own_cgroups.create_for(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    script = "from pybpfthrottle.linux import own_cgroups; own_cgroups.remove_abandoned()"
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True)
    assert own.cgroup.exists()
    assert own.remove()


def test_a_child_of_a_threaded_cgroup_takes_the_process(scratch: Cgroup, sleeper) -> None:
    """Below a threaded cgroup the new one is made threaded as well."""
    threaded = scratch.create_child("threaded")
    try:
        fd = os.open(os.path.join(threaded.path, "cgroup.type"), os.O_WRONLY)
        os.write(fd, b"threaded")
        os.close(fd)
        # A thread group enters a threaded cgroup from its domain.
        scratch.move_in(sleeper.pid)
        threaded.move_in(sleeper.pid)
        own = own_cgroups.create_for(sleeper.pid)
        assert own.cgroup in threaded
        assert os.path.basename(own.cgroup.path).startswith(OWN_PREFIX)
        sleeper.kill()
        sleeper.wait()
        assert own.remove()
    finally:
        threaded.remove(patience_s=5)


@pytest.mark.parametrize("children", [True, False])
def test_children_move_too_unless_they_are_not_meant(scratch: Cgroup, children: bool) -> None:
    """They come back with their parents."""
    # At once each: PYTHONUNBUFFERED writes the ends of lines by themselves, and the two would mix.
    script = "import os, time; os.write(1, b'%d\\n' % (os.fork() or os.getpid())); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        (child,) = {int(parent.stdout.readline()) for _ in range(2)}
        try:
            for pid in (parent.pid, child):
                scratch.move_in(pid)
            with own_cgroups.Moved([parent.pid]) as moved:
                moved.move(children=children)
                (own,) = moved.cgroups
                assert set(own.pids()) == ({parent.pid, child} if children else {parent.pid})
            assert set(scratch.pids()) == {parent.pid, child}
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()


def test_a_process_that_is_gone_is_an_error() -> None:
    """Nothing is left of the attempt to move a process that does not exist."""
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessError, match="no process"):
        own_cgroups.create_for(child.pid)


def test_many_starts_at_once_do_not_disturb_each_other() -> None:
    """Each start tidies up, and none takes another's new cgroup for abandoned."""

    def start(_: int) -> int:
        command = [*TOOL, "run", "-q", "--download-limit", "1M", "--", "sh", "-c", "exit 7"]
        return subprocess.run(command, env=ENVIRONMENT).returncode

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(start, range(40))) == {7}
