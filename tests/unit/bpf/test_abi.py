"""Compares abi.py with the types of the kernel that runs the test."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from since import needs_option, needs_release

from pybpfthrottle.bpf import abi, perf_abi
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.insn import INSN_BYTES

VMLINUX = Path("/sys/kernel/btf/vmlinux")

# How to tell each of the anonymous members of union bpf_attr; the others have the names given here.
HAS_FIELD = {
    "btf_load": "btf_log_buf",
    "map_create": "map_type",
    "map_elem": "map_fd",
    "prog_load": "prog_type",
    "obj_pin": "pathname",
    "prog_attach": "attach_bpf_fd",
    "get_id": "next_id",
}
NAMED = {
    "batch": "batch",
    "test_run": "test",
    "info": "info",
    "query": "query",
    "raw_tracepoint": "raw_tracepoint",
    "link_create": "link_create",
    "iter_create": "iter_create",
    "link_update": "link_update",
    "link_detach": "link_detach",
    "enable_stats": "enable_stats",
    "token_create": "token_create",
}
# Fields whose names differ from the kernel's.
OTHER_NAMES = {("get_id", "id"): "start_id"}


class Types:
    """The kernel's structures as ctypes would show them: field -> (bit offset, bytes)."""

    def __init__(self, data):
        self.btf = Btf(data)

    def fields(self, type, base=0):
        """The fields of a structure, those of its anonymous members as its own."""
        found = {}
        for member in self.btf.members(type):
            inner = self.btf.resolve(member.type)
            at = base + member.bit_offset
            if not member.name and inner.kind in (Kind.STRUCT, Kind.UNION):
                found.update(self.fields(inner, at))
            else:
                found[member.name] = (at, self.btf.size(member.type), inner)
        return found

    def struct(self, name):
        """The structure of this name."""
        found = self.btf.find(Kind.STRUCT, name)
        assert found is not None, f"struct {name}"
        return found

    def attr_member(self, ours):
        """The struct inside of union bpf_attr that one of ours stands for."""
        union = self.btf.find(Kind.UNION, "bpf_attr")
        for member in self.btf.members(union):
            inner = self.btf.resolve(member.type)
            if ours in NAMED and member.name == NAMED[ours]:
                return inner
            if ours in HAS_FIELD and not member.name and HAS_FIELD[ours] in self.fields(inner):
                return inner
        raise AssertionError(f"union bpf_attr has nothing for {ours}")

    def enum(self, name):
        """The values of an enum by name."""
        found = self.btf.find(Kind.ENUM, name)
        assert found is not None, f"enum {name}"
        return dict(self.btf.enumerators(found))


@pytest.fixture(scope="module")
def types():
    """What the running kernel says of its own types."""
    needs_release("5.4")
    needs_option("CONFIG_DEBUG_INFO_BTF", works=VMLINUX.exists())
    return Types(VMLINUX.read_bytes())


def our_fields(structure):
    """Field -> (bit offset, bytes), without the padding."""
    found = {}
    for name, *_ in structure._fields_:
        if not name.startswith("_"):
            field = getattr(structure, name)
            size, bit = field.size, 0
            if size > 0xFFFF:  # a bit field: its width above, its first bit below
                size, bit = ctypes.sizeof(ctypes.c_uint32), field.size & 0xFFFF
            found[name] = (field.offset * 8 + bit, size)
    return found


@pytest.mark.parametrize("name", [name for name, _ in abi.Attr._fields_])
def test_each_command_has_the_kernels_layout(types, name):
    """Each field of a command is where the kernel has it, and as large."""
    theirs = types.fields(types.attr_member(name))
    ours = our_fields(dict(abi.Attr._fields_)[name])
    assert ours == {field: theirs[OTHER_NAMES.get((name, field), field)][:2] for field in ours}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (abi.ProgInfo, "bpf_prog_info"),
        (abi.MapInfo, "bpf_map_info"),
        (abi.BtfInfo, "bpf_btf_info"),
    ],
)
def test_each_info_has_the_kernels_layout(types, ours, theirs):
    """Each field of what the kernel says of its objects is where it has it, and as large."""
    expected = types.fields(types.struct(theirs))
    found = our_fields(ours)
    assert found == {field: expected[field][:2] for field in found}


@pytest.mark.parametrize("name", [name for name, _ in abi.LinkDetails._fields_])
def test_each_link_info_has_the_kernels_layout(types, name):
    """Each field of struct bpf_link_info is where the kernel has it for that type of link."""
    theirs = types.fields(types.struct("bpf_link_info"))
    at, _, inner = theirs[name]
    assert at == abi.LinkInfo.details.offset * 8
    expected = types.fields(inner)
    found = our_fields(dict(abi.LinkDetails._fields_)[name])
    assert found == {field: expected[field][:2] for field in found}


@pytest.mark.parametrize(
    "name", [name for name, _ in abi.LinkParameters._fields_ if not name.startswith("_")]
)
def test_each_links_parameters_have_the_kernels_layout(types, name):
    """Each field that a type of link has besides is where the kernel has it, and as large."""
    at, _, inner = types.fields(types.attr_member("link_create"))[name]
    assert at == abi.LinkCreate._parameters.offset * 8
    expected = types.fields(inner)
    found = our_fields(dict(abi.LinkParameters._fields_)[name])
    assert found == {field: expected[field][:2] for field in found}


@pytest.mark.parametrize("name", [name for name, _ in abi.IterInfo._fields_])
def test_each_restriction_of_iterators_has_the_kernels_layout(types, name):
    """Each field of union bpf_iter_link_info is where the kernel has it, and as large."""
    union = types.btf.find(Kind.UNION, "bpf_iter_link_info")
    expected = types.fields(types.fields(union)[name][2])
    found = our_fields(dict(abi.IterInfo._fields_)[name])
    assert found == {field: expected[field][:2] for field in found}


def test_a_perf_event_has_the_kernels_layout(types):
    """Each field of struct perf_event_attr is where the kernel has it, and as large."""
    expected = types.fields(types.struct("perf_event_attr"))
    names = {"flags": "disabled"}  # the first of its bits
    found = our_fields(perf_abi.PerfEventAttr)
    for field, place in found.items():
        theirs = expected[names.get(field, field)]
        assert (field, place[0]) == (field, theirs[0])
        assert field == "flags" or place[1] == theirs[1]


def test_an_instruction_has_the_kernels_layout(types):
    """Each field of struct bpf_insn is where the kernel has it; both registers share a byte."""
    theirs = types.fields(types.struct("bpf_insn"))
    theirs["registers"] = min(theirs["dst_reg"], theirs["src_reg"])
    ours = our_fields(abi.Insn)
    assert ours == {field: theirs[field][:2] for field in ours}
    assert ctypes.sizeof(abi.Insn) == types.struct("bpf_insn").size_or_type == INSN_BYTES


def test_no_command_is_larger_than_the_kernels(types):
    """The kernel's union bpf_attr has room for each of our structures."""
    largest = types.btf.find(Kind.UNION, "bpf_attr").size_or_type
    assert {name: ctypes.sizeof(part) <= largest for name, part in abi.Attr._fields_} == (
        dict.fromkeys((name for name, _ in abi.Attr._fields_), True)
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (abi.Cmd, "bpf_cmd", "BPF_"),
        (abi.MapType, "bpf_map_type", "BPF_MAP_TYPE_"),
        (abi.ProgType, "bpf_prog_type", "BPF_PROG_TYPE_"),
        (abi.AttachType, "bpf_attach_type", "BPF_"),
        (abi.LinkType, "bpf_link_type", "BPF_LINK_TYPE_"),
    ],
)
def test_each_enum_has_the_kernels_values(types, ours, theirs, prefix):
    """What the running kernel knows of an enum of ours has the same value there."""
    values = types.enum(theirs)
    known = [item for item in ours if item < max(values.values())]
    assert len(known) > 10
    assert {item.name: int(item) for item in known} == {
        item.name: values.get(prefix + item.name) for item in known
    }


def test_the_object_name_and_tag_have_the_kernels_lengths(types):
    """BPF_OBJ_NAME_LEN and BPF_TAG_SIZE are the lengths of the kernel's own fields."""
    theirs = types.fields(types.struct("bpf_prog_info"))
    assert theirs["name"][1] == abi.BPF_OBJ_NAME_LEN
    assert theirs["tag"][1] == abi.BPF_TAG_SIZE
