"""verify-setup: each cause is made for real, and the right conclusion is demanded."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from foreign import other
from lab import ENVIRONMENT, ROOT, TOOL, attached
from locked_memory import PROBE, without_sys_resource
from since import needs_option, running, since, until

from pybpfthrottle.bpf import features
from pybpfthrottle.bpf.abi import Cmd, ProgType
from pybpfthrottle.diagnostics.examine import Examination, examine
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup

PLAIN = [sys.executable, "-m", "pybpfthrottle.diagnostics"]
OWN_MOUNTS = [sys.executable, str(Path(__file__).parents[1].joinpath("own_mounts.py")), "--"]
REFUSING = [sys.executable, str(Path(__file__).parents[1].joinpath("refusing.py"))]


def verify(*command: str, **options: Any) -> tuple[dict[str, Any], int]:
    """What an examination tells as JSON, and its exit status."""
    done = subprocess.run(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        env={**ENVIRONMENT, **options.pop("variables", {})},
        timeout=60,
        **options,
    )
    return json.loads(done.stdout), done.returncode


def conclusion(*command: str, **options: Any) -> str:
    """The id of its conclusion; the exit status has to agree."""
    found, status = verify(*command, **options)
    assert status == (0 if found["works"] else 1)
    return found["conclusion"]["id"]


def result(found: dict[str, Any], check_id: str) -> dict[str, Any]:
    """What one check gave."""
    [check] = [check for check in found["checks"] if check["id"] == check_id]
    return check


def left_by(pid: int) -> list[str]:
    """The cgroups that an examination of this process id has made."""
    names = [os.path.basename(cgroup.path) for cgroup in cgroups.walk()]
    return [name for name in names if name.startswith(f"{own_cgroups.PREFIX}{pid}-")]


def test_this_machine_works_and_nothing_is_left(scratch: Cgroup) -> None:
    """All trials pass, on the root cgroup too; nothing stays."""
    command = [*PLAIN, "--json", "--cgroup", scratch.path, "--root-cgroup"]
    own = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    found = json.loads(own.communicate(timeout=60)[0])
    assert own.returncode == 0
    assert found["conclusion"]["id"] == works()
    outcomes = {check["id"]: check["outcome"] for check in found["checks"]}
    # Older kernels do not take all that shapes, and do without.
    assert outcomes.pop("trial.shaping") in ("pass", "warn")
    tried = [outcome for name, outcome in outcomes.items() if name.startswith("trial.")]
    # So do those before 5.10 without links, marks and tracing.
    assert set(tried) == {"pass"} if running() >= (5, 10) else "fail" not in tried
    assert left_by(own.pid) == attached(scratch) == []


def has_links() -> bool:
    """Whether this kernel has BPF links."""
    return features.LINK.available()


def works() -> str:
    """The conclusion where nothing stands in the way."""
    return "works" if has_links() else "works-by-legacy"


def test_the_json_keeps_its_schema(scratch: Cgroup) -> None:
    """The fields of schema 1."""
    found, _ = verify(*TOOL, "verify-setup", "--cgroup", scratch.path)
    assert set(found) == {"schema", "version", "works", "conclusion", "path", "checks"}
    assert found["schema"] == 1
    fields = {"id", "scenario", "title", "symptoms", "cause", "remedy", "reasons"}
    assert set(found["conclusion"]) == fields
    assert set(found["path"][0]) == {"question", "answer"}
    for check in found["checks"]:
        assert set(check) == {
            *("id", "section", "title", "meaning", "remedy"),
            *("outcome", "text", "cause", "evidence"),
        }
        assert check["outcome"] in ("pass", "warn", "fail", "skip")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("-all", "not-privileged"),
        pytest.param("-all,+cap_39", "not-privileged", marks=since("5.8")),
        ("-all,+net_admin", "not-privileged"),
        pytest.param("-all,+cap_39,+net_admin", "works", marks=since("5.8")),
        ("-all,+sys_admin,+net_admin", "works"),
    ],
)
def test_capabilities_decide(scratch: Cgroup, capabilities: str, expected: str) -> None:
    """CAP_BPF (39) with CAP_NET_ADMIN suffices; one alone does not."""
    command = ["setpriv", f"--bounding-set={capabilities}", *PLAIN, "--cgroup", scratch.path]
    assert conclusion(*command) == (works() if expected == "works" else expected)


def test_cap_sys_admin_alone_is_enough_or_named(scratch: Cgroup) -> None:
    """Newer kernels take it for CAP_NET_ADMIN too; on others that is named as missing."""
    command = ["setpriv", "--bounding-set=-all,+sys_admin", *PLAIN, "--cgroup", scratch.path]
    found, _ = verify(*command)
    attaches = result(found, "trial.legacy")["outcome"] == "pass"
    assert found["conclusion"]["id"] == (works() if attaches else "not-privileged")
    assert result(found, "rights.capabilities")["cause"] == "net-admin"


def test_root_of_a_user_namespace_is_not_root() -> None:
    """The capabilities are there, and do not count."""
    command = ["unshare", "--user", "--map-root-user", *PLAIN]
    tried = subprocess.run([*command[:3], "true"], stderr=subprocess.DEVNULL)
    needs_option("CONFIG_USER_NS", works=not tried.returncode)
    assert conclusion(*command) == "user-namespace"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([f"all={errno.EPERM}"], "bpf-refused"),
        ([f"all={errno.ENOSYS}"], "bpf-refused"),
        ([f"{Cmd.MAP_CREATE}={errno.EPERM}"], "commands-refused"),
        ([f"{Cmd.PROG_LOAD}={errno.EACCES}"], "commands-refused"),
        ([f"{Cmd.MAP_UPDATE_ELEM}={errno.EPERM}"], "commands-refused"),
        (
            [f"{Cmd.LINK_CREATE}={errno.EPERM}", f"{Cmd.PROG_ATTACH}={errno.EPERM}"],
            "commands-refused",
        ),
        ([f"{Cmd.LINK_CREATE}={errno.EPERM}"], "links-refused"),
        ([f"{Cmd.LINK_CREATE}={errno.ENOSYS}"], "links-refused"),
        ([f"{Cmd.LINK_CREATE}={errno.EINVAL}"], "works-by-legacy"),
        ([f"{Cmd.PROG_QUERY}={errno.EPERM}"], "works"),
    ],
)
def test_what_a_filter_refuses_is_named(scratch: Cgroup, rules: list[str], expected: str) -> None:
    """Bpf(2) as a whole, and command by command."""
    command = [*REFUSING, *rules, "--", *PLAIN, "--cgroup", scratch.path]
    assert conclusion(*command) == (works() if expected == "works" else expected)


def test_the_settings_may_let_the_legacy_call_stand_in(scratch: Cgroup) -> None:
    """Where links are refused and the method is set to legacy, this machine can limit."""
    command = [*REFUSING, f"{Cmd.LINK_CREATE}={errno.EPERM}", "--", *PLAIN]
    variables = {"PYBPFTHROTTLE_BPF_ATTACH_METHOD": "legacy"}
    assert conclusion(*command, "--cgroup", scratch.path, variables=variables) == "works-by-legacy"


def test_wrong_settings_are_the_cause() -> None:
    """An environment variable that no command would take."""
    variables = {"PYBPFTHROTTLE_BPF_ATTACH_METHOD": "magic"}
    assert conclusion(*PLAIN, variables=variables) == "settings"


@pytest.mark.parametrize("how", ["SINGLE", "ALLOW_OVERRIDE"])
def test_an_exclusive_program_on_the_target_is_the_cause(scratch: Cgroup, how: str) -> None:
    """The conclusion names it, and it stays attached."""
    with other(scratch, how) as theirs:
        found, _ = verify(*PLAIN, "--cgroup", scratch.path)
        assert found["conclusion"]["id"] == "exclusive-program"
        assert f"theirs (id {theirs.info().id}" in found["conclusion"]["reasons"][0]
        assert attached(scratch) == [theirs.info().id]


def test_an_exclusive_program_above_is_the_cause(scratch: Cgroup) -> None:
    """The conclusion names the ancestor."""
    below = scratch.create_child("below")
    try:
        with other(scratch, "SINGLE"):
            found, _ = verify(*PLAIN, "--cgroup", below.path)
        assert found["conclusion"]["id"] == "exclusive-program"
        assert f"{scratch.path}, above" in found["conclusion"]["reasons"][0]
    finally:
        below.remove(patience_s=5)


def test_64_programs_are_the_cause(scratch: Cgroup) -> None:
    """One more than the kernel takes."""
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(other(scratch, "link" if has_links() else "ALLOW_MULTIPLE"))
        assert conclusion(*PLAIN, "--cgroup", scratch.path) == "too-many-programs"


def test_what_shares_is_shown_and_no_obstacle(scratch: Cgroup) -> None:
    """Programs that let others attach are listed with their mode and owner."""
    with other(scratch, "ALLOW_MULTIPLE"):
        found, _ = verify(*PLAIN, "--cgroup", scratch.path)
    assert found["works"]
    # Of the cgroups above, what others have attached meanwhile is told too.
    own = [
        line
        for line in result(found, "attached.programs")["evidence"]
        if line.startswith(f"{scratch.path}: ")
    ]
    assert len(own) == 1
    assert own[0].startswith(f"{scratch.path}: cgroup_inet_egress multi: theirs (id ")


UNMOUNT_ALL = "umount -a -t cgroup2; umount -a -t cgroup; "
NAMED_V1 = "mkdir $0/v1 && mount -t cgroup -o none,name=pybpft none $0/v1 && "


@pytest.mark.parametrize(
    ("script", "expected"),
    [(UNMOUNT_ALL + NAMED_V1, "cgroup-v1-only"), (UNMOUNT_ALL, "no-cgroup2")],
)
def test_without_cgroup2_there_is_no_place_to_attach(
    tmp_path: Path, script: str, expected: str
) -> None:
    """A view with cgroup v1 alone, and one without any."""
    script += 'exec "$@"'
    command = [*OWN_MOUNTS, "sh", "-c", script, str(tmp_path), *PLAIN]
    assert conclusion(*command, stderr=subprocess.DEVNULL) == expected


def test_too_little_locked_memory_is_the_cause(scratch: Cgroup) -> None:
    """On kernels that charge BPF to it, without the right to raise it."""
    until("5.11", "BPF maps are charged to RLIMIT_MEMLOCK")
    probe = without_sys_resource(sys.executable, "-c", PROBE)
    assert subprocess.run(probe, env=ENVIRONMENT, stderr=subprocess.DEVNULL).returncode
    command = without_sys_resource(*PLAIN, "--cgroup", scratch.path)
    limits = (0, 0)
    assert (
        conclusion(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, limits))
        == "memlock"
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to be spoilt."""
    for name in ("pybpfthrottle", "prebuilt", "ebpf_src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def spoil(path: Path, how: str) -> None:
    """Do to an object what happens to objects."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "stale":
        path.write_bytes(data + b"\0")
    elif how == "sections":
        name = b"cgroup_skb/ingress\0"
        path.write_bytes(data.replace(name, b"cgroup/skb".ljust(len(name), b"\0")))
    else:
        path.write_bytes(data + b"\n")


@pytest.mark.parametrize(
    ("how", "name", "expected"),
    [
        ("missing", "prebuilt/throttle.{}.o", "objects-missing"),
        ("missing", "prebuilt/MANIFEST.json", "objects-missing"),
        ("truncated", "prebuilt/throttle-direct.{}.o", "objects-damaged"),
        ("stale", "prebuilt/throttle.{}.o", "objects-stale"),
        ("sections", "prebuilt/throttle.{}.o", "objects-old-sections"),
        ("newer", "ebpf_src/throttle.h", "objects-stale"),
    ],
)
def test_a_spoilt_object_is_the_cause(copy: Path, how: str, name: str, expected: str) -> None:
    """Missing, truncated, stale, or with the section name of old loaders."""
    target = "bpfel" if sys.byteorder == "little" else "bpfeb"
    spoil(copy / name.format(target), how)
    assert conclusion(*PLAIN, cwd=copy, variables={"PYTHONPATH": str(copy)}) == expected


def test_a_process_that_has_ended_is_no_target() -> None:
    """The conclusion says that it is gone."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert conclusion(*PLAIN, "--pid", str(ended.pid)) == "target-gone"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--cgroup", "/sys/fs/cgroup/nobody/made/this"], "target-gone"),
        (["--cgroup", "/usr"], "target-wrong"),
        (["--unit", "nobody-made-this"], "target-gone"),
    ],
)
def test_what_is_no_cgroup_is_no_target(options: list[str], expected: str) -> None:
    """A path that is not there, one that is no cgroup, a unit that does not run."""
    assert conclusion(*PLAIN, *options) == expected


def test_a_target_that_vanishes_meanwhile_is_gone(scratch: Cgroup) -> None:
    """Its cgroup is removed between two checks."""
    below = scratch.create_child("below")

    def progress(check) -> None:
        if check.id == "trial.target":
            below.remove()

    found: Examination = examine(cgroup=below.path, progress=progress)
    assert found.conclusion.id == "target-gone"


SHOWN_ELSEWHERE = {
    "no /proc": ("mount -t tmpfs none /proc", "no-proc"),
    "something over cgroup v2": ("mount -t tmpfs none {cgroup2}", "no-cgroup2"),
    "cgroup v2 read-only": ("mount -o remount,bind,ro {cgroup2}", "no-own-cgroup"),
}


@pytest.mark.parametrize("how", SHOWN_ELSEWHERE)
def test_what_is_missing_is_named(how: str) -> None:
    """Each has a conclusion of its own, and the remedy for it."""
    script, expected = SHOWN_ELSEWHERE[how]
    script = script.format(cgroup2=cgroups.mount().path) + '; exec "$@"'
    assert conclusion(*OWN_MOUNTS, "sh", "-c", script, "sh", *PLAIN) == expected


def test_its_own_cgroup_need_not_be_visible(scratch: Cgroup) -> None:
    """Nobody asked for it; what has to be tried is tried on a new cgroup."""
    script = 'mkdir $0/c && mount --bind "$1" $0/c && umount -l "$2"; shift 2; exec "$@"'
    with TemporaryDirectory() as directory:
        command = [*OWN_MOUNTS, "sh", "-c", script, directory, scratch.path]
        found, status = verify(*command, cgroups.mount().path, *PLAIN)
    assert status == 0, found["conclusion"]
    assert result(found, "cgroup.target")["outcome"] == "skip"
    assert result(found, "trial.upload")["outcome"] == "pass"


BROKEN = {
    "an empty /dev/kmsg": "mount --bind /dev/null /dev/kmsg",
    "no /proc/config.gz": "mount --bind /dev/null /proc/config.gz",
    "no /sys": "umount -l /sys; mkdir -p $0/c; mount -t cgroup2 none $0/c",
    "no /dev/kmsg": "mount -t tmpfs none /dev && mknod /dev/null c 1 3",
    "a read-only root": "mount -o remount,bind,ro /; mount -o remount,bind,ro $0 || true",
    "no commands": "PATH=/nowhere",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_system_is_examined(tmp_path: Path, how: str) -> None:
    """What is missing is no obstacle, and there is no traceback."""
    if "config.gz" in how:
        needs_option("CONFIG_IKCONFIG_PROC", works=os.path.exists("/proc/config.gz"))
    script = f'({BROKEN[how]}) 2>/dev/null; exec "$@"'
    if how == "no commands":
        script = f'{BROKEN[how]}; exec "$@"'
    command = [*OWN_MOUNTS, "sh", "-c", script, str(tmp_path), *PLAIN]
    assert conclusion(*command) in ("works", "works-by-legacy")


WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
import runpy
runpy.run_module("pybpfthrottle.diagnostics", run_name="__main__")
"""


def without(modules: str, *options: str, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The examination by a Python that lacks some modules."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, modules, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, "PYTHONPATH": str(package)},
        cwd=package,
        text=True,
    )


def test_click_and_rich_are_not_needed(scratch: Cgroup) -> None:
    """A rescue system has neither."""
    done = without("click,rich", "--cgroup", scratch.path)
    assert done.returncode == 0, done.stdout
    assert "✓ This machine can limit" in done.stdout


def test_a_python_without_ctypes_is_named() -> None:
    """One line says so, one what to do."""
    done = without("_ctypes")
    assert done.returncode == 1
    assert "✗ This Python lacks what the checks need" in done.stdout
    assert "Traceback" not in done.stdout


def test_pyelftools_is_not_needed(scratch: Cgroup) -> None:
    """The shipped objects are read without it, and the checks say who needs it."""
    done = without("elftools", "-v", "--cgroup", scratch.path)
    assert done.returncode == 0, done.stdout
    assert "✓ This machine can limit" in done.stdout
    assert "elftools is missing; only other objects than the shipped ones need it" in done.stdout


def test_missing_pyelftools_is_the_cause(tmp_path: Path) -> None:
    """Where what is stored beside the objects is missing, they could not be read."""
    for name in ("pybpfthrottle", "prebuilt"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*el.json"))
    done = without("elftools", "--json", package=tmp_path)
    assert json.loads(done.stdout)["conclusion"]["id"] == "pyelftools-missing"


def test_a_libc_without_syscall_is_the_cause() -> None:
    """As in a Python that is linked statically."""
    code = (
        "import ctypes, sys; ctypes.CDLL = lambda *_, **__: object();"
        " from pybpfthrottle.diagnostics.__main__ import main; sys.exit(main(['--json']))"
    )
    assert conclusion(sys.executable, "-c", code + " #") == "python-without-ctypes"


def test_quiet_tells_by_its_status_alone(scratch: Cgroup) -> None:
    """Nothing is printed."""
    for command in (PLAIN, [*TOOL, "verify-setup"]):
        for options in ([], ["--json"]):
            done = subprocess.run(
                [*command, "-q", *options, "--cgroup", scratch.path],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )
            assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("command", [PLAIN, [*TOOL, "verify-setup"]])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pid", "0"], "0"),
        (["--cgroup", ""], "--cgroup is empty"),
        (["--unit", ""], "--unit is empty"),
        (["--report", ""], "--report is empty"),
        (["--report", "/nowhere/at/all"], "No such file or directory"),
        (["--pid", "1", "--unit", "x"], "give one of --pid, --cgroup and --unit"),
    ],
)
def test_mistakes_are_told_before_anything_is_tried(
    command: list[str], options: list[str], said: str
) -> None:
    """With and without click: status 2, and what is wrong."""
    done = subprocess.run([*command, *options], stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("command", [PLAIN, [*TOOL, "verify-setup"]])
def test_a_report_that_cannot_be_written_is_an_error(command: list[str]) -> None:
    """Status 1, and one line; and one that was there is not lost by another mistake."""
    done = subprocess.run(
        [*command, "-q", "--report", "/dev/full"],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [PLAIN, [*TOOL, "verify-setup"]])
@pytest.mark.parametrize("how", ["ascii", "closed", "full"])
def test_any_standard_output_will_do(command: list[str], how: str) -> None:
    """One that knows no check marks, one that is closed, and one that is a full disk."""
    redirected = {"ascii": "", "closed": ">&-", "full": ">/dev/full"}[how]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *command],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii" if how == "ascii" else "utf-8"},
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if how == "full" else 0), done.stderr
    if how == "full":
        assert "No space left on device" in done.stderr


def test_a_report_can_be_written(scratch: Cgroup, tmp_path: Path) -> None:
    """It has all sections and the conclusion, and names neither the user nor the host."""
    path = tmp_path / "report.txt"
    command = [*TOOL, "verify-setup", "-q", "--cgroup", scratch.path, "--report", str(path)]
    variables = {**ENVIRONMENT, "SUDO_USER": "somebody"}
    subprocess.run(command, env=variables, check=True)
    text = path.read_text()
    assert "This machine can limit" in text
    assert "Kernel log" in text
    assert "CONFIG_CGROUP_BPF=y" in text or "cannot be read" in text
    assert "somebody" not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_nothing_is_left_by_an_interruption(scratch: Cgroup, number: signal.Signals) -> None:
    """Whenever it comes."""
    for delay_s in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4):
        own = subprocess.Popen(
            [*PLAIN, "-q", "--cgroup", scratch.path], env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        time.sleep(delay_s)
        own.send_signal(number)
        own.wait(timeout=30)
        assert left_by(own.pid) == attached(scratch) == []


def test_helpers_are_told_better_than_bpftool_does() -> None:
    """Each helper that bpftool alone calls available is refused by the verifier, by name."""
    done = subprocess.run(
        ["bpftool", "feature", "probe", "full", "-j"], stdout=subprocess.PIPE, check=True
    )
    helpers = json.loads(done.stdout)["helpers"]["cgroup_skb_available_helpers"]
    ours = [number for number in range(1, 212) if available(number)]
    assert {1, 5, 26} <= set(ours)
    assert len(ours) <= len(helpers)
    for number in set(range(1, 212)) - set(ours):
        missing = features.helper(ProgType.CGROUP_SKB, number).missing()
        assert f"#{number}" in str(missing)


def available(number: int) -> bool:
    """Whether cgroup_skb programs may call a helper."""
    return features.helper(ProgType.CGROUP_SKB, number).available()


@pytest.mark.parametrize(
    ("prefix", "outcome", "words"),
    [
        ([], "pass", "can be limited too"),
        ([*REFUSING, f"pidfd_getfd={errno.EPERM}", "--"], "warn", "a seccomp filter"),
        ([*REFUSING, f"pidfd_open={errno.EPERM}", "--"], "warn", "refuses pidfd_open"),
        ([*REFUSING, f"pidfd_getfd={errno.ENOSYS}", "--"], "warn", "Linux 5.6"),
        (["setpriv", "--bounding-set=-sys_ptrace"], "warn", "this needs CAP_SYS_PTRACE"),
    ],
)
def test_what_open_sockets_lack_is_said(prefix: list[str], outcome: str, words: str) -> None:
    """Whether a limit for processes covers those, and if not, why; limits work all the same."""
    found, code = verify(*prefix, *PLAIN)
    borrowing = result(found, "rights.borrowing")
    assert words in borrowing["text"]
    assert (borrowing["outcome"], found["works"], code) == (outcome, True, 0)
