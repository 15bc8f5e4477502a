"""What maps are corrected to before the kernel gets them."""

from __future__ import annotations

import errno

import pytest

from pybpfthrottle.bpf import abi, maps, syscall
from pybpfthrottle.bpf.abi import Cmd, MapType
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.obj.specs import MapSpec


def corrected(type, key=0, value=0, entries=0):
    """Sizes and entries of a map on a machine of four CPUs and pages of 4096 bytes."""
    spec = MapSpec("map", type, key, value, entries)
    found = spec.corrected(cpus=lambda: 4, page_bytes=4096)
    assert (spec.key_size, spec.value_size, spec.max_entries) == (key, value, entries)
    return found.key_size, found.value_size, found.max_entries


@pytest.mark.parametrize(
    ("wanted", "given"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192), (12288, 16384)]
)
def test_rings_have_a_power_of_two_of_pages(wanted, given):
    """The size of a ring is rounded up, and a typed value has no meaning there."""
    assert corrected(MapType.RINGBUF, 0, 16, wanted) == (0, 0, given)


@pytest.mark.parametrize("type", [MapType.PERF_EVENT_ARRAY, MapType.CPUMAP])
def test_one_element_for_each_cpu(type):
    """Without a number there are as many elements as CPUs, and never more; fewer are kept."""
    assert corrected(type) == (4, 4, 4)
    assert corrected(type, 4, 8, 1000) == (4, 8, 4)
    assert corrected(type, 4, 4, 2) == (4, 4, 2)


@pytest.mark.parametrize("type", [MapType.PROG_ARRAY, MapType.ARRAY_OF_MAPS, MapType.CGROUP_ARRAY])
def test_arrays_of_objects_have_four_bytes(type):
    """Keys and values of arrays of other objects have four bytes unless they say otherwise."""
    assert corrected(type, entries=2) == (4, 4, 2)


def test_a_hash_of_maps_has_keys_of_any_size():
    """A hash of maps keeps its key's size, and has values of four bytes."""
    assert corrected(MapType.HASH_OF_MAPS, 16, 0, 2) == (16, 4, 2)


def test_other_maps_stay_as_they_are():
    """What the kernel refuses of a plain map is not guessed."""
    assert corrected(MapType.HASH) == (0, 0, 0)


TYPED = MapSpec("typed", MapType.HASH, 4, 8, 1, key_type=3, value_type=5)


def creations(kernel):
    """What each creation of a map was given: BTF, flags, name."""
    given = [attr.map_create for attr in kernel.given(Cmd.MAP_CREATE)]
    return [(m.btf_fd, m.btf_key_type_id, m.btf_value_type_id, m.map_flags) for m in given]


def test_types_go_with_the_map(kernel):
    """A map is created with the types of its keys and values."""
    maps.create(TYPED, btf_fd=9).close()
    assert creations(kernel) == [(9, 3, 5, 0)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.E2BIG, syscall.ENOTSUPP])
def test_types_that_the_map_does_not_take_are_left_out(kernel, number):
    """A map type without types, and a kernel before 4.18, gets the map without them."""
    kernel.refuse_if(Cmd.MAP_CREATE, number, lambda attr: attr.map_create.btf_fd)
    maps.create(TYPED, btf_fd=9).close()
    assert creations(kernel) == [(9, 3, 5, 0), (0, 0, 0, 0)]


DATA = MapSpec("x.data", MapType.ARRAY, 4, 8, 1, flags=abi.BPF_F_MMAPABLE, section=".data")


def test_data_is_not_mapped_where_that_is_not_known(kernel):
    """A kernel before 5.5 gets a data map that cannot be mapped."""
    kernel.refuse_if(
        Cmd.MAP_CREATE, errno.EINVAL, lambda attr: attr.map_create.map_flags & abi.BPF_F_MMAPABLE
    )
    maps.create(DATA).close()
    assert [flags for *_, flags in creations(kernel)] == [abi.BPF_F_MMAPABLE, 0]


def test_other_maps_are_mapped_or_refused(kernel):
    """A map that the program's author wants to be mapped is not created otherwise."""
    kernel.refuse_if(
        Cmd.MAP_CREATE, errno.EINVAL, lambda attr: attr.map_create.map_flags & abi.BPF_F_MMAPABLE
    )
    with pytest.raises(MapCreateError):
        maps.create(MapSpec("own", MapType.ARRAY, 4, 8, 1, flags=abi.BPF_F_MMAPABLE))


def test_the_template_of_a_map_of_maps_is_closed(kernel):
    """The inner map that only shows the shape does not stay open."""
    inner = MapSpec("inner", MapType.ARRAY, 4, 8, 1)
    maps.create(MapSpec("outer", MapType.HASH_OF_MAPS, 4, 4, 1, inner=inner)).close()
    template, outer = (attr.map_create for attr in kernel.given(Cmd.MAP_CREATE))
    assert (template.inner_map_fd, template.map_type) == (0, MapType.ARRAY)
    assert outer.inner_map_fd > 0
    assert kernel.still_open() == 0
