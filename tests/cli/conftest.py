"""Run the command as a user runs it, and prove after each test that it left nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from pybpfthrottle.backends.ebpf import registry
from pybpfthrottle.bpf import links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import own_cgroups

_REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE_S = 30.0
_OWN_VARIABLES = ("PYBPFTHROTTLE_", "CHADTHROTTLE_", "_PYBPFTHROTTLE_")
# What any command does for limits whose process was killed, such as those of a test beside it.
_OF_OTHERS = re.compile(r"^pybpfthrottle: the process that kept .* has ended; .*\n", re.MULTILINE)
_numbers = itertools.count()


def _eventually(predicate, *, within_s=_PATIENCE_S):
    """Poll until the predicate gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within_s} s: {predicate}"
        time.sleep(0.02)


def _limits_on(cgroup):
    """The ids of the throttles in force on a cgroup."""
    return {one.id for one in registry.in_force() if cgroup.path in one.cgroups and not one.removed}


def _attached(cgroup):
    """The ids of the programs attached at ingress and egress; none if the cgroup is gone."""
    try:
        fd = os.open(cgroup.path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return ()
    try:
        ingress = links.query(fd, AttachType.CGROUP_INET_INGRESS)
        egress = links.query(fd, AttachType.CGROUP_INET_EGRESS)
    finally:
        os.close(fd)
    return ingress.program_ids + egress.program_ids


def _cgroups_of(pid):
    """The cgroups that the tool with this pid made."""
    prefix = f"{own_cgroups.PREFIX}{pid}-"
    return [each for each in cgroups.walk() if os.path.basename(each.path).startswith(prefix)]


def _empty_and_remove(cgroup):
    with contextlib.suppress(OSError):
        for pid in cgroup.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cgroup.remove(patience_s=5.0)


class Result(NamedTuple):
    """How a command ended."""

    pid: int
    status: int
    out: bytes
    err: str

    @property
    def text(self):
        """Standard output as text."""
        return self.out.decode()

    @property
    def complaint(self):
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("pybpfthrottle: "), self.err
        return lines[0]

    @property
    def usage_error(self):
        """What is wrong with the usage, as click says it: in one line."""
        assert self.status == 2, (self.status, self.err)
        assert self.out == b""
        before, found, message = self.err.partition("\nError: ")
        assert found, self.err
        assert before.startswith("Usage: "), self.err
        assert message.count("\n") == 1, self.err
        return message.rstrip("\n")


class Terminal:
    """The master side of a terminal on which the tool runs."""

    def __init__(self, columns=250):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._seen = b""

    @property
    def text(self):
        """All that was shown until now."""
        while self.master >= 0 and select.select([self.master], [], [], 0)[0]:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # nobody holds the other side any more
                break
            if not chunk:
                break
            self._seen += chunk
        return self._seen.decode("utf-8", "replace")

    def wait_for(self, text):
        """Until this was shown."""
        try:
            _eventually(lambda: text in self.text)
        except AssertionError as error:
            raise AssertionError(f"{text!r} is not in {self.text!r}") from error

    def type(self, keys):
        """Type on the keyboard."""
        os.write(self.master, keys)

    def close_slave(self):
        """The tool has its own descriptor of it."""
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def close(self):
        """The terminal goes away."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


class Tool:
    """Starts the tool; ends and checks whatever it started."""

    def __init__(self, directory):
        self._directory = directory
        self.python = sys.executable
        self.path = str(_REPOSITORY)
        self._started = []
        self._terminals = {}
        self.cgroups_may_stay = False

    def command(self, *arguments):
        """The command line that starts it."""
        return [self.python, "-m", "pybpfthrottle", *arguments]

    def environment(self, **changes):
        """The environment of a user who knows where the package is."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith((*_OWN_VARIABLES, "COLUMNS", "LINES", "PYTHONUNBUFFERED"))
        }
        return {**kept, "TERM": "xterm", **changes, "PYTHONPATH": self.path}

    def start(self, *arguments, prefix=(), environment=(), **popen):
        """Start it; ``prefix`` is a command that executes it, so that it has the same pid."""
        popen.setdefault("stdin", subprocess.DEVNULL)
        popen.setdefault("stdout", subprocess.PIPE)
        popen.setdefault("stderr", subprocess.PIPE)
        popen.setdefault("cwd", self._directory)
        process = subprocess.Popen(
            [*prefix, *self.command(*arguments)],
            env=self.environment(**dict(environment)),
            **popen,
        )
        self._started.append(process)
        return process

    def start_on_terminal(self, *arguments, ignored=None, columns=250, **popen):
        """Start it as the leader of a session on a terminal of its own."""
        terminal = Terminal(columns)
        for stream in ("stdin", "stdout", "stderr"):
            popen.setdefault(stream, terminal.slave)

        def prepare():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)

        process = self.start(*arguments, start_new_session=True, preexec_fn=prepare, **popen)
        self._terminals[process.pid] = terminal
        terminal.close_slave()
        return process, terminal

    def terminal_of(self, process):
        """The terminal that a process was started on."""
        return self._terminals[process.pid]

    def finish(self, process, *, input=None):
        """Wait for its end."""
        out, err = process.communicate(input, timeout=_PATIENCE_S)
        said = _OF_OTHERS.sub("", (err or b"").decode())
        result = Result(process.pid, process.returncode, out or b"", said)
        assert "Traceback" not in result.err, result.err
        return result

    def run(self, *arguments, input=None, **options):
        """Start it and wait for its end."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        return self.finish(self.start(*arguments, **options), input=input)

    def cgroup_of(self, process):
        """The cgroup that ``run`` made, once a program is attached to it."""
        return _eventually(
            lambda: next((each for each in _cgroups_of(process.pid) if _attached(each)), None)
        )

    def clean(self):
        """End everything; say what should not have been there."""
        still_running = [process.pid for process in self._started if process.poll() is None]
        for process in self._started:
            _end(process)
        for terminal in self._terminals.values():
            terminal.close_slave()
            terminal.close()
        left = [each for process in self._started for each in _cgroups_of(process.pid)]
        attached = [each.path for each in left if _attached(each)]
        for each in reversed(left):
            _empty_and_remove(each)
        assert not still_running, f"the tool still runs: {still_running}"
        assert not attached, f"something stays attached to {attached}"
        assert self.cgroups_may_stay or not left, f"cgroups stay: {left}"


def _end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


class Scratch:
    """Cgroups of a test's own, and processes in them."""

    def __init__(self):
        self._cgroups = []
        self._processes = []

    def cgroup(self, *, name=None, parent=None):
        """A new cgroup, below the root unless there is a parent."""
        name = name or self.name()
        made = (parent or cgroups.root()).create_child(name)
        self._cgroups.append(made)
        return made

    def name(self):
        """A name that no other test has."""
        return f"clitest-{os.getpid()}-{next(_numbers)}"

    def process(self, cgroup, *command, user=None):
        """A process in this cgroup; without a command one that sleeps. ``user`` is an id."""
        started = subprocess.Popen(
            command or ("sleep", "120"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            user=user,
        )
        self._processes.append(started)
        cgroup.move_in(started.pid)
        return started

    def clean(self):
        """End everything; say what is still attached."""
        for process in self._processes:
            process.kill()
            process.wait()
        attached = [each.path for each in self._cgroups if _attached(each)]
        for each in reversed(self._cgroups):
            _empty_and_remove(each)
        assert not attached, f"something stays attached to {attached}"


@pytest.fixture
def eventually():
    """Poll until a predicate gives something true."""
    return _eventually


@pytest.fixture
def attached():
    """The ids of the programs that are attached to a cgroup."""
    return _attached


@pytest.fixture
def cgroups_of():
    """The cgroups that the tool with a pid made."""
    return _cgroups_of


@pytest.fixture
def scratch():
    """Cgroups of the test's own."""
    made = Scratch()
    yield made
    made.clean()


@pytest.fixture
def tool(scratch, tmp_path):
    """The tool in a checkout, started in an empty directory."""
    made = Tool(tmp_path)
    yield made
    made.clean()


@pytest.fixture
def running(tool, scratch):
    """Start the bare command on a new cgroup and wait until it limits; the process, the cgroup."""

    def start(*arguments, cgroup=None, on_terminal=False, **options):
        target = cgroup or scratch.cgroup()
        before = _limits_on(target)
        start_it = tool.start_on_terminal if on_terminal else tool.start
        started = start_it(
            "--cgroup", target.path, "--download-limit", "1M", "--upload-limit", "1M",
            *arguments, **options,
        )  # fmt: skip
        _eventually(lambda: _limits_on(target) - before)
        return (started[0] if on_terminal else started), target

    return start


@pytest.fixture
def limits_on():
    """Tells the throttles in force on a cgroup."""
    return _limits_on


@pytest.fixture
def repository():
    """The checkout."""
    return _REPOSITORY


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package and its objects, to be damaged; its directory."""
    target = tmp_path / "copy"
    _copy_package(target)
    return target


@pytest.fixture
def own_loopback():
    """A prefix for the demo without namespaces, whose port is always the same."""
    return ("unshare", "--net", "sh", "-ec", 'ip link set lo up; exec "$@"', "sh")


@pytest.fixture
def anybody(tool):
    """The tool where the user nobody can read it, and the command that makes one nobody."""
    directory = Path(tempfile.mkdtemp(prefix="clitest-"))
    _copy_package(directory)
    import click
    import elftools

    for module in (click, elftools):
        source = Path(module.__file__).parent
        shutil.copytree(source, directory / source.name)
    directory.chmod(0o755)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    tool.path = str(directory)
    tool.python = _python_of(become)
    yield [*become, "env", "--chdir=/"]
    shutil.rmtree(directory)


def _copy_package(target):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pybpfthrottle", "prebuilt"):
        shutil.copytree(_REPOSITORY / name, target / name, ignore=ignored)


def _python_of(become):
    """An interpreter that this user can run: pyenv's are often below /root."""
    for candidate in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        # setpriv keeps its capabilities until it executes something: only then it is nobody.
        command = [*become, "env", candidate, "-c", ""]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return candidate
    raise AssertionError("there is no interpreter that everybody can run")
