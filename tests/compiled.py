"""Compiles the C fixtures of fixtures/ with clang, once for each content and set of flags."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


def compiled(name: str, *flags: str, compiler: str = "clang-14") -> bytes:
    """The object that clang makes of fixtures/NAME.bpf.c, for this machine's byte order."""
    source = FIXTURES / f"{name}.bpf.c"
    headers = b"".join(path.read_bytes() for path in sorted(FIXTURES.glob("*.h")))
    return _compiled(source.read_bytes() + headers, source, flags, compiler)


@cache
def _compiled(_: bytes, source: Path, flags: tuple[str, ...], compiler: str) -> bytes:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, "-target", "bpf", "-g", "-O2", "-mcpu=v3", "-Wall", *flags]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", "-"], check=True, stdout=subprocess.PIPE
    )
    return done.stdout
