"""Limits for some networks only: real transfers, by processes and by cgroups."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Iterator

import pytest
from by_backend import throttles, tool
from lab import ENVIRONMENT, TOOL, Lab, lab
from targets import eventually

from pybpfthrottle.model import Rate

RATE = Rate.parse("200K")
LIMIT = ("--download-limit", str(RATE.bytes_per_s), "--upload-limit", str(RATE.bytes_per_s))
SECONDS = 1
# What passes at once, before a limit takes hold.
BURST = 400_000


@pytest.fixture(scope="module", params=[False, True], ids=["IPv4", "IPv6"])
def own(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two namespaces with a server, which sends no more than 10 MB/s."""
    with lab(ipv6=request.param, fastest=Rate.parse("10M")) as made:
        yield made


def server(own: Lab) -> str:
    """Its address."""
    return own.wire.server.address6 if "[" in own.url else own.wire.server.address


def connections(pid: int) -> list[dict[str, Any]]:
    """The established ones of a process, as the command sockets tells of them."""
    told = json.loads(tool("sockets", "--pid", str(pid), "--json").stdout)
    return [one for one in told["processes"][0]["sockets"] if one["state"] == "established"]


@pytest.mark.parametrize(
    ("options", "limited"),
    [
        ((), True),
        (("--except", "{}"), False),
        (("--to", "{}"), True),
        (("--to", "{}/20"), True),
        (("--to", "192.0.2.0/24", "--to", "2001:db8::/32"), False),
        (("--to", "{}/20", "--except", "{}"), False),
        (("--traffic", "internet"), False),
        (("--traffic", "local"), True),
        (("--traffic", "internet", "--to", "{}"), True),
    ],
)
def test_only_what_is_meant_is_limited(own: Lab, options: tuple[str, ...], limited: bool) -> None:
    """Limited it gets at most what the limit allows, without 20 times that."""
    meant = [option.format(server(own)) for option in options]
    download = own.download([*LIMIT, *meant], SECONDS)
    size = sum(count for _, count in download.events)
    assert (size < RATE.bytes_per_s * SECONDS * 1.1 + BURST) is limited, size


def test_a_limit_for_one_direction_is_for_some_networks_too(own: Lab) -> None:
    """The window of what is not meant stays as it is."""
    options = [*LIMIT[:2], "--except", server(own)]
    size = sum(count for _, count in own.download(options, SECONDS).events)
    assert size > RATE.bytes_per_s * SECONDS * 1.1 + BURST


def test_a_socket_tells_that_its_network_is_not_limited(own: Lab) -> None:
    """So does JSON, and the list of what is in force has the networks."""
    curl = own.inside("curl", "--globoff", "-sN", "--max-time", "20", own.url)
    with subprocess.Popen(curl, stdout=subprocess.DEVNULL) as running:
        limit = [*TOOL, "--pid", str(running.pid), *LIMIT, "--except", server(own), "--json"]
        with subprocess.Popen(
            limit, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as limiting:
            try:
                assert limiting.stdout
                assert json.loads(limiting.stdout.readline())["event"] == "start"
                [listed] = throttles(limiting.pid)
                alone = f"{server(own)}/{32 if '.' in server(own) else 128}"
                assert listed["traffic"] == {"kind": "all", "to": [], "except": [alone]}
                assert listed["target"]["text"].endswith(f"(curl) (--except {alone})")
                [found] = eventually(lambda: connections(running.pid))
                assert not found["covered"]
                assert found["reason"]["code"] == "exempt"
                assert found["reason"]["text"].startswith(f"{server(own)} is not among what is")
            finally:
                limiting.terminate()
                running.kill()
                limiting.communicate()


def test_a_backend_without_networks_refuses_them() -> None:
    """And no network is ignored silently."""
    backend = ("--download-limit", "1M", "--download-backend", "nftables")
    refused = tool("run", *backend, "--to", "192.0.2.1", "--", "true")
    assert refused.returncode == 2
    assert "--to works only with the backend ebpf, not with nftables" in refused.stderr
    wrong = tool("run", "--download-limit", "1M", "--to", "example.org", "--", "true")
    assert wrong.returncode == 2
    assert "'example.org' is not a network: give an address, or a network" in wrong.stderr
