"""The bare command on a cgroup: it limits until it is told to stop, and shows what it does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest
from since import since

from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.bpf import links, loader
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.linux import cgroup as cgroups

ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("method", [pytest.param("link", marks=since("5.7")), "legacy"])
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_it_and_the_limit(tool, running, attached, number, method):
    """SIGINT, SIGTERM and SIGHUP are regular ends: status 0, nothing attached."""
    process, cgroup = running("--bpf-attach-method", method)
    process.send_signal(number)
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()


def test_it_says_what_it_limits(tool, running):
    """The first line names the cgroup, the limits and how to end it; the summary follows."""
    process, cgroup = running()
    process.terminate()
    first, *rest = tool.finish(process).text.splitlines()
    assert cgroup.path in first
    assert "download 1.0 MB/s" in first
    assert "upload 1.0 MB/s" in first
    assert [line.split(":")[0] for line in rest] == ["download", "upload"]


def test_the_duration_ends_it(tool, scratch, attached):
    """After --duration it leaves with 0."""
    cgroup = scratch.cgroup()
    result = tool.run("--cgroup", cgroup.path, "--upload-limit", "1M", "--duration", "0.3", "-q")
    assert (result.status, result.out, result.err) == (0, b"", "")
    assert attached(cgroup) == ()


def test_one_direction_alone_attaches_one_program(tool, scratch, limits_on, eventually):
    """Without a download limit nothing is attached at ingress."""
    cgroup = scratch.cgroup()
    process = tool.start("--cgroup", cgroup.path, "--upload-limit", "1M", "-q")
    eventually(lambda: limits_on(cgroup))
    fd = cgroup.open()
    found = links.query(fd, AttachType.CGROUP_INET_INGRESS).program_ids
    os.close(fd)
    assert found == ()
    process.terminate()
    assert tool.finish(process).status == 0


def test_ctrl_c_ends_it(tool, running, attached):
    """Ctrl-C on its terminal ends it with status 0 and a summary."""
    process, cgroup = running(on_terminal=True)
    terminal = tool.terminal_of(process)
    terminal.wait_for("Ctrl-C ends it")
    terminal.type(b"\x03")
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()
    assert re.search(r"download: actual=.* in \d", terminal.text)
    assert "Traceback" not in terminal.text


def test_a_terminal_shows_a_live_line(tool, running):
    """On a terminal the rates are drawn over themselves."""
    process, _ = running(on_terminal=True)
    terminal = tool.terminal_of(process)
    terminal.wait_for("upload: actual=")
    assert "\r\x1b[2K" in terminal.text
    process.terminate()
    assert tool.finish(process).status == 0


def test_quiet_shows_nothing(tool, running):
    """With -q nothing is shown, on a terminal neither."""
    process, _ = running("-q", "--duration", "1.5", on_terminal=True)
    assert tool.finish(process).status == 0
    assert tool.terminal_of(process).text == ""


def test_a_record_on_standard_output_is_all_that_is_there(tool, scratch):
    """CSV, which plot reads from its standard input."""
    limit = ("--cgroup", scratch.cgroup().path, "--download-limit", "1M", "--duration", "1.3")
    result = tool.run(*limit, "--record", "-")
    assert result.status == 0
    head, *rows = result.text.splitlines()
    assert head.startswith("time,elapsed_s,pid,direction,limit,")
    assert len(rows) >= 2
    assert tool.run("plot", "-", input=result.out).text.startswith("download: 0 B/s in the mean")


@pytest.mark.parametrize("way", [("--json",), ("--record", "-"), ()])
def test_a_proof_comes_at_the_end_at_the_latest(tool, scratch, way):
    """As JSON where that is, otherwise for people; nothing to limit is no failure."""
    limit = ("--cgroup", scratch.cgroup().path, "--upload-limit", "1M", "--duration", "0.3")
    result = tool.run(*limit, "--prove", *way)
    assert result.status == 0
    if way == ("--json",):
        assert result.err == ""
        [proof] = [one for one in map(json.loads, result.text.splitlines()) if "holds" in one]
        assert (proof["event"], proof["holds"]) == ("proof", None)
        assert proof["upload"]["asked"] == 1 << 20
    else:
        shown = result.err if way else result.text
        assert shown.count("Proof of 0.") == 1
        assert shown.count("nothing to limit yet") == 1


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_a_record_is_beside_what_people_read(running, tool, tmp_path, name):
    """It is complete after Ctrl-C, and notes and the summary are shown as always."""
    process, _ = running("--record", name)
    process.send_signal(signal.SIGINT)
    result = tool.finish(process)
    assert result.status == 0
    assert "Ctrl-C ends it" in result.text
    assert "upload: actual=0 B/s" in result.text
    text = (tmp_path / name).read_text()
    assert text.endswith("\n")
    assert "download" in text
    assert "upload" in text


def test_json_prints_start_samples_and_end(tool, scratch):
    """--json prints JSON lines, and nothing else, on standard output."""
    cgroup = scratch.cgroup()
    result = tool.run(
        *("--cgroup", cgroup.path, "--download-limit", "1M", "--json", "--duration", "2.2")
    )
    start, *samples, end = map(json.loads, result.text.splitlines())
    assert (start["event"], start["schema"], start["cgroups"]) == ("start", 1, [cgroup.path])
    assert samples
    assert all(record["event"] == "sample" for record in samples)
    assert samples[0]["download"]["limit"] == 1024 * 1024
    assert (end["event"], end["reason"]) == ("end", "duration")
    assert end["download"]["packets_total"] == 0


@pytest.mark.parametrize("number", ENDS)
def test_json_says_which_signal_ended_it(tool, running, number):
    """The last record has the signal's name."""
    process, _ = running("--json")
    process.send_signal(number)
    last = json.loads(tool.finish(process).text.splitlines()[-1])
    assert (last["event"], last["reason"]) == ("end", number.name)


@since("5.7")
def test_verbose_logs_how_it_was_attached(tool, running):
    """-v logs the attachment in the words of the seeds, on standard error only."""
    process, _ = running("-v", "--duration", "0.1")
    result = tool.finish(process)
    assert result.err.count("✅ Successfully attached using modern method (bpf_link_create)") >= 2
    assert "Successfully attached eBPF ingress program" in result.err
    assert "Successfully attached eBPF egress program" in result.err
    assert "Auto-detecting" not in result.err
    assert "attached using" not in result.text


def test_verbose_logs_the_legacy_method(tool, running):
    """-v says that the legacy call is used, and that it worked."""
    process, _ = running("-v", "--bpf-attach-method", "legacy", "--duration", "0.1")
    err = tool.finish(process).err
    assert "Using legacy BPF attach method (bpf_prog_attach)" in err
    assert "✅ Successfully attached using legacy method!" in err


def test_twice_verbose_logs_each_step(tool, running):
    """-vv logs the debug lines of the seeds too."""
    process, cgroup = running("-vv", "--duration", "0.1")
    err = tool.finish(process).err
    mode = "AllowMultiple (BPF_F_ALLOW_MULTI - allows coexistence)"
    assert "Auto-detecting best BPF attach method" in err
    assert f'Opened cgroup file: "{cgroup.path}"' in err
    assert re.search(r"Program '\w+' loaded with expected_attach_type: Some\(Ingress\)", err)
    assert re.search(r"Program '\w+' loaded with expected_attach_type: Some\(Egress\)", err)
    assert re.search(rf'Attached \w+ to "{cgroup.path}" with mode: {re.escape(mode)}', err)


def test_verbose_logs_the_rates(tool, running, eventually):
    """-v logs a verdict and the counters for each direction every second."""
    process, cgroup = running("-v", "--duration", "1.6")
    err = tool.finish(process).err
    assert re.search(r"PID - download: actual=0 B/s, limit=1\.0 MB/s, ratio=0\.00x", err)
    counters = "program_calls=0, packets=0, dropped=0 (0.0%), bytes=0, dropped_bytes=0"
    assert f"eBPF stats PID - cgroup {cgroup.id}: {counters}" in err


NOTHING = "Nothing was sent or received, so there was nothing to limit.\n"
# Moves into a cgroup with a connection that was made before, and sends by it.
LATE = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
s = socket.create_connection(listener.getsockname())
peer = listener.accept()[0]
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
print("moved", flush=True)
while True:
    s.sendall(b"x" * 1000)
    peer.recv(1000)
    time.sleep(0.05)
"""
DATAGRAMS = """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 0))
print("bound", flush=True)
while True:
    s.sendto(b"x" * 100, s.getsockname())
    s.recv(1000)
    time.sleep(0.05)
"""


def test_where_nothing_was_sent_that_is_said(tool, scratch):
    """A limit that has seen no packet may have had none to see."""
    result = tool.run("--cgroup", scratch.cgroup().path, "-d", "1M", "--duration", "1.3")
    assert (result.status, result.err) == (0, NOTHING)


def test_an_idle_process_has_sent_nothing(tool, scratch):
    """Even if others on the machine have."""
    process = scratch.process(scratch.cgroup())
    busy = scratch.process(scratch.cgroup(), tool.python, "-c", DATAGRAMS)
    limit = ("--pid", str(process.pid), "--download-limit", "1M", "--duration", "1.3")
    result = tool.run(*limit)
    assert busy.poll() is None
    assert result.err == NOTHING


def test_a_process_that_sent_by_another_cgroup_s_socket_is_not_called_idle(tool, scratch, running):
    """Its sockets are limited by marks, and that is said."""
    cgroup = scratch.cgroup()
    child = subprocess.Popen([tool.python, "-c", LATE, cgroup.path], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"moved\n"
        process, _ = running("--duration", "1.3", cgroup=cgroup)
        lines = tool.finish(process).err.splitlines()
    finally:
        child.kill()
        child.communicate()
    assert any("created in another cgroup" in line for line in lines)
    assert NOTHING.strip() not in lines


def test_devices_that_nobody_else_uses_tell_of_datagrams(tool, scratch, running):
    """In a network namespace of its own, whatever passes is of the process."""
    cgroup = scratch.cgroup()
    up = "ip link set lo up && exec "
    child = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", up + '"$0" -c "$1"', tool.python, DATAGRAMS],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline() == b"bound\n"
        cgroup.move_in(child.pid)
        process, _ = running("--duration", "1.3", cgroup=cgroup)
        lines = tool.finish(process).err.splitlines()
    finally:
        child.kill()
        child.communicate()
    assert any("created in another cgroup" in line for line in lines)
    assert NOTHING.strip() not in lines


def test_traffic_is_counted_for_the_cgroup(tool, scratch, running):
    """A datagram of a process in the cgroup is counted in both directions."""
    program = (
        "import socket, time; time.sleep(0.2);"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0));"
        "s.sendto(bytes(100), s.getsockname()); s.recv(200)"
    )
    process, cgroup = running("--loopback", "--json")
    child = scratch.process(cgroup, tool.python, "-c", program)
    assert child.wait(30) == 0
    process.terminate()
    end = json.loads(tool.finish(process).text.splitlines()[-1])
    for direction in ("download", "upload"):
        assert (end[direction]["packets_total"], end[direction]["bytes_total"]) == (1, 128)


def test_two_cgroups_share_one_limit(tool, scratch, attached, eventually):
    """--cgroup may be repeated: the same programs are attached to each."""
    first, second = scratch.cgroup(), scratch.cgroup()
    process = tool.start(
        *("--cgroup", first.path, "--cgroup", second.path, "--download-limit", "1M", "-q")
    )
    eventually(lambda: attached(second))
    assert attached(first) == attached(second)
    process.terminate()
    assert tool.finish(process).status == 0
    assert attached(first) == attached(second) == ()


def test_if_the_second_cgroup_fails_the_first_is_not_limited(tool, scratch, attached):
    """All or nothing: a failure on one cgroup leaves nothing on the others."""
    good, bad = scratch.cgroup(), scratch.cgroup()
    with exclusive_program(bad):
        result = tool.run(
            *("--cgroup", good.path, "--cgroup", bad.path, "--download-limit", "1M", "-q"),
            *("--download-backend", "ebpf"),
        )
        assert result.status == 1
        assert attached(good) == ()


class exclusive_program:  # noqa: N801 - used like a function
    """Someone else's program in the mode that allows none beside it."""

    def __init__(self, cgroup):
        self._cgroup = cgroup

    def __enter__(self):
        fd = self._cgroup.open()
        self._loaded = loader.load(shipped.read("throttle"), ["pybpft_ingress"])
        self._attachment = links.attach_legacy(
            self._loaded.programs["pybpft_ingress"],
            fd,
            AttachType.CGROUP_INET_INGRESS,
            AttachMode.SINGLE,
        )
        os.close(fd)

    def __exit__(self, *_):
        self._attachment.detach()
        self._loaded.close()


@pytest.mark.parametrize("method", ["auto", pytest.param("link", marks=since("5.7")), "legacy"])
def test_an_exclusive_program_is_not_replaced(tool, scratch, attached, method):
    """Where another tool's program allows none beside it, ours is refused; theirs stays."""
    cgroup = scratch.cgroup()
    arguments = ("--cgroup", cgroup.path, "--download-limit", "1M", "--bpf-attach-method", method)
    with exclusive_program(cgroup):
        before = attached(cgroup)
        result = tool.run(*arguments, "--download-backend", "ebpf", "-q")
        assert attached(cgroup) == before
    assert result.status == 1
    complaint = result.err.splitlines()[-1]
    assert complaint.startswith("pybpfthrottle: error: ")
    assert "another program" in complaint


@since("5.7")
def test_an_error_other_than_einval_is_not_retried(tool, scratch):
    """Auto falls back only after EINVAL, and logs that it did not."""
    cgroup = scratch.cgroup()
    with exclusive_program(cgroup):
        err = tool.run(
            *("--cgroup", cgroup.path, "--download-limit", "1M", "--download-backend", "ebpf", "-v")
        ).err
    assert "Modern attach failed with non-EINVAL error, not retrying" in err
    assert "legacy" not in err


def test_a_cgroup_that_vanishes_is_an_error(tool, scratch, running):
    """When the cgroup is removed the command ends with one line and status 1."""
    cgroup = scratch.cgroup()
    inside = scratch.process(cgroup)
    process, _ = running("-q", cgroup=cgroup)
    cgroups.root().move_in(inside.pid)
    cgroup.remove(patience_s=5)
    result = tool.finish(process)
    assert result.status == 1
    assert cgroup.path in result.complaint
    assert "removed" in result.complaint


def test_one_of_two_cgroups_may_vanish(tool, scratch, running, eventually):
    """As long as one cgroup is left it goes on."""
    first, second = scratch.cgroup(), scratch.cgroup()
    process, _ = running("-q", "--cgroup", second.path, "--duration", "2", cgroup=first)
    first.remove(patience_s=5)
    assert tool.finish(process).status == 0


@pytest.mark.parametrize("last", ["process", "command"])
def test_a_terminal_that_goes_away_ends_it(tool, running, attached, tmp_path, last):
    """When its terminal is closed it ends, detaches, and has no traceback to tell."""
    with open(tmp_path / "err", "wb") as err:
        process, cgroup = running(on_terminal=True, stderr=err)
    terminal = tool.terminal_of(process)
    terminal.wait_for("actual=" if last == "process" else "Limiting")
    terminal.close()
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_under_nohup_it_goes_on_without_its_terminal(tool, running, attached, tmp_path):
    """With SIGHUP ignored a terminal that goes away does not end it; SIGTERM does, with 0."""
    with open(tmp_path / "err", "wb") as err:
        process, cgroup = running(
            on_terminal=True,
            stderr=err,
            ignored=signal.SIGHUP,
        )
    tool.terminal_of(process).wait_for("actual=")
    tool.terminal_of(process).close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert attached(cgroup)
    process.terminate()
    assert tool.finish(process).status == 0
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize("arguments", [("--json",), ()])
def test_a_reader_that_leaves_is_no_traceback(tool, running, attached, arguments):
    """``pybpfthrottle ... | head -1``: it ends without a traceback, and detaches."""
    process, cgroup = running(*arguments, "--duration", "2")
    assert process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    tool.finish(process)
    assert attached(cgroup) == ()


def test_kill_9_detaches_links(running, eventually, attached):
    """After kill -9 nothing is attached."""
    process, cgroup = running("-q")
    process.kill()
    process.wait()
    eventually(lambda: not attached(cgroup))


def test_two_instances_limit_one_cgroup_beside_each_other(tool, running, attached):
    """With --stack a second throttle goes beside the first; the end of one leaves the other."""
    first, cgroup = running("-q")
    before = attached(cgroup)
    options = ["--upload-limit", "1M", "-q", "--duration", "0.2", "--stack"]
    assert tool.run("--cgroup", cgroup.path, *options).status == 0
    assert attached(cgroup) == before
    first.terminate()
    assert tool.finish(first).status == 0


def test_samples_that_were_missed_are_left_out(running, tool):
    """After SIGSTOP one comes, whose time is the right one, and the next a second later."""
    process, _ = running("--json")
    events = (json.loads(line) for line in process.stdout)
    assert next(events)["event"] == "start"
    before = next(events)["elapsed_s"]
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    process.send_signal(signal.SIGCONT)
    after = [next(events)["elapsed_s"] for _ in range(3)]
    process.terminate()
    assert after[0] - before > 3.4
    assert all(0.5 < later - sooner < 2 for sooner, later in zip(after, after[1:]))
    assert next(events)["event"] == "end"
    assert tool.finish(process).status == 0


def test_verbose_has_one_line_a_direction(tool, scratch):
    """What was attached where, how, and at what rate; what repeats is for -vv."""
    paths = [scratch.cgroup().path for _ in range(2)]
    where = ("--cgroup", paths[0], "--cgroup", paths[1], "-d", "1M", "-u", "500K")
    once, twice = (tool.run(*where, "--duration", "0.1", log).err for log in ("-v", "-vv"))
    for direction, rate in (("download", "1.0 MB/s"), ("upload", "500.0 KB/s")):
        found = re.findall(rf"^INFO  {direction}: .*$", once, re.MULTILINE)
        assert len(found) == 1
        assert f"limited to {rate}, attached by link to {paths[0]}, {paths[1]}; " in found[0]
        hook = "ingress" if direction == "download" else "egress"
        assert once.count(f"Successfully attached eBPF {hook} program") == 1
        assert twice.count(f"Successfully attached eBPF {hook} program") >= 2
    assert once.count("✅ Successfully attached using modern method (bpf_link_create)") == 2
    assert "sockops" not in once
    assert "Successfully attached eBPF sockops program" in twice
