"""The documentation can be built, without a warning, and all of it is linked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as for publication."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(target)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return target


def test_the_command_line_is_complete(site: Path) -> None:
    """The reference has each command and each option of it."""
    import click

    from pybpfthrottle.cli.commands.bare import cli

    page = (site / "reference/cli/index.html").read_text()

    def commands(command: click.Command, context: click.Context) -> Iterator[click.Command]:
        yield command
        for name in command.list_commands(context) if isinstance(command, click.Group) else []:
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, click.Context(below, parent=context))

    for command in commands(cli, click.Context(cli)):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1] in page
    assert "pybpfthrottle verify-setup" in page
    assert "pybpfthrottle bpf load" in page


def test_every_conclusion_is_explained(site: Path) -> None:
    """Troubleshooting has each conclusion of the decision tree, and links to it."""
    from pybpfthrottle.diagnostics import decision

    page = (site / "troubleshooting/index.html").read_text()
    for conclusion in decision.conclusions(decision.TREE):
        assert f'id="{conclusion.id}"' in page
        assert f'href="#{conclusion.id}"' in page


def test_the_api_is_there(site: Path) -> None:
    """The reference has what the package offers."""
    import pybpfthrottle

    page = (site / "reference/api/index.html").read_text()
    for name in pybpfthrottle.__all__:
        assert re.search(rf'id="pybpfthrottle\.[\w.]*\b{name}"', page), name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """A page loads scripts, styles and pictures of the site itself only."""
    loaded = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"')
    for page in site.rglob("*.html"):
        assert loaded.findall(page.read_text()) == []


def test_what_readme_links_to_is_there() -> None:
    """Links of README lead to files of the tree."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert "docs/tutorial.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_has_no_picture_of_its_own() -> None:
    """A package index shows README without the files beside it: a relative image would break."""
    assert re.findall(r"!\[[^]]*\]\((?!https:)", (ROOT / "README.md").read_text()) == []


def test_each_answer_to_a_threat_is_proven_by_a_test() -> None:
    """The tests that the page on security names are there."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    files = (ROOT / "tests").rglob("test_*.py")
    there = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert named
    assert named <= there, named - there
