"""--pid, --cgroup and --unit: what is limited, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from since import needs_machine

from pybpfthrottle.backends.ebpf.attached import links_of
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.process import families, is_kernel_thread

LIMIT = ("--download-limit", "1M", "-q")
SHORT = (*LIMIT, "--duration", "0.3")


def refusal(tool, *arguments, **options):
    """Status 1 and one line."""
    result = tool.run(*arguments, *SHORT, **options)
    assert result.status == 1
    assert result.out == b""
    assert result.complaint.startswith("pybpfthrottle: error: ")
    return result.complaint


def begin(tool, *arguments):
    """Start it, and wait until the limit is in force; what it says of that."""
    started = tool.start(*arguments, "--download-limit", "1M", "--json", stdout=subprocess.PIPE)
    line = started.stdout.readline()
    assert line, started.stderr.read()
    return started, json.loads(line)


def test_a_pid_is_limited_until_it_ends(tool, scratch, attached):
    """--pid attaches nothing to the process's own cgroup, and ends with 0 when the process does."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    started, event = begin(tool, "--pid", str(process.pid))
    assert (event["event"], event["pid"], event["pids"]) == ("start", process.pid, [process.pid])
    assert attached(cgroup) == ()
    process.kill()
    process.wait()
    assert tool.finish(started).status == 0


def test_a_pid_ends_as_a_zombie_too(tool, scratch):
    """A process whose parent does not reap it has ended all the same."""
    process = scratch.process(scratch.cgroup())
    started, _ = begin(tool, "--pid", str(process.pid))
    process.kill()
    assert tool.finish(started).status == 0


def test_a_pid_whose_cgroup_goes_with_it_is_no_error(tool, scratch):
    """When the process ends and its cgroup is removed at once the status is 0: it has ended."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    started, _ = begin(tool, "--pid", str(process.pid))
    process.kill()
    process.wait()
    cgroup.remove(patience_s=5)
    assert tool.finish(started).status == 0


def test_one_limit_for_several(tool, scratch):
    """--pid may be repeated; the end of the last one is the end."""
    cgroup = scratch.cgroup()
    processes = [scratch.process(cgroup) for _ in range(2)]
    pids = [process.pid for process in processes]
    started, event = begin(tool, "--pid", str(pids[0]), "--pid", str(pids[1]))
    assert event["pids"] == pids
    processes[0].kill()
    time.sleep(1.5)
    assert started.poll() is None
    processes[1].kill()
    assert tool.finish(started).status == 0


def test_a_limit_for_each(tool, scratch):
    """--each makes one for each of them, and what is told of it has its pid."""
    cgroup = scratch.cgroup()
    processes = [scratch.process(cgroup) for _ in range(2)]
    pids = [process.pid for process in processes]
    result = tool.run(
        *("--each", "--pid", str(pids[0]), "--pid", str(pids[1])),
        *("--json", "--download-limit", "1M", "--duration", "0.3"),
    )
    events = [json.loads(line) for line in result.text.splitlines()]
    for kind in ("start", "end"):
        assert [event["pid"] for event in events if event["event"] == kind] == pids


def test_a_process_is_limited_once(tool, scratch):
    """A second limit for it is refused, naming who has the first, unless --stack asks for it."""
    process = scratch.process(scratch.cgroup())
    pid = str(process.pid)
    started, _ = begin(tool, "--pid", pid)
    complaint = refusal(tool, "--pid", pid)
    assert f"process {started.pid}" in complaint
    assert "--stack" in complaint
    assert tool.run("--pid", pid, "--stack", *SHORT).status == 0
    process.kill()
    assert tool.finish(started).status == 0


def test_a_child_of_a_limited_process_is_limited_once(tool, scratch, eventually):
    """As it is with its parent."""
    parent = scratch.process(scratch.cgroup(), "sh", "-c", "sleep 60 & wait")
    [child] = eventually(lambda: families().get(parent.pid))
    started, _ = begin(tool, "--pid", str(parent.pid))
    assert "with its parents" in refusal(tool, "--pid", str(child))
    os.kill(child, signal.SIGKILL)
    assert tool.finish(started).status == 0


def test_a_process_of_a_limited_cgroup_is_limited_once(tool, scratch, attached, eventually):
    """As it is by the limit of its cgroup."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    started = tool.start("--cgroup", cgroup.path, *LIMIT)
    eventually(lambda: attached(cgroup))
    assert cgroup.path in refusal(tool, "--pid", str(process.pid))
    started.terminate()
    assert tool.finish(started).status == 0


def test_a_cgroup_with_a_limited_process_is_refused(tool, scratch):
    """As it is the other way round."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    started, _ = begin(tool, "--pid", str(process.pid))
    complaint = refusal(tool, "--cgroup", cgroup.path)
    assert f"{process.pid} (sleep)" in complaint
    assert f"process {started.pid}" in complaint
    assert tool.run("--cgroup", cgroup.path, "--stack", *SHORT).status == 0
    process.kill()
    assert tool.finish(started).status == 0


@pytest.mark.parametrize("way", ["name", "exe", "user"])
def test_processes_are_found_by_what_they_are(tool, scratch, tmp_path, eventually, way):
    """By name, executable and user, and later ones as well; until told to stop."""
    own = tmp_path / scratch.name()
    shutil.copy(shutil.which("sleep"), own)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o11)
    selected = {"name": own.name, "exe": str(own), "user": "54321"}[way]
    options = ["--exe", str(own)] if way == "user" else []
    user = 54321 if way == "user" else None
    cgroup = scratch.cgroup()
    started, event = begin(tool, f"--{way}", selected, *options)
    assert event["pids"] == []
    processes = [scratch.process(cgroup, str(own), "60", user=user) for _ in range(2)]
    wanted = sorted(process.pid for process in processes)
    eventually(lambda: sorted(limited_by(started.pid)) == wanted)
    for process in processes:
        process.kill()
    time.sleep(1.5)
    assert started.poll() is None
    started.terminate()
    assert tool.finish(started).status == 0


def test_a_script_is_no_executable(tool, tmp_path):
    """The kernel runs its interpreter: said, not waited for in vain."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert "interpreter" in refusal(tool, "--exe", str(script))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--name", "x", "--cgroup", "y"), "--cgroup"),
        (("--name", "x", "--move-cgroup"), "--move-cgroup"),
        (("--user", "root", "--whole-cgroup"), "--whole-cgroup"),
        (("--cgroup", "x", "--each"), "--each"),
        (("--unit", "x", "--no-children"), "--no-children"),
        (("--pid", "1", "--move-cgroup", "--whole-cgroup"), "--whole-cgroup"),
        (("--pid", "1", "--move-cgroup", "--each"), "--each"),
        (("--pid", "1", "--whole-cgroup", "--no-children"), "--no-children"),
        (("--exe", "/no/such/file"), "/no/such/file"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(tool, options, named):
    """Which options are named in the one line."""
    assert named in tool.run(*options, *LIMIT).usage_error


def test_a_user_that_does_not_exist_is_refused(tool):
    """By its name."""
    assert "no-such-user" in refusal(tool, "--user", "no-such-user")


def limited_by(pid):
    """The processes whose new sockets the tool with a pid has marked: its map PROCESSES."""
    found = []
    for info in programs_of(pid):
        for map_id in info.map_ids:
            with maps.open_by_id(map_id) as one:
                if one.spec.name == "PROCESSES":
                    found = list(one.typed(U32, U32))
    return found


def programs_of(pid):
    """The programs of the links that a process holds."""
    ids = links_of(pid)
    return [programs.info_by_id(link.program_id) for link in links.all_infos() if link.id in ids]


def test_the_log_names_the_process(tool, scratch):
    """The verdict's log line has the pid and the name."""
    process = scratch.process(scratch.cgroup())
    result = tool.run(
        "--pid", str(process.pid), "-v", "--download-limit", "1M", "--duration", "1.5"
    )
    assert f"PID {process.pid} (sleep) download: actual=0 B/s, limit=1.0 MB/s, " in result.err
    assert f"eBPF stats PID {process.pid} cgroup " in result.err


def test_the_whole_cgroup_may_be_asked_for(tool, scratch, attached, eventually):
    """With --whole-cgroup the other process is limited too."""
    cgroup = scratch.cgroup()
    process, _ = scratch.process(cgroup), scratch.process(cgroup)
    started = tool.start("--pid", str(process.pid), "--whole-cgroup", *LIMIT)
    eventually(lambda: attached(cgroup))
    started.terminate()
    assert tool.finish(started).status == 0


def test_the_root_cgroup_is_not_limited_for_one_process(tool, scratch):
    """As a whole; the process alone is."""
    process = scratch.process(cgroups.root())
    assert "root" in refusal(tool, "--pid", str(process.pid), "--whole-cgroup")
    assert tool.run("--pid", str(process.pid), *SHORT).status == 0


def test_a_process_moves_there_and_back(tool, scratch, eventually):
    """--move-cgroup makes a cgroup below its own one for the time of the limit."""
    cgroup = scratch.cgroup()
    process, other = scratch.process(cgroup), scratch.process(cgroup)
    started, _ = begin(tool, "--pid", str(process.pid), "--move-cgroup")
    [made] = [each for each in cgroups.walk() if each in cgroup and each != cgroup]
    assert (made.pids(), cgroup.pids()) == ([process.pid], [other.pid])
    started.terminate()
    assert tool.finish(started).status == 0
    assert sorted(cgroup.pids()) == sorted([process.pid, other.pid])
    assert not made.exists()


def test_a_moved_process_is_moved_back_after_a_crash(tool, scratch):
    """The next start does what kill -9 has prevented."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    started, _ = begin(tool, "--pid", str(process.pid), "--move-cgroup")
    started.kill()
    started.wait()
    assert cgroup.pids() == []
    assert tool.run("cleanup").status == 0
    assert cgroup.pids() == [process.pid]


def test_a_kernel_thread_is_refused(tool):
    """A kernel thread cannot be limited."""
    pids = [name for name in os.listdir("/proc") if name.isdigit() and is_kernel_thread(int(name))]
    # The inode of the first one is a constant of the kernel's (PROC_PID_INIT_INO).
    first = os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    needs_machine("the first process namespace, which shows kernel threads", found=first)
    assert pids
    assert "kernel thread" in refusal(tool, "--pid", pids[0])


@pytest.mark.parametrize("pid", ["past the last", str(10**30)])
def test_a_pid_that_does_not_exist_is_refused(tool, pid):
    """There is no such process."""
    if pid == "past the last":
        with open("/proc/sys/kernel/pid_max") as file:
            pid = file.read().strip()
    assert f"there is no process {pid}" in refusal(tool, "--pid", pid)


@pytest.mark.parametrize("cgroup_stays", [True, False])
def test_a_zombie_is_refused(tool, scratch, cgroup_stays):
    """A process that has ended, but was not reaped, is as good as none."""
    cgroup = scratch.cgroup()
    process = scratch.process(cgroup)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if not cgroup_stays:
        cgroup.remove(patience_s=5)
    assert str(process.pid) in refusal(tool, "--pid", str(process.pid))


def test_a_pid_that_ends_in_between_is_no_traceback(tool, scratch):
    """Whenever the process and its cgroup go, the tool ends: with 0, or with 1 and one line."""
    started = []
    for delay in ("0.1", "0.2", "0.3", "0.4"):
        cgroup = scratch.cgroup()
        process = scratch.process(cgroup, "sleep", delay)
        started.append((tool.start("--pid", str(process.pid), *LIMIT), process, cgroup))
    for _, process, cgroup in started:
        process.wait(30)
        cgroup.remove(patience_s=5)
    for running, _, _ in started:
        result = tool.finish(running)
        assert result.status in (0, 1)
        assert result.err == "" if result.status == 0 else result.complaint


def test_a_v1_path_is_refused(tool):
    """A path in a v1 hierarchy is refused, and where v2 is mounted is said."""
    paths = [each.path for each in cgroups.mounts() if each.type == "cgroup"]
    mounted = re.search(r" - cgroup ", Path("/proc/self/mountinfo").read_text())
    needs_machine("a hierarchy of cgroup v1", found=bool(mounted))
    path = paths[0]
    complaint = refusal(tool, "--cgroup", path)
    assert "v1" in complaint
    assert cgroups.root().path in complaint


def test_a_path_that_is_no_cgroup_is_refused(tool, tmp_path):
    """A directory elsewhere is no cgroup, and where they are is said."""
    complaint = refusal(tool, "--cgroup", str(tmp_path))
    assert f"{tmp_path} is not a cgroup" in complaint
    assert cgroups.root().path in complaint


def test_a_path_that_does_not_exist_is_refused(tool):
    """A cgroup that does not exist is refused."""
    path = f"{cgroups.root().path}/no-such-cgroup-here"
    complaint = refusal(tool, "--cgroup", path)
    assert path in complaint
    assert "No such file" in complaint


@pytest.mark.parametrize("path", ["", "a\nb", "\x1b[31mred"])
def test_a_strange_path_is_still_one_line(tool, path):
    """An empty path, or one with control characters, makes one line all the same."""
    assert refusal(tool, "--cgroup", path).isprintable()


def test_a_path_that_is_no_utf8_is_refused(tool):
    """Bytes that are no text are no traceback."""
    assert "No such file" in refusal(tool, "--cgroup", b"/sys/fs/cgroup/\xff")


def test_a_cgroup_whose_name_is_no_utf8_is_limited(tool, scratch):
    """A cgroup may have any name."""
    cgroup = scratch.cgroup(name=scratch.name() + os.fsdecode(b"\xff"))
    result = tool.run("--cgroup", os.fsencode(cgroup.path), *SHORT[:2], "--duration", "0.1")
    assert result.status == 0


def test_a_file_in_a_cgroup_is_refused(tool, scratch):
    """A file of a cgroup is refused, and its directory is suggested."""
    cgroup = scratch.cgroup()
    complaint = refusal(tool, "--cgroup", f"{cgroup.path}/cgroup.procs")
    assert complaint.endswith(cgroup.path)


@pytest.mark.parametrize("form", ["relative", "trailing slash", "symbolic link"])
def test_a_path_may_have_any_form(tool, scratch, tmp_path, form):
    """A relative path, a trailing slash and a symbolic link lead to the same cgroup."""
    cgroup = scratch.cgroup()
    (tmp_path / "link").symlink_to(cgroup.path)
    path = {
        "relative": os.path.relpath(cgroup.path, tmp_path.resolve()),
        "trailing slash": cgroup.path + "/",
        "symbolic link": "link",
    }[form]
    assert tool.run("--cgroup", path, *SHORT).status == 0


@pytest.mark.parametrize("suffix", [".service", ".scope", ".slice"])
def test_a_unit_is_found_by_its_name(tool, scratch, attached, eventually, suffix):
    """--unit finds the directory with the unit's name, wherever it is."""
    name = scratch.name() + suffix
    cgroup = scratch.cgroup(name=name, parent=scratch.cgroup())
    process = tool.start("--unit", name, *LIMIT)
    eventually(lambda: attached(cgroup))
    process.terminate()
    assert tool.finish(process).status == 0


def test_a_unit_without_suffix_is_a_service(tool, scratch, attached, eventually):
    """--unit NAME means NAME.service, as systemctl has it."""
    name = scratch.name()
    cgroup = scratch.cgroup(name=f"{name}.service")
    process = tool.start("--unit", name, *LIMIT)
    eventually(lambda: attached(cgroup))
    process.terminate()
    assert tool.finish(process).status == 0


def test_an_ambiguous_unit_is_refused(tool, scratch):
    """Two units of one name are both named, with the option that tells them apart."""
    name = scratch.name() + ".service"
    both = [scratch.cgroup(name=name, parent=scratch.cgroup()) for _ in range(2)]
    complaint = refusal(tool, "--unit", name)
    assert all(cgroup.path in complaint for cgroup in both)
    assert "--cgroup" in complaint


def test_an_absent_unit_is_refused(tool, scratch):
    """A unit that does not run has no cgroup."""
    name = scratch.name()
    assert f"{name}.service" in refusal(tool, "--unit", name)


@pytest.mark.parametrize("name", ["../..", "a/b", ""])
def test_what_is_no_unit_name_is_refused(tool, name):
    """A path is no unit name."""
    refusal(tool, "--unit", name)


def test_the_root_cgroup_is_refused(tool):
    """The root holds the session that this is typed in."""
    complaint = refusal(tool, "--cgroup", cgroups.root().path)
    assert "this session" in complaint
    assert "--whole-cgroup" in complaint


def inside(cgroup):
    """The command that executes another one in a cgroup."""
    return ["sh", "-c", f'echo $$ >{cgroup.path}/cgroup.procs; exec "$@"', "sh"]


def test_a_session_does_not_limit_itself(tool, scratch):
    """Started inside of the cgroup it refuses to limit it."""
    cgroup = scratch.cgroup()
    complaint = refusal(tool, "--cgroup", cgroup.path, prefix=inside(cgroup))
    assert "this session" in complaint


def test_a_session_does_not_limit_a_cgroup_above_it(tool, scratch):
    """Started below the cgroup it refuses to limit it."""
    cgroup = scratch.cgroup()
    below = scratch.cgroup(parent=cgroup)
    assert "this session" in refusal(tool, "--cgroup", cgroup.path, prefix=inside(below))


def test_a_session_is_the_shell_above_too(tool, scratch):
    """What counts is not only the tool's own cgroup, but those of the processes above it."""
    cgroup = scratch.cgroup()
    shell = [*inside(cgroup), "sh", "-c", '"$@"; exit $?', "sh", *inside(cgroups.root())]
    assert "this session" in refusal(tool, "--cgroup", cgroup.path, prefix=shell)


def test_a_session_limits_itself_when_told_to(tool, scratch):
    """With --whole-cgroup it does."""
    cgroup = scratch.cgroup()
    arguments = ("--cgroup", cgroup.path, "--whole-cgroup", *SHORT)
    assert tool.run(*arguments, prefix=inside(cgroup)).status == 0


def test_a_sibling_whose_name_begins_alike_is_no_session_of_ours(tool, scratch):
    """/a is not above /ab."""
    name = scratch.name()
    target, own = scratch.cgroup(name=name), scratch.cgroup(name=name + "b")
    assert tool.run("--cgroup", target.path, *SHORT, prefix=inside(own)).status == 0


def test_a_cgroup_that_is_named_twice_is_limited_once(tool, scratch):
    """Nothing is charged twice by it."""
    cgroup = scratch.cgroup()
    assert tool.run("--cgroup", cgroup.path, "--cgroup", cgroup.path, *SHORT).status == 0


def test_a_cgroup_inside_of_another_target_is_refused(tool, scratch):
    """Its packets would be charged twice."""
    cgroup = scratch.cgroup()
    other = scratch.cgroup(parent=cgroup)
    complaint = refusal(tool, "--cgroup", other.path, "--cgroup", cgroup.path)
    assert other.path in complaint


def test_a_threaded_cgroup_is_limited(tool, scratch):
    """A threaded cgroup can be limited like any other."""
    cgroup = scratch.cgroup(parent=scratch.cgroup())
    with open(f"{cgroup.path}/cgroup.type", "w") as file:
        file.write("threaded")
    assert tool.run("--cgroup", cgroup.path, *SHORT).status == 0


def test_run_works_inside_of_a_threaded_cgroup(tool, scratch):
    """Started in a threaded cgroup run finds or makes a place for its command."""
    cgroup = scratch.cgroup(parent=scratch.cgroup())
    with open(f"{cgroup.path}/cgroup.type", "w") as file:
        file.write("threaded")
    result = tool.run("run", *LIMIT, "--", "sh", "-c", "exit 3", prefix=inside(cgroup))
    assert result.status == 3


def test_run_works_where_no_cgroup_may_be_made_below(tool, scratch):
    """Where the caller's own cgroup takes no children, run goes below the root."""
    cgroup = scratch.cgroup()
    with open(f"{cgroup.path}/cgroup.max.descendants", "w") as file:
        file.write("0")
    result = tool.run(*("run", *LIMIT, "--", "cat", "/proc/self/cgroup"), prefix=inside(cgroup))
    path = next(line[3:] for line in result.text.splitlines() if line.startswith("0::"))
    assert path.startswith(f"/pybpfthrottle-{result.pid}-")


def test_run_makes_its_cgroup_below_the_callers(tool, scratch):
    """Started in a cgroup, run makes the command's cgroup below it."""
    cgroup = scratch.cgroup()
    result = tool.run("run", *LIMIT, "--", "cat", "/proc/self/cgroup", prefix=inside(cgroup))
    path = next(line[3:] for line in result.text.splitlines() if line.startswith("0::"))
    assert os.path.dirname(path) == "/" + os.path.basename(cgroup.path)


def test_a_signal_while_it_starts_leaves_nothing_attached(tool, scratch, attached):
    """SIGTERM at any moment of the start ends it with nothing attached."""
    cgroup = scratch.cgroup()
    for delay in (0.05, 0.1, 0.2, 0.3):
        process = tool.start("--cgroup", cgroup.path, *LIMIT, "--bpf-attach-method", "legacy")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.terminate()
        assert tool.finish(process).status in (0, -signal.SIGTERM)
        assert attached(cgroup) == ()
