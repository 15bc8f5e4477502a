"""The live proof: programs are loaded and attached, packets are sent, counted and dropped."""

from __future__ import annotations

import os
import select
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Callable

from pybpfthrottle import settings, throttle
from pybpfthrottle.backends.ebpf import programs as table
from pybpfthrottle.backends.ebpf.attach import refuse_to_override
from pybpfthrottle.backends.ebpf.bucket import BURST_BYTES
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.bpf import features, links, loader, programs, syscall
from pybpfthrottle.bpf.abi import BPF_F_ALLOW_MULTI, AttachType, Attr, Cmd, ProgType
from pybpfthrottle.bpf.links import Attachment, AttachMode
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.diagnostics import shipped
from pybpfthrottle.diagnostics.check import Check, Result, Setup, failed, passed, skipped, warned
from pybpfthrottle.errors import AttachError, BpfError, CgroupError, Error, VerifierError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import MIN_RATE, Counters, Direction, Traffic
from pybpfthrottle.settings import AttachPolicy

_HOOKS = {
    "ingress": AttachType.CGROUP_INET_INGRESS,
    "egress": AttachType.CGROUP_INET_EGRESS,
}
_DATAGRAM_BYTES = 1000
# More than the burst, so that some datagrams exceed any limit.
_DATAGRAMS = 3 * BURST_BYTES // _DATAGRAM_BYTES
_PATIENCE_S = 5.0

Attach = Callable[[Program, int, AttachType], Attachment]


def _minimal(hook: AttachType) -> Program:
    """Return a program of two instructions that lets every packet pass; it needs no object."""
    return programs.load(
        asm.return_imm(1),
        type=ProgType.CGROUP_SKB,
        license="MIT",
        name="pybpft_trial",
        expected_attach_type=hook,
    )


def _load(setup: Setup) -> Result:
    try:
        for hook in _HOOKS.values():
            _minimal(hook).close()
    except BpfError as error:
        cause = "memlock" if _is_memlock(setup, error) else syscall.errno_name(error.errno)
        return failed(str(error), *_log_of(error), cause=cause)
    return passed("the kernel accepts a minimal program for both directions")


def _is_memlock(setup: Setup, error: BpfError) -> bool:
    memlock = setup.results.get("rights.memlock")
    refused = syscall.errno_name(error.errno) == "EPERM"
    return refused and memlock is not None and memlock.cause == "memlock"


def _log_of(error: BpfError) -> list[str]:
    return [error.reason] if isinstance(error, VerifierError) else []


def _attach(cgroup: Cgroup, attach: Attach) -> Result:
    """Attach to both directions of a cgroup, and detach again."""
    fd = cgroup.open()
    try:
        for name, hook in _HOOKS.items():
            with _minimal(hook) as program:
                try:
                    attach(program, fd, hook).detach()
                except OSError as error:
                    number = syscall.errno_name(error.errno or 0)
                    return failed(f"{name}: {error.filename} gives {number}", cause=number)
    finally:
        os.close(fd)
    return passed(f"both directions of {cgroup.path}")


def _at_scratch(attach: Attach) -> Callable[[Setup], Result]:
    def attempt(setup: Setup) -> Result:
        assert setup.scratch is not None  # noqa: S101 - the check needs cgroup.scratch
        return _attach(setup.scratch, attach)

    return attempt


def _link(setup: Setup) -> Result:
    found = _at_scratch(links.create_link)(setup)
    if found.cause and not features.LINK.available():
        return warned(
            f"this kernel does not support links (Linux 5.7): {found.text}", cause="no-links"
        )
    return found


def _legacy(setup: Setup) -> Result:
    """Try the legacy call; before Linux 4.15 as the only program, harmless on our own cgroup."""
    found = _at_scratch(links.attach_legacy)(setup)
    if found.cause != "EINVAL" or features.QUERY.available():
        return found
    single = _at_scratch(partial(links.attach_legacy, mode=AttachMode.SINGLE))(setup)
    if single.cause:
        return replace(single, evidence=(found.text,))
    return warned(f"only as the cgroup's single program: {single.text}", found.text, cause="alone")


def _link_flags(setup: Setup) -> Result:
    """Some loaders pass BPF_F_ALLOW_MULTI to BPF_LINK_CREATE, and never learn why that fails."""
    if not features.LINK.available():
        return skipped("this kernel does not support links (Linux 5.7)", cause="no-links")
    assert setup.scratch is not None  # noqa: S101 - the check needs cgroup.scratch
    hook = AttachType.CGROUP_INET_EGRESS
    fd = setup.scratch.open()
    try:
        with _minimal(hook) as program:
            attr = Attr()
            attr.link_create.prog_fd, attr.link_create.target_fd = program.fd, fd
            attr.link_create.attach_type, attr.link_create.flags = hook, BPF_F_ALLOW_MULTI
            try:
                os.close(syscall.bpf(Cmd.LINK_CREATE, attr))
            except OSError as error:
                return passed(
                    "links work with flags 0; a loader that passes BPF_F_ALLOW_MULTI gets"
                    f" {syscall.errno_name(error.errno or 0)} on every machine"
                )
    finally:
        os.close(fd)
    return passed("links work, even with BPF_F_ALLOW_MULTI")


def _at_target(setup: Setup) -> Result:
    assert setup.target is not None  # noqa: S101 - the check needs cgroup.target
    try:
        for hook in _HOOKS.values():
            with _minimal(hook) as program:
                refuse_to_override(program, setup.target, hook, AttachPolicy())
    except AttachError as error:
        return failed(str(error), cause="overridable")
    return _by_either_way(setup.target)


def _by_either_way(cgroup: Cgroup) -> Result:
    """Attach by link; if that is refused, by the legacy call where the settings allow it."""
    try:
        by_link = _attach(cgroup, links.create_link)
        if not by_link.cause:
            return by_link
        by_call = _attach(cgroup, links.attach_legacy)
    except CgroupError as error:
        return failed(str(error), cause="target-gone")
    evidence = [f"by link: {by_link.text}", f"by the legacy call: {by_call.text}"]
    if by_call.cause == "EINVAL" and not features.QUERY.available():
        return warned(
            f"not tested: this kernel (before Linux 4.15) runs only one program on {cgroup.path},"
            " and does not report whether there is one, so a test might switch it off",
            *evidence,
            cause="alone",
        )
    if by_call.cause:
        return failed(by_link.text, *evidence, cause=by_link.cause)
    if all(_stands_in(policy, by_link.cause) for policy in settings.load().attach.values()):
        return warned("only by the legacy call", *evidence, cause="legacy")
    return failed(by_link.text, *evidence, cause="links-refused")


def _stands_in(policy: AttachPolicy, name: str) -> bool:
    if policy.method == "auto":
        return name in map(syscall.errno_name, policy.fallback_errnos)
    return policy.method == "legacy"


def _at_root(setup: Setup) -> Result:
    if not setup.root_cgroup:
        return skipped("only on request: --root-cgroup", cause="not-asked")
    top = cgroups_v2.root()
    found = _by_either_way(top)
    return replace(found, text=f'🧪 TEST MODE: Using root cgroup "{top.path}": {found.text}')


def _objects(setup: Setup) -> Result:
    loaded = []
    for name in shipped.names():
        try:
            spec = table.read(name)
            loader.load(spec, shipped.loadable(name)).close()
            loaded.append(f"{name}: {', '.join(shipped.loadable(name))}")
        except VerifierError as error:
            return failed(f"{name}: {error}", error.reason, cause="verifier")
        except Error as error:
            return failed(f"{name}: {error}", cause="loader")
    return passed("the kernel accepts the programs of each", *loaded)


def _shaping(setup: Setup) -> Result:
    spec = table.read(shipped.names()[0])
    refused = []
    for name in shipped.shaping(spec.name):
        try:
            loader.load(spec, [name]).close()
        except Error as error:
            refused.append(str(error))
    if refused:
        return warned("this kernel does not accept all shaping programs", *refused)
    return passed("uploads can be paced, and downloads slowed by their receive window")


def _marks(setup: Setup) -> Result:
    """Load what limits the sockets of processes, with the kernel's own map of marks."""
    if not process.in_first_namespace():
        return warned(
            "this pid namespace has its own process ids, which BPF programs do not see: --pid"
            " limits the whole cgroup, or moves the process into one of its own where cgroup v2 is"
            " writable; --name, --exe and --user work only outside this container",
            cause="no-marks",
        )
    name = table.object_for(Scope.MARKED)
    wanted = [
        program
        for program in table.of_object(name)
        if program.role in (Role.POLICE, Role.MARK) and table.is_for_this_kernel(program)
    ]
    try:
        loader.load(table.read(name), [program.name for program in wanted]).close()
    except Error as error:
        needs = wanted[0].needs
        return warned(
            f"this kernel does not support {needs.feature} (Linux {needs.release}): --pid limits"
            " the whole cgroup, or moves the process into one of its own",
            str(error),
            cause="no-marks",
        )
    return passed("single processes can be limited, in any cgroup")


def _following(setup: Setup) -> Result:
    """Load and briefly attach the programs that follow processes; their map is empty."""
    wanted = table.with_role(Role.FOLLOW)
    try:
        with ExitStack() as stack:
            spec = table.read(wanted[0].objects[0])
            names = [program.name for program in wanted]
            loaded = stack.enter_context(loader.load(spec, names))
            for program in wanted:
                link = links.attach_raw_tracepoint(loaded.programs[program.name], str(program.hook))
                stack.callback(link.detach)
    except (Error, OSError) as error:
        needs = wanted[0].needs
        return warned(
            f"processes cannot be followed ({needs.feature}, Linux {needs.release}): new ones are"
            " found by a scan once a second",
            str(error),
            cause="no-tracing",
        )
    return passed("children of limited processes are limited from their first packet")


def _traffic(direction: Direction) -> Callable[[Setup], Result]:
    def attempt(setup: Setup) -> Result:
        assert setup.scratch is not None  # noqa: S101 - the check needs cgroup.scratch
        limit = {direction: MIN_RATE}
        options = Options(attach=settings.load().attach)
        with throttle.apply(
            *([setup.scratch], limit),
            traffic=Traffic(loopback=True),
            options=options,
            backends={direction: "ebpf"},
        ) as live:
            sent, received = _exchange(setup.scratch)
            counters = live.counters()[direction]
        return _judge(sent, received, counters)

    return attempt


def _judge(sent: int, received: int, counters: Counters) -> Result:
    evidence = (f"{sent} datagrams sent, {received} received", str(counters))
    if not sent:
        return skipped("cannot send over the loopback device; is it up?", cause="no-lo")
    if not counters.program_calls:
        return failed("the program is attached, but never ran", *evidence, cause="never-ran")
    if counters.packets_total < sent:
        return failed("the program did not see each packet", *evidence, cause="never-ran")
    if not counters.packets_dropped or received >= sent:
        return failed("nothing was dropped over the limit", *evidence, cause="not-dropped")
    return passed("each packet is counted, and those over the limit are dropped", *evidence)


def _exchange(cgroup: Cgroup) -> tuple[int, int]:
    """Have a process in the cgroup send itself datagrams; return how many it sent and received."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # A socket belongs to the cgroup in which it is created.
            cgroup.move_in(0)
            sent, received = _talk_to_itself()
            os.write(writing, b"%d %d" % (sent, received))
        finally:
            os._exit(0)
    with ExitStack() as stack:
        stack.callback(os.waitpid, child, 0)
        stack.callback(_kill, child)
        stack.callback(os.close, reading)
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], _PATIENCE_S)
        answer = os.read(reading, 64).split() if ready else []
    sent, received = map(int, answer or (0, 0))
    return sent, received


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, 9)


def _talk_to_itself() -> tuple[int, int]:
    sent = received = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        try:
            own.bind(("127.0.0.1", 0))
            own.connect(own.getsockname())
        except OSError:
            return 0, 0
        own.setblocking(False)
        for _ in range(_DATAGRAMS):
            # The egress verdict may report a datagram as dropped; count it as sent anyway.
            with suppress(PermissionError, BlockingIOError, ConnectionRefusedError):
                own.send(bytes(_DATAGRAM_BYTES))
            sent += 1
            with suppress(BlockingIOError):
                while own.recv(_DATAGRAM_BYTES):
                    received += 1
    return sent, received


_SECTION = "Trials"
_ON_SCRATCH = ("trial.load", "cgroup.scratch")

LOAD_CHECKS = (
    Check(
        "trial.load",
        _SECTION,
        "a minimal program",
        "two instructions, without object file or compiler: if this fails, the kernel refuses it",
        "see the kernel's configuration, capabilities, locked memory and security modules",
        _load,
        ("rights.commands",),
    ),
)

CHECKS = (
    Check(
        "trial.link",
        _SECTION,
        "attach by link",
        "the kernel detaches a link when the process that holds it ends",
        "use --bpf-attach-method legacy",
        _link,
        _ON_SCRATCH,
    ),
    Check(
        "trial.legacy",
        _SECTION,
        "attach by the legacy call",
        "for kernels before 5.7, and where links are refused",
        "use --bpf-attach-method link",
        _legacy,
        _ON_SCRATCH,
    ),
    Check(
        "trial.link_flags",
        _SECTION,
        "flags of BPF_LINK_CREATE",
        "loaders that pass BPF_F_ALLOW_MULTI there get EINVAL on every kernel",
        "nothing: pybpfthrottle passes none",
        _link_flags,
        ("trial.link",),
    ),
    Check(
        "trial.target",
        _SECTION,
        "attach to the target",
        "what works on a new cgroup may fail on this one",
        "see what is attached there already",
        _at_target,
        ("trial.load", "cgroup.target"),
    ),
    Check(
        "trial.root",
        _SECTION,
        "attach to the root cgroup",
        "it tells a kernel bug from a problem with the target",
        "see what is attached there already",
        _at_root,
        ("trial.load", "cgroup.v2"),
    ),
    Check(
        "trial.objects",
        _SECTION,
        "the shipped objects",
        "what a limit really loads",
        "reinstall pybpfthrottle; if that does not help, report it with --report",
        _objects,
        ("trial.load", "objects"),
    ),
    Check(
        "trial.shaping",
        _SECTION,
        "shaping",
        "it slows TCP down before packets have to be dropped",
        "nothing to do: what cannot be shaped is policed",
        _shaping,
        ("trial.objects",),
    ),
    Check(
        "trial.marks",
        _SECTION,
        "single processes",
        "--pid, --name, --exe and --user limit the sockets of processes, not cgroups",
        "use --cgroup or --unit to limit a whole cgroup",
        _marks,
        ("trial.objects",),
    ),
    Check(
        "trial.following",
        _SECTION,
        "following processes",
        "a limit on a process covers its children",
        "see the kernel's types (CONFIG_DEBUG_INFO_BTF) and CAP_PERFMON",
        _following,
        ("trial.marks",),
    ),
    Check(
        "trial.upload",
        _SECTION,
        "packets sent",
        "the limit is in force only if the program sees packets and drops those over the limit",
        "report it with --report",
        _traffic(Direction.UPLOAD),
        ("trial.objects", "cgroup.scratch"),
    ),
    Check(
        "trial.download",
        _SECTION,
        "packets received",
        "the limit is in force only if the program sees packets and drops those over the limit",
        "report it with --report",
        _traffic(Direction.DOWNLOAD),
        ("trial.objects", "cgroup.scratch"),
    ),
)
