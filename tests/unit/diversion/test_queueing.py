"""Flows take turns at the limit's rate, and one that waits for too long loses single packets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_packets import is_right, made

from pybpfthrottle.diversion import queueing
from pybpfthrottle.diversion.keeper import Unreturned
from pybpfthrottle.diversion.packets import Packet
from pybpfthrottle.diversion.queueing import Fair, Queue, Waiting

MS = 1_000_000
RATE = 1_000_000
INVERSE = (10**9 << 20) // RATE


def waiting(number=0, at_ns=0, *, port=443, size=1000, version=4, tos=0):
    """A packet of UDP whose payload begins with its number."""
    data = made(version, False, number.to_bytes(4, "big").ljust(size, b"-"), port=port)
    packet = Packet(data, 0)
    data[1] |= tos if version == 4 else tos << 4
    if version == 4:
        packet._sum_header()
    return Waiting(packet, at_ns, (b"", 0, 0), 0)


def number_of(leaving):
    """The number in a packet that leaves."""
    data = leaving.waiting.packet.data
    at = leaving.waiting.packet.header
    return int.from_bytes(data[at : at + 4], "big")


def port_of(leaving):
    """Its source port."""
    packet = leaving.waiting.packet
    return int.from_bytes(packet.data[packet.at : packet.at + 2], "big")


def drained(fair, now_ns):
    """All that leaves."""
    return list(iter(lambda: fair.get(now_ns), None))


def element(**fields):
    """An element of a map, which stays as it is."""
    return SimpleNamespace(read=lambda: SimpleNamespace(**fields), close=lambda: None)


def queue(even_at_ns=0, gate_due_ns=0, rate=RATE):
    """The queue of a limit that owes something until a time."""
    return Queue(
        element(even_at_ns=even_at_ns, credit_ns=0, slack_ns=0),
        element(
            rate_bytes_per_s=rate, inverse_rate=INVERSE, credit_ns=0, debt_ns=20 * MS, slack_ns=0
        ),
        element(alive=1, next_due_ns=gate_due_ns),
    )


def test_a_flow_that_has_not_waited_comes_first():
    """So a ping is not held up by a download."""
    fair = Fair()
    for number in range(10):
        fair.put(waiting(number))
    assert number_of(fair.get(0)) == 0
    assert number_of(fair.get(0)) == 1  # its turn is over with this one
    fair.put(waiting(77, port=53, size=40))
    assert port_of(fair.get(0)) == 53
    assert [number_of(one) for one in drained(fair, 0)] == list(range(2, 10))
    assert fair.bytes == 0


def test_flows_take_turns_by_bytes():
    """One of small packets sends more of them."""
    fair = Fair()
    for number in range(60):
        fair.put(waiting(number, size=1472))
    for number in range(400):
        fair.put(waiting(number, port=444, size=222))
    found = [port_of(fair.get(0)) for _ in range(210)]
    assert found.count(443) == pytest.approx(30, abs=3)
    assert found.count(444) == pytest.approx(180, abs=3)


@pytest.mark.parametrize("version", [4, 6])
def test_each_flow_is_in_order(version):
    """Whatever the others do."""
    fair = Fair()
    for number in range(30):
        for port in (1, 2, 3):
            fair.put(waiting(number, port=port, version=version))
    found = drained(fair, 0)
    for port in (1, 2, 3):
        assert [number_of(one) for one in found if port_of(one) == port] == list(range(30))


def test_few_packets_are_no_queue():
    """However long they wait: a sender's smallest window may be all that there is."""
    fair = Fair()
    lost = []
    for number in range(100):
        fair.put(waiting(number, number * 30 * MS))
        if number >= queueing.LEAST_PACKETS - 1:
            lost.append(fair.get(number * 30 * MS).is_lost)
    assert not any(lost)


def standing(fair, *, tos=0, step_ns=5 * MS, count=400, length=queueing.USUAL_PACKETS):
    """A flow that has so many packets in its queue all the time, one each step: what leaves."""
    found = []
    for number in range(count):
        fair.put(waiting(number, number * step_ns, tos=tos))
        if number >= length:
            found.append(fair.get(number * step_ns))
    return found


@pytest.mark.parametrize(("step_ns", "loses"), [(2 * MS, False), (4 * MS, True)])
def test_a_longer_queue_is_one_by_its_time(step_ns, loses):
    """54 packets wait for 108 and for 216 ms."""
    found = standing(Fair(), step_ns=step_ns, length=queueing.USUAL_PACKETS * 3 // 4)
    assert any(one.is_lost for one in found) == loses


def test_one_that_waits_for_too_long_loses_single_packets():
    """The more, the longer it does so."""
    lost = [
        at for at, one in enumerate(standing(Fair(), step_ns=MS // 4, count=8000)) if one.is_lost
    ]
    gaps = [later - one for one, later in zip(lost, lost[1:])]
    assert 400 <= lost[0] <= 410  # an interval of 100 ms, with a packet each 0.25
    assert gaps[0] == pytest.approx(400, abs=2)
    assert gaps[-1] < gaps[0] / 3
    assert all(later <= one + 1 for one, later in zip(gaps, gaps[1:]))


def test_a_slow_start_loses_one_as_soon_as_it_waits_for_long():
    """It comes four times as fast as it leaves; an interval later, twice as much would wait."""
    fair, left = Fair(), []
    for number in range(400):
        fair.put(waiting(number, number * MS))
        if number % 4 == 3:
            one = fair.get(number * MS)
            left.append((number * MS - one.waiting.at_ns, one.is_lost))
    waited_ns = next(waited_ns for waited_ns, is_lost in left if is_lost)
    assert queueing.FIRST_NS <= waited_ns <= queueing.FIRST_NS + 4 * MS


def test_what_came_before_a_loss_causes_no_other():
    """Its sender could not know by then, however long it waits: here 300 packets come at once."""
    fair = Fair()
    for number in range(300):
        fair.put(waiting(number, 0))
    lost = []
    for number in range(300, 600):
        now_ns = (number - 250) * 2 * MS
        fair.put(waiting(number, now_ns))
        one = fair.get(now_ns)
        if one.is_lost:
            lost.append(one.waiting.at_ns)
    assert lost == [0]


@pytest.mark.parametrize(
    ("length", "step_ns", "gap"), [(80, 5 * MS, 80), (20, 15 * MS, queueing.LEAST_APART)]
)
def test_one_that_does_not_slow_down_loses_no_more_than_who_does(length, step_ns, gap):
    """It would gain nothing: what waits too long does so in its own queue.

    In a long queue the next one is of those that came when one was lost already.
    """
    found = standing(Fair(), step_ns=step_ns, count=2000, length=length)
    lost = [at for at, one in enumerate(found) if one.is_lost]
    assert lost[0] == 0  # which has waited for 300 ms and more
    gaps = [later - one for one, later in zip(lost, lost[1:])]
    assert set(gaps[1:]) == {gap}


LONGER = queueing.USUAL_PACKETS * 4 // 3


def losses(fair, begin_ns, length):
    """When packets get lost while so many wait, one each ms, for half a second."""
    found = []
    for number in range(length + 500):
        now_ns = begin_ns + number * MS
        fair.put(waiting(number, now_ns))
        if number >= length and fair.get(now_ns).is_lost:
            found.append(now_ns)
    drained(fair, 0)
    return found


@pytest.mark.parametrize(("after_ms", "is_longer"), [(1, True), (990, True), (1010, False)])
def test_who_leaves_the_limit_unused_after_a_loss_may_have_a_longer_queue(after_ms, is_longer):
    """Who has halved what is on its way sends less than the limit then."""
    fair = Fair()
    last_ns = losses(fair, 0, LONGER)[-1]
    fair.regain(waiting(at_ns=last_ns + after_ms * MS))
    assert bool(losses(fair, 3000 * MS, LONGER)) != is_longer


def test_another_one_may_not():
    """It may be in its slow start, and is told sooner."""
    fair = Fair()
    last_ns = losses(fair, 0, LONGER)[-1]
    fair.regain(waiting(at_ns=last_ns + MS, port=444))
    assert losses(fair, 3000 * MS, LONGER)


def test_a_queue_is_no_longer_than_it_has_to_be():
    """After losses that were followed by no unused time it is as usual again."""
    fair = Fair()
    fair.regain(waiting(at_ns=losses(fair, 0, LONGER)[-1]))
    assert not losses(fair, 3000 * MS, LONGER)
    assert len(losses(fair, 6000 * MS, 150)) > 2
    assert losses(fair, 9000 * MS, LONGER)


@pytest.mark.parametrize(("after_ms", "is_unused"), [(2, False), (5, True)])
def test_the_limit_is_unused_once_nothing_is_owed(after_ms, is_unused):
    """A packet has been paid for when it has left for 1.03 ms."""
    now, told = 1000 * MS, []
    one = queue(even_at_ns=now)
    one._fair.regain = told.append
    one.put(waiting(0, now))
    assert len(list(one.leaving(now, 64))) == 1
    told.clear()
    one.put(waiting(1, now + after_ms * MS))
    assert bool(told) == is_unused


def test_beside_tcp_it_has_half_at_once():
    """However long it had all of it before."""
    one = queue(even_at_ns=0, gate_due_ns=1)
    one._half_ns = 10_000 * MS
    one.put(waiting(0, 1000 * MS))
    assert not list(one.leaving(1000 * MS, 64))
    assert list(one.leaving(1051 * MS, 64))


def test_a_small_packet_is_not_the_one_that_is_lost():
    """The next large one is."""
    fair = Fair()
    for number in range(200):
        fair.put(waiting(number, 0, size=40 if number < 20 else 1200))
    left = [fair.get(queueing.LONG_NS + number) for number in range(100)]
    assert [at for at, one in enumerate(left) if one.is_lost] == [20]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tos", [1, 2, 3])
def test_who_understands_marks_loses_none(version, tos):
    """ECT(0), and what is marked already; ECT(1) is for marks by another law."""
    packet = waiting(tos=tos, version=version).packet
    assert packet.mark_congested() == (tos != 1)
    mark = packet.data[1] >> (0 if version == 4 else 4) & 3
    assert mark == (1 if tos == 1 else 3)
    packet._finish()
    assert is_right(packet.data)


def test_a_queue_marks_instead():
    """As often as it would have dropped."""
    fair = Fair()
    assert not any(one.is_lost for one in standing(fair, tos=2))
    assert fair.marked == sum(one.is_lost for one in standing(Fair()))


def test_small_packets_are_not_lost():
    """The policer does not count them."""
    fair = Fair()
    for number in range(40):
        fair.put(waiting(number, size=100))
    assert not any(fair.get(number * 20 * MS).is_lost for number in range(1, 41))


def test_what_is_too_late_is_lost():
    """Its sender has sent it once more."""
    fair = Fair()
    fair.put(waiting())
    assert fair.get(1001 * MS).is_lost


def test_the_longest_flow_loses_its_oldest():
    """If there is too much in all."""
    fair = Fair()
    for number in range(50):
        fair.put(waiting(number))
    fair.put(waiting(0, port=53))
    fair.trim(20_000, 0)
    assert fair.bytes <= 20_000
    found = drained(fair, 0)
    lost = [number_of(one) for one in found if one.is_lost]
    assert lost == list(range(len(lost)))
    assert [port_of(one) for one in found if not one.is_lost].count(53) == 1
    assert len(found) == 51


def test_packets_go_when_nothing_is_owed():
    """In bursts of 1 ms, and the next time is when that is paid."""
    now = 1000 * MS
    one = queue(even_at_ns=now + 5 * MS)
    one._half_ns = now + 100 * MS
    for number in range(10):
        one.put(waiting(number, now))
    assert not list(one.leaving(now, 64))
    assert one.due_ns == now + 5 * MS
    later = now + 5 * MS
    found = list(one.leaving(later, 64))
    assert len(found) == 1  # 1028 bytes take 1.03 ms
    assert one.due_ns == pytest.approx(later + 1.028 * MS, abs=10)
    assert one


@pytest.mark.parametrize(("owed_ms", "expected"), [(0, 20), (15, 5), (19, 1), (30, 0)])
def test_half_goes_while_tcp_waits(owed_ms, expected):
    """It makes up for 50 ms at most, and nothing goes that the policer would drop."""
    now = 1000 * MS
    one = queue(even_at_ns=now + owed_ms * MS, gate_due_ns=1)
    for number in range(50):
        one.put(waiting(number, now))
    assert len(list(one.leaving(now, 64))) == expected
    one = queue(even_at_ns=now, gate_due_ns=1)
    one._half_ns = now
    for number in range(50):
        one.put(waiting(number, now))
    assert len(list(one.leaving(now, 64))) == 1
    assert one.due_ns == pytest.approx(now + 2 * 1.028 * MS, abs=10)


def test_without_a_rate_all_goes():
    """The limit was lifted."""
    one = queue(rate=0, even_at_ns=0)
    for number in range(10):
        one.put(waiting(number, 0))
    assert len(list(one.leaving(MS, 64))) == 10
    assert not one
    assert one.due_ns == 0


def test_all_is_given_back_at_the_end():
    """In order."""
    one = queue(even_at_ns=10**15)
    for number in range(10):
        one.put(waiting(number, 0))
    assert [number_of(each) for each in one.all()] == list(range(10))
    assert not one


@pytest.mark.parametrize(("came", "is_cut_off"), [(1, False), (0.6, False), (0.2, True), (0, True)])
def test_what_does_not_arrive_is_noticed(came, is_cut_off):
    """If half of a sample is not there a second later."""
    watch = Unreturned()
    told = [watch.given(int(at * came), at * 20 * MS) for at in range(1, 150)]
    assert any(told) == is_cut_off


def test_what_arrives_late_is_no_loss():
    """A busy machine may take a while."""
    watch = Unreturned()
    assert not any(watch.given(max(0, at - 40), at * 20 * MS) for at in range(1, 400))
