"""A limit on lines with queueing disciplines of their administrator's, which stay as they were."""

from __future__ import annotations

import subprocess

import pytest
from lab import Lab, lab
from since import needs_option

from pybpfthrottle.model import Rate

pytestmark = pytest.mark.timed

OPTIONS = {
    "a delay": ["CONFIG_NET_SCH_NETEM"],
    "fq": ["CONFIG_NET_SCH_FQ"],
    "a policer": ["CONFIG_NET_SCH_INGRESS", "CONFIG_NET_CLS_MATCHALL", "CONFIG_NET_ACT_POLICE"],
}
# At the client's end of the wire, by tc's words.
QDISCS = {
    "a delay": ["qdisc add dev wire root netem delay 20ms"],
    "fq": ["qdisc add dev wire root fq"],
    "a policer": [
        "qdisc add dev wire handle ffff: ingress",
        "filter add dev wire parent ffff: matchall action police rate 80mbit burst 1m drop",
    ],
}


def tc(own: Lab, words: str, *options: str) -> str:
    """What tc prints in the client's namespace; skip where the kernel lacks these options."""
    done = subprocess.run(
        own.inside("tc", *words.split()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        # In tc's words, and in the kernel's.
        unknown = ("kind is unknown", "classifier not found", "load TC action")
        if options and any(words in done.stdout for words in unknown):
            needs_option(*options, works=False)
        pytest.fail(f"tc {words}: {done.stdout}")
    return done.stdout


@pytest.mark.parametrize("direction", ["download", "upload"])
@pytest.mark.parametrize("name", QDISCS)
def test_a_limit_holds_beside_a_qdisc(name: str, direction: str) -> None:
    """The transfer keeps to its limit, and what the administrator set up is there afterwards."""
    with lab() as own:
        for words in QDISCS[name]:
            tc(own, words, *OPTIONS[name])
        before = tc(own, "qdisc show")
        if direction == "download":
            transfer = own.download(["--download-limit", "200K"], 10)
        else:
            transfer = own.upload(["--upload-limit", "200K"], 10)
        assert tc(own, "qdisc show") == before
    # Beside fq, TCP sends up to 64 KB at once, which is a third of a second's worth.
    assert 0.8 <= transfer.ratio(Rate.parse("200K"), 10) <= 1.1
