"""The whole path with the shipped objects, on eight kernels that answer as was measured.

Source: the real kernels, command by command.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import time
from typing import NamedTuple

import pytest

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import features
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.records import ThrottleBucket, ThrottleConfig, ThrottleStats
from pybpfthrottle.bpf import maps, privileges
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.bpf.features import LINK
from pybpfthrottle.errors import AttachError, MapCreateError, NoMarksError, ProgramLoadError
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.targets import Selection

DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD
KERNELS = ("4.14", "4.19", "5.4", "5.10", "6.1", "6.12", "6.18", "7.2")
WITH_LINKS = KERNELS[3:]
MAPS = ("CGROUP_CONFIGS", "THROTTLE", "CGROUP_BUCKETS", "CGROUP_STATS")
RATE = Rate(100_000)
INFINITY = resource.RLIM_INFINITY


class Row(NamedTuple):
    """What is to be chosen on a kernel: the object, the program for uploads, and the rung."""

    object: str
    upload: str
    mode: str
    rung: str


LINKED = Row("throttle-direct", "pybpft_egresscn", "link", "link")
ROWS = {
    **dict.fromkeys(WITH_LINKS, LINKED),
    "4.14": Row("throttle", "pybpft_egress", "OVERRIDE", "legacy (allow_override)"),
    "4.19": Row("throttle", "pybpft_egress", "MULTI", "legacy"),
    "5.4": Row("throttle-direct", "pybpft_egresscn", "MULTI", "legacy"),
}


@pytest.fixture
def locked_memory(monkeypatch):
    """The values of RLIMIT_MEMLOCK in the order that they are set; the real one is not touched."""
    values = [(65536, 65536)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: values[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: values.append(new))
    return values


def descriptors():
    """The descriptors of this process, with what each is of."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def apply(target, *, method="auto", exclusive=True, verdict="auto", rate=RATE, shape="police"):
    """Limit both directions."""
    policy = AttachPolicy(method, exclusive=exclusive)
    options = Options(
        attach={DOWNLOAD: policy, UPLOAD: policy},
        egress_verdict=verdict,
        shape={DOWNLOAD: shape, UPLOAD: shape},
    )
    return throttle.apply([target], {DOWNLOAD: rate, UPLOAD: rate}, options=options)


def key(direction):
    """A direction as the maps have it."""
    return U32.encode(direction)


def config(kernel, direction):
    """The record of a direction, as the program would read it."""
    found = kernel.map_of(ctypes.sizeof(ThrottleConfig))
    return ThrottleConfig.from_buffer_copy(found.contents[key(direction)])


@pytest.mark.parametrize("release", KERNELS)
def test_what_is_missing_is_found_out(release, boot):
    """Each probe ends with the very answer that its kernel was measured to give."""
    boot(release)
    found = {
        feature: getattr(feature.missing(), "errno", 0)
        for feature in (
            features.CGROUP_SKB,
            features.DIRECT_PACKET_ACCESS,
            features.CONGESTION_VERDICT,
            LINK,
        )
    }
    assert list(found.values()) == {
        "4.14": [0, errno.EACCES, errno.E2BIG, errno.EINVAL],
        "4.19": [0, errno.EACCES, errno.EINVAL, errno.EINVAL],
        "5.4": [0, 0, 0, errno.EINVAL],
    }.get(release, [0, 0, 0, 0])


def test_an_answer_is_asked_for_once(boot, target):
    """A second throttle loads no probe again."""
    kernel = boot("5.4")
    apply(target).remove()
    before = len(kernel.probed)
    apply(target).remove()
    assert before == len(kernel.probed) == 3


@pytest.mark.parametrize("release", KERNELS)
def test_the_right_programs_stand_in_the_right_mode(release, boot, target):
    """Object, programs, mode and rung are those that the kernel is able to have."""
    kernel = boot(release)
    row = ROWS[release]
    with apply(target) as limits:
        assert kernel.standing() == [
            (0, row.mode, f"{row.object}/pybpft_ingress"),
            (1, row.mode, f"{row.object}/{row.upload}"),
        ]
        described = {
            "backend": "ebpf",
            "object": row.object,
            "attached_by": row.rung,
            "shape": "police",
            "shape_reason": "--shape police",
        }
        assert limits.how() == {DOWNLOAD: described, UPLOAD: described}


@pytest.mark.parametrize("release", KERNELS[:3])
def test_a_shape_that_was_asked_for_by_name_is_missed(release, boot, target):
    """A note says that it cannot be done, and since which release it can; auto is no wish."""
    boot(release)
    options = Options(attach=dict.fromkeys(Direction, AttachPolicy(exclusive=True)))
    limits = {DOWNLOAD: RATE, UPLOAD: RATE}
    for shape, known in (("auto", 0), ("pace", 1), ("window", 1), ("police", 0)):
        options = options._replace(shape=dict.fromkeys(Direction, shape))
        with throttle.apply([target], limits, options=options) as live:
            notes = live.notes()
        assert len(notes) == known
        for note in notes:
            assert note.startswith(f"--shape {shape} does not work here, and the ")
            assert "Linux 5.10" in note


@pytest.mark.parametrize("release", KERNELS[:3])
def test_a_kernel_that_cannot_shape_polices(release, boot, target):
    """It refuses the shaper; the policer stands as if nothing else had been asked for."""
    kernel = boot(release)
    row = ROWS[release]
    with apply(target, shape="auto") as limits:
        assert kernel.standing() == [
            (0, row.mode, f"{row.object}/pybpft_ingress"),
            (1, row.mode, f"{row.object}/{row.upload}"),
        ]
        for how in limits.how().values():
            assert how["shape"] == "police"
            assert "cannot be had here: " in how["shape_reason"]


def maps_of(release):
    """The maps of a throttle; the faster object looks at the gate as well."""
    more = ["CGROUP_NETWORKS", "GATE"] if ROWS[release].object == "throttle-direct" else []
    return [*MAPS, *more]


@pytest.mark.parametrize("release", KERNELS)
def test_what_is_created_is_tried_as_far_as_the_kernel_knows_it(release, boot, target):
    """On 4.14 maps and programs lose their names and attach types, elsewhere all is at once."""
    kernel = boot(release)
    row = ROWS[release]
    apply(target).remove()
    download, upload = (f"PROG_LOAD {row.object}/{p}" for p in ("pybpft_ingress", row.upload))
    if release == "4.14":
        creations = [f"MAP_CREATE {n}" for m in MAPS for n in (f"{m}: EINVAL", "-: ok")]
        # E2BIG may also be for a program that is too complex: each time the fields are asked about.
        loads = [
            *[f"{download} as pybpft_ingress 0: E2BIG"] * 2,
            f"{download} as - 0: ok",
            *[f"{upload} as {row.upload} 1: E2BIG"] * 2,
            *[f"{upload} as {row.upload} 0: E2BIG"] * 2,
            f"{upload} as - 0: ok",
        ]
    else:
        creations = [f"MAP_CREATE {m}: ok" for m in maps_of(release)]
        loads = [f"{download} as pybpft_ingress 0: ok", f"{upload} as {row.upload} 1: ok"]
    assert kernel.asked("MAP_CREATE", "PROG_LOAD") == creations + loads


@pytest.mark.parametrize("release", KERNELS)
def test_attaching_and_removing_ask_for_nothing_needless(release, boot, target):
    """From the first attachment to the end each kernel is given exactly its own rungs."""
    kernel = boot(release)
    apply(target).remove()
    steps = {
        "4.14": [
            "LINK_CREATE {}: EINVAL",
            "PROG_ATTACH {} MULTI: EINVAL",
            "PROG_QUERY {}: EINVAL",
            "PROG_ATTACH {} OVERRIDE: ok",
        ],
        "4.19": ["LINK_CREATE {}: EINVAL", "PROG_ATTACH {} MULTI: ok"],
        "5.4": ["LINK_CREATE {}: EINVAL", "PROG_ATTACH {} MULTI: ok"],
    }.get(release, ["LINK_CREATE {}: ok"])
    first = kernel.told.index(steps[0].format(0))
    ends = [] if release in WITH_LINKS else ["PROG_DETACH 1: ok", "PROG_DETACH 0: ok"]
    # In between the throttle's record is written: what it is, and the ids of its maps.
    told = [each for each in kernel.told[first:] if each.startswith(("LINK_", "PROG_"))]
    assert told == [step.format(n) for n in (0, 1) for step in steps] + ends


@pytest.mark.parametrize("release", KERNELS)
def test_nothing_is_left_when_it_is_removed(release, boot, target):
    """After removal nothing is attached, and no descriptor is open."""
    kernel = boot(release)
    before = descriptors()
    limits = apply(target)
    assert descriptors() > before
    limits.remove()
    assert kernel.standing() == []
    assert kernel.still_open() == 0
    assert descriptors() == before


@pytest.mark.parametrize("release", KERNELS)
def test_a_limit_is_written_and_changed(release, boot, target):
    """The program's record has the limit at once, the changed one, and none when it is lifted."""
    kernel = boot(release)
    with apply(target) as limits:
        assert [config(kernel, d).rate_bytes_per_s for d in Direction] == [100_000, 100_000]
        limits.set_limit(UPLOAD, Rate(50_000))
        assert [config(kernel, d).rate_bytes_per_s for d in Direction] == [100_000, 50_000]
        limits.set_limit(DOWNLOAD, None)
        assert [config(kernel, d).rate_bytes_per_s for d in Direction] == [0, 50_000]
        assert limits.limits == {DOWNLOAD: None, UPLOAD: Rate(50_000)}


@pytest.mark.parametrize("release", KERNELS)
def test_what_the_programs_write_is_left_to_them(release, boot, target):
    """A changed rate is written to the configuration alone: the programs scale what is owed."""
    kernel = boot(release)
    with apply(target) as limits:
        buckets = kernel.map_of(ctypes.sizeof(ThrottleBucket)).contents
        owed = bytes(ThrottleBucket(time.monotonic_ns() + 1_000_000_000_000, 1, 2, 3))
        buckets[key(UPLOAD)] = owed
        limits.set_limit(UPLOAD, Rate(50_000))
        assert buckets[key(UPLOAD)] == owed
        assert buckets[key(DOWNLOAD)] == bytes(ThrottleBucket())


@pytest.mark.parametrize("release", KERNELS)
def test_counters_are_summed_over_the_cpus(release, boot, target):
    """Each direction reads its own counters, of all CPUs."""
    kernel = boot(release)
    cpus = maps.possible_cpus()
    with apply(target) as limits:
        assert set(limits.counters().values()) == {Counters()}
        kernel.map_of(40, MapType.PERCPU_ARRAY).contents[key(UPLOAD)] = b"".join(
            bytes(ThrottleStats(1, 2, 3, cpu, 5)) for cpu in range(cpus)
        )
        dropped = sum(range(cpus))
        assert limits.counters() == {
            DOWNLOAD: Counters(),
            UPLOAD: Counters(cpus, 2 * cpus, 3 * cpus, dropped, 5 * cpus),
        }


@pytest.mark.parametrize("release", KERNELS)
def test_a_failure_half_way_leaves_nothing(release, boot, target):
    """If the second direction is refused in every mode, the first one is taken away again."""
    kernel = boot(release)
    kernel.refused_modes = {
        (1, mode): errno.E2BIG for mode in ("link", "MULTI", "OVERRIDE", "SINGLE")
    }
    before = descriptors()
    with pytest.raises(AttachError, match="64 programs"):
        apply(target)
    answers = [line for line in kernel.asked("LINK_CREATE", "PROG_ATTACH") if ": ok" in line]
    assert len(answers) == 1
    assert kernel.standing() == []
    assert descriptors() == before


@pytest.mark.parametrize("release", KERNELS)
def test_the_legacy_method_never_tries_a_link(release, boot, target):
    """By the legacy method no link is asked for, and the mode is the best that there is."""
    kernel = boot(release)
    with apply(target, method="legacy") as limits:
        rung = "legacy (allow_override)" if release == "4.14" else "legacy"
        assert limits.how()[Direction.UPLOAD]["attached_by"] == rung
    assert kernel.asked("LINK_CREATE") == []
    assert len(kernel.asked("PROG_DETACH")) == 2


@pytest.mark.parametrize("release", ["4.14", "4.19", "5.4"])
def test_the_link_method_does_not_fall_back(release, boot, target):
    """A kernel without links refuses the link method with the release that has them."""
    kernel = boot(release)
    before = descriptors()
    with pytest.raises(AttachError, match=r"Linux 5\.7") as caught:
        apply(target, method="link")
    assert caught.value.errno == errno.EINVAL
    assert kernel.asked("PROG_ATTACH") == []
    assert descriptors() == before


@pytest.mark.parametrize("release", KERNELS[1:])
def test_exclusive_changes_nothing_where_there_is_multi(release, boot, target):
    """Since 4.15 the commands are the same with and without the permission to replace."""
    told = []
    for exclusive in (False, True):
        kernel = boot(release)
        apply(target, exclusive=exclusive).remove()
        told.append(kernel.told)
    assert told[0] == told[1]


def test_4_14_refuses_without_the_permission_to_replace(boot, target):
    """Without exclusive 4.14 attaches nothing, and another tool's program stays where it is."""
    kernel = boot("4.14")
    kernel.attach_foreign(target.path, 0, "OVERRIDE")
    before = descriptors()
    with pytest.raises(AttachError, match="--exclusive") as caught:
        apply(target, exclusive=False)
    assert caught.value.errno == errno.EINVAL
    assert kernel.asked("LINK_CREATE", "PROG_ATTACH", "PROG_DETACH") == [
        "LINK_CREATE 0: EINVAL",
        "PROG_ATTACH 0 MULTI: EINVAL",
    ]
    assert kernel.standing() == [(0, "OVERRIDE", "foreign")]
    assert kernel.still_open() == 0
    assert descriptors() == before


def test_4_14_replaces_with_the_permission_to(boot, target):
    """With exclusive 4.14 has our program where another tool's was."""
    kernel = boot("4.14")
    kernel.attach_foreign(target.path, 0, "OVERRIDE")
    with apply(target):
        assert kernel.standing() == [
            (0, "OVERRIDE", "throttle/pybpft_ingress"),
            (1, "OVERRIDE", "throttle/pybpft_egress"),
        ]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_4_14_stands_alone_where_override_is_refused(number, boot, target):
    """Below an exclusive program, and before 4.12, the mode is single, for that direction alone."""
    kernel = boot("4.14")
    kernel.refused_modes[1, "OVERRIDE"] = number
    before = descriptors()
    limits = apply(target)
    assert [mode for _, mode, _ in kernel.standing()] == ["OVERRIDE", "SINGLE"]
    rungs = {str(name): how["attached_by"] for name, how in limits.how().items()}
    assert rungs == {"download": "legacy (allow_override)", "upload": "legacy (single)"}
    assert kernel.asked("PROG_ATTACH")[-2:] == [
        f"PROG_ATTACH 1 OVERRIDE: {errno.errorcode[number]}",
        "PROG_ATTACH 1 SINGLE: ok",
    ]
    limits.remove()
    assert kernel.standing() == []
    assert descriptors() == before


@pytest.mark.parametrize("release", KERNELS[1:])
def test_no_kernel_with_multi_is_given_another_mode(release, boot, target):
    """Where another tool allows none beside it, its program is never replaced, and it is named."""
    kernel = boot(release)
    kernel.attach_foreign(target.path, 0, "OVERRIDE")
    with pytest.raises(AttachError, match="in a mode that allows no others"):
        apply(target)
    assert kernel.standing() == [(0, "OVERRIDE", "foreign")]
    assert not any("SINGLE" in line or "OVERRIDE" in line for line in kernel.told)


@pytest.mark.parametrize("release", KERNELS)
def test_the_congestion_verdict_can_be_asked_for(release, boot, target):
    """4.19 refuses a program that returns 2; 4.14 takes it, and 2 for another verdict."""
    kernel = boot(release)
    before = descriptors()
    if release in ("4.14", "4.19"):
        with pytest.raises(ProgramLoadError, match=r"pybpft_egresscn.* needs Linux 5\.3") as caught:
            apply(target, verdict="congestion")
        assert caught.value.errno == (errno.E2BIG if release == "4.14" else errno.EINVAL)
        assert kernel.standing() == []
    else:
        with apply(target, verdict="congestion"):
            assert kernel.standing()[1][2].endswith("/pybpft_egresscn")
    assert descriptors() == before


@pytest.mark.parametrize("release", KERNELS[:3])
def test_single_processes_need_socket_storage(release, boot):
    """What is missing is named, with the release that has it."""
    boot(release)
    own = Selection((Process(os.getpid()),))
    with pytest.raises(NoMarksError, match=r"marks on sockets: socket storage .*\(Linux 5\.10\)"):
        throttle.apply([], {UPLOAD: RATE}, processes=own)


@pytest.mark.parametrize("release", KERNELS)
def test_denying_can_be_asked_for(release, boot, target):
    """Each kernel takes the program that denies."""
    kernel = boot(release)
    with apply(target, verdict="deny"):
        assert kernel.standing()[1][2] == f"{ROWS[release].object}/pybpft_egress"


@pytest.mark.parametrize("release", KERNELS)
def test_locked_memory_is_raised_for_each_map_and_put_back(release, boot, target, locked_memory):
    """Up to 5.10 each map needs the limit raised for a moment; later kernels never do."""
    kernel = boot(release)
    kernel.charges_memory = True
    apply(target).remove()
    times = len(maps_of(release)) if release in KERNELS[:4] else 0
    raised = [(INFINITY, INFINITY), (65536, 65536)] * times
    assert locked_memory[1:] == raised
    refused = [line for line in kernel.asked("MAP_CREATE") if line.endswith("EPERM")]
    assert len(refused) == len(raised) // 2


@pytest.mark.parametrize("release", KERNELS[:3])
def test_locked_memory_that_cannot_be_raised_is_named(
    release, boot, target, locked_memory, monkeypatch
):
    """Where the limit cannot be raised the error names it, and nothing stays open."""

    def only_lower(_, new):
        if new[1] != 65536:
            raise ValueError("not allowed to raise maximum limit")
        locked_memory.append(new)

    sys_resource = 1 << 24
    held = privileges.effective_capabilities() & ~sys_resource
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: held)
    monkeypatch.setattr(resource, "setrlimit", only_lower)
    boot(release).charges_memory = True
    before = descriptors()
    with pytest.raises(MapCreateError, match="64 KiB") as caught:
        apply(target)
    assert caught.value.errno == errno.EPERM
    assert descriptors() == before
