from __future__ import annotations

import importlib
import pkgutil
import re
import textwrap

import pytest

import pybpfthrottle
from pybpfthrottle import errors
from pybpfthrottle.bpf import errors as toolkit

# What stands in front of the words about an error.
NAME = re.compile(r"[ ├│└─]*\w+( \(also [\w, ]+\))?")


@pytest.fixture(scope="module")
def _everything():
    """All modules are imported, so that each class of errors is known."""
    for found in pkgutil.walk_packages(pybpfthrottle.__path__, "pybpfthrottle."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def drawn(error, indent=""):
    """The lines that draw the errors below one, in the order of their definitions."""
    known = [c for c in error.__subclasses__() if c.__module__.startswith("pybpfthrottle.")]
    for child in known:
        others = [base.__name__ for base in child.__bases__ if not issubclass(base, errors.Error)]
        also = f" (also {', '.join(others)})" if others else ""
        is_last = child is known[-1]
        yield f"{indent}{'└' if is_last else '├'}── {child.__name__}{also}"
        yield from drawn(child, indent + ("    " if is_last else "│   "))


@pytest.mark.usefixtures("_everything")
def test_the_docstring_draws_the_tree_of_the_classes():
    """The docstring of pybpfthrottle.errors draws each class of errors at its place."""
    picture = errors.__doc__.partition("::\n\n")[2].partition("\n\n")[0]
    names = (NAME.match(line) for line in textwrap.dedent(picture).splitlines())
    lines = [name.group() for name in names]
    assert lines == ["Error", *drawn(errors.Error)]


@pytest.mark.usefixtures("_everything")
def test_each_error_has_a_public_name():
    """Each class of the tree, and no other, can be imported from pybpfthrottle.errors."""
    names = {re.sub(r"\W", "", line.partition(" (")[0]) for line in drawn(errors.Error)}
    assert set(errors.__all__) == {"Error", *names}
    assert all(isinstance(getattr(errors, name), type) for name in names)


def test_the_toolkits_errors_are_the_same_objects():
    """An error of the toolkit is one object under both of its names, and so is the base."""
    assert errors.Error is toolkit.Error
    assert errors.VerifierError is toolkit.VerifierError
