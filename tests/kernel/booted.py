"""A real systemd with the files of this machine, in namespaces and a cgroup of its own.

It boots in about a second. Whatever is written there is gone with it, but for a disk that is given.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Optional

from lab import ROOT

from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup

PATIENCE_S = 60.0
# These are about the whole machine, also from in here.
MASKED = ("binfmt", "modules-load", "random-seed", "remount-fs", "sysctl", "udevd", "udev-trigger")
MASKED += ("update-utmp",)

# $0 is an empty directory, $1 the package, $2 and $3 the interpreter's trees, $4 it itself, $5 the
# services that are masked, $6 the disk with what an administrator configures.
BOOT = """
mount -t tmpfs tmpfs "$0"
mkdir "$0/up" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/up,workdir=$0/work" "$0/root"
cd "$0/root"
for tree in "$2" "$3"; do
    mkdir -p ".$tree"
    mount --rbind "$tree" ".$tree"
done
mkdir -p opt/package
cp -r "$1/pybpfthrottle" "$1/prebuilt" opt/package
{
    echo "#!$4"
    echo "import sys"
    echo "sys.path.insert(0, '/opt/package')"
    echo "from pybpfthrottle.__main__ import main"
    echo "main()"
} > usr/local/bin/pybpfthrottle
chmod 755 usr/local/bin/pybpfthrottle
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
for directory in run tmp dev; do mount -t tmpfs tmpfs $directory; done
for directory in systemd/system pybpfthrottle; do
    mkdir -p "$6/$directory" etc/$directory
    mount --bind "$6/$directory" etc/$directory
done
for name in null zero full random urandom tty; do
    : > dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/shm dev/pts dev/net
: > dev/net/tun
mount --bind /dev/net/tun dev/net/tun
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
ln -s pts/ptmx dev/ptmx
for name in $5; do ln -sf /dev/null etc/systemd/system/systemd-$name.service; done
printf '[Unit]\\nDefaultDependencies=no\\n' > etc/systemd/system/tests.target
# What is enabled is wanted by this one; systemd follows no link to such a directory.
wants=etc/systemd/system/multi-user.target.wants
if [ -d $wants ]; then cp -a $wants etc/systemd/system/tests.target.wants; fi
ip link set lo up
mkdir -p .outside
pivot_root . .outside
umount -l .outside
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=tests.target --log-target=journal --show-status=false
"""


class Machine:
    """The machine that a systemd manages."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        path = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        inside = ["nsenter", "-t", str(self._pid), "-a", "env", "-i", f"PATH={path}", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0 or not check, (
            f"{command}: {done.stdout}{done.stderr}{self.journal()}"
        )
        return done

    def journal(self) -> str:
        """The last lines of what its services have said."""
        return self.run("journalctl", "--no-pager", "-q", "-n", "20", check=False).stdout

    def tool(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run pybpfthrottle there."""
        return self.run("pybpfthrottle", *arguments, check=check)

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        there = Path(f"/proc/{self._pid}/root{path}")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(text)

    def exists(self, path: str) -> bool:
        """Whether there is a file."""
        return os.path.exists(f"/proc/{self._pid}/root{path}")

    def state(self, unit: str) -> str:
        """Whether a unit is active."""
        return self.run("systemctl", "is-active", unit, check=False).stdout.strip()


@contextmanager
def booted(disk: Optional[str] = None) -> Iterator[Machine]:
    """A machine whose systemd runs; nothing is left of it afterwards.

    A directory ``disk`` has what it finds configured, and what is configured on it.
    """
    own = Cgroup(os.path.join(cgroups.root().path, f"test-systemd-{uuid.uuid4().hex[:12]}"))
    os.mkdir(own.path)
    with tempfile.TemporaryDirectory(prefix="booted-") as scratch:
        namespaces = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        namespaces += ["--cgroup", "--uts", "--ipc", "--net"]
        trees = [str(ROOT), sys.base_prefix, sys.executable, " ".join(MASKED)]
        trees.append(disk or os.path.join(scratch, "disk"))
        command = ["unshare", *namespaces, "sh", "-euc", BOOT, scratch, str(ROOT), *trees]
        outer = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: own.move_in(0),
        )
        try:
            yield _when_ready(outer)
        finally:
            outer.kill()
            outer.communicate()
            _remove(own)


def _when_ready(outer: subprocess.Popen[Any]) -> Machine:
    """The machine, once its systemd answers."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "systemd":
            machine = Machine(int(children[0]))
            if machine.run("systemctl", "is-system-running", check=False).stdout == "running\n":
                return machine
        assert outer.poll() is None, outer.stdout and outer.stdout.read()
        time.sleep(0.05)
    raise AssertionError("systemd does not answer")


def _remove(top: Cgroup) -> None:
    """Remove a cgroup with all below it, whose processes have been killed."""
    for cgroup in reversed(list(cgroups.walk(top))):
        for pid in cgroup.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cgroup.remove(patience_s=10.0)


def missing() -> str:
    """What keeps a systemd from being booted here; empty if nothing does."""
    return "" if shutil.which("systemctl") and os.path.exists("/lib/systemd/systemd") else "systemd"
