"""What docs/guides/schedules.md shows are schedules and conditions."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from pybpfthrottle.rules import schedule, when

PAGE = Path(__file__).parents[3] / "docs/guides/schedules.md"
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
try:
    toml = import_module("tomllib")
except ImportError:  # before Python 3.11
    toml = import_module("tomli")


def test_there_are_blocks():
    """Of both kinds."""
    assert len(BLOCKS) == 5
    assert sum("schedule" in block for block in BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_a_schedule_or_a_condition(block):
    """It can be read."""
    found = toml.loads(block)
    rule = found.get("rule", [found])[0]
    if "schedule" in rule:
        schedule.parse(rule["schedule"])
    else:
        when.parse(rule["when"])
