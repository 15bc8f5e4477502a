"""The spec of an object as JSON beside it, which takes a tenth of the time to read.

Bytes such as code stay in the object: the JSON has their places there. It holds for that very
object only, which its size and checksum tell. No system calls.
"""

from __future__ import annotations

import json
from binascii import crc32
from typing import Any, Optional, Sequence

from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.specs import (
    CallReference,
    ConstantReference,
    ExternReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
    MapSpec,
    ObjectSpec,
    Place,
    ProgramSpec,
    SectionLayout,
    VariableSpec,
)

VERSION = 2


def dump(spec: ObjectSpec, data: bytes) -> str:
    """Return the JSON for a spec that was read from the bytes of an object."""
    fields = {
        **vars(spec),
        "version": VERSION,
        "object": _identity(data),
        "maps": [_map_fields(spec, data) for spec in spec.maps.values()],
        "functions": [
            {**vars(function), "code": _place(function.code, data)}
            for function in spec.functions.values()
        ],
        "programs": [
            {**vars(program), "function": program.function.key}
            for program in spec.programs.values()
        ],
        "variables": [
            {**vars(variable), "map": variable.map.name} for variable in spec.variables.values()
        ],
        "btf": _place(None if spec.btf is None else bytes(spec.btf), data),
        "btf_ext": _place(spec.btf_ext, data),
        "hidden": sorted(spec.hidden),
    }
    return json.dumps(fields, separators=(",", ":")) + "\n"


def load(text: bytes, data: bytes, name: str) -> Optional[ObjectSpec]:
    """Return the spec of the object ``name`` with these bytes; None if the JSON is not its own."""
    try:
        fields = json.loads(text)
        if (fields.pop("version"), fields["name"]) != (VERSION, name):
            return None
        return _spec(fields, data) if fields.pop("object") == _identity(data) else None
    except (ValueError, KeyError, TypeError):
        return None


def _identity(data: bytes) -> list[int]:
    # hashlib would load OpenSSL first, for more time than all of this takes; and a file that is
    # out of date is an accident, not an attack.
    return [len(data), crc32(data)]


def _place(part: Optional[bytes], data: bytes) -> Optional[Sequence[int]]:
    """Return where in an object some bytes are."""
    return None if part is None else (data.index(part), len(part))


def _bytes(place: Optional[Sequence[int]], data: bytes) -> Optional[bytes]:
    return None if place is None else data[place[0] : place[0] + place[1]]


def _map_fields(spec: MapSpec, data: bytes) -> dict[str, Any]:
    """Return the fields of a map that are not as they are if nothing is said."""
    fields = {
        **vars(spec),
        "contents": _place(spec.contents, data),
        "inner": spec.inner and _map_fields(spec.inner, data),
        "initial": list(spec.initial.items()),
    }
    usual = {**vars(MapSpec("", 0, 0, 0, 0)), "initial": []}
    always = ("name", "type", "key_size", "value_size", "max_entries")
    return {key: value for key, value in fields.items() if key in always or value != usual[key]}


def _map(fields: dict[str, Any], data: bytes) -> MapSpec:
    if "contents" in fields:
        fields["contents"] = _bytes(fields["contents"], data)
    if "inner" in fields:
        fields["inner"] = _map(fields["inner"], data)
    if "addresses" in fields:
        fields["addresses"] = tuple(fields["addresses"])
    if "initial" in fields:
        fields["initial"] = dict(fields["initial"])
    return MapSpec(**fields)


def _function(fields: dict[str, Any], data: bytes) -> FunctionSpec:
    calls, callback = fields["call_references"], fields["exception_callback"]
    return FunctionSpec(
        fields["name"],
        FunctionKey(*fields["key"]),
        _bytes(fields["code"], data) or b"",
        tuple(MapReference(*one) for one in fields["map_references"]),
        tuple(CallReference(at, FunctionKey(*key), address) for at, key, address in calls),
        tuple(ExternReference(*one) for one in fields["extern_references"]),
        tuple(ConstantReference(*one) for one in fields["constant_references"]),
        FunctionKey(*callback) if callback else None,
    )


def _program(fields: dict[str, Any], functions: dict[FunctionKey, FunctionSpec]) -> ProgramSpec:
    attach_type = fields["expected_attach_type"]
    fields["type"] = ProgType(fields["type"])
    fields["expected_attach_type"] = None if attach_type is None else AttachType(attach_type)
    fields["function"] = functions[FunctionKey(*fields["function"])]
    return ProgramSpec(**fields)


def _spec(fields: dict[str, Any], data: bytes) -> ObjectSpec:
    maps = {one["name"]: _map(one, data) for one in fields["maps"]}
    read = (_function(one, data) for one in fields["functions"])
    functions = {function.key: function for function in read}
    types = _bytes(fields["btf"], data)
    layouts = fields["layouts"].items()
    return ObjectSpec(
        **{
            **fields,
            "maps": maps,
            "functions": functions,
            "programs": {one["name"]: _program(one, functions) for one in fields["programs"]},
            "variables": {
                one["name"]: VariableSpec(**{**one, "map": maps[one["map"]]})
                for one in fields["variables"]
            },
            "btf": None if types is None else Btf(types),
            "btf_ext": _bytes(fields["btf_ext"], data),
            "layouts": {
                section: SectionLayout(size, {key: Place(*at) for key, at in places.items()})
                for section, (size, places) in layouts
            },
            "hidden": frozenset(fields["hidden"]),
        }
    )
