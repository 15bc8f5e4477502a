"""The shipped objects as files: whether they are whole, current, and have the right sections."""

from __future__ import annotations

import hashlib
import json
import os
import sys

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.bpf.obj.specs import ProgramSpec
from pybpfthrottle.diagnostics import inspection
from pybpfthrottle.diagnostics.check import Check, Result, Setup, failed, passed
from pybpfthrottle.errors import ObjectFileError

_TARGETS = ("bpfel", "bpfeb")


def names() -> list[str]:
    """Return the objects that would be loaded on this kernel."""
    return list(dict.fromkeys(("throttle", programs.object_for(Scope.ALL))))


def loadable(name: str) -> list[str]:
    """Return an object's programs that a limit needs, as far as this kernel has their hooks."""
    return [
        program.name
        for program in programs.of_object(name)
        if program.role is Role.POLICE and programs.is_for_this_kernel(program)
    ]


def shaping(name: str) -> list[str]:
    """Return an object's programs that make limits smooth; older kernels do without them."""
    return [
        program.name
        for program in programs.of_object(name)
        if program.role is not Role.POLICE and programs.is_for_this_kernel(program)
    ]


def _files(setup: Setup) -> Result:
    evidence: list[str] = []
    try:
        manifest = json.loads(programs.data("MANIFEST.json"))
        hashes = {name: entry["sha256"] for name, entry in manifest["objects"].items()}
    except (ObjectFileError, ValueError, KeyError, TypeError) as error:
        return failed(f"prebuilt/MANIFEST.json cannot be read: {error}", cause="missing")
    target = _TARGETS[sys.byteorder != "little"]
    for name in sorted(hashes):
        try:
            data = programs.data(name)
        except ObjectFileError as error:
            return failed(str(error), cause="missing")
        if f".{target}." in name:
            try:
                spec = programs.read_anew(name.partition(".")[0])
            except ObjectFileError as error:
                return failed(f"{name}: {error}", cause="truncated")
            wrong = list(inspection.faults(spec))
            if wrong:
                return failed(f"{name}: {wrong[0]}", *wrong[1:], cause="sections")
            evidence += [
                f"{name}: {one.section}: {one.name}, {_attach_type(one)}"
                for one in spec.programs.values()
            ]
        if hashlib.sha256(data).hexdigest() != hashes[name]:
            return failed(f"{name} does not match MANIFEST.json", cause="stale")
    stale = _stale_sources(manifest.get("sources", {}))
    if stale:
        return failed(f"{', '.join(stale)} changed since the objects were built", cause="stale")
    return passed(f"{len(hashes)} objects are complete and up to date", *evidence)


def _attach_type(program: ProgramSpec) -> str:
    attach = program.expected_attach_type
    return "no attach type" if attach is None else attach.name.lower()


def _stale_sources(hashes: dict[str, str]) -> list[str]:
    """Only a checkout has the sources."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    stale = []
    for name, expected in hashes.items():
        try:
            with open(os.path.join(root, name), "rb") as file:
                found = hashlib.sha256(file.read()).hexdigest()
        except OSError:
            continue
        if found != expected:
            stale.append(name)
    return stale


CHECKS = (
    Check(
        "objects",
        "Shipped objects",
        "sections, attach types and freshness",
        "a limit loads these files, and needs no compiler",
        "reinstall pybpfthrottle; in a checkout, run tools/build_prebuilt",
        _files,
        ("python",),
    ),
)
