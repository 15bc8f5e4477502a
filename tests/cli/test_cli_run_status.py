"""The exit status of ``run``: that of the command, or 125, 126 and 127."""

from __future__ import annotations

import os
import resource

import pytest

LIMIT = ("run", "-q", "--download-limit", "1M")


@pytest.mark.parametrize("status", [0, 3, 125, 255])
def test_the_commands_status_is_passed_on(tool, status):
    """Whatever the command exits with is the exit status."""
    result = tool.run(*LIMIT, "--", "sh", "-c", f"exit {status}")
    assert (result.status, result.err) == (status, "")


@pytest.mark.parametrize(("name", "status"), [("KILL", 137), ("TERM", 143), ("ABRT", 134)])
def test_death_by_a_signal_is_128_and_its_number(tool, name, status):
    """A command that a signal ended gives 128 + n, as in a shell."""
    assert tool.run(*LIMIT, "--", "sh", "-c", f"kill -{name} $$").status == status


@pytest.mark.parametrize("command", ["no-such-command-here", "./absent", "/dev/null/x", ""])
def test_a_command_that_is_not_found_is_127(tool, command):
    """A command that does not exist gives 127 and one line that names it."""
    result = tool.run(*LIMIT, "--", command)
    assert result.status == 127
    assert result.complaint == f"pybpfthrottle: {command or repr('')}: command not found"


@pytest.mark.parametrize("name", ["without", "./without"])
def test_a_command_whose_interpreter_is_missing_is_told_so(tool, tmp_path, name):
    """It is there: that it was not found would lead the user astray."""
    (tmp_path / "without").write_text("#!/no/such/interpreter\n")
    (tmp_path / "without").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = tool.run(*LIMIT, "--", name, environment={"PATH": path})
    assert result.status == 127
    assert result.complaint == f"pybpfthrottle: {name}: its interpreter was not found"


def test_a_command_without_the_x_bit_is_126(tool, tmp_path):
    """A file that may not be executed gives 126 and one line."""
    (tmp_path / "script").write_text("#!/bin/sh\n")
    result = tool.run(*LIMIT, "--", "./script")
    assert result.status == 126
    assert result.complaint == "pybpfthrottle: ./script: Permission denied"


def test_a_directory_is_126(tool, tmp_path):
    """A directory cannot be executed."""
    result = tool.run(*LIMIT, "--", str(tmp_path))
    assert result.status == 126
    assert str(tmp_path) in result.complaint


def test_a_file_in_no_known_format_is_126(tool, tmp_path):
    """A file that the kernel cannot execute gives 126 and one line."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    result = tool.run(*LIMIT, "--", "./broken")
    assert result.status == 126
    assert result.complaint == "pybpfthrottle: ./broken: Exec format error"


def test_a_name_that_is_no_utf8_is_127(tool):
    """Bytes that are no text do not disturb the message."""
    result = tool.run(*LIMIT, "--", b"\xff\xfe")
    assert result.status == 127
    assert result.complaint.endswith(": command not found")


def test_an_unknown_backend_is_wrong_usage(tool):
    """A backend that does not exist is refused, and the known ones are named."""
    result = tool.run(*LIMIT, "--download-backend", "magic", "--", "true")
    assert result.status == 2
    assert "magic" in result.usage_error
    assert "ebpf" in result.usage_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upload-backend", "ebpf"], "--upload-backend needs --upload-limit"),
        (["--egress-verdict", "deny"], "--egress-verdict needs --upload-limit"),
    ],
)
def test_an_option_of_the_other_direction_is_refused(tool, options, message):
    """It would be ignored."""
    result = tool.run("run", "--download-limit", "1M", *options, "--", "true")
    assert (result.status, message in result.usage_error) == (2, True)


def test_the_command_does_not_start_before_the_limit(tool, tmp_path):
    """If the limit cannot be put in force, the command was never executed."""
    tool.run(*LIMIT, "--download-backend", "magic", "--", "touch", str(tmp_path / "started"))
    assert not (tmp_path / "started").exists()


def test_both_directions_may_be_limited(tool):
    """The command runs with both limits."""
    assert tool.run(*LIMIT, "--upload-limit", "8mbit", "--", "true").status == 0


@pytest.mark.parametrize("method", ["auto", "link", "legacy"])
@pytest.mark.parametrize("verdict", ["congestion", "deny"])
def test_each_way_of_attaching_works(tool, method, verdict):
    """Each attach method and each verdict works, and is gone with the command."""
    options = ("--upload-limit", "1M", "--bpf-attach-method", method, "--egress-verdict", verdict)
    assert tool.run(*LIMIT, *options, "--", "true").status == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["systemd-run", "--user", "wget"], "--scope"),
        (["systemd-run", "--scope", "wget"], ""),
        (["docker", "run", "image"], "--unit"),
        (["/bin/echo", "docker"], ""),
    ],
)
def test_a_command_that_has_a_daemon_do_the_work_is_told(tool, tmp_path, arguments, told):
    """What is done by somebody else's child is not limited, and nothing shows that later."""
    for name in ("systemd-run", "docker"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    limit = ("run", "--download-limit", "1M")
    result = tool.run(*limit, "--", *arguments, environment={"PATH": path})
    notes = [line for line in result.err.splitlines() if " is not limited" in line]
    assert result.status == 0
    assert [told in note for note in notes] == ([True] if told else [])


@pytest.mark.parametrize("most", [11, 14])
def test_too_few_descriptors_are_told_with_the_remedy(tool, most):
    """Whichever is the first that cannot be opened; the command is not run."""
    result = tool.run(
        *("run", "--download-limit", "1M", "--", "echo", "ran"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    )
    assert (result.status, result.out) == (125, b"")
    assert "Too many open files" in result.complaint
    assert result.complaint.endswith("; allow this process more of them: ulimit -n 1024")
