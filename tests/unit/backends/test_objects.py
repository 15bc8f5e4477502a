"""The shipped objects are what the sources give, and what Python takes them for."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pybpfthrottle.backends.ebpf import objects, records
from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.obj import elf, relocate
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.errors import ObjectFileError
from pybpfthrottle.model import Direction

ROOT = Path(__file__).resolve().parents[3]
PREBUILT = ROOT / "prebuilt"
MANIFEST = json.loads((PREBUILT / "MANIFEST.json").read_text())
NAMES = ("throttle", "throttle-direct")
RECORDS = {
    "throttle_config": records.ThrottleConfig,
    "throttle_bucket": records.ThrottleBucket,
    "throttle_flows": records.ThrottleFlows,
    "throttle_share": records.ThrottleShare,
    "throttle_socket": records.ThrottleSocket,
    "throttle_stats": records.ThrottleStats,
}


@pytest.fixture(params=[f"{name}.{target}.o" for name in NAMES for target in ("bpfel", "bpfeb")])
def spec(request):
    """Each of the shipped objects."""
    return elf.read_file(PREBUILT / request.param)


def test_the_manifest_lists_all_objects():
    """Each object beside the manifest is in it, and none is missing."""
    assert {path.name for path in PREBUILT.glob("*.o")} == set(MANIFEST["objects"])


@pytest.mark.parametrize("name", sorted(MANIFEST["objects"]))
def test_an_object_is_the_one_of_the_manifest(name):
    """The manifest has the hash of the object as it is."""
    data = (PREBUILT / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == MANIFEST["objects"][name]["sha256"]


def test_all_sources_are_in_the_manifest():
    """Each source beside the others is one that the manifest knows."""
    sources = {f"ebpf_src/{path.name}" for path in (ROOT / "ebpf_src").iterdir()}
    assert sources == set(MANIFEST["sources"])


@pytest.mark.parametrize("name", sorted(MANIFEST["sources"]))
def test_a_source_is_the_one_that_the_objects_were_built_of(name):
    """The manifest has the hash of the source as it is: the objects are not stale."""
    assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == MANIFEST["sources"][name]


def test_the_sources_give_the_objects():
    """Built again, the objects are the same, byte for byte."""
    for tool in ("clang-14", "llvm-strip-14"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    check = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_prebuilt"), "--check"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("record", sorted(RECORDS))
def test_a_record_is_as_the_object_has_it(spec, record):
    """Each field of a record has the name, offset and size that the object's BTF says."""
    btf = spec.btf
    theirs = btf.find(Kind.STRUCT, record)
    ours = RECORDS[record]
    assert [
        (member.name, member.bit_offset // 8, btf.size(member.type))
        for member in btf.members(theirs)
    ] == [(name, getattr(ours, name).offset, getattr(ours, name).size) for name, _ in ours._fields_]
    assert ctypes.sizeof(ours) == theirs.size_or_type


def test_the_records_are_the_maps_values(spec):
    """Each map has a value as large as its record, and one element for each direction."""
    sizes = {name: ctypes.sizeof(record) for name, record in RECORDS.items()}
    count = len(Direction)
    shapes = {
        name: (found.type, found.key_size, found.value_size, found.max_entries)
        for name, found in spec.maps.items()
    }
    assert shapes == {
        "CGROUP_FLOWS": (MapType.ARRAY, 4, sizes["throttle_flows"], count),
        "SOCKETS": (MapType.SK_STORAGE, 4, sizes["throttle_socket"], 0),
        "CGROUP_CONFIGS": (MapType.ARRAY, 4, sizes["throttle_config"], count),
        "CGROUP_BUCKETS": (MapType.ARRAY, 4, sizes["throttle_bucket"], count),
        "CGROUP_STATS": (MapType.PERCPU_ARRAY, 4, sizes["throttle_stats"], count),
    }


def test_the_programs_are_where_their_names_say(spec):
    """The policer's are of type cgroup_skb, each in the section of its direction."""
    ingress, egress = AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS
    found = {
        name: (program.section, program.type, program.expected_attach_type)
        for name, program in spec.programs.items()
    }
    assert found == {
        "pybpft_ingress": ("cgroup_skb/ingress", ProgType.CGROUP_SKB, ingress),
        "pybpft_egress": ("cgroup_skb/egress", ProgType.CGROUP_SKB, egress),
        "pybpft_egresscn": ("cgroup_skb/egress", ProgType.CGROUP_SKB, egress),
        "pybpft_sockops": ("sockops", ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
        **dict.fromkeys(
            ("pybpft_adopt", "pybpft_belongs"),
            ("cgroup/setsockopt", ProgType.CGROUP_SOCKOPT, AttachType.CGROUP_SETSOCKOPT),
        ),
    }


def test_the_names_of_programs_and_maps_are_whole_in_the_kernel(spec):
    """The kernel keeps 15 characters, and no name is longer."""
    assert max(len(name) for name in (*spec.programs, *spec.maps)) <= 15


def test_the_policer_does_without_the_shapers_maps(spec):
    """It is loaded on kernels that have no socket storage."""
    for program in spec.programs.values():
        if program.type is ProgType.CGROUP_SKB:
            wanted = {"CGROUP_CONFIGS", "CGROUP_BUCKETS", "CGROUP_STATS"}
            assert relocate.link(spec, program).maps == wanted


def test_the_license_lets_gpl_helpers_be_called(spec):
    """The license is one that the kernel takes for compatible with its own."""
    assert spec.license == "Dual MIT/GPL"


def number_in(file, pattern):
    """The number that a pattern finds in a source, where it must be once."""
    (found,) = re.findall(pattern, (ROOT / "ebpf_src" / file).read_text(), re.MULTILINE)
    return int(found, 0)


def test_the_shift_of_the_inverse_rate_is_that_of_the_source():
    """INVERSE_RATE_SHIFT is the same in Python and in C."""
    pattern = r"^#define INVERSE_RATE_SHIFT (\w+)"
    assert number_in("throttle.bpf.c", pattern) == records.INVERSE_RATE_SHIFT


def test_the_flag_for_loopback_is_that_of_the_source():
    """THROTTLE_LOOPBACK is the same in Python and in C."""
    assert number_in("throttle.h", r"THROTTLE_LOOPBACK = (\w+)") == records.THROTTLE_LOOPBACK


@pytest.mark.parametrize("direction", list(Direction))
def test_the_directions_are_those_of_the_source(direction):
    """The keys into the maps are the same in Python and in C."""
    assert number_in("throttle.h", rf"THROTTLE_{direction.name} = (\w+)") == direction


@pytest.mark.parametrize("name", NAMES)
def test_an_object_is_read_for_this_machine(name):
    """objects.read gives the object of this machine's byte order under its own name."""
    spec = objects.read(name)
    assert (spec.byteorder, spec.name) == (sys.byteorder, name)


def test_an_object_that_is_missing_is_named():
    """A file that is not shipped is an ObjectFileError that names it."""
    with pytest.raises(ObjectFileError, match=re.escape("prebuilt/none.o is missing")):
        objects.data("none.o")
