"""Wrong usage: status 2 and one line that says what is wrong."""

from __future__ import annotations

import json
import re

import pytest

from pybpfthrottle.linux import cgroup as cgroups

TOO_LARGE = "1" + "0" * 30


@pytest.mark.parametrize("rate", ["banana", "", "1X", "M", "1.2.3", "1e6", "nan", "inf", "٣M"])
def test_what_is_no_limit_is_refused(tool, rate):
    """Nonsense for a limit is refused with what is accepted."""
    error = tool.run("run", "--download-limit", rate, "--", "true").usage_error
    assert "--download-limit" in error
    assert "1.5M" in error
    assert "8mbit" in error


@pytest.mark.parametrize("rate", ["0", "0M", "999", TOO_LARGE, "101G", "0.5K"])
def test_a_limit_out_of_range_is_refused(tool, rate):
    """A limit below 1000 B/s or above 100 GB/s is refused, and the range is said."""
    error = tool.run("run", "--upload-limit", rate, "--", "true").usage_error
    assert "between 1000 B/s and 100 GB/s" in error


@pytest.mark.parametrize("rate", ["-1", "-1M"])
def test_a_negative_limit_is_refused(tool, rate):
    """A negative limit is refused."""
    assert rate in tool.run("run", "--upload-limit", rate, "--", "true").usage_error


@pytest.mark.parametrize("rate", ["8mbps", "8Mbps", "8MBps", "8mb/s"])
def test_an_ambiguous_unit_is_refused_with_both_spellings(tool, rate):
    """Bits or bytes is not guessed: both spellings are suggested."""
    error = tool.run("run", "--download-limit", rate, "--", "true").usage_error
    assert "8mbit" in error
    assert "8MB" in error


def test_a_fraction_in_an_ambiguous_unit_is_kept_in_the_spellings(tool):
    """What is suggested in place of 1.5mbps is 1.5mbit and 1.5MB."""
    error = tool.run("run", "--download-limit", "1.5mbps", "--", "true").usage_error
    assert "1.5mbit" in error
    assert "1.5MB" in error


@pytest.mark.parametrize(
    "duration",
    ["", "0", "-1", "nan", "inf", "-inf", "1e300", "soon", "1w", "s", "1.2.3h", "m5", "-1m"],
)
@pytest.mark.parametrize("command", [("run", "--download-limit", "1M"), ("--download-limit", "1M")])
def test_a_duration_that_is_none_is_refused(tool, command, duration):
    """A duration is a number of seconds above 0."""
    error = tool.run(*command, "--duration", duration, "true").usage_error
    assert "--duration" in error
    assert "seconds" in error


@pytest.mark.parametrize("command", ["run", "bare"])
def test_an_unknown_attach_method_is_refused(tool, command):
    """An unknown attach method is an error, not auto; the known ones are named."""
    first = ("run",) if command == "run" else ("--pid", "1")
    error = tool.run(*first, "--download-limit", "1M", "--bpf-attach-method", "x").usage_error
    for known in ("auto", "link", "legacy"):
        assert known in error


@pytest.mark.parametrize("end", [(), ("--",)])
def test_run_without_a_command_is_refused(tool, end):
    """Run needs a command."""
    assert "COMMAND" in tool.run("run", "--download-limit", "1M", *end).usage_error


@pytest.mark.parametrize("arguments", [("run", "--", "true"), ("--pid", "1"), ("--unit", "x")])
def test_no_limit_is_refused(tool, arguments):
    """A target or a command without any limit is wrong usage."""
    error = tool.run(*arguments).usage_error
    assert "--download-limit" in error
    assert "--upload-limit" in error


def test_a_limit_without_a_target_is_refused(tool):
    """The bare command needs a target, and names the three kinds."""
    error = tool.run("--download-limit", "1M").usage_error
    for option in ("--pid", "--cgroup", "--unit"):
        assert option in error


@pytest.mark.parametrize("other", ["--cgroup", "--unit"])
def test_a_pid_goes_with_no_other_target(tool, other):
    """--pid together with --cgroup or --unit is wrong usage."""
    error = tool.run("--pid", "1", other, "x", "--download-limit", "1M").usage_error
    assert "--pid" in error
    assert other in error


@pytest.mark.parametrize("pid", ["0", "-1", "one", "", "1.5"])
def test_what_can_be_no_pid_is_refused(tool, pid):
    """A pid is a number above 0."""
    assert "--pid" in tool.run("--pid", pid, "--download-limit", "1M").usage_error


@pytest.mark.parametrize(
    "option",
    [
        ("--download-limit", "1M"),
        ("--pid", "1"),
        ("--cgroup", "x"),
        ("--unit", "x"),
        ("--duration", "5"),
        ("--bpf-attach-method", "auto"),
        ("--json",),
        ("--loopback",),
        ("--whole-cgroup",),
        ("--list-backends",),
        ("--quiet",),
        ("--verbose",),
    ],
)
def test_an_option_in_front_of_a_subcommand_is_refused(tool, option):
    """An option of the bare command in front of a subcommand is named, never ignored."""
    error = tool.run(*option, "run", "--download-limit", "1M", "--", "true").usage_error
    assert option[0] in error
    assert "'run'" in error


def test_an_option_in_front_of_demo_is_refused(tool):
    """The same holds for demo."""
    assert "'demo'" in tool.run("--download-limit", "1M", "demo").usage_error


def test_an_unknown_subcommand_is_refused(tool):
    """A word that is no subcommand is wrong usage."""
    assert "rum" in tool.run("rum", "--", "true").usage_error


def test_an_unknown_option_is_refused(tool):
    """An option that does not exist is wrong usage."""
    assert "--no-such" in tool.run("run", "--no-such", "--", "true").usage_error


def test_options_behind_the_command_are_the_commands(tool):
    """What stands behind the command is not ours, even without the two hyphens."""
    result = tool.run("run", "-q", "--download-limit", "1M", "echo", "--duration", "-x")
    assert (result.status, result.out) == (0, b"--duration -x\n")


def test_nothing_at_all_shows_the_help(tool):
    """Without arguments the help is shown on standard error, with status 2."""
    result = tool.run()
    assert (result.status, result.out) == (2, b"")
    assert result.err.startswith("Usage: pybpfthrottle ")


@pytest.mark.parametrize(
    "group", [("config",), ("cgroup",), ("bpf",), ("bpf", "prog")], ids=" ".join
)
def test_a_group_of_commands_without_one_shows_its_help(tool, group):
    """As lines, on standard error where click has it as an error."""
    result = tool.run(*group)
    told = result.err if result.status else result.text
    assert told.startswith(f"Usage: pybpfthrottle {' '.join(group)} [OPTIONS] COMMAND")
    assert "\nCommands:\n" in told
    assert "Error" not in told


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--pid", "4194304", "no process 4194304"),
        ("--user", "no-such-user", "no user 'no-such-user'"),
    ],
)
@pytest.mark.parametrize("command", [("top", "--once"), ("monitor",)], ids=" ".join)
def test_who_does_not_exist_is_not_waited_for(tool, command, option, value, said):
    """That nobody sends anything would be true, and would not help."""
    result = tool.run(*command, option, value)
    assert result.status == 1
    assert result.complaint == f"pybpfthrottle: error: there is {said}"


def test_a_file_that_cannot_be_written_is_named(tool, tmp_path):
    """With the reason, and without an errno."""
    result = tool.run("metrics", "-o", str(tmp_path / "absent" / "x.prom"))
    assert result.status == 1
    assert result.complaint == (
        f"pybpfthrottle: error: {tmp_path}/absent/x.prom: No such file or directory"
    )


def test_an_empty_name_is_refused(tool):
    """No process has it; a shell makes it of a variable that is not set."""
    result = tool.run("--name", "", "--download-limit", "1M")
    assert result.status == 1
    assert result.complaint == "pybpfthrottle: error: the process name is empty"


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("run", "--help"), ("demo", "-h")])
def test_help_is_no_error(tool, arguments):
    """--help prints to standard output and leaves with 0."""
    result = tool.run(*arguments)
    assert (result.status, result.err) == (0, "")
    assert result.text.startswith("Usage: pybpfthrottle ")


def test_the_version_is_printed(tool):
    """--version prints the program's name and version."""
    result = tool.run("--version")
    assert result.status == 0
    assert re.fullmatch(r"pybpfthrottle, version \d+\.\d+\.\d+\n", result.text)


def test_a_json_file_that_cannot_be_made_is_refused(tool, tmp_path):
    """A --json-file below a directory that does not exist is wrong usage."""
    path = tmp_path / "absent" / "x"
    limit = ("--download-limit", "1M")
    assert str(path) in tool.run("run", *limit, "--json-file", str(path), "true").usage_error


@pytest.mark.parametrize(
    ("record", "said"), [("absent/x.csv", "No such file"), ("x.txt", ".csv for CSV, or in .jsonl")]
)
def test_a_record_that_cannot_be_made_is_refused(tool, record, said):
    """By every command that has --record."""
    for command in (("run", "-d", "1M"), ("--pid", "1", "-d", "1M"), ("monitor",)):
        word = ["true"] if command[0] == "run" else []
        error = tool.run(*command, "--record", record, *word).usage_error
        assert record in error
        assert said in error


def test_standard_output_is_for_one_of_two(tool):
    """JSON lines and CSV cannot share it."""
    for command in (("--pid", "1", "-d", "1M"), ("monitor",)):
        assert "both need" in tool.run(*command, "--json", "--record", "-").usage_error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--record", "-"), "--detach needs a file"),
        (("--prove",), "need --record FILE.jsonl"),
        (("--prove", "--record", "x.csv"), "need --record FILE.jsonl"),
    ],
)
def test_what_goes_on_in_the_background_has_no_terminal(tool, options, said):
    """So it needs a file for what would be shown there."""
    assert said in tool.run("--pid", "1", "-d", "1M", "--detach", *options).usage_error


def test_backends_are_listed_for_each_direction(tool):
    """--list-backends prints each direction's backends in the words of the seeds."""
    result = tool.run("--list-backends")
    assert (result.status, result.err) == (0, "")
    mark = "✅ available"
    if "CONFIG_NET_ACT_POLICE" in result.text:
        mark = (
            "❌ unavailable: this kernel lacks CONFIG_NET_ACT_POLICE: tc failed: Error: Failed to"
            " load TC action module."
        )
    assert result.text.splitlines() == [
        "Upload Backends:",
        "  ebpf        [priority: Best] ✅ available",
        "  nftables    [priority: Better] ✅ available",
        "  tc_htb      [priority: Good] ✅ available",
        "Download Backends:",
        "  ebpf        [priority: Best] ✅ available",
        "  nftables    [priority: Better] ✅ available",
        "  ifb_tc      [priority: Good] ✅ available",
        f"  tc_police   [priority: Fallback] {mark}",
    ]
    assert tool.run("backends").text == result.text


def test_a_packet_is_tried_by_each_backend(tool):
    """It passes between two network namespaces, and each backend has counted it."""
    result = tool.run("backends", "--try", "--json")
    assert result.status == 0
    for backend in json.loads(result.text)["backends"]:
        for direction in ("upload", "download"):
            if backend[direction]["available"]:
                assert backend[direction]["counted"], backend


@pytest.mark.parametrize(
    "option",
    [("--shape", "police"), ("--bpf-attach-method", "legacy"), ("--override-others",)],
)
def test_an_option_that_only_another_backend_has_is_refused(tool, option):
    """Nothing is ignored: the option and both backends are named."""
    arguments = ("-d", "1M", "--download-backend", "nftables", *option, "--", "true")
    assert tool.run("run", *arguments).usage_error == (
        f"{option[0]} works only with the backend ebpf, not with nftables"
    )


def test_an_option_of_a_backend_asks_for_that_backend(tool):
    """The other direction may have another one."""
    directions = ("-d", "1M", "--download-backend", "nftables", "-u", "1M")
    result = tool.run("run", *directions, "--shape", "police", "-v", "--", "true")
    assert result.status == 0
    assert "upload: limited to 1.0 MB/s, attached by link" in result.err
    assert "download: limited to 1.0 MB/s by the table" in result.err


def test_an_unknown_backend_is_refused_with_those_that_there_are(tool):
    """In the option's own words."""
    error = tool.run("run", "-d", "1M", "--download-backend", "ipfw", "--", "true").usage_error
    assert "'nftables'" in error


def test_an_output_in_ascii_is_no_error(tool):
    """A standard output that has no ✅ gets something else instead of a traceback."""
    result = tool.run("--list-backends", environment={"PYTHONIOENCODING": "ascii"})
    assert result.status == 0
    assert "available" in result.text


@pytest.mark.parametrize("command", [("run", "--", "true"), ("list",), ("--version",)])
def test_the_short_spellings_are_documented(tool, command):
    """-d and -u are in the help of both commands that limit."""
    help_text = tool.run(*command[:1], "--help").text if command[0] == "run" else ""
    help_text = help_text or tool.run("--help").text
    assert "-d, --download-limit" in help_text
    assert "-u, --upload-limit" in help_text


def test_short_options_and_durations_are_taken(tool, scratch):
    """As people write them; a second is no more than that."""
    cgroup = scratch.cgroup()
    result = tool.run("--cgroup", cgroup.path, "-d", "1MB/s", "-u", "8kbit", "--duration", "1s")
    assert result.status == 0
    assert "download 1.0 MB/s (" in result.text
    assert "upload 1000 B/s (" in result.text
    run = tool.run("run", "-d1M/s", "-u", "1MiB/s", "--duration", "1h30m", "--", "true")
    assert run.status == 0


@pytest.mark.parametrize(
    ("pid", "said"),
    [
        ("", "a process id is missing"),
        (" ", "a process id is missing"),
        ("12\n13", "several process ids"),
        ("--download-limit", "a process id is missing before --download-limit"),
    ],
)
@pytest.mark.parametrize("command", [(), ("sockets",), ("show",), ("verify-setup",)])
def test_a_process_id_that_is_missing_is_said(tool, pid, said, command):
    """As where pgrep has found nothing, or more than one."""
    assert said in tool.run(*command, "--pid", pid).usage_error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--pid", "1", "-d", "1M", "--", "true"), "'run' does not accept --pid"),
        (("run", "--cgroup", "x", "-d", "1M", "true"), "pybpfthrottle --cgroup ..."),
        (("run", "-d", "1M", "--json", "--", "true"), "--json-file FILE"),
        (("--wait", "-d", "1M", "--pid", "1"), "pybpfthrottle run --wait ..."),
        (("--json-file", "x", "run", "-d", "1M", "true"), "an option of 'run'"),
        (("--dry-run",), "pybpfthrottle apply --dry-run"),
        (("-d", "1M", "run", "true"), "--download-limit must come after 'run'"),
        (("--pid", "1", "run", "-d", "1M", "true"), "'run' does not accept --pid"),
        (("list", "--pid", "1"), "'list' does not accept --pid"),
    ],
)
def test_an_option_of_another_command_says_where_it_goes(tool, arguments, said):
    """Of the bare command behind run, and of run in front of it."""
    told = tool.run(*arguments).usage_error
    assert said in told
    assert "Did you mean" not in told


def test_behind_two_hyphens_nothing_is_ours(tool):
    """The command has options of the same names."""
    result = tool.run("run", "-q", "-d", "1M", "--", "echo", "--pid", "1", "--wait", "-d")
    assert (result.status, result.out) == (0, b"--pid 1 --wait -d\n")


def test_a_unit_without_systemd_says_what_to_use(tool, scratch):
    """Where there are neither units' cgroups nor systemd: other tests may have some."""
    cgroup = scratch.cgroup()
    hide = f"mount --bind {cgroup.path} {cgroups.mount().path}"
    result = tool.run(
        *("--unit", "x", "-d", "1M"),
        prefix=[
            *("unshare", "-mC", "sh", "-c"),
            f'{hide}; test ! -d /run/systemd || mount -t tmpfs x /run/systemd; exec "$@"',
            "sh",
        ],
        preexec_fn=lambda: cgroup.move_in(0),
    )
    assert result.status == 1
    assert "systemd does not run here" in result.complaint
    assert "--cgroup PATH" in result.complaint
