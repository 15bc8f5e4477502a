"""Tests of what older kernels lack: skipped there, and only there."""

from __future__ import annotations

import os
import re

import pytest


def since(release: str) -> pytest.MarkDecorator:
    """Skip on a kernel before this release, such as "5.16"."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found
    running = (int(found[1]), int(found[2]))
    wanted = tuple(map(int, release.split(".")))
    return pytest.mark.skipif(running < wanted, reason=f"needs Linux {release}")
