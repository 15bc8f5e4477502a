"""bpf(2) without libbpf: read a clang-built object, load it, attach it, use its maps.

::

    from pybpfthrottle import bpf

    spec = bpf.read_file("filter.o")
    spec.maps["counts"].max_entries = 64
    spec.variables["limit"].set(1000)
    with bpf.load(spec) as loaded:
        with loaded.programs["count"].attach(cgroup="/sys/fs/cgroup/demo"):
            print(loaded.maps["counts"].typed_by_btf(), loaded.variables["hits"].get())

Bytes become an ``ObjectSpec``; a spec is linked and fitted to this kernel, and loaded into live
programs and maps, each of which owns one descriptor; a program becomes a ``Link``. The names here
are imported when they are asked for. What is needed more seldom is in the modules: ``maps``,
``programs`` and ``links`` create things without an object, and open what is pinned or has an id;
``codecs`` are the types of keys and values; ``features`` tells what the kernel can do; and what is
in ``obj`` reaches no system call.

Knows nothing of throttling.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pybpfthrottle.bpf.abi import AttachType, LinkType, MapType, ProgType
    from pybpfthrottle.bpf.errors import (
        AmbiguousTypeError,
        AttachError,
        BpfError,
        CompileError,
        Error,
        ExternError,
        MapCreateError,
        ObjectFileError,
        ProgramLoadError,
        UnresolvedError,
        UnsupportedMachineError,
        VerifierError,
    )
    from pybpfthrottle.bpf.features import Feature
    from pybpfthrottle.bpf.keyless import BloomFilter, Queue
    from pybpfthrottle.bpf.links import Link, LinkInfo, Links
    from pybpfthrottle.bpf.loader import Object, load
    from pybpfthrottle.bpf.maps import Map, MapInfo
    from pybpfthrottle.bpf.obj.elf import read_file, read_object
    from pybpfthrottle.bpf.obj.inspection import Inspection, inspect
    from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec, ProgramSpec, VariableSpec
    from pybpfthrottle.bpf.perfbuf import PerfBuffer
    from pybpfthrottle.bpf.program_info import ProgramInfo
    from pybpfthrottle.bpf.programs import Program, TestRunResult
    from pybpfthrottle.bpf.records import RecordCodec
    from pybpfthrottle.bpf.ringbuf import RingBuffer
    from pybpfthrottle.bpf.running import RunningKernel
    from pybpfthrottle.bpf.struct_ops import StructOps
    from pybpfthrottle.bpf.tracing.stacks import StackMap, Symbolizer, folded
    from pybpfthrottle.bpf.userring import UserRingBuffer
    from pybpfthrottle.bpf.variables import Variable

__all__ = [
    "AmbiguousTypeError",
    "AttachError",
    "AttachType",
    "BloomFilter",
    "BpfError",
    "CompileError",
    "Error",
    "ExternError",
    "Feature",
    "Inspection",
    "Link",
    "LinkInfo",
    "LinkType",
    "Links",
    "Map",
    "MapCreateError",
    "MapInfo",
    "MapSpec",
    "MapType",
    "Object",
    "ObjectFileError",
    "ObjectSpec",
    "PerfBuffer",
    "ProgType",
    "Program",
    "ProgramInfo",
    "ProgramLoadError",
    "ProgramSpec",
    "Queue",
    "RecordCodec",
    "RingBuffer",
    "RunningKernel",
    "StackMap",
    "StructOps",
    "Symbolizer",
    "TestRunResult",
    "UnresolvedError",
    "UnsupportedMachineError",
    "UserRingBuffer",
    "Variable",
    "VariableSpec",
    "VerifierError",
    "folded",
    "inspect",
    "load",
    "read_file",
    "read_object",
]

_HOMES = {
    "AmbiguousTypeError": "errors",
    "AttachError": "errors",
    "AttachType": "abi",
    "BloomFilter": "keyless",
    "BpfError": "errors",
    "CompileError": "errors",
    "Error": "errors",
    "ExternError": "errors",
    "Feature": "features",
    "Inspection": "obj.inspection",
    "Link": "links",
    "LinkInfo": "links",
    "LinkType": "abi",
    "Links": "links",
    "Map": "maps",
    "MapCreateError": "errors",
    "MapInfo": "maps",
    "MapSpec": "obj.specs",
    "MapType": "abi",
    "Object": "loader",
    "ObjectFileError": "errors",
    "ObjectSpec": "obj.specs",
    "PerfBuffer": "perfbuf",
    "ProgType": "abi",
    "Program": "programs",
    "ProgramInfo": "program_info",
    "ProgramLoadError": "errors",
    "ProgramSpec": "obj.specs",
    "Queue": "keyless",
    "RecordCodec": "records",
    "RingBuffer": "ringbuf",
    "RunningKernel": "running",
    "StackMap": "tracing.stacks",
    "StructOps": "struct_ops",
    "Symbolizer": "tracing.stacks",
    "TestRunResult": "programs",
    "UnresolvedError": "errors",
    "UnsupportedMachineError": "errors",
    "UserRingBuffer": "userring",
    "Variable": "variables",
    "VariableSpec": "obj.specs",
    "VerifierError": "errors",
    "folded": "tracing.stacks",
    "inspect": "obj.inspection",
    "load": "loader",
    "read_file": "obj.elf",
    "read_object": "obj.elf",
}

# Hidden from type checkers, to which it would make any name one of this package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a name when it is asked for: most programs need only some."""
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
