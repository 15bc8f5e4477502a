"""ObjectSpec -> loaded Object: the programs that were selected, and only the maps that they use."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections import deque
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, Optional, Union

from pybpfthrottle.bpf import descriptors, maps, pins, programs, syscall
from pybpfthrottle.bpf.abi import MapType, ProgType
from pybpfthrottle.bpf.btf_objects import ObjectTypes
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.bpf.errors import (
    ExternError,
    MapCreateError,
    ObjectFileError,
    ProgramLoadError,
    UnresolvedError,
)
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj import relocate
from pybpfthrottle.bpf.obj.externs import KCONFIG
from pybpfthrottle.bpf.obj.fitting import Fitted, Fitting
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec, ProgramSpec
from pybpfthrottle.bpf.programs import AttachTarget, Program, SourceInfo
from pybpfthrottle.bpf.running import RunningKernel
from pybpfthrottle.bpf.variables import Memory, Variable

# Few programs need these, and all would wait for them.
if TYPE_CHECKING:
    from pybpfthrottle.bpf.links import Links
    from pybpfthrottle.bpf.records import RecordCodec

_OF_EVENTS = (MapType.RINGBUF, MapType.USER_RINGBUF, MapType.PERF_EVENT_ARRAY)
_OF_PROGRAMS = (MapType.PROG_ARRAY, MapType.STRUCT_OPS)
# Few programs need these, and all would wait for them.
if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj import structops
    from pybpfthrottle.bpf.records import RecordCodec
    from pybpfthrottle.bpf.struct_ops import StructOps

# What kernels say of what they do not know.
_OF_OLD_KERNELS = (errno.EINVAL, errno.E2BIG, errno.EACCES, syscall.ENOTSUPP)


class Object:
    """The loaded programs, maps, variables and struct_ops of one object, by name.

    Each of them owns one descriptor; ``close`` or ``with`` ends them all. Maps that were given to
    ``load`` are not among them.
    """

    def __init__(
        self,
        programs: dict[str, Program],
        maps: dict[str, Map[Any, Any]],
        spec: Optional[ObjectSpec] = None,
        struct_ops: Mapping[str, StructOps] = MappingProxyType({}),
    ) -> None:
        self.programs = programs
        self.maps = maps
        self.struct_ops = dict(struct_ops)
        self._spec = spec
        self._memories: dict[str, Memory] = {}

    @property
    def spec(self) -> ObjectSpec:
        """The spec that it was loaded from."""
        return self._spec or ObjectSpec("", sys.byteorder)

    @property
    def variables(self) -> dict[str, Variable]:
        """The variables of the data maps that were loaded."""
        specs = self._spec.variables.values() if self._spec else ()
        return {
            variable.name: Variable(variable, self.memory(variable.map.name))
            for variable in specs
            if variable.map.name in self.maps
        }

    def attach(self) -> Links:
        """Attach all programs as their sections say, and all structs of functions.

        Returns what detaches them when closed.

        Raises TypeError for a program whose section leaves open where it is attached, and
        AttachError; then none is attached.
        """
        from pybpfthrottle.bpf.links import Links

        with ExitStack() as undo:
            links = [
                undo.enter_context(one.attach())
                for one in self.programs.values()
                if one.type != ProgType.STRUCT_OPS
            ]
            links += [undo.enter_context(one.attach()) for one in self.struct_ops.values()]
            undo.pop_all()
        return Links(links)

    def record(self, name: str) -> RecordCodec:
        """Return the codec of a struct of the object's types, such as events are.

        ``bpf.RingBuffer(loaded.maps["events"], loaded.record("event"))``. Raises LookupError if
        there is no struct of this name.
        """
        from pybpfthrottle.bpf.obj.btf import Kind
        from pybpfthrottle.bpf.records import RecordCodec

        types = self._spec.btf if self._spec else None
        found = types.find(Kind.STRUCT, name) if types else None
        if types is None or found is None:
            raise LookupError(f"the object's types have no struct {name!r}")
        return RecordCodec(types, found.id)

    def memory(self, name: str) -> Memory:
        """Return the memory of a data section's map or of an arena, by the map's name."""
        if name not in self._memories:
            self._memories[name] = Memory(self.maps[name])
        return self._memories[name]

    def close(self) -> None:
        """Close all descriptors. What is attached stays with its link or legacy attachment."""
        # A mapping keeps its map alive, whatever becomes of the descriptor.
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()
        for program in self.programs.values():
            program.close()
        for loaded_map in self.maps.values():
            loaded_map.close()

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Object programs={list(self.programs)} maps={list(self.maps)}>"


def load(
    source: Union[ObjectSpec, bytes, descriptors.Path],
    select: Optional[Iterable[str]] = None,
    *,
    maps: Mapping[str, Map[Any, Any]] = MappingProxyType({}),
    pin_path: Optional[descriptors.Path] = None,
    kernel: Optional[RunningKernel] = None,
    targets: Mapping[str, Program] = MappingProxyType({}),
) -> Object:
    """Load the programs named by ``select`` and the maps that they use. Linux 4.10.

    ``source`` is a spec, the path of an object file, or its bytes.

    Without a selection all maps are created, and all programs loaded but for those whose section
    begins with a question mark. What a map holds from the start is loaded as well. A program that
    the kernel cannot take does not matter as long as it is not selected. Maps that ask to be
    pinned by name are shared in the directory ``pin_path`` of a bpf file system, or else not
    pinned. ``maps`` are used in place of those that the object has by these names, as those of
    another object; they stay the caller's.

    ``kernel`` may name other files for the kernel's types and configuration, which are read only
    if the programs ask for them.

    ``targets`` has the live program, by the name of a program in "freplace/FUNCTION" (Linux 5.6),
    or in fentry or fexit of a function of another BPF program (5.5), that this function is of.

    Raises KeyError for a name that the object does not have, ObjectFileError, ExternError,
    AmbiguousTypeError, MapCreateError, ProgramLoadError or VerifierError; then nothing stays open.
    """
    with Loadable(source, select, kernel=kernel, targets=targets) as loadable:
        return loadable.load(pin_path=pin_path, maps=maps)


class Loadable:
    """Programs of an object, fitted to this kernel once, to be loaded as often as is wanted.

    The arguments are those of ``load``. ``close`` or ``with`` ends it; what was loaded stays.
    Raises KeyError, ObjectFileError, ExternError or AmbiguousTypeError.
    """

    def __init__(
        self,
        source: Union[ObjectSpec, bytes, descriptors.Path],
        select: Optional[Iterable[str]] = None,
        *,
        kernel: Optional[RunningKernel] = None,
        targets: Mapping[str, Program] = MappingProxyType({}),
    ) -> None:
        self._spec = spec = _spec_of(source)
        if spec.byteorder != sys.byteorder:
            raise ObjectFileError(
                f"{spec.name!r} was built for {spec.byteorder}-endian machines;"
                f" this one is {sys.byteorder}-endian"
            )
        self._needed = needed = _needed(spec, select)
        self._types = types = ObjectTypes()
        with ExitStack() as undo, _naming_what_is_newer(spec, needed):
            undo.enter_context(types)
            fitting = Fitting(spec, kernel or RunningKernel(), types.descriptor)
            types.load(fitting.loadable_types())
            # Before any map is made: only fitted programs tell whether they need the settings.
            self._fitted = {
                name: _fit(spec, spec.programs[name], fitting, targets.get(name))
                for name in needed.programs
            }
            self._maps = {name: spec.maps[name] for name in spec.maps if name in needed.maps}
            if any(KCONFIG in program.linked.maps for program in self._fitted.values()):
                self._maps[KCONFIG] = fitting.settings_map()
            self._structs = {
                name: fitting.struct_ops(name)
                for name, map_spec in self._maps.items()
                if map_spec.type == MapType.STRUCT_OPS
            }
            undo.pop_all()

    def load(
        self,
        *,
        pin_path: Optional[descriptors.Path] = None,
        maps: Mapping[str, Map[Any, Any]] = MappingProxyType({}),
    ) -> Object:
        """Create the maps and load the programs.

        Raises MapCreateError, ProgramLoadError or VerifierError; then nothing stays open.
        """
        spec, types = self._spec, self._types
        with ExitStack() as undo, _naming_what_is_newer(spec, self._needed):
            given = {
                name: _fitting(maps[name], map_spec)
                for name, map_spec in self._maps.items()
                if name in maps
            }
            live_maps = {
                name: undo.enter_context(_create(map_spec, pin_path, types.fd))
                for name, map_spec in self._maps.items()
                if name not in given and name not in self._structs
            }
            for name, struct in self._structs.items():
                created = _create_struct(self._maps[name], struct, types)
                live_maps[name] = undo.enter_context(created)
            used = {**live_maps, **given}
            fds = {name: loaded_map.fd for name, loaded_map in used.items()}
            # The verifier wants to know where an arena is, and programs find its variables there.
            memories = {
                name: _mapped_arena(loaded_map, undo)
                for name, loaded_map in live_maps.items()
                if loaded_map.spec.type == MapType.ARENA
            }
            live_programs = {
                name: undo.enter_context(
                    _load(spec, spec.programs[name], program, fds, types, used)
                )
                for name, program in self._fitted.items()
            }
            # Arrays of programs hold descriptors, and so are filled when all programs are there.
            program_fds = {name: program.fd for name, program in live_programs.items()}
            _fill(live_maps, {**fds, **program_fds})
            for name, loaded_map in live_maps.items():
                loaded_map.record = _record_of(spec, name)
            # The Object owns them from here on.
            undo.pop_all()
        structs = _struct_ops(self._structs, live_maps, program_fds)
        loaded = Object(live_programs, live_maps, spec, structs)
        loaded._memories.update(memories)
        return loaded

    def create(self, name: str) -> Map[Any, Any]:
        """Create a map of the object, whatever uses it. Raises MapCreateError."""
        return _create(self._spec.maps[name], None, self._types.fd)

    def close(self) -> None:
        """Close what was kept open to load with."""
        self._types.close()

    def __enter__(self) -> Loadable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spec_of(source: Union[ObjectSpec, bytes, descriptors.Path]) -> ObjectSpec:
    if isinstance(source, ObjectSpec):
        return source
    from pybpfthrottle.bpf.obj import elf

    return elf.read_object(source) if isinstance(source, bytes) else elf.read_file(source)


class _Needed(NamedTuple):
    """Names in order; the values mean nothing."""

    programs: dict[str, None]
    maps: dict[str, None]


def _needed(spec: ObjectSpec, select: Optional[Iterable[str]]) -> _Needed:
    """Return what is selected, and all that this refers to."""
    names = deque(p.name for p in spec.programs.values() if p.autoload)
    held = deque(name for name, map_spec in spec.maps.items() if map_spec.autoload)
    if select is not None:
        names, held = deque(spec.programs[name].name for name in select), deque()
    needed = _Needed({}, {})
    while names or held:
        if names:
            name = names.popleft()
            if name not in needed.programs:
                needed.programs[name] = None
                held.extend(relocate.maps_of(spec, spec.programs[name]))
                held.extend(_structs_of(spec, name))
        else:
            name = held.popleft()
            if name not in needed.maps:
                needed.maps[name] = None
                into = names if spec.maps[name].type in _OF_PROGRAMS else held
                into.extend(spec.maps[name].initial.values())
    return needed


def _structs_of(spec: ObjectSpec, program: str) -> list[str]:
    """Return the struct_ops that a program is for, which it cannot be loaded without."""
    found = [
        one
        for one in spec.maps.values()
        if one.type == MapType.STRUCT_OPS and program in one.initial.values()
    ]
    return [one.name for one in found if one.autoload] or [one.name for one in found]


@contextmanager
def _naming_what_is_newer(spec: ObjectSpec, needed: _Needed) -> Iterator[None]:
    """Add to a refusal what is needed of a newer kernel than this one says that it is.

    Kernels with features of newer ones may have it all the same: the refusal itself comes first.
    """
    try:
        yield
    except UnresolvedError:
        raise
    except (MapCreateError, ProgramLoadError) as error:
        newer = _newer(spec, needed) if error.errno in _OF_OLD_KERNELS else []
        if newer:
            release = os.uname().release
            told = f"{error}; this kernel ({release}) is too old for: {', '.join(newer)}"
            error.args = (told,)
        raise


def _newer(spec: ObjectSpec, needed: _Needed) -> list[str]:
    from pybpfthrottle.bpf.obj import needs, releases

    running = re.match(r"\d+\.\d+", os.uname().release)
    return [
        f"{need.name} (Linux {need.since})"
        for need in needs.to_load(spec, needed.programs, needed.maps)
        if running and releases.order(need.since) > releases.order(running[0])
    ]


def _source(fitted: Fitted, types: ObjectTypes) -> SourceInfo:
    """Return what the kernel takes of a program's source."""
    if not types.functions:
        return SourceInfo(at=fitted.source)
    return SourceInfo(types.fd, fitted.functions, fitted.lines, fitted.source)


def _record_of(spec: ObjectSpec, name: str) -> Optional[RecordCodec]:
    """Return what a map of events was declared with, if that is a struct."""
    declared = spec.maps.get(name)
    if declared is None or spec.btf is None or not declared.value_type:
        return None
    if declared.type not in _OF_EVENTS:
        return None
    from pybpfthrottle.bpf.obj.btf import Kind
    from pybpfthrottle.bpf.records import RecordCodec

    if spec.btf.resolve(declared.value_type).kind != Kind.STRUCT:
        return None
    return RecordCodec(spec.btf, declared.value_type)


def _fitting(given: Map[Any, Any], spec: MapSpec) -> Map[Any, Any]:
    if _shape(given.spec) == _shape(spec):
        return given
    different = pins.differences(given.fd, spec)
    if different:
        raise MapCreateError(
            f"the given map does not match {spec.name!r}: its {', its '.join(different)}"
        )
    return given


def _shape(spec: MapSpec) -> tuple[int, ...]:
    sizes = (spec.key_size, spec.value_size, spec.max_entries)
    return (spec.type, *sizes, spec.flags, spec.extra)


def _create(spec: MapSpec, pin_path: Optional[descriptors.Path], btf_fd: int) -> Map[Any, Any]:
    if spec.pinned and pin_path is not None:
        return pins.open_or_create(spec, pin_path, btf_fd=btf_fd)
    return maps.create(spec, btf_fd=btf_fd)


def _mapped_arena(arena: Map[Any, Any], undo: ExitStack) -> Memory:
    """Map an arena into this process, with what its variables begin with."""
    memory = Memory(arena)
    undo.callback(memory.close)
    try:
        if arena.spec.contents:
            memory.write(0, arena.spec.contents)
    except OSError as error:
        raise MapCreateError(
            f"cannot map the arena {arena.spec.name!r}: {error}", errno=error.errno or 0
        ) from error
    return memory


def _struct_ops(
    structs: Mapping[str, structops.Fitted],
    live_maps: Mapping[str, Map[Any, Any]],
    program_fds: Mapping[str, int],
) -> dict[str, StructOps]:
    if not structs:
        return {}
    from pybpfthrottle.bpf.struct_ops import StructOps

    return {
        name: StructOps(live_maps[name], struct.filled(program_fds))
        for name, struct in structs.items()
    }


def _create_struct(spec: MapSpec, struct: structops.Fitted, types: ObjectTypes) -> Map[Any, Any]:
    """Create the map of a struct of functions, which is empty until the struct is attached."""
    fields = {**vars(spec), "value_size": len(struct.value), "kernel_type": struct.value_type}
    fields.update(contents=None, value_type=0, initial={})
    module_fd = types.descriptor(struct.btf) if struct.btf.base else 0
    return maps.create(MapSpec(**fields), btf_fd=types.fd, module_fd=module_fd)


def _fit(
    spec: ObjectSpec, program: ProgramSpec, fitting: Fitting, target: Optional[Program]
) -> Fitted:
    if program.type == ProgType.UNSPEC:
        raise ObjectFileError(
            "the section's name does not give the program type (cgroup_skb/ingress would);"
            f" set spec.programs[{program.name!r}].type",
            section=program.section,
            offset=program.function.key.offset,
        )
    linked = relocate.link(spec, program)
    if target is None:
        return fitting.fit(program, linked)
    fitted = fitting.fit(program.changed(attach_to=None), linked)
    return fitted._replace(target=_function_of(target, program))


def _function_of(target: Program, program: ProgramSpec) -> tuple[int, int]:
    """Return the type of a live program's function, and the program's descriptor."""
    from pybpfthrottle.bpf import btf_objects
    from pybpfthrottle.bpf.obj.btf import Btf, Kind

    info = target.info()
    types = Btf(btf_objects.data_by_id(info.btf_id)) if info.btf_id else None
    function = types.find(Kind.FUNC, program.attach_to or "") if types else None
    if function is None:
        raise ExternError(
            f"cannot attach {program.name!r} to {program.attach_to!r}: the program"
            f" {target.name!r} has no function of this name, or no BTF"
        )
    return function.id, target.fd


def _load(
    spec: ObjectSpec,
    program: ProgramSpec,
    fitted: Fitted,
    fds: dict[str, int],
    types: ObjectTypes,
    maps: dict[str, Map[Any, Any]],
) -> Program:
    return programs.load(
        relocate.resolve(fitted.linked, fds),
        type=program.type,
        license=spec.license,
        name=program.name,
        expected_attach_type=program.expected_attach_type,
        member=fitted.member,
        flags=program.flags,
        attach_to=program.attach_to,
        section=program.section,
        maps=maps,
        source=_source(fitted, types),
        modules=fitted.modules,
        poisoned=fitted.poisoned,
        target=AttachTarget(*fitted.target),
    )


def _fill(live_maps: dict[str, Map[Any, Any]], fds: dict[str, int]) -> None:
    """Put the maps and programs into the maps that hold them."""
    for loaded_map in live_maps.values():
        slots = loaded_map.typed(U32, U32)
        for index, name in loaded_map.spec.initial.items():
            try:
                slots[index] = fds[name]
            except (OSError, ValueError) as error:
                raise MapCreateError(
                    f"cannot put {name!r} into element {index} of the map"
                    f" {loaded_map.spec.name!r}: {error}",
                    errno=getattr(error, "errno", None) or 0,
                ) from error
