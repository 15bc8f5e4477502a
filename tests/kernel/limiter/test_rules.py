"""Limits by rules: which processes they take in, and who keeps them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Optional
from unittest.mock import Mock

import pytest
from by_backend import tool
from lab import ENVIRONMENT, PACKETS, TOOL, Lab, attached
from redis_server import redis
from shells import RATE, Shell
from since import since
from targets import eventually, target

from pybpfthrottle import quota
from pybpfthrottle.backends.ebpf.marks import Tracing
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.conditions.network import Asked
from pybpfthrottle.fleet import share as shares
from pybpfthrottle.fleet.share import FleetShare
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import BLOCKED, Direction, Rate
from pybpfthrottle.plan import Wish
from pybpfthrottle.rules import instance
from pybpfthrottle.rules import keeper as keepers
from pybpfthrottle.rules.groups import GroupRule, seated
from pybpfthrottle.rules.keeper import Keeper
from pybpfthrottle.rules.matching import below_mount
from pybpfthrottle.rules.model import Criteria, Rule
from pybpfthrottle.rules.when import Condition
from pybpfthrottle.shares import GroupSpec, Member
from pybpfthrottle.supervisor import InThread
from pybpfthrottle.throttle import Throttle

LIMITS = {Direction.DOWNLOAD: RATE}


class Kept:
    """Rules that are kept in this process."""

    def __init__(self, machine: Any = None, *, in_advance: bool = False) -> None:
        self.said: list[str] = []
        wish = Wish(options={"ebpf": Options()})
        self.keeper = Keeper(wish, self.said.append, machine=machine, in_advance=in_advance)
        self._driver = InThread(self.keeper.chores)

    def begin(self, *rules: Rule) -> None:
        """Put rules in force."""
        self._driver.call(lambda: self.keeper.begin(rules))

    def change(self, *rules: Rule, groups: Any = ()) -> None:
        """Put others in force instead."""
        self._driver.call(lambda: self.keeper.change(rules, groups))

    def call(self, function: Any) -> Any:
        """Call a function where the rules are kept."""
        return self._driver.call(function)

    def processes(self, name: str) -> set[int]:
        """Return the processes that a rule limits one by one."""

        def find() -> set[int]:
            held = [one for (rule, _), one in self.keeper.held.items() if rule == name]
            return {pid for one in held for pid in one.throttle.processes()}

        return self._driver.call(find)

    def cgroups(self, name: str) -> set[str]:
        """Return the cgroups that a rule limits as a whole."""
        held = {rule: one for (rule, _), one in self.keeper.held.items()}
        return {one.path for one in held[name].throttle.cgroups} if name in held else set()

    def is_on(self, name: str, cgroup: Cgroup) -> bool:
        """Whether a rule limits a cgroup as a whole, and not one that was there before."""
        held = self.keeper.held.get((name, ""))
        return held is not None and held.throttle.is_on(cgroup)

    def end(self) -> None:
        """Remove all."""
        self._driver.call(self.keeper.remove)
        self._driver.release()


@contextmanager
def kept(*rules: Rule, machine: Any = None, in_advance: bool = False) -> Iterator[Kept]:
    """Rules in force."""
    found = Kept(machine, in_advance=in_advance)
    try:
        found.begin(*rules)
        yield found
    finally:
        found.end()


def rule(called: str, limits: Any = None, /, **criteria: str) -> Rule:
    """A rule that limits downloads."""
    given = {kind: (value,) for kind, value in criteria.items()}
    return Rule(called, Criteria(**given), LIMITS if limits is None else limits)


@pytest.fixture
def sleep(tmp_path: Path) -> str:
    """A program whose name nobody else has."""
    path = tmp_path / f"s{uuid.uuid4().hex[:12]}"
    shutil.copy(shutil.which("sleep") or "", path)
    return str(path)


@contextmanager
def running(*command: str, where: Any = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended afterwards."""
    move = (lambda: where.move_in(0)) if where is not None else None
    with subprocess.Popen(command, preexec_fn=move) as made:
        try:
            yield made
        finally:
            made.kill()


def test_a_rule_has_a_bad_network_that_changes_and_ends_with_it(scratch: Cgroup) -> None:
    """For what runs in a cgroup; another share is lost when the rule says so."""

    def lossy(upload_loss: str) -> Rule:
        network = Asked.of(upload_loss=upload_loss, seed="1")
        criteria = Criteria(cgroup=(below_mount(scratch),))
        return Rule("bad", criteria, network.limits, loopback=True, network=network)

    with target(scratch) as own:
        with kept(lossy("every:2")) as found:
            assert own.do("echoes(6)") == [0, 2, 4]
            found.change(lossy("every:3"))
            assert own.do("echoes(6)") == [0, 1, 3, 4]
        assert len(own.do("echoes(6)")) == 6


def test_a_rule_limits_who_matches_until_it_goes(shell: Shell, scratch: Cgroup) -> None:
    """Processes that run already, with their children; afterwards nothing is limited."""
    place = below_mount(scratch)
    with kept(rule("by cgroup", cgroup=place)) as found:
        assert shell.is_limited()
        assert found.cgroups("by cgroup") == {scratch.path}
        found.change()
        assert not shell.is_limited()
        found.change(rule("by cgroup", cgroup=f"{place}*"))
        assert shell.pid in found.processes("by cgroup") or found.cgroups("by cgroup")
        assert shell.is_limited()
    assert not shell.is_limited()


def test_a_changed_limit_keeps_the_throttle(scratch: Cgroup, sleep: str) -> None:
    """Its counters go on."""
    first = rule("mine", name=os.path.basename(sleep))
    with running(sleep, "60", where=scratch), kept(first) as found:
        before = found.keeper.held["mine", ""].throttle
        found.change(dataclasses.replace(first, limits={Direction.DOWNLOAD: Rate(5000)}))
        now = found.keeper.held["mine", ""].throttle
        assert now is before
        assert now.limits == {Direction.DOWNLOAD: Rate(5000)}


def test_who_starts_later_is_limited(sleep: str) -> None:
    """As soon as it has executed a program that matches; its throttle goes with it."""
    with kept(rule("mine", name=os.path.basename(sleep))) as found:
        assert not found.keeper.held
        with running(sleep, "60") as one:
            eventually(lambda: found.processes("mine") == {one.pid})
            with running(sleep, "60") as other:
                eventually(lambda: found.processes("mine") == {one.pid, other.pid})


def twice() -> set[int]:
    """The programs of this process that a packet meets more than once at the root."""
    found = attached(cgroup.root())
    own = own_programs()
    assert own.intersection(found)
    return {one for one in own if found.count(one) > 1}


def own_programs() -> set[int]:
    """The programs that this process has open, or links of."""
    found = set()
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found |= {int(one) for one in re.findall(r"^prog_id:\s+(\d+)", info.read_text(), re.M)}
    return found


def test_what_is_limited_is_charged_once(sleep: str) -> None:
    """A packet meets each program of a rule once, however its processes come to it."""
    name = os.path.basename(sleep)
    with running(sleep, "60") as first, kept(rule("mine", name=name)) as found:
        eventually(lambda: found.processes("mine") == {first.pid})
        eventually(lambda: not twice())
        with running(sleep, "60") as second:
            eventually(lambda: found.processes("mine") == {first.pid, second.pid})
            eventually(lambda: not twice())
    with kept(rule("mine", name=name)) as found, running(sleep, "60") as first:
        eventually(lambda: found.processes("mine") == {first.pid})
        eventually(lambda: not twice())


def starts_unseen(found: Kept, throttle: Throttle, *command: str) -> bool:
    """Whether a process is limited for its name that starts while the keeper looks at nothing."""

    def start() -> bool:
        with running(*command) as one:
            # Its parent may go on a moment before it has executed the program.
            eventually(lambda: throttle.by_name([one.pid]) == {one.pid})
            return one.pid in throttle.processes()

    return bool(found.call(start))


@since("5.8")
def test_who_has_an_expected_name_is_limited_from_its_start(sleep: str) -> None:
    """The kernel does so while the rule has a throttle; the keeper then takes it in for good."""
    with kept(rule("mine", name=os.path.basename(sleep))) as found, running(sleep, "60") as one:
        eventually(lambda: found.processes("mine") == {one.pid})
        throttle = found.keeper.held["mine", ""].throttle
        assert starts_unseen(found, throttle, sleep, "60")
        with running(sleep, "60") as other:
            eventually(lambda: found.processes("mine") == {one.pid, other.pid})
            eventually(lambda: not found.call(lambda: throttle.by_name([other.pid])))
            assert found.processes("mine") == {one.pid, other.pid}


SENDER = """#!{python} -S
import socket, sys
from contextlib import suppress
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
    for _ in range({count}):
        with suppress(PermissionError):
            own.sendto(bytes(100), ("127.0.0.1", int(sys.argv[1])))
"""
SENT = 5


@pytest.fixture
def senders(tmp_path: Path) -> list[str]:
    """Two programs that send at once, to the port that they are given."""
    paths = [tmp_path / f"u{uuid.uuid4().hex[:12]}" for _ in range(2)]
    for path in paths:
        path.write_text(SENDER.format(python=sys.executable, count=SENT))
        path.chmod(0o755)
    return list(map(str, paths))


def arrived(program: str, found: Optional[Kept] = None) -> int:
    """How many datagrams of a program arrive, while the keeper looks at nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.bind(("127.0.0.1", 0))
        here.setblocking(False)

        def send() -> None:
            subprocess.run([program, str(here.getsockname()[1])], check=True)

        send() if found is None else found.call(send)
        count = 0
        with suppress(BlockingIOError):
            while here.recv(1000):
                count += 1
    return count


def silent(called: str, *programs: str) -> Rule:
    """A rule for programs by their names, of which nothing arrives."""
    names = tuple(map(os.path.basename, programs))
    return Rule(called, Criteria(name=names), {Direction.UPLOAD: BLOCKED}, loopback=True)


@since("5.8")
def test_the_first_process_is_limited_from_its_first_packet(senders: list[str]) -> None:
    """Its throttle is there before it, and follows the rules; nothing is left of it."""
    first, second = senders
    mine = silent("mine", first)
    assert arrived(first) == SENT
    with kept(mine, in_advance=True) as found:
        throttle = found.keeper.held["mine", ""].throttle
        assert arrived(first, found) == 0
        assert arrived(second, found) == SENT
        found.change(mine, silent("other", "nobody"))
        assert found.keeper.held["mine", ""].throttle is throttle
        assert arrived(first, found) == 0
        found.change(silent("mine", second))
        assert arrived(first, found) == SENT
        assert arrived(second, found) == 0
        found.change(dataclasses.replace(silent("mine", second), limits=LIMITS))
        assert arrived(second, found) == SENT
        found.change(silent("mine", second))
        found.change()
        assert arrived(second, found) == SENT
        assert not found.keeper.held


@since("5.8")
def test_a_throttle_waits_however_long(senders: list[str], monkeypatch: Any) -> None:
    """Also after a process of its rule; one that somebody removes comes back."""
    monkeypatch.setattr(keepers, "_IDLE_WITH_NAMES_S", 0)
    with kept(silent("mine", senders[0]), in_advance=True) as found:
        throttle = found.keeper.held["mine", ""].throttle
        for _ in range(2):
            assert arrived(senders[0], found) == 0
            found.call(found.keeper._tick)
        assert found.keeper.held["mine", ""].throttle is throttle
        tool("remove", throttle.id)
        eventually(
            lambda: found.keeper.held and found.keeper.held["mine", ""].throttle is not throttle
        )
        eventually(lambda: arrived(senders[0], found) == 0)


@since("5.8")
def test_a_name_goes_on_to_the_other_rule_for_it(senders: list[str]) -> None:
    """The kernel has one throttle for a name: when that one ends, another gets it."""
    one, both = silent("one", senders[0]), silent("both", *senders)
    with kept(one, both, in_advance=True) as found:
        assert arrived(senders[0], found) == 0
        found.change(both)
        assert arrived(senders[0], found) == 0


@since("5.8")
def test_nothing_waits_while_a_rule_is_not_in_force(senders: list[str]) -> None:
    """Circumstances end its throttle, and bring it back."""
    machine = Battery()
    mine = dataclasses.replace(silent("mine", senders[0]), when=Condition(on_battery=True))
    with kept(mine, machine=machine, in_advance=True) as found:
        assert arrived(senders[0], found) == SENT
        machine.on = True
        eventually(lambda: found.keeper.held)
        assert arrived(senders[0], found) == 0
        machine.on = False
        eventually(lambda: not found.keeper.held)
        assert arrived(senders[0], found) == SENT


@since("5.8")
def test_only_names_are_waited_for_and_not_too_many(monkeypatch: Any) -> None:
    """Others are known when they start; throttles cost memory, and kinds of traffic programs."""
    monkeypatch.setattr(keepers, "_MOST_WAITING", 4)
    monkeypatch.setattr(keepers, "_MOST_KINDS_WAITING", 2)
    each = dataclasses.replace(silent("each", "nobody-e"), each=True)
    pattern, place = rule("pattern", name="nobody-*"), rule("place", cgroup="/nobody")
    kinds = [
        dataclasses.replace(silent(f"kind {n}", f"nobody-{n}"), to=(f"192.0.2.{n}",))
        for n in range(3)
    ]
    many = [dataclasses.replace(silent(f"many {n}", f"many-{n}"), to=kinds[0].to) for n in range(4)]
    with kept(each, pattern, place, *kinds, *many, in_advance=True) as found:
        assert {name for name, _ in found.keeper.held} == {"kind 0", "kind 1", "many 0", "many 1"}


def test_after_the_end_nothing_is_limited_any_more(sleep: str) -> None:
    """Whatever the keeper was about to do, and although a process matches."""
    with running(sleep, "60") as one, kept(rule("mine", name=os.path.basename(sleep))) as found:
        eventually(lambda: found.processes("mine") == {one.pid})
        found.call(found.keeper.remove)
        found.call(found.keeper.look)
        assert not found.keeper.held


@since("5.8")
def test_those_that_wait_share_one_set_of_programs() -> None:
    """Every packet of the machine meets them: the first one does not have programs of its own."""
    with kept(*(silent(f"mine {n}", f"nobody-{n}") for n in range(9)), in_advance=True) as found:
        assert len(found.keeper.held) == 9
        assert len(own_programs().intersection(attached(cgroup.root(), PACKETS[:1]))) == 1


def test_nothing_waits_where_the_kernel_does_not_follow(monkeypatch: Any) -> None:
    """A throttle would be of no use there; rules are in force all the same."""
    refused = OSError(errno.EPERM, "refused")
    monkeypatch.setattr(Tracing, "begin", Mock(side_effect=refused))
    with kept(silent("mine", "nobody"), in_advance=True) as found:
        assert not found.keeper.held
        assert not any("not in force" in line for line in found.said)


@since("5.8")
def test_who_only_has_the_name_is_let_go(sleep: str, tmp_path: Path) -> None:
    """Another program of the same name is limited no longer than until the keeper looks at it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = shutil.copy(sleep, elsewhere)
    with kept(rule("mine", exe=sleep)) as found, running(sleep, "60") as one:
        eventually(lambda: found.processes("mine") == {one.pid})
        throttle = found.keeper.held["mine", ""].throttle
        assert starts_unseen(found, throttle, other, "60")
        with running(other, "60"):
            eventually(lambda: found.processes("mine") == {one.pid})


def test_the_more_specific_rule_gets_the_process(scratch: Cgroup, sleep: str) -> None:
    """Also if the process has belonged to another rule until it executed its program."""
    broad = rule("broad", cgroup=below_mount(scratch) + "*")
    narrow = rule("narrow", name=os.path.basename(sleep))
    with kept(broad, narrow) as found:
        with running("sh", "-c", f"{sleep} 60; true", where=scratch) as parent:
            eventually(lambda: found.processes("broad") == {parent.pid})
            eventually(lambda: len(found.processes("narrow")) == 1)
            (child,) = found.processes("narrow")
            assert process.name_of(child) == os.path.basename(sleep)
            # The other rule is for what is not there: processes are limited one by one.
            found.change(broad, rule("other", name="nobody"))
            assert found.processes("broad") == {parent.pid, child}
            os.kill(child, signal.SIGKILL)


def test_sockets_go_with_their_process(shells_lab: Lab, shell: Shell, scratch: Cgroup) -> None:
    """What a rule let go is limited by the other rule alone."""
    slow = {Direction.DOWNLOAD: Rate(1000)}
    broad = rule("broad", slow, cgroup=below_mount(scratch) + "*")
    narrow = rule("narrow", cgroup=below_mount(scratch))
    with kept(broad) as found:
        found.change(broad, dataclasses.replace(narrow, limits=LIMITS))
        got = shell.downloads()
        assert RATE.bytes_per_s / 2 < got
        assert shell.is_limited()


def test_each_gives_each_its_own(sleep: str) -> None:
    """A throttle for each process that matches, and one for all of its children."""
    mine = dataclasses.replace(rule("mine", name=os.path.basename(sleep)), each=True)
    with kept(mine) as found, running(sleep, "60") as one, running(sleep, "60") as other:
        keys = {("mine", str(one.pid)), ("mine", str(other.pid))}
        eventually(lambda: set(found.keeper.held) == keys)
        one.kill()
        one.wait()
        eventually(lambda: set(found.keeper.held) == {("mine", str(other.pid))})


def test_a_cgroup_that_comes_again_is_limited_again(scratch: Cgroup) -> None:
    """As a service's does when it restarts."""
    place = below_mount(scratch) + "/unit"
    with kept(rule("mine", cgroup=place)) as found:
        for _ in range(2):
            made = scratch.create_child("unit")
            try:
                with running("sleep", "60", where=made):
                    eventually(partial(found.is_on, "mine", made))
            finally:
                made.remove(patience_s=5)


def test_a_rule_for_several_cgroups_takes_in_more(scratch: Cgroup) -> None:
    """All share its limit, by the same throttle."""
    made = [scratch.create_child(name) for name in "ab"]
    try:
        with kept(rule("mine", cgroup=below_mount(scratch) + "/*")) as found:
            with running("sleep", "60", where=made[0]):
                eventually(lambda: found.cgroups("mine") == {made[0].path})
                first = found.keeper.held["mine", ""].throttle
                with running("sleep", "60", where=made[1]):
                    eventually(lambda: found.cgroups("mine") == {one.path for one in made})
                    assert found.keeper.held["mine", ""].throttle is first
    finally:
        for one in made:
            one.remove(patience_s=5)


def test_what_is_limited_by_hand_is_left_alone(sleep: str) -> None:
    """A rule does not limit a second time what somebody limits."""
    with running(sleep, "60") as one:
        limit = [*TOOL, "--pid", str(one.pid), "-d", "1M", "--json"]
        with subprocess.Popen(limit, env=ENVIRONMENT, stdout=subprocess.PIPE) as by_hand:
            try:
                assert by_hand.stdout
                by_hand.stdout.readline()
                with kept(rule("mine", name=os.path.basename(sleep))) as found:
                    assert not found.keeper.held
            finally:
                by_hand.terminate()


class Battery:
    """A machine that runs on a battery, or not."""

    def __init__(self) -> None:
        self.on = False

    def on_battery(self) -> bool:
        """Whether it does now."""
        return self.on

    def notes(self) -> list[str]:
        """All is known."""
        return []


def test_circumstances_decide_whether_a_rule_is_in_force(sleep: str) -> None:
    """While it is not, the next rule that matches is."""
    machine = Battery()
    name = os.path.basename(sleep)
    always = rule("always", name=name[:-1] + "*")
    travelling = dataclasses.replace(rule("travelling", name=name), when=Condition(on_battery=True))
    with running(sleep, "60") as one, kept(always, travelling, machine=machine) as found:
        assert found.processes("always") == {one.pid}
        machine.on = True
        eventually(lambda: found.processes("travelling") == {one.pid})
        assert found.processes("always") == set()
        machine.on = False
        eventually(lambda: found.processes("always") == {one.pid})
        assert found.processes("travelling") == set()


def test_rules_share_a_total(sleep: str, scratch: Cgroup) -> None:
    """Each has its part by its weight; what a rule gets anew is its part of the group then."""
    line = GroupRule(GroupSpec.of("line", download="1M"))
    heavy, light = (
        seated(
            dataclasses.replace(rule(name, {}, **match), member=Member.of("line", weight=weight)),
            [line],
        )
        for name, weight, match in (
            ("heavy", 3, {"name": os.path.basename(sleep)}),
            ("light", 1, {"cgroup": below_mount(scratch)}),
        )
    )
    with running(sleep, "60"), running("sleep", "60", where=scratch), kept() as found:
        found.change(heavy, light, groups=[line])

        def guaranteed() -> dict[str, int]:
            names = {one.throttle.id: name for (name, _), one in found.keeper.held.items()}
            return {names[now.throttle]: now.guaranteed for now in found.keeper.shares()}

        total = 1024**2
        parts = found.call(guaranteed)
        assert sum(parts.values()) == pytest.approx(total, abs=2)
        assert parts["heavy"] > 2 * parts["light"]
        found.change(light, groups=[line])
        assert found.call(guaranteed) == {"light": pytest.approx(total, abs=2)}
        found.change(dataclasses.replace(light, member=None, limits=LIMITS))
        assert found.call(guaranteed) == {}
        assert found.keeper.held["light", ""].throttle.limits == LIMITS


def test_rules_share_with_other_machines(scratch: Cgroup, monkeypatch: Any) -> None:
    """While nothing moves here another machine has the total, and an equal part without it."""
    monkeypatch.setattr(shares, "_PERIOD_S", 0.1)
    monkeypatch.setattr(shares, "_KEEP_S", 1.0)
    total = Rate.parse("10M")
    with (
        redis() as (server, port),
        FleetShare(f"redis://127.0.0.1:{port}", "line:upload", total) as other,
    ):
        spec = GroupSpec.of("line", upload=total)
        line = GroupRule(spec, shared=f"redis://127.0.0.1:{port}", machines=4)
        here = dataclasses.replace(
            rule("here", {}, cgroup=below_mount(scratch)), member=Member.of("line")
        )
        with running("sleep", "60", where=scratch), kept() as found:
            found.change(seated(here, [line]), groups=[line])

            def part() -> float:
                [now] = found.call(found.keeper.shares)
                return now.guaranteed / total.bytes_per_s

            eventually(lambda: part() < 0.05)
            eventually(lambda: other.part().bytes_per_s / total.bytes_per_s > 0.9)
            server.kill()
            eventually(lambda: part() == pytest.approx(0.25, abs=0.01))
            eventually(lambda: any("no agreement through" in line for line in found.said))


# The one process that keeps the rules of the machine.
alone = pytest.mark.alone
# Names that nobody else uses on this machine.
MINE, SHELL = (f"{name}-{uuid.uuid4().hex[:6]}" for name in ("mine", "shell"))


def throttles(name: str) -> list[dict[str, Any]]:
    """What the list says of a rule's throttles."""
    found = json.loads(tool("list", "--json").stdout)["throttles"]
    # All but how long it is in force.
    return [{**one, "since_s": None} for one in found if one["name"] == name]


@pytest.fixture
def rules(tmp_path: Path, sleep: str) -> Iterator[Path]:
    """A file with a rule for the program; nothing is kept at the end."""
    path = tmp_path / "rules.toml"
    match = f'match = {{ name = "{os.path.basename(sleep)}" }}'
    path.write_text(f'[[rule]]\nname = "{MINE}"\n{match}\nupload = "500K"\n')
    try:
        yield path
    finally:
        tool("apply", "--stop")
        assert not throttles(MINE)
        assert instance.current() is None


@alone
def test_apply_makes_the_machine_match(rules: Path, sleep: str) -> None:
    """Twice is the same as once; what is changed in the file is changed in force."""
    with running(sleep, "60") as one:
        dry = tool("apply", "--dry-run", str(rules)).stdout
        assert dry == f"+ {MINE}: {process.listed([one.pid])}: upload 500.0 KB/s\n"
        assert not throttles(MINE)
        said = tool("apply", str(rules))
        assert said.stdout == "1 rule is in force; pybpfthrottle apply --stop ends that.\n"
        (first,) = throttles(MINE)
        assert first["target"]["rule"] == MINE
        tool("apply", str(rules))
        assert throttles(MINE) == [first]
        rules.write_text(rules.read_text().replace("500K", "300K"))
        diff = tool("apply", "--diff", str(rules)).stdout
        assert f"~ {MINE}: " in diff
        assert "upload 500.0 KB/s -> upload 300.0 KB/s" in diff
        assert throttles(MINE)[0]["limits"]["upload"] == 300 * 1024
        assert "The machine matches the rules." in tool("apply", "-n", str(rules)).stdout
        told = json.loads(tool("apply", "--dry-run", "--json", str(rules)).stdout)
        assert [change["change"] for change in told["changes"]] == ["same"]
        explained = tool("explain", str(one.pid), str(rules)).stdout
        assert f"rule {MINE} ({rules}, line 1): name {os.path.basename(sleep)}" in explained
        assert f"Limited now by {first['id']}" in explained


@alone
def test_without_rules_it_says_where_they_were_looked_for(tmp_path: Path) -> None:
    """As a directory without any, and a file whose rules are disabled, look like all is well."""
    none = f"There are no rules in {tmp_path}/*.toml."
    dry = tool("apply", "--dry-run", str(tmp_path))
    assert (dry.returncode, dry.stdout) == (0, f"{none}\n")
    assert none in tool("explain", str(os.getpid()), str(tmp_path)).stderr
    path = tmp_path / "rules.toml"
    path.write_text(
        '[[rule]]\nname = "off"\nmatch = { name = "x" }\nblock = true\nenabled = false\n'
    )
    assert tool("apply", "-n", str(path)).stdout == f"There are no enabled rules in {path}.\n"
    assert json.loads(tool("apply", "-n", "--json", str(path)).stdout)["rules"] == []


@alone
def test_a_killed_keeper_loses_nothing(rules: Path, sleep: str) -> None:
    """The limit stays; the next start takes it over, and has no second one."""
    with running(sleep, "60") as one:
        tool("apply", str(rules))
        (first,) = throttles(MINE)
        os.kill(first["owner_pid"], signal.SIGKILL)
        eventually(lambda: not throttles(MINE)[0]["supervised"])
        # Another command does not try to keep what only the rules can tell.
        assert first["id"] not in tool("run", "-d", "1M", "--", "true").stderr
        tool("apply", str(rules))
        (now,) = throttles(MINE)
        assert now["id"] == first["id"]
        assert now["supervised"]
        with running(sleep, "60") as other:
            shown = json.loads(tool("show", now["id"], "--json").stdout)
            assert shown
            explain = ("explain", str(other.pid), str(rules))
            eventually(lambda: f"Limited now by {now['id']}" in tool(*explain).stdout)
        assert one.poll() is None


@alone
@since("5.8")
def test_names_are_expected_by_who_takes_over(rules: Path, sleep: str) -> None:
    """As the kernel forgets them with the process that kept the rule."""
    with running(sleep, "60") as one:
        tool("apply", str(rules))
        (first,) = throttles(MINE)
        os.kill(first["owner_pid"], signal.SIGKILL)
        eventually(lambda: not throttles(MINE)[0]["supervised"])
        same = rule(MINE, {Direction.UPLOAD: Rate.parse("500K")}, name=os.path.basename(sleep))
        with kept(same) as found:
            eventually(lambda: found.processes(MINE) == {one.pid})
            throttle = found.keeper.held[MINE, ""].throttle
            assert throttle.id == first["id"]
            assert starts_unseen(found, throttle, sleep, "60")


@alone
def test_the_kernel_keeps_many_rules_alone(scratch: Cgroup, shell: Shell, sleep: str, rules: Path):
    """Although they share programs, which nobody but the kernel has then."""
    place = below_mount(scratch)
    more = f'[[rule]]\nname = "{SHELL}"\nmatch = {{ cgroup = "{place}" }}\ndownload = "300K"\n'
    rules.write_text(rules.read_text() + more)
    with running(sleep, "60"):
        tool("apply", str(rules))
        assert shell.is_limited()
        (first,), (second,) = throttles(MINE), throttles(SHELL)
        os.kill(first["owner_pid"], signal.SIGKILL)
        eventually(lambda: not throttles(SHELL)[0]["supervised"])
        assert shell.is_limited()
        tool("remove", first["id"])
        assert shell.is_limited()
        tool("apply", str(rules))
        assert throttles(SHELL)[0]["id"] == second["id"]
        assert shell.is_limited()


@alone
def test_what_a_killed_keeper_has_left_is_stopped_too(rules: Path, sleep: str) -> None:
    """Nobody has to apply the rules once more to be rid of them."""
    with running(sleep, "60"):
        tool("apply", str(rules))
        (first,) = throttles(MINE)
        os.kill(first["owner_pid"], signal.SIGKILL)
        eventually(lambda: not throttles(MINE)[0]["supervised"])
        assert "The limits of the rules are removed" in tool("apply", "--stop").stdout
        assert throttles(MINE) == []
        assert not os.path.exists(instance._PATH)
        assert "No process keeps rules" in tool("apply", "--stop").stdout


@alone
def test_the_daemon_keeps_the_rules(rules: Path, sleep: str) -> None:
    """With mistakes those of before go on; it ends with all limits of rules."""
    daemon = [*TOOL, "daemon", str(rules)]
    with subprocess.Popen(daemon, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as keeper:
        try:
            assert keeper.stderr
            eventually(instance.current)
            with running(sleep, "60"):
                eventually(lambda: throttles(MINE))
                good = rules.read_text()
                rules.write_text(good.replace("500K", "fast"))
                keeper.send_signal(signal.SIGHUP)
                told = keeper.stderr.readline()
                assert f"{rules}, line 4: upload is 'fast'" in told
                assert "the rules of before go on" in told
                rules.write_text(good.replace("500K", "1M"))
                assert tool("apply", str(rules)).returncode == 0
                assert throttles(MINE)[0]["limits"]["upload"] == 1024**2
                other = tool("apply", str(rules.parent))
                assert other.returncode == 1
                assert "put the file there, or stop the daemon" in other.stderr
                assert "is pybpfthrottle daemon: stop that" in tool("apply", "--stop").stderr
                assert "is pybpfthrottle daemon already" in tool("daemon", str(rules)).stderr
                keeper.terminate()
                assert keeper.wait(timeout=30) == 0
                assert not throttles(MINE)
        finally:
            keeper.kill()


@contextmanager
def daemon(rules: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon, which has put rules in force."""
    with subprocess.Popen([*TOOL, "daemon", str(rules)], env=ENVIRONMENT) as keeper:
        try:

            def has_looked() -> bool:
                now = instance.current()
                return now is not None and now.owner.pid == keeper.pid and now.looked > 0

            eventually(has_looked, within_s=60)
            yield keeper
        finally:
            keeper.terminate()


@contextmanager
def stopped(keeper: subprocess.Popen[bytes]) -> Iterator[None]:
    """A daemon that does nothing for a moment."""
    keeper.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        keeper.send_signal(signal.SIGCONT)


@alone
@since("5.8")
def test_throttles_of_the_daemon_wait(rules: Path, senders: list[str]) -> None:
    """It is told that they limit nothing yet; they stay with the kernel, and are taken over."""
    name = os.path.basename(senders[0])
    match = f'match = {{ name = "{name}" }}\nloopback = true\n'
    rules.write_text(f'[[rule]]\nname = "{MINE}"\n{match}block = "upload"\n')
    with daemon(rules) as keeper:
        (waiting,) = throttles(MINE)
        assert waiting["waits"]
        assert f"by rule {MINE} (waits)" in tool("list").stdout
        assert "none yet: it waits" in tool("show", waiting["id"]).stdout
        assert "Nothing limits it now." in tool("explain", str(os.getpid()), str(rules)).stdout
        assert "The machine matches the rules." in tool("apply", "-n", str(rules)).stdout
        with stopped(keeper):
            assert arrived(senders[0]) == 0
        keeper.kill()
        keeper.wait()
        assert arrived(senders[0]) == 0
    with daemon(rules) as keeper:
        assert [one["id"] for one in throttles(MINE)] == [waiting["id"]]
        with stopped(keeper):
            assert arrived(senders[0]) == 0
        rules.write_text(rules.read_text().replace('block = "upload"', 'upload = "1M"'))
        diff = tool("apply", "--diff", str(rules)).stdout
        assert f"~ {MINE}: no process yet: upload blocked -> upload 1.0 MB/s" in diff
        assert throttles(MINE)[0]["limits"]["upload"] == 1024**2
    assert arrived(senders[0]) == SENT


@alone
@since("5.8")
def test_the_daemon_needs_little_memory(tmp_path: Path) -> None:
    """With 50 rules whose throttles wait, and 2,000 processes, less than 40 MB."""
    path = tmp_path / "rules.toml"
    names = [f"m{uuid.uuid4().hex[:12]}" for _ in range(50)]
    limits = 'upload = "500K"\ndownload = "1M"\n'
    path.write_text(
        "".join(
            f'[[rule]]\nname = "{name}"\nmatch = {{ name = "{name}" }}\n{limits}' for name in names
        )
    )
    fork = "import os, signal\nfor _ in range(2000):\n    os.fork() or signal.pause()\nprint()\n"
    many = [sys.executable, "-S", "-c", fork + "signal.pause()"]
    with subprocess.Popen(many, stdout=subprocess.PIPE, start_new_session=True) as crowd:
        try:
            assert crowd.stdout
            crowd.stdout.readline()
            with daemon(path) as keeper:
                assert len(throttles(names[0])) == len(throttles(names[-1])) == 1
                status = Path(f"/proc/{keeper.pid}/status").read_text()
                assert int(status.partition("VmRSS:")[2].split()[0]) < 40 * 1024
        finally:
            os.killpg(crowd.pid, signal.SIGKILL)


@alone
def test_mistakes_change_nothing(rules: Path, sleep: str) -> None:
    """What ran goes on; each mistake is told with its line."""
    with running(sleep, "60"):
        tool("apply", str(rules))
        (before,) = throttles(MINE)
        rules.write_text(rules.read_text().replace("500K", "1 apple") + "each = 7\n")
        failed = tool("apply", str(rules))
        assert failed.returncode == 1
        assert failed.stderr.count("error: ") == 2
        assert "line 4: upload is '1 apple'" in failed.stderr
        assert "line 5: each is 7" in failed.stderr
        assert throttles(MINE) == [before]


def test_a_quota_that_is_used_up_limits(shell: Shell, scratch: Cgroup) -> None:
    """What a rule's processes move is charged to it, until another limit applies."""
    given = {"day": "300K", "then": "limit", "rate": str(RATE.bytes_per_s)}
    place = rule("mine", {}, cgroup=below_mount(scratch))
    with kept(dataclasses.replace(place, quota=quota.parse(given))) as found:

        def limits() -> Any:
            held = found.keeper.held.get(("mine", ""))
            return None if held is None else dict(held.throttle.limits)

        eventually(lambda: limits() == dict.fromkeys(Direction))
        assert not shell.is_limited()
        eventually(lambda: limits() == dict.fromkeys(Direction, RATE))
        assert shell.is_limited()
        (standing,) = found.keeper.decisions()["mine"].standings
        assert standing.exceeded
