from __future__ import annotations

import ctypes
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.bpf import maps, syscall
from pybpfthrottle.bpf.abi import Cmd, MapType
from pybpfthrottle.bpf.codecs import RAW, U32, FormatCodec, PerCpuCodec, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import MapSpec


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint32), ("second", ctypes.c_uint64))


class FakeElements:
    """The elements of one map in a fake kernel, as bytes."""

    def __init__(self, kernel, key_size, value_size):
        self.elements = {}
        self._sizes = key_size, value_size
        kernel.handlers[Cmd.MAP_LOOKUP_ELEM] = self._lookup
        kernel.handlers[Cmd.MAP_UPDATE_ELEM] = self._update
        kernel.handlers[Cmd.MAP_DELETE_ELEM] = self._delete
        kernel.handlers[Cmd.MAP_GET_NEXT_KEY] = self._next
        for batch in (Cmd.MAP_LOOKUP_BATCH, Cmd.MAP_UPDATE_BATCH, Cmd.MAP_DELETE_BATCH):
            kernel.refuse(batch, errno.EINVAL)  # as Linux before 5.6 does

    def _key(self, attr):
        return ctypes.string_at(attr.map_elem.key, self._sizes[0])

    def _lookup(self, attr):
        if self._key(attr) not in self.elements:
            raise syscall.error(errno.ENOENT, Cmd.MAP_LOOKUP_ELEM)
        value = self.elements[self._key(attr)]
        ctypes.memmove(attr.map_elem.value, value, len(value))

    def _update(self, attr):
        value = ctypes.string_at(attr.map_elem.value, self._sizes[1])
        self.elements[self._key(attr)] = value

    def _delete(self, attr):
        if self.elements.pop(self._key(attr), None) is None:
            raise syscall.error(errno.ENOENT, Cmd.MAP_DELETE_ELEM)

    def _next(self, attr):
        keys = list(self.elements)
        # As in the kernel, the first key follows on none, and on one that is gone.
        key = self._key(attr) if attr.map_elem.key else None
        index = keys.index(key) + 1 if key in keys else 0
        if index >= len(keys):
            raise syscall.error(errno.ENOENT, Cmd.MAP_GET_NEXT_KEY)
        ctypes.memmove(attr.map_elem.value, keys[index], self._sizes[0])


@pytest.fixture
def counts(kernel):
    """An empty map of numbers by numbers."""
    FakeElements(kernel, 4, 8)
    with maps.create(MapSpec("counts", MapType.HASH, 4, 8, 100)) as found:
        yield found.typed(U32, FormatCodec("Q"))


@given(st.integers(0, (1 << 32) - 1))
def test_a_number_reads_back_the_same(number):
    """A number is four bytes in the order of this machine, and reads back the same."""
    assert U32.encode(number) == struct.pack("=I", number)
    assert U32.decode(U32.encode(number)) == number


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_a_number_that_does_not_fit_is_refused(number):
    """A number that is too large for its codec is refused, not cut."""
    with pytest.raises(struct.error):
        U32.encode(number)


@given(st.binary())
def test_bytes_are_bytes(data):
    """The raw codec changes nothing."""
    assert RAW.decode(RAW.encode(data)) == data


def test_a_structure_is_its_bytes():
    """A structure is encoded with its padding, and decoded to one of its own."""
    codec = StructureCodec(Pair)
    data = codec.encode(Pair(1, 2))
    assert len(data) == ctypes.sizeof(Pair)
    found = codec.decode(data)
    assert (found.first, found.second) == (1, 2)


@given(st.integers(1, 20), st.integers(1, 9), st.randoms(use_true_random=False))
def test_per_cpu_values_read_back_the_same(size, cpus, random):
    """Each CPU's value is padded to eight bytes, and reads back the same."""
    codec = PerCpuCodec(RAW, size, cpus)
    values = [random.randbytes(size) for _ in range(cpus)]
    data = codec.encode(values)
    assert len(data) == (size + 7) // 8 * 8 * cpus
    assert codec.decode(data) == values


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_value_for_each_cpu_is_needed(count):
    """A list with too few or too many values is refused."""
    with pytest.raises(ValueError, match="expected 4 values"):
        PerCpuCodec(U32, 4, 4).encode([0] * count)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0\n", 1), ("0-3\n", 4), ("0-3,8", 5), ("0,2,4-7\n", 6), ("0-127,256-383", 256)],
)
def test_cpus_are_counted(text, count):
    """A list of CPUs is of single ones and of ranges with both ends."""
    assert maps.parse_cpus(text) == count


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("CGROUP_CONFIGS", b"CGROUP_CONFIGS"),
        ("a-b c/d", b"a_b_c_d"),
        ("v1.data", b"v1.data"),
        ("sixteen_letters_", b"sixteen_letters"),
        ("größe", b"gr__e"),
        ("", b""),
    ],
)
def test_names_are_made_legal(name, legal):
    """What the kernel does not take in a name becomes an underscore, and 15 characters stay."""
    assert maps.legal_name(name) == legal


@given(st.text())
def test_any_name_becomes_legal(name):
    """Whatever the name, the kernel takes what is made of it."""
    legal = maps.legal_name(name)
    assert len(legal) <= 15
    assert all(chr(byte).isalnum() or byte in b"_." for byte in legal)


def test_a_map_is_a_dict(counts):
    """What is put into a map is found again, changed and taken out."""
    counts[7] = 70
    counts[8] = 80
    counts[7] += 1
    assert dict(counts) == {7: 71, 8: 80}
    assert len(counts) == 2
    assert 8 in counts
    assert 9 not in counts
    assert counts.get(9) is None
    del counts[7]
    assert list(counts.items()) == [(8, 80)]
    assert counts.pop(8) == 80
    assert list(counts) == []


def test_a_key_that_is_missing_is_a_key_error(counts):
    """A missing key is a KeyError with the key, when it is read and when it is deleted."""
    with pytest.raises(KeyError) as caught:
        counts[5]
    assert caught.value.args == (5,)
    with pytest.raises(KeyError) as caught:
        del counts[5]
    assert caught.value.args == (5,)


def test_other_errors_of_a_map_stay_os_errors(kernel, counts):
    """What the kernel refuses for another reason than a missing key is an OSError."""
    kernel.refuse(Cmd.MAP_LOOKUP_ELEM, errno.EPERM)
    with pytest.raises(PermissionError, match="BPF_MAP_LOOKUP_ELEM"):
        counts[5]


def test_clearing_a_map_ends(counts):
    """clear() takes all elements out."""
    counts.update({number: number for number in range(10)})
    counts.clear()
    assert dict(counts) == {}


def test_a_key_of_another_size_is_refused(kernel):
    """A key of other than the map's size never reaches the kernel."""
    found = Map(3, MapSpec("m", MapType.HASH, 4, 8, 1), RAW, RAW)
    with pytest.raises(ValueError, match="a key of this map has 4 bytes, not 3"):
        found[b"abc"]
    assert kernel.calls == []


@pytest.mark.parametrize("value", [b"", b"1234567", b"123456789"])
def test_a_value_of_another_size_is_refused(kernel, value):
    """A value of other than the map's size never reaches the kernel, which would read past it."""
    found = Map(3, MapSpec("m", MapType.HASH, 4, 8, 1), U32, RAW)
    with pytest.raises(ValueError, match="a value of this map has 8 bytes"):
        found[0] = value
    assert kernel.calls == []


def test_a_per_cpu_map_has_a_list_of_values(kernel, monkeypatch):
    """An element of a per-CPU map is a list, written and read whole."""
    monkeypatch.setattr(maps, "_possible_cpus", 3)
    fake = FakeElements(kernel, 4, 24)
    with maps.create(MapSpec("stats", MapType.PERCPU_ARRAY, 4, 4, 1)) as found:
        numbers = found.typed(U32, U32)
        numbers[0] = [1, 2, 3]
        assert numbers[0] == [1, 2, 3]
    assert fake.elements == {bytes(4): struct.pack("=IxxxxIxxxxIxxxx", 1, 2, 3)}


def test_all_possible_cpus_are_counted():
    """A per-CPU element has at least as many values as there are CPUs."""
    import os

    assert maps.possible_cpus() >= (os.cpu_count() or 1)


def test_without_sys_the_cpus_are_counted_by_the_kernel(kernel, monkeypatch):
    """Without /sys the number of CPUs is how many values the kernel writes."""

    def write(attr):
        ctypes.memset(attr.map_elem.value, 0, 8 * 6)

    kernel.handlers[Cmd.MAP_LOOKUP_ELEM] = write
    assert maps._count_cpus() == 6
    assert kernel.still_open() == 0


def test_typed_is_the_same_map(kernel):
    """A typed map works by the descriptor of the one that it was made of."""
    with maps.create(MapSpec("m", MapType.HASH, 4, 8, 1)) as found:
        assert found.typed(U32, U32).fd == found.fd
        assert kernel.created() == 1


def test_maps_are_compared_by_identity(counts):
    """A map equals itself only: comparing reads nothing from the kernel."""
    assert counts != {}
    assert {counts: 1}[counts] == 1


def test_closing_twice_closes_once(kernel):
    """A closed map can be closed again, and has no descriptor."""
    found = maps.create(MapSpec("m", MapType.HASH, 4, 8, 1))
    found.close()
    found.close()
    assert found.fd == -1
    assert kernel.still_open() == 0
