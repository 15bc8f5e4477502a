"""What becomes of packets is left to chance, and the same for the same seed."""

from __future__ import annotations

import json
import math

import pytest

from pybpfthrottle.conditions.model import Impairment, Loss
from pybpfthrottle.diversion import needs_diversion
from pybpfthrottle.diversion.impairing import Impairing, from_json, to_json
from pybpfthrottle.diversion.tally import Tally, middle_of, step_of

MS = 1_000_000


def fates(wanted, count):
    """What becomes of so many packets, one each millisecond."""
    impairing = Impairing(wanted)
    return [impairing.decide(number * MS) for number in range(count)]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("length", [None, 1, 5])
def test_as_many_packets_are_lost_as_asked_for(share, length):
    """Within four standard deviations, by chance and in bursts."""
    count = 20_000
    loss = Loss.chance(share) if length is None else Loss.burst(share, length)
    lost = sum(not one.copies for one in fates(Impairment(loss=loss, seed=5), count))
    spread = math.sqrt(count * share * (1 - share) * 2 * (length or 1))
    assert abs(lost - count * share) < 4 * spread


def test_bursts_are_as_long_as_asked_for():
    """On average."""
    lost = [not one.copies for one in fates(Impairment(loss=Loss.burst(0.1, 5)), 30_000)]
    begins = sum(now and not before for before, now in zip([False, *lost], lost))
    assert sum(lost) / begins == pytest.approx(5, rel=0.15)


def test_each_nth_packet_is_lost():
    """The third, the sixth, and so on."""
    lost = [not one.copies for one in fates(Impairment(loss=Loss.every(3)), 7)]
    assert lost == [False, False, True, False, False, True, False]


def test_the_same_seed_decides_the_same():
    """Another one does not, and what else is asked for changes nothing of it."""
    wanted = Impairment(delay_s=0.1, loss=Loss.chance(0.2), seed=1)
    lost = [one.copies for one in fates(wanted, 500)]
    assert lost == [one.copies for one in fates(wanted.changed(jitter_s=0.05, corrupt=0.5), 500)]
    assert lost != [one.copies for one in fates(wanted.changed(seed=2), 500)]


def test_a_delay_is_counted_from_when_a_packet_came():
    """To the nanosecond."""
    assert [one.due_ns for one in fates(Impairment(delay_s=0.25), 2)] == [250 * MS, 251 * MS]


def test_jitter_keeps_the_order_if_it_is_to():
    """And goes to both sides of the delay."""
    wanted = Impairment(delay_s=0.1, jitter_s=0.05)
    due = [one.due_ns for one in fates(wanted, 2000)]
    assert due == sorted(due)
    late = [
        one.due_ns - number * MS
        for number, one in enumerate(fates(wanted.changed(keep_order=False), 2000))
    ]
    assert 50 * MS <= min(late) < 55 * MS
    assert 145 * MS < max(late) <= 150 * MS


def test_a_shorter_delay_lets_none_overtake():
    """What comes after a change waits for what came before it."""
    impairing = Impairing(Impairment(delay_s=0.3))
    before = impairing.decide(0).due_ns
    impairing.change(Impairment(delay_s=0.02))
    assert impairing.decide(MS).due_ns == before
    assert impairing.decide(400 * MS).due_ns == 420 * MS


def test_shares_are_as_asked_for():
    """Of packets that come twice, early or damaged."""
    wanted = Impairment(delay_s=0.1, duplicate=0.1, reorder=0.2, corrupt=0.3)
    found = fates(wanted, 20_000)
    assert sum(one.copies == 2 for one in found) == pytest.approx(2000, rel=0.1)
    assert sum(one.is_early for one in found) == pytest.approx(4000, rel=0.1)
    assert sum(one.is_damaged for one in found) == pytest.approx(6000, rel=0.1)
    early = [one.due_ns - number * MS for number, one in enumerate(found) if one.is_early]
    assert set(early) == {50 * MS}


@pytest.mark.parametrize(
    ("wanted", "is_needed", "splits"),
    [
        (Impairment(), False, False),
        (Impairment(loss=Loss.chance(0.1)), False, True),
        (Impairment(delay_s=0.1), True, False),
        (Impairment(delay_s=0.1, jitter_s=0.1), True, False),
        (Impairment(delay_s=0.1, jitter_s=0.1, keep_order=False), True, True),
        (Impairment(duplicate=0.1), True, True),
        (Impairment(corrupt=0.1), True, True),
    ],
)
def test_what_needs_a_diversion_and_packets_of_the_wire(wanted, is_needed, splits):
    """A delay needs no splitting, and a loss alone no diversion."""
    assert needs_diversion(wanted) is is_needed
    assert Impairing(wanted).splits is splits


def test_the_keeper_is_told_all_of_it():
    """As JSON."""
    for loss in (None, Loss.burst(0.1, 3), Loss.every(9)):
        wanted = Impairment(0.3, 0.2, False, loss, 0.1, 0.2, 0.3, 77)
        assert from_json(json.loads(json.dumps(to_json(wanted)))) == wanted


@pytest.mark.parametrize("delay_s", [0.00001, 0.0009, 0.02, 0.08, 0.3, 2, 60])
def test_delays_are_counted_finely_enough(delay_s):
    """The step's middle is within a thousandth, or 4 microseconds."""
    middle_s = middle_of(step_of(round(delay_s * 1e9))) / 1e9
    assert middle_s == pytest.approx(delay_s, rel=0.001, abs=4e-6)


def test_a_tally_tells_shares_of_delays():
    """Half of the packets, and 99 of 100."""
    tally = Tally.create()
    try:
        assert tally.delay_s(0.5) is None
        for number in range(100):
            tally.delivered(number * MS, 2)
        assert tally.delay_s(0.5) == pytest.approx(0.049, rel=0.01)
        assert tally.delay_s(0.99) == pytest.approx(0.098, rel=0.01)
        tally.delivered(10**13, 10**6)  # longer than any is counted
        assert tally.delay_s(0.99) > 200
    finally:
        tally.close()


def test_chance_goes_on_where_only_the_delay_changes():
    """Else each other delay would begin with the same losses."""
    wanted = Impairment(delay_s=0.1, loss=Loss.chance(0.5), seed=1)
    straight, changed, anew = (Impairing(wanted) for _ in range(3))
    fates = [straight.decide(0).copies for _ in range(40)]
    first = [changed.decide(0).copies for _ in range(20)]
    changed.change(wanted.changed(delay_s=0.2), anew=False)
    assert first + [changed.decide(0).copies for _ in range(20)] == fates
    assert changed.delay_ns == 200_000_000
    anew.decide(0)
    anew.change(wanted)
    assert [anew.decide(0).copies for _ in range(40)] == fates
