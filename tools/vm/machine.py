"""One machine after another under qemu's emulation, each with an end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

# The second CPU is never started (maxcpus=1), but per-CPU maps have a value for it. Where it
# runs, a kernel that patches its code (for the first program at a hook) may oops in emulation.
_COMMON = ["-accel", "tcg", "-smp", "2", "-m", "2048", "-display", "none", "-nodefaults"]
_COMMON += ["-no-user-config", "-no-reboot"]
_KERNEL = "panic=-1 oops=panic quiet loglevel=4 random.trust_cpu=on maxcpus=1"


class Board(NamedTuple):
    """How qemu makes a machine, with a line for the kernel, and another one for what it runs."""

    command: list[str]
    console: str
    output: str
    # The device of qemu's that ``output`` is; the kernel's line is always a plain serial one.
    second_line: list[str]


BOARDS = {
    "x86_64": Board(
        ["qemu-system-x86_64", "-cpu", "max"], "ttyS0", "ttyS1", ["-serial", "chardev:output"]
    ),
    # This processor has no pointer authentication, which takes half of the time in emulation.
    "aarch64": Board(
        ["qemu-system-aarch64", "-M", "virt", "-cpu", "neoverse-n1"],
        *("ttyAMA0", "ttyS0", ["-device", "pci-serial,chardev=output"]),
    ),
}
# The Debian packages of the emulators.
EMULATORS = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}


class Machine(NamedTuple):
    """A machine to be booted: its name, and the files of its kernel and its initramfs."""

    name: str
    arch: str
    image: Path
    initramfs: Path


class Run(NamedTuple):
    """What a machine said: the kernel on its console, the tests on the other line."""

    machine: Machine
    console: str
    output: str
    # None: it did not get as far as that.
    boot_s: Optional[float]
    total_s: float


class Emulator:
    """Runs machines side by side; all of them end with it.

    ``started`` is the text on the second line that says that a machine has booted.
    """

    def __init__(self, started: str, timeout_s: float) -> None:
        self._started = started.encode()
        self._timeout_s = timeout_s
        self._running: list[subprocess.Popen[bytes]] = []

    def run_all(self, machines: list[Machine], *, at_once: int) -> list[Run]:
        """Tests wait most of the time, and a machine uses one CPU at most."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return list(pool.map(self.run, machines))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._running:
                    process.kill()
                raise

    def run(self, machine: Machine) -> Run:
        """Run one machine until it has powered off, or its time is over."""
        board = BOARDS[machine.arch]
        console = machine.initramfs.with_name(f"{machine.initramfs.name}-console")
        command = [*board.command, *_COMMON, "-serial", f"file:{console}"]
        command += ["-chardev", "stdio,id=output", *board.second_line]
        command += ["-kernel", str(machine.image), "-initrd", str(machine.initramfs)]
        command += ["-append", f"console={board.console} {_KERNEL}"]
        begin, boot_s, output = time.monotonic(), None, bytearray()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            self._running.append(process)
            watchdog = threading.Timer(self._timeout_s, process.kill)
            watchdog.start()
            try:
                assert process.stdout
                while chunk := os.read(process.stdout.fileno(), 4096):
                    output += chunk
                    if boot_s is None and self._started in output:
                        boot_s = time.monotonic() - begin
            finally:
                watchdog.cancel()
                process.kill()
        total_s = time.monotonic() - begin
        log = console.read_text(errors="replace") if console.exists() else ""
        return Run(machine, log, output.decode(errors="replace"), boot_s, total_s)


def complain(run: Run, verdict: str) -> None:
    """Show the end of the console of a machine that did not do what it should."""
    lines = run.console.splitlines()[-50:]
    print(*lines, f"vmtest: {run.machine.name}: {verdict}", sep="\n", file=sys.stderr)
