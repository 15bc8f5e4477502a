"""Programs that trace are attached as their sections say, and run as long as their link is open."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from compiled import CLANG, FIXTURES, compiled, executable
from since import needs_command, needs_machine, needs_option, needs_release, parse, running, since

from pybpfthrottle import bpf
from pybpfthrottle.bpf import perf
from pybpfthrottle.bpf.abi import LinkType
from pybpfthrottle.bpf.compiling import compile_object
from pybpfthrottle.bpf.errors import AttachError, ProgramLoadError
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.tracing import kernel_probes, tracefs, user_probes

LIBC = ctypes.CDLL(None)
NO_PROCESS = 2**22  # more than kernel.pid_max may be


def getppid() -> None:
    """Call the function of the C library, and with it the system call."""
    LIBC.getppid()


def open_null() -> None:
    """Open a file by openat."""
    os.close(os.open("/dev/null", os.O_RDONLY))


@contextmanager
def loaded(name: str, **given: Any) -> Iterator[Object]:
    """An object with one program, which counts runs of this process alone."""
    spec = bpf.read_object(compiled("tracing"))
    spec.variables["pid"].set(os.getpid())
    with bpf.load(spec, [name], **given) as live:
        yield live


def runs(live: Object) -> int:
    """How often the program has run."""
    return live.variables["runs"].get()  # type: ignore[return-value]


def check(name: str, act: Callable[[], None], cookie: int = 0, **places: Any) -> None:
    """A program runs for each action while it is attached, and sees its cookie."""
    if cookie and "cookies" not in places:
        places["cookie"] = cookie
    with loaded(name) as live:
        with live.programs[name].attach(**places):
            act()
            assert runs(live) >= 1
            assert live.variables["cookie"].get() == cookie
        ended = runs(live)
        act()
        assert runs(live) == ended


def needs_kprobes() -> None:
    """Skip on a kernel without kprobes."""
    with tracefs.directory() as place:
        works = os.path.exists(f"{place}/kprobe_events")
    needs_option("CONFIG_KPROBES", "CONFIG_KPROBE_EVENTS", works=works)


def needs_functions() -> None:
    """Skip on a machine that lets no program be loaded for a function."""
    try:
        with loaded("at_entry"):
            found = True
    except ProgramLoadError as error:
        found = error.errno != errno.EPERM
    needs_machine("a kernel that lets programs be loaded for a function", found=found)


def since_release(release: str) -> bool:
    """Whether the running kernel is of this release or a later one."""
    return running() >= parse(release)


class TestOfTheKernel:
    """Probes of the kernel's functions, and its tracepoints."""

    @pytest.mark.parametrize("name", ["at_openat2", "after_openat2", "at_syscall"])
    def test_a_function_that_a_section_names(self, name: str):
        """The beginning of a function, its return, and a system call's function are probed."""
        needs_kprobes()
        check(name, open_null)

    def test_an_offset(self):
        """A place within a function may be given; not every byte is an instruction's first."""
        needs_kprobes()
        check("at_kprobe", open_null, function="do_sys_openat2+0x0")
        with loaded("at_kprobe") as live, pytest.raises(AttachError):
            live.programs["at_kprobe"].attach(function="do_sys_openat2+0xffffff")

    @since("5.15")
    def test_a_cookie_of_a_kprobe(self):
        """The program sees the cookie that it was attached with."""
        needs_kprobes()
        check("at_kprobe_cookie", open_null, cookie=2**63, function="do_sys_openat2")

    def test_the_way_of_old_kernels(self):
        """A probe in tracefs works as the others do, and is removed with its link."""
        needs_kprobes()
        with loaded("at_kprobe") as live:
            program = live.programs["at_kprobe"]
            for returns in (False, True):
                before = runs(live)
                with kernel_probes.attach_kprobe(
                    program, "do_sys_openat2", returns=returns, by_tracefs=True
                ):
                    open_null()
                assert runs(live) > before
        with tracefs.directory() as place:
            assert f"pybpf_{os.getpid()}" not in Path(f"{place}/kprobe_events").read_text()

    def test_a_function_that_is_not_there(self):
        """The error has the nearest names."""
        needs_kprobes()
        with loaded("at_kprobe") as live:
            with pytest.raises(AttachError, match=r"none of this name.*do_sys_openat2"):
                live.programs["at_kprobe"].attach(function="do_sys_openat22")
            with pytest.raises(AttachError, match="is no place in the kernel"):
                live.programs["at_kprobe"].attach(function="do sys")
            with pytest.raises(TypeError, match="needs function="):
                live.programs["at_kprobe"].attach()

    @since("5.18")
    def test_many_functions(self):
        """One link attaches to all functions of a pattern, or to several, each with its cookie."""
        needs_kprobes()
        needs_option("CONFIG_FPROBE", works=_has_multi())
        check("at_many", open_null, function="do_sys_openat*")
        functions = ["do_sys_openat2", "do_exit"]
        check("at_many", open_null, cookie=7, function=functions, cookies=[7, 8])
        with loaded("at_many") as live:
            with pytest.raises(AttachError, match="did you mean do_sys_openat2"):
                live.programs["at_many"].attach(function=["do_sys_openat3"])
            with pytest.raises(AttachError, match="no function that can be traced matches"):
                live.programs["at_many"].attach(function="no_such_*")

    @since("6.10")
    def test_a_session(self):
        """A program in kprobe.session runs at both ends of a function."""
        needs_kprobes()
        needs_option("CONFIG_FPROBE", works=_has_multi())
        with loaded("at_both_ends") as live:
            with live.programs["at_both_ends"].attach(function="do_sys_openat2"):
                open_null()
            assert runs(live) >= 2

    def test_a_tracepoint(self):
        """A tracepoint is named by the section or the caller; tracefs need not be mounted."""
        check("at_tracepoint", getppid)
        check("at_tracepoint", os.getuid, tracepoint="syscalls:sys_enter_getuid")

    @since("5.15")
    def test_a_cookie_of_a_tracepoint(self):
        """The program sees the cookie that it was attached with."""
        check("at_tracepoint_cookie", getppid, cookie=12)

    def test_a_tracepoint_that_is_not_there(self):
        """The error has the nearest names, and a name without its category is refused."""
        with loaded("at_tracepoint") as live:
            program = live.programs["at_tracepoint"]
            with pytest.raises(AttachError, match="did you mean syscalls/sys_enter_getppid"):
                program.attach(tracepoint="syscalls/sys_enter_getpppid")
            with pytest.raises(AttachError, match="CATEGORY/NAME"):
                program.attach(tracepoint="sys_enter_getppid")

    @since("6.10")
    def test_a_cookie_of_a_raw_tracepoint(self):
        """The program sees the cookie; a wrong name has the nearest ones."""
        check("at_raw_tracepoint", getppid, cookie=13)
        with loaded("at_raw_tracepoint") as live:
            with pytest.raises(AttachError, match="did you mean sched_switch"):
                live.programs["at_raw_tracepoint"].attach(tracepoint="sched_swich")

    @since("5.15")
    @pytest.mark.parametrize("name", ["at_entry", "at_exit"])
    def test_fentry_and_fexit(self, name: str):
        """Programs at a function's entry and exit run, and see their cookies since 6.0."""
        needs_functions()
        check(name, open_null, cookie=5 if since_release("6.0") else 0)

    @since("5.15")
    def test_a_security_hook(self):
        """A program of a security hook is asked, where the BPF security module is on."""
        needs_functions()
        security = perf.mount_nowhere("securityfs")
        try:
            on = "bpf" in Path(f"/proc/self/fd/{security}/lsm").read_text().split(",")
        finally:
            os.close(security)
        needs_option("CONFIG_BPF_LSM", works=on)
        check("at_file_open", open_null)


def _has_multi() -> bool:
    with loaded("at_many") as live:
        try:
            live.programs["at_many"].attach(function=["do_exit"]).close()
        except AttachError:
            return False
    return True


class TestOfPrograms:
    """Probes of programs and libraries."""

    @pytest.mark.parametrize("name", ["at_getppid", "after_getppid"])
    def test_a_function_of_a_library(self, name: str):
        """A library is found as ld.so finds it; all processes, or one, run the program."""
        check(name, getppid)
        check(name, getppid, pid=os.getpid())

    @since("5.15")
    def test_a_cookie(self):
        """The program sees the cookie that it was attached with."""
        check("at_uprobe_cookie", getppid, cookie=9, binary="libc", function="getppid")

    def test_the_way_of_old_kernels(self):
        """A probe in tracefs works as the others do, and is removed with its link."""
        with loaded("at_getppid") as live:
            path, offset = user_probes.located("libc.so.6", "getppid", 0, None)
            program = live.programs["at_getppid"]
            with user_probes.attach_at(program, path, offset, by_tracefs=True):
                getppid()
            assert runs(live) == 1
        with tracefs.directory() as place:
            assert f"pybpf_{os.getpid()}" not in Path(f"{place}/uprobe_events").read_text()

    def test_what_is_not_there(self):
        """A function, a library, a file and a process that do not exist are named."""
        with loaded("at_getppid") as live:
            program = live.programs["at_getppid"]
            for words, places in {
                "no function getpppid; did you mean getppid": {"function": "getpppid"},
                "cannot find 'libnone.so.1'": {"binary": "libnone.so.1"},
                "there is no file /no/such": {"binary": "/no/such"},
                "is not a valid ELF file": {"binary": "/etc/passwd"},
                f"there is no process {NO_PROCESS}": {"pid": NO_PROCESS},
                "chosen among several functions": {"function": "strlen"},
            }.items():
                with pytest.raises(AttachError, match=words):
                    program.attach(**places)  # type: ignore[arg-type]

    @since("6.6")
    def test_many_functions(self):
        """One link attaches to all functions of a pattern, or to several, each with its cookie."""
        check("at_many_of_libc", getppid)
        check("at_many_of_libc", getppid, cookie=3, function=["getppid", "getuid"], cookies=[3, 4])
        with loaded("at_many_of_libc") as live:
            with pytest.raises(AttachError, match="no function that matches"):
                live.programs["at_many_of_libc"].attach(function="no_such_*")
            with pytest.raises(ValueError, match="1 cookies do not suit 2"):
                live.programs["at_many_of_libc"].attach(function=["getppid", "getpid"], cookies=[1])

    @since("6.13")
    def test_a_session(self):
        """A program in uprobe.session runs at both ends of a function."""
        with loaded("at_both_ends_of_getppid") as live:
            with live.programs["at_both_ends_of_getppid"].attach():
                getppid()
            assert runs(live) == 2

    @since("5.15")
    @pytest.mark.parametrize("stripped", [False, True])
    def test_a_usdt_probe(self, tmp_path: Path, stripped: bool):
        """A probe's argument and cookie are seen; one with a semaphore is switched on by it."""
        path = built(tmp_path, *["-s"] * stripped)
        with bpf.load(bpf.read_object(compiled("tracing")), ["at_usdt"]) as live:
            program, seen = live.programs["at_usdt"], live.variables
            with probed(path) as send:
                for probe, number in ((":plain", 1234), ("probed:counted", -5)):
                    with program.attach(binary=path, probe=probe, cookie=77):
                        send(number)
                    value: Any = seen["argument"].get()
                    assert ctypes.c_int32(value & 0xFFFFFFFF).value == number
                    assert seen["cookie"].get() == 77
            with pytest.raises(AttachError, match="did you mean probed:plain"):
                program.attach(binary=path, probe="probed:plan")

    @since("4.20")
    def test_a_usdt_probe_of_old_kernels(self, tmp_path: Path):
        """A program that asks for no argument and no cookie needs neither, semaphore or not."""
        path = built(tmp_path)
        spec = bpf.read_object(compiled("tracing"))
        with bpf.load(spec, ["at_usdt_alone"]) as live, probed(path) as send:
            for times, probe in enumerate(("probed:plain", "probed:counted"), 1):
                with live.programs["at_usdt_alone"].attach(binary=path, probe=probe):
                    send(1)
                assert runs(live) == times

    @since("5.15")
    def test_arguments_of_a_usdt_probe(self, tmp_path: Path):
        """Our header for programs finds arguments, by process too; a missing one is told."""
        needs_command(CLANG)
        path, source = built(tmp_path), str(FIXTURES / "usdt.src.c")
        spec = bpf.read_file(compile_object(source, str(tmp_path / "usdt.o")))
        with bpf.load(spec) as live, probed(path) as send:
            probe = {"binary": path, "probe": "probed:counted", "pid": send.pid}
            with live.programs["at_probe"].attach(cookie=8, **probe):
                send(-7)
            values = {name: variable.get() for name, variable in live.variables.items()}
            assert values == {"number": -7, "cookie": 8, "count": 1, "missing": -2}


def built(directory: Path, *flags: str) -> str:
    """The path of a program with USDT probes."""
    path = directory / "probed"
    path.write_bytes(executable("probed", *flags))
    path.chmod(0o755)
    return str(path)


class Probed:
    """A program with USDT probes, which are passed with a number."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    def __call__(self, number: int) -> None:
        """Have the program pass its probes with a number."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"%d\n" % number)
        self._process.stdin.flush()
        # It answers behind them, with the line and an empty one.
        self._process.stdout.readline()
        self._process.stdout.readline()


@contextmanager
def probed(path: str) -> Iterator[Probed]:
    """Such a program, as it runs."""
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Probed(process)
        finally:
            process.kill()


class TestProfiles:
    """Programs that run by a frequency."""

    @pytest.mark.parametrize("of", ["all", "pid", "cpu"])
    def test_a_frequency(self, of: str):
        """A busy process is found running, on all CPUs, by its number, or on one."""
        allowed = os.sched_getaffinity(0)
        places = {"all": {}, "pid": {"pid": os.getpid()}, "cpu": {"cpu": min(allowed)}}[of]
        with ExitStack() as stack:
            if of == "cpu":
                os.sched_setaffinity(0, {min(allowed)})
                stack.callback(os.sched_setaffinity, 0, allowed)
            live = stack.enter_context(loaded("at_sample"))
            stack.enter_context(live.programs["at_sample"].attach(frequency_hz=500, **places))
            deadline = time.monotonic() + 20
            while not runs(live) and time.monotonic() < deadline:
                sum(range(100000))
            assert runs(live)

    def test_what_is_wrong(self):
        """A frequency is needed, and an event that exists, and a process that does."""
        with loaded("at_sample") as live:
            program = live.programs["at_sample"]
            with pytest.raises(TypeError, match="needs period= or frequency_hz="):
                program.attach()
            with pytest.raises(AttachError, match="did you mean cycles"):
                program.attach(frequency_hz=1, event="cycels")
            with pytest.raises(AttachError, match=f"no process {NO_PROCESS}"):
                program.attach(frequency_hz=1, pid=NO_PROCESS)
            with pytest.raises(TypeError, match="cannot be attached by interface="):
                program.attach(frequency_hz=1, interface="lo")


@since("5.8")
def test_an_iterator_gives_records():
    """What an iterator writes is read by a codec, of all tasks or of one process (6.1)."""
    with loaded("each_task") as live:
        program = live.programs["each_task"]
        assert (os.getpid(), threading.get_native_id()) in list(program.iterate("II"))
        if since_release("6.1"):
            assert {tgid for tgid, _ in program.iterate("II", pid=os.getpid())} == {os.getpid()}
        with pytest.raises(ValueError, match="bytes are left over"):
            list(program.iterate(f"{1 << 24}s"))


@since("5.10")
def test_a_function_of_another_program_is_replaced():
    """A program in freplace takes the place of a function of a live program, until it is closed."""
    needs_functions()
    with loaded("pass") as live:
        target = live.programs["pass"]
        assert target.test_run(bytes(64)).retval == 2
        with loaded("drop_instead", targets={"drop_instead": target}) as other:
            with other.programs["drop_instead"].attach() as link:
                assert link.info().type == LinkType.TRACING
                assert target.test_run(bytes(64)).retval == 1
            assert target.test_run(bytes(64)).retval == 2


def test_tracefs_is_mounted_for_this_process_alone(monkeypatch: pytest.MonkeyPatch):
    """Where nobody has mounted tracefs, it is there for this process, and for nobody else."""
    needs_release("5.2")
    monkeypatch.setattr(tracefs, "_PLACES", ("/nowhere",))
    mounts = Path("/proc/self/mounts").read_text()
    assert tracefs.tracepoint_id("syscalls/sys_enter_getppid") > 0
    assert Path("/proc/self/mounts").read_text() == mounts


def test_an_interpreter_is_a_binary_too():
    """A probe at an offset of a file needs no symbols."""
    with loaded("at_kprobe") as live:
        path = os.path.realpath(sys.executable)
        link = user_probes.attach_uprobe(live.programs["at_kprobe"], path, offset=_entry(path))
        link.close()


def _entry(path: str) -> int:
    from elftools.elf.elffile import ELFFile

    from pybpfthrottle.bpf.tracing import binaries

    with open(path, "rb") as file:
        return binaries.opened(path).file_offset(ELFFile(file)["e_entry"])
