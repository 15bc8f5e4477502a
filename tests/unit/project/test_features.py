"""The page of what the toolkit supports names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_each_feature_has_a_test() -> None:
    """Each row names a test of a file of the tests."""
    rows = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs/toolkit/features.md").read_text())
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows) > 30
    assert [row for row in rows if f"def {row[1]}(" not in sources.get(row[0], "")] == []
