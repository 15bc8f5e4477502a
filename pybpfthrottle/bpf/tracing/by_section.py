"""What the section of a tracing program says: which kind of probe, and where.

====================================  ============================================================
section                               what may be given instead, or besides
====================================  ============================================================
kprobe, kretprobe                     function ("tcp_connect+8"), cookie
ksyscall, kretsyscall                 function (the system call), cookie
kprobe.multi, kretprobe.multi,        function (a pattern, or several names), cookies
kprobe.session
uprobe, uretprobe                     binary, function, offset, pid, cookie
uprobe.multi, uretprobe.multi,        binary, function (a pattern, or several names), pid, cookies
uprobe.session
usdt                                  binary, probe ("PROVIDER:NAME"), pid, cookie
tp, tracepoint                        tracepoint ("sched/sched_switch"), cookie
perf_event                            frequency_hz or period, event, pid, cpu, cookie
====================================  ============================================================
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.tracing import events, kernel_probes, sampling, tracefs, usdt, user_probes

Given = dict[str, Any]


class Kind(NamedTuple):
    """A kind of probes: the arguments that it takes, those that it needs, and what attaches it."""

    takes: tuple[str, ...]
    needs: tuple[str, ...]
    attach: Callable[..., Link]
    # What the section's target stands for, as arguments.
    target: Callable[[str], Given]
    fixed: Given = {}  # noqa: RUF012 (never changed)


def _kprobe(program: Program, function: Any, **options: Any) -> Link:
    return kernel_probes.attach_kprobe(program, _one(program, function), **options)


def _syscall(program: Program, function: Any, **options: Any) -> Link:
    return kernel_probes.attach_syscall(program, _one(program, function), **options)


def _one(program: Program, function: Any) -> str:
    if not isinstance(function, str):
        raise TypeError(f"{program.name!r} takes one function; those in .multi sections take many")
    return function


def _kprobe_multi(program: Program, function: Any, **options: Any) -> Link:
    return kernel_probes.attach_kprobe_multi(program, function, **options)


def _uprobe(program: Program, function: Any = None, **options: Any) -> Link:
    name = None if function is None else _one(program, function)
    return user_probes.attach_uprobe(program, function=name, **options)


def _uprobe_multi(program: Program, binary: str, function: Any, **options: Any) -> Link:
    return user_probes.attach_uprobe_multi(program, binary, function, **options)


def _usdt(program: Program, binary: str, probe: str, **options: Any) -> Link:
    provider, _, name = probe.rpartition(":")
    return usdt.attach_usdt(program, binary, provider, name, **options)


def _tracepoint(program: Program, tracepoint: str, cookie: Optional[int] = None) -> Link:
    try:
        event = events.open_tracepoint(tracefs.tracepoint_id(tracepoint))
        return events.attach(program, event, cookie=cookie)
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to tracepoint {tracepoint}: {events.why(error)}",
            errno=error.errno or 0,
        ) from error


def _perf_event(program: Program, **options: Any) -> Link:
    if not (options.get("frequency_hz") or options.get("period")):
        raise TypeError(f"{program.name!r} needs period= or frequency_hz=, when it runs")
    return sampling.attach_perf_event(program, **options)


def _in_binary(text: str) -> Given:
    target = user_probes.target_of(text)
    found = {"binary": target.binary, "function": target.function}
    return {**found, "offset": target.offset} if target.offset else found


def _of_usdt(text: str) -> Given:
    target = usdt.target_of(text)
    return {"binary": target.binary, "probe": f"{target.provider}:{target.name}"}


def _function(text: str) -> Given:
    return {"function": text}


_K = Kind(("function", "cookie"), ("function",), _kprobe, _function)
_S = Kind(("function", "cookie"), ("function",), _syscall, _function)
_KM = Kind(("function", "cookies"), ("function",), _kprobe_multi, _function)
_U = Kind(("binary", "function", "offset", "pid", "cookie"), ("binary",), _uprobe, _in_binary)
_UM = Kind(
    ("binary", "function", "pid", "cookies"), ("binary", "function"), _uprobe_multi, _in_binary
)
_USDT = Kind(("binary", "probe", "pid", "cookie"), ("binary", "probe"), _usdt, _of_usdt)
_RETURNS = {"returns": True}
_KINDS = {
    "kprobe": _K,
    "kretprobe": _K._replace(fixed=_RETURNS),
    "ksyscall": _S,
    "kretsyscall": _S._replace(fixed=_RETURNS),
    "kprobe.multi": _KM,
    "kretprobe.multi": _KM._replace(fixed=_RETURNS),
    "kprobe.session": _KM,
    "uprobe": _U,
    "uretprobe": _U._replace(fixed=_RETURNS),
    "uprobe.multi": _UM,
    "uretprobe.multi": _UM._replace(fixed=_RETURNS),
    "uprobe.session": _UM,
    "usdt": _USDT,
    "tp": Kind(
        ("tracepoint", "cookie"), ("tracepoint",), _tracepoint, lambda text: {"tracepoint": text}
    ),
    "perf_event": Kind(
        ("frequency_hz", "period", "event", "pid", "cpu", "cookie"),
        (),
        _perf_event,
        lambda _: {},
    ),
}
_KINDS["tracepoint"] = _KINDS["tp"]
_OF_TYPES: dict[int, str] = {ProgType.TRACEPOINT: "tp", ProgType.PERF_EVENT: "perf_event"}
_OF_ATTACH_TYPES = {
    AttachType.TRACE_KPROBE_MULTI: "kprobe.multi",
    AttachType.TRACE_KPROBE_SESSION: "kprobe.session",
    AttachType.TRACE_UPROBE_MULTI: "uprobe.multi",
    AttachType.TRACE_UPROBE_SESSION: "uprobe.session",
}


def attach(program: Program, given: Given) -> Link:
    """Attach a probe, or a profile, by what is given and what its section says.

    Raises TypeError for an argument that it does not take, or lacks, and AttachError.
    """
    given = dict(given)
    returns = given.pop("returns", None)
    kind = _KINDS[_name(program, given)]
    wrong = [name for name in given if name not in kind.takes]
    if returns is not None and kind.takes[:1] not in (("function",), ("binary",)):
        wrong.append("returns")
    if wrong:
        names = ", ".join(f"{name}=" for name in wrong)
        raise TypeError(f"{program.name!r} cannot be attached by {names}")
    told = kind.target(program.attach_to) if program.attach_to else {}
    places = {name: value for name, value in told.items() if name in kind.takes}
    if "binary" in given or "function" in given:
        # Another place, whose offset is not that of the section.
        places.pop("offset", None)
    places.update(given)
    missing = [name for name in kind.needs if places.get(name) is None]
    if missing:
        names = ", ".join(f"{name}=" for name in missing)
        raise TypeError(f"{program.name!r} needs {names}, where it is attached")
    fixed = kind.fixed if returns is None else {"returns": returns}
    return kind.attach(program, **places, **fixed)


def _name(program: Program, given: Given) -> str:
    """Return the kind as its section names it, or else as what is given tells."""
    section = (program.section or "").lstrip("?").partition("/")[0]
    known = section[:-2] if section.endswith(".s") else section
    if known in _KINDS:
        return known
    if program.type in _OF_TYPES:
        return _OF_TYPES[program.type]
    if program.expected_attach_type in _OF_ATTACH_TYPES:
        return _OF_ATTACH_TYPES[program.expected_attach_type]
    if "binary" in given:
        return "usdt" if "probe" in given else "uprobe"
    return "kprobe"
