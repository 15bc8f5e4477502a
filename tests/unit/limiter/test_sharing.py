"""A group in force: how the rates of its members move with what they use."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybpfthrottle.backends.protocol import Use
from pybpfthrottle.errors import ShareError, ThrottleError
from pybpfthrottle.model import BLOCKED, Direction, Rate
from pybpfthrottle.shares import GroupSpec, Member
from pybpfthrottle.sharing import Group, Pool, groups_of

DOWNLOAD = Direction.DOWNLOAD
TOTAL = Rate(10_000_000)
LOOK_S = 0.02
CREDIT_S = 0.05
# Rates move only by so much.
STEP = 1 / 32


class Source:
    """A throttle, its dial, and who sends by it: ``wants`` bytes per second, if it may."""

    def __init__(self, limit=TOTAL, wants=0.0):
        self.id = f"source{id(self)}"
        self.limit = self.rate = limit
        self.wants = wants
        self.is_removed = False
        self.moves = []
        self.passed = self.spare_bytes = 0.0
        self.came = 0.0

    # As a throttle.

    @property
    def limits(self):
        """The limit, as it is recorded."""
        return {DOWNLOAD: self.limit}

    def dial(self, direction):
        """There is one direction."""
        return self

    def set_limit(self, direction, rate):
        """Somebody else's change."""
        self.limit = self.rate = rate

    def remove(self):
        """It is gone."""
        self.is_removed = True

    # As a dial.

    patience_ns = 25_000_000

    def is_still(self):
        """Whether nothing has come."""
        if self.is_removed:
            raise ThrottleError("the throttle has been removed")
        return self.came == 0

    def look(self):
        """What it has used."""
        self.is_still()
        rate = max(self.rate.bytes_per_s, 1) if self.rate else math.inf
        return Use(int(self.passed), 0, int(self.spare_bytes / rate * 1e9))

    def move(self, rate):
        """Another rate, which is noted."""
        self.moves.append(rate.bytes_per_s)
        self.rate = rate

    # What passes.

    def go_on(self, seconds):
        """Send for some time; a token bucket says how much passes."""
        rate = self.rate.bytes_per_s if self.rate else math.inf
        usable = rate * seconds + self.spare_bytes
        self.came = max(min(self.wants * seconds, usable), 0.0)
        self.passed += self.came
        self.spare_bytes = min(usable - self.came, rate * CREDIT_S) if self.rate else 0.0


class Machine:
    """A pool and its members, with a clock of its own."""

    def __init__(self, *members, inner=(), total=TOTAL):
        self.now = 1000.0
        self.pool = Pool(DOWNLOAD, total, inner)
        self.sources = []
        for member in members:
            self.add(member)

    def add(self, member, wants=0.0):
        """Add one more."""
        source = Source(wants=wants)
        self.sources.append(source)
        self.pool.add(source, member)
        self.pool.turn()
        return source

    def run(self, seconds):
        """Let time pass; return what each has moved, in bytes per second."""
        before = [source.passed for source in self.sources]
        looks = round(seconds / LOOK_S)
        for _ in range(looks):
            for source in self.sources:
                source.go_on(LOOK_S)
            self.now += LOOK_S
            self.pool.look(self.now, LOOK_S)
            self.pool.turn()
        return [(source.passed - old) / seconds for source, old in zip(self.sources, before)]

    def rates(self):
        """The rates in force."""
        return [source.rate.bytes_per_s for source in self.sources]


def members(*weights, **other):
    """Members with these weights, alike but for that."""
    return [Member.of("line", weight=weight, **other) for weight in weights]


def test_those_who_want_all_get_it_by_their_weights():
    """From the first look on, and all of it."""
    machine = Machine(*members(8, 4, 2, 1))
    for source in machine.sources:
        source.wants = math.inf
    used = machine.run(2)
    expected = [TOTAL.bytes_per_s * weight / 15 for weight in (8, 4, 2, 1)]
    assert used == pytest.approx(expected, rel=0.01)


def test_each_has_what_it_is_guaranteed_before_it_begins():
    """Nobody has to wait for a look."""
    machine = Machine(*members(3, 1))
    assert machine.rates() == [7_500_000, 2_500_000]


def test_what_one_leaves_is_used_within_100_ms():
    """By the others, as their weights are."""
    machine = Machine(*members(8, 4, 2))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    machine.sources[0].wants = 0.0
    machine.run(0.1)
    used = machine.run(0.1)
    assert used == pytest.approx([0, TOTAL.bytes_per_s * 2 / 3, TOTAL.bytes_per_s / 3], rel=STEP)


def test_what_one_leaves_that_owes_much_is_used_in_the_end():
    """It may still wait for its turn; but not for ever."""
    machine = Machine(*members(1, 1))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    machine.sources[0].wants = 0.0
    machine.sources[0].spare_bytes = -TOTAL.bytes_per_s / 2
    machine.run(1)
    assert machine.run(1) == pytest.approx([0, TOTAL.bytes_per_s], rel=STEP)


def test_who_uses_little_leaves_the_rest():
    """A tenth of the total here; the other has nine tenths, but for a margin."""
    machine = Machine(*members(1, 1))
    machine.sources[0].wants, machine.sources[1].wants = 1_000_000, math.inf
    machine.run(1)
    assert machine.run(1) == pytest.approx([1_000_000, 9_000_000], rel=STEP)


def test_who_uses_more_than_its_part_keeps_that():
    """Of what others leave that are active as well; else it would be held back now and then."""
    machine = Machine(*members(1, 1, 2))
    for source, wants in zip(machine.sources, (3_000_000, math.inf, 50_000)):
        source.wants = wants
    machine.run(1)
    assert machine.run(2) == pytest.approx([3_000_000, 6_950_000, 50_000], rel=STEP)


def test_who_begins_has_its_part_at_once():
    """And the others come down to theirs."""
    machine = Machine(*members(1, 1))
    machine.sources[1].wants = math.inf
    assert machine.run(1)[1] == pytest.approx(TOTAL.bytes_per_s, rel=0.05)
    machine.sources[0].wants = math.inf
    assert machine.run(LOOK_S)[0] >= TOTAL.bytes_per_s / 2
    machine.run(0.1)
    assert machine.run(2) == pytest.approx([TOTAL.bytes_per_s / 2] * 2, rel=STEP)


def test_what_was_too_much_is_made_up_for():
    """One that begins and stops again and again does not make the group exceed its total."""
    machine = Machine(*members(1, 1))
    machine.sources[1].wants = math.inf
    machine.run(1)
    moved = []
    for number in range(50):
        machine.sources[0].wants = math.inf if number % 2 else 0.0
        moved.append(sum(machine.run(0.2)))
    assert sum(moved) / len(moved) == pytest.approx(TOTAL.bytes_per_s, rel=0.03)


def test_nobody_gets_more_before_others_have_less():
    """Of those who use all they have; however far apart the weights are."""
    machine = Machine(*members(1, 1000, 1))
    machine.sources[0].wants = math.inf
    machine.run(1)
    machine.sources[1].wants = machine.sources[2].wants = math.inf
    machine.run(LOOK_S)
    for _ in range(20):
        machine.run(LOOK_S)
        held = [seat.rate for seat in machine.pool if seat.is_held]
        guaranteed = sum(seat.guaranteed for seat in machine.pool)
        assert sum(held) <= TOTAL.bytes_per_s * (1 + STEP) + guaranteed
    machine.run(1)
    assert machine.rates() == pytest.approx([150_000, 9_700_000, 150_000], rel=STEP)


def test_a_rate_comes_down_in_steps():
    """What a sender was allowed before has to fit into the debt."""
    machine = Machine(*members(1, 1000))
    machine.sources[0].wants = math.inf
    machine.run(1)
    machine.sources[1].wants = math.inf
    before = machine.sources[0].rate.bytes_per_s
    machine.sources[0].moves.clear()
    machine.run(0.2)
    for rate in machine.sources[0].moves:
        assert rate >= before // 4
        before = rate
    assert before < 200_000


def test_nobody_starves():
    """Whatever the weights, some of the total is for all alike; floors and ceilings go first."""
    machine = Machine(*members(10_000), *members(1), *members(1, ceiling=1000))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    assert machine.run(1) == pytest.approx([9_849_000, 150_000, 1000], rel=STEP)
    machine = Machine(*members(10_000, floor=10_000_000), *members(1))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    assert machine.run(1) == pytest.approx([10_000_000, 1000], rel=STEP)


def test_rates_do_not_flutter():
    """While all want all, and while one uses about the same all the time."""
    machine = Machine(*members(8, 4, 2, 1))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    machine.sources[3].wants = 300_000
    machine.run(1)
    for source in machine.sources:
        source.moves.clear()
    machine.run(2)
    assert sum(len(source.moves) for source in machine.sources) <= 3


def test_while_nothing_moves_nothing_is_moved():
    """Looking is all that is left to do."""
    machine = Machine(*members(1, 1, 1))
    machine.run(1)
    for source in machine.sources:
        source.moves.clear()
    machine.run(1)
    assert [source.moves for source in machine.sources] == [[], [], []]


def test_a_floor_and_a_ceiling_hold():
    """Beside many who want all."""
    machine = Machine(
        *members(1, floor=2_000_000), *members(1, ceiling=100_000), *members(*[1] * 8)
    )
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    assert machine.run(1) == pytest.approx([2_000_000, 100_000, *[987_500] * 8], rel=STEP)


def test_a_group_in_the_group_has_its_part():
    """Shared by those in it who want it."""
    guests = GroupSpec.of("guests", within=Member.of("line", weight=1, ceiling=3_000_000))
    inside = Member.of("guests", weight=3), Member.of("guests", weight=1)
    machine = Machine(*members(1), *inside, inner=[guests])
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    assert machine.run(1) == pytest.approx([7_000_000, 2_250_000, 750_000], rel=STEP)
    machine.sources[1].wants = 0.0
    machine.run(0.2)
    assert machine.run(1) == pytest.approx([7_000_000, 0, 3_000_000], rel=STEP)


@pytest.mark.parametrize("limit", [None, BLOCKED], ids=["paused", "blocked"])
def test_one_that_is_paused_or_blocked_is_left_alone(limit):
    """Its part goes to the others until its limit is back."""
    machine = Machine(*members(1, 1))
    paused, other = machine.sources
    other.wants = paused.wants = math.inf
    machine.run(1)
    paused.wants = 5_000_000
    paused.set_limit(DOWNLOAD, limit)
    machine.run(0.2)
    assert machine.run(1)[1] == pytest.approx(TOTAL.bytes_per_s, rel=STEP)
    assert paused.rate == limit
    paused.set_limit(DOWNLOAD, TOTAL)
    paused.wants = math.inf
    machine.run(0.2)
    assert machine.run(1) == pytest.approx([TOTAL.bytes_per_s / 2] * 2, rel=STEP)


def test_a_limit_that_somebody_sets_is_a_ceiling():
    """As by the command ``set``, also for one that moves nothing then."""
    machine = Machine(*members(1, 1))
    machine.run(1)
    machine.sources[0].set_limit(DOWNLOAD, Rate(1_000_000))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(0.2)
    assert machine.run(1) == pytest.approx([1_000_000, 9_000_000], rel=STEP)


def test_one_that_is_gone_leaves():
    """The others share what it had."""
    machine = Machine(*members(1, 1))
    for source in machine.sources:
        source.wants = math.inf
    machine.run(1)
    machine.sources[0].remove()
    machine.sources[0].wants = 0.0
    machine.run(0.2)
    assert machine.run(1)[1] == pytest.approx(TOTAL.bytes_per_s, rel=STEP)
    assert len(list(machine.pool)) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 5, 100]), min_size=1, max_size=5),
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.0, 50_000.0, 3_000_000.0, math.inf])),
        max_size=12,
    ),
)
def test_whatever_they_want_the_total_is_kept_and_used(weights, changes):
    """In the long run not more than the total passes, and not less if somebody wants it."""
    machine = Machine(*members(*weights))
    for number, wants in changes:
        machine.sources[number % len(weights)].wants = wants
        machine.run(0.1)
    machine.run(1)
    used, wanted = sum(machine.run(2)), sum(source.wants for source in machine.sources)
    assert used <= TOTAL.bytes_per_s * 1.02
    assert used >= min(wanted, TOTAL.bytes_per_s) * 0.94


# The whole group.


@pytest.fixture
def line():
    """A group without a thread."""
    return Group(GroupSpec("line", {DOWNLOAD: TOTAL}))


def test_a_member_is_started_with_the_most_that_it_may_have():
    """So that it is kept by the method that goes with that."""
    guests = GroupSpec.of("guests", download=5_000_000, within=Member("line"))
    group = Group(GroupSpec("line", {DOWNLOAD: TOTAL}), [guests])
    assert group.limits(Member("line")) == {DOWNLOAD: TOTAL}
    assert group.limits(Member("guests")) == {DOWNLOAD: Rate(5_000_000)}
    assert group.limits(Member.of("guests", ceiling="1M")) == {DOWNLOAD: Rate(1 << 20)}


def test_members_come_and_go(line):
    """With their own limit again when they go; the group has nothing to do without any."""
    first, second = Source(), Source()
    assert line.due_s == math.inf
    line.add(first, Member("line"))
    line.add(second, Member("line", 3))
    assert (first in line, second in line) == (True, True)
    line.run()
    assert [now.guaranteed for now in line.state()] == [2_500_000, 7_500_000]
    line.discard(first)
    assert first not in line
    assert first.rate == first.limit == TOTAL
    line.discard(second)
    assert line.due_s == math.inf


def test_a_member_that_was_removed_is_none_any_more(line):
    """Nobody has to tell; its floor is there for others then."""
    first, second = Source(), Source()
    line.add(first, Member.of("line", floor=8_000_000))
    first.remove()
    line.run()
    assert first not in line
    assert line.due_s == math.inf
    line.add(second, Member.of("line", floor=8_000_000))
    assert [now.throttle for now in line.state()] == [second.id]


def test_a_member_that_cannot_be_is_refused_and_changes_nothing(line):
    """A floor above what is left; a group that is not there; a limit that cannot be moved."""
    first = Source()
    line.add(first, Member.of("line", floor=8_000_000))
    with pytest.raises(ShareError, match="rule backup 24mbit"):
        line.add(Source(), Member.of("line", floor=3_000_000), "rule backup")
    with pytest.raises(ShareError, match="the group guests, which does not exist"):
        line.add(Source(), Member("guests"))
    fixed = Source()
    fixed.dial = lambda direction: (_ for _ in ()).throw(ThrottleError("by nftables"))
    with pytest.raises(ThrottleError, match="by nftables"):
        line.add(fixed, Member("line"))
    assert [now.throttle for now in line.state()] == [first.id]


def test_the_state_goes_to_json(line):
    """With the direction by its name."""
    source = Source()
    line.add(source, Member("line"))
    assert [now.to_json() for now in line.state()] == [
        {
            "throttle": source.id,
            "group": "line",
            "direction": "download",
            "rate": TOTAL.bytes_per_s,
            "guaranteed": TOTAL.bytes_per_s,
            "used": 0,
            "held_back": False,
        }
    ]


def test_the_total_may_change(line):
    """As a fleet's part does."""
    source = Source()
    line.add(source, Member("line"))
    line.set_total(DOWNLOAD, Rate(4_000_000))
    assert [now.guaranteed for now in line.state()] == [4_000_000]
    assert line.demand(DOWNLOAD) == 0


def test_its_end_is_that_of_its_members():
    """With the thread that looked after it."""
    source = Source()
    with Group(GroupSpec("line", {DOWNLOAD: TOTAL})) as line:
        line.add(source, Member("line"))
        assert not source.is_removed
    assert source.is_removed
    assert line.state() == []


def test_groups_are_found_by_their_names_and_by_those_in_them():
    """As rules name them."""
    line, other = GroupSpec.of("line", total="1M"), GroupSpec.of("other", total="1M")
    guests = GroupSpec.of("guests", within=Member("line"))
    found = groups_of([line, guests, other])
    assert found["guests"] is found["line"] is not found["other"]
