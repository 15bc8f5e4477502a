"""USDT: probes that programs and libraries are built with, and where their arguments are.

A note in the section .note.stapsdt describes each place. What a program reads of its arguments by
libbpf's usdt.bpf.h is put into a map of its object, ``__bpf_usdt_specs``; the place's cookie is the
number of the element. Source: the wiki of systemtap, "UserSpaceProbeImplementation".
"""

from __future__ import annotations

import re
import struct
from typing import Any, Iterator, Optional
from weakref import WeakKeyDictionary

from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link, Links
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.tracing import binaries, nearest, user_probes
from pybpfthrottle.bpf.tracing.binaries import Binary

SPECS = "__bpf_usdt_specs"
_NOTE_TYPE, _OWNER = 3, b"stapsdt\0"
_MAX_ARGUMENTS = 12
_CONST, _REGISTER, _MEMORY = range(3)
# struct __bpf_usdt_arg_spec, and the cookie and number of arguments behind them.
_ARGUMENT, _END = struct.Struct("=Qih?b"), struct.Struct("=Qh6x")

# Offsets in struct pt_regs, in words of eight bytes.
_X86_64 = {
    name: 8 * number
    for number, names in enumerate(
        (
            *("r15 r15d r15w r15b", "r14 r14d r14w r14b", "r13 r13d r13w r13b"),
            *("r12 r12d r12w r12b", "rbp ebp bp bpl", "rbx ebx bx bl", "r11 r11d r11w r11b"),
            *("r10 r10d r10w r10b", "r9 r9d r9w r9b", "r8 r8d r8w r8b", "rax eax ax al"),
            *("rcx ecx cx cl", "rdx edx dx dl", "rsi esi si sil", "rdi edi di dil"),
            *("", "rip eip", "", "", "rsp esp sp spl"),
        )
    )
    for name in names.split()
}
_AARCH64 = {**{f"x{n}": 8 * n for n in range(31)}, **{f"w{n}": 8 * n for n in range(31)}}
_AARCH64["sp"] = 8 * 31
_REGISTERS = {"EM_X86_64": _X86_64, "EM_AARCH64": _AARCH64}
_FORMS = {
    "EM_X86_64": (
        r"\$(?P<const>-?\w+)$",
        r"%(?P<register>\w+)$",
        r"(?P<offset>-?\w*)\(%(?P<base>\w+)\)$",
    ),
    "EM_AARCH64": (
        r"(?P<const>-?\d+)$",
        r"(?P<register>[xw]\d+|sp)$",
        r"\[(?P<base>[xw]\d+|sp)(?:,\s*(?P<offset>-?\d+))?\]$",
    ),
}
# An argument, such as -4@-20(%rbp): so many bytes, with a sign, and where they are.
_ARGUMENTS = re.compile(r"(-?\d+)@(\[[^]]*\]|\S+)")


class Site(NamedTuple):
    """One place of a probe; offsets are in the file, ``semaphore`` is 0 where there is none."""

    provider: str
    name: str
    arguments: str
    offset: int
    semaphore: int


class Target(NamedTuple):
    """What "libc.so.6:libc:setjmp" names: a binary, a provider and its probe."""

    binary: str
    provider: str
    name: str


def target_of(text: str) -> Target:
    """Return the target that a section names. Raises AttachError."""
    binary, _, rest = text.partition(":")
    provider, _, name = rest.partition(":")
    if not binary or not name:
        raise AttachError(f"{text!r} is no target: write BINARY:PROVIDER:NAME")
    return Target(binary, provider, name)


def sites(binary: Binary) -> Iterator[Site]:
    """Return the places of all probes of a file. Raises AttachError for notes that are broken."""
    notes, base = binary.section(".note.stapsdt"), binary.section(".stapsdt.base")
    if notes is None:
        return
    word = struct.Struct(binary.order + ("3Q" if binary.bits == 64 else "3I"))
    try:
        for note in _notes(notes.data, binary.order):
            address, linked_base, semaphore = word.unpack_from(note)
            provider, name, arguments, *_ = note[word.size :].split(b"\0")
            # Prelinked files were moved after the notes had been written.
            moved = base.address - linked_base if base and linked_base else 0
            yield Site(
                provider.decode("utf-8", "replace"),
                name.decode("utf-8", "replace"),
                arguments.decode("utf-8", "replace"),
                binary.file_offset(address + moved),
                binary.file_offset(semaphore + moved) if semaphore else 0,
            )
    except (struct.error, ValueError) as error:
        raise AttachError(f"{binary.path} has broken notes of its probes: {error}") from error


def _notes(data: bytes, order: str) -> Iterator[bytes]:
    header, at = struct.Struct(order + "3I"), 0
    while at + header.size <= len(data):
        name_bytes, bytes_, kind = header.unpack_from(data, at)
        begin = at + header.size + (name_bytes + 3) // 4 * 4
        if kind == _NOTE_TYPE and data[at + header.size : begin].startswith(_OWNER):
            yield data[begin : begin + bytes_]
        at = begin + (bytes_ + 3) // 4 * 4


def attach_usdt(
    program: Program,
    binary: str,
    provider: str,
    name: str,
    *,
    pid: Optional[int] = None,
    cookie: int = 0,
) -> Link:
    """Attach at every place of a probe; ``provider`` "" stands for any.

    Linux 4.1; probes with a semaphore 4.20, cookies and programs that read arguments 5.15.
    ``pid`` is needed for no probe, but those with a semaphore are switched on for that process
    alone then. Raises AttachError, with the nearest names where there is no such probe.
    """
    path = binaries.find(binary, pid)
    elf = binaries.opened(path)
    known = list(sites(elf))
    found = [site for site in known if site.name == name and provider in ("", site.provider)]
    if not found:
        hint = nearest.hint(f"{provider}:{name}", {f"{s.provider}:{s.name}" for s in known})
        told = hint if known else "; it has none at all"
        raise AttachError(f"{path} has no USDT probe {provider}:{name}{told}")
    specs = _map_of(program)
    parts: list[Link] = []
    try:
        for site in found:
            number = _number(specs, spec(site.arguments, elf.machine, cookie)) if specs else cookie
            parts.append(
                user_probes.attach_at(
                    *(program, path, site.offset),
                    pid=pid,
                    cookie=number,
                    ref_counter=site.semaphore,
                )
            )
    except BaseException:
        for part in parts:
            part.close()
        raise
    return Links(parts)


def _map_of(program: Program) -> Optional[Map[Any, Any]]:
    return program.maps.get(SPECS)


def spec(arguments: str, machine: str, cookie: int) -> bytes:
    """Return struct __bpf_usdt_spec for the arguments of a place. Raises AttachError."""
    packed = [_argument(match[1], match[2], machine) for match in _ARGUMENTS.finditer(arguments)]
    if len(packed) > _MAX_ARGUMENTS:
        raise AttachError(f"a probe with {len(packed)} arguments: {_MAX_ARGUMENTS} are supported")
    room = bytes(_ARGUMENT.size * (_MAX_ARGUMENTS - len(packed)))
    return b"".join(packed) + room + _END.pack(cookie, len(packed))


def _argument(size: str, where: str, machine: str) -> bytes:
    value, kind, register = _place(where, machine)
    bits = 64 - 8 * abs(int(size))
    return _ARGUMENT.pack(value & (1 << 64) - 1, kind, register, int(size) < 0, bits)


def _place(where: str, machine: str) -> tuple[int, int, int]:
    """Return a number, how the argument is found, and the offset of its register."""
    registers = _REGISTERS.get(machine)
    if registers is None:
        raise AttachError(f"arguments of USDT probes are not supported on {machine}")
    try:
        for form in _FORMS[machine]:
            match = re.match(form, where)
            if match is None:
                continue
            parts = match.groupdict()
            if "const" in parts:
                return int(parts["const"], 0), _CONST, 0
            if "register" in parts:
                return 0, _REGISTER, registers[parts["register"]]
            return int(parts["offset"] or "0", 0), _MEMORY, registers[parts["base"]]
    except (KeyError, ValueError):
        pass
    raise AttachError(f"the place {where!r} of an argument of a USDT probe is not supported")


_numbers: WeakKeyDictionary[Map[Any, Any], dict[bytes, int]] = WeakKeyDictionary()


def _number(specs: Map[Any, Any], data: bytes) -> int:
    """Return the number of the element that has a spec, after putting it in if none has."""
    numbers = _numbers.setdefault(specs, {})
    if data not in numbers:
        size, room = specs.spec.value_size, specs.spec.max_entries
        if len(numbers) >= room or size < len(data):
            raise AttachError(
                f"the map {SPECS} has no room: for {room} kinds of places, of {size} bytes each"
            )
        specs.typed("I", bytes)[len(numbers)] = data.ljust(size, b"\0")
        numbers[data] = len(numbers)
    return numbers[data]
