"""Settings, variables and functions of the kernel that an object declares. Pure.

``extern int CONFIG_HZ __kconfig`` stands in the section .kconfig of the object's types, variables
and functions of the kernel (``__ksym``) in .ksyms. Source: bpf_helpers.h of libbpf.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Callable, Container, Optional, Union

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.errors import ExternError, ObjectFileError
from pybpfthrottle.bpf.obj.btf import ENUMS, Btf, Kind, Type
from pybpfthrottle.bpf.obj.flavours import essential, types_compatible
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import MapSpec, Place, SectionLayout

if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj.core import Kernel

KCONFIG = ".kconfig"
_KSYMS = ".ksyms"
_TRISTATE = {"n": 0, "y": 1, "m": 2}
_ALIGNMENT = 8
_MAX_SETTINGS_BYTES = 1 << 16


class Extern(NamedTuple):
    """Something that an object declares; ``declared`` is its VAR or FUNC."""

    section: str
    declared: Type

    @property
    def name(self) -> str:
        """The name as the kernel spells it."""
        return essential(self.declared.name)


def externs(btf: Btf) -> dict[str, Extern]:
    """Return all that an object's types declare to be the kernel's, by the object's own names."""
    wanted = {}
    for section in (KCONFIG, _KSYMS):
        datasec = btf.find(Kind.DATASEC, section)
        for variable in btf.variables(datasec) if datasec else ():
            declared = btf.type(variable.type)
            wanted[declared.name] = Extern(section, declared)
    return wanted


def kconfig_layout(btf: Btf, wanted: dict[str, Extern]) -> SectionLayout:
    """Return where each setting lies in the map of settings; the compiler leaves that open."""
    places, end = {}, 0
    for name, extern in wanted.items():
        if extern.section == KCONFIG:
            place = Place(
                -(-end // _ALIGNMENT) * _ALIGNMENT, btf.size(extern.declared.size_or_type)
            )
            places[name] = place
            end = place.offset + place.size
        if end > _MAX_SETTINGS_BYTES:
            raise ObjectFileError("the declared settings need too much memory", section=KCONFIG)
    return SectionLayout(end, places)


def kconfig_map(
    btf: Btf,
    wanted: dict[str, Extern],
    weak: Container[str],
    setting: Callable[[str], Optional[str]],
) -> MapSpec:
    """Return the map of settings; weak ones that the kernel lacks are 0. Raises ExternError."""
    layout = kconfig_layout(btf, wanted)
    contents = bytearray(layout.size)
    for name, (offset, size) in layout.places.items():
        text = setting(wanted[name].name)
        if text is not None:
            type_id = wanted[name].declared.size_or_type
            contents[offset : offset + size] = encode_setting(btf, type_id, name, text)
        elif name not in weak:
            raise ExternError(
                f"this kernel's configuration has no {name}, or no file tells it; declare it __weak"
                " if it may be missing"
            )
    datasec = btf.find(Kind.DATASEC, KCONFIG)
    return MapSpec(
        KCONFIG,
        abi.MapType.ARRAY,
        key_size=4,
        value_size=layout.size,
        max_entries=1,
        flags=abi.BPF_F_MMAPABLE | abi.BPF_F_RDONLY_PROG,
        contents=bytes(contents),
        frozen=True,
        value_type=datasec.id if datasec else 0,
        section=KCONFIG,
    )


def encode_setting(btf: Btf, type_id: int, name: str, text: str) -> bytes:
    """Return the bytes of a setting such as y, m, 250, 0xdead or "(none)". Raises ExternError."""
    btf_type = btf.resolve(type_id)
    size = btf.size(type_id)
    if btf_type.kind == Kind.ARRAY:
        if text[:1] != '"' or btf.size(btf.array(btf_type)[0]) != 1 or not size:
            raise ExternError(f"{name} is {text}, but it is declared as an array")
        inside = re.sub(r"\\(.)", r"\1", text.strip('"')).encode()
        return inside[: size - 1].ljust(size, b"\0")
    value = _number(btf, btf_type, text)
    if value is not None:
        signed = btf_type.kind == Kind.INT and btf.integer(btf_type).signed
        try:
            order = btf.byteorder
            return value.to_bytes(size, order, signed=signed)  # type: ignore[arg-type]
        except OverflowError:
            pass
    raise ExternError(f"{name} is {text}, which does not fit its declared type")


def _number(btf: Btf, btf_type: Type, text: str) -> Optional[int]:
    """Return what a setting is as a number of the declared type; None: it cannot be."""
    is_bool = btf_type.kind == Kind.INT and btf.integer(btf_type).bool
    if text in _TRISTATE:
        if btf_type.kind in ENUMS:
            return _TRISTATE[text]
        if btf_type.size_or_type == 1 and not is_bool:
            return ord(text)
        return None if text == "m" else _TRISTATE[text]
    try:
        value = int(text, 0)
    except ValueError:
        return None
    if btf_type.kind != Kind.INT or (is_bool and value > 1):
        return None
    return value


class Address(NamedTuple):
    """A symbol of the kernel, which is at this address."""

    value: int


class KernelId(NamedTuple):
    """A variable or function of the kernel's types, or of a module's."""

    type: int
    btf: Btf


class Symbols:
    """Finds what an object declares in .ksyms. Raises ExternError for what does not fit."""

    def __init__(
        self,
        btf: Btf,
        kernel: Callable[[], Kernel],
        *,
        address: Callable[[str], Optional[int]],
        is_symbol: Callable[[str], bool],
    ) -> None:
        self._btf = btf
        self._kernel = kernel
        self._address = address
        self._is_symbol = is_symbol
        self._found: dict[int, Union[Address, KernelId, None]] = {}

    def find(self, extern: Extern, *, weak: bool) -> Union[Address, KernelId, None]:
        """Return where the kernel has an extern, or None where it lacks it.

        A weak function of another signature is lacking as well: an object may declare both, as
        flavours, and call the one that is there.
        """
        key = extern.declared.id
        if key not in self._found:
            self._found[key] = self._find(extern, weak)
        return self._found[key]

    def _find(self, extern: Extern, weak: bool) -> Union[Address, KernelId, None]:
        declared = extern.declared
        if declared.kind == Kind.FUNC:
            return self._typed(extern, Kind.FUNC, optional=weak)
        # Declared as const void, so that only its address is wanted.
        if self._btf.resolve(declared.size_or_type).kind == Kind.VOID:
            address = self._address(extern.name)
            return None if address is None else Address(address)
        # Without CONFIG_KALLSYMS_ALL the kernel has types of variables that it cannot find.
        return self._typed(extern, Kind.VAR) if self._is_symbol(extern.name) else None

    def _typed(self, extern: Extern, kind: Kind, *, optional: bool = False) -> Optional[KernelId]:
        for btf, btf_type in self._kernel().find(kind, extern.name):
            local = extern.declared.size_or_type
            if not types_compatible(self._btf, local, btf, btf_type.size_or_type):
                if optional:
                    return None
                raise ExternError(f"{extern.name!r} has another type in this kernel")
            return KernelId(btf_type.id, btf)
        return None


def missing(extern: Extern) -> ExternError:
    """Return the error for what is neither there nor weak."""
    what = "function" if extern.declared.kind == Kind.FUNC else "symbol"
    return ExternError(
        f"this kernel has no {what} {extern.name!r}; declare it __weak if it may be missing"
    )
