"""The public face of the toolkit: ``from pybpfthrottle import bpf``."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pybpfthrottle import bpf

SOURCE = Path(bpf.__file__)


def test_the_names_are_sorted():
    """__all__ is in the order of sorted names, each once."""
    assert bpf.__all__ == sorted(set(bpf.__all__))


@pytest.mark.parametrize("name", bpf.__all__)
def test_each_name_is_there(name):
    """A name of the face is the class or function of this name, and is listed by dir()."""
    assert getattr(bpf, name).__name__ == name
    assert name in dir(bpf)


def test_type_checkers_see_each_name_where_it_is():
    """The imports for type checkers are of the same names, from the same modules."""
    (block,) = (
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    seen = {
        alias.name: node.module.removeprefix("pybpfthrottle.bpf.") if node.module else ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == bpf._HOMES


def public_functions(owner):
    """The functions of the face, and the public methods of its classes."""
    if inspect.isfunction(owner):
        yield owner
    elif inspect.isclass(owner):
        for name, member in vars(owner).items():
            if not name.startswith("_") or name == "__init__":
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(function) and function.__module__ == owner.__module__:
                    yield function


@pytest.mark.parametrize("name", bpf.__all__)
def test_each_name_is_typed_and_told_of(name):
    """Each function and method has types for all parameters and the result, and a docstring."""
    owner = getattr(bpf, name)
    assert inspect.getdoc(owner)
    for function in public_functions(owner):
        signature = inspect.signature(function)
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]
        assert missing == [], function
        assert signature.return_annotation is not signature.empty, function
        assert function.__doc__ or function.__name__ == "__init__", function


def test_another_name_is_an_attribute_error():
    """A name that the toolkit does not have is an AttributeError, as for any module."""
    with pytest.raises(AttributeError, match="nonsense"):
        bpf.nonsense  # noqa: B018


def test_importing_the_face_imports_nothing_else():
    """The package alone loads none of its modules; a name loads what it needs only."""
    loaded = "print([name for name in sys.modules if name.startswith('pybpfthrottle.bpf.')])"
    code = f"import sys; from pybpfthrottle import bpf; {loaded}; bpf.MapType; {loaded}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SOURCE.parents[2],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.splitlines() == ["[]", "['pybpfthrottle.bpf.abi']"]
