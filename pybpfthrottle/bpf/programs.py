"""Programs: live objects, each owning one descriptor."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional, Sequence, Union

from pybpfthrottle.bpf import abi, descriptors, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd, ProgType
from pybpfthrottle.bpf.errors import ProgramLoadError, UnresolvedError, VerifierError
from pybpfthrottle.bpf.maps import legal_name
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.obj.insn import BPF_JMP, BPF_JMP32, CLASS_MASK, EXIT, INSN_BYTES
from pybpfthrottle.bpf.obj.patch import POISON, Poisoned
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.privileges import capabilities_for, why_refused, with_memlock
from pybpfthrottle.bpf.program_info import ProgramInfo, program_info, xlated_code

# Attaching imports programs.
if TYPE_CHECKING:
    from pybpfthrottle.bpf.attaching import Neighbour, Place
    from pybpfthrottle.bpf.codecs import CodecLike
    from pybpfthrottle.bpf.links import Link
    from pybpfthrottle.bpf.maps import Map

_FIRST_LOG_BYTES = 1 << 18  # most logs are shorter
_MAX_LOG_BYTES = (1 << 24) - 1  # UINT_MAX >> 8, the most that kernels before 5.2 take
_TRIES = 5  # signals may come one after the other; libbpf tries as often
# A test run's packet may grow to the largest that the kernel has, and contexts are below this.
_GROWTH_BYTES = 1 << 16
_CONTEXT_BYTES = 1 << 9
_NO_CONTEXT_OUT = (ProgType.RAW_TRACEPOINT, ProgType.SYSCALL)
_SOURCE_FIELDS = (
    *("prog_btf_fd", "func_info_rec_size", "func_info", "func_info_cnt"),
    *("line_info_rec_size", "line_info", "line_info_cnt"),
)
_NO_FLAGS = (1 << 32) - 1
_UNKNOWN_HELPER = r"unknown#(\d+)"


class TestRunResult(NamedTuple):
    """The return value of a program, the mean time of a run in ns, and its input afterwards."""

    retval: int
    duration_ns: int
    data: bytes = b""
    context: bytes = b""


class Program:
    """A program that this process has open; ``close`` or ``with`` ends it.

    The kernel keeps the program while it is attached. ``attach_to`` is what the section's name has
    after the kind of program, such as a tracepoint; it, ``section`` and ``expected_attach_type``
    are None where that is not known. ``maps`` are those of its object, by name. Linux 4.10;
    source: man 2 bpf.
    """

    def __init__(
        self,
        fd: int,
        *,
        name: str,
        type: int,
        expected_attach_type: Optional[AttachType],
        attach_to: Optional[str] = None,
        section: Optional[str] = None,
        maps: Mapping[str, Map[Any, Any]] = MappingProxyType({}),
    ) -> None:
        self.fd = fd
        self.name = name
        self.type = type
        self.expected_attach_type = expected_attach_type
        self.attach_to = attach_to
        self.section = section
        self.maps = maps

    def attach(
        self,
        *,
        cgroup: Optional[Place] = None,
        interface: Union[str, int, None] = None,
        netns: Optional[Place] = None,
        map: Optional[Map[Any, Any]] = None,
        tracepoint: Optional[str] = None,
        function: Union[str, Sequence[str], None] = None,
        binary: Optional[str] = None,
        offset: Optional[int] = None,
        probe: Optional[str] = None,
        returns: Optional[bool] = None,
        hook: Optional[str] = None,
        family: Optional[str] = None,
        priority: Optional[int] = None,
        defragment: Optional[bool] = None,
        frequency_hz: Optional[int] = None,
        period: Optional[int] = None,
        event: Optional[str] = None,
        cpu: Optional[int] = None,
        pid: Optional[int] = None,
        cookie: Optional[int] = None,
        cookies: Optional[Sequence[int]] = None,
        mode: Optional[str] = None,
        before: Optional[Neighbour] = None,
        after: Optional[Neighbour] = None,
        first: Optional[bool] = None,
        attach_type: Optional[AttachType] = None,
    ) -> Link:
        """Attach it, as what its section says, and return the link that detaches it when closed.

        What a section names need not be given; what is given comes before it. Programs of cgroups
        (cgroup_skb, sockops, ...) take the path or a descriptor of a ``cgroup``; xdp, tcx and
        netkit the name or index of an ``interface``; sk_lookup and flow_dissector a ``netns``, such
        as "/proc/self/ns/net"; sk_skb and sk_msg a ``map`` of sockets; netfilter a ``hook`` such as
        "input", and ``family``, ``priority`` and ``defragment``. tp_btf, fentry, fexit, fmod_ret,
        lsm and freplace take nothing but a ``cookie``; iter what ``iterate`` takes.

        kprobe takes a ``function`` of the kernel, uprobe one of a ``binary`` (a path, or a name
        such as "libc.so.6"), usdt a ``probe`` of it ("PROVIDER:NAME"), each for a ``pid`` or for
        all processes; the multi forms of the first two take patterns, or several names with
        ``cookies``. raw_tp and tp take a ``tracepoint``. perf_event runs by ``frequency_hz`` or
        ``period`` of an ``event``. What of this a program takes is in ``bpf.attaching`` and
        ``bpf.tracing.by_section``.

        ``before`` and ``after`` are a program or link at the same place (a link for cgroups);
        ``first`` is before all of them. ``mode`` of xdp is "native", "generic" or "offload".
        ``attach_type`` is for sections that leave it open, such as "tc" and "cgroup/skb".

        Linux 5.7 for cgroups and namespaces, 5.9 xdp, 6.6 tcx (before that by tc), 6.7 netkit,
        6.10 maps of sockets, 4.17 raw tracepoints, 5.5 functions, 5.8 iterators, 6.4 netfilter,
        4.1 to 4.9 what is attached by perf events. Cookies: 5.15 there, 6.0 functions, 6.10 raw
        tracepoints. Order: 6.6, 6.7, and 6.17 for cgroups. Raises TypeError for an argument that
        such a program does not take, or lacks; AttachError where the kernel refuses, and for
        programs that links do not attach, with what to use.
        """
        given = {name: value for name, value in locals().items() if value is not None}
        given.pop("self")
        given.pop("attach_type", None)
        from pybpfthrottle.bpf import attaching

        return attaching.attach(self, attach_type, **given)

    def iterate(
        self,
        record: Optional[CodecLike] = None,
        *,
        map: Optional[Map[Any, Any]] = None,
        cgroup: Optional[Place] = None,
        order: Optional[str] = None,
        pid: Optional[int] = None,
    ) -> Iterator[Any]:
        """Run an iterator, and return what it writes: lines of text, or records of a codec.

        ``map`` is what an iterator of elements visits; ``cgroup`` restricts one of cgroups, by
        ``order`` "self", "down" (the default), "up" or "post"; ``pid`` one of tasks to the threads
        of a process (Linux 6.1). The program runs while this is read. Linux 5.8. Raises
        AttachError, and OSError while it is read.
        """
        from pybpfthrottle.bpf import iterating

        return iterating.iterate(self, record, map=map, cgroup=cgroup, order=order, pid=pid)

    def info(self) -> ProgramInfo:
        """Return what the kernel says of this object. Linux 4.13. Raises OSError."""
        return program_info(self.fd)

    def test_run(
        self,
        packet: bytes = b"",
        *,
        repeat: int = 1,
        context: bytes = b"",
        cpu: Optional[int] = None,
    ) -> TestRunResult:
        """Run it, on a packet that begins with an Ethernet header where its type takes one.

        ``context`` is what its argument points to: Linux 5.2 for programs with packets, 5.10 for
        raw tracepoints, which also take a ``cpu`` to run on, 5.14 for SYSCALL programs. Linux 4.12.
        Raises OSError: ENOTSUPP for a type that cannot be run so, EINVAL for what it does not take.
        """
        return _test_run(self.fd, packet, repeat, context, cpu, self.type)

    def code(self) -> bytes:
        """Return the code of the program as the verifier left it, in bytes. Linux 4.13."""
        return xlated_code(self.fd)

    def pin(self, path: descriptors.Path) -> None:
        """Pin it: name it in a bpf file system, where it stays until unlinked. Linux 4.4."""
        descriptors.pin(self.fd, path)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Program {self.name!r} {_type_name(self.type)} fd={self.fd}>"


def _type_name(type: int) -> str:
    try:
        return ProgType(type).name
    except ValueError:  # a newer kernel's
        return str(type)


class AttachTarget(NamedTuple):
    """The function that a program is loaded for, as a type; of a module unless btf_fd is 0."""

    btf_id: int = 0
    btf_fd: int = 0


class SourceInfo(NamedTuple):
    """The source of a program as its object describes it, in the BTF behind ``btf_fd``.

    ``functions`` and ``lines`` are struct bpf_func_info and bpf_line_info. ``at`` tells the line
    of an instruction.
    """

    btf_fd: int = 0
    functions: bytes = b""
    lines: bytes = b""
    at: Callable[[int], Optional[str]] = lambda _: None


def load(
    code: bytes,
    *,
    type: ProgType,
    license: str,
    name: str = "",
    expected_attach_type: Optional[AttachType] = None,
    member: int = 0,
    flags: int = 0,
    attach_to: Optional[str] = None,
    section: Optional[str] = None,
    maps: Mapping[str, Map[Any, Any]] = MappingProxyType({}),
    source: SourceInfo = SourceInfo(),  # noqa: B008 (it never changes)
    target: AttachTarget = AttachTarget(),  # noqa: B008
    modules: Sequence[int] = (),
    poisoned: Sequence[Poisoned] = (),
) -> Program:
    """Load instructions, in the byte order of this machine. Linux 4.10; man 2 bpf.

    What the source is (Linux 5.0), the expected attach type (4.17) and the name (4.15) are left
    out where the kernel knows none. ``target`` is what a tracing program is loaded for (5.5), or
    the struct whose ``member`` a struct_ops program is (5.6).
    ``modules`` are descriptors of the types of modules whose functions are called (5.16). The
    verifier's log is asked for only after a refusal. Raises VerifierError with that log
    (UnresolvedError if the program reaches a ``poisoned`` instruction), or ProgramLoadError.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    license_buffer = ctypes.create_string_buffer(license.encode())
    attr = Attr()
    attr.prog_load.prog_type = type
    attr.prog_load.insns = ctypes.addressof(instructions)
    attr.prog_load.insn_cnt = len(code) // INSN_BYTES
    attr.prog_load.license = ctypes.addressof(license_buffer)
    attr.prog_load.prog_flags = flags
    attr.prog_load.prog_name = legal_name(name)
    attr.prog_load.expected_attach_type = expected_attach_type or member
    attr.prog_load.attach_btf_id = target.btf_id
    attr.prog_load.attach_prog_fd = target.btf_fd
    descriptors = (ctypes.c_int32 * (len(modules) + 1))(0, *modules)
    attr.prog_load.fd_array = ctypes.addressof(descriptors) if modules else 0
    held = _describe_source(attr.prog_load, source)
    try:
        fd = _load_as_far_as_known(attr)
    except OSError as error:
        raise _explained(error, attr, name, source, poisoned) from error
    finally:
        del held
    return Program(
        fd,
        name=name,
        type=type,
        expected_attach_type=expected_attach_type,
        attach_to=attach_to,
        section=section,
        maps=maps,
    )


def _describe_source(attr: abi.ProgLoad, source: SourceInfo) -> tuple[Any, Any]:
    """Fill in the source. Return the buffers, which have to live as long as the attr is used."""
    functions = ctypes.create_string_buffer(source.functions, len(source.functions))
    lines = ctypes.create_string_buffer(source.lines, len(source.lines))
    if source.btf_fd and source.functions:
        attr.prog_btf_fd = source.btf_fd
        attr.func_info_rec_size = ctypes.sizeof(abi.FuncInfo)
        attr.func_info_cnt = len(source.functions) // attr.func_info_rec_size
        attr.func_info = ctypes.addressof(functions)
        attr.line_info_rec_size = ctypes.sizeof(abi.LineInfo)
        attr.line_info_cnt = len(source.lines) // attr.line_info_rec_size
        attr.line_info = ctypes.addressof(lines)
    return functions, lines


def _load_as_far_as_known(attr: Attr) -> int:
    """Load; what an older kernel may not know is left out where it refuses it, newest first.

    Fields that it does not know are E2BIG; records of the source that it does not like are EINVAL,
    as is much else.
    """
    try:
        return _load(attr)
    except OSError as error:
        if error.errno == errno.EINVAL and attr.prog_load.prog_btf_fd:
            return _load_without_source(attr, error)
        refusal = error
    for fields in (_SOURCE_FIELDS, ("expected_attach_type",), ("prog_name",)):
        if any(getattr(attr.prog_load, field) for field in fields):
            if not _is_unknown(attr, fields, refusal):
                break
            for field in fields:
                abi.clear(attr.prog_load, field)
            try:
                return _load(attr)
            except OSError as error:
                refusal = error
    raise refusal


def _is_unknown(attr: Attr, fields: tuple[str, ...], refusal: OSError) -> bool:
    """Whether a refusal may be for these fields.

    4.15 and 4.16 have four bytes of room where later ones have the attach type: that is EINVAL.
    """
    if refusal.errno == errno.EINVAL and fields == ("expected_attach_type",):
        return not _knows_attach_types()
    return refusal.errno == errno.E2BIG and not (_may_be_complex(attr) and _knows_fields(attr))


def _may_be_complex(attr: Attr) -> bool:
    """Whether E2BIG may also be for a million steps of the verifier: that takes jumps or calls."""
    load = attr.prog_load
    opcodes = set(ctypes.string_at(load.insns, load.insn_cnt * INSN_BYTES)[::INSN_BYTES])
    return any(code & CLASS_MASK in (BPF_JMP, BPF_JMP32) for code in opcodes - {EXIT})


def _knows_fields(attr: Attr) -> bool:
    """Ask whether the kernel knows all fields, by flags that no kernel has: it looks at them next.

    Without the fields the verifier would take seconds to find out the same.
    """
    flags = attr.prog_load.prog_flags
    attr.prog_load.prog_flags = _NO_FLAGS
    try:
        os.close(syscall.bpf(Cmd.PROG_LOAD, attr))
    except OSError as error:
        return error.errno != errno.E2BIG
    finally:
        attr.prog_load.prog_flags = flags
    return True


def _knows_attach_types() -> bool:
    """Try the field with a type of programs that has no use for it. Linux 4.17."""
    code, gpl = ctypes.create_string_buffer(asm.return_imm(0)), ctypes.c_char_p(b"GPL")
    attr = Attr()
    attr.prog_load.prog_type = ProgType.SOCKET_FILTER
    attr.prog_load.insns = ctypes.addressof(code)
    attr.prog_load.insn_cnt = len(code.raw) // INSN_BYTES
    attr.prog_load.license = ctypes.cast(gpl, ctypes.c_void_p).value or 0
    attr.prog_load.expected_attach_type = 1
    try:
        os.close(_load(attr))
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.E2BIG)
    return True


def _load_without_source(attr: Attr, refusal: OSError) -> int:
    """Load without the records of the source; if that is no better, they help to explain it."""
    kept = {field: getattr(attr.prog_load, field) for field in _SOURCE_FIELDS}
    for field in kept:
        setattr(attr.prog_load, field, 0)
    try:
        return _load(attr)
    except OSError:
        for field, value in kept.items():
            setattr(attr.prog_load, field, value)
        raise refusal from None


def _load(attr: Attr) -> int:
    for _ in range(_TRIES - 1):
        try:
            return with_memlock(lambda: syscall.bpf(Cmd.PROG_LOAD, attr))
        except BlockingIOError:  # EAGAIN: the verifier was interrupted
            continue
    return with_memlock(lambda: syscall.bpf(Cmd.PROG_LOAD, attr))


def _explained(
    error: OSError, attr: Attr, name: str, source: SourceInfo, poisoned: Sequence[Poisoned]
) -> ProgramLoadError:
    log = _verifier_log(attr)
    number = error.errno or 0
    what = f"cannot load the program {name!r}"
    if log:
        line = source.at(failing_instruction(log))
        reached = _reached(log, poisoned)
        if reached is not None:
            return _unresolved(what, reached, number, log, line)
        reason = telling_line(log)
        return VerifierError(
            f"{what}: the kernel's verifier rejects it ({syscall.errno_name(number)}):"
            f" {reason}{_in_brackets(line)}",
            errno=number,
            reason=reason,
            log=log,
            source=line,
        )
    needed = capabilities_for(attr.prog_load.prog_type)
    why = why_refused(error, "BPF_PROG_LOAD", needed)
    if number == errno.EINVAL:
        from pybpfthrottle.bpf.obj import releases

        why += f" ({releases.since_when(ProgType, attr.prog_load.prog_type)})"
    return ProgramLoadError(f"{what}: {why}", errno=number)


def _reached(log: str, poisoned: Sequence[Poisoned]) -> Optional[Poisoned]:
    """Return the poisoned instruction that the verifier reached, if it is one that it speaks of."""
    match = re.search(_UNKNOWN_HELPER, log)
    number = int(match[1]) - POISON if match else -1
    return poisoned[number] if 0 <= number < len(poisoned) else None


def _in_brackets(line: Optional[str]) -> str:
    return f" ({line})" if line else ""


def _unresolved(
    what: str, reached: Poisoned, number: int, log: str, line: Optional[str]
) -> UnresolvedError:
    if reached.local_type:
        reason = (
            f"it needs {reached.access} ({reached.question} of the local type"
            f" {reached.local_type!r}), which this kernel does not have, or has in a form that the"
            " instruction cannot read; check with bpf_core_field_exists first"
        )
    else:
        reason = f"it calls {reached.access}, which this kernel does not have"
    return UnresolvedError(
        f"{what}: {reason}{_in_brackets(line)}",
        *(reached.access, reached.local_type),
        errno=number,
        reason=reason,
        log=log,
        source=line,
    )


def _verifier_log(attr: Attr) -> str:
    """Load once more, for the log, and again if it does not fit: with as much room as it needs.

    Kernels before 6.4 do not tell how much that is, and the others keep its end.
    """
    size = _FIRST_LOG_BYTES
    while True:
        buffer = ctypes.create_string_buffer(size)
        attr.prog_load.log_level = 1
        attr.prog_load.log_size = size
        attr.prog_load.log_buf = ctypes.addressof(buffer)
        try:
            os.close(_load(attr))
            return ""  # whatever it was, the verifier accepts it
        except OSError as error:
            needed = attr.prog_load.log_true_size or _MAX_LOG_BYTES
            if error.errno == errno.ENOSPC and size < needed <= _MAX_LOG_BYTES:
                size = needed
                continue
        finally:
            attr.prog_load.log_level = attr.prog_load.log_size = attr.prog_load.log_buf = 0
            attr.prog_load.log_true_size = 0
        return buffer.value.decode("utf-8", "replace")


def telling_line(log: str) -> str:
    """Return the line of a verifier log that gives the reason: the last before the statistics."""
    statistics = ("processed ", "verification time ", "stack depth ", "peak_states ", "max_states ")
    for line in reversed(log.splitlines()):
        if line.strip() and not line.startswith(statistics):
            return line.strip()
    return ""


def failing_instruction(log: str) -> int:
    """Return the number of the instruction at which the verifier stopped; 0 if it tells none."""
    named = re.findall(r"\binsn (\d+)", telling_line(log))
    seen = re.findall(r"^(\d+): \(", log, re.MULTILINE)
    return int((named or seen or ["0"])[-1])


def _test_run(
    fd: int, packet: bytes, repeat: int, context: bytes, cpu: Optional[int], type: int
) -> TestRunResult:
    attr = Attr()
    test = attr.test_run
    test.prog_fd = fd
    test.repeat = repeat if repeat > 1 else 0  # some types refuse any number, and 0 is once
    data_in, context_in = (ctypes.create_string_buffer(b, len(b)) for b in (packet, context))
    data_out = ctypes.create_string_buffer(len(packet) + _GROWTH_BYTES)
    context_out = ctypes.create_string_buffer(max(len(context), _CONTEXT_BYTES))
    if packet:
        test.data_in, test.data_size_in = ctypes.addressof(data_in), len(packet)
        test.data_out, test.data_size_out = ctypes.addressof(data_out), len(data_out)
    if context:
        test.ctx_in, test.ctx_size_in = ctypes.addressof(context_in), len(context)
        if type not in _NO_CONTEXT_OUT:
            test.ctx_out, test.ctx_size_out = ctypes.addressof(context_out), len(context_out)
    if cpu is not None:
        test.flags, test.cpu = abi.BPF_F_TEST_RUN_ON_CPU, cpu
    syscall.bpf(Cmd.PROG_TEST_RUN, attr)
    after = context_in.raw if type in _NO_CONTEXT_OUT else context_out.raw[: test.ctx_size_out]
    data = data_out.raw[: test.data_size_out] if packet else b""
    return TestRunResult(test.retval, test.duration, data, after if context else b"")


def open_by_id(program_id: int) -> Program:
    """Return a program of the system by its id. Linux 4.13, needs CAP_SYS_ADMIN. Raises OSError."""
    return _opened(descriptors.by_id(Cmd.PROG_GET_FD_BY_ID, program_id))


def open_pinned(path: descriptors.Path) -> Program:
    """Return a pinned program. Linux 4.13. Raises OSError."""
    return _opened(descriptors.open_pinned(path, "bpf-prog"))


def _opened(fd: int) -> Program:
    """Return the program of a descriptor that is this function's to close."""
    try:
        info = program_info(fd)
    except OSError:
        os.close(fd)
        raise
    return Program(fd, name=info.name, type=info.type, expected_attach_type=None)


def info_by_id(program_id: int, *, memory: bool = True) -> ProgramInfo:
    """Return what the kernel says of the program with an id; see ``program_info``.

    Linux 4.13, needs CAP_SYS_ADMIN. Raises OSError.
    """
    fd = descriptors.by_id(Cmd.PROG_GET_FD_BY_ID, program_id)
    try:
        return program_info(fd, memory=memory)
    finally:
        os.close(fd)


def all_ids(after: int = 0) -> Iterator[int]:
    """Return the ids of all programs of the machine, or of those with higher ids, in order.

    The kernel counts ids up, to 2^31, before it uses one again. Linux 4.13; needs CAP_SYS_ADMIN.
    Raises OSError.
    """
    return syscall.all_ids(Cmd.PROG_GET_NEXT_ID, after)
