"""What the command of ``run`` finds: its streams, environment, signals, limits, cgroup, user."""

from __future__ import annotations

import grp
import json
import os
import pwd
import resource
import signal
import subprocess

import pytest

LIMIT = ("run", "-q", "--download-limit", "1M")


def status_of(text, field):
    """A signal set of /proc/PID/status as a number."""
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1], 16)


def test_streams_are_the_commands_byte_for_byte(tool):
    """Binary data goes through standard input and output unchanged."""
    data = os.urandom(300_000)
    result = tool.run(*LIMIT, "--", "cat", input=data)
    assert (result.status, result.err) == (0, "")
    assert result.out == data


def test_the_summary_is_not_on_standard_output(tool):
    """Standard output is the command's alone, without -q too."""
    result = tool.run("run", "--download-limit", "1M", "--upload-limit", "2M", "--", "echo", "x")
    assert result.out == b"x\n"
    lines = result.err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["download", "upload"]
    assert all(line.startswith("pybpfthrottle: ") and " actual=" in line for line in lines)


def test_standard_error_is_the_commands_too(tool):
    """With -q nothing but the command's own lines is on standard error."""
    result = tool.run(*LIMIT, "--", "sh", "-c", "echo complaint >&2")
    assert (result.out, result.err) == (b"", "complaint\n")


def test_the_environment_is_passed_on(tool):
    """The command has the caller's environment, and nothing else."""
    result = tool.run(*LIMIT, "--", "env", "-0", environment={"CLITEST": "a b\nc"})
    found = dict(item.split("=", 1) for item in result.text.rstrip("\0").split("\0"))
    assert found == tool.environment(CLITEST="a b\nc")


def test_the_command_has_the_callers_directory(tool, tmp_path):
    """The working directory is the caller's."""
    assert tool.run(*LIMIT, "--", "pwd", "-P").text == f"{tmp_path.resolve()}\n"


def test_arguments_are_passed_as_they_are(tool):
    """No argument is split, expanded or lost."""
    arguments = ["", " ", "*", "--", "$HOME", "\n", "-q"]
    result = tool.run(*LIMIT, "--", "printf", "%s|", *arguments)
    assert result.text == "".join(f"{argument}|" for argument in arguments)


def test_the_command_and_its_children_are_in_one_cgroup_of_their_own(tool, cgroups_of):
    """The command, its child and a child in another session share a cgroup named after the tool."""
    show = "cat /proc/self/cgroup"
    result = tool.run(*LIMIT, "--", "sh", "-c", f"{show}; sh -c '{show}'; setsid -w {show}")
    paths = [line[3:] for line in result.text.splitlines() if line.startswith("0::")]
    assert len(paths) == 3
    assert len(set(paths)) == 1
    assert os.path.basename(paths[0]).startswith(f"pybpfthrottle-{result.pid}-")
    assert cgroups_of(result.pid) == []


def test_run_inside_of_run_nests_the_cgroups(tool):
    """A limited command may limit another one: the inner cgroup is below the outer one."""
    inner = tool.command(*LIMIT, "--", "cat", "/proc/self/cgroup")
    result = tool.run(*LIMIT, "--", *inner)
    path = next(line[3:] for line in result.text.splitlines() if line.startswith("0::"))
    outer, nested = path.split("/")[-2:]
    assert outer.startswith(f"pybpfthrottle-{result.pid}-")
    assert nested.startswith("pybpfthrottle-")


def test_both_directions_are_limited_while_the_command_runs(tool, attached, eventually):
    """One program at ingress and one at egress are attached to the command's cgroup."""
    process = tool.start(*LIMIT, "--upload-limit", "1M", "--", "cat", stdin=subprocess.PIPE)
    cgroup = tool.cgroup_of(process)
    eventually(lambda: len(attached(cgroup)) >= 2)
    assert tool.finish(process).status == 0


def test_a_limit_is_in_force_from_the_first_instruction(tool):
    """The kernel has a program attached before the command begins."""
    program = (
        "import os; from pybpfthrottle import cgroup; from pybpfthrottle.bpf import links;"
        "from pybpfthrottle.bpf.abi import AttachType;"
        "fd = cgroup.from_pid(os.getpid()).open();"
        "print(len(links.query(fd, AttachType.CGROUP_INET_INGRESS).program_ids))"
    )
    assert tool.run(*LIMIT, "--", tool.python, "-c", program).out == b"1\n"


def test_the_commands_packets_are_counted(tool, tmp_path):
    """Ten datagrams of 100 bytes over loopback are 10 packets and 1280 bytes at egress."""
    program = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.bind(('127.0.0.1', 0)); [s.sendto(bytes(100), s.getsockname()) for _ in range(10)]"
    )
    arguments = ("run", "-q", "--upload-limit", "1M", "--loopback", "--json-file", "x.jsonl")
    assert tool.run(*arguments, "--", tool.python, "-c", program).status == 0
    end = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[-1])
    assert end["upload"]["packets_total"] == 10
    assert end["upload"]["bytes_total"] == 1280


def test_no_signal_is_ignored_caught_or_blocked(tool):
    """The command has every signal at its default: SIGPIPE and SIGINT among them."""
    text = tool.run(*LIMIT, "--", "cat", "/proc/self/status").text
    assert [status_of(text, field) for field in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGCHLD"])
def test_a_signal_that_the_caller_ignores_stays_ignored(tool, name):
    """As nohup does it: the command ignores exactly what the caller ignores."""
    number = getattr(signal, name)
    process = tool.start(
        *LIMIT,
        *("--", "cat", "/proc/self/status"),
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    result = tool.finish(process)
    assert result.status == 0
    assert status_of(result.text, "SigIgn") == 1 << (number - 1)


def test_no_descriptor_of_ours_is_open_in_the_command(tool):
    """The command has descriptors 0, 1 and 2, and the one that ls opens itself."""
    result = tool.run(*LIMIT, "--json-file", "x.jsonl", "--", "ls", "/proc/self/fd")
    assert result.text.split() == ["0", "1", "2", "3"]


def test_a_descriptor_of_the_callers_stays_open_in_the_command(tool):
    """A descriptor that the caller passes on reaches the command."""
    reader, writer = os.pipe()
    try:
        process = tool.start(
            *LIMIT, "--", "sh", "-c", f"echo hello >/proc/self/fd/{writer}", pass_fds=(writer,)
        )
        assert tool.finish(process).status == 0
        assert os.read(reader, 100) == b"hello\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_the_memlock_limit_is_the_callers(tool):
    """The command's limit on locked memory is the caller's, soft and hard."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    hard = 8 << 20 if hard == resource.RLIM_INFINITY else hard
    process = tool.start(
        *LIMIT,
        *("--", "grep", "locked", "/proc/self/limits"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard)),
    )
    assert tool.finish(process).text.split()[-3:] == ["65536", str(hard), "bytes"]


def test_a_small_memlock_limit_does_not_matter(tool):
    """With no locked memory at all the limit works (Linux 5.11 does not count it)."""
    process = tool.start(
        *LIMIT,
        *("--", "true"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)),
    )
    assert tool.finish(process).status == 0


WHO = "id -u; id -g; id -G; echo $HOME; echo $USER; echo $LOGNAME; echo $SHELL"


def test_a_user_gets_uid_gid_groups_and_environment(tool):
    """--user NAME gives that user's uid, group, groups, HOME, USER, LOGNAME and SHELL."""
    user = pwd.getpwnam("nobody")
    result = tool.run(*LIMIT, "--user", "nobody", "--", "sh", "-c", WHO, cwd="/")
    groups = sorted(set(os.getgrouplist("nobody", user.pw_gid)))
    uid, gid, shown, home, name, login, shell = result.text.splitlines()
    assert (int(uid), int(gid)) == (user.pw_uid, user.pw_gid)
    assert sorted(map(int, shown.split())) == groups
    assert (home, name, login, shell) == (user.pw_dir, "nobody", "nobody", user.pw_shell)


@pytest.mark.parametrize("group", ["daemon", str(grp.getgrnam("daemon").gr_gid)])
def test_a_group_may_be_named_or_numbered(tool, group):
    """--user NAME:GROUP gives that group, in the place of the user's own."""
    result = tool.run(*LIMIT, "--user", f"nobody:{group}", "--", "sh", "-c", WHO, cwd="/")
    daemon = grp.getgrnam("daemon").gr_gid
    uid, gid, groups = result.text.splitlines()[:3]
    assert (int(uid), int(gid)) == (pwd.getpwnam("nobody").pw_uid, daemon)
    assert set(map(int, groups.split())) == set(os.getgrouplist("nobody", daemon))


def test_a_user_may_be_a_number(tool):
    """--user takes a uid that has a name."""
    uid = pwd.getpwnam("nobody").pw_uid
    assert tool.run(*LIMIT, "--user", str(uid), "--", "id", "-un").text == "nobody\n"


def test_a_user_keeps_no_capability(tool):
    """The command of another user has no capability left."""
    text = tool.run(*LIMIT, "--user", "nobody", "--", "cat", "/proc/self/status").text
    assert [status_of(text, field) for field in ("CapPrm", "CapEff", "CapAmb")] == [0, 0, 0]


@pytest.mark.parametrize(
    "user",
    [
        "no-such-user-x",
        "no-such-user-x:daemon",
        "nobody:no-such-group-x",
        "nobody:",
        ":daemon",
        "",
        "999999999999999999999",
        "nobody:999999999999999999999",
        "²",
        "nobody:²",
    ],
)
def test_a_user_or_group_that_does_not_exist_is_refused(tool, tmp_path, user):
    """An unknown user or group gives one line, and the command does not run as someone else."""
    result = tool.run(*LIMIT, "--user", user, "--", "touch", str(tmp_path / "started"))
    assert result.status in (2, 125)
    assert (result.usage_error if result.status == 2 else result.complaint).isprintable()
    assert not (tmp_path / "started").exists()
