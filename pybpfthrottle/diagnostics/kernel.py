"""The interpreter and the kernel: their versions, and which parts of BPF they support."""

from __future__ import annotations

import errno
import os
import platform
from importlib import import_module
from typing import Iterator, Optional

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.features import CONGESTION_VERDICT, DIRECT_PACKET_ACCESS
from pybpfthrottle.bpf import features, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, ProgType
from pybpfthrottle.bpf.obj.insn import CALL, decoded
from pybpfthrottle.bpf.running import config_files
from pybpfthrottle.diagnostics.check import Check, Result, Setup, failed, passed, skipped, warned
from pybpfthrottle.errors import Error, ObjectFileError

_REQUIRED_OPTIONS = (
    "CONFIG_BPF",
    "CONFIG_BPF_SYSCALL",
    "CONFIG_CGROUPS",
    "CONFIG_CGROUP_BPF",
    "CONFIG_INET",
    "CONFIG_SOCK_CGROUP_DATA",
)
_WANTED_OPTIONS = ("CONFIG_BPF_JIT",)
LOCKDOWN = "/sys/kernel/security/lockdown"
_OPTIONAL = (features.LINK, CONGESTION_VERDICT, DIRECT_PACKET_ACCESS)


def configuration() -> Optional[tuple[str, dict[str, str]]]:
    """Return the file and each option that is set; None if no file can be read."""
    for path in config_files():
        try:
            with open(path, "rb") as file:
                data = file.read()
            if path.endswith(".gz"):
                import gzip

                data = gzip.decompress(data)
            text = data.decode()
        except (OSError, EOFError, ValueError, ImportError):  # a Python without zlib
            continue
        lines = (line.split("=", 1) for line in text.splitlines() if line[:7] == "CONFIG_")
        return path, {pair[0]: pair[1] for pair in lines if len(pair) == 2}
    return None


def _is_stored() -> bool:
    """Whether the shipped objects can be read without pyelftools."""
    try:
        return bool(programs.read_anew("throttle"))
    except ObjectFileError:
        return False


def _python(setup: Setup) -> Result:
    found = f"Python {platform.python_version()} on {os.uname().machine}"
    try:
        syscall.number()
        syscall.prepare()
    except Error as error:
        return failed(f"{found}: {error}", cause="no-syscall")
    packages = []
    for name in ("elftools", "click", "rich"):
        try:
            import_module(name)
            packages.append(f"{name} is installed")
        except ImportError as error:
            if name == "elftools" and not _is_stored():
                return failed(f"{found} lacks pyelftools", str(error), cause="no-pyelftools")
            users = "other objects than the shipped ones" if name == "elftools" else "commands"
            packages.append(f"{name} is missing; only {users} need it")
    return passed(found, *packages)


def _version(setup: Setup) -> Result:
    kernel = os.uname()
    return passed(f"{kernel.sysname} {kernel.release}", kernel.version)


def _proc(setup: Setup) -> Result:
    if os.path.exists("/proc/self/mountinfo"):
        return passed("mounted")
    return failed("/proc is not mounted", cause="no-proc")


def _bpf(setup: Setup) -> Result:
    # An empty map is invalid; the kernel's refusal proves that the call reached it.
    try:
        syscall.bpf(Cmd.MAP_CREATE, Attr())
    except OSError as error:
        evidence = f"BPF_MAP_CREATE of nothing: {syscall.errno_name(error.errno or 0)}"
        if error.errno == errno.ENOSYS:
            return failed("the kernel answers as if it had no bpf(2)", evidence, cause="enosys")
        return passed("bpf(2) works", evidence)
    return passed("bpf(2) works")


def _config(setup: Setup) -> Result:
    found = configuration()
    if found is None:
        return skipped("the kernel's configuration cannot be read", *config_files())
    path, options = found
    wanted = (*_REQUIRED_OPTIONS, *_WANTED_OPTIONS)
    values = [f"{name}={options.get(name, 'n')}" for name in wanted]
    lacking = [name for name in _REQUIRED_OPTIONS if options.get(name, "n") == "n"]
    if lacking:
        return failed(f"{path} lacks {', '.join(lacking)}", *values, cause="config")
    return passed(f"{path} has all required options", *values)


def _jit(setup: Setup) -> Result:
    path = "/proc/sys/net/core/bpf_jit_enable"
    try:
        with open(path) as file:
            value = file.read().strip()
    except FileNotFoundError:
        return warned("this kernel has no BPF JIT compiler: each packet costs more", path)
    except PermissionError:
        return skipped("only root can see whether BPF is compiled", path)
    if value == "0":
        return warned("BPF programs are interpreted: each packet costs more", f"{path}: 0")
    return passed("BPF programs are compiled", f"{path}: {value}")


def _lockdown(setup: Setup) -> Result:
    try:
        with open(LOCKDOWN) as file:
            text = file.read().strip()
    except OSError as error:
        return passed("no lockdown is visible", f"{LOCKDOWN}: {error.strerror}")
    if "[none]" in text:
        return passed("the kernel is not locked down", f"{LOCKDOWN}: {text}")
    return warned("the kernel is locked down", f"{LOCKDOWN}: {text}", cause="lockdown")


def _features(setup: Setup) -> Result:
    evidence = []
    for feature in _OPTIONAL:
        missing = feature.missing()
        told = "available" if missing is None else f"not available: {missing}"
        evidence.append(f"{feature.name} (Linux {feature.since}): {told}")
    if all(feature.available() for feature in _OPTIONAL):
        return passed("all optional features are available", *evidence)
    return warned("some optional features are missing; limits work without them", *evidence)


def _helpers(setup: Setup) -> Result:
    used = sorted(set(_helpers_of("throttle")))
    absent = [number for number in used if features.helper(ProgType.CGROUP_SKB, number).missing()]
    evidence = [f"helper {number}: {'absent' if number in absent else 'ok'}" for number in used]
    if absent:
        return failed("the kernel refuses helpers that the programs call", *evidence)
    return passed(f"the kernel has the {len(used)} helpers that the programs call", *evidence)


def _helpers_of(name: str) -> Iterator[int]:
    """Yield the helpers of the programs that a limit needs."""
    spec = programs.read(name)
    for program in spec.programs.values():
        if program.type is ProgType.CGROUP_SKB:
            for insn in decoded(program.function.code, spec.byteorder):
                if insn.code == CALL and insn.src == 0:
                    yield insn.imm


CHECKS = (
    Check(
        "python",
        "Python",
        "the interpreter",
        "bpf(2) is called through ctypes",
        "install a Python with ctypes",
        _python,
    ),
    Check(
        "kernel.version",
        "Kernel",
        "kernel version",
        "for the report; features are tested, not guessed from the version",
        "",
        _version,
    ),
    Check(
        "kernel.proc",
        "Kernel",
        "the file system /proc",
        "it shows processes, mounts and privileges",
        "mount -t proc proc /proc",
        _proc,
    ),
    Check(
        "kernel.bpf",
        "Kernel",
        "the bpf(2) system call",
        "everything here goes through it",
        "use a kernel with CONFIG_BPF_SYSCALL=y, as in all distributions",
        _bpf,
        ("python",),
    ),
    Check(
        "kernel.config",
        "Kernel",
        "BPF kernel configuration",
        "it explains why a test failed; it decides nothing by itself",
        "use a kernel with these options, as in all distributions",
        _config,
    ),
    Check(
        "kernel.jit",
        "Kernel",
        "BPF JIT compiler",
        "a compiled program takes a few dozen nanoseconds per packet",
        "sysctl net.core.bpf_jit_enable=1",
        _jit,
    ),
    Check(
        "kernel.lockdown",
        "Kernel",
        "kernel lockdown",
        "a locked kernel may refuse BPF to root",
        "lockdown comes from secure boot or the kernel's command line",
        _lockdown,
    ),
)

# Checked once it is known that programs can be loaded at all.
FEATURE_CHECKS = (
    Check(
        "kernel.features",
        "Kernel",
        "optional BPF features",
        "they make limits cheaper or safer to end; each has a fallback",
        "a newer kernel has them",
        _features,
        ("trial.load",),
    ),
    Check(
        "kernel.helpers",
        "Kernel",
        "helper functions for cgroup_skb",
        "the shipped programs call them",
        "use a kernel of Linux 4.14 or later",
        _helpers,
        ("trial.load",),
    ),
)
