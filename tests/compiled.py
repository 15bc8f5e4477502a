"""Compiles the fixtures of fixtures/ with clang, once for each content and set of flags."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from since import needs_command

FIXTURES = Path(__file__).parent / "fixtures"
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
CLANG = "clang-14"
# Of clang, and of gcc.
_BY_DEFAULT = (("-target", "bpf", "-g", "-mcpu=v3", "-Wall"), ("-gbtf",))
# Which kernel tests ask for with other flags as well; core_fields has to have types.
_ALSO_WITH = {"object_calls": ["-g0"], "object_data": ["-g0"], "object_legacy": ["-g", "-g0"]}
_ALSO_WITH["object_statics"] = ["-DSECOND"]
# Programs for this machine, and the flags that tests ask for.
_EXECUTABLES: dict[str, list[tuple[str, ...]]] = {"probed": [(), ("-s",)]}


def compilers() -> list[str]:
    """Return the compilers for BPF that this machine has, and the one that it has to have."""
    known = [*(f"clang-{version}" for version in range(6, 23)), "bpf-gcc"]
    return [name for name in known if name == CLANG or shutil.which(name)]


def compiled(name: str, *flags: str, compiler: str = CLANG) -> bytes:
    """Return the object that clang makes of NAME.bpf.c, for this machine's byte order.

    It is one of tests/fixtures, or else of docs/examples.

    A machine without a compiler takes what ``keep`` left in the directory TESTS_FIXTURES.
    """
    kept = Path(os.environ.get("TESTS_FIXTURES", "/nowhere"), _key(name, flags, compiler))
    if kept.exists():
        return kept.read_bytes()
    return _compiled(_sources(name), _source(name), flags, compiler)


def executable(name: str, *flags: str) -> bytes:
    """Return the program for this machine that clang makes of NAME.c of tests/fixtures.

    A machine without a compiler takes what was kept, as for ``compiled``.
    """
    source = FIXTURES / f"{name}.c"
    kept = Path(os.environ.get("TESTS_FIXTURES", "/nowhere"), _executable_key(source, flags))
    if kept.exists():
        return kept.read_bytes()
    return _built(source, [needs_command(CLANG), "-O1", *flags])


def keep(directory: Path) -> None:
    """Compile all that kernel tests ask for, for machines without a compiler."""
    for name, all_flags in _EXECUTABLES.items():
        for flags in all_flags:
            kept = directory / _executable_key(FIXTURES / f"{name}.c", flags)
            kept.write_bytes(executable(name, *flags))
    for source in (*FIXTURES.glob("*.bpf.c*"), *EXAMPLES.glob("*.bpf.c")):
        name = source.name.partition(".")[0]
        for flags in [(), *((flag,) for flag in _ALSO_WITH.get(name, ()))]:
            (directory / _key(name, flags, CLANG)).write_bytes(compiled(name, *flags))


def _key(name: str, flags: tuple[str, ...], compiler: str) -> str:
    content = hashlib.sha256(_sources(name)).hexdigest()
    return "_".join([name, content[:16], compiler, *flags]) + ".o"


def _executable_key(source: Path, flags: tuple[str, ...]) -> str:
    content = hashlib.sha256(source.read_bytes()).hexdigest()
    return "_".join([source.stem, content[:16], *flags])


def _source(name: str) -> Path:
    """C, or C++ where its name says so."""
    return next(path for place in (FIXTURES, EXAMPLES) for path in place.glob(f"{name}.bpf.c*"))


def _sources(name: str) -> bytes:
    source = _source(name)
    headers = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.h")))
    return source.read_bytes() + headers


@cache
def _compiled(_: bytes, source: Path, flags: tuple[str, ...], compiler: str) -> bytes:
    needs_command(compiler)
    return _built(source, [compiler, "-O2", *_BY_DEFAULT["gcc" in compiler], *flags, "-c"])


def _built(source: Path, command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "built.o")
        subprocess.run([*command, str(source), "-o", str(built)], check=True)
        return built.read_bytes()
