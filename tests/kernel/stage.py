"""Where the blocks of README and docs run: a client's network namespace, with a server far away.

What a page names is put in place of what this machine lacks. ``1234`` becomes a process that
transfers, a unit or a path below /sys/fs/cgroup a new cgroup, example.org the server. A program
that a page limits, such as a browser, is played by curl under its name. The tool itself is real,
and whatever it limits transfers real bytes at a rate that is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

from compiled import compiled
from lab import ENVIRONMENT, ROOT, pace
from pages import Block, Section
from since import needs_command
from targets import eventually, rates_over

from pybpfthrottle.demo import peer
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.rules import reading

# Of what is not limited: a few times the limits of the pages, so that it soon comes down to them.
_FASTEST = Rate.parse("6M")
_PATIENCE_S = 40.0
_MEASURED_S = 0.8
# The burst, and a machine that does other things besides.
_MOST_RATIO = 1.35
_OBJECTS = ("events", "flows", "opensnoop", "profile", "tracing")
_PIDS = ("1234", "5678")
_DOWNLOADERS = ("apt-get", "crawl", "hf", "ollama", "pip")
_UPLOADERS = ("borg", "restic", "rsync")
_LASTING = re.compile(r"^(?:sudo )?pybpfthrottle --(?!help|version|list-backends)")
_RUNNER = """
import contextlib, io, json, sys, traceback
names = {"__name__": "page"}
for line in sys.stdin:
    printed, failed = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(json.loads(line), "page", "exec"), names)
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failed]), flush=True)
"""


class Far(NamedTuple):
    """The client's namespace, and the server at the other end of its wire."""

    wire: Wire
    url: str

    def inside(self, *command: str) -> list[str]:
        """A command line that runs in the client's namespace."""
        return self.wire.client.inside(*command)


@contextmanager
def far_away() -> Iterator[Far]:
    """A wire with a server at its far end."""
    with Wire() as wire:
        script = str(Path(__file__).with_name("far_end.py"))
        with subprocess.Popen(
            wire.server.inside(sys.executable, script, wire.server.address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            text=True,
        ) as server:
            assert server.stdout
            assert server.stdout.readline().strip() == peer.READY
            pace(server.pid, _FASTEST)
            try:
                yield Far(wire, f"http://{wire.server.address}")
            finally:
                server.kill()


class Command(NamedTuple):
    """A command of a page, and the lines that the page shows below it."""

    text: str
    shown: list[str]


class Started(NamedTuple):
    """A command that lasts, and where its output goes."""

    command: Command
    process: subprocess.Popen[bytes]
    output: Path


class Stage:
    """One section's surroundings; ``close`` ends what it started and removes the rest."""

    def __init__(self, far: Far, scratch: Cgroup) -> None:
        self._far = far
        self._scratch = scratch
        self._stack = ExitStack()
        self._directory = Path(tempfile.mkdtemp(prefix="page-"))
        self._stack.callback(shutil.rmtree, self._directory)
        self._directory.chmod(0o755)  # for commands that run as other users
        self._played: dict[str, str] = {}
        self._pids: list[tuple[int, Direction]] = []
        self._lasting: list[Started] = []
        self._python: Optional[subprocess.Popen[str]] = None
        self._programs()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def play(self, section: Section) -> None:
        """Run all blocks of a section, and compare what they show."""
        blocks = [block for block in section.blocks if block.excuse is None]
        text = "".join(block.text for block in blocks)
        self._cast(text)
        for name in _OBJECTS:
            if f"{name}.o" in text:
                (self._directory / f"{name}.o").write_bytes(compiled(name))
        for block in blocks:
            _RUNNERS[block.language](self, block)
        self._interrupt()

    # What the page names

    def _cast(self, text: str) -> None:
        """Start what the page takes for granted, and note what it is called here."""
        self._played["https://example.org"] = self._far.url
        self._played["/sys/fs/cgroup/batch"] = self._scratch.path
        for name in re.findall(r"--unit (\S+)|\bunit=\"(.+?)\"", text):
            self._unit("".join(name))
        matches = re.findall(r"--name (\S+)|\bname=\"(.+?)\"", text)
        users = re.findall(r"^(?:sudo )?pybpfthrottle (?!run).*--user (\S+)", text, re.MULTILINE)
        upload = "upload" in text and "download" not in text
        for user in users:
            self._played[f"--user {user}"] = f"--user {40000 + uuid.uuid4().int % 20000}"
        for name in dict.fromkeys("".join(match) for match in matches):
            self._named(name, users[0] if users else None, upload)
        if users and not matches:
            self._process(shutil.which("curl") or "curl", users[0], upload)
        for path in re.findall(r"--exe (\S+)", text):
            self._played[path] = self._copy(Path(path).name)
            self._process(self._played[path], None, upload)
        for pid in _PIDS:
            if re.search(rf"\b{pid}\b", text):
                name = re.search(rf"\b{pid} \(([\w-]+)\)", text)
                program = self._copy(name[1] if name else "curl")
                self._played[pid] = str(self._process(program, None, upload))

    def _unit(self, name: str) -> None:
        stem, _, suffix = name.partition(".")
        here = f"{stem}-{uuid.uuid4().hex[:6]}.{suffix or 'service'}"
        for option in ("--unit {}", 'unit="{}"'):
            self._played[option.format(name)] = option.format(here)
        unit = self._scratch.create_child(here)
        self._stack.callback(unit.remove, patience_s=5)
        self._process(self._copy("curl"), None, upload=False, cgroup=unit)

    def _named(self, name: str, user: Optional[str], upload: bool) -> None:
        here = f"{name[:8]}-{uuid.uuid4().hex[:4]}"
        for option in ("--name {}", 'name="{}"'):
            self._played[option.format(name)] = option.format(here)
        self._process(self._copy(here), user, upload)

    def _copy(self, name: str) -> str:
        """Curl under another name."""
        path = self._directory / "lib" / name
        if not path.exists():
            shutil.copy(shutil.which("curl") or "curl", path)
        return str(path)

    def _process(
        self, program: str, user: Optional[str], upload: bool, cgroup: Optional[Cgroup] = None
    ) -> int:
        """Start a transfer that does not end by itself; its process id."""
        how = ["-T", "-"] if upload else ["-N"]
        become = []
        if user is not None:
            become = ["setpriv", "--clear-groups", f"--reuid={self._played[f'--user {user}'][7:]}"]
        with open("/dev/zero", "rb") as zeros:
            process = subprocess.Popen(
                self._far.inside(
                    *become, program, "-s", "-o", "/dev/null", *how, f"{self._far.url}/"
                ),
                stdin=zeros,
                preexec_fn=lambda: (cgroup or self._scratch).move_in(0),
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        direction = Direction.UPLOAD if upload else Direction.DOWNLOAD
        self._pids.append((process.pid, direction))
        eventually(lambda: _transfers(process.pid, direction))
        return process.pid

    def _here(self, text: str) -> str:
        """What a page says, as it is called here."""
        for page, here in self._played.items():
            text = re.sub(rf"(?<!\w){re.escape(page)}(?!\w)", here.replace("\\", r"\\"), text)
        return text

    def _programs(self) -> None:
        """Commands that a page takes for granted, in front of this machine's."""
        for name in ("bin", "lib"):
            (self._directory / name).mkdir()
        get = f"exec curl -s -o /dev/null {self._far.url}/file"
        put = f"exec curl -s -T {ROOT}/README.md {self._far.url}/file"
        scripts = {
            "sudo": 'exec "$@"',
            **dict.fromkeys(_DOWNLOADERS, get),
            **dict.fromkeys(_UPLOADERS, put),
        }
        for name, script in scripts.items():
            path = self._directory / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        (self._directory / "bin" / "pybpfthrottle").write_text(
            f"#!{sys.executable}\nfrom pybpfthrottle.__main__ import main\nmain()\n"
        )
        (self._directory / "bin" / "pybpfthrottle").chmod(0o755)
        (self._directory / "crawl").symlink_to("bin/crawl")

    # Its blocks

    def commands(self, block: Block) -> None:
        """Run commands, one after the other.

        Those that last stay in force until the next block that has such, or the section's end.
        """
        commands = _commands(block)
        if any(_LASTING.match(command.text) for command in commands):
            self._interrupt()
        for command in commands:
            here = self._here(command.text)
            if _LASTING.match(command.text):
                self._start(command, here)
                continue
            done = self._run(here)
            assert done.returncode == 0, f"{command.text}\n{done.stdout}"
            compare(map(self._here, command.shown), done.stdout, command.text)

    def _run(self, here: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._far.inside("bash", "-c", here),
            cwd=self._directory,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_PATIENCE_S,
        )

    def _start(self, command: Command, here: str) -> None:
        output = self._directory / f"output-{time.monotonic_ns()}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self._far.inside("bash", "-c", f"exec {here}"),
                cwd=self._directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._stack.callback(_end, process)
        self._lasting.append(Started(command, process, output))
        # Its first line is that the limit is in force.
        eventually(lambda: output.stat().st_size or process.poll() is not None)
        assert process.poll() is None, f"{command.text}\n{output.read_text()}"
        for direction in Direction:
            if limit := re.search(rf"--{direction}-limit (\S+)", command.text):
                self._holds(direction, Rate.parse(limit[1]), command.text)

    def _holds(self, direction: Direction, limit: Rate, what: str) -> None:
        """One of the processes keeps to the limit at least; others may not be meant."""
        pids = [pid for pid, its in self._pids if its is direction]
        if pids:
            eventually(
                lambda: (
                    min(rates_over(pids, direction, _MEASURED_S)) <= _MOST_RATIO * limit.bytes_per_s
                ),
                within_s=15,
            )

    def unit_file(self, block: Block) -> None:
        """A unit's commands are some that can be run."""
        commands = re.findall(r"^Exec\w+=/usr/local/bin/(.+)$", block.text, re.MULTILINE)
        assert commands, block.text
        for command in commands:
            self._start(Command(command, []), self._here(command))

    def settings(self, block: Block) -> None:
        """A config file is one that the tool reads without a warning; rules are those it reads."""
        if _RULES.search(block.text):
            self._rules(block)
            return
        home = self._directory / "pybpfthrottle"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(block.text)
        done = self._run(f"XDG_CONFIG_HOME={self._directory} pybpfthrottle config show")
        assert done.returncode == 0, done.stdout
        assert "warning" not in done.stdout, done.stdout
        assert str(home) in done.stdout

    def _rules(self, block: Block) -> None:
        """Rules, or some keys of one."""
        path = self._directory / "rules.toml"
        path.write_text(block.text if "[[rule]]" in block.text else _RULE + block.text)
        reading.read([str(path)])

    def python(self, block: Block) -> None:
        """Run Python, with what earlier blocks of the section have defined, and its prints."""
        if self._python is None:
            self._python = subprocess.Popen(
                self._far.inside(sys.executable, "-c", _RUNNER),
                cwd=self._directory,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._stack.callback(_end, self._python)
        assert self._python.stdin
        assert self._python.stdout
        print(json.dumps(self._here(block.text)), file=self._python.stdin, flush=True)
        printed, failed = json.loads(self._python.stdout.readline())
        assert failed is None, f"line {block.line}: {failed}"
        promised = [
            line.partition("  # ")[2] for line in block.text.splitlines() if "print(" in line
        ]
        lines = printed.splitlines()
        assert len(lines) == len(promised), printed
        for line, promise in zip(lines, promised):
            pattern = re.escape(promise).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, line), f"line {block.line}: {line!r}, not {promise!r}"

    def json(self, block: Block) -> None:
        """JSON is JSON."""
        json.loads(block.text)

    def yaml(self, block: Block) -> None:
        """A file for Prometheus is one that it accepts."""
        path = self._directory / "prometheus.yml"
        path.write_text(block.text)
        what = "rules" if block.text.startswith("groups:") else "config"
        command = [needs_command("promtool"), "check", what, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def text(self, block: Block) -> None:
        """Nothing of it can be run."""

    def _interrupt(self) -> None:
        """Ctrl-C for what still runs. Each command has ended well, and has shown its lines."""
        for command, process, output in self._lasting:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            status = process.wait(_PATIENCE_S)
            assert status == 0, f"{command.text}\n{output.read_text()}"
            compare(map(self._here, command.shown), output.read_text(), command.text)
        self._lasting.clear()

    def _environment(self) -> dict[str, str]:
        own = os.path.dirname(sys.executable)
        path = f"{self._directory}/bin:{own}:{os.environ['PATH']}"
        return {**ENVIRONMENT, "PATH": path, "HOME": str(self._directory)}


_RULES = re.compile(r"^(\[\[rule\]\]|\[group\.|schedule =|when =)", re.M)
_RULE = '[[rule]]\nname = "a"\nmatch = { name = "a" }\nupload = "1M"\n'
_RUNNERS: dict[str, Callable[[Stage, Block], None]] = {
    "console": Stage.commands,
    "sh": Stage.commands,
    "ini": Stage.unit_file,
    "toml": Stage.settings,
    "python": Stage.python,
    "json": Stage.json,
    "yaml": Stage.yaml,
    "text": Stage.text,
    "c": Stage.text,
}
LANGUAGES = frozenset(_RUNNERS)


def _commands(block: Block) -> list[Command]:
    """A block's commands; in one of language console they stand behind a dollar."""
    commands: list[Command] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "sh":
            if line.strip() and not line.startswith("#"):
                commands.append(Command(re.sub("  +", " ", line), []))
        elif line.startswith("$ "):
            commands.append(Command(re.sub("  +", " ", line[2:]), []))
        elif line:
            commands[-1].shown.append(line)
    return commands


def compare(shown: Iterable[str], output: str, what: str) -> None:
    """The lines that a page shows come in this order, whatever their figures.

    Three dots stand for anything, and a line of three dots for any lines.
    """
    lines = iter(output.splitlines())
    for line in shown:
        if line == "...":
            continue
        assert any(_alike(line, found) for found in lines), f"{what}: no {line!r} in\n{output}"


def _alike(shown: str, found: str) -> bool:
    return re.fullmatch(_shape(shown), found.rstrip()) is not None


def _shape(line: str) -> str:
    """A pattern for a line's words, with any figures, any spaces and any ids of throttles."""
    parts = re.split(
        r"(\.\.\.|\b(?=[a-z]+\d)[a-z0-9]{6}\b|\d[\d.,]*|[▁-█]+|\s+|[KMG]?B/s|[KMG]?B\b)",
        line.rstrip(),
    )
    anything = {0: re.escape, 1: _any}
    return "".join(anything[number % 2](part) for number, part in enumerate(parts))


def _any(part: str) -> str:
    if part == "...":
        return ".*"
    if part[0].isdigit():
        return r"\d[\d.,]*"
    if part.isspace():
        return r"\s+"
    if part.isalnum() and part.islower():
        return "[a-z0-9]{6}"
    return "[▁-█]+" if "▁" <= part[0] <= "█" else "[KMG]?B" + "/s" * part.endswith("/s")


def _transfers(pid: int, direction: Direction) -> bool:
    """Whether a process has a connection that moves."""
    return rates_over([pid], direction, 0.05)[0] > 0


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
    process.wait()
