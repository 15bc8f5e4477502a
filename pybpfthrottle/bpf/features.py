"""What the running kernel can do, found out by trying it. Nothing is tried before it is asked for.

``Feature.missing()`` tells with which error the try failed; the answer is kept.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from functools import cache
from typing import Callable, Optional

from pybpfthrottle.bpf import maps, programs, syscall
from pybpfthrottle.bpf.abi import INSN_BYTES, AttachType, Attr, Cmd, MapType, ProgType
from pybpfthrottle.bpf.errors import BpfError, VerifierError
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.bpf.privileges import with_memlock

# Of struct __sk_buff.
_LEN_OFFSET = 0
_DATA_OFFSET = 76
_DATA_END_OFFSET = 80

# kernel/bpf/verifier.c: before Linux 6.10, in between, and since.
_NO_SUCH_HELPER = ("unknown func", "invalid func", "cannot use helper")

_LDX_W, _AND_IMM, _ADD, _JGT = 0x61, 0x57, 0x0F, 0x2D


@dataclass(frozen=True)
class Feature:
    """Something that a kernel may have: its name, the first release with it, and how to try it."""

    name: str
    since: str
    probe: Callable[[], None]

    def missing(self) -> Optional[Exception]:
        """The error that trying it gave, or None where this kernel has it."""
        return _try(self)

    def available(self) -> bool:
        """Whether this kernel has it, and this process may use it."""
        return self.missing() is None


@cache
def _try(feature: Feature) -> Optional[Exception]:
    try:
        feature.probe()
    except (OSError, BpfError) as error:
        return error
    return None


def forget() -> None:
    """Try again when asked next, as after a change of privileges."""
    _try.cache_clear()


def _load(code: bytes, attach_type: AttachType) -> None:
    """Load with the expected attach type, which programs.load leaves out on older kernels."""
    instructions = ctypes.create_string_buffer(code, len(code))
    license_buffer = ctypes.create_string_buffer(b"MIT")
    attr = Attr()
    attr.prog_load.prog_type = ProgType.CGROUP_SKB
    attr.prog_load.insns = ctypes.addressof(instructions)
    attr.prog_load.insn_cnt = len(code) // INSN_BYTES
    attr.prog_load.license = ctypes.addressof(license_buffer)
    attr.prog_load.expected_attach_type = attach_type
    os.close(with_memlock(lambda: syscall.bpf(Cmd.PROG_LOAD, attr)))


def _probe_cgroup_skb() -> None:
    _load(asm.return_imm(1), AttachType.CGROUP_INET_INGRESS)


def _probe_congestion_verdict() -> None:
    _load(asm.return_imm(2), AttachType.CGROUP_INET_EGRESS)


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


def _probe_data_sections() -> None:
    spec = MapSpec("probe", MapType.ARRAY, 4, 4, 1)
    with maps.create(spec) as found:
        _load(
            asm.load_map_value(1, found.fd, 0) + asm.return_imm(1), AttachType.CGROUP_INET_INGRESS
        )


def _probe_direct_packet_access() -> None:
    # r2 = context->data + (context->len & 63). Such a sum needs CAP_PERFMON; the load alone
    # does not.
    code = (
        asm.insn(_LDX_W, dst=2, src=1, off=_DATA_OFFSET)
        + asm.insn(_LDX_W, dst=3, src=1, off=_LEN_OFFSET)
        + asm.insn(_AND_IMM, dst=3, imm=63)
        + asm.insn(_ADD, dst=2, src=3)
        + asm.return_imm(1)
    )
    _load(code, AttachType.CGROUP_INET_INGRESS)


def _probe_test_run_packet() -> None:
    # return data_end > data
    code = (
        asm.insn(_LDX_W, dst=2, src=1, off=_DATA_OFFSET)
        + asm.insn(_LDX_W, dst=3, src=1, off=_DATA_END_OFFSET)
        + asm.mov_imm(0, 1)
        + asm.insn(_JGT, dst=3, src=2, off=1)
        + asm.mov_imm(0, 0)
        + asm.exit_()
    )
    with programs.load(code, type=ProgType.CGROUP_SKB, license="MIT") as probe:
        if not probe.test_run(bytes(100)).retval:
            raise OSError(errno.ENODATA, "the packet is empty", "BPF_PROG_TEST_RUN")


@cache
def helper(program_type: ProgType, number: int) -> Feature:
    """Whether programs of a type may call a helper, by its number in linux/bpf.h.

    The verifier looks for the helper before it looks at the arguments, so that only its words
    tell the one complaint from the other.
    """

    def probe() -> None:
        code = asm.call(number) + asm.exit_()
        try:
            programs.load(code, type=program_type, license="GPL").close()
        except VerifierError as error:
            if any(words in error.log for words in _NO_SUCH_HELPER):
                raise

    return Feature(f"helper {number} for {program_type.name.lower()}", "", probe)


CGROUP_SKB = Feature("cgroup_skb programs", "4.10", _probe_cgroup_skb)
CONGESTION_VERDICT = Feature("egress verdict 2 (congestion)", "5.3", _probe_congestion_verdict)
DIRECT_PACKET_ACCESS = Feature(
    "direct packet access in cgroup_skb", "5.0", _probe_direct_packet_access
)
LINK = Feature("BPF links to cgroups", "5.7", _probe_link)
DATA_SECTIONS = Feature("data sections (.data, .rodata, .bss)", "5.2", _probe_data_sections)
# Measured: 6.12 does not have it, 6.18 has. A packet that is not a test's is always seen.
TEST_RUN_PACKET = Feature(
    "a packet to read in test runs of cgroup_skb", "6.18", _probe_test_run_packet
)
