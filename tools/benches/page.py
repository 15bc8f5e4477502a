"""How long chromium takes to load a page through a profile, and how long the profile predicts.

It is a small page with six pictures of 50 KB. load s: from the navigation to the event "load", the
median of the rounds. predicted s: the round trips until the pictures are asked for, and then their
packets one after another at the profile's rate, in slow starts. "none" is no profile, which tells
what the browser itself takes.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple, Optional

from benches.child import TransferError
from benches.servers import SERVERS, Place, has_http3, serve
from benches.surroundings import ENVIRONMENT, python
from benches.table import show
from pybpfthrottle.conditions import profiles
from pybpfthrottle.conditions.profiles import Profile
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.errors import Error, LimitError
from pybpfthrottle.model import Direction

_PICTURES, _PICTURE_BYTES = 6, 50_000
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
_PAGE = """<p id=t>none</p><script>
window.onload = () => { t.textContent = 'LOAD ' + Math.round(performance.now()); };
</script>"""
_NEEDED = ("chromium", "nginx", "openssl")
_OPTIONS = ("--timeout=60000", "--dump-dom")
_PATIENCE_S = 120
# Packets; Linux, and RFC 9002 for QUIC.
_FIRST_WINDOW = 10


class Version(NamedTuple):
    """A version of HTTP as the browser uses it.

    ``connects`` is how many round trips pass until it can ask for the page. So many round trips
    ``later`` it asks for the pictures: each connection for one, or a single one for all. Their
    packets have ``packet_bytes`` of payload.
    """

    scheme: str
    connects: int
    later: tuple[int, ...]
    packet_bytes: int


# Of TLS 1.3 that is one for TCP and one for TLS, and QUIC does both in one. HTTP/1.1 asks for one
# picture by the connection that it has, and opens five more for the others.
VERSIONS = {
    "1.1": Version("http", 1, (1, 2, 2, 2, 2, 2), 1448),
    "2": Version("https", 2, (1,), 1448),
    "3": Version("https", 1, (1,), 1200),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--profiles", default="none,3g,4g", metavar="NAMES")
    add("--versions", default=",".join(VERSIONS), metavar="NUMBERS", help="of HTTP")
    add("--rounds", type=int, default=3, help="rounds; the median counts")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each profile and version; the exit status."""
    missing = [name for name in _NEEDED if not shutil.which(name, path=SERVERS)]
    if missing:
        print(f"bench page: please install {', '.join(missing)}", file=sys.stderr)
        return 2
    try:
        chosen = [(name, _profile(name)) for name in arguments.profiles.split(",")]
        versions = {number: VERSIONS[number] for number in arguments.versions.split(",")}
    except KeyError as error:
        print(f"bench page: there is no version {error}", file=sys.stderr)
        return 2
    except Error as error:
        print(f"bench page: {error}", file=sys.stderr)
        return 2
    if "3" in versions and not has_http3():
        print("HTTP/3: left out, aioquic is missing", file=sys.stderr)
        del versions["3"]
    table: dict[str, dict[str, float]] = {}
    for (name, profile), number in product(chosen, versions):
        row = f"{name}, HTTP/{number}"
        try:
            table[row] = _row(profile, number, arguments.rounds)
        except (TransferError, Error) as error:
            print(f"{row}: {error}", file=sys.stderr)
            continue
        print(row, table[row], file=sys.stderr)
    return show(table, as_json=arguments.json) if table else 1


def _profile(name: str) -> Optional[Profile]:
    """Return a profile with a download rate, which is predicted for, or None for "none"."""
    found = None if name == "none" else profiles.find(name)
    if found and Direction.DOWNLOAD not in found.rates:
        raise LimitError(f"the profile {name} has no download rate: nothing can be predicted")
    return found


def _row(profile: Optional[Profile], version: str, rounds: int) -> dict[str, float]:
    load_s = median(_load_s(profile, version) for _ in range(rounds))
    row = {"load s": round(load_s, 3)}
    if profile:
        predicted = predicted_s(profile, VERSIONS[version])
        row.update({"predicted s": round(predicted, 3), "ratio": round(load_s / predicted, 3)})
    return row


def predicted_s(profile: Profile, version: Version) -> float:
    """Return how long the page takes if the browser itself takes no time.

    The packets of all connections pass one queue at the profile's rate, and are late by its delay.
    Each acknowledgement is there at once, and lets two more packets go: a slow start.
    """
    delay_s = profile.conditions().download.delay_s
    packet_s = version.packet_bytes / profile.rates[Direction.DOWNLOAD].bytes_per_s
    each = _PICTURES * _PICTURE_BYTES / len(version.later) / version.packet_bytes
    left = [math.ceil(each)] * len(version.later)
    # When which connection may send how many packets.
    allowed = [
        ((version.connects + later) * delay_s, number, _FIRST_WINDOW)
        for number, later in enumerate(version.later)
    ]
    heapq.heapify(allowed)
    arrives_s = free_s = 0.0
    while allowed:
        now_s, number, count = heapq.heappop(allowed)
        for _ in range(min(count, left[number])):
            left[number] -= 1
            free_s = max(free_s, now_s) + packet_s
            arrives_s = free_s + delay_s
            heapq.heappush(allowed, (arrives_s, number, 2))
    return arrives_s


def _load_s(profile: Optional[Profile], version: str) -> float:
    """Load the page once, with a browser that knows nothing yet. Raises TransferError."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        directory.chmod(0o755)
        wire = stack.enter_context(Wire())
        place = Place(wire.server.address, directory)
        serve(stack, wire.server, place, _files())
        browser = place.chromium_http3 if version == "3" else place.chromium
        url = f"{VERSIONS[version].scheme}://{place.address}/page.html"
        command = [*browser.split(), *_OPTIONS, url]
        if profile:
            limit = python("pybpfthrottle", "run", "-q", "--profile", profile.name, "--")
            command = [*limit, *command]
        try:
            done = subprocess.run(
                wire.client.inside(*command),
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                env={**ENVIRONMENT, "HOME": str(directory), "TMPDIR": str(directory)},
            )
        except subprocess.TimeoutExpired:
            raise TransferError(f"the browser did not end within {_PATIENCE_S} s") from None
    found = re.search(r"LOAD (\d+)", done.stdout)
    if not found:
        raise TransferError(f"the page did not load: {done.stderr.strip()[-200:]}")
    return int(found[1]) / 1e3


def _files() -> dict[str, bytes]:
    names = [f"{number}.png" for number in range(_PICTURES)]
    page = _PAGE + "".join(f"<img src={name}>" for name in names)
    pictures = {name: _PNG + os.urandom(_PICTURE_BYTES) for name in names}
    return {"page.html": page.encode(), **pictures}
