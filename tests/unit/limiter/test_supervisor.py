"""The loop that does what limits need: in time, one after the other, whatever fails."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time

import pytest

from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.supervisor import (
    Budget,
    Frequent,
    InThread,
    Look,
    OnEventLoop,
    Periodic,
    Supervisor,
)


class Often(Periodic, Frequent):
    """One that changes no others."""


class Readable:
    """A chore that is due when a pipe is readable."""

    def __init__(self):
        self.read, self.write = os.pipe()
        self.due_s = math.inf
        self.seen = []

    def fileno(self):
        """The end that is waited for."""
        return self.read

    def run(self):
        """Take in what has come."""
        self.seen.append(os.read(self.read, 100))

    def close(self):
        """Close both ends."""
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def supervisor():
    """One that is driven by the test."""
    with Supervisor() as made:
        yield made


@pytest.fixture
def readable():
    """A chore with a descriptor."""
    chore = Readable()
    yield chore
    chore.close()


def test_a_chore_is_done_when_it_is_due_and_not_before(supervisor):
    """Each period once; waiting costs no rounds."""
    done = []
    chore = Periodic(0.05, lambda: done.append(time.monotonic()))
    supervisor.add(lambda: [chore])
    begin = time.monotonic()
    supervisor.step()
    assert done == []
    for _ in range(3):
        supervisor.step(math.inf)
    assert len(done) == 3
    assert all(at - begin >= 0.05 * count for count, at in enumerate(done, start=1))


def test_a_chore_that_a_call_has_ended_is_not_done_any_more(supervisor):
    """Not even if it was due when the call came: what it looks at is closed."""
    done = []
    chore = Periodic(0, lambda: done.append(True))

    def source():
        return [chore]

    supervisor.add(source)
    caller = threading.Thread(
        target=supervisor.call, args=[lambda: supervisor.discard(source)], daemon=True
    )
    caller.start()
    time.sleep(0.1)
    supervisor.step()
    caller.join(5)
    assert not caller.is_alive()
    assert done == []


def test_times_that_were_missed_are_left_out(supervisor):
    """After a stop the next one comes at once, and then in its usual time."""
    done = []
    chore = Periodic(0.02, lambda: done.append(time.monotonic()))
    supervisor.add(lambda: [chore])
    time.sleep(0.2)
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        supervisor.step(end)
    assert 1 <= len(done) <= 4  # of the ten that were due


def test_a_descriptor_makes_a_chore_due(supervisor, readable):
    """Only when it is readable, and only while its source has it."""
    supervisor.add(lambda: [readable])
    supervisor.step()
    assert readable.seen == []
    os.write(readable.write, b"x")
    supervisor.step(math.inf)
    assert readable.seen == [b"x"]


def test_a_descriptor_that_is_closed_in_between_is_no_trouble(supervisor):
    """Another chore that has its number afterwards is waited for instead."""
    chores = [Readable()]
    supervisor.add(lambda: chores)
    supervisor.step()
    chores.pop().close()
    chores.append(Readable())
    os.write(chores[0].write, b"y")
    supervisor.step(math.inf)
    assert chores[0].seen == [b"y"]
    chores.pop().close()


def test_who_serves_many_asks_only_those_whose_chores_may_have_changed(monkeypatch):
    """After one that is frequent nobody; after another one its own source; after a call all."""
    monkeypatch.setattr("pybpfthrottle.supervisor._ASK_AGAIN_S", 1000.0)
    asked = []
    ended = threading.Event()

    def source(name, *chores):
        def ask():
            asked.append(name)
            return chores

        return ask

    def count():
        if len(rounds) < 4:
            rounds.append(list(asked))
            asked.clear()
        else:
            ended.set()

    rounds = []
    supervisor = Supervisor()
    supervisor.add(source("often", Often(0.01, count)))
    supervisor.add(source("rare", Periodic(0.025, lambda: None), Periodic(1000, lambda: None)))
    supervisor.add(source("never", Periodic(1000, lambda: None)))
    serving = threading.Thread(target=supervisor.serve)
    serving.start()
    assert ended.wait(20)
    asked.clear()
    supervisor.call(supervisor.stop)
    serving.join()
    assert rounds[0] == ["often", "rare", "never"]
    assert {name for names in rounds[1:4] for name in names} <= {"rare"}
    assert set(asked) == {"often", "rare", "never"}


def test_a_change_of_one_limit_asks_no_other(monkeypatch):
    """With many limits each one that begins or ends would cost a question to all."""
    monkeypatch.setattr("pybpfthrottle.supervisor._ASK_AGAIN_S", 1000.0)
    asked = []

    def source(name):
        return lambda: (asked.append(name), [Periodic(1000, lambda: None)])[1]

    first = InThread(source("first"))
    second = InThread(source("second"))
    try:
        asked.clear()
        second.call(lambda: None)
        third = InThread(source("third"))
        third.release()
        second.call(lambda: None)  # all before has been done
        assert set(asked) <= {"second", "third"}
        assert "second" in asked
    finally:
        second.release()
        first.release()


def test_looks_wait_together_until_they_cost_no_more_than_their_budget(monkeypatch):
    """As long as all need, by powers of two of the usual time; who is gone costs nothing."""
    now = [1000.0]
    monkeypatch.setattr("pybpfthrottle.supervisor.time.monotonic", lambda: now[0])
    budget = Budget(0.01)
    several = [Often(1, lambda: None) for _ in range(100)]
    assert budget.next_due_s(several[0], 0.001, 1.0) == 1001.0
    due = [budget.next_due_s(one, 0.001, 1.0) for one in several]
    # A tenth of a second is spent each time, so ten would have to pass: eight do, as of 1000.
    assert due[-1] == 1008.0
    # Eight seconds are not exceeded as long as that is five times the budget at most.
    assert budget.next_due_s(several[0], 0.3, 1.0) == 1008.0
    assert budget.next_due_s(several[0], 1.5, 1.0) == 1024.0
    del several[1:]
    now[0] += 10
    budget.next_due_s(several[0], 0.001, 1.0)
    assert budget.next_due_s(several[0], 0.001, 1.0) == 1011.0


def test_a_look_says_whether_there_are_other_chores(supervisor, monkeypatch):
    """Only then its source is asked again."""
    monkeypatch.setattr("pybpfthrottle.supervisor._ASK_AGAIN_S", 1000.0)
    asked, answers = [], [False, True, False]
    look = Look(0.01, lambda: answers.pop(0), Budget(1.0))
    supervisor.add(lambda: asked.append(len(answers)) or [look])
    supervisor.step(math.inf)
    while answers:
        supervisor.step(math.inf, ask_all=False)
    assert asked == [3, 1]


@pytest.mark.parametrize(("found", "due"), [(True, 1001.0), (False, 1008.0)])
def test_what_was_found_to_do_does_not_delay_the_next_look(monkeypatch, found, due):
    """Only looking has to keep to the budget: half a second of 5 % is once in ten, so in 16."""
    used = iter([0.0, 0.5])
    monkeypatch.setattr("pybpfthrottle.supervisor.time.monotonic", lambda: 1000.0)
    monkeypatch.setattr("pybpfthrottle.supervisor.time.thread_time", lambda: next(used))
    look = Look(1.0, lambda: found, Budget(0.01))
    look.run()
    assert look.due_s == due


def test_what_fails_keeps_nothing_else_from_being_done(supervisor, caplog):
    """An error of one chore is logged; the next is done all the same."""
    done = []

    def fail():
        raise ThrottleError("a look has failed")

    chores = [Periodic(0, fail), Periodic(0, lambda: done.append(1))]
    supervisor.add(lambda: chores)
    supervisor.step(math.inf)
    assert done == [1]
    assert "a look has failed" in caplog.text


def test_an_error_of_the_caller_s_own_is_the_caller_s(supervisor):
    """A source that is strict raises where it is stepped."""

    def fail():
        raise OSError("the terminal is gone")

    chore = Periodic(0, fail)
    supervisor.add(lambda: [chore], strict=True)
    with pytest.raises(OSError, match="terminal"):
        supervisor.step(math.inf)


def test_a_source_that_is_discarded_is_asked_no_more(supervisor):
    """It is out of the loop from then on."""
    done = []
    chore = Periodic(0, lambda: done.append(1))

    def source():
        return [chore]

    supervisor.add(source)
    supervisor.step(math.inf)
    supervisor.discard(source)
    supervisor.step()
    assert done == [1]


def pybpfthrottle_threads():
    """How many threads this process has for limits."""
    return sum(thread.name == "pybpfthrottle" for thread in threading.enumerate())


def test_all_that_is_in_the_background_shares_one_thread():
    """It begins with the first, and has ended when the last is released."""
    done = threading.Event()
    chore = Periodic(0.01, done.set)
    first, second = InThread(lambda: [chore]), InThread(list)
    assert pybpfthrottle_threads() == 1
    assert done.wait(5)
    first.release()
    assert pybpfthrottle_threads() == 1
    second.release()
    assert pybpfthrottle_threads() == 0


def test_a_call_is_done_in_the_thread_and_answers():
    """What it returns or raises comes back; a call from the thread itself is no deadlock."""
    driver = InThread(list)
    try:
        name = driver.call(lambda: threading.current_thread().name)
        assert name == "pybpfthrottle"
        assert driver.call(lambda: driver.call(lambda: 7)) == 7
        with pytest.raises(ThrottleError, match="told"):
            driver.call(lambda: (_ for _ in ()).throw(ThrottleError("told")))
    finally:
        driver.release()


def test_a_bug_in_one_limit_does_not_end_the_thread():
    """The thread goes on for all others."""

    def bug():
        raise ZeroDivisionError

    driver = InThread(lambda: [Periodic(0.0, bug)])
    try:
        time.sleep(0.05)
        assert driver.call(lambda: 1) == 1
    finally:
        driver.release()


def test_an_event_loop_does_chores_in_its_own_thread():
    """By time and by descriptor, until it is released."""
    done = []

    async def main(readable):
        chore = Periodic(0.02, lambda: done.append(threading.current_thread()))
        driver = OnEventLoop(lambda: [chore, readable], asyncio.get_running_loop())
        os.write(readable.write, b"z")
        await asyncio.sleep(0.1)
        driver.release()
        count = len(done)
        await asyncio.sleep(0.1)
        return count

    readable = Readable()
    count = asyncio.run(main(readable))
    assert readable.seen == [b"z"]
    readable.close()
    assert len(done) == count >= 2
    assert set(done) == {threading.main_thread()}
