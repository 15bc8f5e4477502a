"""The plan: which ways there are to limit a target, in which order, and what is said of each."""

from __future__ import annotations

import dataclasses
from typing import Optional

import pytest

from pybpfthrottle.backends.protocol import Match, Offer, Priority
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.model import Direction
from pybpfthrottle.plan import Place, Situation, Wish, plans

BOTH = list(Direction)
NO_MARKS = "Single sockets cannot be limited here: {why}."
ALONE = "The processes are alone in their cgroup, so all of it is limited."
MOVED = "The processes are moved into a cgroup of their own until the limit ends."
ONLY_NEW = "Connections that are already open are not limited: {why}"


def offers(
    name: str = "ebpf",
    priority: Priority = Priority.BEST,
    *,
    matches: tuple[Match, ...] = tuple(Match),
    refused: Optional[str] = None,
    directions: tuple[Direction, ...] = tuple(Direction),
) -> list[Offer]:
    """What one backend offers."""
    return [
        Offer(name, priority, direction, match, refused)
        for direction in directions
        for match in matches
    ]


@pytest.mark.parametrize(
    ("situation", "matching", "expected"),
    [
        (Situation(processes=False), "auto", [(Place.CGROUPS, ())]),
        (Situation(processes=True), "whole-cgroup", [(Place.CGROUPS, ())]),
        (
            Situation(processes=True),
            "auto",
            [(Place.SOCKETS, ()), (Place.CGROUPS, (NO_MARKS, ALONE))],
        ),
        (
            Situation(processes=True, shared=True),
            "auto",
            [
                (Place.SOCKETS, ()),
                (Place.MOVED, (NO_MARKS, MOVED)),
                (Place.MOVED_ONLY, (NO_MARKS, MOVED, ONLY_NEW)),
            ],
        ),
        # A process that is started later may be in any cgroup: nothing else is the same.
        (Situation(processes=True, matches=True, shared=True), "auto", [(Place.SOCKETS, ())]),
        (Situation(processes=True, shared=True, kept=True), "auto", [(Place.SOCKETS, ())]),
        (
            Situation(processes=True, shared=True),
            "move-cgroup",
            [(Place.MOVED, ()), (Place.MOVED_ONLY, (ONLY_NEW,))],
        ),
    ],
)
def test_each_situation_has_its_ways_in_order(situation, matching, expected):
    """What is limited is as exact as it can be, and each way that is less so says what it loses."""
    found = plans(situation, Wish(matching=matching), BOTH, offers())
    assert [(plan.place, plan.notes) for plan in found] == expected
    assert all(plan.backends == dict.fromkeys(BOTH, "ebpf") for plan in found)


def test_a_backend_that_cannot_match_sockets_serves_the_ways_that_remain():
    """The way of matching and the backend are two choices: one that only knows cgroups is used."""
    situation = Situation(processes=True, shared=True)
    found = plans(situation, Wish(), BOTH, offers("nft", Priority.BETTER, matches=(Match.CGROUP,)))
    assert [plan.place for plan in found] == [Place.MOVED_ONLY]


def test_the_next_backend_is_tried_after_the_best():
    """For the same way: first the best of each direction, then the next."""
    both = offers() + offers("nft", Priority.BETTER, matches=(Match.CGROUP,))
    found = plans(Situation(processes=False), Wish(), BOTH, both)
    assert [plan.backends[Direction.UPLOAD] for plan in found] == ["ebpf", "nft"]


def test_a_direction_may_have_a_backend_of_its_own():
    """What only one direction has elsewhere does not keep the other from the best."""
    shaper = offers("htb", Priority.GOOD, directions=(Direction.UPLOAD,))
    best = offers(directions=(Direction.DOWNLOAD,))
    [plan] = plans(Situation(processes=False), Wish(), BOTH, best + shaper)
    assert plan.backends == {Direction.DOWNLOAD: "ebpf", Direction.UPLOAD: "htb"}


def test_a_named_backend_is_used_or_refused_with_the_reason():
    """An explicit name is honoured even if another one is better; if it cannot, that is said."""
    both = offers() + offers("nft", Priority.BETTER)
    wish = Wish(backends=dict.fromkeys(BOTH, "nft"))
    [plan] = plans(Situation(processes=False), wish, BOTH, both)
    assert set(plan.backends.values()) == {"nft"}
    broken = offers() + offers("nft", Priority.BETTER, refused="nft is not installed")
    with pytest.raises(ThrottleError, match=r"cannot limit download: nft: nft is not installed$"):
        plans(Situation(processes=False), wish, BOTH, broken)


def test_where_nothing_can_limit_each_reason_is_told():
    """Each backend's own, once."""
    broken = offers(refused="no bpf(2)") + offers("nft", Priority.BETTER, refused="no nft")
    with pytest.raises(ThrottleError, match=r"cannot limit upload: ebpf: no bpf\(2\); nft: no nft"):
        plans(Situation(processes=False), Wish(), [Direction.UPLOAD], broken)


def only_cgroups(**how) -> list[Offer]:
    """What a backend offers that cannot tell sockets apart, and has its price."""
    cgroups = offers("nft", Priority.BETTER, matches=(Match.CGROUP,), **how)
    marks = offers("nft", Priority.BETTER, matches=(Match.MARKS,), refused="no sockets")
    return [dataclasses.replace(one, loses=("drops", "counts headers")) for one in cgroups + marks]


def test_a_plan_says_what_its_backend_loses():
    """Once, whatever the directions; and nothing of a better backend that is not wanted."""
    wish = Wish(backends=dict.fromkeys(BOTH, "nft"))
    [plan] = plans(Situation(processes=False), wish, BOTH, offers() + only_cgroups())
    assert plan.notes == ("nft: drops; counts headers",)


def test_a_plan_says_why_no_better_backend_is_used():
    """Who lets the tool choose is told that the choice is second-best."""
    broken = offers(refused="no bpf(2)") + only_cgroups()
    [plan] = plans(Situation(processes=False), Wish(), [Direction.UPLOAD], broken)
    assert plan.notes == (
        "nft limits uploads, as ebpf cannot: no bpf(2)",
        "nft: drops; counts headers",
    )


def test_processes_are_moved_for_a_backend_that_only_knows_cgroups():
    """The plan has the reason for its notes: no other plan has failed before."""
    situation = Situation(processes=True, shared=True)
    wish = Wish(backends={Direction.UPLOAD: "nft"})
    [plan] = plans(situation, wish, [Direction.UPLOAD], only_cgroups())
    assert plan.place is Place.MOVED_ONLY
    assert plan.notes[:3] == (NO_MARKS, MOVED, ONLY_NEW)
    assert plan.why == "no sockets"
