"""CO-RE against the types of the running kernel, by what programs answer when they run."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest
from compiled import compiled
from run_once import run
from since import is_emulated, needs_command, needs_machine, since

from pybpfthrottle.bpf import loader, running
from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import ExternError, UnresolvedError, VerifierError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.bpf.obj.btf_ext import CoreRelocation
from pybpfthrottle.bpf.obj.core import Resolver
from pybpfthrottle.bpf.running import RunningKernel

PACKET = bytes(64)
VMLINUX = "/sys/kernel/btf/vmlinux"


@pytest.fixture(scope="module")
def types():
    """The types of the running kernel."""
    return RunningKernel().types.types


@pytest.fixture(scope="module")
def answers():
    """What core_fields.bpf.c found out when it ran."""
    spec = elf.read_object(compiled("core_fields"))
    with loader.load(spec) as loaded:
        loaded.programs["ask"].test_run(PACKET)
        return struct.unpack("=32Q", loaded.variables["answers"].get())


def member(types, struct_name, *names):
    """A member of a kernel's struct, looked for in anonymous ones too."""

    def search(found, base):
        for item in types.members(found):
            inner = types.resolve(item.type)
            if item.name == names[0]:
                return item._replace(bit_offset=base + item.bit_offset)
            if not item.name and inner.kind in (Kind.STRUCT, Kind.UNION):
                deeper = search(inner, base + item.bit_offset)
                if deeper:
                    return deeper
        return None

    return search(types.find(Kind.STRUCT, struct_name), 0)


@pytest.mark.parametrize(
    ("index", "struct_name", "name", "extra"),
    [
        (0, "task_struct", "comm", 0),
        (1, "task_struct", "comm", 3),
        (21, "task_struct", "tgid", 0),
        (22, "sk_buff", "data", 0),
    ],
)
def test_offsets_are_the_kernels(answers, types, index, struct_name, name, extra):
    """The offset of a field is that of the running kernel."""
    assert answers[index] == member(types, struct_name, name).bit_offset // 8 + extra


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        pytest.param(2, 16, id="size of comm"),
        pytest.param(3, 1, id="pid exists"),
        pytest.param(4, 0, id="a field of no kernel does not"),
        pytest.param(5, 1, id="pid is signed"),
        pytest.param(6, 0, id="start_time is not"),
        pytest.param(11, 1, id="list_head exists"),
        pytest.param(12, 0, id="not_a_type does not"),
        pytest.param(18, 1, id="an enumerator exists"),
        pytest.param(19, 1, id="its value is the kernel's"),
        pytest.param(20, 0, id="another one does not exist"),
        pytest.param(23, 1, id="a typedef's flavour exists"),
        pytest.param(24, 0, id="what is guarded is not reached"),
        pytest.param(25, 1, id="the end was reached"),
    ],
)
def test_answers(answers, index, wanted):
    """Sizes, signs and existence are those of the running kernel."""
    assert answers[index] == wanted


def test_a_bit_field_is_where_the_kernel_has_it(answers, types):
    """Loaded by size and offset and shifted, a bit field's bits are those of the kernel's."""
    found = member(types, "sk_buff", "pkt_type")
    offset, size, left, right = answers[7:11]
    assert right == 64 - found.bits
    first = found.bit_offset - offset * 8
    assert left == 64 - first - found.bits
    assert first + found.bits <= size * 8


def test_types_have_the_kernels_ids_and_sizes(answers, types):
    """A type's size and id are those of the running kernel."""
    task = types.find(Kind.STRUCT, "task_struct")
    assert answers[13] == task.size_or_type
    assert answers[16] == task.id


def test_local_ids_are_the_objects(answers):
    """A local type's id is that of the object's own types."""
    own = elf.read_object(compiled("core_fields")).btf
    assert own.type(answers[17]).name == "task_struct___mine"


def test_types_match_themselves_only(types):
    """TYPE_MATCHES, which clang 14 does not know, holds for a type of the kernel and itself."""
    resolver = Resolver(types, lambda: RunningKernel().types)
    for name in ("list_head", "sk_buff", "sock"):
        found = types.find(Kind.STRUCT, name)
        relocation = CoreRelocation(0, found.id, "0", CoreRelocationKind.TYPE_MATCHES)
        assert resolver.answer(relocation).target == 1, name


@since("5.11")  # bpf_get_current_task_btf()
def test_loads_go_where_the_kernel_has_the_fields():
    """Fields of the running task are read right: moved, of another size, behind a pointer."""
    spec = elf.read_object(compiled("core_reads"))
    with loader.load(spec, ["read"]) as loaded:
        run(loaded.programs["read"], bytes(16))
        found = {name: variable.get() for name, variable in loaded.variables.items()}
    with open("/proc/thread-self/comm", "rb") as file:
        assert found["first_byte"] == file.read()[0]
    assert (found["pid"], found["tgid"]) == (os.getpid(), os.getpid())
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    assert abs(found["start_time"] / 1e9 - ticks / os.sysconf("SC_CLK_TCK")) < 60
    # More than 32 bits, unless the machine has only just started.
    assert found["start_time"] > 1 << 32 or ticks / os.sysconf("SC_CLK_TCK") < 5


@since("5.11")  # bpf_get_current_task_btf()
@pytest.mark.parametrize(
    ("program", "access", "line"),
    [
        ("unguarded", "struct task_struct___mine.not_in_any_kernel", "the line to be shown"),
        ("signed_and_larger", "struct task_struct___mine.prio", "pid = task->prio;"),
    ],
)
def test_what_is_not_there_is_named_when_it_is_reached(program, access, line):
    """A program that reaches a field that the kernel lacks is refused by its name and line."""
    spec = elf.read_object(compiled("core_reads"))
    with pytest.raises(UnresolvedError) as caught:
        loader.load(spec, [program])
    assert caught.value.access == access
    assert caught.value.local_type == "task_struct___mine"
    assert line in caught.value.source
    assert access in str(caught.value)
    assert line in str(caught.value)


def test_a_refusal_shows_the_line_of_the_source():
    """The verifier's reason comes with the line of the source that it refuses."""
    spec = elf.read_object(compiled("core_reads"))
    with pytest.raises(VerifierError) as caught:
        loader.load(spec, ["plainly_wrong"])
    assert not isinstance(caught.value, UnresolvedError)
    file, _, rest = caught.value.source.partition(":")
    assert file.endswith("core_reads.bpf.c")
    assert "the line of the crime" in rest


def test_the_kernels_types_are_mapped_where_that_is_possible():
    """Its megabytes are no copy of this process (Linux 6.16), and say what the file says."""
    running.forget_types()
    found = RunningKernel().types.types
    with open("/proc/self/maps") as file:
        assert (VMLINUX in file.read()) == (running.version() >= 0x061000)
    with open(VMLINUX, "rb") as file:
        assert bytes(found) == file.read()


def test_types_may_come_from_a_file(tmp_path, answers):
    """The kernel's types may be given as a file, as they are or in an ELF file."""
    needs_command("llvm-objcopy-14")
    plain, wrapped = tmp_path / "types", tmp_path / "vmlinux"
    with open(VMLINUX, "rb") as file:
        plain.write_bytes(file.read())
    empty = tmp_path / "empty.o"
    empty.write_bytes(compiled("core_fields"))
    command = ["llvm-objcopy-14", "--remove-section=.BTF", f"--add-section=.BTF={plain}"]
    subprocess.run([*command, str(empty), str(wrapped)], check=True)
    spec = elf.read_object(compiled("core_fields"))
    for path in (plain, wrapped):
        with loader.load(spec, kernel=RunningKernel(types_path=str(path))) as loaded:
            loaded.programs["ask"].test_run(PACKET)
            assert struct.unpack("=32Q", loaded.variables["answers"].get()) == answers


def test_a_kernel_without_types_is_told(tmp_path):
    """Without the kernel's types, what is missing is named."""
    spec = elf.read_object(compiled("core_fields"))
    kernel = RunningKernel(types_path=str(tmp_path / "missing"))
    with pytest.raises(ExternError, match="CONFIG_DEBUG_INFO_BTF"):
        loader.load(spec, kernel=kernel)


MEASURE = """
import resource, sys, time
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.obj import elf
spec = elf.read_file(sys.argv[1])
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
loader.load(spec, sys.argv[2:])
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
"""


def test_the_kernels_types_cost_little(tmp_path):
    """Loading a program with CO-RE takes less than 150 ms of a processor, and 30 MB."""
    needs_machine("a processor that is not emulated", found=not is_emulated())
    path = tmp_path / "core_fields.o"
    path.write_bytes(compiled("core_fields"))
    command = [sys.executable, "-c", MEASURE, str(path), "ask"]
    runs = [
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, _ in runs) < 0.15
    assert min(int(kilobytes) for _, kilobytes in runs) < 30 * 1024
