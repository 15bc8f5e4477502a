"""The owner's side of a helper process."""

import socket
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
