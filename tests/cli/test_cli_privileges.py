"""Without root, or without a capability: one clear line says what is missing."""

from __future__ import annotations

import os
import subprocess

import pytest

LIMIT = ("--download-limit", "1M", "-q")
# Root without CAP_DAC_OVERRIDE may not make a cgroup below the root cgroup: nobody may write there.
NO_BPF = ["setpriv", "--bounding-set=-all,+dac_override", "--inh-caps=-all"]


def test_run_of_a_user_is_125(tool, anybody):
    """Run as nobody fails with 125, and says that root is needed."""
    result = tool.run("run", *LIMIT, "--", "true", prefix=anybody)
    assert result.status == 125
    assert "root" in result.complaint


def test_a_cgroup_cannot_be_limited_by_a_user(tool, anybody, scratch, attached):
    """--cgroup as nobody fails with 1, names the capabilities and what to do."""
    cgroup = scratch.cgroup()
    result = tool.run("--cgroup", cgroup.path, *LIMIT, prefix=anybody)
    assert result.status == 1
    assert "CAP_BPF" in result.complaint
    assert "CAP_NET_ADMIN" in result.complaint
    assert "root" in result.complaint
    assert attached(cgroup) == ()


def test_a_pid_cannot_be_limited_by_a_user(tool, anybody, scratch):
    """--pid as nobody fails with 1 and one line."""
    process = scratch.process(scratch.cgroup())
    result = tool.run("--pid", str(process.pid), *LIMIT, prefix=anybody)
    assert result.status == 1
    assert "CAP_BPF" in result.complaint


def test_a_unit_cannot_be_limited_by_a_user(tool, anybody, scratch):
    """--unit as nobody fails with 1 and one line."""
    name = scratch.name()
    scratch.cgroup(name=f"{name}.service")
    result = tool.run("--unit", name, *LIMIT, prefix=anybody)
    assert result.status == 1
    assert "CAP_BPF" in result.complaint


def test_the_demo_of_a_user_is_one_line(tool, own_loopback, anybody):
    """The demo as nobody fails with 1, and one line on standard error says what is missing."""
    result = tool.run("demo", "--seconds", "2", prefix=[*own_loopback, *anybody])
    assert result.status == 1
    assert "root" in result.complaint


@pytest.mark.parametrize(
    "arguments", [("list",), ("apply", "--dry-run"), ("supervise",)], ids=" ".join
)
def test_throttles_cannot_be_found_by_a_user(tool, anybody, arguments):
    """Which capabilities are missing, and what to do, instead of an errno."""
    result = tool.run(*arguments, prefix=anybody)
    assert result.status == 1
    assert "BPF_MAP_GET_NEXT_ID gives EPERM: this process lacks CAP_BPF" in result.complaint
    assert "root" in result.complaint


def test_explain_does_not_claim_what_a_user_cannot_see(tool, anybody):
    """That nothing limits a process would be a guess."""
    result = tool.run("explain", str(os.getpid()), prefix=anybody)
    assert result.status == 0
    assert result.err.startswith("pybpfthrottle: There are no rules in ")
    assert "What limits it now cannot be seen: " in result.text
    assert "this process lacks CAP_BPF" in result.text
    assert "Nothing limits it now" not in result.text


@pytest.mark.parametrize("arguments", [("top", "--once"), ("top", "--plain"), ("monitor",)])
def test_nothing_is_counted_for_a_user(tool, anybody, arguments):
    """Nobody is told which capabilities are missing, and what to do."""
    result = tool.run(*arguments, prefix=anybody)
    assert result.status == 1
    assert "CAP_BPF" in result.complaint
    assert "root" in result.complaint


def test_the_full_screen_of_a_user_is_one_line(tool, anybody):
    """The bare command of nobody on a terminal leaves the screen as it is, and says the same."""
    process, terminal = tool.start_on_terminal(prefix=anybody)
    assert tool.finish(process).status == 1
    assert terminal.text.startswith("pybpfthrottle: error: traffic cannot be counted: ")
    assert "CAP_BPF" in terminal.text
    assert "\x1b" not in terminal.text


def test_a_user_sees_the_sockets_of_own_processes(tool, anybody):
    """Nobody sees the sockets of nobody's processes, and one line tells that root knows more."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0))\n"
    code += "print(s.getsockname()[1], flush=True); input()"
    server = subprocess.Popen(
        [*anybody, tool.python, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        port = server.stdout.readline().strip()
        result = tool.run("sockets", "--pid", str(server.pid), prefix=anybody)
        server.stdin.close()
    assert result.status == 0
    assert "root" in result.complaint
    assert f"127.0.0.1:{port}" in result.text
    assert "listen" in result.text
    assert "not known" in result.text


def test_a_user_does_not_see_the_sockets_of_others(tool, anybody, scratch):
    """The sockets of root's process as nobody are 1, and one line that names the capability."""
    process = scratch.process(scratch.cgroup())
    result = tool.run("sockets", "--pid", str(process.pid), prefix=anybody)
    assert (result.status, result.out) == (1, b"")
    assert "CAP_SYS_PTRACE" in result.complaint


def test_backends_are_listed_as_unavailable_to_a_user(tool, anybody):
    """--list-backends as nobody is no error: it says why nothing is available."""
    result = tool.run("--list-backends", prefix=anybody)
    assert (result.status, result.err) == (0, "")
    lines = [line for line in result.text.splitlines() if "ebpf" in line]
    assert len(lines) == 2
    assert all("❌ unavailable: " in line and "CAP_BPF" in line for line in lines)


@pytest.mark.parametrize("arguments", [("run", "--download-limit", "x", "true"), ("--pid", "0")])
def test_usage_comes_before_privileges(tool, anybody, arguments):
    """Wrong usage is 2 for everybody."""
    assert tool.run(*arguments, prefix=anybody).usage_error


def test_run_without_capabilities_is_125(tool):
    """Root without the right to use bpf(2) gets 125 and the names of those that are missing."""
    result = tool.run("run", *LIMIT, "--", "true", prefix=NO_BPF)
    assert result.status == 125
    assert "CAP_BPF" in result.complaint
    assert "CAP_NET_ADMIN" in result.complaint


def test_run_without_any_capability_is_125(tool):
    """Root that may not even make a cgroup gets 125 and one line."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    result = tool.run("run", *LIMIT, "--", "true", prefix=prefix)
    assert result.status == 125
    assert "cgroup" in result.complaint


@pytest.mark.parametrize("held", ["bpf", "net_admin"])
def test_the_missing_one_of_two_capabilities_is_named(tool, scratch, held):
    """With one of CAP_BPF and CAP_NET_ADMIN only the other is said to be missing."""
    cgroup = scratch.cgroup()
    prefix = ["setpriv", f"--bounding-set=-all,+perfmon,+{held}"]
    backend = ("--download-backend", "ebpf")
    result = tool.run("--cgroup", cgroup.path, *LIMIT, *backend, prefix=prefix)
    missing = {"bpf": "CAP_NET_ADMIN", "net_admin": "CAP_BPF"}[held]
    assert result.status == 1
    assert f"lacks {missing};" in result.err.splitlines()[-1]


def test_the_two_capabilities_are_enough(tool):
    """CAP_BPF and CAP_NET_ADMIN are all that the limit needs of root's capabilities."""
    prefix = ["setpriv", "--bounding-set=-all,+dac_override,+bpf,+net_admin"]
    limits = (*LIMIT, "--upload-limit", "1M")
    result = tool.run("run", *limits, "--", "sh", "-c", "exit 3", prefix=prefix)
    assert (result.status, result.err) == (3, "")


def test_nobody_becomes_another_user_without_the_right(tool):
    """--user without CAP_SETUID is 125, and the user is named."""
    prefix = ["setpriv", "--bounding-set=-setuid,-setgid"]
    result = tool.run("run", *LIMIT, "--user", "nobody", "--", "true", prefix=prefix)
    assert result.status == 125
    assert "nobody" in result.complaint


def test_a_user_that_is_refused_runs_nothing(tool, tmp_path):
    """When --user is refused the command is not executed as root instead."""
    prefix = ["setpriv", "--bounding-set=-setuid,-setgid"]
    touch = ("touch", str(tmp_path / "started"))
    tool.run("run", *LIMIT, "--user", "nobody", "--", *touch, prefix=prefix)
    assert not (tmp_path / "started").exists()
