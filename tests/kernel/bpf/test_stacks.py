"""Stacks that programs keep get the names of the kernel's, and of processes', functions."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compiled import CLANG, compiled
from since import needs_command, running

from pybpfthrottle import bpf
from pybpfthrottle.bpf.tracing import binaries
from pybpfthrottle.bpf.tracing.stacks import StackMap, Symbolizer, folded
from pybpfthrottle.bpf.tracing.symbols import KernelSymbols, ProcessSymbols, Symbol

LIBC = ctypes.CDLL(None)


def address_of(function: str) -> int:
    """The address of a function of the C library, in this process."""
    address = ctypes.cast(getattr(LIBC, function), ctypes.c_void_p).value
    assert address
    return address


def test_a_stack_has_names():
    """The function that calls the kernel is the innermost of the process's, and is named."""
    spec = bpf.read_object(compiled("tracing"))
    spec.variables["pid"].set(os.getpid())
    with bpf.load(spec, ["stack_of_getppid"]) as live:
        with live.programs["stack_of_getppid"].attach():
            LIBC.getppid()
        stacks, names = StackMap(live.maps["stacks"]), Symbolizer()
        number = ctypes.c_int32(live.variables["user_stack"].get() & 0xFFFFFFFF).value
        user = names.process(os.getpid(), stacks[number])
        assert user[0].name in ("getppid", "__getppid")
        assert "libc" in user[0].module
        kernel = names.kernel(stacks.get(live.variables["kernel_stack"].get() & 0xFFFFFFFF))
        # Older ones have no stack of the kernel where a system call begins.
        assert kernel or running() < (6, 12)
        assert all(symbol.name for symbol in kernel)
        assert stacks.get(-14) == []
        with pytest.raises(KeyError):
            stacks[255 if number != 255 else 254]
        del stacks[number]
        assert stacks.get(number) == []
        with pytest.raises(TypeError, match="not STACK_TRACE"):
            StackMap(live.maps["object.bss"])


def test_the_kernels_functions():
    """An address within a function has its name and an offset; one of user space has none."""
    fields = (line.split() for line in Path("/proc/kallsyms").read_text().splitlines())
    address = next(int(one[0], 16) for one in fields if one[1:3] == ["T", "do_exit"])
    symbols = KernelSymbols()
    assert symbols.name(address + 5) == Symbol("do_exit", "[kernel]", 5)
    assert str(symbols.name(64)) == "[kernel]+0x40"


def test_a_processs_functions():
    """An address within a function of a library has its name; others are said as far as known."""
    symbols = ProcessSymbols(os.getpid())
    found = symbols.name(address_of("malloc") + 1)
    assert found.name.endswith("malloc")
    assert (os.path.basename(found.module)[:4], found.offset) == ("libc", 1)
    assert str(symbols.name(64)) == "[unknown]+0x40"


def test_a_process_that_ended():
    """What a process had mapped is known after its end, if it was read before."""
    program = "print(1, flush=True); input()"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    try:
        process.stdout.readline()
        symbols = ProcessSymbols(process.pid)
        symbols.read()
        begin = next(m.begin for m in symbols._mappings if m.path.startswith("/"))
    finally:
        process.communicate(b"\n")
    assert symbols.name(begin).module.startswith("/")
    assert ProcessSymbols(process.pid).name(begin).module == "[unknown]"


def test_a_jit_compilers_functions():
    """What a JIT compiler writes into its perf map is read, and again when it has grown."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    path = Path(f"/tmp/perf-{os.getpid()}.map")  # noqa: S108 (where perf looks)
    symbols = ProcessSymbols(os.getpid())
    try:
        path.write_text(f"{address:x} 10 py::one:/a b.py\nbroken\n")
        assert symbols.name(address + 15) == Symbol("py::one:/a b.py", "[jit]", 15)
        assert symbols.name(address + 16).name == ""
        with path.open("a") as file:
            file.write(f"{address + 16:x} 4 two\n")
        assert symbols.name(address + 16).name == "two"
        os.chown(path, 12345, -1)
        if os.getuid() == 0:
            assert ProcessSymbols(os.getpid()).name(address).name == ""
    finally:
        path.unlink()


@pytest.mark.parametrize("pie", ["-no-pie", "-pie"])
def test_an_address_of_a_program_that_is_moved(tmp_path: Path, pie: str):
    """Functions of programs are found wherever they are loaded."""
    source, path = tmp_path / "a.c", str(tmp_path / "a")
    source.write_text(
        "#include <stdio.h>\nint here(void) { return 1; }\n"
        'int main(void) { printf("%p\\n", (void *)here); fflush(stdout); return getchar(); }\n'
    )
    subprocess.run([needs_command(CLANG), pie, "-fPIE", "-o", path, str(source)], check=True)
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        address = int(process.stdout.readline(), 16)
        assert ProcessSymbols(process.pid).name(address + 2) == Symbol("here", path, 2)
        process.communicate(b"\n")
    assert binaries.function_offset(path, "here") < os.path.getsize(path)


def test_folded_stacks():
    """Frames go from the outermost to the innermost; the same ones are added up."""
    counts = {("inner", "main"): 2, ("a;b", "main"): 1, (): 4}
    assert folded(counts) == [" 4", "main;a:b 1", "main;inner 2"]
    assert folded(counts, root="python") == ["python 4", "python;main;a:b 1", "python;main;inner 2"]
