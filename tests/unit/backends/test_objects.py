"""The shipped objects are what the sources give, and what Python takes them for."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from since import needs_command

from pybpfthrottle.backends.ebpf import accounting, programs, records
from pybpfthrottle.backends.ebpf.bucket import POLICE, Shaping
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.obj import elf, relocate, stored
from pybpfthrottle.bpf.obj.btf import ENUMS, Kind
from pybpfthrottle.conditions import records as conditions
from pybpfthrottle.diversion import diverted
from pybpfthrottle.errors import ObjectFileError
from pybpfthrottle.model import Direction
from pybpfthrottle.traffic import Scope

ROOT = Path(__file__).resolve().parents[3]
PREBUILT = ROOT / "prebuilt"
MANIFEST = json.loads((PREBUILT / "MANIFEST.json").read_text())
# Of what throttles share, of what counts, and of bad networks.
PREFIXES = ("throttle_", "traffic_", "conditions_")
# By their names in C.
ENUMERATIONS = {"throttle_direction": Direction, "traffic_scope": Scope}
RECORDS = {}
for name, found in {**vars(records), **vars(accounting), **vars(conditions)}.items():
    if isinstance(found, type) and name.startswith(("Throttle", "Traffic", "Conditions")):
        in_c = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        (ENUMERATIONS if issubclass(found, Enum) else RECORDS)[in_c] = found
COUNT = len(Direction)


@pytest.fixture(
    params=[f"{name}.{target}.o" for name in programs.OBJECTS for target in ("bpfel", "bpfeb")]
)
def spec(request):
    """Each of the shipped objects."""
    return elf.read_file(PREBUILT / request.param)


@pytest.fixture
def rows(spec):
    """The rows of the table for the object."""
    return programs.of_object(spec.name.partition(".")[0])


def test_the_manifest_lists_all_objects():
    """Each object beside the manifest is in it, and none is missing."""
    names = (*programs.OBJECTS, diverted.OBJECT)
    files = {f"{name}.{target}.o" for name in names for target in ("bpfel", "bpfeb")}
    assert {path.name for path in PREBUILT.glob("*.o")} == set(MANIFEST["objects"]) == files


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
        needs_command(tool)
    check = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_prebuilt"), "--check"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert check.returncode == 0, check.stdout


def shared(spec, *kinds):
    """The types of an object that Python has to have as well, by their names."""
    btf = spec.btf
    return btf, {
        found.name: found for found in btf.of_kind(*kinds) if found.name.startswith(PREFIXES)
    }


def fields_of(record):
    """The name, offset and size of each field that Python has."""
    return [
        (name, getattr(record, name).offset, getattr(record, name).size)
        for name, *_ in record._fields_
    ]


def fields_in(btf, struct):
    """The name, offset and size of each field that C has; one without a size is only for BTF."""
    found = [
        (member.name, member.bit_offset // 8, btf.size(member.type))
        for member in btf.members(struct)
    ]
    return [field for field in found if field[2]]


def test_each_record_is_as_the_object_has_it(spec):
    """Each field of a record has the name, offset and size that the object's BTF says."""
    btf, theirs = shared(spec, Kind.STRUCT)
    assert theirs
    for name, struct in theirs.items():
        assert name in RECORDS
        assert fields_in(btf, struct) == fields_of(RECORDS[name])
        assert struct.size_or_type == ctypes.sizeof(RECORDS[name])


def test_python_has_no_record_that_c_has_not():
    """Each record of Python is in one of the objects."""
    specs = [elf.read_file(PREBUILT / name) for name in MANIFEST["objects"]]
    assert {name for spec in specs for name in shared(spec, Kind.STRUCT)[1]} == set(RECORDS)


def test_the_constants_are_those_of_the_object(spec):
    """Each enum has the names and values that the object's BTF says, and Python has no other."""
    btf, theirs = shared(spec, *ENUMS)
    prefixes = {"traffic": PREFIXES[1:2], "conditions": PREFIXES[::2]}
    here = prefixes.get(spec.name.partition(".")[0].partition("-")[0], PREFIXES[:1])
    assert {
        name: {_without_prefix(one.name, here): one.value for one in btf.enumerators(enum)}
        for name, enum in theirs.items()
    } == {
        name: {key: value.value for key, value in enum.__members__.items()}
        for name, enum in ENUMERATIONS.items()
        if name.startswith(here)
    }


def _without_prefix(name, prefixes):
    for prefix in prefixes:
        name = name.replace(prefix.upper(), "")
    return name


def test_a_constant_of_c_is_an_enum():
    """What throttle.h defines without one Python need not know; none of it repeats a number."""
    defined = re.findall(r"^#define (\w+) \S", (ROOT / "ebpf_src/throttle.h").read_text(), re.M)
    assert defined == ["THROTTLE_DIRECTIONS", "THROTTLE_ENTRIES"]


def test_what_makes_up_for_a_window_is_what_the_policers_burst_is_longer():
    """The slack of the program is the difference of the bursts that user space writes."""
    window = Shaping("window", "")
    assert POLICE.burst_ns - window.burst_ns == records.ThrottleSlack.POLICE_SLACK_NS


SIZES = {name: ctypes.sizeof(record) for name, record in RECORDS.items()}
MAPS = {
    "CGROUP_CONFIGS": (MapType.ARRAY, 4, SIZES["throttle_config"], COUNT),
    "CGROUP_BUCKETS": (MapType.ARRAY, 4, SIZES["throttle_bucket"], COUNT),
    "CGROUP_STATS": (MapType.PERCPU_ARRAY, 4, SIZES["throttle_stats"], COUNT),
    "CGROUP_FLOWS": (MapType.ARRAY, 4, SIZES["throttle_flows"], COUNT),
    "CGROUP_NETWORKS": (MapType.LPM_TRIE, SIZES["throttle_network"], 4, 1),
    "SOCKETS": (MapType.SK_STORAGE, 4, SIZES["throttle_socket"], 0),
    "MARKS": (MapType.SK_STORAGE, 4, 4, 0),
    "PROCESSES": (MapType.HASH, 4, SIZES["throttle_process"], 32768),
    "NAMES": (MapType.HASH, 16, SIZES["throttle_process"], 4096),
    "EXECUTED": (MapType.RINGBUF, 0, 0, 65536),
    "GATE": (MapType.ARRAY, 4, SIZES["throttle_gate"], 1),
    "GATE_RING": (MapType.RINGBUF, 0, 0, records.ThrottleGateBounds.GATE_RING_BYTES),
    records.RECORD: (MapType.ARRAY, 4, SIZES["throttle_record"], 1),
    "INGRESS": (MapType.PROG_ARRAY, 4, 4, 1),
    "EGRESS": (MapType.PROG_ARRAY, 4, 4, len(records.ThrottleEntry)),
    "SOCKOPS": (MapType.PROG_ARRAY, 4, 4, 1),
    "SOCKET_OWNERS": (MapType.SK_STORAGE, 4, SIZES["traffic_owner"], 0),
    "TRAFFIC_NAMES": (MapType.HASH, 4, SIZES["traffic_process"], 65536),
    "TRAFFIC": (MapType.PERCPU_HASH, SIZES["traffic_key"], SIZES["traffic_counts"], 131072),
    "COND_RULES": (MapType.ARRAY, 4, SIZES["conditions_rule"], COUNT),
    "COND_COUNTS": (MapType.ARRAY, 4, SIZES["conditions_counts"], COUNT),
    "COND_ANSWERS": (MapType.LRU_HASH, 16, 4, 4096),
    "TRAFFIC_REMOTES": (
        *(MapType.LRU_HASH, SIZES["traffic_remote"], SIZES["traffic_counts"], 65536),
    ),
}
_TRAFFIC = ("SOCKET_OWNERS", "TRAFFIC_NAMES", "TRAFFIC")
_CONDITIONS = ("COND_RULES", "COND_COUNTS", "COND_ANSWERS", "CGROUP_CONFIGS", records.RECORD)
_CGROUP = (
    *("CGROUP_CONFIGS", "CGROUP_BUCKETS", "CGROUP_STATS", "CGROUP_FLOWS"),
    *("SOCKETS", "GATE"),
)
MAPS_OF = {
    "throttle": {*_CGROUP, records.RECORD},
    "throttle-direct": {*_CGROUP, "CGROUP_NETWORKS", records.RECORD},
    "throttle-marked": {*_CGROUP, "CGROUP_NETWORKS", "MARKS", "PROCESSES", records.RECORD},
    "throttle-shared": {*_CGROUP, "CGROUP_NETWORKS", records.RECORD},
    "throttle-entries": {
        *(*_CGROUP, "CGROUP_NETWORKS", "MARKS", "PROCESSES", records.RECORD),
        *("INGRESS", "EGRESS", "SOCKOPS"),
    },
    "gate-shared": {"CGROUP_CONFIGS", "GATE", "GATE_RING", "SOCKETS", records.RECORD},
    "gate": {"CGROUP_CONFIGS", "GATE", "GATE_RING", "SOCKETS", "MARKS", records.RECORD},
    "processes": {"PROCESSES", "NAMES", "EXECUTED", records.RECORD},
    "conditions": {*_CONDITIONS},
    "conditions-early": {*_CONDITIONS},
    "conditions-marked": {*_CONDITIONS, "MARKS"},
    "traffic": {*_TRAFFIC},
    "traffic-remotes": {*_TRAFFIC, "TRAFFIC_REMOTES"},
}


def test_the_records_are_the_maps_values(spec):
    """Each map has a value as large as its record, and one element for each direction."""
    shapes = {
        name: (found.type, found.key_size, found.value_size, found.max_entries)
        for name, found in spec.maps.items()
    }
    assert shapes == {name: MAPS[name] for name in MAPS_OF[spec.name.partition(".")[0]]}


TYPES = {
    Role.POLICE: ProgType.CGROUP_SKB,
    Role.SHAPE: ProgType.SOCK_OPS,
    Role.MARK: ProgType.CGROUP_SOCK,
    Role.ADOPT: ProgType.CGROUP_SOCKOPT,
    Role.BELONGS: ProgType.CGROUP_SOCKOPT,
    Role.GATE: ProgType.CGROUP_SKB,
    Role.FOLLOW: ProgType.RAW_TRACEPOINT,
    Role.COUNT: ProgType.CGROUP_SKB,
    Role.SHARED: ProgType.CGROUP_SKB,
    Role.IMPAIR: ProgType.CGROUP_SKB,
}
SECTIONS = {
    AttachType.CGROUP_INET_INGRESS: "cgroup_skb/ingress",
    AttachType.CGROUP_INET_EGRESS: "cgroup_skb/egress",
    AttachType.CGROUP_SOCK_OPS: "sockops",
    AttachType.CGROUP_SETSOCKOPT: "cgroup/setsockopt",
    AttachType.CGROUP_INET_SOCK_CREATE: "cgroup/sock_create",
    AttachType.CGROUP_INET_SOCK_RELEASE: "cgroup/sock_release",
    AttachType.CGROUP_INET4_CONNECT: "cgroup/connect4",
    AttachType.CGROUP_INET6_CONNECT: "cgroup/connect6",
}
# Programs that count have several.
TYPES_OF_HOOKS = {
    AttachType.CGROUP_INET_SOCK_CREATE: ProgType.CGROUP_SOCK,
    AttachType.CGROUP_INET_SOCK_RELEASE: ProgType.CGROUP_SOCK,
    AttachType.CGROUP_SOCK_OPS: ProgType.SOCK_OPS,
    AttachType.CGROUP_INET4_CONNECT: ProgType.CGROUP_SOCK_ADDR,
    AttachType.CGROUP_INET6_CONNECT: ProgType.CGROUP_SOCK_ADDR,
}


def test_the_programs_are_those_of_the_table(spec, rows):
    """An object has the programs that the table says, each in the section of its hook."""
    found = {
        name: (program.section, program.type, program.expected_attach_type)
        for name, program in spec.programs.items()
    }
    assert found == {
        row.name: (
            SECTIONS.get(row.hook, f"raw_tp/{row.hook}"),
            TYPES_OF_HOOKS.get(row.hook) or TYPES[row.role],
            None if row.role is Role.FOLLOW else row.hook,
        )
        for row in rows
    }


def test_each_program_refers_to_the_record(spec):
    """By any of its programs the kernel knows what a throttle is to limit; others have none."""
    for program in spec.programs.values():
        others = programs.by_name(program.name).role in (Role.COUNT, Role.SHARED)
        assert (records.RECORD in relocate.link(spec, program).maps) is not others


def test_the_table_names_each_program_once():
    """All begin with a prefix, and a name tells one row."""
    names = [row.name for row in programs.PROGRAMS]
    assert len(set(names)) == len(names)
    assert all(programs.by_name(row.name) is row for row in programs.PROGRAMS)
    for row in programs.PROGRAMS:
        shared = row.role is Role.SHARED
        assert row.name.startswith(programs.SHARED_PREFIX if shared else programs.PREFIX)
    assert programs.by_name("pybpft_trial") is None


@pytest.mark.parametrize("verdict", ["deny", "congestion"])
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("scope", list(programs.Scope))
def test_there_is_one_policer_for_each_purpose(scope, direction, verdict):
    """It is of the scope and the direction, and tells of congestion where that can be told."""
    found = programs.policer(scope, direction, verdict)
    assert (found.scope, found.direction, found.role) == (scope, direction, Role.POLICE)
    assert found.verdict == (verdict if direction is Direction.UPLOAD else "deny")


def test_the_names_of_programs_and_maps_are_whole_in_the_kernel(spec):
    """The kernel keeps 15 characters, and no name is longer."""
    assert max(len(name) for name in (*spec.programs, *spec.maps)) <= 15


def test_the_policer_does_without_the_shapers_maps(spec, rows):
    """It is loaded on kernels that have no socket storage."""
    for row in rows:
        if row.role is Role.POLICE:
            wanted = {"CGROUP_CONFIGS", "CGROUP_BUCKETS", "CGROUP_STATS", records.RECORD}
            wanted |= {"CGROUP_NETWORKS"} & set(spec.maps)
            # An array like the others, though the faster objects alone look at it.
            assert (spec.maps["GATE"].type, spec.maps["GATE"].flags) == (MapType.ARRAY, 0)
            used = relocate.link(spec, spec.programs[row.name]).maps - {"MARKS"}
            if spec.name == programs.ENTRIES:
                by = "INGRESS" if row.direction is Direction.DOWNLOAD else "EGRESS"
                wanted = {by, "CGROUP_CONFIGS", records.RECORD}
            assert used - {"GATE"} == wanted
            assert used == wanted or spec.name != "throttle"


def test_the_license_lets_gpl_helpers_be_called(spec):
    """The license is one that the kernel takes for compatible with its own."""
    assert spec.license == "Dual MIT/GPL"


@pytest.mark.parametrize("name", programs.OBJECTS)
def test_an_object_is_read_for_this_machine(name):
    """programs.read gives the object of this machine's byte order under its own name."""
    spec = programs.read(name)
    assert (spec.byteorder, spec.name) == (sys.byteorder, name)


@pytest.mark.parametrize("name", sorted(MANIFEST["objects"]))
def test_the_stored_spec_is_what_the_object_says(name):
    """The JSON beside an object gives the same spec as reading the object."""
    path = PREBUILT / name
    data, text = path.read_bytes(), path.with_suffix(".json").read_bytes()
    stem = name.partition(".")[0]
    assert stored.load(text, data, stem) == elf.read_object(data, name=stem)


@pytest.mark.parametrize("text", [None, b"", b'{"version":1,"name":"throttle","object":[1,2]}'])
def test_without_its_stored_spec_the_object_itself_is_read(monkeypatch, text):
    """Where the JSON is missing or another object's, the spec comes from the object."""
    wanted, data = programs.read("throttle"), programs.data

    def without_the_json(name):
        if name.endswith(".json"):
            if text is None:
                raise ObjectFileError(f"prebuilt/{name} is missing")
            return text
        return data(name)

    monkeypatch.setattr(programs, "data", without_the_json)
    read = []
    monkeypatch.setattr(elf, "object_in", lambda *a, of=elf.object_in: read.append(1) or of(*a))
    assert programs.read_anew("throttle") == wanted
    assert read


def test_an_object_that_is_missing_is_named():
    """A file that is not shipped is an ObjectFileError that names it."""
    with pytest.raises(ObjectFileError, match=re.escape("prebuilt/none.o is missing")):
        programs.data("none.o")
