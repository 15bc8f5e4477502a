"""What the limiter asks of a kernel, found out by trying it."""

from __future__ import annotations

import errno

from pybpfthrottle.bpf import programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.features import Feature, load_exactly
from pybpfthrottle.bpf.obj import asm, insn

# Of struct __sk_buff.
_LEN_OFFSET = 0
_DATA_OFFSET = 76
_DATA_END_OFFSET = 80
_SK_OFFSET = 168

_SKB_ECN_SET_CE = 97  # bpf_skb_ecn_set_ce
_SKC_TO_MPTCP_SOCK = 196  # bpf_skc_to_mptcp_sock

_LDX_W = insn.BPF_LDX | insn.BPF_MEM | insn.BPF_W
_LDX_DW = insn.BPF_LDX | insn.BPF_MEM | insn.BPF_DW
_JNE_IMM = insn.BPF_JMP | insn.BPF_JNE | insn.BPF_K
_AND_IMM = insn.BPF_ALU64 | insn.BPF_AND | insn.BPF_K
_ADD = insn.BPF_ALU64 | insn.BPF_ADD | insn.BPF_X
_JGT = insn.BPF_JMP | insn.BPF_JGT | insn.BPF_X


def _load(code: bytes, attach_type: AttachType = AttachType.CGROUP_INET_INGRESS) -> None:
    load_exactly(code, ProgType.CGROUP_SKB, attach_type)


def _probe_cgroup_skb() -> None:
    _load(asm.return_imm(1))


def _probe_congestion_verdict() -> None:
    _load(asm.return_imm(2), AttachType.CGROUP_INET_EGRESS)


def _probe_direct_packet_access() -> None:
    # r2 = context->data + (context->len & 63). Such a sum needs CAP_PERFMON; the load alone
    # does not.
    code = (
        asm.insn(_LDX_W, dst=2, src=1, off=_DATA_OFFSET)
        + asm.insn(_LDX_W, dst=3, src=1, off=_LEN_OFFSET)
        + asm.insn(_AND_IMM, dst=3, imm=63)
        + asm.insn(_ADD, dst=2, src=3)
        + asm.call(_SKB_ECN_SET_CE)
        + asm.return_imm(1)
    )
    _load(code)


def _probe_mptcp_socket() -> None:
    # Its result is a pointer to one of the kernel's own types, which a kernel without BTF lacks.
    code = (
        asm.insn(_LDX_DW, dst=1, src=1, off=_SK_OFFSET)
        + asm.insn(_JNE_IMM, dst=1, imm=0, off=2)
        + asm.return_imm(1)
        + asm.call(_SKC_TO_MPTCP_SOCK)
        + asm.return_imm(1)
    )
    _load(code)


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


CGROUP_SKB = Feature("cgroup_skb programs", "4.10", _probe_cgroup_skb)
CONGESTION_VERDICT = Feature("egress verdict 2 (congestion)", "5.3", _probe_congestion_verdict)
DIRECT_PACKET_ACCESS = Feature(
    "direct packet access and ECN marks in cgroup_skb", "5.1", _probe_direct_packet_access
)
MPTCP_SOCKET = Feature("the MPTCP socket of a packet", "5.19", _probe_mptcp_socket)
# Measured: 6.12 does not have it, 6.18 has. A packet that is not a test's is always seen.
TEST_RUN_PACKET = Feature(
    "a packet to read in test runs of cgroup_skb", "6.18", _probe_test_run_packet
)
