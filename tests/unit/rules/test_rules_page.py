"""What docs/guides/rules.md and fleet.md show are rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pybpfthrottle.rules import reading
from pybpfthrottle.rules.model import KINDS

GUIDES = Path(__file__).parents[3] / "docs/guides"
PAGE = (GUIDES / "rules.md").read_text()
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE + (GUIDES / "fleet.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_rules(block: str, tmp_path: Path) -> None:
    """It can be read."""
    path = tmp_path / "rules.toml"
    path.write_text(block)
    assert len(reading.read([str(path)]).rules) == block.count("[[rule]]")


def test_all_keys_are_described() -> None:
    """Those of a rule, and those of what it matches."""
    described = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| `.*?\|", PAGE, re.M))))
    assert described == {*reading.KEYS, *reading.GROUP_KEYS, *KINDS}
