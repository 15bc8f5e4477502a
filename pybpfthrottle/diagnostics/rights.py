"""What this process may do: capabilities, filters, security modules, locked memory."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import ExitStack
from typing import Iterator, Optional

from pybpfthrottle import settings
from pybpfthrottle.backends.ebpf.privileges import missing_capabilities
from pybpfthrottle.bpf import privileges, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.diagnostics.check import Check, Result, Setup, failed, passed, skipped, warned
from pybpfthrottle.errors import SettingsError
from pybpfthrottle.linux import process, sockets

_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)
# Nothing can be limited without these; the others have a substitute, or are only for looking.
ESSENTIAL = (Cmd.MAP_CREATE, Cmd.MAP_UPDATE_ELEM, Cmd.MAP_LOOKUP_ELEM, Cmd.PROG_LOAD)
_TRIED = (*ESSENTIAL, Cmd.PROG_ATTACH, Cmd.PROG_DETACH, Cmd.LINK_CREATE, Cmd.PROG_QUERY)
_NO_FD = (1 << 31) - 1
_WHOLE_RANGE = 4294967295


def _capabilities(setup: Setup) -> Result:
    held = process.own_status().get("CapEff", "unknown")
    missing = missing_capabilities()
    if missing:
        return failed(f"{' and '.join(missing)} missing", f"CapEff: {held}", cause="capabilities")
    if missing_capabilities(refused=True):
        text = "CAP_NET_ADMIN is missing; CAP_SYS_ADMIN replaces it only on newer kernels"
        return warned(text, f"CapEff: {held}", cause="net-admin")
    return passed("enough to load and attach", f"CapEff: {held}")


def _user_namespace(setup: Setup) -> Result:
    try:
        with open("/proc/self/uid_map") as file:
            lines = [line.split() for line in file]
    except OSError as error:
        return skipped(f"/proc/self/uid_map cannot be read: {error.strerror}")
    evidence = [f"/proc/self/uid_map: {' '.join(fields)}" for fields in lines]
    if lines == [["0", "0", str(_WHOLE_RANGE)]]:
        return passed("only the initial one", *evidence)
    return warned(
        "this process is in another one, where capabilities do not count for bpf(2)",
        *evidence,
        cause="user-namespace",
    )


def _seccomp(setup: Setup) -> Result:
    status = process.own_status()
    evidence = [f"{key}: {status[key]}" for key in ("Seccomp", "NoNewPrivs") if key in status]
    if status.get("Seccomp", "0") == "0":
        return passed("no filter is in force", *evidence)
    return warned("a seccomp filter is in force, as in a container", *evidence, cause="seccomp")


def _security_modules(setup: Setup) -> Result:
    modules = _first_line("/sys/kernel/security/lsm")
    context = _first_line("/proc/self/attr/current")
    evidence = [
        f"{name}: {text}" for name, text in (("modules", modules), ("context", context)) if text
    ]
    if context and not context.startswith(("unconfined", "kernel")) and " (" in context:
        return warned("a security module confines this process", *evidence, cause="confined")
    return passed("none confines this process", *evidence)


def _first_line(path: str) -> Optional[str]:
    try:
        with open(path) as file:
            return file.readline().strip("\0\n ")
    except (OSError, ValueError):
        return None


def _commands(setup: Setup) -> Result:
    answers = dict(_answers())
    refused = [cmd for cmd, number in answers.items() if number in _REFUSALS]
    evidence = [f"{cmd.name}: {syscall.errno_name(number)}" for cmd, number in answers.items()]
    if not refused:
        return passed("none of them is blocked", *evidence)
    names = ", ".join(cmd.name for cmd in refused)
    if len(refused) == len(answers):
        return failed("all of them are refused", *evidence, cause="all")
    if any(cmd in ESSENTIAL for cmd in refused):
        return failed(f"refused: {names}", *evidence, cause="some")
    if {Cmd.LINK_CREATE, Cmd.PROG_ATTACH} <= set(refused):
        return failed(f"refused: {names}", *evidence, cause="some")
    cause = "links" if Cmd.LINK_CREATE in refused else "other"
    return warned(f"refused: {names}", *evidence, cause=cause)


def _answers() -> Iterator[tuple[Cmd, int]]:
    """Yield the error of each command with invalid arguments: a filter refuses the command itself.

    The kernel refuses the arguments, with EINVAL for commands that it does not have.
    """
    for cmd in _TRIED:
        attr = Attr()
        if cmd in (Cmd.MAP_UPDATE_ELEM, Cmd.MAP_LOOKUP_ELEM):
            attr.map_elem.map_fd = _NO_FD
        elif cmd is Cmd.LINK_CREATE:
            attr.link_create.prog_fd = attr.link_create.target_fd = _NO_FD
        elif cmd in (Cmd.PROG_ATTACH, Cmd.PROG_DETACH):
            attr.prog_attach.attach_bpf_fd = attr.prog_attach.target_fd = _NO_FD
        elif cmd is Cmd.PROG_QUERY:
            attr.query.target_fd = _NO_FD
        try:
            syscall.bpf(cmd, attr)
            yield cmd, 0
        except OSError as error:
            yield cmd, error.errno or 0


def _borrowing(setup: Setup) -> Result:
    """Borrow a child's socket, as a limit on processes does with open sockets."""
    reading, writing = os.pipe()
    with ExitStack() as stack:
        own = stack.enter_context(socket.socket())
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until this process closes the other end
            os._exit(0)
        stack.callback(os.waitpid, child, 0)
        stack.callback(os.close, writing)
        os.close(reading)
        try:
            with sockets.Lender(child) as lender:
                os.close(lender.borrow(own.fileno()))
        except OSError as error:
            return _not_borrowed(error)
    if not sockets.may_borrow_all():
        return warned(
            "sockets of other users' processes cannot be limited: this needs CAP_SYS_PTRACE"
        )
    return passed("a process's open sockets can be limited too")


def _not_borrowed(error: OSError) -> Result:
    if error.errno == errno.ENOSYS:
        why = f"{error.filename} is not supported (Linux 5.6), or a filter refuses it"
    else:
        why = sockets.why_refused(error).text
    return warned(
        f"a limit on processes covers only new sockets: {why}",
        f"{error.filename}: {syscall.errno_name(error.errno or 0)}",
        cause="no-borrowing",
    )


def _memlock(setup: Setup) -> Result:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    evidence = f"RLIMIT_MEMLOCK: {_size(soft)}, at most {_size(hard)}"
    if not privileges.memlock_is_charged():
        return passed("this kernel does not charge BPF to locked memory (Linux 5.11)", evidence)
    if privileges.may_raise_memlock(hard):
        return passed("BPF is charged to locked memory, and the limit can be raised", evidence)
    if hard < 1 << 20:
        return warned(
            "BPF is charged to locked memory, and the limit is low", evidence, cause="memlock"
        )
    return passed("BPF is charged to locked memory, and the limit is high enough", evidence)


def _size(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} KiB"


def _settings(setup: Setup) -> Result:
    try:
        found = settings.load()
    except SettingsError as error:
        return failed(str(error))
    evidence = [f"{name} = {value} ({source})" for name, value, source in found.origins]
    if found.warnings:
        return warned(found.warnings[0], *found.warnings[1:], *evidence)
    return passed("the settings can be read", *evidence)


CHECKS = (
    Check(
        "settings",
        "Privileges",
        "settings",
        "config files and the environment decide how programs are attached",
        "pybpfthrottle config show lists where each setting comes from",
        _settings,
    ),
    Check(
        "rights.capabilities",
        "Privileges",
        "capabilities",
        "loading needs CAP_BPF (CAP_SYS_ADMIN before Linux 5.8), attaching needs CAP_NET_ADMIN",
        "run it as root: sudo pybpfthrottle ...",
        _capabilities,
    ),
    Check(
        "rights.user_namespace",
        "Privileges",
        "user namespace",
        "bpf(2) checks capabilities in the initial user namespace",
        "run it outside of the container, or in a privileged one",
        _user_namespace,
    ),
    Check(
        "rights.seccomp",
        "Privileges",
        "seccomp filter",
        "a filter may refuse all or some commands of bpf(2)",
        "allow bpf in the container's seccomp profile",
        _seccomp,
    ),
    Check(
        "rights.lsm",
        "Privileges",
        "security modules",
        "AppArmor, SELinux and others may refuse BPF to root",
        "allow it in the module's policy; the kernel log shows its denials",
        _security_modules,
    ),
    Check(
        "rights.commands",
        "Privileges",
        "commands of bpf(2)",
        "a filter or a security module may refuse single ones",
        "allow them in the seccomp profile or the policy that refuses them",
        _commands,
        ("kernel.bpf", "rights.capabilities"),
    ),
    Check(
        "rights.memlock",
        "Privileges",
        "locked memory",
        "kernels before 5.11 charge maps and programs to RLIMIT_MEMLOCK",
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        _memlock,
        ("rights.commands",),
    ),
    Check(
        "rights.borrowing",
        "Privileges",
        "open sockets",
        "a limit on processes borrows their open sockets (pidfd_getfd)",
        "allow it with CAP_SYS_PTRACE, the container's seccomp profile, and"
        " kernel.yama.ptrace_scope below 3; or limit a whole cgroup, which borrows nothing",
        _borrowing,
    ),
)
