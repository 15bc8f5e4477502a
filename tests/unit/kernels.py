"""Kernels by their release, behind the one door: each answers as was measured on the real one."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Iterable, NamedTuple, Optional

import known_fields
from fake_kernel import Call, FakeKernel, _is_open
from linux_4_14 import context_accesses, too_new

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.bpf import abi, maps, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, MapType
from pybpfthrottle.bpf.obj import asm, releases, relocate
from pybpfthrottle.bpf.obj.insn import CALL, INSN_BYTES, LD_IMM64, decoded

MODES = {0: "SINGLE", abi.BPF_F_ALLOW_OVERRIDE: "OVERRIDE", abi.BPF_F_ALLOW_MULTI: "MULTI"}
PROBE = "a probe"


class FakeMap(NamedTuple):
    """A map with what is in it; elements of an array are there from the start."""

    fd: int
    key_size: int
    value_size: int
    value_bytes: int
    contents: dict[bytes, bytes]
    type: int = 0
    name: bytes = b""


class Standing(NamedTuple):
    """What is attached somewhere. ``fd`` is that of the link, None for the legacy call."""

    target: int
    attach_type: int
    mode: str
    program: int
    fd: Optional[int] = None
    inode: int = 0


class Kernel(FakeKernel):
    """A kernel of a release. ``told`` has each command that is no probe, and its answer."""

    def __init__(self, release: str) -> None:
        super().__init__()
        self.release = tuple(map(int, release.split(".")))
        self.told: list[str] = []
        self.probed: list[str] = []
        self.maps: dict[int, FakeMap] = {}
        self.programs: dict[int, str] = {}
        self.refused_modes: dict[tuple[int, str], int] = {}
        self.charges_memory = False
        self._standing: list[Standing] = []

    def __call__(self, cmd: Cmd, attr: Attr) -> int:
        """Do a command; what this kernel does not know is EINVAL."""
        self.calls.append(Call(cmd, Attr.from_buffer_copy(attr)))
        described = self._described(cmd, attr)
        lines = self.probed if described.startswith(f"PROG_LOAD {PROBE}") else self.told
        number = 0
        try:
            handler = getattr(self, f"_{cmd.name.lower()}", None)
            if handler is None:
                raise _Refused(errno.EINVAL)
            number = known_fields.refusal(cmd, attr, self.release)
            if number:
                raise _Refused(number)
            return handler(attr)
        except _Refused as refusal:
            number = refusal.number
            raise syscall.error(number, cmd) from None
        finally:
            lines.append(f"{described}: {syscall.errno_name(number) if number else 'ok'}")

    def standing(self) -> list[tuple[int, str, str]]:
        """What is attached, as (attach type, mode, program)."""
        return [
            (found.attach_type, found.mode, self.programs[found.program]) for found in self._alive()
        ]

    def attach_foreign(self, path: str, attach_type: int, mode: str) -> None:
        """Another tool has attached a program."""
        self.programs[0] = "foreign"
        self._standing.append(Standing(os.stat(path).st_ino, attach_type, mode, 0))

    def map_of(self, value_size: int, map_type: MapType = MapType.ARRAY) -> FakeMap:
        """The map of a type with values of a size: on 4.14 maps have no names."""
        live = (self.maps[inode] for inode in self._live(self.maps))
        (found,) = (one for one in live if (one.type, one.value_size) == (map_type, value_size))
        return found

    def asked(self, *commands: str) -> list[str]:
        """What was told of some commands."""
        return [line for line in self.told if line.partition(" ")[0].rstrip(":") in commands]

    def _described(self, cmd: Cmd, attr: Attr) -> str:
        if cmd == Cmd.MAP_CREATE:
            return f"MAP_CREATE {attr.map_create.map_name.decode() or '-'}"
        if cmd == Cmd.PROG_LOAD:
            load = attr.prog_load
            name = load.prog_name.decode() or "-"
            return f"PROG_LOAD {_identified(_code(attr))} as {name} {load.expected_attach_type}"
        if cmd == Cmd.LINK_CREATE:
            return f"LINK_CREATE {attr.link_create.attach_type}"
        if cmd == Cmd.PROG_ATTACH:
            call = attr.prog_attach
            return f"PROG_ATTACH {call.attach_type} {MODES[call.attach_flags]}"
        if cmd == Cmd.PROG_DETACH:
            return f"PROG_DETACH {attr.prog_attach.attach_type}"
        if cmd == Cmd.PROG_QUERY:
            return f"PROG_QUERY {attr.query.attach_type}"
        return cmd.name

    def _map_create(self, attr: Attr) -> int:
        wanted = attr.map_create
        is_trie = wanted.map_type == MapType.LPM_TRIE
        if not is_trie and wanted.map_type not in (MapType.ARRAY, MapType.PERCPU_ARRAY):
            raise _Refused(errno.EINVAL)
        # kernel/bpf/lpm_trie.c: it has no elements before they are put in.
        if is_trie and wanted.map_flags != abi.BPF_F_NO_PREALLOC:
            raise _Refused(errno.EINVAL)
        if self.charges_memory and self.release < (5, 11):
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            if soft != resource.RLIM_INFINITY:
                raise _Refused(errno.EPERM)
        size = wanted.value_size
        if wanted.map_type == MapType.PERCPU_ARRAY:
            size = (size + 7) // 8 * 8 * maps.possible_cpus()
        count = 0 if is_trie else wanted.max_entries
        keys = (index.to_bytes(4, sys.byteorder) for index in range(count))
        fd = self.create()
        self.maps[_inode(fd)] = FakeMap(
            *(fd, wanted.key_size, wanted.value_size, size, dict.fromkeys(keys, bytes(size))),
            *(wanted.map_type, wanted.map_name),
        )
        return fd

    def _map_lookup_elem(self, attr: Attr) -> int:
        found = self.maps[_inode(attr.map_elem.map_fd)]
        key = ctypes.string_at(attr.map_elem.key, found.key_size)
        if key not in found.contents:
            raise _Refused(errno.ENOENT)
        ctypes.memmove(attr.map_elem.value, found.contents[key], found.value_bytes)
        return 0

    def _map_update_elem(self, attr: Attr) -> int:
        found = self.maps[_inode(attr.map_elem.map_fd)]
        key = ctypes.string_at(attr.map_elem.key, found.key_size)
        if key not in found.contents:
            raise _Refused(errno.E2BIG)
        found.contents[key] = ctypes.string_at(attr.map_elem.value, found.value_bytes)
        return 0

    def _map_get_next_key(self, attr: Attr) -> int:
        call = attr.map_elem
        keys = list(self.maps[_inode(call.map_fd)].contents)
        before = ctypes.string_at(call.key, 4) if call.key else b""
        at = keys.index(before) + 1 if before in keys else 0
        if at == len(keys):
            raise _Refused(errno.ENOENT)
        ctypes.memmove(call.value, keys[at], len(keys[at]))
        return 0

    def _map_get_next_id(self, attr: Attr) -> int:
        return _next_id(attr, self._live(self.maps))

    def _prog_get_next_id(self, attr: Attr) -> int:
        return _next_id(attr, self._live(self.programs))

    def _map_get_fd_by_id(self, attr: Attr) -> int:
        return self._opened(attr.get_id.id, self.maps)

    def _prog_get_fd_by_id(self, attr: Attr) -> int:
        return self._opened(attr.get_id.id, self.programs)

    def _opened(self, number: int, among: Iterable[int]) -> int:
        """A descriptor of a map or program; its number is the inode of its file."""
        if number not in self._live(among):
            raise _Refused(errno.ENOENT)
        return os.dup(next(fd for fd, inode in self._created if inode == number))

    def _live(self, inodes: Iterable[int]) -> list[int]:
        """Those whose file is open."""
        open_now = {inode for fd, inode in self._created if _is_open(fd, inode)}
        return sorted(open_now.intersection(inodes))

    def _prog_load(self, attr: Attr) -> int:
        load = attr.prog_load
        code = _code(attr)
        refused = self._verified(code, load.expected_attach_type)
        if refused:
            if load.log_level:
                ctypes.memmove(load.log_buf, b"rejected\n\0", 10)
            raise _Refused(refused)
        fd = self.create()
        self.programs[_inode(fd)] = _identified(code)
        return fd

    def _verified(self, code: bytes, attach_type: int) -> int:
        if self.release < (5, 0):
            # The verifier goes through the code in order; ours reads the packet before it calls.
            if context_accesses(code):
                return errno.EACCES
            if list(too_new(code)):
                return errno.EINVAL
        called = (one.imm for one in decoded(code) if one.code == CALL and not one.src)
        if any(releases.order(releases.of_helper(number)) > self.release for number in called):
            return errno.EINVAL
        returns_2 = code == asm.return_imm(2) or _identified(code).endswith("/pybpft_egresscn")
        if returns_2 and self.release >= (4, 17) and (self.release < (5, 3) or attach_type != 1):
            return errno.EINVAL
        return 0

    def _link_create(self, attr: Attr) -> int:
        if self.release < (5, 7):
            raise _Refused(errno.EINVAL)
        call = attr.link_create
        target, program = _inode(call.target_fd), _inode(call.prog_fd)
        if call.flags:
            raise _Refused(errno.EINVAL)
        self._refuse_mode(call.attach_type, "link")
        self._refuse_beside(target, call.attach_type)
        fd = self.create()
        self._standing.append(Standing(target, call.attach_type, "link", program, fd, _inode(fd)))
        return fd

    def _prog_attach(self, attr: Attr) -> int:
        call = attr.prog_attach
        target, program = _inode(call.target_fd), _inode(call.attach_bpf_fd)
        mode = MODES[call.attach_flags]
        if mode == "MULTI" and self.release < (4, 15):
            raise _Refused(errno.EINVAL)
        self._refuse_mode(call.attach_type, mode)
        if mode == "MULTI":
            self._refuse_beside(target, call.attach_type)
        else:
            here = self._at(target, call.attach_type)
            if any(found.mode in ("MULTI", "link") for found in here):
                raise _Refused(errno.EPERM)
            if self.release < (4, 15):
                self._refuse_other_mode(call, mode, here)
            self._standing = [found for found in self._standing if found not in here]
        self._standing.append(Standing(target, call.attach_type, mode, program))
        return 0

    def _prog_detach(self, attr: Attr) -> int:
        call = attr.prog_attach
        # Where there is one program alone, 4.14 does not even look at the field.
        program = _inode(call.attach_bpf_fd) if call.attach_bpf_fd else 0
        gone = [
            found
            for found in self._at(_inode(call.target_fd), call.attach_type)
            if found.fd is None and (found.mode != "MULTI" or found.program == program)
        ]
        if not gone:
            raise _Refused(errno.ENOENT)
        self._standing.remove(gone[0])
        return 0

    def _prog_query(self, attr: Attr) -> int:
        if self.release < (4, 15):
            raise _Refused(errno.EINVAL)
        call = attr.query
        here = self._at(_inode(call.target_fd), call.attach_type)
        ids = (ctypes.c_uint32 * call.prog_cnt).from_address(call.prog_ids)
        for index, found in enumerate(here):
            ids[index] = found.program
        call.prog_cnt = len(here)
        call.attach_flags = {"SINGLE": 0, "OVERRIDE": 1}.get(here[0].mode, 2) if here else 0
        return 0

    def _obj_get_info_by_fd(self, attr: Attr) -> int:
        call = attr.info
        inode = _inode(call.bpf_fd)
        kind = abi.MapInfo if inode in self.maps else abi.ProgInfo
        known = known_fields.info_bytes(kind, self.release)
        # Of what a kernel does not know it takes zeros alone (check_uarg_tail_zero).
        if any(ctypes.string_at(call.info, call.info_len)[known:]):
            raise _Refused(errno.E2BIG)
        if kind is abi.ProgInfo:
            abi.ProgInfo.from_address(call.info).id = inode
            return 0
        info, found = abi.MapInfo.from_address(call.info), self.maps[inode]
        info.type, info.id, info.max_entries = found.type, inode, len(found.contents)
        info.key_size, info.value_size = found.key_size, found.value_size
        if self.release >= (4, 15):
            info.name = found.name
        return 0

    def _alive(self) -> list[Standing]:
        """A link ends with its descriptor."""
        return [f for f in self._standing if f.fd is None or _is_open(f.fd, f.inode)]

    def _at(self, target: int, attach_type: int) -> list[Standing]:
        return [f for f in self._alive() if (f.target, f.attach_type) == (target, attach_type)]

    def _refuse_mode(self, attach_type: int, mode: str) -> None:
        number = self.refused_modes.get((attach_type, mode))
        if number:
            raise _Refused(number)

    def _refuse_other_mode(self, call: abi.ProgAttach, mode: str, here: list[Standing]) -> None:
        """__cgroup_bpf_update() of 4.14: below a program, only override below override.

        Over a program, only the mode that it has.
        """
        path = Path(os.readlink(f"/proc/self/fd/{call.target_fd}"))
        above = (self._at(parent.stat().st_ino, call.attach_type) for parent in path.parents)
        nearest: list[Standing] = next(filter(None, above), [])
        if any("SINGLE" in (found.mode, mode) for found in nearest):
            raise _Refused(errno.EPERM)
        if any(found.mode != mode for found in here):
            raise _Refused(errno.EPERM)

    def _refuse_beside(self, target: int, attach_type: int) -> None:
        if any(found.mode in ("SINGLE", "OVERRIDE") for found in self._at(target, attach_type)):
            raise _Refused(errno.EPERM)


class _Refused(Exception):  # noqa: N818 - it never leaves this module
    """The answer to a command is an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _inode(fd: int) -> int:
    """What names the file of a descriptor, however often it was duplicated."""
    try:
        return os.fstat(fd).st_ino
    except (OSError, OverflowError):
        raise _Refused(errno.EBADF) from None


def _next_id(attr: Attr, ids: list[int]) -> int:
    later = [number for number in ids if number > attr.get_id.id]
    if not later:
        raise _Refused(errno.ENOENT)
    attr.get_id.next_id = later[0]
    return 0


def _code(attr: Attr) -> bytes:
    return ctypes.string_at(attr.prog_load.insns, attr.prog_load.insn_cnt * INSN_BYTES)


@cache
def _shipped() -> dict[bytes, str]:
    """The code of each shipped program, without its maps, and object/program."""
    found = {}
    for name in ("throttle", "throttle-direct"):
        spec = programs.read(name)
        for program in spec.programs.values():
            code = relocate.resolve(relocate.link(spec, program), dict.fromkeys(spec.maps, 0))
            found[_without_maps(code)] = f"{name}/{program.name}"
    return found


def _identified(code: bytes) -> str:
    """Which of the shipped programs it is; a few instructions alone are a probe."""
    if len(code) <= 8 * INSN_BYTES:
        return PROBE
    return _shipped()[_without_maps(code)]


def _without_maps(code: bytes) -> bytes:
    found = (abi.Insn * (len(code) // INSN_BYTES)).from_buffer_copy(code)
    for insn in found:
        if insn.code == LD_IMM64 and insn.registers >> 4 | insn.registers & 0xF:
            insn.imm = 0
    return bytes(found)
