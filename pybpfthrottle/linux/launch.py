"""Start a command, if need be as another user, held back until its limit is in force."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import signal
from typing import Callable, NoReturn, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import LaunchError, ProcessError

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_OURS = 125
_MAX_ID = (1 << 32) - 2  # the next id means "unchanged"


class User(NamedTuple):
    """Whom a command runs as."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str

    @classmethod
    def parse(cls, text: str) -> User:
        """Read ``NAME`` or ``NAME:GROUP``, names or numbers. Raises ProcessError."""
        name, colon, group = text.partition(":")
        try:
            entry = pwd.getpwuid(int(name)) if _is_number(name) else pwd.getpwnam(name)
        except (KeyError, OverflowError, ValueError):
            raise ProcessError(f"there is no user {name!r}") from None
        gid = entry.pw_gid
        if colon:
            try:
                gid = int(group) if _is_number(group) else grp.getgrnam(group).gr_gid
            except (KeyError, ValueError):
                raise ProcessError(f"there is no group {group!r}") from None
            if gid > _MAX_ID:
                raise ProcessError(f"there is no group {group!r}")
        return cls(entry.pw_name, entry.pw_uid, gid, entry.pw_dir, entry.pw_shell)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


class Command:
    """A forked child process that waits for ``let_go``; until then it ends with this process."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        user: Optional[User] = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """Fork. The child gets the signal settings that this process inherited.

        It calls ``enter`` before it becomes the user. That may raise LaunchError.
        """
        self.argv = list(argv)
        self.is_stopped = False
        go_read, self._go = os.pipe()
        self._report, report_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            os.close(self._report)
            _child(self.argv, user, enter, go_read, report_write)
        os.close(go_read)
        os.close(report_write)

    def let_go(self) -> None:
        """Execute the command. Raises LaunchError if that fails; then the child is gone."""
        try:
            os.write(self._go, b"g")
        except BrokenPipeError:
            self._ended_by_signal(os.waitpid(self.pid, 0)[1])
        os.close(self._go)
        self._go = -1
        report = b""
        while chunk := os.read(self._report, 4096):
            report += chunk
        os.close(self._report)
        self._report = -1
        if report:
            os.waitpid(self.pid, 0)
            status, _, message = report.decode("utf-8", "replace").partition(" ")
            raise LaunchError(message, status=int(status))

    def check_waits(self) -> None:
        """Raise LaunchError, without a message, if a signal has ended the child that waits."""
        pid, wait_status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._ended_by_signal(wait_status)

    def _ended_by_signal(self, wait_status: int) -> NoReturn:
        # Such as Ctrl-C, which this process leaves to the command.
        os.close(self._go)
        os.close(self._report)
        self._go = self._report = -1
        raise LaunchError("", status=_exit_status(wait_status))

    def poll(self) -> Optional[int]:
        """Return the command's exit status (128 + N for signal N); None while it runs.

        ``is_stopped`` says from then on whether it is stopped.
        """
        while True:
            pid, wait_status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                return None
            self.is_stopped = os.WIFSTOPPED(wait_status)
            if not self.is_stopped and not os.WIFCONTINUED(wait_status):
                return _exit_status(wait_status)

    def abandon(self) -> None:
        """End the child without executing the command."""
        if self._go >= 0:
            os.close(self._go)
            os.close(self._report)
            self._go = self._report = -1
            os.waitpid(self.pid, 0)


def _exit_status(wait_status: int) -> int:
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)


def _child(
    argv: list[str], user: Optional[User], enter: Callable[[], None], go: int, report: int
) -> NoReturn:
    try:
        _restore_signals()
        if not os.read(go, 1):
            os._exit(_OURS)
        enter()
        if user is not None:
            _become(user)
        if not argv[0]:
            raise FileNotFoundError(errno.ENOENT, "")
        os.execvp(argv[0], argv)
    except KeyboardInterrupt:  # before its signals were restored
        os._exit(128 + signal.SIGINT)
    except LaunchError as error:
        os.write(report, f"{error.status} {error}".encode())
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        status = NOT_FOUND if missing else NOT_EXECUTABLE
        reason = _why_missing(argv[0]) if missing else error.strerror
        os.write(report, f"{status} {argv[0] or repr('')}: {reason}".encode("utf-8", "replace"))
    except Exception as error:
        os.write(report, f"{_OURS} {argv[0]!r}: {error}".encode("utf-8", "replace"))
    finally:
        os._exit(_OURS)


def _why_missing(name: str) -> str:
    """Tell a missing command from a script, or an ELF file, whose interpreter is missing."""
    directories = [""] if "/" in name else os.get_exec_path()
    there = name and any(os.path.isfile(os.path.join(where, name)) for where in directories)
    return "its interpreter was not found" if there else "command not found"


def _restore_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # Stopped before it executes the command, it would keep who waits for that.
    if signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, lambda *_: None)
    # Python ignores these signals.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _become(user: User) -> None:
    try:
        os.initgroups(user.name, user.gid)
        os.setgid(user.gid)
        os.setuid(user.uid)
    except OSError as error:
        raise LaunchError(
            f"cannot become the user {user.name}: {error.strerror}", status=_OURS
        ) from error
    os.environ.update(HOME=user.home, SHELL=user.shell, USER=user.name, LOGNAME=user.name)
