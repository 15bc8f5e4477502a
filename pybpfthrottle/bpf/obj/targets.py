"""Which function of the kernel a program's section says that it is to be attached to. Pure.

Such a program is loaded for one function, since the verifier has to know its parameters. Source:
Documentation/bpf/libbpf/program_types.rst of the kernel.
"""

from __future__ import annotations

from typing import Optional

from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.errors import ExternError
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.core import Kernel
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import ProgramSpec


class Target(NamedTuple):
    """A type of the kernel, or of a module."""

    type: int
    btf: Btf


class _Naming(NamedTuple):
    """The kernel's name of the type for a target."""

    kind: Kind
    prefix: str = ""


_NAMINGS = {
    (ProgType.TRACING, AttachType.TRACE_RAW_TP): _Naming(Kind.TYPEDEF, "btf_trace_"),
    (ProgType.TRACING, AttachType.TRACE_FENTRY): _Naming(Kind.FUNC),
    (ProgType.TRACING, AttachType.TRACE_FEXIT): _Naming(Kind.FUNC),
    (ProgType.TRACING, AttachType.MODIFY_RETURN): _Naming(Kind.FUNC),
    (ProgType.TRACING, AttachType.TRACE_ITER): _Naming(Kind.FUNC, "bpf_iter_"),
    (ProgType.LSM, AttachType.LSM_MAC): _Naming(Kind.FUNC, "bpf_lsm_"),
    (ProgType.LSM, AttachType.LSM_CGROUP): _Naming(Kind.FUNC, "bpf_lsm_"),
}


def is_targeted(program: ProgramSpec) -> bool:
    """Return whether a program is loaded for one function of the kernel, and names it."""
    return bool(program.attach_to) and _naming(program) is not None


def _naming(program: ProgramSpec) -> Optional[_Naming]:
    if program.expected_attach_type is None:
        return None
    return _NAMINGS.get((program.type, program.expected_attach_type))


def find(program: ProgramSpec, kernel: Kernel) -> Target:
    """Return the target of a program for which ``is_targeted``.

    Raises ExternError if there is none.
    """
    naming = _naming(program)
    if naming is not None and program.attach_to:
        for btf, btf_type in kernel.find(naming.kind, naming.prefix + program.attach_to):
            return Target(btf_type.id, btf)
    raise ExternError(
        f"cannot attach {program.name!r} to {program.attach_to!r}: this kernel's types have no such"
        f" {'tracepoint' if naming and naming.kind == Kind.TYPEDEF else 'function'}"
    )
