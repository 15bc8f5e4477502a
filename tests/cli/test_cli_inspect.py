"""inspect as its users see it, on objects of every kind and on what is none."""

from __future__ import annotations

import json
import os

import pytest
from compiled import compiled


@pytest.fixture
def externs(tmp_path):
    """An object with externs, data, and functions of the kernel."""
    path = tmp_path / "externs.o"
    path.write_bytes(compiled("externs"))
    return str(path)


def test_inspect_tells_which_kernels_have_what_it_needs(tool, externs):
    """The first line says it, and a table why."""
    text = tool.run("inspect", externs).text
    assert text.splitlines()[0].endswith("for Linux 5.14 and later")
    assert "  5.13   calls of kernel functions\n" in text
    assert "  .ksyms    bpf_task_release" in text


def test_inspect_json_has_all_of_it(tool, externs):
    """Each part is a list of records, or an object."""
    found = json.loads(tool.run("inspect", "--json", "--types", externs).text)
    for part in ("sections", "programs", "maps", "variables", "externs", "relocations", "needs"):
        assert found[part], part
    assert found["types"]["func"] == 12
    assert "enum libbpf_tristate {" in found["definitions"]
    assert found["oldest_kernel"] == "5.14"


def test_inspect_shows_types_on_request(tool, externs):
    """As C spells them."""
    assert "enum libbpf_tristate {" in tool.run("inspect", "--types", externs).text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/zero", "not a regular file"),
        ("/proc/self/mem", "the file is empty"),
        ("/proc/kmsg", "the file is empty"),
        ("FIFO", "not a regular file"),
        ("SPARSE", "not an ELF file"),
    ],
)
def test_inspect_reads_no_endless_file(tool, tmp_path, path, reason):
    """One clear line and status 1, at once."""
    made = tmp_path / path.lower() if path.isupper() else path
    if path == "FIFO":
        os.mkfifo(made)
    elif path == "SPARSE":
        with open(made, "wb") as file:
            file.truncate(10 << 30)
    result = tool.run("inspect", str(made))
    assert result.status == 1
    assert result.err == f"pybpfthrottle: error: {made}: {reason}\n"


def test_what_is_no_object_is_named_once(tool):
    """By stubs too."""
    result = tool.run("bpf", "stubs", "/etc/passwd")
    assert (result.status, result.err) == (
        1,
        "pybpfthrottle: error: /etc/passwd: not an ELF file\n",
    )
