"""The object of the diversion is what Python takes it for."""

from __future__ import annotations

import ctypes
import re
from enum import Enum
from pathlib import Path

import pytest

from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import ENUMS, Kind
from pybpfthrottle.diversion import diverted, records

PREBUILT = Path(__file__).resolve().parents[3] / "prebuilt"
IN_C = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): found
    for name, found in vars(records).items()
    if isinstance(found, type) and name.startswith("Divert")
}


@pytest.fixture(params=["bpfel", "bpfeb"])
def spec(request):
    """The object for each byte order."""
    return elf.read_file(PREBUILT / f"{diverted.OBJECT}.{request.param}.o")


def test_each_record_is_as_the_object_has_it(spec):
    """Each field has the name, offset and size that the object's BTF says."""
    btf = spec.btf
    structs = {one.name: one for one in btf.of_kind(Kind.STRUCT) if one.name.startswith("divert_")}
    assert set(structs) == {name for name, one in IN_C.items() if not issubclass(one, Enum)}
    for name, struct in structs.items():
        record = IN_C[name]
        assert struct.size_or_type == ctypes.sizeof(record)
        assert [
            (field, getattr(record, field).offset, getattr(record, field).size)
            for field, *_ in record._fields_
        ] == [
            (member.name, member.bit_offset // 8, btf.size(member.type))
            for member in btf.members(struct)
            if btf.size(member.type)  # what follows a record has none
        ]


def test_the_constants_are_those_of_the_object(spec):
    """Each enum that the programs use has the same names and values."""
    enums = {one.name: one for one in spec.btf.of_kind(*ENUMS) if one.name.startswith("divert_")}
    for name, enum in enums.items():
        assert {one.name: one.value for one in spec.btf.enumerators(enum)} == {
            key: value.value for key, value in IN_C[name].__members__.items()
        }


def test_what_user_space_maps_can_be_mapped(spec):
    """The records that the keeper reads and writes without a system call."""
    for name in (records.KEEPER, records.STATE):
        assert spec.maps[name].type == MapType.ARRAY
        assert spec.maps[name].flags & 1 << 10
    assert spec.maps[records.RING].max_entries == records.DivertBounds.DIVERT_RING_BYTES


def test_the_programs_are_for_their_hooks(spec):
    """In pairs for what comes in and what goes out, and one for the device."""
    back = spec.programs.pop("pybpfd_back")
    assert back.type == ProgType.SCHED_CLS
    for name, program in spec.programs.items():
        way = AttachType.CGROUP_INET_INGRESS
        if name.startswith("pybpfd_out"):
            way = AttachType.CGROUP_INET_EGRESS
        assert (program.type, program.expected_attach_type) == (ProgType.CGROUP_SKB, way)
    assert len(spec.programs) == 8
