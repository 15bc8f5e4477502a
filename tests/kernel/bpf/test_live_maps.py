"""Maps of the real kernel as dicts: codecs, batches, queues, per-CPU values, info and pins."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from since import since

from pybpfthrottle.bpf import maps, syscall
from pybpfthrottle.bpf.abi import Cmd, MapType
from pybpfthrottle.bpf.codecs import PrefixCodec
from pybpfthrottle.bpf.keyless import BloomFilter, Queue
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import MapSpec

NO_PREALLOC = 1
COUNT = 5000  # more than one batch has room for
BATCHES = {Cmd.MAP_LOOKUP_BATCH, Cmd.MAP_UPDATE_BATCH, Cmd.MAP_DELETE_BATCH}
KEYED = [
    MapType.HASH,
    MapType.LRU_HASH,
    MapType.ARRAY,
    MapType.PERCPU_HASH,
    MapType.PERCPU_ARRAY,
    MapType.LRU_PERCPU_HASH,
]
BATCHES_SINCE = {MapType.PERCPU_ARRAY: "5.13"}
HASHES = [kind for kind in KEYED if "HASH" in kind.name]


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint32), ("second", ctypes.c_uint32))


@dataclass
class Inner:
    low: Annotated[int, ctypes.c_uint16]
    high: Annotated[int, ctypes.c_uint16]


@dataclass
class Flow:
    mark: Annotated[int, ctypes.c_uint8]
    packets: Annotated[int, ctypes.c_uint64]
    name: Annotated[bytes, ctypes.c_char * 4]
    last: Annotated[list[int], ctypes.c_uint32 * 2]
    inner: Inner


def made(kind: MapType, **options: Any) -> Map[Any, Any]:
    """A map of this type, 4 bytes by 8 unless it is said otherwise."""
    shape = {"key_size": 4, "value_size": 8, "max_entries": 2 * COUNT, **options}
    return maps.create(MapSpec("live", kind, **shape))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Cmd]:
    """The commands that were given to the real kernel."""
    given: list[Cmd] = []
    real = syscall.bpf

    def recording(cmd: Cmd, attr: Any) -> int:
        given.append(cmd)
        return real(cmd, attr)

    monkeypatch.setattr(syscall, "bpf", recording)
    return given


@pytest.fixture
def no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.6, made of this one."""
    real = syscall.bpf

    def refusing(cmd: Cmd, attr: Any) -> int:
        if cmd in BATCHES:
            raise syscall.error(errno.EINVAL, cmd)
        return real(cmd, attr)

    monkeypatch.setattr(syscall, "bpf", refusing)


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpf file system of the test's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (bytes, b"12345678"),
        (int, 1 << 63),
        ("q", -1),
        ("II", (7, 8)),
        (Pair, Pair(1, 2)),
    ],
    ids=["bytes", "int", "letter", "format", "structure"],
)
def test_a_value_reads_back_as_it_was_written(kind: Any, value: Any) -> None:
    """Each codec's value comes back from the kernel the same."""
    with made(MapType.HASH) as found:
        typed = found.typed(int, kind)
        typed[3] = value
        back = typed[3]
        if isinstance(value, Pair):
            back, value = bytes(back), bytes(value)
        assert back == value


def test_a_dataclass_is_laid_out_as_c_does() -> None:
    """A dataclass with padding, a string, an array and a dataclass inside comes back the same."""
    flow = Flow(1, 2, b"abc", [3, 4], Inner(5, 6))
    with made(MapType.HASH, value_size=32) as found:
        typed = found.typed(int, Flow)
        typed[0] = flow
        assert typed[0] == flow
        assert found[bytes(4)][8] == 2


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=since(BATCHES_SINCE.get(kind, "5.6"))) for kind in KEYED],
    ids=lambda kind: kind.name,
)
def test_all_elements_are_written_and_read_in_batches(kind: MapType, commands: list[Cmd]) -> None:
    """Thousands of elements take a few commands, and are the same afterwards."""
    cpus = maps.possible_cpus()
    per_cpu = "PERCPU" in kind.name
    with made(kind, max_entries=COUNT) as found:
        typed = found.typed(int, int)
        # An LRU map evicts before it is full, so it is given less.
        wanted = {n: [n * 3] * cpus if per_cpu else n * 3 for n in range(COUNT // 2)}
        typed.update(wanted)
        read = dict(typed.items())
        assert len(list(typed.values())) == len(read)
        assert {key: read[key] for key in wanted} == wanted
        assert len(commands) < 30


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.ARRAY, MapType.PERCPU_HASH])
def test_without_batches_it_is_the_same(kind: MapType, no_batches: None) -> None:
    """Where the kernel refuses batches, elements are written and read one by one."""
    cpus = maps.possible_cpus()
    with made(kind, max_entries=50) as found:
        typed = found.typed(int, int)
        wanted = {n: [n] * cpus if kind == MapType.PERCPU_HASH else n for n in range(50)}
        typed.update(wanted)
        assert dict(typed.items()) == wanted
        if kind != MapType.ARRAY:
            assert typed.delete_batch([1, 99, 2]) == 2
            typed.clear()
            assert not list(typed.values())


@pytest.mark.parametrize("kind", HASHES, ids=lambda kind: kind.name)
def test_missing_keys_of_a_batch_are_passed_over(kind: MapType) -> None:
    """delete_batch deletes what is there and counts it."""
    cpus = maps.possible_cpus()
    with made(kind) as found:
        typed = found.typed(int, int)
        typed.update({n: [n] * cpus if "PERCPU" in kind.name else n for n in range(100)})
        assert typed.delete_batch([200, 0, 1, 201, 202, 99, 203]) == 3
        assert set(typed) == set(range(1, 100)) - {1, 99}
        assert len(typed) == 97


def test_many_missing_keys_take_no_time_for_each_other() -> None:
    """Thousands of keys that are not there are passed over one command each."""
    with made(MapType.HASH) as found:
        typed = found.typed(int, int)
        typed[COUNT] = 1
        begin = time.monotonic()
        assert typed.delete_batch(range(4 * COUNT)) == 1
        assert time.monotonic() - begin < 10


def test_a_bucket_that_is_larger_than_the_batch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC makes the batch grow until a hash's bucket fits."""
    from pybpfthrottle.bpf import elements

    monkeypatch.setattr(elements, "_BATCH_BYTES", 1)
    with made(MapType.HASH, max_entries=1000, flags=NO_PREALLOC) as found:
        typed = found.typed(int, int)
        wanted = {n: n for n in range(1000)}
        typed.update(wanted)
        assert dict(typed.items()) == wanted


@since("5.6")
@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH, MapType.PERCPU_HASH])
def test_drain_takes_all_out(kind: MapType) -> None:
    """Drain gives each element once and leaves none."""
    cpus = maps.possible_cpus()
    with made(kind) as found:
        typed = found.typed(int, int)
        wanted = {n: [n] * cpus if kind == MapType.PERCPU_HASH else n for n in range(1000)}
        typed.update(wanted)
        assert dict(typed.drain()) == wanted
        assert len(typed) == 0


@since("5.6")
def test_an_array_is_not_drained() -> None:
    """What the kernel cannot take out is refused, not read and zeroed."""
    with made(MapType.ARRAY) as found:
        with pytest.raises(OSError, match="ENOTSUPP") as caught:
            list(found.drain())
        assert caught.value.errno == syscall.ENOTSUPP


@since("5.14")
@pytest.mark.parametrize("kind", HASHES, ids=lambda kind: kind.name)
def test_an_element_is_taken_out_in_one_step(kind: MapType, commands: list[Cmd]) -> None:
    """lookup_and_delete is one command; a key that is missing is a KeyError."""
    value: Any = [5] * maps.possible_cpus() if "PERCPU" in kind.name else 5
    with made(kind) as found:
        typed = found.typed(int, int)
        typed[1] = value
        commands.clear()
        assert typed.lookup_and_delete(1) == value
        assert commands == [Cmd.MAP_LOOKUP_AND_DELETE_ELEM]
        with pytest.raises(KeyError):
            typed.lookup_and_delete(1)


def test_taking_out_of_an_array_is_refused() -> None:
    """lookup_and_delete never becomes two steps."""
    with made(MapType.ARRAY) as found:
        with pytest.raises(OSError, match="LOOKUP_AND_DELETE"):
            found.lookup_and_delete(bytes(4))


def test_setdefault_is_one_step(commands: list[Cmd]) -> None:
    """Setdefault adds if there is nothing, without having looked, and else reads."""
    with made(MapType.HASH) as found:
        typed = found.typed(int, int)
        commands.clear()
        assert typed.setdefault(1, 10) == 10
        assert commands == [Cmd.MAP_UPDATE_ELEM]
        assert typed.setdefault(1, 20) == 10
        assert typed[1] == 10


@since("5.6")
def test_more_than_there_is_room_for_is_refused() -> None:
    """A batch that does not fit is an OSError, and what came before it is there."""
    with made(MapType.HASH, max_entries=10) as found:
        typed = found.typed(int, int)
        with pytest.raises(OSError, match="BATCH") as caught:
            typed.update((n, n) for n in range(20))
        assert caught.value.errno == errno.E2BIG
        assert len(typed) == 10


@pytest.mark.parametrize("prefix", ["10.0.0.0/8", "2001:db8::/32"])
def test_an_lpm_trie_finds_the_longest_prefix(prefix: str) -> None:
    """Networks are keys; an address finds the network that it is in."""
    network = ipaddress.ip_network(prefix)
    size = 4 + len(network.network_address.packed)
    with made(MapType.LPM_TRIE, key_size=size, flags=NO_PREALLOC) as found:
        typed = found.typed(PrefixCodec(), int)
        typed[network] = 1
        typed[next(network.subnets(new_prefix=network.prefixlen + 8))] = 2
        assert typed[ipaddress.ip_network(network.network_address)] == 2
        assert typed[ipaddress.ip_network(network.broadcast_address)] == 1
        assert set(typed) == {network, next(network.subnets(new_prefix=network.prefixlen + 8))}
        assert dict(typed.items())[network] == 1


def test_a_queue_gives_the_first_in_first() -> None:
    """Push, peek and pop, in order; an empty one is an IndexError."""
    with made(MapType.QUEUE, key_size=0, max_entries=2) as found:
        queue: Queue[int] = Queue(found, int)
        queue.push(1)
        queue.push(2)
        assert (queue.peek(), queue.pop(), queue.pop()) == (1, 1, 2)
        for look in (queue.peek, queue.pop):
            with pytest.raises(IndexError):
                look()


def test_a_stack_gives_the_last_in_first() -> None:
    """Iterating pops all."""
    with made(MapType.STACK, key_size=0) as found:
        stack: Queue[int] = Queue(found, int)
        for number in range(3):
            stack.push(number)
        assert list(stack) == [2, 1, 0]


def test_a_full_queue_drops_its_oldest_only_if_asked() -> None:
    """A push into a full queue is refused, or drops the oldest value."""
    with made(MapType.QUEUE, key_size=0, max_entries=2) as found:
        queue: Queue[int] = Queue(found, int)
        queue.push(1)
        queue.push(2)
        with pytest.raises(OSError, match="UPDATE_ELEM"):
            queue.push(3)
        queue.push(3, drop_oldest=True)
        assert list(queue) == [2, 3]


@since("5.16")
def test_a_bloom_filter_has_what_was_added() -> None:
    """What was added is there; of many others almost none is."""
    with made(MapType.BLOOM_FILTER, key_size=0, max_entries=100, extra=5) as found:
        bloom: BloomFilter[int] = BloomFilter(found, int)
        for number in range(100):
            bloom.add(number)
        assert all(number in bloom for number in range(100))
        assert sum(number in bloom for number in range(1000, 2000)) < 200


def test_a_closed_map_is_not_taken_for_the_next_one() -> None:
    """Which gets its descriptor's number: its values may not fit into the room for the others."""
    with maps.create(MapSpec("first", MapType.ARRAY, 4, 8, 1)) as first:
        typed, number = first.typed("I", "Q"), first.fd
    with maps.create(MapSpec("second", MapType.ARRAY, 4, 1 << 16, 1)) as second:
        assert second.fd == number
        for use in (lambda: typed[0], lambda: typed.update({0: 1}), lambda: list(typed)):
            with pytest.raises(OSError, match="Bad file descriptor"):
                use()
        assert second[(0).to_bytes(4, sys.byteorder)] == bytes(1 << 16)
        typed.close()
        assert second.fd == number


@since("4.20")
def test_a_closed_queue_is_not_taken_for_the_next_one() -> None:
    """Nor what stands in for it."""
    with maps.create(MapSpec("first", MapType.QUEUE, 0, 8, 1)) as first:
        queue, number = Queue(first, "Q"), first.fd
    with maps.create(MapSpec("second", MapType.QUEUE, 0, 1 << 16, 1)) as second:
        assert second.fd == number
        with pytest.raises(OSError, match="Bad file descriptor"):
            queue.push(1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            queue.pop()


def test_a_queue_is_made_of_no_other_map() -> None:
    """Another type of map is a TypeError."""
    with made(MapType.HASH) as found, pytest.raises(TypeError, match="QUEUE or STACK"):
        Queue(found)


def test_the_maps_of_a_map_are_written_by_descriptor_and_read_by_id() -> None:
    """The inner map is found again by the id that the outer one gives."""
    with made(MapType.ARRAY, max_entries=1) as inner:
        inner.typed(int, int)[0] = 42
        with made(MapType.ARRAY_OF_MAPS, value_size=4, inner=inner.spec) as outer:
            typed = outer.typed(int, int)
            typed[0] = inner.fd
            assert typed[0] == inner.info().id
            with maps.open_by_id(typed[0]) as again:
                assert again.typed(int, int)[0] == 42


def test_a_map_tells_what_it_is() -> None:
    """The kernel's info has the shape that the map was created with."""
    with made(MapType.HASH, max_entries=7, flags=NO_PREALLOC) as found:
        info = found.info()
        assert info.name == "live"
        assert (info.type, info.key_size, info.value_size) == (MapType.HASH, 4, 8)
        assert (info.max_entries, info.flags, info.frozen) == (7, NO_PREALLOC, False)
        assert info.memory_bytes > 0
        assert info.id in maps.all_ids()


def test_a_frozen_map_tells_so_and_is_not_changed() -> None:
    """After freeze the info says frozen, and writing is EPERM."""
    with made(MapType.ARRAY) as found:
        found.freeze()
        assert found.info().frozen
        with pytest.raises(PermissionError):
            found[bytes(4)] = bytes(8)


def test_a_pinned_map_outlives_its_descriptor(bpffs: Path) -> None:
    """A map that is pinned and closed is opened again with what it had."""
    with made(MapType.HASH) as found:
        found.typed(int, int)[1] = 2
        found.pin(bpffs / "live")
    with maps.open_pinned(bpffs / "live") as again:
        assert again.spec.name == "live"
        assert again.typed(int, int)[1] == 2


def test_pinning_elsewhere_is_refused(tmp_path: Path) -> None:
    """A directory of another file system is an OSError that names the command."""
    with made(MapType.HASH) as found, pytest.raises(OSError, match="BPF_OBJ_PIN"):
        found.pin(tmp_path / "live")


def test_a_map_without_btf_says_so() -> None:
    """typed_by_btf of a map that has none is a LookupError with its name."""
    with made(MapType.HASH) as found, pytest.raises(LookupError, match="'live' has no BTF"):
        found.typed_by_btf()


def test_iterating_survives_deletion_by_another(no_batches: None) -> None:
    """Items that are deleted while they are read one by one are left out, not a KeyError."""
    with made(MapType.HASH, max_entries=10) as found:
        typed = found.typed(int, int)
        typed.update({n: n for n in range(10)})
        seen = []
        for key, _ in typed.items():
            seen.append(key)
            typed.delete_batch(set(range(10)) - set(seen))
        assert len(seen) == 1


def test_a_map_works_in_another_interpreter_of_this_machine() -> None:
    """Opening by id gives another process the same map."""
    with made(MapType.HASH) as found:
        code = (
            "import sys; from pybpfthrottle.bpf import maps\n"
            "with maps.open_by_id(int(sys.argv[1])) as m: m.typed(int, int)[9] = 90"
        )
        root = str(Path(__file__).resolve().parents[3])
        subprocess.run(
            [sys.executable, "-c", code, str(found.info().id)],
            env={**os.environ, "PYTHONPATH": root},
            check=True,
        )
        assert found.typed(int, int)[9] == 90
