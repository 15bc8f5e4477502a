"""Compiles the C fixtures of fixtures/ with clang, once for each content and set of flags."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
# Of clang, and of gcc.
_BY_DEFAULT = (("-target", "bpf", "-g", "-mcpu=v3", "-Wall"), ("-gbtf",))


def compilers() -> list[str]:
    """The compilers for BPF that this machine has."""
    known = [*(f"clang-{version}" for version in range(6, 23)), "bpf-gcc"]
    return [name for name in known if shutil.which(name)]


def compiled(name: str, *flags: str, compiler: str = "clang-14") -> bytes:
    """The object that clang makes of fixtures/NAME.bpf.c, for this machine's byte order."""
    source = FIXTURES / f"{name}.bpf.c"
    headers = b"".join(path.read_bytes() for path in sorted(FIXTURES.glob("*.h")))
    return _compiled(source.read_bytes() + headers, source, flags, compiler)


@cache
def _compiled(_: bytes, source: Path, flags: tuple[str, ...], compiler: str) -> bytes:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, "-O2", *_BY_DEFAULT["gcc" in compiler], *flags, "-c", str(source)]
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "built.o")
        subprocess.run([*command, "-o", str(built)], check=True)
        return built.read_bytes()
