"""What the gate's keeper grants to whom, and when: its decisions, without a kernel."""

from __future__ import annotations

import socket
import struct

import pytest

from pybpfthrottle.backends.ebpf import keeper
from pybpfthrottle.backends.ebpf.bucket import config_for
from pybpfthrottle.backends.ebpf.keeper import Gate
from pybpfthrottle.backends.ebpf.records import ThrottleAck, ThrottleBucket, ThrottleGate
from pybpfthrottle.model import Rate

MS = 1_000_000
RATE = 1_000_000
SEGMENT = 1448
# In units of the usual window scale, 7.
STEP = RATE * 5 // 1000 // 128 * 128
START = 1_000_000 * MS


class Value:
    """An element of a map."""

    def __init__(self, value):
        self.value = value

    def read(self):
        """The value."""
        return self.value

    def close(self):
        """Nothing is open."""


class World:
    """A gate, the packets that it sends, and a clock."""

    def __init__(self):
        self.now = START
        self.sent = []
        self.told = []
        self.unreachable = set()
        self.bucket = ThrottleBucket(even_at_ns=START)
        config = config_for(Rate(RATE), loopback=False)
        self.gate = Gate(self, 1, ThrottleGate(alive=1), Value(self.bucket), Value(config))

    def send(self, flow):
        """Note the window of a packet, unless its sender cannot be reached."""
        if flow.cookie in self.unreachable:
            return False
        acked, window = struct.unpack_from("!I2xH", flow.packet, 20 + 8)
        assert len(self.sent) < 1000, "the same is sent again and again"
        self.sent.append((flow.cookie, (acked + (window << flow.scale)) & 0xFFFFFFFF))
        return True

    def tell(self, gate, **what):
        """Note what the owner is told."""
        self.told.append(what)

    def acknowledge(self, cookie, acked, *, window=60_000, scale=7, round_trip_ms=0, edge=0):
        """Have the kernel acknowledge data, and the gate decide."""
        self.gate.begin_turn()
        packet = record(
            cookie, acked, window >> scale, scale, round_trip_ms, edge or acked, self.now
        )
        self.gate.take(memoryview(packet), self.now)
        self.gate.end_turn(self.now)

    def turn(self):
        """Let the gate do what is due."""
        self.gate.begin_turn()
        self.gate.end_turn(self.now)

    def edges(self, cookie):
        """Up to where a sender was told that it may send, each time."""
        return [edge for one, edge in self.sent if one == cookie]


def record(cookie, acked, window, scale, round_trip_ms, edge, now, kind=8):
    """An acknowledgement with timestamps, or another option, as the program hands it over."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 52, 0, 0, 64, 6, 0, bytes(4), bytes(4))
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 1, acked, 8 << 4, 0x10, window, 0, 0)
    options = struct.pack("!BBBBII", 1, 1, kind, 10, 100, 100)
    ack = ThrottleAck(
        cookie=cookie,
        at_ns=now,
        gate=1,
        edge=edge,
        segment=SEGMENT,
        round_trip_us=1000 * round_trip_ms,
        length=52,
        window_scale=scale,
    )
    data = bytearray(bytes(ack))
    begin = ThrottleAck.packet.offset
    data[begin : begin + 52] = ip + tcp + options
    return data


class Far:
    """A sender that answers a round trip later, with a window of its own of megabytes."""

    def __init__(self, world, cookie, *, round_trip_ms):
        self.world = world
        self.cookie = cookie
        self.acked = self.told = 1000
        self.round_trip_ms = round_trip_ms

    def edge(self):
        """Up to where it may send."""
        self.told = max(self.told, *self.world.edges(self.cookie), 0)
        return self.told

    def answer(self, at_most=1 << 30):
        """Send what it may, or less; return how much that was."""
        sent = min(self.edge() - self.acked, at_most)
        self.acked += sent
        self.world.acknowledge(
            self.cookie, self.acked, window=1 << 22, round_trip_ms=self.round_trip_ms
        )
        return sent


@pytest.fixture
def socketpair():
    """A Unix socket, and its other end."""
    both = socket.socketpair()
    with both[0], both[1]:
        yield both


@pytest.fixture
def world(monkeypatch):
    """A gate at work."""
    made = World()
    monkeypatch.setattr(keeper.clock, "monotonic_ns", lambda: made.now)
    return made


def test_a_near_sender_has_5_ms_and_then_has_to_wait(world):
    """Its next window opens when the limit has room for it, and not before."""
    world.acknowledge(7, 1000)
    assert world.edges(7) == [1000 + STEP]
    world.bucket.even_at_ns += 5 * MS
    world.acknowledge(7, 1000 + STEP)
    assert world.edges(7)[-1] == 1000 + STEP
    assert world.gate.due_ns > world.now
    world.now += 6 * MS
    world.turn()
    assert world.edges(7)[-1] == 1000 + 2 * STEP


def at_a_high_rate(world):
    """Have a sender get its first window at 100 MB/s; return up to where it may send."""
    world.gate._config.value = config_for(Rate(100 * RATE), loopback=False)
    world.acknowledge(1, 1000, window=8_000_000, scale=9)
    edge = world.edges(1)[-1]
    assert edge - 1000 == 10 * 100 * RATE // 1000 // 512 * 512  # 10 ms
    world.sent.clear()
    return edge


def test_at_a_high_rate_an_acknowledgement_comes_with_the_next_window(world):
    """Each of them costs time, and as soon as the window is due there is one anyway."""
    edge = at_a_high_rate(world)
    world.bucket.even_at_ns = world.now + 8 * MS
    world.acknowledge(1, edge, window=8_000_000, scale=9)
    assert world.sent == []
    world.now = world.gate.due_ns
    world.turn()
    (told,) = world.edges(1)
    assert told > edge


@pytest.mark.parametrize("then_ms", [8, 30])
def test_a_window_that_comes_late_keeps_no_acknowledgement(world, then_ms):
    """Its sender would take the data for lost. What is owed may grow meanwhile, too."""
    edge = at_a_high_rate(world)
    world.bucket.even_at_ns = world.now + (8 if then_ms > 8 else 11) * MS
    world.acknowledge(1, edge, window=8_000_000, scale=9)
    assert world.edges(1) == ([] if then_ms > 8 else [edge])
    world.bucket.even_at_ns = world.now + then_ms * MS
    world.turn()
    assert world.edges(1) == [edge]


def test_a_limit_that_ends_lets_an_acknowledgement_go(world):
    """Even if its window becomes no larger by that."""
    edge = at_a_high_rate(world)
    world.bucket.even_at_ns = world.now + 8 * MS
    world.acknowledge(1, edge, window=8_000_000, scale=9)
    assert world.sent == []
    world.gate.flows[1].promised = edge
    world.gate.open_all()
    assert world.edges(1) == [edge]


def test_no_window_ends_beyond_the_kernels(world):
    """The kernel would drop what is sent there."""
    world.acknowledge(7, 1000, window=4096)
    assert max(world.edges(7)) <= 1000 + 4096


def test_a_far_sender_gets_a_round_trip_in_steps(world):
    """What is on its way to it and back is not waited for, and nothing more is granted."""
    far = Far(world, 7, round_trip_ms=100)
    for _ in range(4):
        world.bucket.even_at_ns = world.now
        far.edge()
        world.sent.clear()
        far.answer()
        world.now += 130 * MS
    granted = far.edge() - far.acked
    assert RATE * 0.095 <= granted <= RATE * 0.11
    assert len(world.edges(7)) >= 10


def test_a_far_sender_gets_no_more_than_a_slow_start_would_use(world):
    """Before it has answered, it is granted three times what its first window was, and a step."""
    far = Far(world, 7, round_trip_ms=100)
    far.answer()
    assert far.edge() - far.acked <= 3 * keeper._FIRST_BYTES + STEP + 128


def test_a_way_that_becomes_longer_gets_a_longer_window_at_once(world):
    """What was as much as a sender could use on the short way is little on the long one."""
    far = Far(world, 7, round_trip_ms=3)
    for _ in range(20):
        far.answer()
        for _ in range(8):
            world.bucket.even_at_ns = world.now
            world.now += MS
            world.turn()
    far.round_trip_ms = 100
    world.bucket.even_at_ns = world.now
    far.answer()
    world.turn()
    assert far.edge() - far.acked >= RATE * 0.095


def test_what_a_sender_does_not_use_is_for_the_others(world):
    """Eight are held up elsewhere, and do not fill their windows; the ninth fills its own."""
    slow = [Far(world, cookie, round_trip_ms=50) for cookie in range(1, 9)]
    fast = Far(world, 9, round_trip_ms=50)
    before = 0
    for turn in range(60):
        arrived = sum(each.answer(at_most=500) for each in slow) + fast.answer()
        # Nothing had been owed for 50 ms at most.
        lag = world.now - 50 * MS
        world.bucket.even_at_ns = max(world.bucket.even_at_ns, lag) + arrived * 1000
        for _ in range(50):
            world.now += MS
            world.turn()
        before = fast.acked if turn == 20 else before
        for each in (*slow, fast):
            each.edge()
        world.sent.clear()
    assert fast.acked - before > 0.8 * RATE * (59 - 20) * 0.05


def test_nobody_runs_ahead_for_what_comes_from_further_away(world):
    """What is on a long way says nothing of when data comes on a short one."""
    world.acknowledge(1, 1000, window=1 << 20, round_trip_ms=150)
    assert world.edges(1)[-1] > 1000
    world.bucket.even_at_ns += 20 * MS
    world.acknowledge(2, 1000, round_trip_ms=3)
    assert world.edges(2)[-1] == 1000


def test_a_short_way_does_not_wait_for_all_that_is_on_a_long_one(world):
    """Only for what comes from there meanwhile."""
    world.acknowledge(1, 1000, window=1 << 20, round_trip_ms=150)
    assert world.edges(1)[-1] - 1000 > 4 * STEP
    world.acknowledge(2, 1000, round_trip_ms=3)
    assert world.edges(2)[-1] > 1000


def test_what_others_take_is_the_same_whoever_asks(world):
    """It is a difference of what is on its way, which is counted in full from wherever it comes."""
    world.gate.share()
    seen = []
    world.gate._others.wait = lambda now, owed, outstanding: seen.append(outstanding)
    world.acknowledge(1, 1000, window=1 << 20, round_trip_ms=150)
    flows = [world.gate.flows[1]]
    world.acknowledge(2, 1000)
    flows.append(world.gate.flows[2])
    world.gate.begin_turn()
    seen.clear()
    for flow in flows:
        world.gate._wait(flow, world.now)
    assert seen[0] == seen[1] > 0


def test_senders_take_turns(world):
    """Those that wait get one window each, in the order in which they came."""
    for cookie in (1, 2, 3):
        world.acknowledge(cookie, 1000)
    assert world.edges(1)[-1] > 1000
    assert world.edges(2)[-1] == world.edges(3)[-1] == 1000
    world.sent.clear()
    world.bucket.even_at_ns += 5 * MS
    world.acknowledge(1, 1000 + STEP)
    world.now += 6 * MS
    world.turn()
    assert [cookie for cookie, edge in world.sent if edge > 1000][-1] == 2


@pytest.mark.parametrize("scale", [0, 7, 10, 14])
def test_a_window_is_no_less_than_its_unit(world, scale):
    """However coarse the unit is, a sender gets on, and the same is not sent for ever."""
    world.acknowledge(
        7, 1000, window=60_000 >> scale << scale if scale < 14 else 1 << 16, scale=scale
    )
    assert world.edges(7)[-1] >= 1000 + min(STEP // 2, 1 << 14)


@pytest.mark.parametrize("scale", [7, 10, 12])
def test_a_far_sender_is_not_held_back_by_the_windows_unit(world, scale):
    """A slow limit's steps of two segments add up to what is on its way."""
    world.gate.begin_turn()
    world.acknowledge(7, 1000, window=1 << 20, scale=scale, round_trip_ms=50)
    assert world.edges(7)[-1] - 1000 >= RATE * 0.045


def test_a_sender_that_cannot_be_reached_is_left_to_the_kernel(world):
    """The others do not wait for it, and it is told."""
    world.unreachable.add(1)
    for cookie in (1, 2):
        world.acknowledge(cookie, 1000)
    world.now += 10 * MS
    world.turn()
    assert world.told == [{"ungated": "unsent"}]
    assert world.edges(2)[-1] > 1000
    assert list(world.gate.flows) == [2]


def test_one_that_waits_and_is_lost_does_not_take_another_with_it(world):
    """It leaves the queue, and nobody else does."""
    world.bucket.even_at_ns += 5 * MS
    for cookie in (1, 2, 3):
        world.acknowledge(cookie, 1000)
    world.unreachable.add(1)
    for _ in range(40):
        world.now += 6 * MS
        world.turn()
    assert {cookie for cookie, edge in world.sent if edge > 1000} == {2, 3}


def test_a_window_of_megabytes_is_taken_back(world):
    """One from before the limit is closed, and opened in steps."""
    world.bucket.even_at_ns += 5 * MS
    world.acknowledge(7, 1000, window=1 << 22, edge=1000 + (1 << 22))
    assert world.edges(7) == [1000]
    world.now += 6 * MS
    world.turn()
    assert world.edges(7)[-1] == 1000 + STEP


@pytest.mark.parametrize("kind", [19, 29, 30])
def test_what_only_the_kernel_may_send_is_left_to_it(world, kind):
    """A signature does not survive another window, and MPTCP's window is not the connection's."""
    packet = record(1, 1000, 400, 7, 0, 1000, world.now, kind)
    world.gate.begin_turn()
    world.gate.take(memoryview(packet), world.now)
    world.gate.end_turn(world.now)
    assert world.told == [{"ungated": "options"}]
    assert world.sent == []
    assert world.gate.flows == {}


def test_nobody_wakes_the_keeper_while_it_looks_at_what_has_come(world):
    """While it does, the gate takes an acknowledgement as one that waits since it began to."""
    waits = []
    world.gate._keeper = world
    send = world.send
    world.send = lambda flow: (waits.append(world.gate.shared.oldest_ns), send(flow))[1]
    world.acknowledge(7, 1000)
    assert waits == [world.now]
    assert world.gate.shared.oldest_ns == 0


class Arrivals:
    """A ring in which one record comes while the last one is handled, and one that is written."""

    fd = -1

    def __init__(self, gate, packets):
        self.gate = gate
        self.left = [None, *packets]

    def records(self):
        """What is there to be read."""
        record = self.left.pop(0) if self.left else None
        return [] if record is None else [memoryview(record)]

    def is_empty(self):
        """Whether nothing has come since."""
        assert self.gate.shared.oldest_ns == 0, "who comes now would wake up nobody"
        return not self.left


def test_the_keeper_looks_once_more_before_it_sleeps(world, socketpair, monkeypatch):
    """What came while it looked at something else had nobody wake it up."""
    own = keeper.Keeper(socketpair[0])
    own._gates[1] = world.gate
    monkeypatch.setattr(world.gate, "close", lambda: None)
    packets = [record(7, acked, 400, 7, 0, acked, world.now) for acked in (1000, 2448)]
    own._ring = Arrivals(world.gate, packets)
    slept = []

    def wait(*, is_idle):
        slept.append((is_idle, own._wakeups._armed_ns))
        if len(slept) == 4:
            socketpair[1].close()
            return {socketpair[0].fileno()}
        return set()

    monkeypatch.setattr(own._wakeups, "wait", wait)
    own.run()
    assert [is_idle for is_idle, _ in slept] == [True, True, False, True]
    assert slept[1][1] == world.now + keeper.helper._WRITING_NS, (
        "not before whoever writes has had a moment"
    )
    assert world.gate.flows[7].acked == 2448


def ones_complement_sum(data):
    """The sum that is all ones where a checksum is right (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "options", [b"", b"\1\1\x08\x0a" + bytes(8), b"\x08\x0a" + bytes(8) + b"\0\0"]
)
def test_each_packet_has_the_checksum_of_its_window_and_time(world, version, options):
    """However often it is sent, and whatever was in the packet that it is made of."""
    addresses = bytes(range(1, 9)) if version == 4 else bytes(range(1, 33))
    length = 20 + len(options)
    if version == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 77, 0, 64, 6, 0) + addresses
    else:
        ip = struct.pack("!IHBB", 6 << 28, length, 6, 64) + addresses
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 5, 1000, length // 4 << 4, 0x10, 400, 0xABCD, 0)
    head = ThrottleAck(
        cookie=7, at_ns=world.now, gate=1, edge=1000, segment=SEGMENT, window_scale=7
    )
    head.length = len(ip + tcp + options)
    data = bytearray(bytes(head))
    at = ThrottleAck.packet.offset
    data[at : at + head.length] = ip + tcp + options
    sent = []
    world.send = lambda flow: sent.append((flow.target[0], bytes(flow.packet))) or True
    world.bucket.even_at_ns += 5 * MS
    world.gate.begin_turn()
    world.gate.take(memoryview(data), world.now)
    world.gate.end_turn(world.now)
    for _ in range(3):
        world.now += 30 * MS
        world.turn()
    assert len({packet for _, packet in sent}) > 1
    for target, packet in sent:
        assert (
            socket.inet_pton(socket.AF_INET if version == 4 else socket.AF_INET6, target)
            == (addresses[len(addresses) // 2 :])
        )
        pseudo = addresses + struct.pack("!HH", 6, length)
        assert ones_complement_sum(pseudo + packet[len(ip) :]) == 0xFFFF


def test_who_had_the_limit_alone_has_its_half_at_once_beside_others() -> None:
    """What was granted before others took much does not count against its half."""
    others, window = keeper._Others(), keeper._WINDOW_NS
    now = 0
    for _ in range(100):  # all of the limit, while nothing else passes
        now += window
        assert others.wait(now, 1, 0) is None
        others.granted(now, window)
    for _ in range(2):  # all is taken by others
        now += window
        turn = others.wait(now, 3 * window, 0)
    assert turn is not None
    assert turn <= 0
    others.granted(now, window)
    assert others.wait(now, 3 * window, window) == 2 * window
