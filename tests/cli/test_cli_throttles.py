"""list, show, set and remove: from any terminal, on what a foreground command holds too."""

from __future__ import annotations

import json
import re
import signal
from subprocess import PIPE

import pytest
from since import running, since

LIMIT = ["--download-limit", "1M", "--upload-limit", "500K"]


@pytest.fixture
def limiting(tool, scratch, attached, eventually):
    """Start the tool on a cgroup of its own, and wait until the limit is in force."""

    def start(*options, cgroup=None):
        cgroup = cgroup or scratch.cgroup()
        label = scratch.name()
        process = tool.start(
            *("--cgroup", cgroup.path, "--label", label, "--json", *LIMIT, *options), stdout=PIPE
        )
        event = json.loads(process.stdout.readline())
        return process, cgroup, label, event["id"]

    return start


def listed(tool, throttle_id):
    """The throttle as list tells of it; None if it does not."""
    answer = json.loads(tool.run("list", "--json").text)
    assert answer["schema"] == 1
    return next((one for one in answer["throttles"] if one["id"] == throttle_id), None)


def events(process):
    """The JSON lines that an instance writes until it ends."""
    return [json.loads(line) for line in process.stdout]


def test_a_throttle_is_listed_while_it_is_in_force(tool, limiting):
    """With all that scripts need; afterwards it is gone."""
    process, cgroup, label, throttle_id = limiting()
    found = listed(tool, throttle_id)
    assert found["name"] == label
    assert found["limits"] == {"download": 1 << 20, "upload": 500 << 10}
    assert found["owner_pid"] == process.pid
    assert found["kept"] is False
    assert found["backends"] == {"download": "ebpf", "upload": "ebpf"}
    assert found["target"]["cgroups"] == [cgroup.path]
    shown = tool.run("list").text
    assert throttle_id in shown
    assert label in shown
    process.terminate()
    assert tool.finish(process).status == 0
    assert listed(tool, throttle_id) is None


def test_a_direction_without_a_limit_is_null(tool, scratch):
    """Both directions are there in JSON."""
    process = tool.start(
        *(
            "run",
            "--download-limit",
            "1M",
            "--label",
            "one",
            "--",
            "sh",
            "-c",
            "echo r; exec sleep 30",
        ),
        stdout=PIPE,
    )
    assert process.stdout.readline() == b"r\n"
    answer = json.loads(tool.run("list", "--json").text)
    [found] = [one for one in answer["throttles"] if one["owner_pid"] == process.pid]
    assert found["limits"] == {"download": 1 << 20, "upload": None}
    assert found["target"]["command"] == ["sh", "-c", "echo r; exec sleep 30"]
    process.send_signal(signal.SIGTERM)
    tool.finish(process)


def test_a_long_command_does_not_make_the_list_wide(tool):
    """It is shortened there; show and JSON have all of it."""
    script = "echo r; exec sleep 30 #" + "x" * 500
    process = tool.start(
        *("run", "--download-limit", "1M", "--label", "long", "--", "sh", "-c", script), stdout=PIPE
    )
    assert process.stdout.readline() == b"r\n"
    [row] = [line for line in tool.run("list").text.splitlines() if str(process.pid) in line]
    assert "the command sh -c echo r; exec sleep 30 #xxx" in row
    assert re.search(r"xxx\.\.\. +1\.0 MB/s", row)  # as wide as the other throttles' limits
    assert len(row) < 200
    assert script in tool.run("show", "--pid", str(process.pid)).text
    process.send_signal(signal.SIGTERM)
    tool.finish(process)


@pytest.mark.parametrize("way", ["id", "label", "cgroup", "owner"])
def test_a_throttle_is_shown_however_it_is_chosen(tool, limiting, way):
    """By id, name, cgroup, or the process that keeps it."""
    process, cgroup, label, throttle_id = limiting()
    which = {
        "id": [throttle_id],
        "label": [label],
        "cgroup": ["--cgroup", cgroup.path],
        "owner": ["--pid", str(process.pid)],
    }[way]
    [found] = json.loads(tool.run("show", *which, "--json").text)["throttles"]
    assert found["id"] == throttle_id
    assert found["how"]["download"]["attached_by"] == ("link" if running() >= (5, 7) else "legacy")
    assert found["counters"]["upload"]["packets_dropped"] == 0
    assert throttle_id in tool.run("show", *which).text
    process.terminate()
    tool.finish(process)


def test_a_process_finds_its_throttle(tool, scratch):
    """--pid is the limited process, or what it has started."""
    target = scratch.process(scratch.cgroup())
    process = tool.start("--pid", str(target.pid), "--json", *LIMIT, stdout=PIPE)
    throttle_id = json.loads(process.stdout.readline())["id"]
    [found] = json.loads(tool.run("show", "--pid", str(target.pid), "--json").text)["throttles"]
    assert found["id"] == throttle_id
    assert found["processes"] == [target.pid]
    assert found["match"] == "marks"
    process.terminate()
    tool.finish(process)


def test_a_limit_is_changed_from_another_terminal(tool, limiting, eventually):
    """At once in the kernel; who holds it says so, and goes on."""
    process, _, _, throttle_id = limiting()
    assert tool.run("set", throttle_id, "--download-limit", "2M").status == 0
    assert listed(tool, throttle_id)["limits"] == {"download": 2 << 20, "upload": 500 << 10}
    assert tool.run("set", throttle_id, "--upload-limit", "none").status == 0
    assert listed(tool, throttle_id)["limits"]["upload"] is None
    lines = iter(process.stdout)

    def sampled():
        event = json.loads(next(lines))
        notes.extend([event["text"]] if event["event"] == "note" else [])
        return event["event"] == "sample" and event["download"]["limit"] == 2 << 20

    notes = []
    eventually(sampled)
    assert any("download limit was changed to 2.0 MB/s" in note for note in notes)
    process.terminate()
    assert tool.finish(process).status == 0


def test_a_throttle_is_removed_from_another_terminal(tool, limiting, attached):
    """Nothing is attached any more at once, and who held it ends with the reason."""
    process, cgroup, _, throttle_id = limiting()
    assert attached(cgroup)
    assert tool.run("remove", throttle_id).status == 0
    assert attached(cgroup) == ()
    assert listed(tool, throttle_id) is None
    told = events(process)
    assert process.wait(10) == 0
    assert (told[-1]["event"], told[-1]["reason"]) == ("end", "removed")
    assert (told[-2]["event"], told[-2]["text"]) == ("note", "The limit was removed.")


def test_removing_the_limit_of_a_command_leaves_the_command(tool, attached):
    """It goes on without a limit, and its status is passed on; that is said."""
    process = tool.start(
        *("run", *LIMIT, "--label", "mine", "--", "sh", "-c", "echo r; read line; exit 6"),
        stdin=PIPE,
        stdout=PIPE,
    )
    assert process.stdout.readline() == b"r\n"
    cgroup = tool.cgroup_of(process)
    assert tool.run("remove", "--pid", str(process.pid)).status == 0
    assert attached(cgroup) == ()
    while b"The limit was removed" not in process.stderr.readline():
        pass
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.wait(10) == 6


def test_what_was_attached_by_the_legacy_call_is_removed_too(tool, limiting, attached):
    """Not only links."""
    process, cgroup, _, throttle_id = limiting("--bpf-attach-method", "legacy")
    assert tool.run("remove", throttle_id).status == 0
    assert attached(cgroup) == ()
    assert process.wait(10) == 0


@since("5.7")
def test_the_way_to_attach_is_changed_from_another_terminal(tool, limiting, attached):
    """Set waits until its owner has done it."""
    process, cgroup, _, throttle_id = limiting("--bpf-attach-method", "link")
    before = len(attached(cgroup))
    assert tool.run("set", throttle_id, "--bpf-attach-method", "legacy").status == 0
    assert listed(tool, throttle_id)["attached_by"] == "legacy"
    assert len(attached(cgroup)) == before
    process.terminate()
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()


@pytest.mark.parametrize("command", ["show", "set", "remove"])
def test_what_does_not_exist_is_one_clear_line(tool, command):
    """With the command that shows what there is."""
    more = ["--download-limit", "1M"] if command == "set" else []
    result = tool.run(command, "no-such-throttle", *more)
    assert result.status == 1
    assert "there is no throttle no-such-throttle" in result.complaint
    assert "pybpfthrottle list" in result.complaint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["show"], "give exactly one of ID, --pid, --cgroup, --unit"),
        (["show", "x", "--pid", "1"], "give exactly one of ID"),
        (["set", "x"], "nothing to change"),
        (["set", "x", "--download-limit", "much"], "none to lift"),
        (["remove", "x", "--all"], "--all"),
        (["remove"], "--all"),
    ],
)
def test_wrong_usage_is_said(tool, arguments, named):
    """Status 2, and what is missing or too much."""
    assert named in tool.run(*arguments).usage_error


def test_an_ordinary_user_is_told_why(tool, anybody):
    """Who may not look is not told that there is nothing."""
    result = tool.run("list", prefix=anybody)
    assert result.status == 1
    assert "cannot list the throttles of this machine" in result.complaint


def test_a_stopped_owner_does_not_keep_a_limit_from_being_changed_or_removed(
    tool, limiting, attached
):
    """The kernel has it: nobody needs to answer."""
    process, cgroup, _, throttle_id = limiting()
    process.send_signal(signal.SIGSTOP)
    assert tool.run("set", throttle_id, "--download-limit", "3M").status == 0
    assert tool.run("remove", throttle_id).status == 0
    assert attached(cgroup) == ()
    process.send_signal(signal.SIGCONT)
    assert process.wait(10) == 0
