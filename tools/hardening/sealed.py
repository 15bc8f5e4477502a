"""Surroundings of one's own on a machine where others work: what is left in them is ours."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
import uuid
from contextlib import ExitStack, suppress
from functools import partial
from typing import Callable, Iterator

from pybpfthrottle.bpf import programs
from pybpfthrottle.cli import background
from pybpfthrottle.linux import cgroup, libc, process, run_files
from pybpfthrottle.linux.cgroup import Cgroup

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_PR_SET_CHILD_SUBREAPER = 36
_BPFFS = "/sys/fs/bpf"
# The kernel notes who has loaded a program. Nobody has these numbers.
_FIRST_UID, _UIDS = 0x5F000000, 0x00FFFFFF


class Sealed:
    """Own mounts, network and cgroup, of a user id that tells our programs from those of others.

    For a process that does nothing else: it stays in the namespaces. ``close`` removes the cgroup.
    """

    def __init__(self) -> None:
        """Needs root. Raises OSError."""
        number = uuid.uuid4()
        self._undo = ExitStack()
        self.uid = _FIRST_UID + number.int % _UIDS
        libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET)
        for mounted in cgroup.mounts():
            _make_private(mounted.path)
        libc.mount("tmpfs", "/run")
        libc.mount("bpf", _BPFFS, "mode=0700")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # The effective one stays that of root.
        os.setresuid(self.uid, 0, 0)
        # nft ends at once if its real user id is another one than the effective one.
        subprocess.run = partial(subprocess.run, user=0)  # type: ignore[assignment]
        self.cgroup = cgroup.root().create_child(f"sealed-{number.hex[:12]}")
        self._undo.callback(self._remove_cgroup)
        self._pids: set[int] = set()
        # Programs of others: there may be many, and no number is given twice.
        self._others: set[int] = set()
        # What others have kept by the kernel alone is not ours to go on with.
        found = background._unsupervised
        background._unsupervised = lambda: [
            one for one in found() if self.cgroup.path in "".join(one.record.cgroups)
        ]

    def knows(self, pid: int) -> None:
        """Take what a process leaves for ours."""
        self._pids.add(pid)

    def left(self) -> list[str]:
        """Return what is left of throttles, a line each."""
        return [*self._programs(), *self._cgroups(), *self._files(), *self._processes()]

    def _programs(self) -> Iterator[str]:
        for program_id in set(programs.all_ids()) - self._others:
            with suppress(OSError):  # it has ended meanwhile
                info = programs.info_by_id(program_id)
                if info.created_by_uid == self.uid:
                    yield f"program {info.name}"
                else:
                    self._others.add(program_id)

    def _cgroups(self) -> Iterator[str]:
        for one in cgroup.walk():
            name = os.path.basename(one.path)
            if name.startswith("pybpfthrottle-") and (
                one in self.cgroup or any(f"-{pid}-" in name for pid in self._pids)
            ):
                yield f"cgroup {name}"

    def _files(self) -> Iterator[str]:
        for top in (_BPFFS, run_files.DIRECTORY):
            for directory, directories, names in os.walk(top):
                for name in (*directories, *names):
                    if not name.endswith(".debug"):
                        yield f"file {os.path.join(directory, name)}"

    def _processes(self) -> Iterator[str]:
        """Children, and those that were given to us because their parents have ended."""
        families = process.families()
        pending = list(families.get(os.getpid(), ()))
        while pending:
            pid = pending.pop()
            pending += families.get(pid, ())
            if pid not in self.bystanders and not process.has_ended(pid):
                with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                    text = file.read().replace(b"\0", b" ").decode("utf-8", "replace")
                    yield f"process {pid} {text.strip()}"

    bystanders: frozenset[int] = frozenset()

    def reap(self) -> None:
        """Collect the children that have ended, except the bystanders."""
        for pid in process.families().get(os.getpid(), ()):
            if pid not in self.bystanders:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def settled(self, patience_s: float, step_s: float = 0.02) -> list[str]:
        """Return what is left after a while; at once if that is nothing."""
        deadline = time.monotonic() + patience_s
        while True:
            self.reap()
            left = self.left()
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(step_s)

    def clear(self) -> None:
        """End and remove what is left, so that the next one begins with nothing."""
        for line in self._processes():
            with suppress(ProcessLookupError):
                os.kill(int(line.split()[1]), signal.SIGKILL)
        for directory, directories, names in os.walk(_BPFFS, topdown=False):
            for name in names:
                if not name.endswith(".debug"):
                    os.unlink(os.path.join(directory, name))
            for name in directories:
                os.rmdir(os.path.join(directory, name))
        shutil.rmtree(run_files.DIRECTORY, ignore_errors=True)

    def _remove_cgroup(self) -> None:
        """End what is in it, and remove it with those below. Raises OSError."""
        cgroup.root().move_in(os.getpid())
        for pid in self.cgroup.pids_below():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for directory, _, _ in os.walk(self.cgroup.path, topdown=False):
            Cgroup(directory).remove(patience_s=5)

    def close(self) -> None:
        """Remove the cgroup, and end what is in it."""
        self._undo.close()

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_private(path: str) -> None:
    """Have what is mounted here from now on not appear elsewhere."""
    with suppress(OSError):
        if ctypes.CDLL(None, use_errno=True).mount(None, path.encode(), None, 1 << 18, None):
            raise OSError(ctypes.get_errno(), path)


def forked(act: Callable[[], int], *, output: int, patience_s: float = 30.0) -> tuple[int, int]:
    """Run a function in a forked process; return its pid, and how it ended as in a shell.

    What it prints goes to ``output``. One that does not end is killed, and has ended with 255.
    """
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number, fd in enumerate((null, output, output)):
                os.dup2(fd, number)
            status = act()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return pid, os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + (status & 127)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid, 255


def cgroup_of(sealed: Sealed, name: str) -> Cgroup:
    """Return a cgroup below that of the surroundings, made if it is not there."""
    found = Cgroup(os.path.join(sealed.cgroup.path, name))
    return found if found.exists() else sealed.cgroup.create_child(name)
