"""A machine that lacks something: no cgroup v2, a read-only one, damaged objects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

LIMIT = ("--download-limit", "1M", "-q")
ORDER = "bpfel" if sys.byteorder == "little" else "bpfeb"
_EACH_MOUNT = "for m in $(awk '/ - cgroup2 /{print $5}' /proc/self/mountinfo | tac); do "
# The root of a chroot is no mount point, so each mount is made private by itself.
_UNSHARE = ("unshare", "--mount", "--propagation", "unchanged", "sh", "-ec")
NO_CGROUP2 = [
    *_UNSHARE,
    _EACH_MOUNT + 'mount --make-private "$m"; umount "$m"; done; exec "$@"',
    "sh",
]
# Without cgroup v2, and nothing that is mounted is seen outside.
PRIVATE = [
    *("unshare", "--mount", "--propagation", "private", "sh", "-ec"),
    _EACH_MOUNT + 'umount "$m"; done; exec "$@"',
    *("sh", "sh", "-c"),
]
READ_ONLY = [
    *_UNSHARE,
    _EACH_MOUNT + 'mount --make-private "$m"; mount -o remount,bind,ro "$m"; done; exec "$@"',
    "sh",
]


def test_run_without_cgroup_v2_is_125(tool):
    """Where cgroup v2 is not mounted run says how to mount it."""
    result = tool.run("run", *LIMIT, "--", "true", prefix=NO_CGROUP2)
    assert result.status == 125
    assert "cgroup v2 is not mounted" in result.complaint
    assert "mount -t cgroup2" in result.complaint


def test_cgroup_v2_is_mounted_only_on_request(tool):
    """--mount-cgroup2 mounts it on /run/cgroup2, where it stays, and the limit is in force."""
    shown = "awk '/ - cgroup2 /{print $5}' /proc/self/mountinfo >&2"
    after = [*PRIVATE, 'status=0; "$@" || status=$?; ' + shown + "; exit $status", "sh"]
    made = not os.path.exists("/run/cgroup2")
    try:
        result = tool.run("run", *LIMIT, "--mount-cgroup2", "--", "true", prefix=after)
        assert (result.status, result.err.split()) == (0, ["/run/cgroup2"])
    finally:
        if made:
            os.rmdir("/run/cgroup2")


@pytest.mark.parametrize("target", ["--cgroup", "--unit"])
def test_each_target_without_cgroup_v2_is_an_error(tool, target):
    """Where cgroup v2 is not mounted each kind of target that needs it gives one line, and 1."""
    value = {"--cgroup": "/sys/fs/cgroup", "--unit": "x"}[target]
    result = tool.run(target, value, *LIMIT, prefix=NO_CGROUP2)
    assert result.status == 1
    assert "mount -t cgroup2" in result.complaint


def test_upload_and_process_need_cgroup_v2(tool):
    """Uploads of a process cannot be limited without cgroup v2: nothing else tells its packets."""
    upload = ("--upload-limit", "1M", "-q")
    result = tool.run("--pid", str(os.getppid()), *upload, prefix=NO_CGROUP2)
    assert result.status == 1
    assert "mount -t cgroup2" in result.complaint


def test_backends_without_cgroup_v2_are_unavailable(tool):
    """--list-backends says that cgroup v2 is not mounted, for those that need it."""
    result = tool.run("--list-backends", prefix=NO_CGROUP2)
    assert result.status == 0
    assert result.text.count("❌ unavailable: cgroup v2 is not mounted") == 5
    assert "ifb_tc      [priority: Good] ✅ available" in result.text


def test_run_with_a_read_only_cgroup_v2_is_125(tool):
    """In a container with a read-only cgroup v2 run says so."""
    result = tool.run("run", *LIMIT, "--", "true", prefix=READ_ONLY)
    assert result.status == 125
    assert "Read-only file system" in result.complaint


def test_a_cgroup_on_a_read_only_mount_can_be_limited(tool, scratch):
    """The bare command writes nothing there: a read-only mount is no obstacle."""
    cgroup = scratch.cgroup()
    result = tool.run("--cgroup", cgroup.path, *LIMIT, "--duration", "0.1", prefix=READ_ONLY)
    assert (result.status, result.err) == (0, "")


def test_run_in_a_cgroup_namespace_works(tool):
    """In a cgroup namespace of its own run limits the command."""
    prefix = ["unshare", "--cgroup"]
    assert tool.run("run", *LIMIT, "--", "sh", "-c", "exit 3", prefix=prefix).status == 3


def test_without_proc_there_is_one_line(tool):
    """Where /proc is not mounted the failure is one line."""
    hide = 'mount --make-rprivate /proc; umount -l /proc; exec "$@"'
    prefix = [*_UNSHARE, hide, "sh"]
    result = tool.run("run", *LIMIT, "--", "true", prefix=prefix)
    assert result.status == 125
    assert "mount table" in result.complaint


DAMAGES = ["empty", "header", "half", "text", "x86", "other order", "missing"]


def damage(directory, how):
    """Damage the objects for this machine."""
    for path in (directory / "prebuilt").glob(f"*.{ORDER}.o"):
        data = path.read_bytes()
        if how == "missing":
            path.unlink()
        elif how == "x86":
            shutil.copyfile("/bin/true", path)
        elif how == "other order":
            other = {"bpfel": "bpfeb", "bpfeb": "bpfel"}[ORDER]
            shutil.copyfile(str(path).replace(ORDER, other), path)
        else:
            path.write_bytes(
                {
                    "empty": b"",
                    "header": data[:40],
                    "half": data[: len(data) // 2],
                    "text": b"this is no object file\n" * 100,
                }[how]
            )


@pytest.mark.parametrize("how", DAMAGES)
def test_run_with_a_damaged_object_is_125(tool, copied_package, how):
    """Run with an object file that is no good gives one line and 125."""
    damage(copied_package, how)
    tool.path = str(copied_package)
    result = tool.run("run", *LIMIT, "--", "true")
    assert result.status == 125
    assert result.complaint.startswith("pybpfthrottle: error: ")


@pytest.mark.parametrize("how", DAMAGES)
def test_the_bare_command_with_a_damaged_object_is_1(tool, copied_package, scratch, attached, how):
    """The bare command with an object file that is no good gives one line and 1."""
    damage(copied_package, how)
    tool.path = str(copied_package)
    cgroup = scratch.cgroup()
    result = tool.run("--cgroup", cgroup.path, *LIMIT, "--duration", "0.3")
    assert result.status == 1
    assert result.complaint.startswith("pybpfthrottle: error: ")
    assert attached(cgroup) == ()


def test_the_line_says_which_file_is_missing(tool, copied_package):
    """A missing object is named, so that the installation can be mended."""
    damage(copied_package, "missing")
    tool.path = str(copied_package)
    assert f".{ORDER}.o" in tool.run("run", *LIMIT, "--", "true").complaint


@pytest.mark.parametrize("offset", range(0, 64, 9))
def test_a_damaged_byte_in_the_header_is_no_traceback(tool, copied_package, offset):
    """A wrong byte anywhere in the ELF header is one line, or does not matter."""
    for path in (copied_package / "prebuilt").glob(f"*.{ORDER}.o"):
        data = bytearray(path.read_bytes())
        data[offset] ^= 0xFF
        path.write_bytes(data)
    tool.path = str(copied_package)
    result = tool.run("run", *LIMIT, "--", "true")
    assert result.status in (0, 125)
    assert result.err == "" if result.status == 0 else result.complaint


def test_the_tool_works_from_a_directory_that_is_gone(tool, tmp_path):
    """A working directory that was removed is no traceback."""
    gone = tmp_path / "gone"
    gone.mkdir()
    prefix = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh"]
    assert tool.run("run", *LIMIT, "--", "true", prefix=prefix, cwd=gone).status == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_obstacle(tool, closed):
    """With standard streams closed run still passes the status on."""
    prefix = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    result = tool.run("run", *LIMIT, "--", "sh", "-c", "exit 3", prefix=prefix)
    assert result.status == 3


def test_help_into_a_closed_pipe_is_no_traceback(tool):
    """``pybpfthrottle --help | true``: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = tool.start("--help", stdout=writer)
    os.close(writer)
    assert tool.finish(process).err == ""


@pytest.mark.parametrize("stored", [True, False])
def test_run_needs_pyelftools_only_for_objects_that_are_not_stored(tool, copied_package, stored):
    """Without it run works; with an object that is not stored, it is named as what is missing."""
    if not stored:
        for path in copied_package.rglob("throttle*.json"):
            path.unlink()
    hide = "import sys; sys.modules['elftools'] = None; import runpy; "
    main = "sys.argv[0] = 'pybpfthrottle'; runpy.run_module('pybpfthrottle', run_name='__main__')"
    command = [tool.python, "-c", hide + main, "run", *LIMIT, "--", "true"]
    path = {**os.environ, "PYTHONPATH": str(copied_package)}
    done = subprocess.run(command, stderr=subprocess.PIPE, env=path, cwd="/", text=True)
    wrong = "pybpfthrottle: error: pyelftools is missing: pip install pyelftools"
    assert (done.returncode, done.stderr.split("\n")[0]) == ((0, "") if stored else (125, wrong))
