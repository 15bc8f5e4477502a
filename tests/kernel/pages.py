"""The code blocks of README and docs: a test runs each of them, or a marker says why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

from lab import ROOT

_FENCE = re.compile(r"^( *)(`{3,})(\S*)[^`]*$")
_MARKER = re.compile(r"^ *<!-- not run: (.+) -->$")
_HEADING = re.compile(r"^#{1,2} (.+)$")


class Block(NamedTuple):
    """One fenced block. ``excuse`` is why it is not run, if a marker before it says so."""

    line: int
    language: str
    text: str
    excuse: Optional[str]


class Section(NamedTuple):
    """What stands below one heading of the first or second level; its blocks run in order."""

    page: str
    heading: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.page}#{re.sub('[^a-z0-9]+', '-', self.heading.lower()).strip('-')}"


def pages() -> list[Path]:
    """README, the changelog, and all pages of docs."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def sections() -> list[Section]:
    """The sections that have a block, of all pages."""
    return [section for page in pages() for section in _sections(page) if section.blocks]


def _sections(page: Path) -> Iterator[Section]:
    name = str(page.relative_to(ROOT))
    heading, blocks = "", list[Block]()
    lines = enumerate(page.read_text().splitlines(), 1)
    previous = ""
    for number, line in lines:
        if found := _FENCE.match(line):
            text = _until_the_fence_ends(lines, found[1], found[2])
            marker = _MARKER.match(previous)
            blocks.append(Block(number, found[3], text, marker[1] if marker else None))
        elif found := _HEADING.match(line):
            yield Section(name, heading, tuple(blocks))
            heading, blocks = found[1], []
        previous = line if line.strip() else previous
    yield Section(name, heading, tuple(blocks))


def _until_the_fence_ends(lines: Iterator[tuple[int, str]], indent: str, fence: str) -> str:
    text = []
    for _, line in lines:
        if line == indent + fence:
            return "".join(f"{each[len(indent) :]}\n" for each in text)
        text.append(line)
    raise AssertionError("a fence does not end")
