"""The owner's side of a helper process."""

import errno
import socket
import subprocess
import threading
import time

import pytest

from pybpfthrottle.linux.helper import SharedHelper

PATIENCE_S = 20.0


@pytest.fixture
def waits():
    """A helper that says nothing."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helper = SharedHelper.__new__(SharedHelper)
    helper._socket = own
    with own, other:
        yield helper


def test_what_another_thread_has_read_is_not_waited_for(waits):
    """A supervisor may have taken the answer between the question and the wait for it."""
    answered = threading.Event()
    threading.Timer(0.1, answered.set).start()
    begin = time.monotonic()
    waits.wait_until(answered.is_set, PATIENCE_S)
    assert answered.is_set()
    assert time.monotonic() - begin < PATIENCE_S / 2


def test_one_that_does_not_answer_is_not_waited_for_any_longer(waits):
    """The caller goes on without it."""
    begin = time.monotonic()
    waits.wait_until(lambda: False, 0.05)
    assert 0.05 <= time.monotonic() - begin < PATIENCE_S


class Silent(SharedHelper):
    """A helper that cannot be started."""

    title = "Nobody"
    module = "nothing"

    def _abandon(self):
        self.is_abandoned = True

    def _close(self):
        pass


@pytest.fixture
def refused(monkeypatch):
    """The machine has no room for another process."""

    def refuse(*_args, **_options):
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_one_that_cannot_be_started_leaves_nothing_open(refused):
    """What it was told before is lost, and whoever asks is told why."""
    helper = Silent()
    helper.tell({"early": True})
    with pytest.raises(OSError, match="no more processes"):
        helper.start()
    assert "no more processes" in helper.ended
    assert helper.is_abandoned
    assert (helper.pid, helper.fileno()) == (0, -1)
    assert (helper._socket.fileno(), helper._other.fileno()) == (-1, -1)
    helper.start()  # it stays ended


def test_one_that_cannot_be_replaced_leaves_nothing_open(refused):
    """It has died, and there is no room for another."""
    helper = Silent()
    helper._restart()
    assert "no more processes" in helper.ended
    assert (helper._socket.fileno(), helper._other.fileno()) == (-1, -1)


def test_one_that_was_never_started_ends_like_any_other():
    """With its last user."""
    helper = Silent.join()
    helper.leave()
    assert helper.is_abandoned
    assert (helper._socket.fileno(), helper._other.fileno()) == (-1, -1)
