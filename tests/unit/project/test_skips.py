"""A test is skipped for what was looked at and is lacking, and for nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]

BODIES = {
    "itself": "pytest.skip('I do not feel well')",
    "import": "pytest.importorskip('no_such_module')",
    "expected": "pytest.xfail('it never worked')",
    "release": "needs_release('2.6')\n    assert False",
    "old release": "needs_release('99.0')",
    "not any more": "until('2.6', 'it is gone')",
    "command": "needs_command('no-such-command')",
    "allowed command": "needs_command('poor')",
    "option": "needs_option('CONFIG_NET', works=False)",
    "allowed option": "needs_option('CONFIG_POOR', works=False)",
    "no option": "needs_option('CONFIG_NO_SUCH_THING', works=False)",
    "works": "needs_option('CONFIG_NO_SUCH_THING', works=True)\n    assert False",
    "machine": "needs_machine('a swimming pool', found=False)",
}
SKIPPED = {"old release", "not any more", "allowed command", "allowed option", "no option"}
SKIPPED |= {"machine"}
# Those that pytest itself makes of a mark are errors of the setup.
MARKS = {
    "pytest.mark.skip": "ERROR",
    "pytest.mark.skipif(True, reason='so')": "ERROR",
    "pytest.mark.xfail": "FAILED",
    "pytest.mark.parametrize('empty', [])": "ERROR",
    "since('99.0')": "SKIPPED",
    "since('2.6')": "FAILED",
}
HEAD = "import pytest\nfrom since import *\n"


def run(directory: Path, text: str) -> str:
    """Run a file of tests below our conftest.py, and return what pytest says."""
    (directory / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (directory / "test_it.py").write_text(HEAD + text)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = since(release): of Linux\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", str(directory)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "TESTS_MAY_LACK": "poor CONFIG_POOR"},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of all of them: test_0 and on."""
    tests = [f"def test_{i}():\n    {body}\n" for i, body in enumerate(BODIES.values())]
    for number, mark in enumerate(MARKS, len(BODIES)):
        argument = "empty" * ("parametrize" in mark)
        tests.append(f"@{mark}\ndef test_{number}({argument}):\n    assert False\n")
    return run(tmp_path_factory.mktemp("skips"), "\n".join(tests))


def verdict(shown: str, number: int) -> str:
    """The verdict on one test; a skip is told with its place."""
    [found] = re.findall(rf"^\S+::test_{number}(?:\[\S+\])? ([A-Z]+)", shown, re.M)
    return found


@pytest.mark.parametrize("why", BODIES)
def test_a_skip_needs_a_lack(shown, why):
    """Only a lack that was looked at skips; whatever else would skip a test is a failure."""
    wanted = "SKIPPED" if why in SKIPPED else "FAILED"
    assert verdict(shown, list(BODIES).index(why)) == wanted


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_no_way_around(shown, mark):
    """A mark skips on an older kernel, and nowhere else."""
    assert verdict(shown, len(BODIES) + list(MARKS).index(mark)) == MARKS[mark]


def test_a_skip_is_told_with_its_reason(shown):
    """The summary has the test's own line, and what is lacking."""
    assert re.search(r"^SKIPPED \[1\] test_it.py:\d+: needs Linux 99.0$", shown, re.M)


def test_a_file_cannot_skip_itself(tmp_path):
    """That is an error, as if it could not be imported."""
    assert "1 error" in run(tmp_path, "pytest.skip('none of it', allow_module_level=True)\n")
