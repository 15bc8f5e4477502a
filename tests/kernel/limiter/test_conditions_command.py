"""Bad networks on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Iterator

import pytest
from click.testing import CliRunner
from lab import ENVIRONMENT, TOOL
from targets import PATIENCE_S, Target, target

from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.conditions import profiles
from pybpfthrottle.linux.cgroup import Cgroup


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to have a bad network."""
    with target(scratch) as one:
        yield one


def invoked(*arguments: str) -> Any:
    """What the command gives within this process."""
    return CliRunner().invoke(cli, arguments)


def test_the_profiles_are_listed_with_their_numbers() -> None:
    """For people and as JSON, by the texts that they are written with."""
    lines = invoked("profiles").output.splitlines()
    assert "3g         download 1600kbit, upload 768kbit, delay 300 ms" in lines
    every = json.loads(invoked("profiles", "--json").output)["profiles"]
    assert [one["name"] for one in every][: len(profiles.BUILT_IN)] == [
        one.name for one in profiles.BUILT_IN
    ]
    assert next(one for one in every if one["name"] == "train")["outage"] == "5s/60s"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loss", "1"], "loss: '1' is not a share: give per cent"),
        (["--profile", "5g"], "there is no profile '5g': give edge"),
        (["--loss", "1%", "--prove"], "--prove needs a limit"),
        (["--loss", "1%", "--to", "192.0.2.0/24"], "a bad network is for all traffic"),
        (["--loss", "1%", "--upload-backend", "nftables"], "--upload-backend needs"),
        (
            ["--loss", "1%", "-u", "1M", "--upload-backend", "nftables"],
            "bad networks need the backend ebpf, not nftables",
        ),
        ([], "or what is to be wrong with the network"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments: list[str], said: str) -> None:
    """Before anything is started."""
    result = invoked("run", *arguments, "--", "true")
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_done_to_a_process_is_recorded_as_json(own: Target) -> None:
    """The start says what was asked for, with the seed, and the end what was done."""
    command = [*TOOL, "--pid", str(own.pid), "--upload-loss", "every:4", "--loopback", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as process:
        assert process.stdout
        start = json.loads(process.stdout.readline())
        assert len(own.do("echoes(100)")) == 75
        process.terminate()
        rest, _ = process.communicate(timeout=PATIENCE_S)
    end = json.loads(rest.splitlines()[-1])
    assert start["network"]["asked"] == "upload loss of each 4th packet"
    assert end["event"] == "end"
    assert (end["network"]["upload"]["seen"], end["network"]["upload"]["dropped"]) == (100, 25)


def test_a_command_has_a_bad_network_and_its_end_says_what_was_done() -> None:
    """In a cgroup of its own; nothing but the profile is asked for."""
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.bind(('127.0.0.1', 0)); s.settimeout(0.05); s.sendto(b'x', s.getsockname()); s.recv(9)"
    )
    command = ["run", "--profile", "offline", "--loopback", "--", sys.executable, "-c", code]
    done = subprocess.run(
        [*TOOL, *command], capture_output=True, env=ENVIRONMENT, text=True, check=False
    )
    assert done.returncode == 1
    assert "TimeoutError" in done.stderr or "socket.timeout" in done.stderr
    assert "pybpfthrottle: Bad network: offline.\n" in done.stderr
    assert "pybpfthrottle: upload: dropped 1 of 1\n" in done.stderr
    assert "of packets dropped" not in done.stderr  # by a limit, and there is none
    assert "lost" not in done.stderr
