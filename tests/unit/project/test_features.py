"""The page of what the toolkit supports names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


PAGE = (ROOT / "docs/toolkit/features.md").read_text()


def test_each_feature_has_a_test() -> None:
    """Each row names a test of a file of the tests."""
    rows = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows) > 30
    assert [row for row in rows if f"def {row[1]}(" not in sources.get(row[0], "")] == []


def test_each_yes_beside_others_has_a_proof() -> None:
    """What we say that others lack or have, we have: each ``yes`` of ours names its test."""
    table = PAGE.partition("## Beside others")[2]
    ours = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| ")]
    said = [cell for cell in ours if cell.startswith("yes")]
    assert len(said) > 8
    assert [cell for cell in said if not re.fullmatch(r"yes: `test_\w+\.py::\w+`", cell)] == []
