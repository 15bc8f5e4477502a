"""README and docs do what they say: their blocks of code are run, or say why not."""

from __future__ import annotations

from typing import Iterator

import pytest
from lab import ROOT
from pages import Section, sections
from since import since
from stage import LANGUAGES, Far, Stage, compare, far_away

from pybpfthrottle.linux.cgroup import Cgroup

SECTIONS = sections()
FOR_CONTRIBUTORS = ("docs/architecture.md", "docs/performance.md", "docs/kernels.md")


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    """A network namespace with a server at its other end."""
    with far_away() as made:
        yield made


def test_every_block_has_a_language() -> None:
    """Each block of each page has a language that can be run, or is text or C."""
    assert [
        f"{section.page}:{block.line}: {block.language!r}"
        for section in SECTIONS
        for block in section.blocks
        if block.language not in LANGUAGES
    ] == []


def test_there_is_something_to_run() -> None:
    """Most blocks are run; README's are, but for the installation.

    What contributors run takes its time: it is excused more often.
    """
    blocks = [(section.page, block) for section in SECTIONS for block in section.blocks]
    used = [(page, block) for page, block in blocks if page not in FOR_CONTRIBUTORS]
    excused = [(page, block) for page, block in used if block.excuse is not None]
    assert len(used) > 100
    assert len(excused) < len(used) / 3
    assert len([page for page, _ in excused if page == "README.md"]) == 1


def test_a_difference_is_found() -> None:
    """Figures may differ from what a page shows; words, missing lines and their order may not."""
    compare(["a 1 KB/s ▁▂", "...", "b ... d"], "a  2.5 MB/s █\nx\nb c d", "")
    for shown in (["a 1 B"], ["a 1 KB/s", "c"], ["b", "a 1 KB/s"], ["a one"]):
        with pytest.raises(AssertionError):
            compare(shown, "a 1 KB/s\nb", "")


def test_readme_is_short() -> None:
    """README is a page to be read at once; the rest is in docs."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


@since("5.11")
@pytest.mark.parametrize(
    "section",
    [each for each in SECTIONS if any(block.excuse is None for block in each.blocks)],
    ids=str,
)
def test_the_section_is_true(section: Section, far: Far, scratch: Cgroup) -> None:
    """The blocks of a section run one after the other, and show what they say."""
    with Stage(far, scratch) as stage:
        stage.play(section)
