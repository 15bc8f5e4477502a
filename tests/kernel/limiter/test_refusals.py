"""Attaching in any company: each conflict is made for real, and its cause is named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest
from foreign import other
from lab import ENVIRONMENT, TOOL, attached, lab
from since import since

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import attached as attachments
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.bpf.abi import AttachType, Cmd
from pybpfthrottle.errors import AttachError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy

pytestmark = pytest.mark.timed


EGRESS = AttachType.CGROUP_INET_EGRESS
UPLOAD = {Direction.UPLOAD: Rate.parse("1M")}
REFUSING = [sys.executable, str(Path(__file__).parents[1].joinpath("refusing.py"))]


def policy(method: str) -> Options:
    """Attach by one method."""
    return Options(attach=dict.fromkeys(Direction, AttachPolicy(method)))


@pytest.fixture
def child(scratch: Cgroup) -> Iterator[Cgroup]:
    """A cgroup below the test's own."""
    below = scratch.create_child("child")
    yield below
    below.remove(patience_s=5)


@pytest.mark.parametrize("method", ["auto", "legacy"])
@pytest.mark.parametrize("how", ["SINGLE", "ALLOW_OVERRIDE"])
def test_an_exclusive_program_on_the_cgroup_is_named(scratch, how, method) -> None:
    """The error names the program that allows none beside it, and leaves it attached."""
    with other(scratch, how) as theirs:
        with pytest.raises(AttachError, match=rf"attached there.*theirs \(id {theirs.info().id},"):
            throttle.apply([scratch], UPLOAD, options=policy(method))
        assert attached(scratch) == [theirs.info().id]


@pytest.mark.parametrize("method", ["auto", "legacy"])
def test_an_exclusive_program_above_is_named(scratch, child, method) -> None:
    """The error names the ancestor and its program."""
    with other(scratch, "SINGLE") as theirs:
        with pytest.raises(AttachError) as caught:
            throttle.apply([child], UPLOAD, options=policy(method))
        assert f"to {scratch.path}, above it" in str(caught.value)
        assert f"theirs (id {theirs.info().id}" in str(caught.value)
        assert "loaded by root" in str(caught.value)


@pytest.mark.parametrize("method", [pytest.param("link", marks=since("5.7")), "legacy"])
@pytest.mark.parametrize("how", ["ALLOW_MULTIPLE", pytest.param("link", marks=since("5.7"))])
@pytest.mark.parametrize("place", ["same", "above"])
def test_programs_that_share_are_no_obstacle(scratch, child, how, place, method) -> None:
    """Beside or below a program that allows others a limit is attached, and goes alone."""
    target = scratch if place == "same" else child
    with other(scratch, how) as theirs:
        with throttle.apply([target], UPLOAD, options=policy(method)):
            assert len(attached(target)) == (2 if place == "same" else 1)
        assert attached(scratch) == [theirs.info().id]


@pytest.mark.parametrize("method", [pytest.param("link", marks=since("5.7")), "legacy"])
def test_below_one_that_may_be_overridden_a_limit_is_refused(scratch, child, method) -> None:
    """The error names the ancestor's program, and nothing is attached.

    The kernel would attach it; but then a firewall above would run no more for what is below, so
    this test once asserted the wrong thing: that an ancestor's program does not stand in the way.
    """
    with other(scratch, "ALLOW_OVERRIDE") as theirs:
        with pytest.raises(AttachError, match=rf"switch off.*theirs \(id {theirs.info().id},"):
            throttle.apply([child], UPLOAD, options=policy(method))
        assert attached(child) == []
        assert attached(scratch) == [theirs.info().id]


@since("5.7")
def test_the_65th_program_is_refused_with_the_bound(scratch: Cgroup) -> None:
    """The error says how many programs a cgroup takes."""
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(other(scratch, "link"))
        with pytest.raises(AttachError, match="64 programs"):
            throttle.apply([scratch], UPLOAD)


@since("5.8")
def test_the_holder_of_a_link_is_named(scratch: Cgroup) -> None:
    """A description of a program has its link and the process that holds it."""
    with other(scratch, "link") as theirs:
        [found] = attachments.at(scratch, [EGRESS])
        assert found.program_id == theirs.info().id
        assert f"held by {os.getpid()} (" in str(found)


RUN = [*TOOL, "run", "--download-limit", "2M", "--shape", "police"]


def limited_transfer(rules: list[str], *options: str, **variables: str) -> tuple[float, str]:
    """The ratio of a download below run where bpf(2) refuses some commands, and its messages."""
    with lab() as own:
        curl = ["curl", "-sN", "--max-time", "4", own.url]
        command = [*REFUSING, *rules, "--", *RUN, *options, "--", *curl]
        with subprocess.Popen(
            own.inside(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **variables},
        ) as client:
            out, err = client.communicate(timeout=60)
    return len(out) / (Rate.parse("2M").bytes_per_s * 4), err.decode()


def test_a_kernel_without_links_limits_by_the_legacy_call() -> None:
    """With LINK_CREATE refused with EINVAL, as before Linux 5.7, the limit is in force as well."""
    ratio, messages = limited_transfer(
        [f"{Cmd.LINK_CREATE}={errno.EINVAL}", f"{Cmd.MAP_LOOKUP_BATCH}={errno.EINVAL}"], "-v"
    )
    assert 0.9 <= ratio <= 1.1
    assert "Modern attach failed with EINVAL, falling back to legacy method..." in messages
    assert "Successfully attached using legacy method!" in messages


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_another_refusal_of_links_is_explained(number: int) -> None:
    """Where links alone are refused the error names the ways out, and nothing ran."""
    ratio, messages = limited_transfer([f"{Cmd.LINK_CREATE}={number}"])
    assert ratio == 0
    assert messages.startswith("pybpfthrottle: error: cannot attach")
    assert len(messages.splitlines()) == 1
    if number != errno.ENOSYS:
        assert "seccomp" in messages
        assert "--bpf-attach-method legacy" in messages
        assert "fallback_errnos" in messages


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_fallback_errnos_may_add_others(tmp_path: Path, number: int) -> None:
    """A config file lets auto fall back where a security module refuses links."""
    name = errno.errorcode[number]
    config = tmp_path / "pybpfthrottle" / "config.toml"
    config.parent.mkdir()
    config.write_text(f'[bpf]\nfallback_errnos = ["EINVAL", "{name}"]\n')
    config.chmod(0o644)
    ratio, messages = limited_transfer(
        [f"{Cmd.LINK_CREATE}={number}"], "-vv", XDG_CONFIG_HOME=str(tmp_path)
    )
    assert 0.9 <= ratio <= 1.1
    assert f"Found OSError with errno {number} in error chain" in messages
    assert f"Modern attach failed with {name}, falling back" in messages


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([f"all={errno.ENOSYS}"], "CONFIG_BPF_SYSCALL"),
        ([f"all={errno.EPERM}"], "seccomp"),
        ([f"{Cmd.MAP_CREATE}={errno.EPERM}"], "seccomp"),
    ],
)
def test_bpf_refused_as_a_whole_is_explained(rules: list[str], said: str) -> None:
    """Without bpf(2) there is one line that says why, and status 125."""
    done = subprocess.run(
        [*REFUSING, *rules, "--", *RUN, "--", "true"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 125
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_queries_refused_do_not_matter() -> None:
    """A limit needs no BPF_PROG_QUERY."""
    ratio, _ = limited_transfer([f"{Cmd.PROG_QUERY}={errno.EPERM}"])
    assert 0.9 <= ratio <= 1.1
