"""Specs as JSON: what comes back is what went in."""

from __future__ import annotations

import json

import pytest

from pybpfthrottle.model import BLOCKED, Direction, Rate, Target, ThrottleSpec, Traffic

SPECS = [
    ThrottleSpec(Target(pids=(12, 14)), {Direction.DOWNLOAD: Rate.parse("1M")}),
    ThrottleSpec(
        Target(names=("curl",), users=("www-data",), children=False),
        {Direction.UPLOAD: None, Direction.DOWNLOAD: Rate.parse("8mbit")},
        Traffic(loopback=True),
        "backup",
    ),
    ThrottleSpec(Target(cgroups=("/sys/fs/cgroup/a b",), units=("nginx",)), {}),
    ThrottleSpec(Target(command=("sh", "-c", "exit")), {Direction.UPLOAD: Rate(2048)}),
    ThrottleSpec(Target(pids=(12,)), {Direction.UPLOAD: BLOCKED, Direction.DOWNLOAD: None}),
    ThrottleSpec(
        Target(pids=(12,)),
        {Direction.UPLOAD: None},
        kept=True,
        expires_ns=123_456_789_000,
        paused={Direction.UPLOAD: Rate(2048)},
    ),
    ThrottleSpec(
        Target(pids=(12,)),
        {Direction.UPLOAD: Rate(2048)},
        Traffic(False, "internet", ("192.0.2.0/24",), ("192.0.2.7/32",), ("198.51.100.0/24",)),
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_json(spec):
    """Through text and back."""
    assert ThrottleSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_fields_of_later_versions_are_left_out():
    """A record of a newer version is understood as far as it can be."""
    record = {**SPECS[0].to_json(), "quota": 5}
    record["target"]["moon"] = "full"
    assert ThrottleSpec.from_json(record) == SPECS[0]


@pytest.mark.parametrize(
    ("target", "processes", "matches"),
    [
        (Target(pids=(1,)), True, False),
        (Target(users=("x",)), True, True),
        (Target(cgroups=("/x",)), False, False),
    ],
)
def test_a_target_tells_what_it_is(target, processes, matches):
    """Whether processes are limited wherever they are, and whether later ones may come."""
    assert (target.processes, target.matches) == (processes, matches)


def test_another_limit_ends_a_pause() -> None:
    """Of its direction only."""
    up, down = Direction.UPLOAD, Direction.DOWNLOAD
    spec = ThrottleSpec(Target(), {up: Rate(1000), down: Rate(2000)})
    paused = spec.with_limit(up, None, Rate(1000)).with_limit(down, None, Rate(2000))
    assert paused.limits == {up: None, down: None}
    assert paused.paused == spec.limits
    resumed = paused.with_limit(up, Rate(3000))
    assert (resumed.limits, resumed.paused) == ({up: Rate(3000), down: None}, {down: Rate(2000)})
