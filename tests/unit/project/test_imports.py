from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"click", "rich", "elftools"}


def loaded_by(statement):
    """The top-level modules that are there after a statement in a new Python."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "module",
    [
        *("pybpfthrottle", "pybpfthrottle.throttle", "pybpfthrottle.bpf.loader"),
        *(
            "pybpfthrottle.bpf.obj.elf",
            "pybpfthrottle.backends.ebpf.programs",
            "pybpfthrottle.backends.ebpf.backend",
        ),
    ],
)
def test_the_library_loads_no_package_that_it_may_not_need(module):
    """Importing the library loads no package before it is needed, and no parser of Python."""
    found = loaded_by(f"import {module}") - loaded_by("")
    assert found & (HEAVY | {"dataclasses", "inspect", "logging", "subprocess"}) == set()


def scripts():
    """The Python in strings of tests and tools, where no other check would read it."""
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and "\nfrom pybpfthrottle" in str(node.value):
                yield f"{path.name}:{node.lineno}", node.value


@pytest.mark.parametrize("script", [pytest.param(text, id=place) for place, text in scripts()])
def test_what_a_script_imports_is_there(script):
    """The modules and names that a script in a string imports exist."""
    for module, names in re.findall(r"^from (pybpfthrottle\S*) import ([\w, ]+)$", script, re.M):
        found = importlib.import_module(module)
        for name in names.split(", "):
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}")


def test_reading_an_object_loads_pyelftools_only():
    """Reading an object loads pyelftools, and neither click nor rich."""
    statement = (
        "from pybpfthrottle.backends.ebpf import programs; from pybpfthrottle.bpf.obj import elf\n"
        "elf.read_object(programs.data('throttle.bpfel.o'))"
    )
    assert loaded_by(statement) & HEAVY == {"elftools"}


def test_reading_a_shipped_object_loads_no_package():
    """What is stored beside a shipped object does without pyelftools."""
    statement = "from pybpfthrottle.backends.ebpf import programs; programs.read('throttle')"
    assert loaded_by(statement) & HEAVY == set()


def test_the_best_backend_comes_first_and_is_imported_alone():
    """Backends come in the order of their priorities, and each when its turn has come."""
    names = ("ebpf", "nft", "nftables", "recorded", "tc")
    code = (
        "import sys\nfrom pybpfthrottle.backends.protocol import all_backends\n"
        "backends = all_backends()\nnext(backends)\n"
        f"print(*(n for n in {names!r} if 'pybpfthrottle.backends.' + n in sys.modules))\n"
        "print(*(int(one.priority) for one in all_backends()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    first, priorities = done.stdout.splitlines()
    assert first == "ebpf"
    assert priorities.split() == sorted(priorities.split(), reverse=True)


def test_loading_an_object_imports_little():
    """Reading and loading imports no parser of Python, as dataclasses does: 20 ms of each start."""
    statement = (
        "from pybpfthrottle.bpf import loader; from pybpfthrottle.bpf.obj import elf\n"
        "elf.read_file('prebuilt/throttle.bpfel.o')"
    )
    loaded = loaded_by(statement) - loaded_by("")
    assert loaded & {"ast", "dataclasses", "inspect", "pdb"} == set()


@pytest.mark.parametrize("helper", ["backends.ebpf.keeper", "diversion.keeper"])
def test_a_helper_imports_little(helper):
    """It has to be ready before data comes: a tenth of a second after the limit needs it."""
    loaded = loaded_by(f"import pybpfthrottle.{helper}") - loaded_by("")
    assert loaded & (HEAVY | {"ast", "dataclasses", "inspect", "random", "subprocess"}) == set()


def test_each_public_name_is_there():
    """Each name in __all__ can be imported from the package, and they are sorted."""
    import pybpfthrottle

    assert sorted(pybpfthrottle.__all__) == pybpfthrottle.__all__
    for name in pybpfthrottle.__all__:
        assert getattr(pybpfthrottle, name).__name__.rpartition(".")[2] == name


def test_another_name_is_an_attribute_error():
    """A name that the package does not have is an AttributeError, as for any module."""
    import pybpfthrottle

    with pytest.raises(AttributeError, match="nonsense"):
        pybpfthrottle.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["list", "--help"], ["--pid", "x"]]
)
def test_what_needs_no_limit_imports_little(arguments):
    """Help, the version and a mistake wait for no backend, and for few modules at all."""
    code = (
        "import sys; there = set(sys.modules)\n"
        "from pybpfthrottle.cli.app import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(*set(sys.modules) - there, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(done.stderr.splitlines()[-1].split())
    own = [name for name in modules if name.startswith("pybpfthrottle")]
    assert len(own) <= 20
    assert not [name for name in own if name.startswith("pybpfthrottle.backends")]
    assert modules & {"csv", "ctypes", "json", "rich", "select", "socket"} == set()
