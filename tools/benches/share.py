"""Flows that share a total by weights: a group, beside tc's HTB classes with the same weights.

Each flow has a process of its own in a cgroup of its own. ``weights``: all begin at once, and their
parts are compared with what the weights say. ``floor``: one with a floor beside 16 greedy ones.
``lend``: the first stops; how long until the others use what it had. ``return``: it begins later;
how long until it has its part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Iterator, NamedTuple, Optional, Sequence

from benches.child import PATIENCE_S, Child, TransferError
from benches.figures import BIN_S
from benches.line import DelayLine, LineSpec
from benches.surroundings import python
from benches.tcp_info import Sent
from benches.traffic import Plan, Received
from pybpfthrottle import throttle
from pybpfthrottle.demo.wire import DEVICE, Wire
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.shares import GroupSpec, Member
from pybpfthrottle.sharing import Group

METHODS = ("group", "htb")
SCENES = ("weights", "floor", "lend", "return")
_FIRST_PORT = 5300
_GREEDY = 16
# The shell enters the cgroup before it becomes the client.
_ENTER = 'echo 0 > "$0/cgroup.procs" && exec "$@"'
# After this a slow start is over.
_SETTLED_S = 1.0
# A rate is had once this much of it comes in each of some bins.
_ENOUGH, _BINS = 0.9, 3


class Flow(NamedTuple):
    """A member of a group with one TCP flow, which begins and ends at some second."""

    weight: int
    floor: Optional[Rate] = None
    begin_s: float = 0.0
    end_s: Optional[float] = None


class Case(NamedTuple):
    """What is the same for all methods that are compared."""

    scene: str
    direction: Direction
    total: Rate
    round_trip_ms: float
    weights: Sequence[int]
    seconds: float

    def __str__(self) -> str:
        way = f"{self.round_trip_ms:g} ms" if self.round_trip_ms else "veth"
        return f"{self.scene}: {self.total} {self.direction}, {way}"

    def flows(self) -> list[Flow]:
        """The flows of the scene."""
        if self.scene == "floor":
            floor = Rate(self.total.bytes_per_s // 5)
            return [Flow(1, floor), *[Flow(1)] * _GREEDY]
        flows = [Flow(weight) for weight in self.weights]
        if self.scene == "lend":
            flows[0] = flows[0]._replace(end_s=self.seconds / 2)
        if self.scene == "return":
            flows[0] = flows[0]._replace(begin_s=self.seconds / 2)
        return flows

    def wire(self) -> Wire:
        """The two namespaces, joined accordingly."""
        return DelayLine(LineSpec(self.round_trip_ms / 2000)) if self.round_trip_ms else Wire()


class Moved(NamedTuple):
    """What a flow has moved: bytes in each ``BIN_S`` since a time on CLOCK_MONOTONIC."""

    begin_s: float
    bins: list[int]
    sent: Sent

    def between(self, begin_s: float, end_s: float) -> int:
        """The bytes that came between two times."""
        first = max(round((begin_s - self.begin_s) / BIN_S), 0)
        last = max(round((end_s - self.begin_s) / BIN_S), 0)
        return sum(self.bins[first:last])


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--totals", default="2M,10M", metavar="RATES", help="totals to share (2M,10M)")
    add("--weights", default="8,4,2,1", metavar="NUMBERS", help="weights of the flows (8,4,2,1)")
    add("--scenes", default=",".join(SCENES), metavar="NAMES", help=",".join(SCENES))
    add("--directions", default="download,upload", metavar="NAMES")
    add("--delays", default="0", metavar="MS", help="round-trip times; 0 is a veth pair (0)")
    add("--methods", default=",".join(METHODS), metavar="NAMES", help=",".join(METHODS))
    add("--seconds", type=float, default=6.0, help="length of each transfer (6)")
    add("--rounds", type=int, default=1, help="rounds; the median counts (1)")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure and show; the exit status."""
    rows = []
    for case in _cases(arguments):
        for method in arguments.methods.split(","):
            try:
                found = [_figures(case, _run(case, method)) for _ in range(arguments.rounds)]
            except (TransferError, subprocess.CalledProcessError) as error:
                print(f"bench share: {case} by {method}: {error}", file=sys.stderr)
                return 1
            row = {"case": str(case), "method": method, **_median(found)}
            rows.append(row)
            if not arguments.json:
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return 0


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    weights = [int(each) for each in arguments.weights.split(",")]
    for scene in arguments.scenes.split(","):
        for name in arguments.directions.split(","):
            for delay in arguments.delays.split(","):
                for total in arguments.totals.split(","):
                    yield Case(
                        *(scene, Direction[name.upper()], Rate.parse(total), float(delay)),
                        *(weights, arguments.seconds),
                    )


def _median(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}


# One run.


def _run(case: Case, method: str) -> list[Moved]:
    """Put the method in force, and have all flows move what they can."""
    flows = case.flows()
    with ExitStack() as stack:
        wire = stack.enter_context(case.wire())
        cgroups = [_cgroup(stack, wire, number) for number in range(len(flows))]
        if method == "group":
            _share(stack, case, flows, cgroups)
        else:
            _classes(wire, case, flows)
        return _transfer(stack, wire, case, flows, cgroups)


def _cgroup(stack: ExitStack, wire: Wire, number: int) -> Cgroup:
    """Make a cgroup with a process in it, by which it is known where its connections will be."""
    made = cgroup.root().create_child(f"bench-{os.getpid()}-{number}")
    stack.callback(made.remove, patience_s=5)
    waiting = ["sh", "-c", "echo ready && exec cat"]
    Child(stack, _inside(wire, made, waiting)).ready()
    return made


def _inside(wire: Wire, own: Cgroup, command: list[str]) -> list[str]:
    """The command line that runs a command in a cgroup and the client's network namespace."""
    return wire.client.inside("sh", "-c", _ENTER, own.path, *command)


def _share(stack: ExitStack, case: Case, flows: Sequence[Flow], cgroups: Sequence[Cgroup]) -> None:
    """Put a group in force, looked after by a thread of this process."""
    group = Group(GroupSpec("bench", {case.direction: case.total}))
    stack.enter_context(group)
    for flow, own in zip(flows, cgroups):
        floors = {case.direction: flow.floor} if flow.floor else {}
        member = Member("bench", flow.weight, floors)
        live = throttle.apply([own], group.limits(member))
        live.supervise()
        group.add(live, member)


def _classes(wire: Wire, case: Case, flows: Sequence[Flow]) -> None:
    """HTB with a class for each flow: on the device, or for downloads on an IFB device."""
    device, ports = DEVICE, "dport"
    commands = []
    if case.direction is Direction.DOWNLOAD:
        device, ports = "ifb0", "sport"
        redirect = "action mirred egress redirect dev ifb0"
        commands = [
            "ip link add ifb0 type ifb",
            "ip link set ifb0 up",
            f"tc qdisc add dev {DEVICE} handle ffff: ingress",
            f"tc filter add dev {DEVICE} parent ffff: protocol ip u32 match u32 0 0 {redirect}",
        ]
    total = case.total.bytes_per_s
    burst = max(16 << 10, total // 500)
    ceil = f"ceil {total}bps burst {burst} cburst {burst}"
    commands += [
        f"tc qdisc add dev {device} root handle 1: htb default 0",
        f"tc class add dev {device} parent 1: classid 1:1 htb rate {total}bps {ceil}",
    ]
    for number, (flow, part) in enumerate(zip(flows, parts(case, flows))):
        # HTB lends in proportion to the quantum; one of a packet at least is to be right.
        quantum = 1514 * flow.weight
        classid = f"1:{number + 16:x}"
        own = f"htb rate {int(part)}bps {ceil} quantum {quantum}"
        match = f"match ip {ports} {_FIRST_PORT + number} 0xffff"
        commands += [
            f"tc class add dev {device} parent 1:1 classid {classid} {own}",
            f"tc filter add dev {device} parent 1: protocol ip u32 {match} flowid {classid}",
        ]
    for command in commands:
        subprocess.run(wire.client.inside(*command.split()), check=True, capture_output=True)


def parts(case: Case, flows: Sequence[Flow]) -> list[float]:
    """What each flow is to have while all want more, in bytes per second."""
    total = case.total.bytes_per_s
    floors = sum(flow.floor.bytes_per_s for flow in flows if flow.floor)
    weights = sum(flow.weight for flow in flows if not flow.floor)
    return [
        flow.floor.bytes_per_s if flow.floor else (total - floors) * flow.weight / weights
        for flow in flows
    ]


def _transfer(
    stack: ExitStack, wire: Wire, case: Case, flows: Sequence[Flow], cgroups: Sequence[Cgroup]
) -> list[Moved]:
    upload = case.direction is Direction.UPLOAD
    served, asked = ("receive", "send") if upload else ("send", "receive")
    plans = []
    servers = []
    for number, flow in enumerate(flows):
        end_s = case.seconds if flow.end_s is None else flow.end_s
        address = wire.server.address
        plan = Plan(address, _FIRST_PORT + number, 1, end_s - flow.begin_s, "cubic", [])
        plans.append(json.dumps(plan))
        servers.append(_there(stack, wire, served, plans[-1]))
    begin_s = time.monotonic()
    clients: dict[int, Child] = {}
    for number in sorted(range(len(flows)), key=lambda number: flows[number].begin_s):
        time.sleep(max(0.0, begin_s + flows[number].begin_s - time.monotonic()))
        command = python("benches.traffic", "connect", asked, plans[number])
        clients[number] = Child(stack, _inside(wire, cgroups[number], command))
    ends = [
        (servers[number], clients[number]) if upload else (clients[number], servers[number])
        for number in range(len(flows))
    ]
    return _collect(case, flows, ends)


def _there(stack: ExitStack, wire: Wire, role: str, plan: str) -> Child:
    child = Child(stack, wire.server.inside(*python("benches.traffic", "accept", role, plan)))
    child.ready()
    return child


def _collect(case: Case, flows: Sequence[Flow], ends: Sequence[tuple[Child, Child]]) -> list[Moved]:
    """Wait for the receivers, who are first, in the order in which they end."""
    found: dict[int, Moved] = {}

    def end_s(number: int) -> float:
        return flows[number].end_s or case.seconds

    for number in sorted(range(len(flows)), key=end_s):
        receiver, sender = ends[number]
        received = Received(*receiver.report(case.seconds + PATIENCE_S))
        sender.stop()
        ((flow,),) = (sender.report(),)
        receiver.stop()
        found[number] = Moved(received.begin_s, received.bins[0], Sent(*flow[0]))
    return [found[number] for number in range(len(flows))]


# What it comes to.


def _figures(case: Case, moved: Sequence[Moved]) -> dict[str, float]:
    flows = case.flows()
    retransmitted = sum(each.sent.bytes_retransmitted for each in moved)
    sent = sum(each.sent.bytes_sent for each in moved)
    figures = {"retransmitted_percent": 100 * retransmitted / max(sent, 1)}
    if case.scene in ("weights", "floor"):
        return {**_static(case, flows, moved), **figures}
    return {**_dynamic(case, moved), **figures}


def _static(case: Case, flows: Sequence[Flow], moved: Sequence[Moved]) -> dict[str, float]:
    """How far the parts are from what they should be, and what all together had."""
    begin_s = max(each.begin_s for each in moved) + _SETTLED_S
    end_s = min(each.begin_s + len(each.bins) * BIN_S for each in moved)
    had = [each.between(begin_s, end_s) for each in moved]
    total = case.total.bytes_per_s * (end_s - begin_s)
    errors = [
        count / (part * (end_s - begin_s)) - 1 for count, part in zip(had, parts(case, flows))
    ]
    figures = {"total": sum(had) / total, "least": min(errors), "most": max(errors)}
    if case.scene == "floor":
        figures["floor"] = 1 + errors[0]
    return figures


def _dynamic(case: Case, moved: Sequence[Moved]) -> dict[str, float]:
    """How many milliseconds a change takes until the rates are what they should be."""
    first, *others = moved
    if case.scene == "lend":
        last = max(number for number, count in enumerate(first.bins) if count)
        changed_s = first.begin_s + (last + 1) * BIN_S
        due = float(case.total.bytes_per_s)
        takers: Sequence[Moved] = others
    else:
        changed_s = first.begin_s
        due = case.total.bytes_per_s * case.weights[0] / sum(case.weights)
        takers = [first]
    running = others if case.scene == "lend" else moved
    end_s = min(each.begin_s + len(each.bins) * BIN_S for each in running)
    after_s = changed_s + _SETTLED_S
    whole = sum(each.between(after_s, end_s) for each in moved)
    return {
        "taken_ms": 1000 * _taken_s(takers, changed_s, due),
        "total": whole / case.total.bytes_per_s / (end_s - after_s),
        "around": sum(each.between(changed_s - 0.5, changed_s + 0.5) for each in moved)
        / case.total.bytes_per_s,
    }


def _taken_s(takers: Sequence[Moved], changed_s: float, due: float) -> float:
    """How long until all together have had enough of a rate for some bins."""
    at_s = changed_s
    while at_s < changed_s + 2:
        came = sum(each.between(at_s, at_s + _BINS * BIN_S) for each in takers)
        if came >= _ENOUGH * due * _BINS * BIN_S:
            return at_s - changed_s
        at_s += BIN_S
    return float("inf")
