"""What is written into nftables for a throttle, and what is read from there. Pure.

Commands are in nft's own language: its JSON input has no cgroups (nft 1.0.6). Answers are JSON.
"""

from __future__ import annotations

from typing import Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends.nft import FAMILY, Listing, Member, comment, of, table_name
from pybpfthrottle.backends.recorded import State
from pybpfthrottle.model import Counters, Direction, Limits, Rate

# A bucket that is smaller than a packet never lets it pass. GSO and GRO make packets of 64 KB.
BURST_BYTES = 64 * 1024
# The kernel multiplies the size of the bucket, which is a second and the burst, by a second in
# nanoseconds, in 64 bits (net/netfilter/nft_limit.c). Old kernels do not notice an overflow.
MAX_RATE = Rate((2**64 - 1) // 10**9 - BURST_BYTES)
# Behind filters (0) and security (50): what a firewall drops is not charged.
_PRIORITY = 150

# Of four bytes each.
_TCP_HEADER_WORDS = range(5, 16)

_HOOKS = {
    Direction.DOWNLOAD: ("input", "iifname"),
    Direction.UPLOAD: ("output", "oifname"),
}


def create(
    throttle_id: str,
    limits: Limits,
    members: Sequence[Member],
    *,
    loopback: bool = False,
    counters: Mapping[Direction, Counters] = {},
) -> str:
    """Return the commands that create a throttle's table; they fail if there is one."""
    return "".join(
        f"{line}\n"
        for part in (
            [f"create table {_table(throttle_id)}"],
            *(
                _chains(throttle_id, direction, counters.get(direction, Counters()))
                for direction in limits
            ),
            *(_limit(throttle_id, direction, rate, loopback) for direction, rate in limits.items()),
            *(_matches(throttle_id, direction, members) for direction in limits),
        )
        for line in part
    )


def set_limit(
    throttle_id: str, direction: Direction, rate: Optional[Rate], *, loopback: bool = False
) -> str:
    """Return the commands that change a limit; the counters continue."""
    chain = f"{_table(throttle_id)} {_limiting(direction)}"
    lines = [f"flush chain {chain}", *_limit(throttle_id, direction, rate, loopback)]
    return "".join(f"{line}\n" for line in lines)


def set_members(
    throttle_id: str, directions: Sequence[Direction], members: Sequence[Member]
) -> str:
    """Return the commands that limit these cgroups instead; the counters continue."""
    lines = []
    for direction in directions:
        lines.append(f"flush chain {_table(throttle_id)} {direction}")
        lines += _matches(throttle_id, direction, members)
    return "".join(f"{line}\n" for line in lines)


def delete(throttle_id: str) -> str:
    """Return the command that deletes a throttle's table, with all that is in it."""
    return f"delete table {_table(throttle_id)}\n"


def is_ours(listing: Listing, throttle_id: str) -> bool:
    """Whether a table that has a throttle's name is that throttle's, and holds nothing else."""
    directions = list(Direction)
    counters = {name for direction in directions for name in _counters(direction)}
    chains = {name for direction in directions for name in (str(direction), _limiting(direction))}
    found = {one["name"] for one in of("counter", listing)}
    return (
        bool(found)
        and found <= counters
        and {one["name"] for one in of("chain", listing)} <= chains
        and all(one.get("comment") == comment(throttle_id) for one in of("rule", listing))
        and all(set(one) <= {"metainfo", "table", "counter", "chain", "rule"} for one in listing)
    )


def read(listing: Listing, directions: Sequence[Direction], members: int) -> State:
    """Return what a throttle's table, which limits so many cgroups, has counted.

    Raises KeyError, TypeError or ValueError for what nft never prints.
    """
    counted = {one["name"]: one for one in of("counter", listing)}
    rules = [str(one["chain"]) for one in of("rule", listing)]
    found = {}
    intact = True
    for direction in directions:
        matched = rules.count(str(direction)) == members
        intact = intact and matched and _limiting(direction) in rules
        if not all(name in counted for name in _counters(direction)):
            intact = False
            found[direction] = Counters()
            continue
        seen, total, dropped = (counted[name] for name in _counters(direction))
        found[direction] = Counters(
            int(seen["packets"]),
            *(int(one[what]) for one in (total, dropped) for what in ("packets", "bytes")),
        )
    return State(found, intact)


def _table(throttle_id: str) -> str:
    return f"{FAMILY} {table_name(throttle_id)}"


def _limiting(direction: Direction) -> str:
    return f"limit-{direction}"


def _counters(direction: Direction) -> tuple[str, str, str]:
    """Return the names of the counters of all packets, of those limited, and of those dropped."""
    return f"{direction}-seen", f"{direction}-limited", f"{direction}-dropped"


def _chains(throttle_id: str, direction: Direction, counters: Counters) -> Iterator[str]:
    """Create what rules refer to; counters begin at these values."""
    table, hook = _table(throttle_id), _HOOKS[direction][0]
    begin = (
        (counters.program_calls, 0),
        (counters.packets_total, counters.bytes_total),
        (counters.packets_dropped, counters.bytes_dropped),
    )
    for name, (packets, count) in zip(_counters(direction), begin):
        yield f"add counter {table} {name} {{ packets {packets} bytes {count} ; }}"
    yield f"add chain {table} {_limiting(direction)}"
    yield (
        f"add chain {table} {direction}"
        f" {{ type filter hook {hook} priority {_PRIORITY} ; policy accept ; }}"
    )


def _limit(
    throttle_id: str, direction: Direction, rate: Optional[Rate], loopback: bool
) -> Iterator[str]:
    """Count all packets, and drop those over the limit.

    All packets pass this chain once, so that its limit is shared by all cgroups.
    """
    seen, limited, dropped = _counters(direction)
    statements = [f"counter name {seen}"]
    if not loopback:
        statements.append(f'{_HOOKS[direction][1]} "lo" accept')
    statements.append(f"counter name {limited}")
    if rate is not None and rate.is_blocked:
        statements += [*_pure_acknowledgements(), f"counter name {dropped} drop"]
    elif rate is not None:
        statements[-1] += (
            f" limit rate over {rate.bytes_per_s} bytes/second burst {BURST_BYTES} bytes"
            f" counter name {dropped} drop"
        )
    for statement in statements:
        yield _rule(throttle_id, _limiting(direction), statement)


def _pure_acknowledgements() -> Iterator[str]:
    """Let TCP packets without data pass, by the lengths of headers.

    nftables cannot subtract. Where IPv4 or IPv6 has options or extensions they are dropped too.
    """
    for words in _TCP_HEADER_WORDS:
        yield f"ip hdrlength 5 ip length {20 + 4 * words} tcp doff {words} accept"
        yield f"ip6 nexthdr tcp ip6 length {4 * words} tcp doff {words} accept"


def _matches(throttle_id: str, direction: Direction, members: Sequence[Member]) -> Iterator[str]:
    """Send the packets of cgroups to the limiting chain, each packet once."""
    for member in members:
        yield _rule(throttle_id, str(direction), f"{member.matched} goto {_limiting(direction)}")


def _rule(throttle_id: str, chain: str, statement: str) -> str:
    return f'add rule {_table(throttle_id)} {chain} {statement} comment "{comment(throttle_id)}"'
