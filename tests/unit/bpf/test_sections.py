"""What the names of sections mean."""

from __future__ import annotations

import pytest

from pybpfthrottle.bpf.abi import BPF_F_SLEEPABLE, BPF_F_XDP_HAS_FRAGS, AttachType, ProgType
from pybpfthrottle.bpf.obj import sections
from pybpfthrottle.bpf.obj.sections import SectionKind, meaning_of

SLEEPS, FRAGS = BPF_F_SLEEPABLE, BPF_F_XDP_HAS_FRAGS
A, P = AttachType, ProgType


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("socket", (P.SOCKET_FILTER,)),
        ("socket/main", (P.SOCKET_FILTER,)),
        ("socket1", (P.SOCKET_FILTER,)),
        ("classifier_x", (P.SCHED_CLS,)),
        ("tc", (P.SCHED_CLS,)),
        ("tc/egress", (P.SCHED_CLS, A.TCX_EGRESS)),
        ("tcx/ingress", (P.SCHED_CLS, A.TCX_INGRESS)),
        ("netkit/peer", (P.SCHED_CLS, A.NETKIT_PEER)),
        ("action", (P.SCHED_ACT,)),
        ("xdp_prog1", (P.XDP, A.XDP)),
        ("xdp_devmap/x", (P.XDP, A.XDP_DEVMAP)),
        ("xdp/cpumap", (P.XDP, A.XDP_CPUMAP)),
        ("xdp.frags", (P.XDP, A.XDP, FRAGS)),
        ("xdp.frags/devmap", (P.XDP, A.XDP_DEVMAP, FRAGS)),
        ("kprobe/a", (P.KPROBE,)),
        ("kretsyscall/openat", (P.KPROBE,)),
        ("kprobe.multi/a*", (P.KPROBE, A.TRACE_KPROBE_MULTI)),
        ("kprobe.session/a*", (P.KPROBE, A.TRACE_KPROBE_SESSION)),
        ("uprobe.s//bin/sh:main", (P.KPROBE, None, SLEEPS)),
        ("uprobe.multi.s/a", (P.KPROBE, A.TRACE_UPROBE_MULTI, SLEEPS)),
        ("usdt.s/a", (P.KPROBE, None, SLEEPS)),
        ("raw_tp.w/a", (P.RAW_TRACEPOINT_WRITABLE,)),
        ("tp_btf/a", (P.TRACING, A.TRACE_RAW_TP)),
        ("fentry/a", (P.TRACING, A.TRACE_FENTRY)),
        ("fexit.s/a", (P.TRACING, A.TRACE_FEXIT, SLEEPS)),
        ("fmod_ret/a", (P.TRACING, A.MODIFY_RETURN)),
        ("iter.s/task", (P.TRACING, A.TRACE_ITER, SLEEPS)),
        ("freplace/a", (P.EXT,)),
        ("lsm/file_open", (P.LSM, A.LSM_MAC)),
        ("lsm.s/file_open", (P.LSM, A.LSM_MAC, SLEEPS)),
        ("lsm_cgroup/bind", (P.LSM, A.LSM_CGROUP)),
        ("syscall", (P.SYSCALL, None, SLEEPS)),
        ("struct_ops.s/init", (P.STRUCT_OPS, None, SLEEPS)),
        ("sk_reuseport/migrate", (P.SK_REUSEPORT, A.SK_REUSEPORT_SELECT_OR_MIGRATE)),
        ("sk_skb/stream_verdict", (P.SK_SKB, A.SK_SKB_STREAM_VERDICT)),
        ("sk_skb", (P.SK_SKB,)),
        ("cgroup/connect_unix", (P.CGROUP_SOCK_ADDR, A.CGROUP_UNIX_CONNECT)),
        ("cgroup/getsockname6", (P.CGROUP_SOCK_ADDR, A.CGROUP_INET6_GETSOCKNAME)),
        ("cgroup/sock", (P.CGROUP_SOCK, A.CGROUP_INET_SOCK_CREATE)),
        ("cgroup/sock_release", (P.CGROUP_SOCK, A.CGROUP_INET_SOCK_RELEASE)),
        ("cgroup/setsockopt", (P.CGROUP_SOCKOPT, A.CGROUP_SETSOCKOPT)),
        ("netfilter", (P.NETFILTER, A.NETFILTER)),
    ],
)
def test_a_name_means_what_libbpf_says(section, kind):
    """A section's name gives type, attach type and flags; longer names are taken leniently."""
    assert meaning_of(section).kind == SectionKind(*kind)


@pytest.mark.parametrize("section", ["", "?", "nonsense", "tptp", "kprobes/x", "lsmx", "maps"])
def test_other_names_mean_nothing(section):
    """A name that is not known gives no type."""
    assert meaning_of(section).kind.type == ProgType.UNSPEC


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("kprobe/do_exit", "do_exit"),
        ("tp/sched/sched_switch", "sched/sched_switch"),
        ("uprobe//bin/sh:main", "/bin/sh:main"),
        ("iter.s/task", "task"),
        ("xdp/devmap", None),
        ("fentry/", None),
        ("xdp", None),
    ],
)
def test_what_follows_the_slash_is_the_target(section, target):
    """What a program is to be attached to is what its section's name has after the kind."""
    assert meaning_of(section).target == target


def test_a_question_mark_means_not_by_itself():
    """With a question mark in front a section means the same, and is not loaded by itself."""
    assert meaning_of("?kprobe/x") == meaning_of("kprobe/x")._replace(autoload=False)


def test_each_attach_type_belongs_to_one_type_of_program():
    """No two names give one attach type to different types of programs."""
    known = {**sections._WITH_TARGET, **sections._PREFIXES}.values()
    pairs = {(kind.attach_type, kind.type) for kind in known if kind.attach_type is not None}
    assert len(pairs) == len({attach_type for attach_type, _ in pairs})


def test_all_attach_types_have_a_section():
    """Each attach type that a section can name has one; the others are set by other means."""
    known = {**sections._WITH_TARGET, **sections._PREFIXES}.values()
    missing = set(AttachType) - {kind.attach_type for kind in known}
    assert missing == {AttachType.STRUCT_OPS}
