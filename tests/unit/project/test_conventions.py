"""The tree keeps to its own rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Written apart, so that this file does not contain them.
MACHINE_PATHS = [b"/" + name for name in (b"work/", b"tmp/venv", b"root/.pyenv")]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "."),
        ("mypy",),
        ("lint-imports", "--config", "setup.cfg", "--no-cache"),
    ],
    ids=" ".join,
)
def test_a_checker_finds_nothing(command):
    """The checker that is configured in the tree finds nothing wrong with it."""
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(program), *command[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def files():
    """The files of the tree but for what tools have made beside them."""
    for directory, names, found in os.walk(ROOT):
        names[:] = [
            name
            for name in names
            if not name.startswith((".", "build", "dist", "__pycache__"))
            and not name.endswith(".egg-info")
        ]
        yield from (Path(directory, name) for name in found)


def test_no_file_names_the_machine_that_it_was_made_on():
    """No file of the tree contains a path of the machine that it was written on."""
    found = list(files())
    assert ROOT / "setup.cfg" in found
    assert [
        str(path.relative_to(ROOT))
        for path in found
        if any(wrong in path.read_bytes() for wrong in MACHINE_PATHS)
    ] == []


def test_the_readmes_commands_are_there():
    """README shows the two commands for newcomers, and both can be run."""
    named = set(re.findall(r"\btools/\w+\b(?!\.)", (ROOT / "README.md").read_text()))
    assert {"tools/demo", "tools/test"} <= named
    assert [name for name in sorted(named) if not os.access(ROOT / name, os.X_OK)] == []


def test_no_two_test_files_have_the_same_name():
    """The tests are no packages, so pytest tells their files apart by name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names


def test_the_command_line_prints_in_one_place():
    """Whatever goes to the terminal is escaped there."""
    printing = re.compile(r"click\.(s?echo|secho)\(|(?<![\w.])print\(")
    found = [
        path.name
        for path in (ROOT / "pybpfthrottle/cli").glob("*.py")
        if printing.search(path.read_text())
    ]
    assert found == ["say.py"]
