"""What can be wrong with a network, and how it is written."""

from __future__ import annotations

import math
import random

import pytest

from pybpfthrottle.conditions import profiles, texts
from pybpfthrottle.conditions.hooks import Counted, rule_of
from pybpfthrottle.conditions.model import OFFLINE, Conditions, Impairment, Injected, Loss, Outage
from pybpfthrottle.conditions.network import Asked, Done, inexact, refuse_what_is_missing
from pybpfthrottle.errors import LimitError, SettingsError, ThrottleError
from pybpfthrottle.model import Direction, Rate


@pytest.mark.parametrize(("share", "length"), [(0.01, 8), (0.3, 2), (0.001, 1)])
def test_a_chain_of_bursts_loses_the_share_that_was_asked_for(share, length):
    """Played for long, the two states lose that share, in bursts of that length."""
    loss = Loss.burst(share, length)
    draw, lost, bursts, packets = random.Random(1), 0, 0, 400_000
    burst = False
    for _ in range(packets):
        before, burst = burst, draw.random() < (1 - loss.leave if burst else loss.enter)
        lost += burst
        bursts += burst and not before
    assert loss.share == pytest.approx(share)
    assert loss.length == pytest.approx(length)
    assert lost / packets == pytest.approx(share, rel=0.2)
    assert lost / bursts == pytest.approx(length, rel=0.2)


def test_bursts_that_cannot_be_are_refused_with_what_can():
    """With bursts of one packet no more than half of all can be lost."""
    with pytest.raises(LimitError, match=r"at most 50\.0%"):
        Loss.burst(0.6, 1)


def test_a_loss_of_all_is_one_that_never_ends():
    """All packets are lost, with or without bursts."""
    assert (Loss.burst(1.0, 3).share, Loss.chance(1.0).share) == (1, 1)
    assert math.isinf(Loss.burst(1.0, 3).length)


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("1%", Loss.chance(0.01)),
        ("0.1 %", Loss.chance(0.001)),
        ("burst:1%,8", Loss.burst(0.01, 8)),
        ("every:100", Loss.every(100)),
    ],
)
def test_a_loss_is_read(text, loss):
    """By chance, in bursts, or each n-th."""
    assert texts.loss(text) == loss


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("delay", "80", "not a time: give a number and us, ms, s or m"),
        ("delay", "70s", "between 0 and 60 s"),
        ("jitter", "20ms", "needs a delay"),
        ("loss", "1", "give per cent"),
        ("loss", "101%", "more than all"),
        ("loss", "burst:1%", "is not a loss"),
        ("loss", "every:0", "from n = 1 on"),
        ("outage", "5s", "is not an outage"),
        ("outage", "60s/5s", "shorter than its period"),
        ("outage", "1s/999999999999s", "a year at most"),
        ("loss", "every:99999999999", "up to 2"),
        ("reorder", "1%", "where others have a delay"),
        ("seed", "-1", "is not a seed"),
        ("block", "no", "refuse or drop"),
        ("dns", "no", "lost or slow or servfail"),
        ("lag", "1s", "there is no 'lag' to ask for"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(name, text, said):
    """The error says what was wrong, and what to give."""
    with pytest.raises(LimitError, match=said):
        texts.conditions_from({name: text})


def test_loss_is_for_both_directions_unless_one_has_its_own():
    """0% is none at all."""
    found = texts.conditions_from({"loss": "1%", "upload_loss": "0%", "seed": "7"})
    assert found.download == Impairment(loss=Loss.chance(0.01), seed=7)
    assert found.upload == Impairment(seed=8)


def test_the_two_directions_do_not_lose_the_same_packets():
    """Each has a seed of its own, whatever the first."""
    found = texts.conditions_from({"loss": "1%", "seed": str((1 << 64) - 1)})
    assert (found.download.seed, found.upload.seed) == ((1 << 64) - 1, 0)


def test_conditions_are_described_in_a_line():
    """With all numbers, for people."""
    given = {"delay": "80ms", "jitter": "20ms", "loss": "burst:1%,8", "outage": "5s/60s"}
    assert texts.described(texts.conditions_from({**given, "block": "drop", "dns": "slow"})) == (
        "delay 80 ms, jitter 20 ms, loss 1% in bursts of 8 each way, 5 s offline in each 60 s,"
        " new connections time out, DNS slow"
    )
    assert texts.described(Conditions()) == "nothing is wrong"


@pytest.mark.parametrize("profile", profiles.BUILT_IN, ids=lambda one: one.name)
def test_each_profile_tells_its_numbers(profile):
    """Something is wrong with each, and it says what."""
    assert profile.conditions()
    assert profile.numbers()
    assert profile.about
    assert profile.to_json()["name"] == profile.name


def test_what_nobody_asked_for_is_told_with_its_reason():
    """It counts as dropped, and how many were to be is the rest."""
    late = Injected(
        seen=100, lost=1, late_dropped=9, too_late=4, no_room=5, passed_undelayed=3, unread=2
    )
    done = Done(Counted(seen=90), late)
    assert str(done) == (
        "dropped 10 of 100, 9 of them unasked (too late 4, no room 5), passed undelayed 3,"
        " dropped by the command's full sockets 2"
    )
    assert Done.from_json(done.to_json()) == done
    assert str(Done(Counted(seen=99), Injected(seen=100, lost=1))) == "dropped 1 of 100"


@pytest.mark.parametrize(("loss", "notes"), [("1%", 2), ("every:3", 1), ("100%", 0), ("0%", 0)])
def test_how_packets_are_lost_is_told_where_it_matters(loss, notes):
    """Not where all are lost: nobody can tell then."""
    assert len(inexact(texts.conditions_from({"loss": loss}))) == notes
    assert inexact(texts.conditions_from({"loss": loss}), elsewhere=Direction) == []


def test_a_profile_that_says_all_by_its_name_is_not_named_twice():
    """Offline is offline."""
    assert str(Asked.of("offline", seed="1")) == "offline"
    assert str(Asked.of("offline", delay="1ms", seed="1")) == "offline: delay 1 ms, offline"


def test_what_is_given_stands_in_place_of_a_profiles_own():
    """The other numbers stay."""
    asked = Asked.of("train", loss="2%", download="1M")
    assert asked.conditions.download.loss == Loss.chance(0.02)
    assert asked.conditions.outage == Outage(5, 60)
    assert asked.limits == {
        Direction.DOWNLOAD: Rate.parse("1M"),
        Direction.UPLOAD: Rate.parse("2mbit"),
    }
    assert str(asked).startswith("train: download 1M, upload 2mbit, delay 120 ms")


def test_nothing_to_ask_for_is_refused():
    """The error says what can be asked for."""
    with pytest.raises(LimitError, match="give a profile, or delay, jitter"):
        Asked.of()


def test_own_profiles_are_read_from_files(tmp_path, monkeypatch):
    """One of the same name replaces one that comes with the package."""
    file = tmp_path / "pybpfthrottle" / "profiles.toml"
    file.parent.mkdir()
    file.write_text('[office]\ndownload = "50mbit"\nloss = "0.5%"\n[3g]\nloss = "9%"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profiles.find("office").numbers() == "download 50mbit, loss 0.5% each way"
    assert profiles.find("3g").source == str(file)
    with pytest.raises(LimitError, match=r"no profile 'home': give .*office"):
        profiles.find("home")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[a]\ndelay = "80"\n', "profile a: delay: '80' is not a time"),
        ("[a]\ndelay = 80\n", "delay has to be a text"),
        ('delay = "80ms"\n', "delay stands alone"),
        ('[a]\nlag = "80ms"\n', "there is no 'lag'"),
        ("[a\n", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_of_profiles_is_told_with_the_file(tmp_path, monkeypatch, text, said):
    """The error has the file, the profile and what is wrong with it."""
    file = tmp_path / "pybpfthrottle" / "profiles.toml"
    file.parent.mkdir()
    file.write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=said) as raised:
        profiles.own_profiles()
    assert str(file) in str(raised.value)


def test_the_rule_of_the_hooks_has_no_loss_of_downloads_that_are_diverted():
    """Who diverts them loses them; the outage is still the hooks'."""
    given = Conditions(Impairment(loss=Loss.chance(0.5)), outage=OFFLINE)
    free = rule_of(given, Direction.DOWNLOAD)
    diverted = rule_of(given, Direction.DOWNLOAD, elsewhere=True)
    assert (free.enter, free.leave, free.up_ns) == (1 << 31, 1 << 31, 0)
    assert (diverted.enter, diverted.period_ns) == (0, 10**9)


def test_what_is_sent_can_only_be_lost():
    """A delay of what is sent is refused, with what to do instead."""
    with pytest.raises(ThrottleError, match="the whole round trip"):
        refuse_what_is_missing(Conditions(upload=Impairment(delay_s=1)))
