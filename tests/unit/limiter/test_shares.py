"""Groups: what each member gets of a total, and what is refused because it cannot be."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybpfthrottle.errors import LimitError, ShareError
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.shares import Branch, GroupSpec, Member, Share, Want, check, divide, fill

DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD
M = 1 << 20
# Rounding; the numbers are up to 1e9.
CLOSE = 1e-6

few = settings(max_examples=60, deadline=None)
amounts = st.floats(0, 1e9)
weights = st.floats(1, 10_000)
totals = st.floats(1, 1e9)


@st.composite
def wants(draw):
    """What a member is to have at least, and can use at most, perhaps anything."""
    most = draw(st.one_of(amounts, st.just(math.inf)))
    least = draw(st.floats(0, min(most, 1e8)))
    return Want(draw(weights), least, most)


@st.composite
def shares(draw):
    """A share, and a demand."""
    ceiling = draw(st.one_of(st.floats(1, 1e9), st.just(math.inf)))
    share = Share(draw(weights), draw(st.floats(0, min(ceiling, 1e8))), ceiling)
    return share, draw(st.one_of(amounts, st.just(math.inf)))


members = st.lists(wants(), min_size=1, max_size=12)


def about(number: float) -> float:
    """How much rounding may make out."""
    return CLOSE * max(1.0, number)


@few
@given(totals, members)
def test_all_together_get_the_total_and_never_more(total, wanted):
    """Somebody who can use it gets what others leave: work-conserving."""
    got = fill(total, wanted)
    usable = min(total, sum(want.most for want in wanted))
    assert sum(got) <= total + about(total)
    assert sum(got) >= usable - about(usable)


@few
@given(totals, members)
def test_nobody_gets_more_than_it_can_use_or_less_than_its_floor(total, wanted):
    """If there is enough for all floors; else each has the same part of its own."""
    least = sum(want.least for want in wanted)
    part = min(1.0, total / least) if least else 1.0
    for want, got in zip(wanted, fill(total, wanted)):
        assert got <= want.most + about(want.most if want.most < math.inf else 1)
        assert got >= want.least * part - about(want.least)


@few
@given(totals, members)
def test_who_is_held_back_has_no_less_by_weight_than_others_beyond_their_floor(total, wanted):
    """Weighted max-min: one can get more only at the cost of who has less."""
    got = list(zip(wanted, fill(total, wanted)))
    level = max((rate / want.weight for want, rate in got if rate > want.least + 1), default=0.0)
    for want, rate in got:
        if rate < want.most - 1:
            assert rate / want.weight >= level - about(level)


def test_the_parts_of_those_who_want_all_are_as_their_weights():
    """8:4:2:1, without floors and ceilings."""
    got = fill(15 * M, [Want(weight, 0, math.inf) for weight in (8, 4, 2, 1)])
    assert got == pytest.approx([8 * M, 4 * M, 2 * M, 1 * M])


def test_what_one_does_not_use_goes_to_the_others_by_their_weights():
    """And no further than their ceilings."""
    got = fill(15 * M, [Want(8, 0, M), Want(4, 0, math.inf), Want(2, 0, 3 * M), Want(1, 0, 9 * M)])
    assert got == pytest.approx([M, 8.8 * M, 3 * M, 2.2 * M])


def test_a_floor_holds_beside_many_who_are_greedy():
    """They share the rest."""
    got = fill(10 * M, [Want(1, 2 * M, math.inf), *[Want(1, 0, math.inf)] * 16])
    assert got == pytest.approx([2 * M, *[M / 2] * 16])


def test_weights_far_apart_are_priorities():
    """Who has little weight gets next to nothing, and all as soon as the other is content."""
    high, low = Want(10_000, 0, math.inf), Want(1, 0, math.inf)
    assert fill(10 * M, [high, low])[1] < 1100
    assert fill(10 * M, [high._replace(most=0), low]) == [0, 10 * M]


@few
@given(totals, st.lists(shares(), min_size=1, max_size=6), shares(), shares())
def test_a_group_in_a_group_keeps_to_its_own_part(total, inside, outside, group):
    """It gets what a member with its share would, and its members get all of that."""
    branch = Branch(group[0], [share.want(demand) for share, demand in inside])
    alone = outside[0].want(outside[1])
    (got,), (inner,) = divide(total, [alone], [branch])
    whole = branch.want()
    assert [got, sum(inner)] == pytest.approx(fill(total, [alone, whole]), rel=CLOSE, abs=CLOSE)
    assert sum(inner) <= group[0].ceiling + about(total)


def test_the_floors_of_its_members_are_the_group_s_too():
    """Or a member's floor would not hold beside those outside."""
    branch = Branch(Share(1), [Want(1, 3 * M, math.inf), Want(1, 0, math.inf)])
    (outside,), (inner,) = divide(4 * M, [Want(100, 0, math.inf)], [branch])
    assert inner == pytest.approx([3 * M, 0])
    assert outside == pytest.approx(M)


# As people write them.


def test_a_group_is_read_and_goes_to_json():
    """The total is for each direction; one of them may be given apart."""
    spec = GroupSpec.of("line", total="20M", upload="2M")
    assert spec.totals == {DOWNLOAD: Rate(20 * M), UPLOAD: Rate(2 * M)}
    inner = GroupSpec.of("guests", within=Member.of("line", weight=2, ceiling="5M"))
    record = json.loads(json.dumps([spec.to_json(), inner.to_json()]))
    assert record[0] == {
        "name": "line",
        "total": {"download": 20 * M, "upload": 2 * M},
        "within": None,
    }
    assert record[1]["within"] == {
        "group": "line",
        "weight": 2,
        "floor": {},
        "ceiling": {"download": 5 * M, "upload": 5 * M},
    }


def test_a_member_may_have_another_floor_for_each_direction():
    """Lines are seldom the same both ways."""
    member = Member.of("line", weight=5, floor={"download": "2M"}, ceiling=10 * M)
    assert member.share(DOWNLOAD) == Share(5, 2 * M, 10 * M)
    assert member.share(UPLOAD) == Share(5, 0, 10 * M)


@pytest.mark.parametrize("weight", [0, 0.5, 10_001, -1, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight):
    """With the range."""
    with pytest.raises(ShareError, match="out of range: a weight is between 1 and 10000"):
        Member.of("line", weight=weight)


@pytest.mark.parametrize("weight", ["5", None, True, [1]])
def test_a_weight_has_to_be_a_number(weight):
    """A rules file may have anything there."""
    with pytest.raises(ShareError, match="is not a number: a weight is between"):
        Member.of("line", weight=weight)


def test_a_floor_above_the_ceiling_is_refused():
    """Both are named."""
    with pytest.raises(ShareError, match="the floor, 3M of download, is above the ceiling, 2M"):
        Member.of("line", floor={"download": "3M"}, ceiling="2M")


def test_what_is_no_rate_or_no_direction_is_refused():
    """In the words of every other limit."""
    with pytest.raises(LimitError, match="'much' is not a limit"):
        Member.of("line", floor="much")
    with pytest.raises(ShareError, match="a floor has no 'down': give upload or download"):
        Member.of("line", floor={"down": "1M"})
    with pytest.raises(ShareError, match="nothing can be shared of what is blocked: give a rate"):
        GroupSpec.of("line", total="block")


def test_a_group_needs_something_to_share():
    """Only one within another may do without."""
    with pytest.raises(ShareError, match="the group line has nothing to share: give it a total"):
        GroupSpec.of("line")


LINE = GroupSpec.of("line", total="10M")


@pytest.mark.parametrize(
    ("groups", "members", "error"),
    [
        pytest.param(
            [LINE], [Member("lin")], "the group lin, which does not exist; there are line"
        ),
        pytest.param([], [Member("line")], "there are no groups"),
        pytest.param([LINE, LINE], [], "there are two groups line"),
        pytest.param(
            [LINE],
            [Member.of("line", floor="6M"), Member.of("line", floor={"upload": "5M"})],
            "the floors of the group line are more than the 10M of upload that it has:"
            " rule 0 6M, rule 1 5M. Lower them",
        ),
        pytest.param(
            [LINE, GroupSpec.of("guests", within=Member.of("line", floor="2M"))],
            [Member.of("guests", floor="6M"), Member.of("line", floor="5M")],
            "more than the 10M of download that it has: the group guests 6M, rule 1 5M",
        ),
        pytest.param(
            [LINE, GroupSpec.of("guests", total="2M", within=Member.of("line"))],
            [Member.of("guests", floor="3M")],
            "the floors of the group guests are more than the 2M of download",
        ),
        pytest.param(
            [LINE, GroupSpec.of("guests", total="2M", within=Member.of("line", floor="3M"))],
            [],
            "the floor of the group guests, 3M of download, is above its total, 2M",
        ),
        pytest.param(
            [
                LINE,
                GroupSpec.of("guests", within=Member("line")),
                GroupSpec.of("children", within=Member("guests")),
            ],
            [],
            "the group children is in guests, which is in line: .* put children into line",
        ),
        pytest.param(
            [GroupSpec.of("line", total="1M", within=Member("line"))],
            [],
            "the group line is in itself",
        ),
        pytest.param(
            [
                GroupSpec.of("line", download="1M"),
                GroupSpec.of("guests", upload="1M", within=Member("line")),
            ],
            [],
            "the group guests has a total of upload, and the group line, .* has none",
        ),
    ],
)
def test_what_cannot_be_is_refused(groups, members, error):
    """With one clear error each."""
    with pytest.raises(ShareError, match=error):
        check(groups, [(f"rule {number}", member) for number, member in enumerate(members)])


def test_floors_may_be_as_much_as_the_total():
    """Of a group in it too."""
    groups = [LINE, GroupSpec.of("guests", total="6M", within=Member.of("line", floor="6M"))]
    members = [Member.of("line", floor="4M"), Member.of("guests", floor="6M")]
    check(groups, [("one", members[0]), ("other", members[1])])


def test_names_of_groups_are_shown_as_text():
    """An escape sequence in one does nothing."""
    with pytest.raises(ShareError) as found:
        check([], [("rule", Member("\x1b[2J"))])
    assert "\x1b" not in str(found.value)
