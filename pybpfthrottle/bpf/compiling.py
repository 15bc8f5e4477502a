"""Source in C -> an object, by clang, with the headers that programs for BPF include.

``vmlinux.h`` is made of the running kernel's types, ``bpf_helper_defs.h`` of what the uapi header
says of the helper functions; ``headers/`` has the others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Optional

from pybpfthrottle.bpf.errors import CompileError
from pybpfthrottle.bpf.obj.helper_names import helper_number
from pybpfthrottle.bpf.running import RunningKernel

VMLINUX = "vmlinux.h"
HEADERS = ("bpf_helpers.h", "bpf_core_read.h", "bpf_tracing.h", "bpf_endian.h", "usdt.bpf.h")
_DEFINITIONS = "bpf_helper_defs.h"
_UAPI = "/usr/include/linux/bpf.h"
_NEWEST = 40
_OLDEST = 10
_FLAGS = ("-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall")
# What uname says of machines, and the headers of tracing.
_TARGETS = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "s390x": "s390"}
# The types of helpers' parameters as programs see them, as far as the kernel's own are others.
_SEEN_AS = {
    "size_t": "unsigned long",
    "struct bpf_map": "void",
    "struct sk_buff": "struct __sk_buff",
    "struct sk_msg_buff": "struct sk_msg_md",
    "struct xdp_buff": "struct xdp_md",
}
_PROTOTYPE = re.compile(r"^ \* (\w[\w ]*?[ *]+)bpf_(\w+)\((.*)\)$", re.MULTILINE)
_TYPES = """\
typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
"""


def find_clang() -> str:
    """Return clang: $CLANG, or the newest that is in $PATH. Raises CompileError."""
    chosen = os.environ.get("CLANG")
    versions = (f"clang-{version}" for version in range(_NEWEST, _OLDEST, -1))
    names = [chosen] if chosen else ["clang", *versions]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise CompileError(
            f"there is no {chosen or 'clang'}, which compiles C for BPF: apt-get install clang,"
            " or set CLANG to the path of one"
        )
    return found


def compile_object(
    source: str,
    output: Optional[str] = None,
    *,
    flags: Iterable[str] = (),
    headers: Optional[str] = None,
    kernel: Optional[RunningKernel] = None,
) -> str:
    """Compile a file, and return the path of the object: NAME.o for NAME.c unless it is given.

    ``flags`` are clang's, such as "-DNAME=1". ``headers`` is a directory to keep the headers in,
    where they are used again; it is created. ``kernel`` may name other types than the running
    kernel's. Raises CompileError with clang's words, or ExternError where vmlinux.h is included
    and the kernel has no types.
    """
    output = output or f"{source[:-2] if source.endswith('.c') else source}.o"
    clang = find_clang()
    with _directory(headers) as directory:
        write_headers(directory)
        command = [clang, *_FLAGS, *_includes(directory), *flags]
        if VMLINUX in _missing_headers(command, source):
            write_vmlinux(directory, kernel or RunningKernel())
        done = _run([*command, "-c", source, "-o", output])
        if done.returncode:
            raise CompileError(f"clang cannot compile {source}", output=done.stderr)
    return output


def _includes(directory: str) -> list[str]:
    machine = os.uname().machine
    target = _TARGETS.get(machine)
    own = [f"-D__TARGET_ARCH_{target}"] if target else []
    # Where Debian has what <linux/types.h> includes.
    return [*own, "-I", directory, "-idirafter", f"/usr/include/{machine}-linux-gnu"]


def _missing_headers(command: list[str], source: str) -> set[str]:
    done = _run([*command, "-E", "-MM", "-MG", source])
    return {os.path.basename(name) for name in done.stdout.split() if not os.path.exists(name)}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"cannot run {command[0]}: {error}") from error


@contextmanager
def _directory(headers: Optional[str]) -> Iterator[str]:
    if headers is None:
        with tempfile.TemporaryDirectory(prefix="pybpfthrottle-") as directory:
            yield directory
    else:
        os.makedirs(headers, exist_ok=True)
        yield headers


def write_headers(directory: str) -> None:
    """Write all headers but vmlinux.h, for ``#include <bpf/bpf_helpers.h>`` as well. OSError."""
    inside = os.path.join(directory, "bpf")
    os.makedirs(inside, exist_ok=True)
    texts = {name: _header(name) for name in HEADERS}
    texts[_DEFINITIONS] = helper_definitions(_uapi())
    for name, text in texts.items():
        _write(os.path.join(inside, name), text)
        _write(os.path.join(directory, name), f'#include "bpf/{name}"\n')


def write_vmlinux(directory: str, kernel: RunningKernel) -> None:
    """Write vmlinux.h, unless it is there already. Raises ExternError, or OSError."""
    path = os.path.join(directory, VMLINUX)
    if not os.path.exists(path):
        from pybpfthrottle.bpf.obj import btf_c

        _write(path, btf_c.header(kernel.core_types.types))


def _write(path: str, text: str) -> None:
    # Whole or not at all: another compilation may be reading it.
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def _header(name: str) -> str:
    loader: Any = __spec__.loader
    path = os.path.join(os.path.dirname(__file__), "headers", name)
    return bytes(loader.get_data(path)).decode()


def _uapi() -> str:
    try:
        with open(_UAPI, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise CompileError(
            f"cannot read {_UAPI}, which has the types of the kernel's helper functions: {error};"
            " apt-get install linux-libc-dev"
        ) from error


def helper_definitions(uapi: str) -> str:
    """Return a header with the helper functions that the comments of linux/bpf.h describe."""
    found: dict[str, tuple[str, list[str]]] = {}
    for result, name, text in _PROTOTYPE.findall(uapi):
        parameters = _seen(text).split(", ")
        _, before = found.get(name, ("", parameters))
        found[name] = _seen(result), list(map(_either, before, parameters))
    definitions = "".join(
        f"static {result}(*const bpf_{name})({', '.join(parameters)}) = (void *){number};\n"
        for name, (result, parameters) in found.items()
        if (number := helper_number(name)) is not None
    )
    structs = sorted(set(re.findall(r"struct \w+", definitions)))
    declared = "".join(f"{name};\n" for name in structs)
    return f"#pragma once\n\n{_TYPES}\n{declared}\n{definitions}"


def _either(one: str, other: str) -> str:
    """Return a parameter that is one or the other: the contexts of different programs."""
    return one if one == other else "void *"


def _seen(text: str) -> str:
    """Return a piece of a prototype with the types that programs have."""
    for own, seen in _SEEN_AS.items():
        text = re.sub(rf"\b{own}\b", seen, text)
    return re.sub(r"\b([us](?:8|16|32|64))\b", r"__\1", text)
