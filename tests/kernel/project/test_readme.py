"""README's page on the toolkit does what it says."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from compiled import compiled
from lab import ROOT
from since import since

HEADING = "### Using the toolkit from Python\n"


def blocks() -> list[str]:
    """The Python of the page."""
    page = (ROOT / "README.md").read_text().partition(HEADING)[2]
    page = re.split(r"^#+ ", page.replace("```python\n", "\0"), maxsplit=1, flags=re.MULTILINE)[0]
    return [part.partition("```")[0] for part in page.split("\0")[1:]]


def promised(code: str) -> list[str]:
    """What its calls of print have behind them."""
    return [line.partition("  # ")[2] for line in code.splitlines() if "print(" in line]


@since("5.11")
def test_the_page_on_the_toolkit_is_true(scratch, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Its blocks run one after the other, and print what they say."""
    (tmp_path / "flows.o").write_bytes(compiled("flows"))
    monkeypatch.chdir(tmp_path)
    code = "".join(blocks()).replace("/sys/fs/cgroup/demo", scratch.path)
    assert len(promised(code)) >= 8
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "page"})  # noqa: S102
    assert printed.getvalue().splitlines() == promised(code)
