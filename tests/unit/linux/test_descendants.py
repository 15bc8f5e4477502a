"""Descendants of processes are found without reading about all others again and again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pybpfthrottle.linux import descendants, process
from pybpfthrottle.linux.descendants import Tree

_THREAD_THAT_FORKS = """
import os, subprocess, sys, threading
def fork():
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    print(child.pid, flush=True)
    child.wait()
if {alone}:
    threading.Thread(target=fork).start()
else:
    fork()
"""


@pytest.fixture
def looks(monkeypatch):
    """Counts how often all processes are looked at."""
    made = []
    look = Tree._look
    monkeypatch.setattr(Tree, "_look", lambda tree: (made.append(tree), look(tree)))
    return made


@pytest.fixture
def childless():
    """A process without children."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as found:
        yield found
        found.stdin.close()


def test_who_has_no_children_costs_no_look_at_all_processes(looks, childless) -> None:
    """Many limits are made one after the other, each for such a process."""
    assert descendants.of([childless.pid]) == set()
    assert looks == []


@pytest.mark.parametrize("alone", [True, False], ids=["another thread", "the first thread"])
def test_the_child_of_any_thread_is_found(alone: bool) -> None:
    """The kernel lists children by the threads that have started them."""
    code = _THREAD_THAT_FORKS.format(alone=alone)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert descendants.of([parent.pid]) == {child}
        finally:
            os.kill(child, 15)


def test_who_cannot_be_asked_for_children_is_looked_up(looks, childless, monkeypatch) -> None:
    """Before Linux 4.2, and without CONFIG_PROC_CHILDREN, the kernel lists none."""
    monkeypatch.setattr(descendants, "_is_childless", lambda pid: False)
    assert descendants.of([childless.pid]) == set()
    assert len(looks) == 1


def test_a_zombie_is_read_about_once(monkeypatch) -> None:
    """Whose parent does not wait for it stays for long, and there may be hundreds."""
    asked = []
    parent_of = process.parent_of
    monkeypatch.setattr(process, "parent_of", lambda pid: (asked.append(pid), parent_of(pid))[1])
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        tree = Tree()
        assert child.pid in tree.of([os.getpid()])
        assert child.pid in tree.of([os.getpid()])
        child.stdin.close()
    zombie.wait()
    assert asked.count(zombie.pid) == 1
