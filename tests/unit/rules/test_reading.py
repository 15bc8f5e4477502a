"""Rules files: what they may say, and what is told of mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pybpfthrottle.errors import RulesError
from pybpfthrottle.model import BLOCKED, Direction, Limits, Rate
from pybpfthrottle.rules import reading
from pybpfthrottle.rules.model import Criteria, Rule
from pybpfthrottle.shares import Member

MB = Rate.parse("1M")
RULE = '[[rule]]\nname = "a"\nmatch = { name = "rsync" }\nupload = "1M"\n'


def read(tmp_path: Path, text: str) -> tuple[Rule, ...]:
    """Return the rules of a file."""
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return reading.read([str(path)]).rules


def mistakes(tmp_path: Path, text: str) -> list[str]:
    """Return what is told of a file."""
    with pytest.raises(RulesError) as caught:
        read(tmp_path, text)
    return [line.replace(f"{tmp_path}/rules.toml, ", "") for line in caught.value.mistakes]


def test_a_rule_has_what_is_written(tmp_path: Path) -> None:
    """Each key of a rule arrives, and the rest has its default."""
    (rule,) = read(
        tmp_path,
        """
[[rule]]
name = "backups"
match = { name = ["rsync", "borg"], user = "root" }
download = "8mbit"
upload = 500_000
each = true
children = false
traffic = "internet"
to = "192.0.2.0/24"
except = ["192.0.2.1"]
insist = true
""",
    )
    assert rule == Rule(
        "backups",
        Criteria(name=("rsync", "borg"), user=("root",)),
        {Direction.DOWNLOAD: Rate(1_000_000), Direction.UPLOAD: Rate(500_000)},
        each=True,
        children=False,
        kind="internet",
        to=("192.0.2.0/24",),
        but=("192.0.2.1/32",),
        insist=True,
    )
    assert rule.where == f"{tmp_path}/rules.toml, line 2"


def test_a_rule_may_have_a_bad_network(tmp_path: Path) -> None:
    """What is not limited is let through; read again, it is the same, with the same seed."""
    text = '[[rule]]\nname = "a"\nmatch = { name = "rsync" }\nprofile = "lossy"\nupload = "1M"\n'
    (rule,) = read(tmp_path, text + 'connections = "drop"\n')
    assert rule.limits == {Direction.UPLOAD: MB, Direction.DOWNLOAD: None}
    assert rule.network is not None
    assert str(rule.network).startswith("lossy: upload 1M, loss 5% each way, new connections time")
    assert read(tmp_path, text + 'connections = "drop"\n') == (rule,)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("delay = '80'", "line 1: delay: '80' is not a time"),
        ("delay = 80", "line 5: delay is 80: it must be a text, as on the command line"),
        ("profile = '5g'", "line 1: there is no profile '5g'"),
        ("loss = '1%'\nto = '10.0.0.0/8'", "line 1: a bad network is for all traffic"),
        ("dowload = '1M'", "line 5: unknown key dowload (did you mean download? known: name"),
        ("download = 'fast'", "line 5: download is 'fast': 'fast' is not a limit: give bytes"),
        ("download = true", "line 5: download is True: it must be a rate such as"),
        ("download = 12", "line 5: download is 12: 12 is out of range: a limit is between"),
        ("each = 'yes'", "line 5: each is 'yes': it must be true or false"),
        ("traffic = 'lan'", 'line 5: traffic is \'lan\': it must be one of "all", "internet"'),
        ("to = '10.0.0.0/40'", "line 5: to is '10.0.0.0/40': '10.0.0.0/40' is not a network"),
        ("to = []", "line 5: to is []: it must be a text, or a list of texts"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    """What is wrong, where, and what is allowed."""
    (mistake,) = mistakes(tmp_path, RULE + line)
    assert mistake.startswith(told)


@pytest.mark.parametrize(
    ("match", "told"),
    [
        ("{}", "it must be a table with some of container, label, unit"),
        ('"rsync"', "it must be a table with some of container, label, unit"),
        ('{ nam = "x" }', "unknown key nam (did you mean name? known: container"),
        ("{ name = 7 }", "name is 7: it must be a text, or a list of texts"),
        ('{ command_regex = "(" }', "command_regex '(' is no regular expression"),
        ('{ label = "tier" }', "label 'tier' has no value: write \"NAME=VALUE\""),
        ('{ exe = "rsync" }', "exe 'rsync' is no absolute path: for the name alone use name"),
    ],
)
def test_criteria_are_checked(tmp_path: Path, match: str, told: str) -> None:
    """A mistake in what is to match is told like any other."""
    (mistake,) = mistakes(tmp_path, RULE.replace('{ name = "rsync" }', match))
    assert mistake.startswith("line 3: match is ")
    assert told in mistake


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        ("block = true", dict.fromkeys(Direction, BLOCKED)),
        ('block = "upload"', {Direction.UPLOAD: BLOCKED}),
        ('upload = "block"', {Direction.UPLOAD: BLOCKED}),
        ('block = "download"\nupload = "1M"', {Direction.DOWNLOAD: BLOCKED, Direction.UPLOAD: MB}),
        ('block = false\nupload = "1M"', {Direction.UPLOAD: MB}),
        ('schedule = "07:00,block 20:00,off"', {}),
    ],
)
def test_a_rule_may_block(tmp_path: Path, written: str, limits: Limits) -> None:
    """One direction or both, all the time or at some times."""
    (rule,) = read(tmp_path, RULE.replace('upload = "1M"', written))
    assert rule.limits == limits
    assert rule.schedule is None or rule.schedule.spans[0].limits == dict.fromkeys(
        Direction, BLOCKED
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[rule]]\nmatch = { name = "x" }\nupload = "1M"', "line 1: this rule has no name: add"),
        ('\n[[rule]]\nname = "x"\nupload = "1M"', "line 2: this rule matches nothing: add match"),
        ('[[rule]]\nname = "x"\nmatch = { name = "y" }', "line 1: this rule limits nothing: add"),
        (f"{RULE}block = true", "line 1: upload is both limited and blocked: remove one of the"),
        (f"{RULE}block = 1", 'line 5: block is 1: it must be true, "download" or "upload"'),
        (
            RULE.replace("1M", "block") + 'group = "line"\n[group.line]\ntotal = "1M"',
            "line 1: what is blocked has no part of a group: remove group, or the block",
        ),
        (f"{RULE}\n{RULE}", "line 6: a rule 'a' is in line 1 already: give it another name"),
        ('[rule]\nname = "x"', "line 1: write [[rule]] above each rule"),
        ("rules = 1", "line 1: unknown key rules (did you mean rule? known: rule"),
        ("[[rule]", "is not valid TOML: "),
    ],
)
def test_whole_rules_are_checked(tmp_path: Path, text: str, told: str) -> None:
    """What a rule lacks is told at its first line."""
    assert any(told in mistake for mistake in mistakes(tmp_path, text))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """Of several rules, in several files."""
    (tmp_path / "1.toml").write_text(RULE.replace("1M", "x"))
    (tmp_path / "2.toml").write_text(RULE.replace("1M", "y").replace('"a"', '"b"'))
    with pytest.raises(RulesError, match="and 1 more") as caught:
        reading.read([str(tmp_path)])
    assert [one.split(":")[0] for one in caught.value.mistakes] == [
        f"{tmp_path}/1.toml, line 4",
        f"{tmp_path}/2.toml, line 4",
    ]


def test_a_rule_may_be_switched_off(tmp_path: Path) -> None:
    """It is checked all the same."""
    assert read(tmp_path, RULE + "enabled = false") == ()
    assert mistakes(tmp_path, RULE + "enabled = false\neach = 1")


def test_files_of_a_directory_are_read_in_order(tmp_path: Path) -> None:
    """By their names; others than *.toml are left alone."""
    for name in ("20-b.toml", "10-a.toml"):
        (tmp_path / name).write_text(RULE.replace('"a"', f'"{name}"'))
    (tmp_path / "10-a.toml~").write_text("nonsense")
    found = reading.read([str(tmp_path)])
    assert [one.name for one in found.rules] == ["10-a.toml", "20-b.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_root_does_not_use_what_others_write(tmp_path: Path) -> None:
    """A rules file of another user, or that others may write, is refused."""
    path = tmp_path / "rules.toml"
    path.write_text(RULE)
    path.chmod(0o666)
    with pytest.raises(RulesError, match="writable by other users"):
        reading.read([str(path)])
    path.chmod(0o600)
    os.chown(path, 1000, 1000)
    with pytest.raises(RulesError, match="belongs to another user"):
        reading.read([str(path)])


def test_no_directory_is_no_mistake_but_a_missing_file_is(tmp_path: Path) -> None:
    """There may be no rules; but a file that is named has to be there."""
    assert reading.read([str(tmp_path)]).rules == ()
    assert reading.read(reading.directories({"HOME": str(tmp_path / "none")})[1:]).rules == ()
    with pytest.raises(RulesError, match="there is no file"):
        reading.read([str(tmp_path / "rules.toml")])


def test_where_rules_are_looked_for_is_said_by_patterns(tmp_path: Path) -> None:
    """A directory stands for the files in it that are read, whether it is there or not."""
    assert reading.places([str(tmp_path), "/a.toml"]) == f"{tmp_path}/*.toml or /a.toml"
    usual = reading.directories({"HOME": str(tmp_path / "none")})
    assert reading.places(usual) == (
        f"/etc/pybpfthrottle/rules.d/*.toml or {tmp_path}/none/.config/pybpfthrottle/rules.d/*.toml"
    )


def test_five_hundred_rules_are_read_in_a_moment(tmp_path: Path) -> None:
    """As many as a site may have."""
    text = "\n".join(RULE.replace('"a"', f'"{number}"') for number in range(500))
    assert len(read(tmp_path, text)) == 500


LINE = '[group.line]\ntotal = "20M"\n'


def test_a_rule_shares_a_total(tmp_path: Path) -> None:
    """Its limits are the most that it gets: the total, its ceiling, and its own rates."""
    rule, other = read(
        tmp_path,
        f"""
{LINE}
[group.guests]
group = "line"
ceiling = "5M"
{RULE}group = "line"
weight = 5
floor = {{ download = "2M" }}
{RULE.replace('"a"', '"b"').replace('upload = "1M"', "")}group = "guests"
""",
    )
    assert rule.member == Member.of("line", weight=5, floor={"download": "2M"}, ceiling=rule_most())
    assert rule.limits == {Direction.DOWNLOAD: rate("20M"), Direction.UPLOAD: rate("1M")}
    assert other.limits == dict.fromkeys(Direction, rate("5M"))


def rate(text: str) -> Rate:
    """A rate as it is written."""
    return Rate.parse(text)


def rule_most() -> dict[str, str]:
    """The ceiling that the rule's own limit is."""
    return {"upload": "1M"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (RULE + 'group = "lin"', "is in the group lin, which does not exist"),
        (RULE + "weight = 5", "line 1: weight needs a group"),
        (LINE + RULE + 'group = "line"\nweight = 0', "line 8: weight is 0: the weight 0 is out"),
        (LINE + RULE + 'group = "line"\nfloor = "30M"', "floor"),
        (LINE + RULE + 'group = "line"\nfloor = "2M"\nceiling = "1M"', "is above the ceiling"),
        ("[group.line]\nweight = 5", "line 1: weight needs a group"),
        ("[group.line]", "line 1: the group line has nothing to share"),
        (LINE + "shares = 1", "line 3: unknown key shares (did you mean shared? known: total"),
        (LINE + 'shared = "http://x"', "line 3: shared is 'http://x'"),
        (LINE + 'shared = "redis//:p/w@x"', "line 3: shared is 'redis//...@x'"),
        (LINE + "machines = 0", "line 3: machines is 0: it must be a number from 1 up"),
        ("[[group]]", "line 1: write [group.NAME] above each group"),
    ],
)
def test_groups_are_checked(tmp_path: Path, text: str, told: str) -> None:
    """A mistake in a group, or in what a rule asks of it, is told like any other."""
    found = mistakes(tmp_path, text)
    assert any(told in mistake for mistake in found), found
