"""Features of the running kernel, found out by trying. Nothing is tried before it is asked for.

A feature is a value: its name, the first release with it, and a probe. ``missing()`` tells with
which error the probe failed; the answer is kept. A program that needs something else makes a
``Feature`` of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Callable, Optional

from pybpfthrottle.bpf import maps, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd, MapType, ProgType
from pybpfthrottle.bpf.errors import BpfError, VerifierError
from pybpfthrottle.bpf.obj import asm, releases
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.insn import INSN_BYTES
from pybpfthrottle.bpf.obj.plain import Data
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.bpf.privileges import with_memlock

# kernel/bpf/verifier.c: before Linux 6.10, in between, and since.
_NO_SUCH_HELPER = ("unknown func", "invalid func", "cannot use helper")


class Feature(Data, frozen=True):
    """Something that a kernel may have: its name, the first release with it, and how to try it."""

    name: str
    since: str
    probe: Callable[[], None]

    def __hash__(self) -> int:
        # It is asked for again and again, and its name tells it from others.
        return hash(self.name)

    def missing(self) -> Optional[Exception]:
        """Return the error that trying it gave, or None where this kernel has it."""
        return _try(self)

    def available(self) -> bool:
        """Return whether this kernel has it, and this process may use it."""
        return self.missing() is None


@cache
def _try(feature: Feature) -> Optional[Exception]:
    try:
        feature.probe()
    except (OSError, BpfError) as error:
        # It is kept: without the frames that it came through, which may hold megabytes.
        return error.with_traceback(None)
    return None


def forget() -> None:
    """Try again when asked next, as after a change of privileges."""
    _try.cache_clear()


def load_exactly(code: bytes, type: ProgType, attach_type: AttachType) -> None:
    """Load a program for an attach type, and close it. Linux 4.17. Raises OSError.

    Unlike ``programs.load`` this leaves nothing out that the kernel may not know.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    license_buffer = ctypes.create_string_buffer(b"MIT")
    attr = Attr()
    attr.prog_load.prog_type = type
    attr.prog_load.insns = ctypes.addressof(instructions)
    attr.prog_load.insn_cnt = len(code) // INSN_BYTES
    attr.prog_load.license = ctypes.addressof(license_buffer)
    attr.prog_load.expected_attach_type = attach_type
    os.close(with_memlock(lambda: syscall.bpf(Cmd.PROG_LOAD, attr)))


def _probe_link() -> None:
    # Kernels with links look at the descriptors first; older ones do not know the command.
    attr = Attr()
    attr.link_create.prog_fd = attr.link_create.target_fd = (1 << 31) - 1
    attr.link_create.attach_type = AttachType.CGROUP_INET_INGRESS
    try:
        os.close(syscall.bpf(Cmd.LINK_CREATE, attr))
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _probe_query() -> None:
    # Kernels that know the command refuse the descriptor, or who asks.
    attr = Attr()
    attr.query.target_fd = (1 << 31) - 1
    try:
        syscall.bpf(Cmd.PROG_QUERY, attr)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise


def _probe_data_sections() -> None:
    with maps.create(MapSpec("probe", MapType.ARRAY, 4, 4, 1)) as array:
        code = asm.load_map_value(1, array.fd, 0) + asm.return_imm(1)
        load_exactly(code, ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS)


@cache
def helper(program_type: ProgType, number: int) -> Feature:
    """Return whether programs of a type may call a helper function, by its number in linux/bpf.h.

    The verifier looks for the helper before it looks at the arguments, so that only its words
    tell the one complaint from the other.
    """

    def probe() -> None:
        # GPL, since some helpers are refused to other licenses with words of their own.
        code = asm.call(number) + asm.exit_()
        try:
            programs.load(code, type=program_type, license="GPL").close()
        except VerifierError as error:
            if any(words in error.log for words in _NO_SUCH_HELPER):
                raise

    known = helper_name(number) != "unknown"
    since = releases.of_helper(number) if known else ""
    return Feature(f"helper {number} for {program_type.name.lower()}", since, probe)


# It came together with several programs on one cgroup (BPF_F_ALLOW_MULTI).
QUERY = Feature("several programs on a cgroup, and BPF_PROG_QUERY", "4.15", _probe_query)
LINK = Feature("BPF links to cgroups", "5.7", _probe_link)
DATA_SECTIONS = Feature("data sections (.data, .rodata, .bss)", "5.2", _probe_data_sections)
